"""Make the batches of the next steps in a background thread.

In the data path: between `batches.py` and the step.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")  # a batch, on the devices


class Prefetcher(Generic[Item]):
    """Make the batches of the next steps while the device computes. It has no state that a checkpoint must hold."""

    def __init__(self, make: Callable[[int], Item], first_step: int, depth: int = 2):
        """Start with `first_step`: `make(step)` builds a batch and puts it on the devices, `depth` steps ahead."""
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._step = first_step  # that `next` returns
        self._ahead: deque[Future[Item]] = deque()
        for step in range(first_step, first_step + depth):
            self._ahead.append(self._thread.submit(make, step))

    def next(self, step: int) -> Item:
        """Return make(step), each step in its order. Raises what `make` raised."""
        assert step == self._step, f"step {step} was requested, {self._step} is next"
        item = self._ahead.popleft().result()
        self._step += 1
        self._ahead.append(self._thread.submit(self._make, step + len(self._ahead) + 1))
        return item

    def close(self) -> None:
        """Wait for the batch in progress, then stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
