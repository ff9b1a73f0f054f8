"""Finding a model by its name: here, below, or on the Hub, which is a small server of this test."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread

import pytest

from jgpt.errors import UserError
from jgpt.exchange.hub import is_adapter, is_hub_name, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(range(256)) * 94_000, "tokenizer.json": b"{}",
    "consolidated.safetensors": b"the same again", "pytorch_model.bin": b"a pickle", "chat_template.jinja": b"{{ x }}",
}  # fmt: skip
TOKEN = "hf_secretsecretsecret"
LOCATE = """
import sys
from jgpt.errors import UserError
from jgpt.exchange.hub import locate
try:
    print(locate(sys.argv[1]))
except UserError as error:
    sys.exit(f"error: {error}")
"""


@dataclass
class Hub:
    """What the server does, and what it was asked for."""

    address: str = ""
    status: int = 200
    error_code: str = ""
    status_of: dict[str, int] = field(default_factory=dict)  # of single files
    break_off: int = 0  # answers with the weights that end half-way
    refuse_after: set[str] = field(default_factory=set)  # files that are sent before `status_of` counts
    sent: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state, news = Hub(), Condition()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            state.requests.append((self.command, self.path, self.headers.get("Range")))
            if "/owner/" in self.path:
                state.tokens.add(self.headers.get("Authorization"))
            path = self.path.split("?")[0]
            name = path.rsplit("/", 1)[-1]
            status = state.status_of.get(name, state.status)
            if name in state.status_of:
                with news:
                    assert news.wait_for(lambda: state.refuse_after <= state.sent, timeout=60)
            if status != 200:
                self.send(status, {"X-Error-Code": state.error_code} if state.error_code else {}, b"{}", body)
            elif path.startswith("/api/models/owner/name/revision/"):
                info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": file} for file in FILES]}
                self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body)
            elif path.startswith("/api/models/owner/name/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in FILES.items()
                ]
                self.send(200, {"Content-Type": "application/json"}, json.dumps(tree).encode(), body)
            elif name in FILES:
                self.send_file(FILES[name], body)
                with news:
                    state.sent |= {name} if body else set()
                    news.notify_all()
            else:
                self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)

        def send_file(self, data: bytes, body: bool) -> None:
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            status, begin = 200, 0
            if wanted_range := self.headers.get("Range"):
                status, begin = 206, int(wanted_range.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            cut = body and state.break_off > 0 and len(data) > 100_000
            state.break_off -= cut
            self.send(status, headers, data[begin:], body, cut)

        def send(self, status: int, headers: dict[str, str], data: bytes, body: bool, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def ask(hub: Hub, home: Path, name: str = "owner/name", **environment: str) -> subprocess.CompletedProcess[str]:
    """Locate a model in a process of its own: huggingface_hub reads the environment when it is imported."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": "*", **environment}
    return subprocess.run([sys.executable, "-c", LOCATE, name], capture_output=True, text=True, env=variables)


