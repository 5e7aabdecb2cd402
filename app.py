"""Step 6: a page to talk to the model, and to see what it was about to say. Start it with `streamlit run app.py`."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import streamlit as st

from generation.config import SamplingConfig
from system.errors import UserError

NO_MODEL = """There is no model yet. Either of these makes one:

    make demo                                    # a small one, on this computer, in a few minutes
    python prepare_data.py && python train.py    # GPT-2, on a GPU"""
RUNNING = 300  # seconds after its last line of log that a training run is taken for running
MODES = ("Chat", "Completion", "Training")
LONGEST = 20_000  # characters of one text on the page


def main() -> None:
    """Draws the page."""
    st.set_page_config("GPT-2", page_icon="💬", layout="centered")
    for key in ("prompt", "step"):  # kept while another mode is on the page
        if key in st.session_state:
            st.session_state[key] = st.session_state[key]
    with st.sidebar:
        path, modified = pick_model()
    if path is None:
        return
    place = st.container()  # what needs no model is drawn before one is loaded
    with st.sidebar:
        pick_sampling()
        facts, model, problem = None, None, ""
        try:
            facts, model = load(str(path), modified)
        except (UserError, OSError) as error:
            problem = str(error)
    with place:
        mode = st.segmented_control(
            "Mode",
            MODES,
            default="Chat" if model and model.template else "Completion",
            required=True,
            key=f"mode of {path}",
            label_visibility="collapsed",
        )
    if facts:
        with st.sidebar.expander("About this model"):
            st.text("\n".join(f"{name}: {value}" for name, value in facts.items()))
    if mode == "Training":
        training_mode(path)
    elif problem:
        st.error("This model cannot be loaded.")
        st.text(problem)
    elif model is None:
        st.info(f"This model tells texts apart, it writes none: `python classify.py --model {path}` asks it.")
    elif mode == "Chat":
        chat_mode(model)
    else:
        completion_mode(model, f"{path} {modified}")


def pick_model() -> tuple[Path | None, float]:
    """Offers the checkpoints under `checkpoints/`, the newest first; returns one and when it was written."""
    times = {}
    for path in Path("checkpoints").rglob("*.pt"):
        with contextlib.suppress(OSError):  # one that is deleted meanwhile
            if not path.name.endswith(".last.pt"):
                times[path] = path.stat().st_mtime
    if not times:
        st.title("GPT-2")
        st.info(NO_MODEL)
        return None, 0.0
    paths = sorted(times, key=lambda path: times[path], reverse=True)
    if (gone := st.session_state.get("model")) is not None and gone not in paths:
        st.warning("The model that was picked is gone:")
        st.text(gone)
    path = st.selectbox("Model", paths, key="model", format_func=lambda path: str(path.relative_to("checkpoints")))
    return path, times[path]


@st.cache_resource(max_entries=1, show_spinner="Loading the model")
def load(path: str, modified: float) -> tuple:
    """Loads a checkpoint once for all sessions; `modified`, its time stamp, tells a new one under the old name.

    Returns its facts and its TextModel, None for a classifier. Raises UserError where it cannot be read.
    """
    from generation.text_model import TextModel
    from weights import checkpoint
    from weights.loading import load_checkpoint

    state = load_checkpoint(path, kinds=("base", "sft", "classifier"))
    if state["kind"] == "classifier":
        return checkpoint.facts(state), None
    model = TextModel.of(state, path)
    for parameter in model.model.parameters():  # no longer pages of the file, which somebody may write to
        parameter.data = parameter.data.clone()
    return checkpoint.facts(state), model


@st.fragment  # so that a change neither draws the page anew nor breaks off an answer
def pick_sampling() -> None:
    """Draws the controls of how tokens are chosen, and keeps what they say for the next answer."""
    temperature = st.slider(
        "Temperature",
        0.0,
        2.0,
        0.8,
        0.05,
        help="Below 1 likely tokens become likelier, above 1 the text becomes wilder; 0 always takes the likeliest.",
    )
    top_k = st.slider("Top k", 0, 200, 50, help="Draw from this many likeliest tokens only; 0 for all.")
    top_p = st.slider(
        "Top p", 0.05, 1.0, 1.0, 0.05, help="Draw from the fewest tokens that together have this probability."
    )
    penalty = st.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05, help="Above 1, what occurred becomes less likely.")
    length = st.slider("Length", 1, 1000, 200, help="Longest answer or completion, in tokens.")
    seed = st.number_input("Seed", 0, None, None, help="Equal seeds give equal texts; empty, every text is another.")
    st.session_state.sampling = SamplingConfig(
        max_new_tokens=length,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        repetition_penalty=penalty,
        seed=seed,
    )


