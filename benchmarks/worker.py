"""What the benchmarks share: measurements in processes of their own, and tables."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from system.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def call(module: str, function: str, timeout: float | None = None, **arguments: Any) -> Any:
    """Calls a module's function in a new process, so that its memory and its crash are its own; returns its result.

    Arguments and result must fit JSON. Raises UserError as `run_command` does.
    """
    command = [sys.executable, "-m", "benchmarks.worker", module, function, json.dumps(arguments)]
    return json.loads(run_command(command, REPOSITORY, timeout).splitlines()[-1])


def run_command(command: Sequence[object], folder: Path, timeout: float | None = None) -> str:
    """Runs a command in a folder and returns its standard output.

    The process has its own folder of compiled kernels, which keep the attention that was chosen when they were traced.
    After `timeout` seconds its process group is killed. Raises UserError then, and with the last error of a process
    that fails.
    """
    with tempfile.TemporaryDirectory() as kernels:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": kernels},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        with process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise UserError(f"took more than {timeout:g} s") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit|error)\b.*", stderr, re.MULTILINE)
        raise UserError((errors or [f"exit status {process.returncode}"])[-1][:500])
    return stdout


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of rows of cells, the first with the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]) + "\n"


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(arguments))))
