"""Step 6: a page to talk to the model and to see what it was about to say. Start it with `streamlit run app.py`."""

from pathlib import Path

import streamlit as st

from cli import SamplingConfig, UserError
from sampling import Chat, TextModel

NO_MODEL = """There is no model yet. Either of these makes one:

    make demo                # a small one, trained on this computer in a few minutes
    python prepare_data.py && python train.py    # GPT-2, on a GPU"""


def main() -> None:
    """Draws the page."""
    st.set_page_config("GPT-2", layout="centered")
    st.title("GPT-2")
    text_model = pick_model()
    if text_model is None:
        return
    config = pick_sampling()
    chat_tab, completion_tab = st.tabs(["Chat", "Completion"])
    with chat_tab:
        chat_mode(text_model, config)
    with completion_tab:
        completion_mode(text_model, config)


def pick_model() -> TextModel | None:
    """Offers the checkpoints under `checkpoints/`, the newest first; returns the loaded one."""
    paths = [path for path in Path("checkpoints").rglob("*.pt") if not path.name.endswith(".last.pt")]
    if not paths:
        st.info(NO_MODEL)
        return None
    paths.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    path = st.sidebar.selectbox("Model", paths)
    try:
        text_model = load(str(path), path.stat().st_mtime)
    except (UserError, OSError) as error:
        st.error(str(error))
        return None
    st.sidebar.text(text_model.facts)
    return text_model


@st.cache_resource(max_entries=1, show_spinner="Loading the model")
def load(path: str, modified: float) -> TextModel:
    """Loads a checkpoint once for all sessions; `modified`, its time stamp, tells a new one under the old name."""
    return TextModel.load(path)


def pick_sampling() -> SamplingConfig:
    """Draws the controls of how tokens are chosen."""
    with st.sidebar:
        temperature = st.slider(
            "Temperature",
            0.0,
            2.0,
            0.8,
            0.05,
            help="Below 1 likely tokens become likelier, above 1 the text becomes wilder; 0 is greedy.",
        )
        top_k = st.slider("Top k", 1, 200, 50, help="Draw from this many likeliest tokens only.")
        top_p = st.slider(
            "Top p", 0.05, 1.0, 1.0, 0.05, help="Draw from the fewest tokens that together have this probability."
        )
        max_new_tokens = st.slider("Length", 1, 500, 100, help="Longest answer or completion, in tokens.")
        seed = st.number_input(
            "Seed", 0, None, None, help="The same seed gives the same text; empty for another each time."
        )
    return SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


def chat_mode(text_model: TextModel, config: SamplingConfig) -> None:
    """A conversation, kept as long as the page is open."""
    if not text_model.template:
        st.info("This model was not trained to chat, it completes text: use the tab Completion, or pick another model.")
        return
    messages = st.session_state.setdefault("messages", [])
    history = st.container()
    for message in messages:
        with history.chat_message(message["role"]):
            st.text(message["content"])
    if text := st.chat_input("Your message"):
        with history.chat_message("user"):
            st.text(text)
        with history.chat_message("assistant"):
            show(Chat(text_model, config, messages).reply(text))
    if messages and st.button("New chat"):
        messages.clear()
        st.rerun()


def completion_mode(text_model: TextModel, config: SamplingConfig) -> None:
    """A prompt, its completion, and the probability that the model gave to each token of the text."""
    prompt = st.text_area("Beginning of a text", key="prompt")
    if st.button("Complete"):
        st.session_state["completed"] = prompt + show(text_model.complete(prompt, config), prompt)
    elif "completed" in st.session_state:
        st.text(st.session_state["completed"])
    if "completed" in st.session_state:
        with st.expander("Token probabilities"):
            st.dataframe(text_model.token_probabilities(st.session_state["completed"]), hide_index=True)


def show(pieces, text: str = "") -> str:
    """Streams pieces behind a text into the page, as plain text; returns them joined."""
    place, answer = st.empty(), ""
    for piece in pieces:
        answer += piece
        place.text(text + answer)
    return answer


main()
