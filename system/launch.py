"""The place of this process among those of one run, as `torchrun` or another launcher puts it into the environment.

This file knows no torch. `training/distributed.py` joins the processes of a training run; `text/parts.py` lets those of
a preparation meet in a folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from system.errors import UserError

UNSET_OR_LAUNCH = "unset these variables, or start the run with torchrun, which sets them"


@dataclass(frozen=True)
class Launch:
    """What a launcher says about a process; by default it is alone."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, needed: tuple[str, ...] = ("RANK",)) -> Launch:
        """Reads RANK, LOCAL_RANK and WORLD_SIZE. Several processes also need the variables `needed`.

        Raises UserError if a number is none, if a rank is not below WORLD_SIZE, or if a variable is missing.
        """
        world_size = environment_number("WORLD_SIZE", 1)
        rank, local_rank = environment_number("RANK", 0), environment_number("LOCAL_RANK", 0)
        if not max(rank, local_rank) < world_size:
            raise UserError(
                f"RANK={rank} and LOCAL_RANK={local_rank} must be below WORLD_SIZE={world_size}: {UNSET_OR_LAUNCH}"
            )
        if world_size > 1 and (missing := [name for name in needed if name not in os.environ]):
            raise UserError(f"the {world_size} processes cannot meet ({', '.join(missing)} missing): {UNSET_OR_LAUNCH}")
        return cls(rank, local_rank, world_size)


def environment_number(name: str, default: int) -> int:
    """Returns the number in an environment variable. Raises UserError unless it is a whole number of 0 to 9 digits."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UserError(
            f"{name}={text[:40]} in the environment is not a whole number of at least 0, or too large: "
            f"{UNSET_OR_LAUNCH}"
        )
    return int(text)
