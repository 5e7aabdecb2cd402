"""What only a GPU can show, in nine minutes: correctness, speed, memory, and `train.py` with a save and a resume.

    python -m benchmarks.gpu              # writes gpu.jsonl and gpu.md into the folder gpu/
    python -m benchmarks.gpu --only step  # one case

Needs torch 2.11 or newer, no network and no tyro. Each case is a process with its own time-out and its own folder of
compiled kernels, since a compiled kernel keeps the attention that was chosen when it was traced. A case that fails does
not end the others. On the CPU all cases run with tiny models, to test this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from system.files import atomic_write

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS = {  # time-outs, nine minutes in all
    "machine": 20, "correctness": 85, "step": 85, "generation": 90, "loss": 30, "train": 85, "step_flash": 45,
    "step_float32_stream": 45, "sft": 55,
}  # fmt: skip
H100, H200 = "H100", "H200"
PREDICTED: dict[str, dict[str, tuple[float, float]]] = {  # by figure and card, from reading and from others' reports
    "machine.matmul_tflops": {H100: (600, 800), H200: (600, 800)},
    "machine.copy_tb_per_s": {H100: (2.4, 3.1), H200: (3.4, 4.5)},
    "step.tokens_per_s": {H100: (410e3, 475e3), H200: (450e3, 510e3)},
    "step.peak_gb": {H100: (20, 27), H200: (20, 27)},
    "generation.compiled_tokens_per_s": {H100: (1600, 2500), H200: (1600, 2500)},
}
GOALS: dict[str, tuple[float, float]] = {  # bounds for every device
    "correctness.loss_error": (0, 1e-2),
    "correctness.gradient_cosine": (0.99, 1.001),
    "correctness.attention_error": (0, 2e-2),
    "correctness.fused_loss_error": (0, 1e-4),
    "correctness.fused_gradient_error": (0, 2e-2),
    "correctness.float16_loss_ratio": (0, 1),
    "train.speed_with_saves": (0.97, 1.1),
    "train.steps_lost": (0, 0),
    "train.status": (0, 0),
    "train.resumed_status": (0, 0),
}

Record = dict[str, Any]
"""One case: `case`, `seconds`, and `figures` or `error`."""


def main() -> None:
    """Runs the cases; after each one the JSON line and the table are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.jsonl and gpu.md")
    parser.add_argument("--only", nargs="+", choices=SECONDS, default=list(SECONDS), help="cases to run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for case in arguments.only:
        records.append(run_case(case, arguments.device))
        line = json.dumps(records[-1])
        print(line, flush=True)
        with open(arguments.out / "gpu.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        with atomic_write(arguments.out / "gpu.md", "w") as file:
            file.write(report(records))
    print(report(records))


def run_case(case: str, device: str) -> Record:
    """Runs one case in a process of its own, in its own temporary folder."""
    start = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, "-m", "benchmarks.gpu_cases", case, device, folder]
        try:
            result = subprocess.run(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **caches},
                timeout=SECONDS[case],
                capture_output=True,
                encoding="utf-8",
            )
            lines = (result.stderr if result.returncode else result.stdout).strip().splitlines() or ["no output"]
            outcome = {"error": lines[-1][:500]} if result.returncode else {"figures": json.loads(lines[-1])}
        except subprocess.TimeoutExpired:
            outcome = {"error": f"took more than {SECONDS[case]} s"}
    seconds = (datetime.datetime.now(datetime.UTC) - start).total_seconds()
    return {"case": case, "seconds": round(seconds, 1), **outcome}


def report(records: list[Record]) -> str:
    """Returns the figures as Markdown, each beside its prediction or its goal."""
    machine: Record = next((r["figures"] for r in records if r["case"] == "machine" and "figures" in r), {})
    lines = [
        f"# {machine.get('device', 'unknown device')}, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.gpu`, torch {machine.get('torch', '?')}, CUDA {machine.get('cuda', '?')}, "
        f"driver {machine.get('driver', '?')}",
        "",
        "| figure | measured | expected |",
        "| --- | --- | --- |",
    ]
    for record in records:
        for name, value in record.get("figures", {"error": record.get("error")}).items():
            figure = f"{record['case']}.{name}"
            measured = f"{value:,.4g}" if isinstance(value, float) else f"{value}"
            lines.append(f"| {figure} | {measured} | {expected(figure, value, machine.get('device', ''))} |")
        lines.append(f"| {record['case']} took | {record['seconds']} s | at most {SECONDS[record['case']]} s |")
    return "\n".join(lines) + "\n"


def expected(figure: str, value: object, device: str) -> str:
    """Returns what a figure should be, and whether it is; nothing if that is not known."""
    by_card = PREDICTED.get(figure, {})
    bounds = GOALS.get(figure) or next((by_card[card] for card in by_card if card in device), None)
    if bounds is None or not isinstance(value, int | float):
        return ""
    low, high = bounds
    return f"{low:,g} to {high:,g}: {'yes' if low <= value <= high else 'NO'}"


if __name__ == "__main__":
    main()
