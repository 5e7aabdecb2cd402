"""The machine: errors, command lines, files, devices. Knows nothing of models or text."""

from system import interrupts

interrupts.quit_while_importing()
