"""A process that dies or hangs: the others notice it, say which rank it is, and end.

`torchrun --max-restarts` then starts all processes again; see `training/restarts.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from system.errors import UserError
from system.interrupts import catch_stop_signals

_BEAT = 1.0
"""Seconds between two heartbeats of a process."""
_ROLL_CALL = 3.5
"""Seconds in which a live process writes several heartbeats, and notices that a collective call has failed."""
_ENDED = "ended"


class Heartbeats:
    """A thread that tells the other ranks every second that this process lives, and watches whether they do.

    A stopped process, or a machine that is lost, gives no heartbeat. NCCL would let the others wait for it until
    PyTorch aborts them without saying why. The heartbeats go through `torchrun`'s key-value store, not through
    collective calls: the processes do not wait for each other.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        """Writes the first heartbeat. `store` belongs to this object alone: calls that share a connection wait for each
        other. `timeout` is in seconds."""
        self.store, self.rank, self.timeout = store, rank, timeout
        self.keys = [f"heartbeat/{other}" for other in range(world_size)]
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        n_local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.neighbors = range(rank - local_rank, rank - local_rank + n_local)
        """the ranks of the same torchrun, whose process ids mean something here"""
        self.n_beats = 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="heartbeats", daemon=True)
        self._beat()

    def start(self) -> None:
        """Starts the thread. Every rank must have written its first heartbeat."""
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self.is_over.set()
        if self.thread.is_alive():
            self.thread.join()

    def leave(self) -> None:
        """Tells the others that this process ends as it should. All ranks have finished."""
        self.stop()
        with contextlib.suppress(dist.DistError):  # torchrun, which holds the store, may have ended already
            self.store.set(self.keys[self.rank], f"{_ENDED} {socket.gethostname()} {os.getpid()}")

    def _beat(self) -> None:
        self.n_beats += 1
        self.store.set(self.keys[self.rank], f"{self.n_beats} {socket.gethostname()} {os.getpid()}")

    def _latest(self) -> list[list[str]]:
        """Returns each rank's number of heartbeats, host and process id."""
        return [value.decode().split() for value in self.store.multi_get(self.keys)]

    def _watch(self) -> None:
        """Writes heartbeats and looks for those of the others; if one is missing, names its rank and ends the process.

        Ends it at once, since the main thread may wait on a GPU, where no exception reaches it.
        """
        beats_per_look = max(1, round(self.timeout / _BEAT / 20))
        # A little less than the timeout of the process group: NCCL ends the process without a message.
        max_missed = max(5.0, 0.9 * self.timeout / _BEAT)
        latest = self._latest()
        changed = [self.n_beats] * len(latest)
        """when each rank last had a new heartbeat, in heartbeats of this process: while all are paused, none counts"""
        try:
            while not self.is_over.wait(_BEAT):
                self._beat()
                missing = {rank for rank in self.neighbors if _has_died(latest[rank])}
                if missing or self.n_beats % beats_per_look == 0:
                    before, latest = latest, self._latest()
                    for rank, heartbeat in enumerate(latest):
                        if heartbeat != before[rank]:  # perhaps its last one: it may have ended as it should
                            changed[rank] = self.n_beats
                            missing.discard(rank)
                missing |= {rank for rank, n in enumerate(changed) if self.n_beats - n > max_missed}
                missing = {rank for rank in missing if latest[rank][0] != _ENDED}
                if missing and not self.is_over.is_set():
                    if self._is_first("report"):
                        print(f"error: {self._no_answer(sorted(missing), latest)}", file=sys.stderr, flush=True)
                    os._exit(1)
        except dist.DistError:
            return  # the store is gone, and with it rank 0's torchrun: collective calls will fail

    def explain(self, error: RuntimeError) -> str | None:
        """Calls the roll after a failed collective call; returns which rank does not answer, or None if another rank
        says so."""
        try:
            self.store.set(f"failed/{self.rank}", "")
            before = self._latest()
            time.sleep(_ROLL_CALL)
            now = self._latest()
            if not self._is_first("report"):
                return None
            silent = [rank for rank in range(len(now)) if now[rank] == before[rank] and rank != self.rank]
            if silent:
                return self._no_answer(silent, now)
            absent = [rank for rank in range(len(now)) if not self.store.check([f"failed/{rank}"])]
            if absent:
                return (
                    f"{_do_not_answer(absent)}: alive on {_hosts(absent, now)}, but not ready for the other processes "
                    f"within --process-timeout {self.timeout:g} s; {_REMEDY}"
                )
        except dist.DistError:
            return f"rank 0 does not answer: the torchrun that started it, or its machine, is lost; {_REMEDY}"
        return f"the processes have lost their connection ({str(error).partition(chr(10))[0][:200]}); {_REMEDY}"

    def _no_answer(self, ranks: Sequence[int], latest: list[list[str]]) -> str:
        lost = "its process was" if len(ranks) == 1 else "their processes were"
        return f"{_do_not_answer(ranks)}: {lost} killed or stopped on {_hosts(ranks, latest)}, or hangs; {_REMEDY}"

    def _is_first(self, what: str) -> bool:
        """Whether this is the first call with this name, on any rank."""
        return self.store.add(what, 1) == 1


_REMEDY = "--resume continues from the last save; torchrun --max-restarts does so by itself"


def _do_not_answer(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} does not answer"
    return f"ranks {', '.join(map(str, ranks))} do not answer"


def _hosts(ranks: Sequence[int], latest: list[list[str]]) -> str:
    return ", ".join(dict.fromkeys(latest[rank][1] for rank in ranks))


def _has_died(heartbeat: list[str]) -> bool:
    """Whether the process of a heartbeat from this machine exists no more."""
    try:
        os.kill(int(heartbeat[2]), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


@contextlib.contextmanager
def named_faults(heartbeats: Heartbeats) -> Iterator[None]:
    """Inside the block, a collective call that fails because of another rank raises UserError with that rank.

    One rank says so; the others exit with status 1 and without a message.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise
        with catch_stop_signals():  # torchrun's SIGTERM, if it has noticed too
            explanation = heartbeats.explain(error)
        if explanation is None:
            sys.exit(1)
        raise UserError(explanation) from None
    finally:
        heartbeats.stop()
