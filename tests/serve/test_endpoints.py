"""The endpoints with OpenAI's own client, over a real socket: what is answered, and how the rest is refused."""

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import openai
import pytest
from conftest import own_process_state
from server import ATTACK, CHINESE, COUNT, Server, serving

import jgpt

LONG = dict(model="parrot", prompt="Count.", max_tokens=4096, temperature=0)  # takes seconds, and does not end earlier


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=120)


def asked(question: str) -> dict:
    return dict(model="parrot", messages=[{"role": "user", "content": question}], temperature=0)


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """Send a request without a client's checks; return the status and the error."""
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)) as connection:
        connection.request("POST", path, body, sent)
        with connection.getresponse() as answer:
            return answer.status, json.loads(answer.read())["error"]


def post_whole(server: Server, body: str) -> float:
    """Send a request for a text; return how long all of it takes."""
    began = time.perf_counter()
    with closing(http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=600)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            assert b'"finish_reason": "length"' in answer.read()
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def whole_seconds(server: Server) -> float:
    """Return how long a text takes that nobody stops."""
    return post_whole(server, json.dumps(LONG))


def test_the_model_is_listed(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("parrot", "jgpt") and client.models.retrieve("parrot").id == "parrot"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(("question", "answer"), [CHINESE, ATTACK, COUNT])
def test_a_chat(client: openai.OpenAI, question: str, answer: str):
    found = client.chat.completions.create(**asked(question))
    (choice,) = found.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (answer, "assistant", "stop")
    assert found.usage.prompt_tokens > 5 and found.usage.completion_tokens > 5
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens

    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked(question), stream=True, stream_options=options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == answer and len(pieces) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].usage == found.usage and chunks[0].choices[0].delta.role == "assistant"


def test_content_in_parts_and_the_newer_names(client: openai.OpenAI):
    parts = [{"type": "text", "text": "Cou"}, {"type": "text", "text": "nt."}]
    messages = [{"role": "user", "content": parts}]
    found = client.chat.completions.create(model="parrot", messages=messages, temperature=0, max_completion_tokens=5)
    assert COUNT[1].startswith(found.choices[0].message.content) and found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 5


def test_a_text_is_what_the_api_writes(client: openai.OpenAI, parrot):
    """The same seed gives the same text, also past the end of the context of 256."""
    with own_process_state():
        model = jgpt.load(parrot)
    for new in (12, 300):
        rules = dict(temperature=1.5, top_p=0.95)
        extra = dict(top_k=40, repetition_penalty=1.1)
        found = client.completions.create(
            model="parrot", prompt="one two", max_tokens=new, seed=7, **rules, extra_body=extra
        )
        assert found.choices[0].text == model.generate("one two", max_new_tokens=new, seed=7, **rules, **extra)
    by_id = client.completions.create(
        model="parrot", prompt=model.tokenizer.encode("one two").tolist(), max_tokens=12, seed=7, temperature=1.5
    )
    again, other = (
        client.completions.create(model="parrot", prompt="one two", max_tokens=12, seed=seed, temperature=1.5)
        for seed in (7, 8)
    )
    assert by_id.choices[0].text == again.choices[0].text != other.choices[0].text


