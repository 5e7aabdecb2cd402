"""The machine: errors, command lines, files, devices. Knows nothing of models or text."""
