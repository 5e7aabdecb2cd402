"""The cases of `benchmarks.gpu`. Each function measures one and returns its figures."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train as train_script
from benchmarks.generation_variants import our_variant
from benchmarks.training import CPU, CUDA
from benchmarks.training_step import TrainingStep, measure_step, median_seconds
from benchmarks.worker import read_log
from model import GPT, GPTConfig, linear_cross_entropy
from system.device import autocast, choose_device, peak_memory
from system.files import write_json
from text.tokenizer import from_spec
from training.loader import Conversations, micro_batches

Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large the cases are; the defaults are GPT-2 small as `train.py` trains it."""

    device: torch.device
    shape: GPTConfig = GPTConfig()
    batch_size: int = 64
    steps: int = 20
    new_tokens: int = 200
    train_steps: int = 150
    optimizations: tuple[str, ...] = CUDA


def measure(case: str, device: str) -> Figures:
    """Runs a case, on the CPU with a tiny model. `benchmarks.gpu` calls this in a process of its own."""
    scale = Scale(choose_device(device))
    if device == "cpu":
        shape = GPTConfig(block_size=32, vocab_size=512, n_tokens=500, n_layer=2, n_head=2, n_embd=32)
        scale = Scale(scale.device, shape, 4, steps=2, new_tokens=4, train_steps=40, optimizations=CPU)
    return CASES[case](scale)


def machine(scale: Scale) -> Figures:
    """Versions, and the ceilings: a large matrix product in bfloat16, a large copy."""
    figures: Figures = {"device": scale.device.type, "torch": torch.__version__, "CUDA": torch.version.cuda}
    n = 256
    if scale.device.type == "cuda":
        n = 8192
        figures["device"] = torch.cuda.get_device_name()
        with contextlib.suppress(OSError):  # no nvidia-smi
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            figures["driver"] = subprocess.run(query, capture_output=True, encoding="utf-8").stdout.strip()
    a, b = torch.randn(2, n, n, device=scale.device).bfloat16()
    source = a.repeat(8, 1)
    target = torch.empty_like(source)
    a @ b, target.copy_(source)
    figures["matmul_tflops"] = 2e-12 * n**3 / median_seconds(lambda: a @ b, 10, scale.device)
    figures["copy_tb_per_s"] = 2e-12 * source.nbytes / median_seconds(lambda: target.copy_(source), 10, scale.device)
    return figures


def correctness(scale: Scale) -> Figures:
    """The compiled bfloat16 step against an eager float32 one, and each special kernel against its definition."""
    torch.manual_seed(0)
    model = GPT(scale.shape).to(scale.device).train()
    tokens, targets = torch.randint(scale.shape.n_tokens, (2, 4, scale.shape.block_size), device=scale.device)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16 and scale.device.type == "cuda":
            model.compile_training()
        with autocast(scale.device, dtype):
            loss = model(tokens, targets) / tokens.numel()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone().flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(*gradients, strict=True)]
    on_cuda = scale.device.type == "cuda"
    # float16 with gradient scaling
    step = TrainingStep(scale.shape, scale.device, ["fused head and loss", "float16" if on_cuda else "bfloat16"])
    steps = [step(tokens, targets).item() for _ in range(8)]
    return {
        "loss_error": abs(losses[1] / losses[0] - 1),
        "gradient_cosine": min(cosines),
        **fused_loss_error(scale),
        **(attention_error(scale) if on_cuda else {}),
        "float16_loss_ratio": steps[-1] / steps[0],
    }


def attention_error(scale: Scale) -> Figures:
    """Flash attention against cuDNN's: the largest difference of outputs and gradients, in bfloat16."""
    results = []
    qkv = torch.randn(3, 4, 12, 1024, 64, device=scale.device, dtype=torch.bfloat16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        results.append([y, *torch.autograd.grad(y.sum(), (q, k, v))])
    return {"attention_error": max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))}


def fused_loss_error(scale: Scale) -> Figures:
    """The fused loss in bfloat16 against PyTorch's cross-entropy in float64: relative errors of loss and gradients."""
    n, width, vocab_size = 5000, 64, 1000  # the last chunk is not whole
    x = torch.randn(n, width, device=scale.device).bfloat16().requires_grad_()
    head = (torch.randn(vocab_size, width, device=scale.device) / 8).bfloat16().float().requires_grad_()
    y = torch.randint(vocab_size, (n,), device=scale.device)
    exact = F.cross_entropy(x.double() @ head.double().t(), y, reduction="sum")
    fused = linear_cross_entropy(x, head, y)
    pairs = zip(torch.autograd.grad(exact, (x, head)), torch.autograd.grad(fused, (x, head)), strict=True)
    return {
        "fused_loss_error": abs(fused.item() / exact.item() - 1),
        "fused_gradient_error": max(((b - a).norm() / a.norm()).item() for a, b in pairs),
    }


def step(scale: Scale, without: str = "", float32_stream: bool = False) -> Figures:
    """A training step on random tokens, perhaps without an optimization. With `float32_stream` the residual stream is
    in float32, as autocast alone has it."""
    step = TrainingStep(scale.shape, scale.device, set(scale.optimizations) - {without})
    if float32_stream:
        step.model.h[0].register_forward_pre_hook(lambda block, inputs: (inputs[0].float(), *inputs[1:]))
    return measure_step(step, scale.batch_size, scale.steps)