def clipped(text: str) -> str:
    """Returns a text as far as the page shows it: the end, where it is very long."""
    return text if len(text) <= LONGEST else f"… ({len(text) - LONGEST:,} characters)\n{text[-LONGEST:]}"


def stream(pieces: Iterator[str], place, text: Callable[[], str]) -> None:
    """Shows what `text` returns while pieces come, as plain text.

    Where somebody presses Stop, Streamlit runs the page anew in another thread, and raises in this one what ends it.
    """
    with contextlib.closing(pieces):
        drawn = time.monotonic()
        for _ in pieces:
            st.session_state.get("lock")  # this, too, ends here where the page is to be drawn anew
            if time.monotonic() - drawn > 0.1:
                place.text(clipped(text()))
                drawn = time.monotonic()
    place.text(clipped(text()))


def writing() -> threading.Lock:
    """Returns the lock that this session holds while a text is being written."""
    return st.session_state.setdefault("lock", threading.Lock())


def speed(sample, start: float, model) -> str:
    """Returns how fast a sample was written since `start`, and what part of the context is used."""
    n, context, seconds = len(sample.tokens), model.model.config.block_size, time.monotonic() - start
    used = min(sample.n_prompt + n, context)
    return f"{n:,} tokens · {n / max(seconds, 1e-9):,.1f} tokens/s · context {used:,} of {context:,}"


def chat_mode(model) -> None:
    """A conversation, kept as long as the page is open."""
    from generation.text_model import Chat

    if not model.template:
        st.info("This model was not trained to chat. Choose Completion above, or another model.")
        return
    state = st.session_state
    with writing():  # what was stopped has ended
        chat = Chat(model, state.sampling, state.setdefault("messages", []))
    history, below = st.container(), st.empty()
    for message in chat.messages:
        with history.chat_message(message["role"]):
            st.text(clipped(message["content"]))
    asked = st.chat_input("Your message", submit_mode="disable") or state.pop("asked", None)
    if asked or not chat.messages:
        state.editing = False
    if asked:
        answer(chat, asked, history, below)
    if state.get("editing"):
        with below.form("edit"):
            text = st.text_area("Your last message", chat.messages[-2]["content"])
            with st.container(horizontal=True):
                send, cancel = st.form_submit_button("Send", type="primary"), st.form_submit_button("Cancel")
        if cancel or (send and text.strip()):
            state.editing = False
            if send:
                chat.undo()
                state.asked = text
            st.rerun()
    elif chat.messages:
        with below.container(), st.container(horizontal=True, vertical_alignment="center"):
            st.button("Regenerate", on_click=regenerate, args=(chat,), icon=":material/refresh:")
            st.button("Edit", on_click=lambda: state.update(editing=True), icon=":material/edit:")
            st.button("Clear", on_click=chat.reset, icon=":material/delete:")
            st.download_button(
                "Download",
                json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n",
                "conversation.jsonl",
                icon=":material/download:",
                on_click="ignore",
                help="One line of JSON, as `prepare_sft_data.py --input` reads it.",
            )
            st.caption(state.get("chat speed", [""])[0])


def regenerate(chat) -> None:
    """Takes back the last exchange, to ask the same again; once, however often the button was pressed."""
    if not st.session_state.get("asked"):
        st.session_state.asked = chat.undo()


def answer(chat, text: str, history, below) -> None:
    """Streams the answer to a message; what came until Stop was pressed is kept."""
    from generation.text_model import Sample

    sample, told = Sample(), st.session_state.setdefault("chat speed", [""])
    with history.chat_message("user"):
        st.text(clipped(text))
    with history.chat_message("assistant"):
        place = st.empty()
    below.button("Stop", icon=":material/stop_circle:")
    start = time.monotonic()
    with writing():
        try:
            stream(chat.reply(text, sample), place, lambda: sample.text)
        finally:
            told[0] = speed(sample, start, chat.text_model)
    if not sample.text:
        place.caption("The model ended its answer at once.")


