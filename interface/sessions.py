"""What a visitor has written with the models. It outlives a reload: the page's address holds the session's token.

Whoever has the address of a page sees its session; nobody else does. Nothing is written to the disk.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import streamlit as st

from interface.sidebar import CheckpointFile

if TYPE_CHECKING:  # these imports take time
    from generation.text_model import Token
    from text.chat import Message

MAX_SESSIONS = 50
MAX_SIZE = 500_000
"""Largest session that outlives a reload, in characters; a token, with its probabilities, counts as ten."""
MAX_BRANCHES = 8


@dataclass
class Answer:
    """The tokens of one answer."""

    model: str
    """description of the model that wrote it"""
    prompt: list[int]
    """the ids of the conversation up to the answer"""
    tokens: list[Token] = field(default_factory=list)


@dataclass
class Conversation:
    """A chat."""

    messages: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    """one for every second message"""
    speed: str = ""
    """of the last answer"""


@dataclass(eq=False)
class Branch:
    """A prompt and one continuation, token by token."""

    name: str
    tokens: list[Token]
    n_prompt: int
    """how many of `tokens` are the prompt"""
    speed: str = ""


@dataclass
class Completion:
    """A prompt and its continuations by a model."""

    file: CheckpointFile
    """the model's checkpoint"""
    n_full_prompt: int
    """tokens of the prompt before it was cut to the context"""
    branch: Branch
    """the continuation on the page"""
    branches: list[Branch] = field(default_factory=list)
    """all continuations, the oldest first"""
    n_made: int = 1

    def __post_init__(self) -> None:
        self.branches.append(self.branch)

    def continue_from(self, position: int, token: Token, name: str) -> None:
        """Puts a new branch on the page, with another token at a position, at which it ends.

        The branch left behind stays in the list. Of too many branches, the oldest is dropped.
        """
        self.n_made += 1
        old = self.branch
        self.branch = Branch(f"{self.n_made}: {name}", [*old.tokens[:position], token], min(old.n_prompt, position))
        self.branches.append(self.branch)
        if len(self.branches) > MAX_BRANCHES:
            self.branches.remove(next(branch for branch in self.branches if branch not in (old, self.branch)))

    def show(self, branch: Branch) -> None:
        """Puts a branch on the page."""
        self.branch = branch


@dataclass
class Session:
    """Everything that outlives a reload, apart from the model, whose name the address holds."""

    token: str
    conversation: Conversation = field(default_factory=Conversation)
    completion: Completion | None = None
    prompt: str = ""
    """the beginning of a text to complete"""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """held while the model writes"""

    @property
    def size(self) -> int:
        """Characters of all texts, as `MAX_SIZE` counts them."""
        branches = self.completion.branches if self.completion else []
        texts: list[Answer | Branch] = [*self.conversation.answers, *branches]
        n_tokens = sum(len(text.tokens) for text in texts)
        n_ids = sum(len(answer.prompt) for answer in self.conversation.answers)
        n_characters = len(self.prompt) + sum(len(message["content"]) for message in self.conversation.messages)
        return n_characters + n_ids + 10 * n_tokens


_sessions: dict[str, Session] = {}  # by token, the last used at the end
_sessions_lock = threading.Lock()


def current_session() -> Session:
    """Returns the session of this page: after a reload the one that the address names, otherwise a new one.

    An address with an unknown token gets a new token: nobody can choose the token of somebody else. The sessions that
    were not used for the longest time are forgotten, and those that are too large.
    """
    state = st.session_state
    with _sessions_lock:
        if "session" not in state:
            state.session = _sessions.get(st.query_params.get("session", "")) or Session(secrets.token_urlsafe(16))
        session: Session = state.session
        _sessions.pop(session.token, None)
        if session.size <= MAX_SIZE:
            _sessions[session.token] = session
        while len(_sessions) > MAX_SESSIONS:
            del _sessions[next(iter(_sessions))]
    if st.query_params.get("session") != session.token:
        st.query_params["session"] = session.token
    return session
