"""Line charts: losses over a training run, values along a text."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

BLUE, GREY, ORANGE = "#3b82f6", "#9ca3af", "#f59e0b"
MAX_POINTS = 1000  # of one curve


def loss_chart(entries: list[dict]) -> alt.LayerChart:
    """Returns the training and validation losses of a log's entries over the optimizer steps."""
    layers = []
    for key, name in (("loss", "training"), ("val_loss", "validation")):
        rows = [{"step": entry["step"], "loss": entry[key], "split": name} for entry in entries if key in entry]
        rows = rows[:: max(1, len(rows) // MAX_POINTS)]
        line = alt.Chart(alt.Data(values=rows)).mark_line(point=key == "val_loss", opacity=0.8)
        layers.append(
            line.encode(
                x=alt.X("step:Q", title="optimizer step"),
                y=alt.Y("loss:Q", title="loss (nats)", scale=alt.Scale(zero=False)),
                color=alt.Color("split:N", title=None, scale=alt.Scale(range=[GREY, BLUE])),
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
