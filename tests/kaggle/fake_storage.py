"""The other half of the Kaggle on this machine: datasets, models, and a Hugging Face Hub, which keep what they get."""

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Storage:
    """What was stored, and how the storage is told to fail."""

    url: str

    def __init__(self) -> None:
        self.status = 200  # of everything that writes
        self.blobs: dict[str, bytes] = {}  # by token
        self.names: dict[str, str] = {}  # token -> file name
        self.calls: list[tuple[str, Any]] = []
        self.exists = False  # the dataset
        self.hub: dict[str, bytes] = {}  # path -> content
        self.hub_exists = False
        self.authorization: set[str | None] = set()

    def sent(self, call: str) -> dict[str, bytes]:
        """Return the files of the last such call, path -> content."""
        body = [body for name, body in self.calls if name == call][-1]
        return dict(self._files(body.get("body", body), ""))

    def _files(self, tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, bytes]]:
        for file in tree.get("files", []):
            yield prefix + self.names[file["token"]], self.blobs[file["token"]]
        for child in tree.get("directories", []):
            yield from self._files(child, f"{prefix}{child['name']}/")


class StorageHandler:
    """HTTP around Storage: mixed into the handler of FakeKaggle, which has `reply`."""

    server: Any
    headers: Any
    path: str
    rfile: Any

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raise NotImplementedError

    def do_PUT(self) -> None:
        """Take a file of a dataset or a model."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.blobs[self.path.rsplit("/", 1)[-1]] = body
        self.reply({})

    def store(self, body: bytes) -> None:
        """Answer a call that writes, or that asks for a dataset or a model."""
        state = self.server
        state.authorization.add(self.headers.get("Authorization"))
        if state.status != 200:
            message = f"refused {self.headers.get('Authorization')}"
            self.reply({"code": state.status, "message": message}, state.status)
        elif self.path.startswith("/v1/"):
            self.to_kaggle(self.path.rsplit("/", 1)[-1], json.loads(body))
        else:
            self.to_hub(body)

    def to_kaggle(self, call: str, body: Any) -> None:
        """Answer a call about a dataset or a model."""
        state = self.server
        state.calls.append((call, body))
        if call == "StartBlobUpload":
            token = f"token{len(state.names)}"
            state.names[token] = body["name"]
            self.reply({"token": token, "createUrl": f"{state.url}/blob/{token}"})
        elif call == "CreateDataset" and state.exists:
            self.reply({"error": "The dataset title is already in use", "status": "error"})
        elif call == "GetModel" or (call == "GetDataset" and not state.exists):
            self.reply({"code": 404, "message": "not found"}, 404)
        elif call == "GetDataset":
            self.reply({"ref": "owner/my-slug", "currentVersionNumber": 3})
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
        """Answer a call that makes or changes a repository of the Hub."""
        state = self.server
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            state.calls.append(("create", json.loads(body)))
            state.hub_exists = True
            self.reply({"url": f"{state.url}/owner/name", "name": "owner/name"})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self.reply({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    state.hub[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del state.hub[line["value"]["path"]]
            self.reply({"commitUrl": f"{state.url}/owner/name/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.reply({}, 404)

    def from_hub(self) -> None:
        """Answer a call that reads a repository of the Hub."""
        state = self.server
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
