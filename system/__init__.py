"""The machine: errors, command lines, files, devices. Knows nothing of models or text."""

__version__ = "0.3.0"
