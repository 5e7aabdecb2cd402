"""How long `generate.py` takes from its start to the first token of a model as small as the demo's.

    python -m benchmarks.startup

`import torch` is measured too, in turn, each time in a process of its own. Figures are medians over the rounds.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from system.cli import run
from system.errors import UserError, require_at_least

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_SECONDS, MAX_BEYOND_TORCH = 2.5, 1.0


@dataclass(frozen=True)
class Config:
    rounds: int = 5
    """measurements of both"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rounds")


def main(config: Config) -> None:
    """Writes a model with random weights, measures, and prints both times beside their goals."""
    from model import GPT, GPTConfig
    from text.tokenizer import Tokenizer, to_json
    from weights import checkpoint

    tokens = [bytes(token) for n in (1, 2) for token in itertools.product(range(256), repeat=n)][:2045]
    spec = to_json(Tokenizer({token: i for i, token in enumerate(tokens)}, "pairs of bytes"), 2048)
    shape = GPTConfig(block_size=128, vocab_size=2048, n_tokens=2048, n_layer=4, n_head=2, n_embd=128)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.pt"
        checkpoint.save(path, checkpoint.pack(GPT(shape), kind="base", tokenizer=spec, template=None))
        flags = ["--model", str(path), "--prompt", "Return a", "--max-new-tokens", "1"]
        generate = [str(REPOSITORY / "generate.py"), *flags]
        rounds = [(seconds(generate), seconds(["-c", "import torch"])) for _ in range(config.rounds)]
    first_token, import_torch = map(statistics.median, zip(*rounds, strict=True))
    beyond = statistics.median(a - b for a, b in rounds)
    print(f"first token       {first_token:.2f} s   goal: at most {MAX_SECONDS} s")
    print(f"import torch      {import_torch:.2f} s")
    print(f"beyond the import {beyond:.2f} s   goal: at most {MAX_BEYOND_TORCH} s")


def seconds(arguments: list[str]) -> float:
    """Returns how long Python runs with arguments. Raises UserError if it fails."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8")
    if result.returncode:
        raise UserError(f"{arguments[0]} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main, Config)
