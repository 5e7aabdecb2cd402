"""The checkpoints under `checkpoints/`. Imports no torch, so that a page or a message need not wait for it."""

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("checkpoints")


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint on the disk. A new file under the old name has another `modified`."""

    path: Path
    modified: float
    """time of its last change, in seconds since 1970"""


def checkpoint_files() -> list[CheckpointFile]:
    """Returns the checkpoints under `checkpoints/`, the newest first, without the files that only `--resume` reads."""
    paths = [path for path in FOLDER.rglob("*.pt") if not path.name.endswith(".last.pt") and path.is_file()]
    files = [CheckpointFile(path, path.stat().st_mtime) for path in paths]
    return sorted(files, key=lambda file: (-file.modified, file.path))
