"""The training on the page: the loss curves of a run, which follow the run while it goes on."""

from __future__ import annotations

import math
import time
from pathlib import Path

import streamlit as st

from interface.curves import loss_chart
from system.errors import UserError
from training.run_log import read_log

SECONDS_TO_REDRAW = 2
SECONDS_UNTIL_IDLE = 300  # without a new line in its log, a run counts as not running


def training_view(log: Path) -> None:
    """Draws a run's log every two seconds."""
    st.fragment(draw_log, run_every=SECONDS_TO_REDRAW)(log)


def draw_log(log: Path) -> None:
    """Draws a run's figures and loss curves."""
    try:
        entries = read_log(log)
    except UserError as error:
        st.text(str(error))
        return
    if not entries:
        st.info("There is no log of a training run beside this model.")
        return
    latest = {name: value for entry in entries for name, value in entry.items()}  # the last value of each figure
    best = min((entry["val_loss"] for entry in entries if "val_loss" in entry), default=None)
    age = time.time() - log.stat().st_mtime if log.exists() else math.inf
    with st.container(horizontal=True):
        st.metric("Step", f"{latest['step']:,}")
        for label, value in (("Training loss", latest.get("loss")), ("Best validation loss", best)):
            if value is not None:
                st.metric(label, f"{value:.4f}")
        if "tokens" in latest:
            st.metric("Tokens", f"{latest['tokens']:,}")
        st.metric("Time", f"{latest.get('seconds', 0) / 60:,.1f} min")
    st.altair_chart(loss_chart(entries))
    status = "running" if age < SECONDS_UNTIL_IDLE else "not running"
    st.caption(f"{status}, last written {age:,.0f} seconds ago")
