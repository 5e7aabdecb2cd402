"""Jobs for a background thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does jobs in one thread, one after the other, in the order in which they were started.

    After a job that failed, no other job is done: a later file never stands beside a missing earlier one. `check`,
    `wait` and `close` raise what the job raised.
    """

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1)
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

        A KeyboardInterrupt during the wait ends it after the job that is being done.
        """
        try:
            self.wait()
        finally:
            self.executor.shutdown(cancel_futures=True)

    def _do(self, job: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                job()
            except BaseException as error:
                self.failure = error
