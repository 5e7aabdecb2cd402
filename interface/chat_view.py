"""The chat on the page: a conversation with a fine-tuned model."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.text_model import Chat, Sample, TextModel
from interface.streaming import clip, generation_lock, show_stream, speed_line, wait_for_generation
from text.templates import Message


@dataclass
class Conversation:
    """What a session keeps of its chat while the page is open."""

    messages: list[Message] = field(default_factory=list)
    speed: str = ""
    """of the last answer"""


def chat_view(text_model: TextModel) -> None:
    """Draws the conversation, and answers a new message."""
    if not text_model.template:
        st.info("This model was not trained to chat. Choose Completion above, or another model.")
        return
    state = st.session_state
    conversation = state.setdefault("conversation", Conversation())
    wait_for_generation()
    chat = Chat(text_model, state.sampling, conversation.messages)
    history, controls = st.container(), st.empty()
    for message in chat.messages:
        with history.chat_message(message["role"]):
            st.text(clip(message["content"]))
    new_message = st.chat_input("Your message", submit_mode="disable") or state.pop("message to send", None)
    if new_message or not chat.messages:
        state.editing = False
    if new_message:
        answer(chat, new_message, conversation, history, controls)
    if state.get("editing"):
        edit_form(chat, controls)
    elif chat.messages:
        buttons(chat, conversation.speed, controls)


def answer(
    chat: Chat, message: str, conversation: Conversation, history: DeltaGenerator, controls: DeltaGenerator
) -> None:
    """Streams the answer to a message. If the user presses Stop, the text so far stays."""
    sample = Sample()
    with history.chat_message("user"):
        st.text(clip(message))
    with history.chat_message("assistant"):
        placeholder = st.empty()
    controls.button("Stop", icon=":material/stop_circle:")
    start = time.monotonic()
    with generation_lock():
        try:
            show_stream(chat.reply(message, sample), placeholder, lambda: sample.text)
        finally:  # after Stop, this thread can no longer read the session state
            conversation.speed = speed_line(sample, start, chat.text_model.model.config.block_size)
    if not sample.text:
        placeholder.caption("The model gave an empty answer.")


def edit_form(chat: Chat, controls: DeltaGenerator) -> None:
    """Lets the user change the last message and send it again."""
    with controls.form("edit"):
        text = st.text_area("Your last message", chat.messages[-2]["content"])
        with st.container(horizontal=True):
            send, cancel = st.form_submit_button("Send", type="primary"), st.form_submit_button("Cancel")
    if cancel or (send and text.strip()):
        st.session_state.editing = False
        if send:
            chat.undo()
            st.session_state["message to send"] = text
        st.rerun()


def buttons(chat: Chat, speed: str, controls: DeltaGenerator) -> None:
    """Draws what the user can do with the conversation, and the speed of the last answer."""
    with controls.container(), st.container(horizontal=True, vertical_alignment="center"):
        st.button("Regenerate", on_click=regenerate, args=(chat,), icon=":material/refresh:")
        st.button("Edit", on_click=lambda: st.session_state.update(editing=True), icon=":material/edit:")
        st.button("Clear", on_click=chat.reset, icon=":material/delete:")
        st.download_button(
            "Download",
            json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n",
            "conversation.jsonl",
            icon=":material/download:",
            on_click="ignore",
            help="One line of JSON, which `prepare_sft_data.py --input` reads.",
        )
        st.caption(speed)


def regenerate(chat: Chat) -> None:
    """Takes back the last exchange and sends its message again. Two quick clicks count as one."""
    if not st.session_state.get("message to send"):
        st.session_state["message to send"] = chat.undo()
