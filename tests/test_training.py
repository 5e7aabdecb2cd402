"""The training loop, in real processes: killed, interrupted, resumed and split."""

import ast
import dataclasses
import importlib.util
import re
import resource
import shlex
import signal
import subprocess
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, TOY_SHAPE, command, log, run_script, succeed, wait_for_log
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from training.distributed import Processes

import train
from model import GPT, GPTConfig
from system.device import multiplies_faster_in_bfloat16
from system.untrusted import printable
from training.config import TrainerConfig
from training.loader import Windows
from training.optim import Muon, build_optimizers, learning_rate_at, set_learning_rate
from training.state import TrainingState
from training.trainer import Trainer
from weights.loading import load_checkpoint

SHAPE = GPTConfig(block_size=32, vocab_size=448, n_tokens=448, n_layer=2, n_head=2, n_embd=32)

RUN = [
    "--data",
    "data/toy",
    "--max-steps",
    "120",
    *TOY_SHAPE,
    "--optimizer",
    "muon",
    "--dropout",
    "0.1",
    "--eval-every",
    "20",
    "--save-every",
    "15",
]


def start(folder: Path, out: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command("train.py", "--out", out, *arguments),
        cwd=folder,
        env=ENVIRONMENT,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_equal(a, b, where=""):
    """Compares nested checkpoints bit by bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def uninterrupted(toy):
    """The run that the interrupted ones have to equal."""
    succeed(toy, "train.py", "--out", "checkpoints/whole.pt", *RUN)
    return toy / "checkpoints/whole.pt"


def test_a_resumed_run_keeps_its_precision(toy):
    """`--dtype auto` does not measure again: the rest of a run in bfloat16 is in bfloat16, bit for bit."""
    arguments = ["--data", "data/toy", *TOY_SHAPE, "--max-steps", "8", "--log-every", "2"]
    succeed(toy, "train.py", *arguments, "--out", "checkpoints/half.pt", "--dtype", "bfloat16")
    interrupted = [*arguments, "--out", "checkpoints/half_too.pt"]
    succeed(toy, "train.py", *interrupted, "--dtype", "bfloat16", "--target-loss", "100")
    assert load(toy / "checkpoints/half_too.last.pt")["step"] < 8
    succeed(toy, "train.py", *interrupted, "--resume")
    whole, resumed = (load(toy / f"checkpoints/{name}.last.pt") for name in ("half", "half_too"))
    assert whole["train_config"]["dtype"] == resumed["train_config"]["dtype"] == "bfloat16"
    assert_equal(resumed["model"], whole["model"])


def test_the_cpu_trains_in_the_precision_that_it_is_fast_in():
    assert not multiplies_faster_in_bfloat16(64)  # too small to matter
    x, weight = torch.randn(1024, 256), torch.randn(1024, 256)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), weight.to(dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a, b=b: a @ b.t(), number=3, repeat=3))
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if not 1.2 < ratio < 1.9:  # too near to the limit to say
        assert multiplies_faster_in_bfloat16(256) == (ratio > 1.5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(toy, uninterrupted, how):
    out = toy / f"checkpoints/{how.name}.pt"
    process = start(toy, f"checkpoints/{how.name}.pt", *RUN)
    wait_for_log(out.with_suffix(".jsonl"), 35, process)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=60)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        succeed(toy, "train.py", "--out", f"checkpoints/{how.name}.pt", *RUN, "--resume")
    else:
        assert process.returncode == 0, stderr[-2000:]
        *_, hint = stdout.strip().splitlines()  # the command that it tells its user to type
        arguments = shlex.split(hint)
        assert arguments[0] == "python" and arguments[-1] == "--resume"
        assert load(out.with_suffix(".last.pt"))["step"] < 120
        succeed(toy, *arguments[1:])
    assert log(out.with_suffix(".jsonl")) == log(uninterrupted.with_suffix(".jsonl"))
    resumed, whole = (load(path.with_suffix(".last.pt")) for path in (out, uninterrupted))
    for key in ("model", "optimizer", "step", "best_val_loss", "history"):
        assert_equal(resumed[key], whole[key], key)
    assert_equal(load(out)["model"], load(uninterrupted)["model"])
    assert not list(out.parent.glob(".*tmp"))


@pytest.mark.parametrize("split", [["--grad-accum-steps", "3"], ["--grad-checkpointing"]])
def test_splitting_a_batch_and_recomputing_change_no_loss(toy, split):
    losses = []
    for name, extra in (("plain", []), ("split", split)):
        succeed(
            toy,
            "train.py",
            "--data",
            "data/toy",
            "--out",
            f"checkpoints/{name}.pt",
            *TOY_SHAPE,
            "--max-steps",
            "12",
            "--log-every",
            "1",
            "--batch-size",
            "6",
            "--overwrite",
            *extra,
        )
        losses.append([entry["loss"] for entry in log(toy / f"checkpoints/{name}.jsonl") if "loss" in entry])
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sft_losses_do_not_depend_on_the_split(toy):
    losses = []
    for n in (1, 4):
        succeed(
            toy,
            "train_sft.py",
            "--model",
            "checkpoints/toy.pt",
            "--data",
            "data/toy",
            "--out",
            f"checkpoints/sft{n}.pt",
            "--max-steps",
            "6",
            "--log-every",
            "1",
            "--batch-size",
            "16",
            "--grad-accum-steps",
            str(n),
            "--device",
            "cpu",
        )
        losses.append([entry["loss"] for entry in log(toy / f"checkpoints/sft{n}.jsonl") if "loss" in entry])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_never_overwrites_a_checkpoint_unasked(toy):
    before = (toy / "checkpoints/toy.pt").read_bytes()
    result = run_script(
        toy, "train.py", "--data", "data/toy", "--out", "checkpoints/toy.pt", *TOY_SHAPE, "--max-steps", "1"
    )
    assert result.returncode == 1 and "--overwrite" in result.stderr.splitlines()[-1]
    assert (toy / "checkpoints/toy.pt").read_bytes() == before


def test_plots_are_named_after_the_checkpoint(toy):
    names = {out: str(TrainerConfig(out=Path(out)).plot_path()) for out in ("checkpoints/demo/sft.pt", "a/b.pt")}
    assert list(names.values()) == ["plots/demo/sft_loss.png", "a/b_loss.png"]
    outs = ["checkpoints/a/b.pt", "checkpoints/a_b.pt", "checkpoints/a/b_loss.pt", "checkpoints/a_b/loss.pt", "a/b.pt"]
    plots = {TrainerConfig(out=Path(out)).plot_path(what) for out in outs for what in ("loss", "confusion")}
    assert len(plots) == 2 * len(outs)
    assert TrainerConfig(out=Path("checkpoints.pt")).plot_path() == Path("checkpoints_loss.png")
    (toy / "plots/folder_loss.png").mkdir(parents=True)
    arguments = ["--data", "data/toy", *TOY_SHAPE, "--out", "checkpoints/folder.pt", "--max-steps", "1"]
    result = run_script(toy, "train.py", *arguments)
    assert result.returncode == 2 and "is a folder" in result.stderr.splitlines()[-1]
    assert not (toy / "checkpoints/folder.pt").exists()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(toy):
    result = run_script(
        toy,
        "train.py",
        "--data",
        "data/toy",
        "--out",
        "checkpoints/nan.pt",
        *TOY_SHAPE,
        "--max-steps",
        "400",
        "--learning-rate",
        "1e30",
        "--grad-clip",
        "0",
    )
    assert result.returncode == 1 and "not finite" in result.stderr.splitlines()[-1]
    for path in (toy / "checkpoints").glob("nan*.pt"):
        assert all(tensor.isfinite().all() for tensor in load(path)["model"].values())


def test_target_loss_patience_and_snapshots(toy):
    common = [
        "--data",
        "data/toy",
        *TOY_SHAPE,
        "--overwrite",
        "--out",
        "checkpoints/stop.pt",
    ]
    target = ["--max-steps", "500", "--target-loss", "5.9"]
    stdout = succeed(toy, "train.py", *common, *target, "--snapshot-every", "5")
    assert (toy / "checkpoints/snapshots/stop_step_5.pt").exists()
    *_, last = (entry["loss"] for entry in log(toy / "checkpoints/stop.jsonl") if "loss" in entry)
    assert "reached the target loss" in stdout and last <= 5.9
    stdout = succeed(
        toy, "train.py", *common, "--max-steps", "500", "--patience", "2", "--learning-rate", "0", "--min-lr", "0"
    )
    assert "no improvement in 2 evaluations" in stdout


def test_a_full_disk_while_saving_costs_one_line_and_keeps_the_former_checkpoint(toy):
    arguments = ["--data", "data/toy", *TOY_SHAPE, "--out", "checkpoints/full_disk.pt"]
    succeed(toy, "train.py", *arguments, "--max-steps", "10")
    before = {path.name: path.read_bytes() for path in (toy / "checkpoints").glob("full_disk*.pt")}
    result = subprocess.run(
        command("train.py", *arguments, "--max-steps", "40", "--resume"), cwd=toy, env=ENVIRONMENT, capture_output=True,
        encoding="utf-8", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: cannot write checkpoints/full_disk.")
    assert {path.name: path.read_bytes() for path in (toy / "checkpoints").glob("full_disk*.pt")} == before
    assert not list((toy / "checkpoints").glob(".*tmp"))


@pytest.fixture(scope="module")
def said(toy) -> str:
    """What a run of 20 steps prints that evaluates, and writes a sample, at steps 0, 10 and 20."""
    shape = ["--data", "data/toy", *TOY_SHAPE, "--max-steps", "20"]
    return succeed(toy, "train.py", *shape, "--sample-prompt", "What is", "--out", "checkpoints/said.pt")


def test_a_run_says_what_it_trains_and_what_it_came_to(said):
    for line in (
        r"token embedding +14,336", r"in all +\d",
        r"training tokens, \d+ steps of 4 sequences an epoch; 20 steps are \S+ epochs, at \S+ TFLOP a step\n",
        r"\nbest validation loss \S+, perplexity \S+, \S+ bits per byte\n",
        r"\n5,120 tokens in \d[^:]* s: \S+ tokens/s, peak memory [\d,]+ MB\n",  # 20 steps of 4 × 64
        r"\n\S+ tokens per parameter", r"\nnow try: python generate.py --model checkpoints/said.pt\n",
    ):  # fmt: skip
        assert re.search(line, said), line
    assert "warning" not in said and "it writes" not in said


def test_a_short_text_gets_fewer_steps_but_at_least_a_hundred(capsys):
    config = train.Config(preset="x", max_steps=1500, max_epochs=2.0)
    for steps_per_epoch, expected in ((92.5, 185), (7, 100), (750, 1500), (900, 1500)):
        assert train.limited(config, steps_per_epoch, rank=0).max_steps == expected
        shown = f"{expected} steps instead of 1,500, for so short a text (--max-epochs 2)\n"
        assert capsys.readouterr().out == (shown if expected < 1500 else "")
    assert train.limited(dataclasses.replace(config, max_epochs=0.0), 7, rank=0).max_steps == 1500
    assert train.limited(dataclasses.replace(config, max_steps=3), 7, rank=0).max_steps == 3


def test_samples_of_all_evaluations_stand_below_each_other_at_the_end(toy, said):
    before, table = said.split("what it wrote after 'What is':\n")
    written = [ast.literal_eval(text) for text in re.findall(r"^  'What is' → (.*)$", before, re.MULTILINE)]
    losses = [f"{entry['val_loss']:.3f}" for entry in log(toy / "checkpoints/said.jsonl") if "val_loss" in entry]
    heading, *rows = table.splitlines()[:4]
    assert heading.split() == ["step", "loss"] and len(set(written)) == 3
    for step, loss, text, row in zip((0, 10, 20), losses, written, rows, strict=True):
        assert row.split()[:2] == [str(step), loss] and len(row) <= 100
        shown = row[20:].removesuffix("…")
        assert " ".join(printable(text).split()).startswith(shown) and (len(row) == 100 or not row.endswith("…"))


def test_only_weights_that_are_kept_as_the_best_are_called_the_best(toy, said):
    assert "(the best so far)" in said and "best validation loss" in said
    run = ["--data", "data/toy", *TOY_SHAPE, "--max-steps", "10", "--keep", "last", "--out", "checkpoints/last.pt"]
    stdout = succeed(toy, "train.py", *run)
    kept = load_checkpoint(toy / "checkpoints/last.pt")["history"][-1]["val_loss"]
    assert f"\nlast validation loss {kept:.4f}, perplexity" in stdout and "best" not in stdout


@pytest.mark.parametrize("name", ["tensorboard", pytest.param("wandb", marks=pytest.mark.slow)])
def test_other_loggers_get_the_numbers_or_are_asked_for_in_one_line(toy, name):
    result = subprocess.run(
        command(
            "train.py", "--data", "data/toy", *TOY_SHAPE, "--max-steps", "10", "--overwrite", f"--{name}",
            "--out", f"checkpoints/{name}.pt",
        ),
        cwd=toy, env={**ENVIRONMENT, "WANDB_MODE": "offline"}, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    if importlib.util.find_spec(name) is None:
        assert result.returncode == 1 and f"pip install {name}" in result.stderr.splitlines()[-1]
        return
    assert result.returncode == 0, result.stderr[-2000:]
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(toy / "checkpoints/tensorboard_tensorboard"))
        events.Reload()
        logged = {e["step"]: e["val_loss"] for e in log(toy / "checkpoints/tensorboard.jsonl") if "val_loss" in e}
        assert {e.step: e.value for e in events.Scalars("val_loss")} == pytest.approx(logged)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_asks_the_device_for_no_number(toy, optimizer):
    """Tensors without contents, at which every operation that the host would have to wait for raises."""
    shape = dataclasses.replace(SHAPE, dropout=0.1)
    config = TrainerConfig(device="cpu", dtype="bfloat16", batch_size=4, grad_accum_steps=2, optimizer=optimizer)
    data = Windows([toy / "data/toy/train.bin"], 32, 4, 0)
    trainer = Trainer(TrainingState.create(GPT(shape), config, Processes()), data, data)
    batch = trainer.load_batch(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer.state.model = trainer.forward = GPT(shape).train()
        trainer.state.optimizers = build_optimizers(trainer.state.model, optimizer, 1e-3, 0.95, 0.1)
        loss = trainer.forward_backward(batch.micro_batches, batch.total_weight)
        values = torch.stack([loss, trainer.update_weights(1e-3)])
    assert values.shape == (2,)
    with pytest.raises(DataDependentOutputException):
        values.tolist()


def test_a_damaged_checkpoint_is_not_resumed(toy, uninterrupted):
    whole = uninterrupted.with_suffix(".last.pt").read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        (toy / "checkpoints/broken.last.pt").write_bytes(damaged)
        result = run_script(toy, "train.py", "--out", "checkpoints/broken.pt", *RUN, "--resume")
        assert result.returncode == 1 and "damaged" in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


Parameters = list[torch.nn.Parameter]


def after_equal_gradients(*optimizers: Callable[[Parameters], torch.optim.Optimizer]) -> list[Parameters]:
    """The parameters after five steps of each optimizer from the same start, with the same random gradients."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in [(64, 32), (64, 32), (32, 64), (48, 48)]]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(5)]
    results = []
    for build in optimizers:
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = build(parameters)
        for step in gradients:
            for p, gradient in zip(parameters, step, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        results.append(parameters)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon_equals_torch(dtype):
    torchs = lambda ps: torch.optim.Muon(ps, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")  # noqa: E731
    ours, theirs = after_equal_gradients(lambda ps: Muon(ps, lr=0.02, dtype=dtype), torchs)
    for p, q in zip(ours, theirs, strict=True):  # torch computes in bfloat16
        assert (p - q).norm() < 1e-3 * q.norm()


def test_embeddings_learn_at_their_own_rate():
    model = GPT(dataclasses.replace(SHAPE, value_embeddings=True, tie_weights=False))
    optimizers = build_optimizers(model, "muon", 1e-3, 0.95, 0.1, embedding_lr_scale=10.0)
    set_learning_rate(optimizers, 2e-3)
    rates = {p: group["lr"] for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))  # each in one group
    for name, p in model.named_parameters():
        assert rates[p] == pytest.approx(2e-2 if name.endswith(("wte.weight", "wpe.weight", "wve.weight")) else 2e-3)
    in_muon = {p for group in optimizers[0].param_groups for p in group["params"]}
    assert in_muon == {p for name, p in model.h.named_parameters() if p.dim() == 2 and "wve" not in name}


def test_learning_rate_warms_up_then_falls_along_a_cosine():
    config = TrainerConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = [learning_rate_at(step, config) for step in range(111)]
    assert (
        rates[0] == pytest.approx(1 / 11)
        and rates[10] == 1.0
        and rates[60] == pytest.approx(0.55)
        and rates[110] == pytest.approx(0.1)
    )
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    cooled = [learning_rate_at(step, dataclasses.replace(config, cooldown=0.5)) for step in range(111)]
    assert cooled[:11] == rates[:11] and set(cooled[10:56]) == {1.0} and cooled[110] == pytest.approx(0.1)
    falls = [a - b for a, b in zip(cooled[55:], cooled[56:], strict=False)]
    assert falls == pytest.approx([0.9 / 55] * 55)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_compiled_in_bfloat16(toy):
    succeed(
        toy,
        "train.py",
        "--data",
        "data/toy",
        "--out",
        "checkpoints/cuda.pt",
        *TOY_SHAPE,
        "--device",
        "cuda",
        "--max-steps",
        "30",
    )
    losses = [entry["val_loss"] for entry in log(toy / "checkpoints/cuda.jsonl") if "val_loss" in entry]
    assert losses[-1] < losses[0]
