"""Jobs for a background thread."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does jobs in one thread, one after the other, in the order in which they were started.

    After a job that failed, no other job is done: a later file never stands beside a missing earlier one. `check`,
    `wait` and `close` raise what the job raised.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, initializer=self._remember_thread)
        self.thread_id = 0
        self.last_job: Future[None] | None = None
        self.failure: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Starts a job as soon as the earlier ones are done. Does not wait."""
        self.last_job = self.executor.submit(self._do, job)

    def check(self) -> None:
        """Raises if a job has failed. Does not wait."""
        if self.failure:
            raise self.failure

    def wait(self) -> None:
        """Waits until all jobs are done. Raises if one has failed."""
        if self.last_job:
            self.last_job.result()
        self.check()

    def close(self) -> None:
        """Waits until all jobs are done, and ends the thread. Raises if a job has failed.

        If a KeyboardInterrupt is being handled, or comes during the wait, it also ends the job that is being done.
        """
        try:
            if isinstance(sys.exception(), KeyboardInterrupt):
                raise KeyboardInterrupt
            self.wait()
        except KeyboardInterrupt:
            self._interrupt()
            raise
        finally:
            self.executor.shutdown()

    def _remember_thread(self) -> None:
        self.thread_id = threading.get_ident()

    def _do(self, job: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                job()
            except BaseException as error:
                self.failure = error

    def _interrupt(self) -> None:
        """Raises KeyboardInterrupt in the job that is being done, as Ctrl-C does in the main thread."""
        self.failure = self.failure or KeyboardInterrupt()  # no job is started any more
        if self.last_job and not self.last_job.done():
            error = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread_id), error)
