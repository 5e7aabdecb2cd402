"""What a run leaves for people, and what `--plan` says before one: reports in Markdown, and nothing written."""

import re
from pathlib import Path

import pytest
from conftest import TOY_SHAPE, run_script, succeed

import train
from training import plan
from training.run_report import is_report


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}


def test_every_run_leaves_a_report(toy):
    base, chat = ((toy / f"checkpoints/{name}.md").read_text(encoding="utf-8") for name in ("toy", "sft"))
    assert "Done: step 20 of 20" in base and "train.py --data data/toy --out checkpoints/toy.pt" in base
    assert re.search(
        r"\| started from \| random weights \|\n\| data \| data/toy: [\d,]+ training tokens of 3\d docum", base
    )
    assert re.search(r"\| model \| 2 layers, 2 heads, 32 wide, .*; [\d,]+ parameters \|", base)
    assert re.search(r"validation loss \d\.\d{4} at step \d+, perplexity [\d.,]+, \d\.\d+ bits per byte", base)
    assert re.search(r"\| machine \| .* cores, .* GB of memory; torch", base)
    assert "](<../plots/toy_loss.png>)" in base and (toy / "checkpoints/../plots/toy_loss.png").is_file()
    assert [int(step) for step in re.findall(r"^\| (\d+) \| \d\.\d{4} \| .+ \|$", base, re.MULTILINE)] == [0, 10, 20]
    assert "python generate.py --model checkpoints/toy.pt\n" in base and "python export.py --model" in base
    assert "| started from | checkpoints/toy.pt |" in chat and "generate.py --model checkpoints/sft.pt --chat" in chat
    assert is_report(toy / "checkpoints/toy.md") and not is_report(toy / "checkpoints/toy.jsonl")


def test_a_resumed_run_rewrites_the_report_and_keeps_its_samples(toy):
    run = ["--data", "data/toy", *TOY_SHAPE, "--eval-tokens", "64", "--out", "checkpoints/report.pt"]
    succeed(toy, "train.py", *run, "--max-steps", "10")
    with open(toy / "checkpoints/report.md", "a") as file:
        file.write(f"| {'9' * 5000} | 1.0000 | an odd row |\n")
    succeed(toy, "train.py", *run, "--max-steps", "20", "--resume")
    report = (toy / "checkpoints/report.md").read_text(encoding="utf-8")
    assert "Done: step 20 of 20" in report and "--resume" in report
    assert [int(step) for step in re.findall(r"^\| (\d+) \| \d\.\d{4} \|", report, re.MULTILINE)] == [0, 10, 20]


@pytest.mark.parametrize("data", ["data/toy", "plan.txt"])
def test_a_plan_says_what_a_run_takes_and_writes_nothing(toy, data):
    (toy / "plan.txt").write_text("Once upon a time there was a test. " * 300)
    before = files(toy)
    shape = [*TOY_SHAPE, "--vocab-size", "270", "--eval-tokens", "64"] if data == "plan.txt" else TOY_SHAPE
    stdout = succeed(
        toy, "train.py", "--data", data, *shape, "--out", "new/folder/p.pt", "--max-steps", "500", "--plan"
    )
    assert files(toy) == before and not (toy / "new").exists()
    said = {line[:13].strip(): line[13:].strip() for line in stdout.splitlines()}
    assert re.fullmatch(
        r"[\d,]+ training tokens; 500 steps are [\d,.]+ epochs(, which end in memorizing it)?", said["data"]
    )
    assert re.match(r"128,000, [\d.e+]+ per parameter; compute-optimal are about 20 ", said["tokens"])
    assert re.match(r"[\d.e-]+ s a step, [\d,]+ tokens/s: \d+ steps measured, float32 on cpu", said["speed"])
    assert "to the end" in said["time"] and "at the peak, of" in said["memory"]
    assert "MB for new/folder/p.pt" in said["disk"] and "new/folder/p.last.pt (for --resume)" in said["disk"]
    assert said["fits"] == "everything"


def test_a_plan_that_cannot_fit_says_so_without_trying(toy, monkeypatch, capsys):
    monkeypatch.chdir(toy)
    monkeypatch.setattr(plan, "total_memory", lambda device: 10**7)  # less than Python takes
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 32, "batch_size": 64, "device": "cpu"}
    train.main(train.Config(data=Path("data/toy"), out=Path("new/p.pt"), plan=True, **small))
    printed = capsys.readouterr().out
    assert re.search(r"^does not fit  the memory: [\d.]+ [MG]B of 10.0 MB; try larger --grad", printed, re.MULTILINE)
    assert re.search(r"steps measured with \d of 64 sequences", printed)


def test_a_plan_of_fine_tuning_writes_nothing(toy):
    before = files(toy)
    start = ["--model", "checkpoints/toy.pt", "--data", "data/toy", "--out", "checkpoints/none.pt", "--device", "cpu"]
    stdout = succeed(toy, "train_sft.py", *start, "--lora-rank", "2", "--plan")
    assert files(toy) == before and "fits          everything" in stdout
    assert run_script(toy, "train_sft.py", *start, "--plan", "--resume").returncode == 2
