"""A Kaggle and a Hugging Face Hub on this machine, which the real packages talk to: kernels, versions and their files.

Datasets, models and the Hub are in fake_storage.py. `FakeKaggle` listens on a port of its own; point the package at it
with `reach`. What a test wants to go wrong, it puts into `faults`; what a pushed version does, it says in `on_save`.
"""

import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from fake_storage import Storage, StorageHandler

KAGGLE_TOKEN, HUB_TOKEN = "KGAT_planted_0123456789abcdef", "hf_planted0123456789abcdef"

ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
SIGNATURE = "signature-of-a-url"  # what makes a signed URL a secret


@dataclass
class Version:
    """One pushed version of a kernel, and the session that ran it."""

    request: dict[str, Any]  # what SaveKernel was given
    states: list[str] = field(default_factory=lambda: ["COMPLETE"])  # one a poll; the last one stays
    files: dict[str, bytes] = field(default_factory=dict)  # its output, there when the session has ended
    log: list[str] = field(default_factory=list)
    failure: str = ""

    def poll(self) -> str:
        """Return the state, and move on to the next."""
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@dataclass
class Fault:
    """What the next request to an address that holds `where` gets instead of an answer."""

    where: str
    status: int = 200
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None  # answer as always, and break the connection after so many bytes
    hang_seconds: float = 0.0  # before anything else


class FakeKaggle(Storage, ThreadingHTTPServer):
    """The server: `with FakeKaggle() as kaggle:` runs it in a thread."""

    daemon_threads = True
    request_queue_size = 64  # uploads come eight at a time
    page_size = 3  # at most: the real one takes up to 200, and pages are what is tested

    def __init__(self) -> None:
        Storage.__init__(self)
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), Handler)
        self.user, self.token = "owner", "token-of-the-owner"
        self.kernels: dict[str, list[Version]] = {}
        self.sources: set[str] = set()  # the datasets and models that there are
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "SERVICE/METHOD" or the path of a file, as they came
        self.ranges: list[str] = []  # the Range headers among them
        self.slept: list[float] = []  # the seconds that clients would have waited
        self.used_hours, self.allowed_hours = 0.0, 30.0
        self.used_tpu_hours = 0.0
        self.on_save: Callable[[Version, list[Version]], None] = lambda version, earlier: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FakeKaggle":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    # What the services answer: a request's JSON in, a response's out. None: there is no such kernel.

    def introspect_token(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"active": True, "username": self.user} if request["token"] == self.token else {"active": False}

    def save_kernel(self, request: dict[str, Any]) -> dict[str, Any]:
        slug = request["slug"]
        earlier = self.kernels.setdefault(slug, [])
        known = self.sources | self.kernels.keys()
        version = Version(request)
        answer = {"ref": f"/code/{slug}", "url": f"https://www.kaggle.com/code/{slug}", "versionNumber": 0}
        for kind in ("Dataset", "Kernel", "Model"):
            unknown = [name for name in request.get(f"{kind.lower()}DataSources", []) if name not in known]
            answer |= {f"invalid{kind}Sources": unknown} if unknown else {}
        self.on_save(version, list(earlier))
        earlier.append(version)
        return answer | {"versionNumber": len(earlier)}

    def get_kernel(self, request: dict[str, Any]) -> dict[str, Any] | None:
        versions = self.kernels.get(f"{request['userName']}/{request['kernelSlug']}")
        return {"metadata": {"currentVersionNumber": len(versions)}} if versions else None

    def get_kernel_session_status(self, request: dict[str, Any]) -> dict[str, Any] | None:
        version = self._version(request)
        if version is None:
            return None
        return {"status": version.poll(), **({"failureMessage": version.failure} if version.failure else {})}

    def list_kernel_session_output(self, request: dict[str, Any]) -> dict[str, Any] | None:
        version = self._version(request)
        if version is None:
            return None
        if version.states[0] not in ENDED:
            return {}
        start = int(request.get("pageToken") or 0)
        size = min(self.page_size, request.get("pageSize", 20))
        names = sorted(version.files)
        base = f"{self.url}/files/{request['userName']}/{request['kernelSlug']}"
        number = self.kernels[f"{request['userName']}/{request['kernelSlug']}"].index(version)
        files = [
            {"fileName": name, "url": f"{base}/{number}/{quote(name, safe='')}?X-Signature={SIGNATURE}"}
            for name in names[start : start + size]
        ]
        more = {"nextPageToken": str(start + size)} if start + size < len(names) else {}
        return {"files": files, "log": json.dumps(events(version.log)), **more}

    def get_accelerator_quota_statistics(self, request: dict[str, Any]) -> dict[str, Any]:
        del request
        gpu = {"timeUsed": f"{self.used_hours * 3600:.0f}s", "totalTimeAllowed": f"{self.allowed_hours * 3600:.0f}s"}
        tpu = {"timeUsed": f"{self.used_tpu_hours * 3600:.0f}s", "totalTimeAllowed": "72000s"}
        return {"quotaRefreshTime": "2026-11-28T00:00:00.000Z", "gpuQuota": gpu, "tpuQuota": tpu}

    def _version(self, request: dict[str, Any]) -> Version | None:
        versions = self.kernels.get(f"{request['userName']}/{request['kernelSlug']}", [])
        number = int(request.get("versionLabel", f"v{len(versions)}").removeprefix("v"))
        return versions[number - 1] if 0 < number <= len(versions) else None


