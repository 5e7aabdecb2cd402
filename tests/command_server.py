"""Runs commands and pasted Python in processes that have imported torch already. test_documentation.py starts it.

Reads one job a line from standard input, as JSON: `script` and `arguments`, or `paste`, Python as one types it; `stdin`
and `output`, the paths of two files. Answers each with the exit status of its process.
"""

import code
import json
import os
import runpy
import sys
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))

import generation.text_model  # noqa: E402, F401
import training.run  # noqa: E402, F401


def paste(text: str) -> NoReturn:
    """Types lines at Python's prompt, and exits: with status 1 after the first one that fails."""
    console = code.InteractiveConsole()
    console.showtraceback = console.showsyntaxerror = lambda *_, **__: (sys.excepthook(*sys.exc_info()), os._exit(1))
    for line in [*text.splitlines(), ""]:
        console.push(line)
    sys.exit()


for line in sys.stdin:
    job = json.loads(line)
    process = os.fork()
    if not process:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
else:
    sys.exit()

# The new process leaves the loop and becomes the script. It ends as any Python does.
for path, flags, streams in ((job["stdin"], os.O_RDONLY, [0]), (job["output"], os.O_WRONLY | os.O_CREAT, [1, 2])):
    opened = os.open(path, flags)
    for stream in streams:
        os.dup2(opened, stream)
if "paste" in job:
    paste(job["paste"])
sys.argv = [job["script"], *job["arguments"]]
runpy.run_path(job["script"], run_name="__main__")
