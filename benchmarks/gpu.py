"""What only a GPU can show, in at most 20 minutes: correctness, speed, memory, and `train.py` with a save and a resume.

    python -m benchmarks.gpu              # prints a line for each case and writes gpu.md
    python -m benchmarks.gpu --only step  # one case

Needs torch 2.11 or newer, no network, and neither tyro nor datasets. Each case is a process with its own time-out. A
case that fails does not end the others. On the CPU all cases run with tiny models, to test this file.
"""

import argparse
import datetime
import itertools
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import train as train_script
from benchmarks import worker
from benchmarks.generation import our_variant, tokens_per_second
from benchmarks.training import Config, median_seconds, optimizations, training_step
from benchmarks.training import measure as measure_step
from model import GPT, IGNORE_INDEX, linear_cross_entropy
from system.device import autocast, choose_device, fast_attention, machine, peak_memory
from system.errors import UserError
from system.files import write_json
from text.tokenizer import from_spec
from training.loader import Batch, stack
from training.reporting import read_log

EXPECTED = {  # bounds by figure; those of speed and memory are predictions for an H100 or H200
    "machine.matmul_tflops": (600, 800),
    "machine.copy_tb_per_s": (2.4, 4.5),
    "step.tokens_per_s": (410e3, 510e3),
    "step.peak_gb": (20, 27),
    "generation.compiled_tokens_per_s": (1600, 2500),
    "correctness.loss_error": (0, 1e-2),
    "correctness.gradient_cosine": (0.99, 1.001),
    "correctness.float16_loss_ratio": (0, 1),
    "train.speed_with_saves": (0.97, 1.1),
    "train.steps_lost": (0, 0),
}

Figures = dict[str, Any]


def measure(case: str, device: str) -> Figures:
    """Runs a case: with GPT-2 small as `train.py` trains it, on the CPU with a tiny model."""
    c = Config(device=device, batch_size=64, steps=20)
    if device == "cpu":
        c = replace(c, block_size=32, vocab_size=512, n_tokens=500, n_layer=2, n_head=2, n_embd=32)
        c = replace(c, batch_size=4, steps=2)
    return CASES[case][0](c, choose_device(device))


def ceilings(c: Config, device: torch.device) -> Figures:
    """The machine's software, and its ceilings: a large matrix product in bfloat16, a large copy."""
    n = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, n, n, device=device).bfloat16()
    source = a.repeat(8, 1)
    target = torch.empty_like(source)
    return {
        "machine": f"{machine(device)}, CUDA {torch.version.cuda}",
        "matmul_tflops": 2e-12 * n**3 / median_seconds(lambda: a @ b, 10, device),
        "copy_tb_per_s": 2e-12 * source.nbytes / median_seconds(lambda: target.copy_(source), 10, device),
    }


def correctness(c: Config, device: torch.device) -> Figures:
    """A step as `train.py` takes it (bfloat16, compiled, fused loss, cuDNN's attention) against its definition in
    float32; and whether float16 with gradient scaling learns."""
    torch.manual_seed(0)
    model, on_cuda = GPT(c).to(device).train(), device.type == "cuda"
    tokens, targets = torch.randint(c.n_tokens, (2, 4, c.block_size), device=device)
    exact = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    if on_cuda:
        model.compile_training()
    with fast_attention(), autocast(device, torch.bfloat16):
        ours = model(tokens, targets) / tokens.numel()
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (exact, ours)]
    pairs = zip(*gradients, strict=True)
    _, step = training_step(c, device, ["fused head and loss", "fused AdamW", "float16" if on_cuda else "bfloat16"])
    losses = [step(tokens, targets).item() for _ in range(8)]
    return {
        "loss_error": abs(ours.item() / exact.item() - 1),
        "gradient_cosine": min(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in pairs),
        "float16_loss_ratio": losses[-1] / losses[0],
    }


def step(c: Config, device: torch.device, without: str = "", float32_stream: bool = False) -> Figures:
    """A training step on random tokens, perhaps without an optimization: see `benchmarks.training.measure`."""
    return measure_step(asdict(c), [name for name in optimizations(device) if name != without], float32_stream)


def generation(c: Config, device: torch.device) -> Figures:
    """Tokens per second in bfloat16 after a short prompt, for one sequence and for several."""
    model = GPT(c).to(device).bfloat16().eval()
    variants = {f"batch_{n}_tokens_per_s": our_variant(model, batch_size=n) for n in (1, 8, 32)}
    if device.type == "cuda":  # compiling takes too long for a test on the CPU
        variants["compiled_tokens_per_s"] = our_variant(model, is_compiled=True)
    prompt = torch.randint(c.n_tokens, (1, 8), device=device)
    return {
        name: statistics.median(
            tokens_per_second(variant, prompt, 10 * c.steps) for _ in range(3)
        )  # the first compiles
        for name, variant in variants.items()
    }