def test_a_download_takes_what_it_needs_and_happens_once(hub, tmp_path):
    first = ask(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    directory = Path(first.stdout.strip())
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in directory.iterdir()} == wanted
    assert all((directory / name).read_bytes() == FILES[name] for name in wanted)
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in first.stdout + first.stderr
    hub.requests.clear()
    assert ask(hub, tmp_path).stdout == first.stdout
    assert not [path for command, path, _ in hub.requests if command == "GET" and "/resolve/" in path]
    hub.requests.clear()
    offline = ask(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout and hub.requests == []


def test_a_download_that_breaks_off_goes_on_from_there(hub, tmp_path):
    hub.break_off = 1
    done = ask(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [sent for command, path, sent in hub.requests if command == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2 and ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= len(FILES["model.safetensors"]) // 2


def test_files_that_arrived_are_kept_when_the_download_is_given_up(hub, tmp_path):
    hub.status_of["model.safetensors"] = 404
    hub.refuse_after = {"config.json", "tokenizer.json", "chat_template.jinja"}  # the files are fetched side by side
    failed = ask(hub, tmp_path)
    refused(failed, "'owner/name' cannot be downloaded", "the same command continues from there")
    hub.status_of.clear()
    hub.requests.clear()
    assert ask(hub, tmp_path).returncode == 0
    fetched = {path.rsplit("/", 1)[-1] for command, path, _ in hub.requests if command == "GET" and "/resolve/" in path}
    assert fetched == {"model.safetensors"}


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1 and result.stdout == ""
    assert "Traceback" not in result.stderr and TOKEN not in result.stderr
    for part in parts:
        assert part in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (404, "RepoNotFound", ["it is not on the Hugging Face Hub, or it is private", "Correct the name"]),
        (401, "RepoNotFound", ["it is not on the Hugging Face Hub, or it is private", "HF_TOKEN"]),
        (403, "GatedRepo", ["its owner gives access on request", "https://huggingface.co/owner/name"]),
        (403, "", ["the Hub answered 403", "HF_TOKEN"]),
    ],
)
def test_what_the_hub_refuses(hub, tmp_path, status, code, parts):
    hub.status, hub.error_code = status, code
    refused(ask(hub, tmp_path), "the model 'owner/name' cannot be downloaded", *parts)


def test_no_network(hub, tmp_path):
    refused(ask(hub, tmp_path, HF_HUB_OFFLINE="1"), "the Hub cannot be reached", "HF_HUB_OFFLINE")
    assert hub.requests == []
    refused(ask(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9"), "the Hub cannot be reached")


def test_a_full_disk(monkeypatch):
    def full(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(UserError, match="the disk of .* is full. Make room, or set HF_HOME to another disk"):
        locate("owner/name")


def model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


def test_a_directory_and_one_that_is_mounted_below(tmp_path, monkeypatch):
    here = model(tmp_path / "input" / "qwen2.5" / "transformers" / "0.5b-instruct" / "1")
    assert locate(str(here)) == here
    (tmp_path / "input" / "other").mkdir()
    (tmp_path / "input" / "other" / "config.json").write_text("{}")  # of something else: no weights
    assert locate(str(tmp_path / "input")) == here
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/input/qwen2.5") == here
    monkeypatch.chdir(tmp_path)
    assert locate("input") == here.relative_to(tmp_path)
    other = model(tmp_path / "input" / "gemma")
    with pytest.raises(UserError, match="holds 2 models") as error:
        locate(str(tmp_path / "input"))
    assert str(here) in str(error.value) and str(other) in str(error.value)


def test_what_is_no_model(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="holds no model. It must hold config.json"):
        locate(str(tmp_path))
    for name in (f"{tmp_path}/nothing", "./nothing", "~/nothing", "a/b/c", "../up", "", "owner/"):
        with pytest.raises(UserError, match="there is no directory"):
            locate(name)


def test_a_file_or_a_checkpoint_is_answered_with_the_directory_to_name(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(UserError, match="ckpt.pt' is a file. Allowed: the directory of a model"):
        locate(str(tmp_path / "ckpt.pt"))
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints" / "400" / "params").mkdir(parents=True)
    (run / "config.json").touch()
    for inside, step in (("400", "; --step=400 takes that checkpoint."), ("400/params", "."), ("", ".")):
        with pytest.raises(UserError) as error:
            locate(str(run / "checkpoints" / inside))
        assert str(error.value).endswith(f"is a part of the run {run}. Allowed: the run itself. Name {run}{step}")


def test_a_mistyped_run_is_answered_with_the_runs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("quickstart", "other"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="there is no directory 'runs/quikstart' .current folder: .*") as error:
        locate("runs/quikstart")  # other runs are in runs/, so it is no name on the Hub
    assert "Did you mean runs/quickstart? Runs here: runs/other, runs/quickstart." in str(error.value)
    assert "internet" not in str(error.value)
    with pytest.raises(UserError, match="there is no such directory here .*Runs here: runs/other, runs/quickstart"):
        locate("quikstart")  # this may be one on the Hub
    with pytest.raises(UserError, match="the Hub cannot be reached; there is no such directory here"):
        locate("owner/name")


@pytest.mark.parametrize("name", ["~zz", "~zz/a", "a" * 300, "a/" + "b" * 300, "--", "a..b", "a\nb", "\udcff", "\0"])
def test_a_name_that_cannot_be_is_answered(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no (such )?directory"):
        locate(name)


def test_adapters_of_peft_are_found_as_models_are(tmp_path):
    here = tmp_path / "input" / "adapter"
    here.mkdir(parents=True)
    (here / "adapter_model.safetensors").touch()
    assert not is_adapter(here)
    (here / "adapter_config.json").touch()
    assert is_adapter(here) and locate(str(here)) == locate(str(tmp_path)) == here
    (here / "model.safetensors").touch()  # a whole model, which an adapter was saved beside
    assert not is_adapter(here)


def test_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("gpt2") and is_hub_name("Qwen/Qwen2.5-0.5B-Instruct")
    assert not any(map(is_hub_name, ("", "./gpt2", "/gpt2", "~/gpt2", "a/b/c", "a b")))
    (tmp_path / "gpt2").mkdir()
    assert not is_hub_name("gpt2")
