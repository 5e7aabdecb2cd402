"""The machine: errors, command lines, files, devices. Knows nothing of models or text."""

import importlib.util
import sys

from system import interrupts

interrupts.quit_while_importing()
if importlib.util.find_spec("tyro") is None:
    sys.exit("error: the packages are missing: run `source .venv/bin/activate`, and before it once `make venv`")
