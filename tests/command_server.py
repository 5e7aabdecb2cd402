"""Runs commands and pasted Python in processes that have imported torch already. test_documentation.py starts it.

Reads one job a line from standard input, as JSON: `script` and `arguments`, or `paste`, Python as one types it; `stdin`
and `output`, the paths of two files. Answers each with the exit status of its process.
"""

import code
import gc
import json
import os
import runpy
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import matplotlib.backends.backend_agg  # noqa: E402, F401
import tyro  # noqa: E402, F401

import generation.text_model  # noqa: E402, F401
import training.run  # noqa: E402, F401


class Prompt(code.InteractiveConsole):
    """Python's prompt, which the first error ends."""

    def showtraceback(self) -> None:
        raise

    def showsyntaxerror(self, *_arguments: object, **_options: object) -> None:
        raise


def run(job: dict) -> None:
    """Becomes a script, or types lines at Python's prompt."""
    for path, flags, streams in ((job["stdin"], os.O_RDONLY, (0,)), (job["output"], os.O_WRONLY | os.O_CREAT, (1, 2))):
        opened = os.open(path, flags)
        for stream in streams:
            os.dup2(opened, stream)
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
