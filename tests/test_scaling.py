"""benchmarks/scaling: its formulas beside real models, real processes and other ways to compute them; its page."""

import dataclasses
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, REPOSITORY

import train
from benchmarks import scaling, scaling_simulation, scaling_steps
from benchmarks.scaling_steps import Sizes
from model import GPT, GPTConfig
from system import cli
from system.errors import UserError

PAGE = REPOSITORY / "docs/scaling.md"
PRESETS = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
ODD = {"n_layer": 2, "n_head": 3, "n_embd": 129, "block_size": 16, "vocab_size": 501}
"""A shape whose rows do not divide by two: the rows that FSDP adds are more than its small messages."""


@pytest.fixture(scope="module")
def gpt2() -> Sizes:
    return Sizes.of_preset("gpt2")


@pytest.fixture(scope="module")
def setup() -> scaling_simulation.Setup:
    return scaling_simulation.Setup(ODD, sequences=1, dtype="bfloat16", rounds=1)


@pytest.fixture(scope="module")
def comparisons(setup) -> dict[str, scaling_simulation.Comparison]:
    """What two real processes sent and took, beside the prediction, by name."""
    rows = scaling_simulation.compare(setup, scaling_simulation.measure(setup))
    return {row.name: row for row in rows}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_of_the_published_architecture(name):
    sizes, preset = Sizes.of_preset(name), train.PRESETS[name]
    layers, width, positions, vocabulary = preset.n_layer, preset.n_embd, preset.block_size, GPTConfig().vocab_size
    in_layers = layers * (12 * width**2 + 13 * width)  # matrices; their biases and two LayerNorms
    assert sizes.n_in_layers == in_layers
    assert sizes.n_parameters == in_layers + (vocabulary + positions + 2) * width
    # as the design says, without positions
    expected = 6 * (sizes.n_parameters - positions * width) + 12 * layers * width * positions
    assert sizes.flops_per_token == expected
    assert sizes.run_tokens == preset.max_steps * preset.batch_size * positions


def test_every_slice_has_as_many_rows_as_the_first():
    for rows, n in ((768, 512), (50304, 512), (33, 2), (7, 7), (3, 8)):
        first_slice = torch.zeros(rows, 5).chunk(n)[0]
        assert scaling_steps.whole([(rows, 5)], n) == n * first_slice.numel()


@pytest.mark.parametrize("mode", ["DDP", "FSDP"])
def test_two_real_processes_send_the_bytes_of_the_formulas(comparisons, mode):
    """A step also sends the norm of each gradient tensor, and gloo a header with each message."""
    sent = comparisons[f"{mode}, sent per step and process"]
    n_tensors = len(list(GPT(GPTConfig(**ODD, n_tokens=501)).parameters()))
    assert 0 <= 1e6 * (sent.measured - sent.predicted) < 200 * n_tensors


def test_a_predicted_step_computes_and_then_exchanges(setup):
    seconds = {"alone": 9.0, "gradients": 0.5, "update": 0.25, "all_reduce": 0.125, "ddp": 0.875, "fsdp": 2.0}
    measured = scaling_simulation.Measured(seconds, {"ddp": 1.0, "fsdp": 1.0})
    rows = {row.name: row for row in scaling_simulation.compare(setup, measured)}
    assert rows["DDP, a step, nothing hidden"].predicted == pytest.approx(875)
    assert rows["DDP, a step, nothing hidden"].ratio == pytest.approx(1)
    assert rows["DDP, a step, everything hidden"].predicted == pytest.approx(750)
    sent = {mode: rows[f"{mode}, sent per step and process"].predicted for mode in ("DDP", "FSDP")}
    exchange = 125 * sent["FSDP"] / sent["DDP"]
    assert rows["FSDP, a step, nothing hidden"].predicted == pytest.approx(500 + 125 + exchange)


def test_a_layer_keeps_for_the_backward_pass_what_the_formula_says():
    def kept(n_layer: int) -> tuple[int, GPT]:
        model = GPT(GPTConfig(block_size=128, vocab_size=64, n_tokens=64, n_layer=n_layer, n_head=2, n_embd=128))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = torch.zeros(1, 128, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens, tokens)
        assert loss.requires_grad
        return sum(n_bytes for pointer, n_bytes in storages.items() if pointer not in weights), model

    (one, model), (two, _) = kept(1), kept(2)
    in_float32 = 2 * scaling_steps.activation_bytes(Sizes.of(model))
    assert two - one == pytest.approx(in_float32, rel=0.03)  # and the means and deviations of LayerNorms


def test_state_takes_16_bytes_a_parameter_and_a_slice_less(gpt2):
    n = gpt2.n_parameters
    assert scaling_steps.ddp_state(gpt2) == 16 * n
    states = [scaling_steps.fsdp_state(gpt2, gpus) for gpus in (2, 8, 64)]
    assert 16 * n / 2 < states[0] < 16 * n and states == sorted(states, reverse=True)


def test_one_more_sequence_than_fits_does_not_fit(gpt2):
    for state in (0, scaling_steps.ddp_state(gpt2)):
        n = scaling_steps.sequences_that_fit(gpt2, 24e9, state)
        needed = [state + scaling_steps.loss_bytes(gpt2) + k * scaling_steps.activation_bytes(gpt2) for k in (n, n + 1)]
        assert needed[0] <= 24e9 < needed[1]
    assert scaling_steps.sequences_that_fit(gpt2, 1e9, 0) == 0


