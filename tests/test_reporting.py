"""What a run shows and leaves for people: the console, the log, the report, TensorBoard; and `--plan` before it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from conftest import fine_tune, log, pretrain

from system.errors import UserError
from training import plan
from training.config import TrainerConfig
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
