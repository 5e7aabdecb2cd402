"""Training on 8 to 512 GPUs, on paper: bytes exchanged, time, efficiency, batches, memory, data and cost.

    python -m benchmarks.scaling                                     # print the tables, as Markdown
    python -m benchmarks.scaling --out docs/scaling.md               # and replace those of the page
    python -m benchmarks.scaling --simulate --out docs/scaling.md    # instead compare the formulas with two processes

All figures come from the presets of `train.py` and the flags; `scaling_steps.py` has the formulas. `--simulate` trains
a small model with two gloo processes on this machine, and prints predicted and measured bytes and times.
"""

from __future__ import annotations

import datetime
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks import scaling_simulation as simulation
from benchmarks import scaling_steps as steps
from benchmarks.scaling_steps import Sizes
from system.cli import run
from system.device import PEAK_FLOPS, machine
from system.errors import UserError, require, require_at_least
from system.files import atomic_write, read_utf8
from system.wording import duration

Preset = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
PLACES = ["assumptions", "exchange", "smallest batch", "largest batch", "memory", "run"]
"""Names of the places on the page that `all_tables` fills."""
Tables = dict[str, str]
"""Markdown by the name of its place on the page."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs, and what is assumed of them"""

    gpus: tuple[int, ...] = (8, 64, 512)
    """numbers of GPUs"""
    bandwidths: tuple[float, ...] = (50, 400)
    """GB/s that each GPU sends while it receives as much: 50 is a network card of 400 Gbit/s, 400 about an H100's
    NVLink"""
    gpu: str = "H100"
    """the GPU, for its peak FLOP/s in bfloat16: H100, H200, A100, L40S, RTX 4090 or RTX 3090"""
    mfu: float = 0.4
    """share of the peak that computing reaches by itself; the page names the sources of this value"""
    gpu_memory: float = 80
    """GB of memory of a GPU"""
    price: float = 3
    """dollars per GPU hour; nanochat's README has $24 for an hour of eight H100 (January 2026)"""

    @property
    def flops(self) -> float:
        """FLOP/s of one GPU while it computes."""
        return self.mfu * PEAK_FLOPS[self.gpu]


@dataclass(frozen=True)
class Simulation:
    """The model of --simulate, on two processes with one thread each"""

    simulate: bool = False
    """compare the formulas with two gloo processes on this machine (Linux)"""
    rounds: int = 7
    """measurements of each kind of step; their median counts"""
    n_layer: int = 4
    """layers"""
    n_head: int = 4
    """attention heads per layer"""
    n_embd: int = 256
    """width"""
    block_size: int = 128
    """context in tokens"""
    vocab_size: int = 8192
    """rows of the embedding"""
    sequences: int = 2
    """sequences per step and process"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward pass; FSDP gathers parameters in it"""


@dataclass(frozen=True)
class Config(Cluster, Simulation):
    presets: tuple[Preset, ...] = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    """presets of train.py"""
    out: Path | None = None
    """page whose tables to replace, between its markers"""

    def __post_init__(self) -> None:
        require(bool(self.presets and self.gpus and self.bandwidths), "name at least one preset, GPU and bandwidth")
        require(min(self.gpus) >= 2, "--gpus must be at least 2")
        require(min(self.bandwidths) > 0, "--bandwidths must be above 0")
        require(self.gpu in PEAK_FLOPS, f"--gpu must be one of {', '.join(PEAK_FLOPS)}")
        require(0 < self.mfu <= 1, "--mfu must be above 0 and at most 1")
        require(self.gpu_memory > 0, "--gpu-memory must be above 0")
        require_at_least(0, self, "price")
        require_at_least(1, self, "rounds", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "sequences")
        require(self.n_embd % self.n_head == 0, "--n-embd must be a multiple of --n-head")


def main(config: Config) -> None:
    """Prints the tables, or with `--simulate` the comparison, and writes them to the page."""
    names = ["simulation"] if config.simulate else PLACES
    if config.out:
        replace_tables(config.out, names, {})  # fails before the work
    tables = {"simulation": simulated(config)} if config.simulate else all_tables(config)
    print("\n\n".join(tables.values()))
    if config.out:
        page = replace_tables(config.out, names, tables)
        with atomic_write(config.out, "w") as file:
            file.write(page)


