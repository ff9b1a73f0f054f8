"""What holds a text back, the batch's thread when something breaks, and the files of the page."""

import asyncio
import queue
import random
import re
from pathlib import Path

import pytest
from small_chat import CHATML, parts
from starlette.requests import Request
from starlette.types import Message

from jgpt.inference.batch import Batch, Row
from jgpt.inference.chat_prompt import ChatPrompts
from jgpt.inference.sampling import Sampling
from jgpt.inference.stop_strings import StopStrings
from jgpt.inference.text_stream import TextStream
from jgpt.serve import app
from jgpt.serve.app import _read
from jgpt.serve.refusal import Refusal
from jgpt.serve.worker import Event, Job, Worker

PAGE = Path(app.__file__).parent / "page"


def test_a_client_that_goes_away_within_its_body_is_refused():
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(Refusal, match="went away before it had sent all of the body"):
        asyncio.run(_read(Request(scope, receive)))


def test_stop_strings_find_what_a_search_finds():
    """In random texts of few letters, cut at random places."""
    at = random.Random(0)
    for _ in range(2000):
        text = "".join(at.choices("ab", k=at.randrange(20)))
        strings = ["".join(at.choices("ab", k=at.randrange(1, 5))) for _ in range(at.randrange(3))]
        places = [text.find(string) for string in strings if string in text]
        stops, shown, found, i = StopStrings(strings), "", False, 0
        while i < len(text) and not found:
            n = at.randrange(1, 5)
            piece, found = stops.add(text[i : i + n])
            shown, i = shown + piece, i + n
        shown += "" if found else stops.close()
        assert found == bool(places)
        if found:  # the first that is whole: another may begin before it and end behind it
            ends = min(place + len(string) for string in strings if (place := text.find(string)) >= 0)
            assert shown == text[: len(shown)] and len(shown) <= ends
            assert not any(string in shown for string in strings)
        else:
            assert shown == text


def test_the_end_of_a_turn_is_a_token_or_a_mark():
    tokenizer = parts()[2]
    assert ChatPrompts(tokenizer, CHATML, [1]).stop == ()
    other = CHATML.replace("<|im_end|>", " </s2>")
    prompts = ChatPrompts(tokenizer, other, [1])
    assert (prompts.stop_ids, prompts.stop) == ((1,), ("</s2>",))
    assert ChatPrompts(tokenizer, "{% for m in messages %}{{ m.content }}. {% endfor %}", []).stop == ()


@pytest.fixture
def worker():
    model, params, tokenizer = parts()
    batch = Batch(model, {"params": params}, n_ids=tokenizer.vocab_size, most_rows=2, most_stop_ids=1)
    found = Worker(batch, most_waiting=1)
    yield found
    found.close()


def job(events: "queue.Queue[Event]", new: int = 3) -> Job:
    row = Row([1, 2, 3], new, Sampling(0))
    return Job(row, TextStream(parts()[2]), StopStrings([]), 0, events.put)


def end_of(events: "queue.Queue[Event]") -> Event:
    while not (event := events.get(timeout=120)).end:
        pass
    return event


def test_a_failure_ends_what_was_written_and_not_the_server(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    def break_once(*_: object) -> list:
        monkeypatch.undo()
        raise MemoryError("no room for this row")

    monkeypatch.setattr(Batch, "step", break_once)
    events: queue.Queue[Event] = queue.Queue()
    worker.submit([job(events)])
    worker.start()
    failed = end_of(events)
    assert failed.end == "error" and "memory" in failed.error
    worker.submit([job(events)])
    assert end_of(events).end == "length" and worker.counts() == {"active": 0, "waiting": 0}


def test_a_server_that_stops_refuses_and_says_so(worker: Worker):
    waiting: queue.Queue[Event] = queue.Queue()
    worker.submit([job(waiting)])
    with pytest.raises(Refusal) as full:
        worker.submit([job(waiting) for _ in range(3)])
    assert full.value.status == 429 and worker.counts()["waiting"] == 1
    worker.start()
    end_of(waiting)
    worker.close()
    with pytest.raises(Refusal) as stopping:
        worker.submit([job(waiting)])
    assert stopping.value.status == 503 and stopping.value.body()["error"]["type"] == "server_error"


def test_the_page_needs_nothing_from_elsewhere_and_makes_no_html():
    tracked = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert set(tracked) == {"chat.html", "chat.css", "chat.js", "server.js", "words.js"}
    for name, text in tracked.items():
        assert not re.search(r"https?:|//\w+\.|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), name
    assert not re.search(r"\son\w+=|<script>|style=", tracked["chat.html"])  # the policy forbids them


def test_both_languages_say_the_same(tmp_path: Path):
    words = (PAGE / "words.js").read_text(encoding="utf-8")
    english, chinese = words.split("  zh: {")
    names = [re.findall(r"(?:^ +|[\"`], )(\w+): (?:\"|\()", part, re.MULTILINE) for part in (english, chinese)]
    assert sorted(names[0]) == sorted(names[1]) and len(names[0]) > 30
    code = "".join((PAGE / name).read_text(encoding="utf-8") for name in ("chat.js", "server.js"))
    used = set(re.findall(r"\bT\.(\w+)", code))
    used |= set(re.findall(r'data-t(?:-placeholder)?="(\w+)"', (PAGE / "chat.html").read_text(encoding="utf-8")))
    assert used == set(names[0])