def test_hidden_exchange_costs_only_what_is_longer_than_computing():
    assert scaling_steps.efficiency(3.0, 1.0) == (0.75, 1.0)
    assert scaling_steps.efficiency(1.0, 4.0) == (0.2, 0.25)


@pytest.mark.parametrize("name", PRESETS)
def test_the_critical_batch_takes_twice_the_tokens_of_a_tiny_one_and_is_near_those_of_gpt3(name):
    sizes = Sizes.of_preset(name)
    critical = scaling_steps.critical_batch(sizes)
    assert scaling_steps.tokens_needed(sizes, critical) == pytest.approx(2 * scaling_steps.tokens_needed(sizes, 0))
    assert scaling_steps.tokens_needed(sizes, sizes.run_batch) == sizes.run_tokens
    assert 0.5e6 < critical < 4e6  # GPT-3's of these sizes: 0.5 to 1 million


@pytest.mark.parametrize("n", [8, 64, 512])
def test_no_other_batch_is_faster_than_the_cheapest(gpt2, n):
    flops, exchange, context = 4e14, 0.02, gpt2.config.block_size

    def seconds(share: int) -> float:
        batch = n * share * context
        computing = batch * gpt2.flops_per_token / n / flops
        return scaling_steps.tokens_needed(gpt2, batch) / batch * (computing + exchange)

    share = scaling_steps.cheapest_batch(gpt2, n, flops, exchange) / n
    allowed = range(1, scaling_steps.largest_share(gpt2, n) + 1)
    assert share in allowed and seconds(int(share)) <= 1.001 * min(map(seconds, allowed))


def test_the_page_has_the_tables_that_the_script_prints_today(capsys, tmp_path):
    copy = tmp_path / "scaling.md"
    shutil.copy(PAGE, copy)
    scaling.main(cli.parse(scaling.Config, ["--out", str(copy)]))
    assert copy.read_text() == PAGE.read_text(), "run python -m benchmarks.scaling --out docs/scaling.md"
    printed = capsys.readouterr().out.strip().split("\n\n")
    assert len(printed) == len(scaling.PLACES) and all(f"\n{text}\n" in PAGE.read_text() for text in printed)


def test_only_the_text_between_the_markers_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- benchmarks.scaling: x -->\nold\n<!-- end -->\nb\n<!-- end -->\n")
    new = scaling.replace_tables(page, ["x"], {"x": r"| \1 |"})
    assert new == "a\n<!-- benchmarks.scaling: x -->\n\n| \\1 |\n\n<!-- end -->\nb\n<!-- end -->\n"


def test_other_assumptions_change_the_figures():
    def cells(*flags: str) -> list[str]:
        config = cli.parse(scaling.Config, ["--presets", "gpt2-xl", "--gpus", "8", "--bandwidths", "50", *flags])
        return scaling.all_tables(config)["largest batch"].splitlines()[-1].split(" | ")

    usual, slow, small = cells(), cells("--mfu", "0.2"), cells("--gpu-memory", "24")
    milliseconds = [float(re.sub(r"[^\d.]", "", row[5])) for row in (usual, slow)]
    assert math.isclose(milliseconds[1], 2 * milliseconds[0], rel_tol=0.001)
    assert small[6] == "does not fit" and "%" in small[7]  # DDP keeps all of the state, FSDP a slice


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "H1"], "--gpu must be one of H200, H100"),
        (["--gpus", "1"], "--gpus must be at least 2"),
        (["--mfu", "1.5"], "--mfu must be above 0 and at most 1"),
        (["--presets", "demo"], "--presets takes"),
        (["--bandwidths", "0"], "--bandwidths must be above 0"),
        (["--n-head", "3"], "--n-embd must be a multiple of --n-head"),
    ],
)
def test_a_wrong_flag_is_refused(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cli.parse(scaling.Config, flags)


def test_a_page_without_a_place_is_refused_in_one_line_and_stays_as_it_is(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- benchmarks.scaling: simulation -->\nno end\n")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--simulate", "--out", str(page)],
        cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    errors = [line for line in result.stderr.splitlines() if not line.startswith("scaling.py: ")]
    assert result.returncode == 1 and not result.stdout and len(errors) == 1
    assert errors[0].startswith(f"error: {page} has no place for a table: add the lines <!-- benchmarks.scaling: simul")
    assert page.read_text().endswith("no end\n")
    with pytest.raises(UserError, match="cannot read"):
        scaling.main(scaling.Config(out=tmp_path / "missing.md"))


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.parse(scaling.Config, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(scaling.Config):
        flag = f"--{field.name.replace('_', '-')}"
        value = r"(?:, --no-\S+| \[.*?\]+| \{.*?\}| [A-Z]+)?"
        assert re.search(rf"{flag}{value} \w[^(]*(\([^)]*\)[^(]*)*\(default", text), flag


def test_the_page_names_machine_command_and_date_of_the_comparison():
    [text] = re.findall(r"<!-- benchmarks.scaling: simulation -->\n(.*?)<!-- end -->", PAGE.read_text(), re.S)
    assert re.search(r"`python -m benchmarks.scaling --simulate.*?`, \d{4}-\d\d-\d\d, .*cores", text)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "MB" in line]
    assert [row[-1] for row in rows] == ["1.00 |", "1.00 |"]
    assert len(re.findall(r"^\| (?:DDP|FSDP), a step, (?:nothing|everything) hidden \|", text, re.M)) == 4