def all_tables(config: Config) -> Tables:
    """Returns what follows from the presets and the flags."""
    models: dict[str, Sizes] = {name: Sizes.of_preset(name) for name in config.presets}
    assumptions = (
        f"{config.gpu}: {PEAK_FLOPS[config.gpu] / 1e12:,.0f} TFLOP/s in bfloat16, used to "
        f"{config.mfu:.0%}; {config.gpu_memory:,g} GB of memory; ${config.price:,.2f} per GPU hour."
    )
    texts = (
        assumptions,
        exchange_table(config, models),
        batch_table(config, models, lambda sizes, n: 1),
        batch_table(config, models, steps.largest_share),
        memory_table(config, models),
        run_table(config, models),
    )
    return dict(zip(PLACES, texts, strict=True))


def exchange_table(config: Config, models: dict[str, Sizes]) -> str:
    """Returns what each GPU sends in a step of one micro-batch, and the time that it takes."""
    header = ["preset", "GPUs", "DDP sends", "FSDP sends"]
    header += [f"{mode} at {bandwidth:,g} GB/s" for bandwidth in config.bandwidths for mode in ("DDP", "FSDP")]
    rows = []
    for name, sizes, n in cases(config, models):
        sent = steps.ddp_bytes(sizes, n), steps.fsdp_bytes(sizes, n)
        times = [milliseconds(part / 1e9 / bandwidth) for bandwidth in config.bandwidths for part in sent]
        rows.append([name, f"{n:,}", *map(gigabytes, sent), *times])
    return table(header, rows)


def batch_table(config: Config, models: dict[str, Sizes], share: Callable[[Sizes, int], int]) -> str:
    """Returns the efficiency of steps in which each GPU takes `share(sizes, number of GPUs)` sequences."""
    header = ["preset", "GPUs", "batch", "sequences a GPU", "micro-batches, DDP and FSDP", "computing"]
    header += [f"{mode} at {bandwidth:,g} GB/s" for mode in ("DDP", "FSDP") for bandwidth in config.bandwidths]
    rows = []
    for name, sizes, n in cases(config, models):
        sequences, memory = share(sizes, n), 1e9 * config.gpu_memory
        computing = sequences * sizes.config.block_size * sizes.flops_per_token / config.flops
        rooms = room(sizes, n, memory)
        if rooms[1] < sequences:
            rooms = room(sizes, n, memory, accumulates=True)
        n_ddp, n_fsdp = (math.ceil(sequences / fit) if fit else 0 for fit in rooms)
        row = [name, f"{n:,}", f"{n * sequences:,}", f"{sequences:,}", f"{n_ddp or '-'}, {n_fsdp or '-'}"]
        row.append(milliseconds(computing))
        for sent in (
            steps.ddp_bytes(sizes, n) if n_ddp else None,
            steps.fsdp_bytes(sizes, n, n_fsdp) if n_fsdp else None,
        ):
            for bandwidth in config.bandwidths:
                row.append("does not fit" if sent is None else share_of_time(computing, sent / 1e9 / bandwidth))
        rows.append(row)
    return table(header, rows)


def memory_table(config: Config, models: dict[str, Sizes]) -> str:
    """Returns the memory of a GPU, and how many sequences fit into it at a time."""
    header = ["preset", "GPUs", "state, DDP", "state, FSDP", "chunk of logits", "a sequence"]
    header += ["sequences that fit, DDP", "FSDP"]
    rows = []
    for name, sizes, n in cases(config, models):
        parts = steps.ddp_state(sizes), steps.fsdp_state(sizes, n), steps.loss_bytes(sizes)
        fit = room(sizes, n, 1e9 * config.gpu_memory)
        rows.append(
            [name, f"{n:,}", *map(gigabytes, (*parts, steps.activation_bytes(sizes))), *(f"{k:,}" for k in fit)]
        )
    return table(header, rows)


