"""Runs commands and pasted Python in processes that have imported torch already, which saves seconds for each.

Reads one job a line from standard input, as JSON: `script` and `arguments`, or `paste`, Python as one types it;
`folder`, where it runs; `stdin`, `stdout` and `stderr`, the paths of three files. Answers each with the exit status of
its process. conftest.py starts it.
"""

import code
import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import matplotlib.backends.backend_agg  # noqa: E402, F401
import pyarrow.parquet  # noqa: E402, F401
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


gc.freeze()
for line in sys.stdin:
    process = os.fork()
    if not process:
        run_and_exit(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
