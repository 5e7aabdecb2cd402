"""How long OpenMP's threads spin while they wait for each other. Imports no torch, whose OpenMP reads this once."""

import os
from pathlib import Path

TRAINING, GENERATION = 200, 400
"""Microseconds to spin. Generation has longer pauses between parallel loops."""


def limit_spinning(microseconds: int = TRAINING) -> None:
    """Makes threads that wait spin for a short time and then sleep, unless the user has set a wait policy.

    Call it before torch is imported. By default the threads of GNU's OpenMP spin for 10 ms or more at the end of every
    parallel loop. If another process keeps a core busy, they spin in the time slices that the last thread needs, and
    training takes ten times as long. Threads that sleep at once are slow to wake: that costs half as much time again on
    a quiet machine. `python -m benchmarks.busy` measures both cases.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(spin_count(microseconds))


def spin_count(microseconds: int) -> int:
    """Returns the rounds of a waiting loop that take so long.

    A round on an x86 processor is a `pause` instruction: 140 cycles on Intel's since Skylake, 65 on AMD's since Zen 2.
    Elsewhere a round is an empty one.
    """
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux, where another OpenMP is in use
        cpu = ""
    nanoseconds = {"GenuineIntel": 50, "AuthenticAMD": 18}
    round_time = next((time for vendor, time in nanoseconds.items() if vendor in cpu), 1)
    return 1_000 * microseconds // round_time
