"""Runs one measurement in a process of its own, so that its memory, its compiled kernels and its crash are its own."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from system.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


def call(module: str, function: str, timeout: float = 600, **arguments: Any) -> Any:
    """Calls a function of a module in a new process and returns its result. Arguments and result must fit JSON.

    The process has its own folder of compiled kernels, which keep the attention that was chosen when they were traced.
    After `timeout` seconds its process group is killed. Raises UserError then, and with the last error of a process
    that fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", module, function, json.dumps(arguments)],
            cwd=REPOSITORY,
            env={**os.environ, **caches},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"{function} took more than {timeout:g} s") from None
    if process.returncode:
        raise UserError(last_error(stderr, process.returncode))
    return json.loads(stdout.splitlines()[-1])


def last_error(stderr: str, status: int) -> str:
    """Returns the line in which a failed process says why, or its last line, or its exit status."""
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit|error)\b.*", stderr, re.MULTILINE)
    return (errors or stderr.split("\n\n")[-1].strip().splitlines() or [f"exit status {status}"])[-1][:500]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a training log, perhaps of a run that is writing it; none if there is no log yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(json.dumps(result))
