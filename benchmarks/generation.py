"""How fast generation is, for `benchmarks.training --generation`: every way to sample in turn, in one process."""

import copy
import statistics
import time
from collections.abc import Callable

import torch

from generation.decoding import CompiledDecoder, generate, quantize_weights, speed_up_decoding
from model import GPT, GPTConfig

Way = Callable[[int, int], float]
"""Writes so many tokens after a prompt of so many; returns tokens per second, reading the prompt included."""


def measure(prompts: tuple[int, ...], new_tokens: int, rounds: int, device: torch.device, shape: dict) -> list[dict]:
    """Returns a row for each way to sample and each prompt: median tokens/s, and the median ratio to `transformers`.

    Temperature 0.8 and top-k 50 everywhere, random weights, batch 1 but where the name says otherwise.
    """
    ways, rows = ways_to_sample(device, shape), []
    for prompt in prompts:
        figures = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (way, tokens) in ways.items():
                figures[name].append(way(prompt, tokens or new_tokens))
        for name, rates in figures.items():
            base = figures.get("transformers")
            ratio = statistics.median(a / b for a, b in zip(rates, base, strict=True)) if base else None
            rows.append({"name": name, "prompt": prompt, "tokens_per_second": statistics.median(rates), "ratio": ratio})
    return rows


def ways_to_sample(device: torch.device, shape: dict) -> dict[str, tuple[Way, int | None]]:
    """Returns by name each way, and how many tokens it is to write where that is fixed."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**shape)).eval().to(device)
    ways = {"no cache, as nanoGPT": (ours(plain, use_cache=False), 8)}
    if theirs := reference(plain, device):
        ways["transformers"] = (theirs, None)
    if device.type != "cpu":
        half = copy.deepcopy(plain).bfloat16()
        compiled = CompiledDecoder(half)
        ours(half, compiled=compiled)(8, 8)  # compiles
        return ways | {
            "float32": (ours(plain), None),
            "bfloat16": (ours(half), None),
            "bfloat16, compiled": (ours(half, compiled=compiled), None),
            "bfloat16, batch of 8": (ours(half, num_samples=8), None),
        }
    fast, int8 = copy.deepcopy(plain), copy.deepcopy(plain)
    speed_up_decoding(fast)
    quantize_weights(int8)
    return ways | {
        "cache": (ours(plain), None),
        "+ products for few rows": (ours(fast), None),
        "the same, batch of 8": (ours(fast, num_samples=8), None),
        "--dtype bfloat16": (ours(copy.deepcopy(plain).bfloat16()), None),
        "--quantize int8": (ours(int8), None),
    }


def ours(model: GPT, num_samples: int = 1, use_cache: bool = True, compiled: CompiledDecoder | None = None) -> Way:
    """Returns the way that `generate` takes."""

    def way(prompt, new_tokens):
        device = model.wpe.weight.device
        tokens = torch.randint(model.config.n_tokens, (1, prompt), device=device)
        options = {
            "temperature": 0.8,
            "top_k": 50,
            "num_samples": num_samples,
            "use_cache": use_cache,
            "compiled": compiled,
        }
        start = time.perf_counter()
        for ids, _ in generate(model, tokens, new_tokens, **options):
            ids.tolist()  # each token is looked at, as one that streams does
        return num_samples * new_tokens / (time.perf_counter() - start)

    return way


def reference(model: GPT, device: torch.device) -> Way | None:
    """Returns the way of the library `transformers` on a model of the same shape, None where it is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head
        )
    )
    theirs = theirs.eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    theirs.generation_config.pad_token_id = theirs.generation_config.eos_token_id = None

    def way(prompt, new_tokens):
        tokens = torch.randint(c.n_tokens, (1, prompt), device=device)
        start = time.perf_counter()
        written = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
        )
        assert written.size(1) == prompt + new_tokens
        return new_tokens / (time.perf_counter() - start)

    return way


def table(rows: list[dict]) -> str:
    """Returns the rows as a table, for people."""
    lines = [f"{'tokens/s (ratio to transformers)':34}" + "".join(f"{name:>20}" for name in _columns(rows))]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [
            f"{row['tokens_per_second']:,.1f}" + (f" ({row['ratio']:.2f})" if row["ratio"] else "")
            for row in rows
            if row["name"] == name
        ]
        lines.append(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _columns(rows):
    return dict.fromkeys(f"prompt of {row['prompt']}" for row in rows)