def loss(c: Config, device: torch.device) -> Figures:
    """Milliseconds of head and loss, forward and backward, uncompiled, by the size of the chunks."""
    n = c.batch_size * c.block_size
    hidden = torch.randn(n, c.n_embd, device=device).bfloat16().requires_grad_()
    head = torch.randn(c.vocab_size, c.n_embd, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(c.n_tokens, (n,), device=device)

    def work(chunk_size: int) -> None:
        linear_cross_entropy(hidden, head, targets, chunk_size).backward()

    sizes = [n // parts for parts in (32, 16, 8, 4)]
    return {f"ms_chunks_of_{size}": 1e3 * median_seconds(partial(work, size), 2, device) for size in sizes}


def sft(c: Config, device: torch.device) -> Figures:
    """Fine-tuning steps: conversations of many lengths, padded, with the loss on the second half of each."""
    lengths = np.sort(np.random.default_rng(0).integers(c.block_size // 8, c.block_size, 10 * c.batch_size))

    def conversation(length: int) -> Batch:
        tokens = torch.randint(c.n_tokens, (1, length))
        return Batch(tokens, tokens.where(torch.arange(length) > length // 2, IGNORE_INDEX))

    batches = [stack(list(map(conversation, row)), c.block_size).to(device) for row in lengths.reshape(20, -1)]
    # Lengths vary, and cuDNN plans anew for each: `Trainer` leaves its attention off too.
    _, step = training_step(c, device, set(optimizations(device)) - {"cuDNN's attention"})
    for batch in (batches[0], batches[-1], batches[10]):  # compiles for dynamic shapes, once and for all
        torch._dynamo.maybe_mark_dynamic(batch.tokens, [0, 1])
        step(batch.tokens, batch.targets)
    torch._dynamo.config.error_on_recompile = True
    seconds = median_seconds(lambda: [step(batch.tokens, batch.targets) for batch in batches], 1, device)
    n_tokens = sum(batch.tokens.numel() for batch in batches)
    return {"tokens_per_s": n_tokens / seconds, "peak_gb": peak_memory(device) / 1e9}


def train(c: Config, device: torch.device) -> Figures:
    """`train.py` itself: half of the steps, a SIGINT, and the rest with `--resume`. Parses no flags."""
    n_steps = 150 if device.type == "cuda" else 40
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        config = train_script.Config(
            **{name: getattr(c, name) for name in ("block_size", "n_layer", "n_head", "n_embd")},
            data=folder,
            vocab_size=50_257,  # otherwise `train.py` loads GPT-2's vocabulary
            out=Path(folder) / "a.pt",
            device=device.type,
            max_steps=n_steps,
            batch_size=c.batch_size,
            warmup_steps=20,
            eval_tokens=16 * c.block_size,
            log_every=1,
            eval_every=60,
            save_every=60,
        )

        def interrupt() -> None:
            while len(read_log(config.log_path)) < n_steps // 2:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        train_script.main(config)
        interrupted_at = max(entry["step"] for entry in read_log(config.log_path))
        torch.compiler.reset()
        train_script.main(replace(config, resume=True))
        steps = [entry for entry in read_log(config.log_path) if "loss" in entry]
    milliseconds = [1e3 * (b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(steps)]
    settled = milliseconds[30:interrupted_at] or milliseconds  # after compiling, with a save and an evaluation
    return {
        "interrupted_at": interrupted_at,
        "steps_lost": n_steps - len({entry["step"] for entry in steps}),
        "last_loss": steps[-1]["loss"],
        "ms": statistics.median(settled),
        "speed_with_saves": statistics.median(settled) / statistics.mean(settled),
    }


def write_data(folder: Path) -> None:
    """Writes token files with a tokenizer of GPT-2's size: GPT-2's own may not be installed."""
    for split in ("train", "val"):
        np.random.default_rng(0).integers(50_257, size=2_000_000, dtype=np.uint16).tofile(folder / f"{split}.bin")
    characters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 324))]  # GPT-2's names of the bytes
    pairs = map("".join, itertools.product(characters, repeat=2))
    vocabulary = {token: i for i, token in enumerate([*characters, *itertools.islice(pairs, 50_000)])}
    spec = json.dumps({"model": {"vocab": vocabulary}})
    (folder / "tokenizer.json").write_text(spec, encoding="utf-8")
    meta = {"files": ["train.bin", "val.bin", "tokenizer.json"], "tokenizer": from_spec(spec).name, "splits": {}}
    write_json(folder / "meta.json", meta)


CASES: dict[str, tuple[Callable[..., Figures], int]] = {  # with time-outs in seconds, 20 minutes in all
    "machine": (ceilings, 60),
    "correctness": (correctness, 150),
    "step": (step, 120),
    "generation": (generation, 180),
    "loss": (loss, 60),
    "train": (train, 180),
    "step_flash": (partial(step, without="cuDNN's attention"), 180),
    "step_float32_stream": (partial(step, float32_stream=True), 90),
    "sft": (sft, 180),
}


def main() -> None:
    """Runs the cases; after each one the table is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="file for the table")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    table = [["figure", "measured", "expected"]]
    for case in arguments.only:
        start, options = time.perf_counter(), {"case": case, "device": arguments.device}
        try:
            figures = worker.call("benchmarks.gpu", "measure", CASES[case][1], **options)
        except UserError as error:
            figures = {"error": str(error)}
        figures["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({"case": case, **figures}), flush=True)
        table += [table_row(f"{case}.{name}", value) for name, value in figures.items()]
        text = f"`python -m benchmarks.gpu`, {datetime.date.today()}\n\n{worker.table(table)}"
        arguments.out.write_text(text, encoding="utf-8")


def table_row(figure: str, value: float | str) -> list[str]:
    """Returns what was measured, what is expected, and whether that is so."""
    measured, expected = f"{value:,.4g}" if isinstance(value, float) else f"{value}", ""
    if figure in EXPECTED and isinstance(value, int | float):
        low, high = EXPECTED[figure]
        expected = f"{low:,g} to {high:,g}: {'yes' if low <= value <= high else 'NO'}"
    return [figure, measured, expected]


if __name__ == "__main__":
    main()