@dataclass
class Completion:
    """A prompt and what a model wrote behind it, token by token."""

    model: str
    tokens: list = field(default_factory=list)
    n_prompt: int = 0
    """how many of them were given"""
    n_given: int = 0
    """tokens of the prompt, those before the context too"""
    speed: str = ""


def completion_mode(model, name: str) -> None:
    """A prompt, its completion, and what the model thought at every token of the text."""
    from generation.text_model import Token
    from interface.token_view import TOP, token_view

    state = st.session_state
    prompt = st.text_area("Beginning of a text", key="prompt", placeholder="Once upon a time")
    started, below = st.button("Complete", type="primary", icon=":material/play_arrow:"), st.empty()
    with writing():  # what was stopped has ended
        completion = state.get("completion")
    if started:
        ids = model.prompt_ids(prompt)
        kept = ids[-model.model.config.block_size :]
        completion = Completion(name, [Token(i) for i in kept], len(kept), len(ids))
        state.completion, state.step = completion, len(kept) + 1
    elif completion is None or completion.model != name:
        return
    with st.container(border=True):
        place = st.empty()
    view = st.empty()  # empty while a text is being written
    if started or state.pop("branched", False):
        complete(model, state.sampling, completion, place, below)
    place.text(clipped(written(model, completion.tokens)))
    with view.container():
        if completion.n_given > (n := model.model.config.block_size):
            st.caption(f"Of the prompt's {completion.n_given:,} tokens the last {n:,} count, the model's context.")
        st.caption(completion.speed)
        if any(token.logprob is None for token in completion.tokens[1 : completion.n_prompt]):
            with st.spinner("Reading the prompt once more, for its probabilities"):
                ids = [token.id for token in completion.tokens[: completion.n_prompt]]
                completion.tokens[: completion.n_prompt] = model.score(ids, TOP)
        branch = token_view(model.tokenizer, completion.tokens, completion.n_prompt)
    if branch:
        step, token = branch
        completion.tokens[step:] = [token]
        completion.n_prompt = min(completion.n_prompt, step)
        state.branched = True
        st.rerun()


def complete(model, config: SamplingConfig, completion: Completion, place, below) -> None:
    """Streams what follows a completion's tokens; what came until Stop was pressed is kept."""
    from generation.text_model import Sample
    from interface.token_view import TOP

    sample, before = Sample(), list(completion.tokens)
    below.button("Stop", icon=":material/stop_circle:")
    pieces, start = model.stream([token.id for token in before], config, sample, TOP), time.monotonic()
    with writing():
        try:
            stream(pieces, place, lambda: written(model, before + sample.tokens))
        finally:
            completion.tokens = before + sample.tokens
            completion.speed = speed(sample, start, model)
            completion.speed += " · the model ended the text" * (sample.finish_reason == "end")
    below.empty()


def written(model, tokens: list) -> str:
    """Returns the text of tokens, without what opens a document."""
    ids = [token.id for token in tokens]
    return model.tokenizer.decode(ids[1:] if ids[:1] == [model.tokenizer.end_of_text] else ids)


def training_mode(path: Path) -> None:
    """The loss curves in the log beside a checkpoint, drawn again and again while it grows."""
    st.fragment(draw_training, run_every=2)(path.with_suffix(".jsonl"))


def draw_training(log: Path) -> None:
    """Draws one log."""
    from interface.token_view import loss_chart
    from training.run_log import read_log

    entries = read_log(log)
    if not entries:
        st.info("There is no log of a training run beside this model.")
        return
    values = {name: value for entry in entries for name, value in entry.items()}  # the latest of each
    best = min((entry["val_loss"] for entry in entries if "val_loss" in entry), default=None)
    age = time.time() - log.stat().st_mtime if log.exists() else math.inf
    with st.container(horizontal=True):
        st.metric("Step", f"{values['step']:,}")
        for label, value in (("Training loss", values.get("loss")), ("Best validation loss", best)):
            if value is not None:
                st.metric(label, f"{value:.4f}")
        if "tokens" in values:
            st.metric("Tokens", f"{values['tokens']:,}")
        st.metric("Time", f"{values.get('seconds', 0) / 60:,.1f} min")
    st.altair_chart(loss_chart(entries))
    st.caption(("running" if age < RUNNING else "at rest") + f", last written {age:,.0f} seconds ago")


main()
