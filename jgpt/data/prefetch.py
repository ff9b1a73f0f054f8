"""The next steps' batches, made in a background thread.

In the data path: between `batches.py` and the step.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """Make the next steps' batches in a background thread, while the device computes; holds nothing to resume."""

    def __init__(self, make: Callable[[int], Made], first_step: int, depth: int = 2):
        """`make` builds a step's batch and puts it on the devices; `depth` of them are ready or in the making."""
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._step = first_step  # the next one to hand out
        self._ahead: deque[Future[Made]] = deque()
        for step in range(first_step, first_step + depth):
            self._ahead.append(self._thread.submit(make, step))

    def next(self, step: int) -> Made:
        """Return make(step); steps are asked for in order. Raises what `make` raised."""
        assert step == self._step, f"step {step} asked for, {self._step} is next"
        made = self._ahead.popleft().result()
        self._step += 1
        self._ahead.append(self._thread.submit(self._make, step + len(self._ahead) + 1))
        return made

    def close(self) -> None:
        """Stop the thread, after the batch that it is making."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[Made]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