def generation(scale: Scale) -> Figures:
    """Tokens per second in bfloat16 after a short prompt, for one sequence and for several."""
    model = GPT(scale.shape).to(scale.device).bfloat16().eval()
    variants = [our_variant(f"batch_{n}_tokens_per_s", model, batch_size=n) for n in (1, 8, 32)]
    if scale.device.type == "cuda":  # compiling takes too long for a test on the CPU
        variants.append(our_variant("compiled_tokens_per_s", model, is_compiled=True))
    prompt = torch.randint(scale.shape.n_tokens, (1, 8), device=scale.device)
    return {
        variant.name: statistics.median([variant.tokens_per_second(prompt, scale.new_tokens) for _ in range(4)][1:])
        for variant in variants
    }


def loss(scale: Scale) -> Figures:
    """Milliseconds of head and loss, forward and backward, uncompiled, by the size of the chunks."""
    n, c = scale.batch_size * scale.shape.block_size, scale.shape
    hidden = torch.randn(n, c.n_embd, device=scale.device).bfloat16().requires_grad_()
    head = torch.randn(c.vocab_size, c.n_embd, device=scale.device).mul_(0.02).requires_grad_()
    targets = torch.randint(c.n_tokens, (n,), device=scale.device)

    def milliseconds(chunk_size: int) -> float:
        def work() -> None:
            linear_cross_entropy(hidden, head, targets, chunk_size).backward()

        work()
        return 1e3 * median_seconds(work, 2, scale.device)

    return {f"ms_chunks_of_{n // parts}": milliseconds(n // parts) for parts in (32, 16, 8, 4)}


def sft(scale: Scale) -> Figures:
    """Fine-tuning steps: conversations of many lengths, padded, with the loss on the second half of each."""
    c, batch_size, random = scale.shape, scale.batch_size // 2, np.random.default_rng(0)
    lengths = random.integers(c.block_size // 8, c.block_size, 400)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "sft_train.bin", c.n_tokens, int(lengths.sum()))
        mask = np.concatenate([np.arange(length) > length // 2 for length in lengths])
        mask.astype(np.uint8).tofile(f"{folder}/sft_train_mask.bin")
        np.append(0, lengths.cumsum()).astype("<u8").tofile(f"{folder}/sft_train_index.bin")
        data = Conversations(Path(folder), "train", c.block_size, batch_size, seed=0)
        rows = [micro_batches(data.batch(i), 1, max_length=c.block_size)[0].to(scale.device) for i in range(20)]
    # Lengths vary, and cuDNN plans anew for each: `Trainer` leaves its attention off too.
    step = TrainingStep(c, scale.device, set(scale.optimizations) - {"cuDNN's attention"})
    by_length = sorted(rows, key=lambda batch: batch.tokens.size(1))
    for batch in (by_length[0], by_length[-1], by_length[10]):  # compiles for dynamic shapes, once and for all
        torch._dynamo.maybe_mark_dynamic(batch.tokens, [0, 1])
        step(batch.tokens, batch.targets)
    torch._dynamo.config.error_on_recompile = True

    def work() -> None:
        for batch in rows:
            step(batch.tokens, batch.targets)

    seconds = median_seconds(work, 1, scale.device)
    n_tokens = sum(batch.tokens.numel() for batch in rows)
    return {"tokens_per_s": n_tokens / seconds, "peak_gb": peak_memory(scale.device) / 1e9}


def train(scale: Scale) -> Figures:
    """`train.py` itself: half of the steps, a SIGINT, and the rest with `--resume`. Parses no flags."""
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        config = train_script.Config(
            **{name: getattr(scale.shape, name) for name in ("block_size", "n_layer", "n_head", "n_embd")},
            data=folder,
            out=Path(folder) / "a.pt",
            device=scale.device.type,
            max_steps=scale.train_steps,
            batch_size=scale.batch_size,
            warmup_steps=20,
            eval_tokens=16 * scale.shape.block_size,
            log_every=1,
            eval_every=60,
            save_every=60,
        )

        def interrupt() -> None:
            while len(read_log(config.log_path)) < scale.train_steps // 2:
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
        "steps_lost": scale.train_steps - len({entry["step"] for entry in steps}),
        "last_loss": steps[-1]["loss"],
        "ms": statistics.median(settled),
        "speed_with_saves": statistics.median(settled) / statistics.mean(settled),
    }


def write_data(folder: Path) -> None:
    """Writes token files with a tokenizer of GPT-2's size, so that its vocabulary need not be installed."""
    for split in ("train", "val"):
        write_tokens(folder / f"{split}.bin", 50_257)
    characters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 324))]  # GPT-2's names of the bytes
    pairs = map("".join, itertools.product(characters, repeat=2))
    vocabulary = {token: i for i, token in enumerate([*characters, *itertools.islice(pairs, 50_000)])}
    spec = json.dumps({"model": {"vocab": vocabulary}})
    (folder / "tokenizer.json").write_text(spec, encoding="utf-8")
    meta = {"files": ["train.bin", "val.bin", "tokenizer.json"], "tokenizer": from_spec(spec).name, "splits": {}}
    write_json(folder / "meta.json", meta)


def write_tokens(path: Path, n_tokens: int, n: int = 2_000_000) -> None:
    """Writes `n` random ids below `n_tokens`, frequent and rare ones as in text (Zipf's law)."""
    np.minimum(np.random.default_rng(0).zipf(1.3, n) - 1, n_tokens - 1).astype("<u2").tofile(path)


CASES: dict[str, Callable[[Scale], Figures]] = {
    "machine": machine,
    "correctness": correctness,
    "step": step,
    "generation": generation,
    "loss": loss,
    "train": train,
    "step_flash": partial(step, without="cuDNN's attention"),
    "step_float32_stream": partial(step, float32_stream=True),
    "sft": sft,
}
