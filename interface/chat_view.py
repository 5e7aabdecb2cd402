"""The chat on the page: a conversation with a fine-tuned model."""

from __future__ import annotations

import json
import time

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.text_model import Chat, Sample, TextModel
from interface.sessions import Answer, Conversation, Session
from interface.sidebar import CheckpointFile
from interface.streaming import clip, offer_prompts, show_stream, speed_line
from interface.token_view import draw_bars, draw_chips
from weights.describe import fine_tuning_command

GENERIC_PROMPTS = ("What can you do?", "What is the capital of France?", "Tell me a story.")


def chat_view(text_model: TextModel, file: CheckpointFile, session: Session, prompts: list[str]) -> None:
    """Draws the conversation, and answers a new message. `file` is the model's; `prompts` are offered first."""
    if not text_model.template:
        teach = fine_tuning_command(file.path, text_model.model.n_parameters())
        st.info("This model was not trained to chat. Choose Completion above, or another model, or teach this one:")
        st.code(f"{teach} --data CHATS.jsonl", None, wrap_lines=True)
        return
    state, conversation = st.session_state, session.conversation
    with session.lock:  # until a stopped answer is stored
        chat = Chat(text_model, state.sampling, conversation.messages)
    del conversation.answers[len(chat.messages) // 2 :]  # of messages that were taken back
    history, controls = st.container(), st.empty()
    new_message = st.chat_input("Your message", submit_mode="disable") or state.pop("message to send", None)
    with history:
        draw_messages(chat, conversation)
        if not new_message and not chat.messages:
            offer_prompts(prompts or GENERIC_PROMPTS, lambda text: state.update({"message to send": text}))
    if new_message or not chat.messages:
        state.editing = False
    if new_message:
        answer_message(chat, new_message, session, history, controls)
        if state.get("tokens"):
            st.rerun()  # the new answer as tokens
    if state.get("editing"):
        edit_form(chat, controls)
    elif chat.messages:
        buttons(chat, conversation.speed, controls)


def draw_messages(chat: Chat, conversation: Conversation) -> None:
    """Draws what was said so far. If the user wants to see tokens, answers become chips."""
    answers = {2 * i + 1: one for i, one in enumerate(conversation.answers)}
    for i, message in enumerate(chat.messages):
        with st.chat_message(message["role"]):
            answer = answers.get(i)
            if st.session_state.get("tokens") and answer and answer.model == chat.text_model.description:
                draw_tokens(chat.text_model, answer, i)
            else:
                st.text(clip(message["content"]))


def draw_tokens(text_model: TextModel, answer: Answer, i: int) -> None:
    """Draws the tokens of the answer in message `i`, and the candidates at the token that the user clicked."""
    state = st.session_state
    message, position = state.get("clicked token", (None, 0))
    is_here = message == i and position < len(answer.tokens)
    draw_chips(
        text_model.tokenizer,
        answer.tokens,
        0,
        position if is_here else None,
        f"chips {i}",
        lambda position: state.update({"clicked token": (i, position)}),
    )
    if is_here:
        ids = [*answer.prompt, *(token.id for token in answer.tokens[:position])]
        draw_bars(text_model, ids, answer.tokens[position], f"bars {i}")


def answer_message(
    chat: Chat, message: str, session: Session, history: DeltaGenerator, controls: DeltaGenerator
) -> None:
    """Streams the answer to a message. If the user presses Stop, the text so far stays."""
    conversation, text_model = session.conversation, chat.text_model
    sample = Sample()
    with history.chat_message("user"):
        st.text(clip(message))
    with history.chat_message("assistant"):
        placeholder = st.empty()
    controls.button("Stop", icon=":material/stop_circle:")
    start = time.monotonic()
    ids = text_model.answer_ids([*chat.messages, {"role": "user", "content": message}], chat.config)
    with session.lock:
        conversation.answers.append(Answer(text_model.description, ids, sample.tokens))
        try:
            show_stream(chat.reply(message, sample, top_logprobs=0), placeholder, lambda: sample.text)
        finally:  # after Stop, this thread can no longer read the session state
            conversation.speed = speed_line(sample, start, text_model.model.config.block_size)
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
        st.toggle(
            "Tokens", key="tokens", help="Shows how probable each token of an answer was. Click one for the others."
        )
        st.caption(speed)


def regenerate(chat: Chat) -> None:
    """Takes back the last exchange and sends its message again. Two quick clicks count as one."""
    if not st.session_state.get("message to send"):
        st.session_state["message to send"] = chat.undo()
