"""What only a GPU can show, in at most 20 minutes: correctness, speed, memory, and `train.py` with a save and a resume.

    python -m benchmarks.gpu              # writes gpu.jsonl and gpu.md into the folder gpu/
    python -m benchmarks.gpu --only step  # one case

Needs torch 2.11 or newer, no network, and neither tyro nor datasets. Each case is a process with its own time-out. A
case that fails does not end the others. On the CPU all cases run with tiny models, to test this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import worker
from system.errors import UserError
from system.files import atomic_write

SECONDS = {  # time-outs, 20 minutes in all
    "machine": 60, "correctness": 150, "step": 120, "generation": 180, "loss": 60, "train": 180, "step_flash": 180,
    "step_float32_stream": 90, "sft": 180,
}  # fmt: skip
EXPECTED: dict[str, tuple[float, float]] = {  # bounds by figure, some only for a card; those are predictions
    "machine.matmul_tflops H100": (600, 800),
    "machine.matmul_tflops H200": (600, 800),
    "machine.copy_tb_per_s H100": (2.4, 3.1),
    "machine.copy_tb_per_s H200": (3.4, 4.5),
    "step.tokens_per_s H100": (410e3, 475e3),
    "step.tokens_per_s H200": (450e3, 510e3),
    "step.peak_gb H100": (20, 27),
    "step.peak_gb H200": (20, 27),
    "generation.compiled_tokens_per_s H100": (1600, 2500),
    "generation.compiled_tokens_per_s H200": (1600, 2500),
    "correctness.loss_error": (0, 1e-2),
    "correctness.gradient_cosine": (0.99, 1.001),
    "correctness.attention_error": (0, 2e-2),
    "correctness.fused_loss_error": (0, 1e-4),
    "correctness.fused_gradient_error": (0, 2e-2),
    "correctness.float16_loss_ratio": (0, 1),
    "train.speed_with_saves": (0.97, 1.1),
    "train.steps_lost": (0, 0),
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
        start = time.perf_counter()
        try:
            record = {
                "figures": worker.call(
                    "benchmarks.gpu_cases", "measure", SECONDS[case], case=case, device=arguments.device
                )
            }
        except UserError as error:
            record = {"error": str(error)}
        records.append({"case": case, "seconds": round(time.perf_counter() - start, 1), **record})
        line = json.dumps(records[-1])
        print(line, flush=True)
        with open(arguments.out / "gpu.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        with atomic_write(arguments.out / "gpu.md", "w") as file:
            file.write(report(records))
    print(report(records))


def report(records: list[Record]) -> str:
    """Returns the figures as Markdown, each beside its prediction or its goal."""
    machine: Record = next((r["figures"] for r in records if r["case"] == "machine" and "figures" in r), {})
    device = machine.get("device", "unknown device")
    versions = ", ".join(f"{name} {machine.get(name, '?')}" for name in ("torch", "CUDA", "driver"))
    lines = [f"# {device}, {datetime.date.today()}", "", f"`python -m benchmarks.gpu`, {versions}", ""]
    lines += ["| figure | measured | expected |", "| --- | --- | --- |"]
    for record in records:
        for name, value in record.get("figures", {"error": record.get("error")}).items():
            measured = f"{value:,.4g}" if isinstance(value, float) else f"{value}"
            lines.append(f"| {record['case']}.{name} | {measured} | {expected(record['case'], name, value, device)} |")
        lines.append(f"| {record['case']} took | {record['seconds']} s | at most {SECONDS[record['case']]} s |")
    return "\n".join(lines) + "\n"


def expected(case: str, name: str, value: object, device: str) -> str:
    """Returns what a figure should be, and whether it is; nothing if that is not known."""
    figure = f"{case}.{name}"
    known = [key for key in EXPECTED if key == figure or (key.split()[0] == figure and key.split()[-1] in device)]
    if not known or not isinstance(value, int | float):
        return ""
    low, high = EXPECTED[known[0]]
    return f"{low:,g} to {high:,g}: {'yes' if low <= value <= high else 'NO'}"


if __name__ == "__main__":
    main()
