"""How long OpenMP's threads spin while they wait for each other. Imports no torch, whose OpenMP reads this once."""

import os
from pathlib import Path


def limit_spinning() -> None:
    """Makes waiting threads sleep after about a quarter of a millisecond, unless the user has set a wait policy.

    Call it before torch is imported. By default the threads of GNU's OpenMP spin for 10 ms or more at the end of every
    parallel loop. If another process keeps a core busy, they spin in the time slices that the last thread needs, and
    training takes ten times as long. Threads that sleep at once are slow to wake: that costs a third on a quiet
    machine. `python -m benchmarks.busy` measures both cases.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(spin_count())


def spin_count() -> int:
    """Rounds of about a quarter of a millisecond. A round is a `pause` instruction: 140 cycles on Intel processors since
    Skylake, about 50 on AMD's (Zen 2 to 4)."""
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        is_intel = False
    return 4_500 if is_intel else 14_000
