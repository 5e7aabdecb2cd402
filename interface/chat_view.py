"""The chat on the page: a conversation with a fine-tuned model."""

import json
from functools import partial

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from generation.text_model import Chat, TextModel
from interface.page import PageState, Text, current_page, offer_prompts, show_stream
from interface.tokens import begin, draw_bars, draw_chips
from weights.describe import fine_tuning_command
from weights.files import CheckpointFile

GENERIC_PROMPTS = ("What can you do?", "What is the capital of France?", "Tell me a story.")


def chat_view(text_model: TextModel, file: CheckpointFile, prompts: list[str]) -> None:
    """Draws the conversation, and answers a new message. `file` is the model's; `prompts` are offered first."""
    if not text_model.template:
        command = fine_tuning_command(file.path, text_model.model.n_parameters())
        st.info("This model was not trained to chat. Choose Completion above, or another model, or teach this one:")
        st.code(f"{command} --data CHATS.jsonl", None, wrap_lines=True)
        return
    page = current_page()
    chat = Chat(text_model, page.sampling, page.messages)
    del page.answers[len(page.messages) // 2 :]  # of messages that were taken back
    history, controls = st.container(), st.empty()
    new_message = st.chat_input("Your message", submit_mode="disable") or page.message_to_send
    page.message_to_send = ""
    with history:
        draw_messages(text_model, file, page)
        if not new_message and not page.messages:
            offer_prompts(prompts or GENERIC_PROMPTS, partial(setattr, page, "message_to_send"))
    if new_message or not page.messages:
        page.is_editing = False
    if new_message:
        answer_message(chat, file, new_message, history, controls)
        if st.session_state.get("tokens"):
            st.rerun()  # the new answer as tokens
    if page.is_editing:
        edit_form(chat, page, controls)
    elif page.messages:
        draw_buttons(chat, page, controls)


def draw_messages(text_model: TextModel, file: CheckpointFile, page: PageState) -> None:
    """Draws what was said so far. If the user wants to see tokens, answers become chips."""
    answers = {2 * i + 1: answer for i, answer in enumerate(page.answers) if answer.file == file}
    for i, message in enumerate(page.messages):
        with st.chat_message(message["role"]):
            if st.session_state.get("tokens") and i in answers:
                draw_answer(text_model, page, answers[i], i)
            else:
                st.text(message["content"])
            if i in answers:
                note_guess(text_model, answers[i])


def draw_answer(text_model: TextModel, page: PageState, answer: Text, i: int) -> None:
    """Draws the tokens of the answer in message `i`, and the candidates at the token that the user clicked."""
    clicked, position = page.clicked_token or (None, 0)
    is_here = clicked == i and position < len(answer.tokens)

    def choose(position: int) -> None:
        page.clicked_token = (i, position)

    draw_chips(answer, f"chips {i}", answer.n_prompt, chosen=position if is_here else None, on_click=choose)
    if is_here:
        draw_bars(text_model, answer, position, f"bars {i}")


def answer_message(
    chat: Chat, file: CheckpointFile, message: str, history: DeltaGenerator, controls: DeltaGenerator
) -> None:
    """Streams the answer to a message. If the user presses Stop, the text so far stays."""
    with history.chat_message("user"):
        st.text(message)
    with history.chat_message("assistant"):
        placeholder = st.empty()
    controls.button("Stop", icon=":material/stop_circle:")
    ids = chat.text_model.answer_ids([*chat.messages, {"role": "user", "content": message}], chat.config)
    answer = begin(chat.text_model, file, ids, "answer")
    current_page().answers.append(answer)
    if not show_stream(answer, chat.reply(message, top_logprobs=0), placeholder).text:
        placeholder.caption("The model gave an empty answer.")
    with history:
        note_guess(chat.text_model, answer)


def note_guess(text_model: TextModel, answer: Text) -> None:
    """Says below an answer if the model was not sure of it."""
    if text_model.is_guess(answer.tokens[answer.n_prompt :]):
        st.caption("A guess: the model is not sure.")


def edit_form(chat: Chat, page: PageState, controls: DeltaGenerator) -> None:
    """Lets the user change the last message and send it again."""
    with controls.form("edit"):
        text = st.text_area("Your last message", page.messages[-2]["content"])
        with st.container(horizontal=True):
            send, cancel = st.form_submit_button("Send", type="primary"), st.form_submit_button("Cancel")
    if send and text.strip():
        chat.undo()
        page.message_to_send = text
    if cancel or (send and text.strip()):
        page.is_editing = False
        st.rerun()


def draw_buttons(chat: Chat, page: PageState, controls: DeltaGenerator) -> None:
    """Draws what the user can do with the conversation, and the speed of the last answer."""
    with controls.container(), st.container(horizontal=True, vertical_alignment="center"):
        st.button("Regenerate", on_click=regenerate, args=(chat, page), icon=":material/refresh:")
        st.button("Edit", on_click=setattr, args=(page, "is_editing", True), icon=":material/edit:")
        st.button("Clear", on_click=chat.messages.clear, icon=":material/delete:")
        st.download_button(
            "Download",
            json.dumps({"messages": page.messages}, ensure_ascii=False) + "\n",
            "conversation.jsonl",
            icon=":material/download:",
            on_click="ignore",
            help="One line of JSON, which `prepare_sft_data.py --input` reads.",
        )
        st.toggle(
            "Tokens", key="tokens", help="Shows how probable each token of an answer was. Click one for the others."
        )
        if page.answers:
            st.caption(page.answers[-1].speed)


def regenerate(chat: Chat, page: PageState) -> None:
    """Takes back the last exchange and sends its message again. Two quick clicks count as one."""
    page.message_to_send = page.message_to_send or chat.undo() or ""
