"""A small server that speaks the endpoints of Kaggle and the Hub that publishing needs, and keeps what it is sent."""

import base64
import importlib
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

KAGGLE_TOKEN, HUB_TOKEN = "KGAT_planted_0123456789abcdef", "hf_planted0123456789abcdef"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Server:
    """What the server holds, and how it is told to fail."""

    address: str = ""
    status: int = 200  # of everything that writes
    sleeps: float = 0.0  # before it answers what writes
    blobs: dict[str, bytes] = field(default_factory=dict)  # by token
    names: dict[str, str] = field(default_factory=dict)  # token -> file name
    calls: list[tuple[str, Any]] = field(default_factory=list)
    exists: bool = False  # the dataset
    hub: dict[str, bytes] = field(default_factory=dict)  # path -> content
    hub_exists: bool = False
    authorization: set[str | None] = field(default_factory=set)

    def sent(self, call: str) -> dict[str, bytes]:
        """Return the files of the last such call, path -> content."""
        body = [body for name, body in self.calls if name == call][-1]
        return dict(self._files(body.get("body", body), ""))

    def _files(self, tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, bytes]]:
        for file in tree.get("files", []):
            yield prefix + self.names[file["token"]], self.blobs[file["token"]]
        for child in tree.get("directories", []):
            yield from self._files(child, f"{prefix}{child['name']}/")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    from kagglesdk import kaggle_env

    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for key, text in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **(headers or {}),
            }.items():
                self.send_header(key, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_PUT(self) -> None:
            state.blobs[self.path.rsplit("/", 1)[-1]] = self.body()
            self.reply({})

        def do_POST(self) -> None:
            body = self.body()
            time.sleep(state.sleeps)
            state.authorization.add(self.headers.get("Authorization"))
            if state.status != 200:
                self.reply(
                    {"code": state.status, "message": f"refused {self.headers.get('Authorization')}"}, state.status
                )
            elif self.path.startswith("/v1/"):
                self.kaggle(self.path.rsplit("/", 1)[-1], json.loads(body))
            else:
                self.to_hub(body)

        def kaggle(self, call: str, body: Any) -> None:
            state.calls.append((call, body))
            if call == "StartBlobUpload":
                token = f"token{len(state.names)}"
                state.names[token] = body["name"]
                self.reply({"token": token, "createUrl": f"{state.address}/blob/{token}"})
            elif call == "CreateDataset" and state.exists:
                self.reply({"error": "The dataset title is already in use", "status": "error"})
            elif call == "GetModel" or (call == "GetDataset" and not state.exists):
                self.reply({"code": 404, "message": "not found"}, 404)
            elif call == "GetDataset":
                self.reply({"ref": "owner/slug", "currentVersionNumber": 3})
            elif call == "DownloadDataset":
                archive = io.BytesIO()
                with zipfile.ZipFile(archive, "w") as file:
                    for name, data in state.sent("CreateDataset").items():
                        file.writestr(name, data)
                self.reply(archive.getvalue(), headers={"Content-Type": "application/zip"})
            else:
                state.exists = True
                self.reply({"error": "", "url": "x"})

        def to_hub(self, body: bytes) -> None:
            path = self.path.split("?")[0]
            if path == "/api/repos/create":
                state.calls.append(("create", json.loads(body)))
                state.hub_exists = True
                self.reply({"url": f"{state.address}/owner/name", "name": "owner/name"})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                self.reply({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
            elif "/commit/" in path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.hub[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del state.hub[line["value"]["path"]]
                self.reply({"commitUrl": f"{state.address}/owner/name/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.reply({}, 404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if not state.hub_exists:
                self.reply({}, 404, {"X-Error-Code": "RepoNotFound"})
            elif "/resolve/" in path:
                data = state.hub[path.split(f"/{COMMIT}/")[1]]
                self.reply(data, headers={"ETag": f'"{len(data)}"', "X-Repo-Commit": COMMIT})
            elif "/tree/" in path:
                self.reply([{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in state.hub.items()])
            else:
                siblings = [{"rfilename": path} for path in state.hub]
                self.reply({"id": "owner/name", "_id": "0", "sha": COMMIT, "siblings": siblings, "private": True})

    class Fast(ThreadingHTTPServer):
        request_queue_size = 64

    http = Fast(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{http.server_address[1]}"
    Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, state.address)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KAGGLE_API_TOKEN", KAGGLE_TOKEN)
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    (tmp_path / "kaggle").mkdir()
    yield state
    http.shutdown()
    http.server_close()


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that talks to the server as if it were the Hub."""
    variables = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": HUB_TOKEN, "NO_PROXY": "*"}
    variables |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    constants = importlib.import_module("huggingface_hub.constants")  # it reads the environment when it is imported
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return variables
