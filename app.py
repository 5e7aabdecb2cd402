"""Step 6: a page to chat with a model, to look inside its choices, and to follow its training.

Start it with `streamlit run app.py`.
"""

import sys

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from interface.page import escape, open_page, pick_checkpoint, pick_sampling
from system.cli import GENERATION, limit_spinning
from system.errors import UserError


def main() -> None:
    """Draws the page: first the sidebar, which needs no model, then the chosen mode."""
    limit_spinning(GENERATION)
    if get_script_run_ctx() is None:
        sys.exit("error: this is a page: start it with `streamlit run app.py`")
    st.set_page_config("GPT-2", page_icon="💬", layout="centered")
    page = open_page()
    with st.sidebar:
        file = pick_checkpoint()
    if file is None:
        return
    top = st.container()
    with st.sidebar:
        pick_sampling()

    state, text_model, problem = None, None, ""
    with st.sidebar, st.spinner("Loading the model"):
        # these import torch, which takes seconds: the controls are on the screen by now
        from interface.chat_view import chat_view
        from interface.compare_view import compare_view
        from interface.completion_view import completion_view
        from interface.inside_view import inside_view
        from interface.loaded_model import load_model
        from interface.training_view import training_view
        from weights.describe import facts, introduction

        try:
            state, text_model = load_model(str(file.path), file.modified)
        except (UserError, OSError) as error:
            problem = str(error)
    prompts = state.get("prompts", []) if state else []
    is_chat_model = bool(text_model and text_model.template)
    with top:
        st.title("GPT-2", anchor=False)
        if state:
            st.markdown(escape(introduction(state)))
        modes = ("Chat", "Completion", "Inside", "Training")
        st.session_state.setdefault("mode", "Chat" if is_chat_model else "Completion")
        mode = st.segmented_control("Mode", modes, required=True, key="mode", label_visibility="collapsed")
    if state:
        with st.sidebar.expander("About this model"):
            st.text("\n".join(f"{name}: {value}" for name, value in facts(state).items()))
    with page.lock:  # waits until the thread of a stopped text has stored it
        pass
    beginnings = [] if is_chat_model else prompts
    if mode == "Training":
        training_view(file.path.with_suffix(".jsonl"))
    elif problem:
        st.error("This model cannot be loaded.")
        st.text(problem)
    elif text_model is None:
        st.info(f"This model is a classifier. Ask it with `python classify.py --model {file.path}`.")
    elif mode == "Chat":
        chat_view(text_model, file, prompts)
    elif mode == "Inside":
        inside_view(text_model, prompts)
    elif st.toggle("Compare", key="compare", help="Shows a second completion of the same prompt beside the first."):
        compare_view(text_model, file, beginnings)
    else:
        completion_view(text_model, file, beginnings)


main()
