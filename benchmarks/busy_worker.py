"""Trains the demo's model on random tokens, or generates with GPT-2 small, and prints the milliseconds per step.

python -m benchmarks.busy_worker train|generate STEPS
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import torch

import train
from generation.cpu_linear import speed_up_decoding
from generation.decoding import generate
from model import GPT, GPTConfig
from system.device import autocast, keep_memory, multiplies_faster_in_bfloat16
from training.optim import build_optimizers

WARMUP_STEPS = 10
PRESET = train.PRESETS["demo"]
DEMO = GPTConfig(**train.model_shape(PRESET), vocab_size=2048, n_tokens=2048)


def training() -> Iterator[None]:
    """Takes one optimizer step after the other, as `train.py --preset demo` does."""
    keep_memory()
    cpu = torch.device("cpu")
    dtype = torch.bfloat16 if multiplies_faster_in_bfloat16(DEMO.n_embd) else torch.float32
    model = GPT(DEMO).train()
    optimizers = build_optimizers(
        model, "muon", PRESET.learning_rate, PRESET.beta2, PRESET.weight_decay, PRESET.embedding_lr_scale, dtype
    )
    while True:
        tokens, targets = torch.randint(DEMO.n_tokens, (2, PRESET.batch_size, DEMO.block_size))
        with autocast(cpu, dtype):
            loss = model(tokens, targets) / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield


def generation() -> Iterator[None]:
    """Generates one token after the other, with temperature 0.8 and top-k 50."""
    model = GPT(GPTConfig()).eval()
    speed_up_decoding(model)
    prompt = torch.randint(model.config.n_tokens, (1, 8))
    for ids, _ in generate(model, prompt, sys.maxsize, temperature=0.8, top_k=50):
        ids.tolist()
        yield


def milliseconds_per_step(steps: Iterator[None], n: int) -> float:
    """Returns the mean time of `n` steps after a few that are not timed."""
    for _ in itertools.islice(steps, WARMUP_STEPS):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(steps, n):
        pass
    return 1e3 * (time.perf_counter() - start) / n


if __name__ == "__main__":
    tasks = {"train": training, "generate": generation}
    print(milliseconds_per_step(tasks[sys.argv[1]](), int(sys.argv[2])))
