"""A text field whose text arrives while the user types; Streamlit's own sends it when the user leaves the field."""

from __future__ import annotations

import streamlit as st

MAX_CHARACTERS = 20_000

_FIELD = st.components.v2.component(
    "live_text",
    html='<label><span></span><textarea rows="3"></textarea></label>',
    css="""
        label { font-family: var(--st-font); font-size: 0.875rem; color: var(--st-text-color); }
        textarea { box-sizing: border-box; width: 100%; margin-top: 0.25rem; padding: 0.5rem; font: inherit;
                   font-size: 1rem; color: inherit; background: var(--st-secondary-background-color);
                   border: 1px solid var(--st-border-color); border-radius: 0.5rem; resize: vertical; }
    """,
    js="""
        export default function ({ data, parentElement, setStateValue }) {
            const field = parentElement.querySelector("textarea");
            parentElement.querySelector("span").textContent = data.label;
            field.maxLength = data.max;
            if (field.dataset.seen !== data.text && field.getRootNode().activeElement !== field) {
                field.value = data.text;  // not while the user types: the answer may be older than the field
            }
            field.dataset.seen = data.text;
            field.oninput = () => {
                clearTimeout(field.timer);
                field.timer = setTimeout(() => setStateValue("text", field.value), 150);
            };
        }
    """,
)


def live_text(key: str, label: str, example: str) -> str:
    """Draws the field and returns its text. `st.session_state["KEY_text"]` sets it; until then it is `example`."""
    state, name = st.session_state, f"{key}_text"
    text: str = state.get(name, example)

    def typed() -> None:
        state[name] = (state[f"{key}_field"].text or "")[:MAX_CHARACTERS]

    data = {"text": text, "label": label, "max": MAX_CHARACTERS}
    _FIELD(key=f"{key}_field", data=data, on_text_change=typed)
    return text