class Handler(StorageHandler, BaseHTTPRequestHandler):
    """HTTP around FakeKaggle: who asks, what is to go wrong, JSON and ranges."""

    server: FakeKaggle
    drop_after: int | None = None  # see Fault

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer a call of the API: /v1/SERVICE/METHOD; what concerns no kernel is answered by fake_storage.py."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        service, method = self.path.split("/")[-2:]
        if self._goes_wrong(f"{service}/{method}"):
            return
        answers = {
            "IntrospectToken": self.server.introspect_token,
            "SaveKernel": self.server.save_kernel,
            "GetKernel": self.server.get_kernel,
            "GetKernelSessionStatus": self.server.get_kernel_session_status,
            "ListKernelSessionOutput": self.server.list_kernel_session_output,
            "GetAcceleratorQuotaStatistics": self.server.get_accelerator_quota_statistics,
        }
        if method not in answers:
            self.store(body)
            return
        request = json.loads(body)
        if method != "IntrospectToken" and not self._is_known():
            self._json(401, {"code": 401, "message": "Unauthenticated"})
            return
        answer = answers[method](request)
        if answer is None:  # as Kaggle does for a kernel that is not there, too
            self._json(403, {"code": 403, "message": "Permission 'kernels.get' was denied"})
        else:
            self._json(200, answer)

    def do_GET(self) -> None:
        """Answer with an output file, with the log of a session as it runs, or with what the Hub has."""
        address = urlsplit(self.path)
        if self._goes_wrong(address.path):
            return
        parts = [unquote(part) for part in address.path.split("/")[1:]]
        if parts[0] == "files":
            owner, slug, number, name = parts[1:]
            self._file(self.server.kernels[f"{owner}/{slug}"][int(number)].files[name])
        elif "logs" not in parts:
            self.from_hub()
        else:
            label = parse_qs(address.query).get("versionLabel")
            request = {"userName": parts[-2], "kernelSlug": parts[-1], **({"versionLabel": label[0]} if label else {})}
            self._log(self.server._version(request))

    def do_HEAD(self) -> None:
        """Answer as a GET does, without the content."""
        self.do_GET()

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON or bytes, for fake_storage.py."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._send(status, body, {"Content-Type": "application/json"} | (headers or {}))

    def _log(self, version: Version | None) -> None:
        if version is None:
            self._json(404, {"code": 404, "message": "Not found"})
        elif version.states[0] in ENDED:
            self._send(200, json.dumps(events(version.log)).encode(), {"Content-Type": "application/json"})
        else:
            lines = [f"data: {json.dumps(event)}\n\n" for event in events(version.log)] + ["data: END_OF_LOG\n\n"]
            self._send(200, "".join(lines).encode(), {"Content-Type": "text/event-stream"})

    def _file(self, content: bytes) -> None:
        headers = {"ETag": f'"{len(content)}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.server.ranges.append(asked[0])
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], headers)
        else:
            self._send(200, content, headers)

    def _goes_wrong(self, where: str) -> bool:
        self.server.requests.append(where)
        self.drop_after = None
        fault = next((fault for fault in self.server.faults if fault.where in where), None)
        if fault is None:
            return False
        self.server.faults.remove(fault)
        threading.Event().wait(fault.hang_seconds)
        self.drop_after = fault.drop_after
        if fault.drop_after is None:
            self._send(
                fault.status, json.dumps(fault.body).encode(), {"Content-Type": "application/json"} | fault.headers
            )
        return fault.drop_after is None

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if self.drop_after is None else body[: self.drop_after])
        if self.drop_after is not None:
            self.close_connection = True  # before all that Content-Length promised


def reach(server: FakeKaggle, monkeypatch: Any, home: Path) -> None:
    """Point the real package at the server, with a token in the environment and nothing of this machine's user."""
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(home))
    monkeypatch.setenv("KAGGLE_API_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    from kagglesdk.kaggle_env import KaggleEnv, _env_to_endpoint

    monkeypatch.setitem(_env_to_endpoint, KaggleEnv.PROD, server.url)


def events(lines: list[str]) -> list[dict[str, Any]]:
    """Return a log as Kaggle keeps it."""
    return [{"stream_name": "stdout", "time": float(i), "data": line} for i, line in enumerate(lines)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKaggle]:
    """Return the server, for what publishes to Kaggle's datasets and models from here."""
    (tmp_path / "kaggle").mkdir()
    with FakeKaggle() as kaggle:
        kaggle.token = KAGGLE_TOKEN
        reach(kaggle, monkeypatch, tmp_path / "home")
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
        monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
        yield kaggle


@pytest.fixture
def hub(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that talks to the server as if it were the Hub."""
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": HUB_TOKEN, "NO_PROXY": "*"}
    variables |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    constants = importlib.import_module("huggingface_hub.constants")  # it reads the environment when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return variables
