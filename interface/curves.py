"""Line charts: losses over training runs, values along a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

BLUE, GREY, ORANGE = "#3b82f6", "#9ca3af", "#f59e0b"
PALETTE = [BLUE, ORANGE, "#10b981", "#ec4899", "#8b5cf6", GREY]
MAX_POINTS = 1000  # of one curve


def loss_chart(runs: Mapping[str, list[dict[str, Any]]]) -> alt.LayerChart:
    """Returns the training and validation losses of runs over the optimizer steps: the entries of a log by name.

    The colours tell the two losses of one run apart, or several runs; then the training losses are dashed.
    """
    layers, is_alone = [], len(runs) == 1
    for key, split in (("loss", "training"), ("val_loss", "validation")):
        rows = []
        for name, entries in runs.items():
            points = [{"step": entry["step"], "loss": entry[key]} for entry in entries if key in entry]
            kept = points[:: max(1, len(points) // MAX_POINTS)]
            rows += [{**point, "split": split, "run": name} for point in kept]
        line = alt.Chart(alt.Data(values=rows)).mark_line(point=key == "val_loss", opacity=0.8)
        colours = alt.Scale(range=[GREY, BLUE]) if is_alone else alt.Scale(domain=list(runs), range=PALETTE)
        legend = alt.Legend(orient="top", columns=2)
        dashes = alt.Scale(domain=["training", "validation"], range=[[1, 0] if is_alone else [2, 3], [1, 0]])
        layers.append(
            line.encode(
                x=alt.X("step:Q", title="optimizer step"),
                y=alt.Y("loss:Q", title="loss (nats)", scale=alt.Scale(zero=False)),
                color=alt.Color("split:N" if is_alone else "run:N", title=None, scale=colours, legend=legend),
                strokeDash=alt.StrokeDash("split:N", title=None, scale=dashes, legend=None if is_alone else legend),
            )
        )
    return alt.LayerChart(layer=layers).properties(height=360)


def curve(values: Sequence[float | None], chosen: int) -> alt.LayerChart:
    """Returns values along a text, one for each token, as a small chart with a mark at the chosen token."""
    rows = [{"step": i + 1, "value": value} for i, value in enumerate(values) if value is not None]
    line = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(color=BLUE)
        .encode(x=alt.X("step:Q", title="token", axis=alt.Axis(tickMinStep=1)), y=alt.Y("value:Q", title=None))
    )
    mark = alt.Chart(alt.Data(values=[{"step": chosen + 1}])).mark_rule(color=ORANGE).encode(x="step:Q")
    return (line + mark).properties(height=200)
