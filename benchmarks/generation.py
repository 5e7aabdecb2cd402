"""How fast the project generates tokens, next to the library `transformers`: all variants in turn, in one process.

    python -m benchmarks.generation                       # GPT-2 small with random weights
    python -m benchmarks.generation --prompts 8 --new-tokens 200 --rounds 5

Temperature 0.8 and top-k 50 everywhere; the batch size is 1 unless the name of the variant says otherwise.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import worker
from generation.config import SamplingConfig
from generation.cpu_linear import quantize_weights, speed_up_decoding
from generation.decoding import CompiledDecoder, generate, one_step_ahead
from gpt_config import GPTConfig
from model import GPT
from system.cli import GENERATION, run
from system.device import choose_device
from system.errors import require, require_at_least

Variant = Callable[[Tensor, int], int]
"""Continues int64 tokens (1, T) by a number of tokens; returns how many it wrote in all sequences."""


@dataclass(frozen=True)
class Config(GPTConfig):
    prompts: tuple[int, ...] = (8, 512)
    """lengths of the prompts, in tokens"""
    new_tokens: int = 100
    """tokens to generate after each prompt"""
    rounds: int = 3
    """measurements of each variant"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "new_tokens", "rounds")
        longest = max(self.prompts, default=0) + self.new_tokens
        require(longest <= self.block_size, f"--block-size {self.block_size} is less than prompt and new tokens")


def main(config: Config) -> None:
    """Measures every variant and prints the medians of tokens/s, and their ratios to `transformers`."""
    speeds = worker.call("benchmarks.generation", "measure", config=dataclasses.asdict(config))
    table = [["tokens/s (ratio to transformers)", *(f"prompt of {n}" for n in config.prompts)]]
    for name, row in speeds.items():
        pairs = zip(row, speeds["transformers"], strict=True)
        table.append([name, *(f"{speed:,.1f} ({speed / reference:.2f})" for speed, reference in pairs)])
    print(worker.table(table))


def measure(config: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the median tokens/s of every variant behind each prompt, all with the same random weights."""
    c = Config(**config)
    device = choose_device(c.device)
    torch.manual_seed(0)
    model = GPT(c).eval().to(device)
    half, int8 = copy.deepcopy(model).bfloat16(), copy.deepcopy(model)
    speed_up_decoding(model)
    speed_up_decoding(half)
    variants = {
        "transformers": transformers_variant(c, device),
        "float32": our_variant(model),
        "float32, batch of 8": our_variant(model, batch_size=8),
        "--dtype bfloat16": our_variant(half),
    }
    if device.type == "cpu":
        quantize_weights(int8)
        variants["--quantize int8"] = our_variant(int8)
    speeds: dict[str, list[list[float]]] = {name: [[] for _ in c.prompts] for name in variants}
    for i, length in enumerate(c.prompts):
        for _ in range(c.rounds):
            for name, variant in variants.items():
                prompt = torch.randint(c.n_tokens, (1, length), device=device)
                speeds[name][i].append(tokens_per_second(variant, prompt, c.new_tokens))
    return {name: list(map(statistics.median, row)) for name, row in speeds.items()}


def tokens_per_second(variant: Variant, prompt: Tensor, new_tokens: int) -> float:
    """Measures one call, which reads the prompt too."""
    start = time.perf_counter()
    return variant(prompt, new_tokens) / (time.perf_counter() - start)


def our_variant(model: GPT, batch_size: int = 1, is_compiled: bool = False) -> Variant:
    """Returns a variant that generates with this project's code."""
    compiled = CompiledDecoder(model) if is_compiled else None

    def write(tokens: Tensor, new_tokens: int) -> int:
        config = SamplingConfig(max_new_tokens=new_tokens, temperature=0.8, top_k=50)
        steps = generate(model, tokens, config, num_samples=batch_size, compiled=compiled)
        ids = one_step_ahead(steps) if tokens.is_cuda else steps  # as `TextModel` does
        return sum(len(step[0].tolist()) for step in ids)  # waits for each token, as a program that streams does

    return write


def transformers_variant(shape: GPTConfig, device: torch.device) -> Variant:
    """Returns the variant that generates with the library `transformers`.

    Its model has the same shape, in float32 on the CPU and in bfloat16 elsewhere.
    """
    from transformers import GPT2Config, GPT2LMHeadModel  # here, because a machine for benchmarks.gpu may lack it

    names = ("vocab_size", "n_embd", "n_layer", "n_head")
    same = GPT2Config(n_positions=shape.block_size, **{name: getattr(shape, name) for name in names})
    reference = GPT2LMHeadModel(same).eval().to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    reference.generation_config.pad_token_id = reference.generation_config.eos_token_id = None

    def write(tokens: Tensor, new_tokens: int) -> int:
        options = {"max_new_tokens": new_tokens, "do_sample": True, "temperature": 0.8, "top_k": 50}
        return reference.generate(tokens, attention_mask=torch.ones_like(tokens), **options).size(1) - tokens.size(1)

    return write


if __name__ == "__main__":
    run(main, Config, spin=GENERATION)
