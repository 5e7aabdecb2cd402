"""What a run shows and leaves for people: the console, the log, the report, TensorBoard; and `--plan` before it."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import fine_tune, log, pretrain

import train
from model import GPT, GPTConfig
from system.errors import UserError
from training import plan
from training.config import TrainerConfig
from training.loader import Windows
from training.parallel import Processes
from training.reporting import read_log


def test_a_run_prints_what_it_trains_and_what_came_of_it(here, capsys):
    state = pretrain(max_steps=6, sample_prompt="What is")
    out = capsys.readouterr().out
    for line in (
        r"token embedding +14,336", r"in all +\d",
        r"training tokens, \d+ steps of 4 sequences an epoch; 6 steps are \S+ epochs, at \S+ TFLOP a step\n",
        r"\nstep 0: validation loss 6\.\d{4}, \d\.\d{3} bits per byte\n", r"\nstep 6: .* \(the best so far\)\n",
        r"\n1,536 tokens in \d[^:]* s: \S+ tokens/s, peak memory [\d,]+ MB\n",  # 6 steps of 4 × 64
        r"\nmodel in checkpoints/a.pt.*validation loss \d\.\d{4}, perplexity .*bits per byte.*\n",
        r"\n\S+ tokens per parameter", r"\nnow try: python generate.py --model checkpoints/a.pt\n",
    ):  # fmt: skip
        assert re.search(line, out), line
    assert "warning" not in out and len(re.findall(r"^  'What is' → '", out, re.MULTILINE)) == 3
    assert [entry["step"] for entry in state["history"]] == [0, 3, 6]
    assert all(entry["examples"][0]["input"] == "What is" for entry in state["history"])
    assert len(state["prompts"]) > 2  # beginnings out of the validation text, for the page's buttons
    pretrain(max_steps=1, keep="last", overwrite=True)
    assert "the best so far" not in capsys.readouterr().out
    pretrain(max_steps=2_000, target_loss=1e6, overwrite=True)
    assert "warning: in 13 passes over so little text a model memorizes it" in capsys.readouterr().out


def test_the_log_has_a_line_for_each_interval_and_each_evaluation(here):
    pretrain(max_steps=6, log_every=2)
    entries = read_log(Path("checkpoints/a.jsonl"))
    assert [entry["step"] for entry in entries] == [0, 2, 3, 4, 6, 6]
    assert entries[1].keys() == {"step", "tokens", "learning_rate", "loss", "grad_norm", "seconds", "max_steps"}
    assert entries[1]["tokens"] == 2 * 4 * 64 and "bits_per_byte" in entries[2]
    pretrain(max_steps=6, log_every=1, out=Path("checkpoints/b.pt"))
    each = [entry["loss"] for entry in log(Path("checkpoints/b.jsonl")) if "loss" in entry]
    assert entries[1]["loss"] == pytest.approx((each[0] + each[1]) / 2)  # the mean of the interval
    with open("checkpoints/b.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a kill cut it short
    assert read_log(Path("checkpoints/b.jsonl"))[-1]["step"] == 6 and read_log(Path("none.jsonl")) == []


def test_a_run_leaves_a_report_and_rewrites_it_when_it_goes_on(here):
    for max_steps, resume in ((3, False), (6, True)):
        pretrain(max_steps=max_steps, resume=resume, sample_prompt="What | is")
        report = Path("checkpoints/a.md").read_text(encoding="utf-8")
        assert f"| training steps | {max_steps} |" in report and "Done, 20" in report
        steps = re.findall(r"^\| (\d+) \| \d\.\d{4} \| What \\\| is \| .+ \|$", report, re.MULTILINE)
        assert [int(step) for step in steps] == list(range(0, max_steps + 1, 3))
    for row in (
        "shape | 2 layers, 2 heads, 32 wide",
        "data | data",
        "training tokens | 1,536",
        r"validation loss | 5\.\d+",
    ):
        assert re.search(rf"^\| {row.replace(' | ', ' . ')} \|$", report, re.MULTILINE), row
    assert "](<../plots/a_loss.png>)" in report and Path("plots/a_loss.png").read_bytes().startswith(b"\x89PNG")
    fine_tune(max_steps=1)
    assert "checkpoints/pretrained.pt |" in Path("checkpoints/sft.md").read_text(encoding="utf-8")


def test_plots_are_named_after_the_checkpoint():
    outs = ["checkpoints/demo/sft.pt", "checkpoints/demo_sft.pt", "checkpoints/demo/sft_loss.pt", "a/b.pt", "b.pt"]
    plots = [str(TrainerConfig(out=Path(out)).plot_path(what)) for out in outs for what in ("loss", "confusion")]
    assert plots[0] == "plots/demo/sft_loss.png" and plots[6] == "a/b_loss.png" and len({*plots}) == 10


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard")
def test_tensorboard_reads_the_numbers_of_the_log(here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(tensorboard=True)
    events = EventAccumulator("checkpoints/a_tensorboard")
    events.Reload()
    for name in ("val_loss", "loss", "learning_rate"):
        logged = {entry["step"]: entry[name] for entry in log(Path("checkpoints/a.jsonl")) if name in entry}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(logged)


@pytest.mark.parametrize("flag", ["wandb", "tensorboard"])
def test_a_missing_logger_costs_one_line(here, monkeypatch, flag):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(UserError, match=f"^--{flag} needs the package: pip install {flag}$"):
        pretrain(**{flag: True})
    assert not Path("checkpoints/a.pt").exists()


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("data", ["data", "plan.txt"])
def test_a_plan_says_what_a_run_takes_and_writes_nothing(here, capsys, data):
    Path("plan.txt").write_text("Once upon a time there was a test. " * 300)
    before = files(here)
    run = {"vocab_size": 270} if data == "plan.txt" else {}
    pretrain(data=data, **run, out=Path("new/folder/p.pt"), max_steps=500, plan=True)
    assert files(here) == before and not Path("new").exists()
    rows = {line[:13].strip(): line[13:].strip() for line in capsys.readouterr().out.splitlines()}
    assert re.match(r"[\d,]+ training tokens; 500 steps are [\d,.]+ epochs", rows["data"])
    assert re.match(r"128,000, [\d.e+]+ per parameter; compute-optimal are about 20 ", rows["tokens"])
    assert re.match(r"[\d.e-]+ s a step, [\d,]+ tokens/s: \d+ steps measured, float32 on cpu", rows["speed"])
    assert "to the end" in rows["time"] and "at the peak, of" in rows["memory"]
    assert "MB for new/folder/p.pt" in rows["disk"] and "new/folder/p.last.pt (for --resume)" in rows["disk"]
    assert rows["fits"] == "everything"


def test_a_plan_that_cannot_fit_says_so_without_trying(here, monkeypatch, capsys):
    monkeypatch.setattr(plan, "total_memory", lambda device: 10**7)  # less than Python takes
    pretrain(batch_size=64, plan=True)
    out = capsys.readouterr().out
    assert re.search(r"^does not fit  the memory: [\d.]+ [MG]B of 10.0 MB; try larger --grad", out, re.MULTILINE)
    assert re.search(r"steps measured with \d of 64 sequences", out)


def test_minutes_choose_the_steps_and_a_resumed_run_keeps_them(here, capsys):
    n = pretrain(minutes=0.03)["train_config"]["max_steps"]
    out = capsys.readouterr().out
    assert n >= 20 and f"in 0.03 minutes: 2 layers of width 32, {n:,} steps of" in out
    assert f"done at step {n:,}" in out and out.count("validation loss") == 7  # at the start, five times, the summary
    pretrain(minutes=9, resume=True)
    out = capsys.readouterr().out
    assert "in 9 minutes" not in out and f"done at step {n:,}" in out


def test_more_minutes_choose_a_larger_model_and_more_dropout(tmp_path, capsys):
    np.random.default_rng(0).integers(400, size=10**6, dtype=np.uint16).tofile(tmp_path / "random.bin")
    data = Windows([tmp_path / "random.bin"], 32, 4, seed=0)

    def build(config):
        return GPT(GPTConfig(32, config.n_layer, config.n_head, config.n_embd, vocab_size=448, n_tokens=448))

    for minutes, chosen in ((0.1, (1, 64, 1, 0.0, 0.01)), (900, (4, 256, 4, 0.2, 0.005))):
        config = train.Config(
            n_layer=1,
            n_embd=64,
            n_head=1,
            batch_size=4,
            learning_rate=0.01,
            minutes=minutes,
            eval_tokens=99,
            device="cpu",
        )
        sizes = ((1, 64), (4, 256))
        fitted = plan.fit_into_minutes(config, build, (data, data), Processes(), time.monotonic(), sizes=sizes)
        assert (fitted.n_layer, fitted.n_embd, fitted.n_head, fitted.dropout, fitted.learning_rate) == chosen
        assert (
            20 <= fitted.max_steps <= math.ceil(40 * data.batches_per_epoch)
            and f"{fitted.max_steps:,} steps of" in capsys.readouterr().out
        )


def test_the_expected_loss_values_size_and_new_text_and_repeated_text_less():
    loss = plan.expected_loss
    assert loss(2e6, 1e6, 1e6) < loss(1e6, 1e6, 1e6) > loss(1e6, 2e6, 2e6)
    gain = [loss(1e6, n * 1e6, 1e6) - loss(1e6, 2 * n * 1e6, 1e6) for n in (1, 2, 40)]
    new = loss(1e6, 1e6, 1e6) - loss(1e6, 2e6, 2e6)
    assert gain[0] == pytest.approx(new, rel=0.1) and gain[0] > gain[1] > 0 and gain[2] < 0.05 * new