def test_several_texts_in_a_request(client: openai.OpenAI):
    ask = dict(model="parrot", prompt=["one", "two"], n=2, max_tokens=9, seed=3, temperature=2.0)
    found = client.completions.create(**ask)
    texts = [choice.text for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3] and len(set(texts)) == 4
    streamed = [""] * 4
    for chunk in client.completions.create(**ask, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


@pytest.mark.parametrize(
    ("stop", "answer"), [(" five", "one two three four"), (["nine", "two "], "one "), ("zzz", COUNT[1])]
)
def test_stop_strings(client: openai.OpenAI, stop, answer: str):
    found = client.chat.completions.create(**asked(COUNT[0]), stop=stop)
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == (answer, "stop")
    chunks = client.chat.completions.create(**asked(COUNT[0]), stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer


def test_texts_that_come_together_are_written_together(client: openai.OpenAI, server: Server):
    """A short one that comes later is done before a long one, and is what it is alone; then the long one is left."""
    alone = client.completions.create(model="parrot", prompt="one", max_tokens=30, seed=5).choices[0].text
    with client.completions.create(**LONG, stream=True) as long:
        pieces = iter(long)
        next(pieces)
        together = client.completions.create(model="parrot", prompt="one", max_tokens=30, seed=5).choices[0].text
        assert together == alone and server.health()["active"] == 1
        next(pieces)
    server.wait_until_idle()


def test_two_at_once_take_less_than_one_after_the_other(client: openai.OpenAI):
    ask = dict(model="parrot", prompt="one", max_tokens=400, temperature=2.0)

    def text(seed: int) -> str:
        return client.completions.create(**ask, seed=seed).choices[0].text

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(text, (1, 2)))  # compiles for two rows
        began = time.perf_counter()
        after_each_other = [text(seed) for seed in (3, 4)]
        between = time.perf_counter()
        assert list(pool.map(text, (3, 4))) == after_each_other
        together = time.perf_counter() - between
    print(f"two texts one after the other {between - began:.2f} s, at once {together:.2f} s")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(server: Server, whole_seconds: float, stream: bool):
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
    body = json.dumps({**LONG, "stream": stream})
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    if stream:
        with connection.getresponse() as answer:
            assert answer.readline().startswith(b"data: ")
    while server.health()["active"] == 0 and not stream:
        time.sleep(0.02)
    connection.close()
    server.wait_until_idle()
    left = time.perf_counter() - began
    print(f"left after {left:.2f} s of {whole_seconds:.2f} s")
    assert left < whole_seconds


@pytest.mark.parametrize("retries", [0, 30])
def test_many_requests_are_answered_or_refused(client: openai.OpenAI, server: Server, retries: int):
    """50 requests from 8 threads, each for up to 3 texts, while 4 are written and 8 wait.

    OpenAI's client asks again where it is told that the queue is full: then all are answered.
    """
    patient = client.with_options(max_retries=retries)

    def ask(i: int) -> str:
        try:
            if i % 2:
                found = patient.chat.completions.create(**asked(COUNT[0]), n=1 + i % 3)
                assert {choice.message.content for choice in found.choices} == {COUNT[1]}
            else:
                found = patient.completions.create(model="parrot", prompt="one", max_tokens=20, n=1 + i % 3, seed=i)
                assert len(found.choices) == 1 + i % 3
            return "answered"
        except openai.RateLimitError as error:
            assert error.code == "queue_full" and error.response.headers["Retry-After"] == "1"
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(ask, range(50)))
    print(f"{ends.count('answered')} answered, {ends.count('refused')} refused")
    assert len(ends) == 50 and ends.count("answered") >= (50 if retries else 4)
    server.wait_until_idle()


def test_a_full_queue_is_refused_at_once(client: openai.OpenAI, server: Server):
    """Three requests for four texts fill the four rows and the eight places of the queue."""
    streams = [client.completions.create(**LONG, n=4, stream=True) for _ in range(3)]
    with pytest.raises(openai.RateLimitError, match="queue is full: 4 texts are written and 8 wait. Allowed: 8"):
        client.completions.create(model="parrot", prompt="one", max_tokens=1)
    for stream in streams:
        stream.close()
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"temperature": -1}, None, "temperature=-1. Allowed: 0, or"),
        ({"temperature": "hot"}, "temperature", "Allowed: a number"),
        ({"temperature": True}, "temperature", "Allowed: a number"),
        ({"top_k": 1.5}, "top_k", "a whole number"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to 4096"),
        ({"max_tokens": 10**6}, "max_tokens", "from 1 to 4096"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"prompt": ["a"] * 5}, "n", "5 texts were asked for. Allowed: 4"),
        ({"prompt": 7}, "prompt", "Allowed: a text, or ids"),
        ({"prompt": [10**6]}, "prompt", "Allowed: a text, or ids from 0 to"),
        ({"stop": ""}, "stop", "up to 16"),
        ({"stop": ["x"] * 17}, "stop", "up to 16"),
        ({"seed": 2**64}, "seed", "Allowed: a whole number"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"echo": True}, "echo", "not supported. Allowed: False"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'. Allowed: max_tokens"),
        ({"stream_options": 1}, "stream_options", "an object"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_wrong_values(server: Server, changes: dict, param: str | None, part: str):
    status, error = post(server, "/v1/completions", json.dumps({"prompt": "one", **changes}).encode())
    assert status == 400 and error["param"] == param and part in error["message"], error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        (7, "Allowed: a list of one message"),
        ([], "Allowed: a list of one message"),
        ([{"role": "king", "content": "x"}], "the role 'king'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ([{"role": "user", "content": "word " * 500}], "which leaves one for the answer"),
    ],
)
def test_wrong_messages(server: Server, messages, part: str):
    status, error = post(server, "/v1/chat/completions", json.dumps({"messages": messages}).encode())
    assert status == 400 and part in error["message"] and error["param"] == "messages"
    assert (error["code"] == "context_length_exceeded") == ("leaves one" in part)


