"""Runs commands and pasted Python in processes that have imported torch already, which saves seconds for each.

Reads one job a line from standard input, as JSON: `script` and `arguments`, or `paste`, Python as one types it;
`folder`, where it runs; `environments`, the variables to set in each of its processes, usually one; `stdin`, `stdout`
and `stderr`, the paths of three files. Answers each with its exit status. conftest.py starts it.
"""

import code
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import matplotlib.backends.backend_agg  # noqa: E402, F401
import matplotlib.figure  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
import tokenizers  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import tyro  # noqa: E402, F401

from text.tokenizer import gpt2  # noqa: E402

for package in ("system", "text", "weights", "generation", "training"):
    for path in (REPOSITORY / package).glob("*.py"):
        importlib.import_module(f"{package}.{path.stem}")
gpt2()  # reads its vocabulary


class Prompt(code.InteractiveConsole):
    """Python's prompt, which the first error ends."""

    def showtraceback(self) -> None:
        raise

    def showsyntaxerror(self, *_arguments: object, **_options: object) -> None:
        raise


def run(job: dict) -> None:
    """Becomes a script, or types lines at Python's prompt."""
    os.chdir(job["folder"])
    for stream, name in enumerate(("stdin", "stdout", "stderr")):
        opened = os.open(job[name], os.O_WRONLY | os.O_APPEND if stream else os.O_RDONLY)
        os.dup2(opened, stream)
        os.close(opened)
    if "paste" in job:
        prompt = Prompt()
        for line in [*job["paste"].splitlines(), ""]:
            prompt.push(line)
    else:
        sys.argv = [job["script"], *job["arguments"]]
        runpy.run_path(job["script"], run_name="__main__")


def run_and_exit(job: dict) -> None:
    """Runs a job and ends the process with its exit status."""
    status = 0
    try:
        run(job)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Python's own end would copy all memory that it shares with the server


def run_in_processes(job: dict) -> int:
    """Runs a job in one process for each of its environments; returns the first exit status that is not 0, or 0.

    As with torchrun, a process that fails takes the others with it.
    """
    processes, status = set(), 0
    for environment in job["environments"]:
        process = os.fork()
        if not process:
            os.environ.update(environment)
            run_and_exit(job)
        processes.add(process)
    while processes:
        process, how = os.wait()
        processes.remove(process)
        if failed := os.waitstatus_to_exitcode(how):
            status = status or failed
            for other in processes:
                os.kill(other, signal.SIGTERM)
    return status


gc.freeze()
for line in sys.stdin:
    print(run_in_processes(json.loads(line)), flush=True)
