"""The training on the page: the figures, curves and samples of runs, which follow a run while it goes on."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import streamlit as st

from interface.page import escape, name_of
from interface.tokens import BLUE, GREY, ORANGE
from system.cli import duration
from system.errors import UserError
from system.files import is_locked
from training.reporting import read_log
from weights.files import FOLDER

SECONDS_TO_REDRAW = 2
LINES_FOR_SPEED = 20  # of the log
PALETTE = [GREY, BLUE, "#fbbf24", ORANGE, "#6ee7b7", "#10b981", "#f9a8d4", "#ec4899"]  # two for each run
MAX_POINTS = 1000  # of one curve
MARKED_POINTS = 100

Entries = list[dict[str, Any]]


def training_view(log: Path) -> None:
    """Lets the user choose runs, first the one of the model with this log, and draws them every two seconds."""
    others = (path for path in sorted(FOLDER.rglob("*.jsonl")) if path != log)
    logs = [log, *(path for path in others if path.with_suffix(".pt").exists())]
    chosen = st.multiselect("Runs", logs, [log], format_func=name_of_run, key=f"runs beside {log}")
    st.fragment(draw_runs, run_every=SECONDS_TO_REDRAW)(chosen)


def name_of_run(log: Path) -> str:
    """Returns the name of a run: that of its checkpoint, without the ending."""
    return name_of(log.with_suffix(""))


def draw_runs(logs: list[Path]) -> None:
    """Draws the figures of each run, their loss curves over each other, and the samples of the first one."""
    runs: dict[str, Entries] = {}
    for log in logs:
        try:
            if entries := read_log(log):
                runs[name_of_run(log)] = entries
                draw_figures(log, entries, is_alone=len(logs) == 1)
        except (UserError, OSError) as error:
            st.text(str(error))
    if not runs:
        st.info("There is no log of a training run beside this model.")
        return
    st.altair_chart(loss_chart(runs))
    draw_samples(*next(iter(runs.items())))


def draw_figures(log: Path, entries: Entries, is_alone: bool) -> None:
    """Draws where a run stands: its latest figures, or one line for one of several runs."""
    latest = {name: value for entry in entries for name, value in entry.items()}  # the last value of each figure
    losses = [entry["val_loss"] for entry in entries if "val_loss" in entry]
    step, max_steps, speed = latest["step"], latest.get("max_steps", latest["step"]), recent_speed(entries)
    is_running = is_locked(log.with_suffix(".pt"))
    status = status_of(step, max_steps, is_running, time.time() - log.stat().st_mtime)
    figures = {"Step": f"{step:,} of {max_steps:,}"}
    if is_running and step < max_steps and speed.get("step"):
        figures["Time left"] = duration((max_steps - step) / speed["step"])
    if losses:
        figures["Best validation loss"] = f"{min(losses):.4f}"
    if not is_alone:
        st.text(f"{name_of_run(log)}: {', '.join([status, *(f'{k.lower()} {v}' for k, v in figures.items())])}")
        return
    if "loss" in latest:
        figures |= {"Training loss": f"{latest['loss']:.4f}", "Learning rate": f"{latest.get('learning_rate', 0):.1e}"}
    if speed:
        figures |= {"Tokens": f"{latest['tokens']:,}", "Tokens/s": f"{speed['tokens']:,.0f}"}
    figures["Time"] = duration(latest.get("seconds", 0))
    st.caption(status)
    with st.container(horizontal=True):
        for label, value in figures.items():
            st.metric(label, value, width="content")


def status_of(step: int, max_steps: int, is_running: bool, age: float) -> str:
    """Returns what a run does, or how it ended; `age` is the time since its last line in the log, in seconds."""
    if is_running:
        return "running"
    ago = " ".join(duration(age).split()[:2]) + " ago"  # the largest unit
    return f"finished {ago}" if step >= max_steps else f"stopped at step {step:,}, {ago}"


def recent_speed(entries: Entries) -> dict[str, float]:
    """Returns by how much `step` and `tokens` grow per second over the last lines of a log; nothing if unknown."""
    lines = [entry for entry in entries if entry.keys() >= {"tokens", "seconds"}][-LINES_FOR_SPEED:]
    if len(lines) < 2 or lines[-1]["seconds"] <= lines[0]["seconds"]:
        return {}
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    return {name: (lines[-1][name] - lines[0][name]) / seconds for name in ("step", "tokens")}


def loss_chart(runs: Mapping[str, Entries]) -> alt.Chart:
    """Returns the training and validation losses of runs over the optimizer steps: the entries of a log by name."""
    rows = []
    for name, entries in runs.items():
        for key, split in (("loss", "training"), ("val_loss", "validation")):
            points = [{"step": entry["step"], "loss": entry[key]} for entry in entries if key in entry]
            curve = split if len(runs) == 1 else f"{name}, {split}"
            rows += [{**point, "curve": curve} for point in points[:: max(1, len(points) // MAX_POINTS)]]
    line = alt.Chart(alt.Data(values=rows)).mark_line(point=len(rows) < MARKED_POINTS, opacity=0.8)
    return line.encode(
        x=alt.X("step:Q", title="optimizer step"),
        y=alt.Y("loss:Q", title="loss (nats)", scale=alt.Scale(zero=False)),
        color=alt.Color(
            "curve:N", title=None, scale=alt.Scale(range=PALETTE), legend=alt.Legend(orient="top", columns=2)
        ),
    ).properties(height=360)


def draw_samples(name: str, entries: Entries) -> None:
    """Draws what the model wrote for the same inputs at one of its evaluations, which the user chooses."""
    evaluations = {entry["step"]: entry["examples"] for entry in entries if entry.get("examples")}
    if not evaluations:
        return
    st.subheader(f"Samples over time: {escape(name)}", anchor=False)
    steps, key = list(evaluations), f"step of {name}"
    if st.session_state.get(key) not in steps:
        st.session_state[key] = steps[-1]
    step = steps[-1]
    if len(steps) > 1:
        step = st.select_slider("At step", steps, format_func=lambda step: f"{step:,}", key=key)
    for example in evaluations[step]:
        with st.container(border=True):
            st.text(example["input"])
            for label, text in (("writes", example["output"]), ("wanted", example["expected"])):
                if text:
                    st.caption(label)
                    st.text(text)