def test_a_wrong_model(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-9' does not exist. Allowed: 'parrot'") as error:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "model_not_found"


def test_a_body_of_10_megabytes(client: openai.OpenAI):
    with pytest.raises(openai.APIStatusError, match="Allowed: 1,048,576 bytes") as error:
        client.completions.create(model="parrot", prompt="x" * 10_000_000)
    assert error.value.status_code == 413
    assert client.completions.create(model="parrot", prompt="one", max_tokens=1).usage.completion_tokens <= 1


@pytest.mark.parametrize(
    ("body", "headers", "status", "part"),
    [
        (b"{", {}, 400, "the body is not JSON"),
        (b"[" * 100_000, {}, 400, "the body is not JSON"),
        (b'{"temperature": NaN}', {}, 400, "NaN is not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", {}, 400, "not JSON"),
        (b"[1]", {}, 400, "no JSON object"),
        (b"\xff\xfe", {}, 400, "not JSON"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "Allowed: application/json"),
        (b"{}", {"Host": "evil.example"}, 403, "the host 'evil.example'"),
        (b"{}", {"Origin": "https://evil.example"}, 403, "the origin"),
        (b"{}", {"Origin": "http://["}, 403, "the origin"),
    ],
    ids=range(10),
)
def test_what_is_no_request(server: Server, body: bytes, headers: dict, status: int, part: str):
    found, error = post(server, "/v1/completions", body, **headers)
    assert found == status and part in error["message"], error


def test_other_paths_and_methods(server: Server):
    assert post(server, "/v1/embeddings", b"{}")[0] == 404
    assert post(server, "/v1/models", b"{}")[0] == 405


def test_half_a_body_is_no_bug_of_the_server(server: Server):
    """`serving` reads at the end that the server has logged no traceback."""
    host, _, port = urlsplit(server.address).netloc.partition(":")
    for sent in (b"", b'{"prompt": "on'):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + sent)
    server.wait_until_idle()


def test_half_a_character_in_a_prompt(server: Server):
    body = b'{"model": "\\ud83d", "prompt": "x"}'
    assert post(server, "/v1/completions", body)[0] == 404
    assert post(server, "/v1/completions", b'{"prompt": "\\ud83d", "max_tokens": 0}')[1]["param"] == "max_tokens"


@pytest.fixture(scope="module")
def guarded(trained):
    """A model of characters without a chat template, behind a token, for other machines too."""
    with serving(trained, "--host=0.0.0.0", "--name=seven", JGPT_SERVE_TOKEN="open sesame") as found:
        found.address = found.address.replace("0.0.0.0", "127.0.0.1")
        yield found


def test_a_token_is_needed(guarded: Server):
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer TOKEN"):
        openai.OpenAI(base_url=f"{guarded.address}/v1", api_key="guess", max_retries=0).models.list()
    client = openai.OpenAI(base_url=f"{guarded.address}/v1", api_key="open sesame", max_retries=0)
    assert client.models.list().data[0].id == "seven"
    found = client.completions.create(model="seven", prompt="7 times ", max_tokens=40, seed=1)
    assert 1 <= found.usage.completion_tokens <= 40  # past the context of 16
    with pytest.raises(openai.BadRequestError, match="has no chat template") as error:
        client.chat.completions.create(model="seven", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "no_chat_template"
    noted = client.completions.create(model="seven", prompt="7 \u6f22", max_tokens=1)
    assert "1 character of the prompt is not in the model's vocabulary" in noted.jgpt["note"]
    assert not hasattr(found, "jgpt")


@pytest.mark.parametrize(
    ("flags", "token", "parts"),
    [
        (["--host=0.0.0.0"], "", ["--host=0.0.0.0 lets other machines in", "JGPT_SERVE_TOKEN"]),
        (["--host=example.org"], "", ["lets other machines in"]),
        ([], "short", ["has 5 characters. Allowed: 8"]),
        (["--port={taken}"], "", ["--port={taken}", "free port", "--port=0"]),
        ([], "", ["no directory", "nothing/here"]),
    ],
)
def test_a_server_that_cannot_start(command, server, monkeypatch, flags, token, parts):
    import jgpt.serve.__main__ as module

    taken = urlsplit(server.address).port
    monkeypatch.setenv("JGPT_SERVE_TOKEN", token)
    result = command(module, "--model=nothing/here/x", *(flag.format(taken=taken) for flag in flags or ["--port=0"]))
    assert (result.code, result.out) == (2, "") and "Traceback" not in result.err
    for part in parts:
        assert part.format(taken=taken) in result.err, result.err