def run_table(config: Config, models: dict[str, Sizes]) -> str:
    """Returns time, cost and data of the preset's run with DDP, at the first bandwidth and with nothing hidden."""
    header = ["preset", "GPUs", "batch", "tokens", "efficiency", "time", "GPU hours", "cost", "data", "read, all GPUs"]
    rows = []
    for name, sizes, n in cases(config, models):
        exchange = steps.ddp_bytes(sizes, n) / 1e9 / config.bandwidths[0]
        batch = steps.cheapest_batch(sizes, n, config.flops, exchange)
        batch_tokens = batch * sizes.config.block_size
        computing = batch_tokens * sizes.flops_per_token / n / config.flops
        tokens = steps.tokens_needed(sizes, batch_tokens)
        seconds = tokens / batch_tokens * (computing + exchange)
        hours = n * seconds / 3600
        rows.append(
            [
                name,
                f"{n:,}",
                f"{batch:,}",
                f"{tokens / 1e9:,.2f}B",
                f"{steps.efficiency(computing, exchange)[0]:.0%}",
                duration(seconds),
                f"{hours:,.0f}",
                f"${hours * config.price:,.0f}",
                gigabytes(steps.TOKEN * tokens),
                f"{steps.TOKEN * tokens / seconds / 1e6:,.1f} MB/s",
            ]
        )
    return table(header, rows)


def simulated(config: Config) -> str:
    """Measures two processes; returns predicted and measured figures, with machine, command and date."""
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    setup = simulation.Setup(shape, config.sequences, config.dtype, config.rounds)
    measured = simulation.measure(setup)
    seconds = {name: milliseconds(value) for name, value in measured.seconds.items()}
    rows = [
        [c.name, f"{c.predicted:,.1f} {c.unit}", f"{c.measured:,.1f} {c.unit}", f"{c.ratio:.2f}"]
        for c in simulation.compare(setup, measured)
    ]
    command = f"python -m benchmarks.scaling {shlex.join(sys.argv[1:])}"
    return (
        f"`{command}`, {datetime.date.today()}, {machine(torch.device('cpu'))}. {config.n_layer} layers × "
        f"{config.n_embd}, vocabulary {config.vocab_size:,}, {config.sequences} × {config.block_size} tokens a step "
        f"and process, {config.dtype}, medians of {config.rounds} rounds. A step takes {seconds['alone']} while the "
        f"other process waits; while both compute without exchange, {seconds['gradients']} for the gradients and "
        f"{seconds['update']} for the update. A plain all-reduce of the gradients takes {seconds['all_reduce']}.\n\n"
    ) + table(["", "predicted", "measured", "measured / predicted"], rows)


def cases(config: Config, models: dict[str, Sizes]) -> list[tuple[str, Sizes, int]]:
    """Returns every model with every number of GPUs."""
    return [(f"`{name}`", sizes, n) for name, sizes in models.items() for n in config.gpus]


def room(sizes: Sizes, n: int, memory: float, accumulates: bool = False) -> tuple[int, int]:
    """Returns how many sequences fit into a GPU at a time, with DDP and with FSDP, in one of several micro-batches if
    the step accumulates."""
    states = steps.ddp_state(sizes), steps.fsdp_state(sizes, n, accumulates)
    ddp, fsdp = (steps.sequences_that_fit(sizes, memory, state) for state in states)
    return ddp, fsdp


def share_of_time(computing: float, exchange: float) -> str:
    """Returns the efficiency from nothing hidden to everything hidden: "63–100%"."""
    low, high = (f"{100 * value:.0f}" for value in steps.efficiency(computing, exchange))
    return f"{low}%" if low == high else f"{low}–{high}%"


def gigabytes(n_bytes: float) -> str:
    """Returns a number of bytes in GB."""
    return f"{n_bytes / 1e9:,.2f} GB"


def milliseconds(seconds: float) -> str:
    """Returns a time in milliseconds with three digits."""
    value = 1e3 * seconds
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:,.{digits}f} ms"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def replace_tables(path: Path, names: Sequence[str], tables: Tables) -> str:
    """Returns the text of a page with tables in place of what stands between `<!-- benchmarks.scaling: NAME -->` and
    `<!-- end -->`. Raises UserError if the page cannot be read, or if the markers of one of the names are missing."""
    page = read_utf8(path)
    for name in names:
        start, end = f"<!-- benchmarks.scaling: {name} -->", "<!-- end -->"
        found = re.search(rf"({re.escape(start)}\n)((?!<!--).)*({end})", page, re.DOTALL)
        if not found:
            raise UserError(f"{path} has no place for a table: add the lines {start} and {end}")
        if name in tables:
            page = f"{page[: found.end(1)]}\n{tables[name]}\n\n{page[found.start(3) :]}"
    return page


if __name__ == "__main__":
    run(main, Config)
