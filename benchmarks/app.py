"""How fast the app generates next to `generate.py`: GPT-2 small with random weights, in turn, in separate processes.

    python -m benchmarks.app [ROUNDS]

Streamlit's test driver runs the app, so that no browser uses the processor.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from system.cli import run
from system.errors import UserError, require_at_least

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT = "Return a copy of the"
NEW_TOKENS = 200


@dataclass(frozen=True)
class Config:
    rounds: Positional[int] = 5
    """measurements of the app and of `generate.py`"""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rounds")


def main(config: Config) -> None:
    """Writes the model, measures, and prints a line per round and the median ratio."""
    from model import GPT, GPTConfig
    from weights import checkpoint

    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoints/gpt2.pt"
        checkpoint.save(path, checkpoint.pack(GPT(GPTConfig()), kind="base", tokenizer="gpt2", template=None))
        flags = ["--model", str(path), "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
        for _ in range(config.rounds):
            app = measure(["-m", "benchmarks.app_worker", PROMPT], folder)
            script = measure([str(REPOSITORY / "generate.py"), *flags], folder)
            ratios.append(app / script)
            print(f"app {app:.1f} tokens/s, generate.py {script:.1f}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}")


def measure(arguments: list[str], folder: str) -> float:
    """Runs Python with arguments in a folder; returns the tokens/s that the program reports last.

    Raises UserError if it reports none.
    """
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        encoding="utf-8",
    )
    reports = re.findall(r"([\d,.]+) tokens/s", result.stdout + result.stderr)
    if not reports:
        raise UserError(f"{' '.join(arguments[:2])} failed: {(result.stderr.strip().splitlines() or [''])[-1]}")
    return float(reports[-1].replace(",", ""))


if __name__ == "__main__":
    run(main, Config)
