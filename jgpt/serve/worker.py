"""The thread that decodes: texts wait in a queue for a place in the batch, and their pieces go back as they are made.

In the data path: between the requests of `app.py` and `inference/batch.py`.
"""

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jgpt.hardware.memory import shortage
from jgpt.inference.batch import Batch, News, Row
from jgpt.inference.stop_strings import StopStrings
from jgpt.inference.text_stream import TextStream
from jgpt.serve.refusal import Refusal

log = logging.getLogger("jgpt")


class Event(NamedTuple):
    """The next piece of a text."""

    number: int  # of the text in its request
    text: str
    end: str = ""  # why it ended: stop, length, error
    error: str = ""  # what failed


class Job:
    """A text that a client has asked for."""

    def __init__(
        self, row: Row, text: TextStream, stops: StopStrings, number: int, put: Callable[[Event], None]
    ) -> None:
        """`put` gets each event, in the thread of the worker; `number` is the text's in its request."""
        self.row, self.number, self.put = row, number, put
        self.n_tokens = 0  # drawn so far
        self.is_cancelled = False
        self._text, self._stops = text, stops

    def tell(self, news: News) -> str:
        """Pass on what is new; return why the text has ended, or ""."""
        self.n_tokens += len(news.ids)
        piece = self._text.add(news.ids) + (self._text.close() if news.end else "")
        shown, found = self._stops.add(piece)
        end = "stop" if found else news.end
        if end and not found:
            shown += self._stops.close()
        if shown or end:
            self.put(Event(self.number, shown, end, news.error))
        return end


class Worker:
    """The thread, and the queue before it."""

    def __init__(self, batch: Batch, most_waiting: int) -> None:
        """`most_waiting` texts wait at most; more are refused."""
        self._batch, self._most_waiting = batch, most_waiting
        self._waiting: deque[Job] = deque()
        self._active: dict[Row, Job] = {}
        self._changed = threading.Condition()  # around all of the above, and:
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="jgpt-decode", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Refuse what waits, and end the thread after its present step."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put texts into the queue, all or none. Raises Refusal where it is full (429), or the server stops (503)."""
        with self._changed:
            if self._closing:
                raise Refusal(503, "the server is stopping. Try again when it runs.", "stopping")
            room = self._most_waiting + self._batch.most_rows - len(self._active) - len(self._waiting)
            if len(jobs) > room:
                raise Refusal(
                    429,
                    f"the queue is full: {len(self._active)} texts are written and {len(self._waiting)} wait. Allowed:"
                    f" {self._most_waiting} that wait. Try again in a moment.",
                    "queue_full",
                    headers={"Retry-After": "1"},
                )
            self._waiting += jobs
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget texts that nobody waits for any more; a text that has ended stays as it is."""
        with self._changed:
            for job in jobs:
                job.is_cancelled = True
            self._changed.notify()

    def counts(self) -> dict[str, int]:
        """Return how many texts are written now, and how many wait."""
        with self._changed:
            return {"active": len(self._active), "waiting": len(self._waiting)}

    def _run(self) -> None:
        while self._wait():
            try:
                self._step()
            except Exception as error:
                reason = shortage(error)
                if not reason:
                    log.error("a bug of jgpt; the texts being written have failed:\n%s", traceback.format_exc())
                self._batch.clear()
                self._fail(list(self._active.values()), reason or "the server failed, see its log. Try again.")
        self._fail([*self._active.values(), *self._waiting], "the server is stopping. Try again when it runs.")

    def _wait(self) -> bool:
        """Wait until there is something to do; return False where the thread should end."""
        with self._changed:
            while not (self._closing or self._waiting or self._active):
                self._changed.wait()
            return not self._closing

    def _step(self) -> None:
        with self._changed:
            gone = [job.row for job in self._active.values() if job.is_cancelled]
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
            n_free = self._batch.most_rows - len(self._active) + len(gone)
            new = [self._waiting.popleft() for _ in range(min(n_free, len(self._waiting)))]
            self._active = {row: job for row, job in self._active.items() if row not in gone}
            self._active |= {job.row: job for job in new}
        for row in gone:
            self._batch.remove(row)
        for job in new:
            self._batch.add(job.row)
        for news in self._batch.step():
            if self._active[news.row].tell(news):
                self._batch.remove(news.row)  # where a stop string ended it
                with self._changed:
                    del self._active[news.row]

    def _fail(self, jobs: Sequence[Job], reason: str) -> None:
        with self._changed:
            self._active = {}
            self._waiting = deque(job for job in self._waiting if job not in jobs)
        for job in jobs:
            job.put(Event(job.number, "", "error", reason))
