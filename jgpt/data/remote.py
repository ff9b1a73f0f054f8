"""Text that is not on this machine: gs://, s3:// and whatever else fsspec opens.

In the data path: beside `find_files.py`, which lists local files; `corpus.py` reads both alike. fsspec comes with
huggingface_hub. What it needs for a kind of address is the user's: gcsfs for gs://, s3fs for s3://, with credentials
where those look for them. A file is read once, from its begin to its end; nothing is kept on the disk.
"""

import glob
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from jgpt.errors import UserError

READ_AHEAD = 1 << 22  # bytes that one request brings
# What file systems say of a file that changes with its content; the first that one has is taken.
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "blob_id",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


class RemoteStat(NamedTuple):
    """What is known of a file without reading it, by the names of os.stat."""

    st_size: int
    st_mtime_ns: int  # another number for another content; no time


@dataclass(frozen=True, order=True)
class RemoteFile:
    """A file that fsspec opens. It has what the data path needs of a Path."""

    url: str  # gs://BUCKET/FOLDER/NAME
    size: int = field(compare=False)
    version: str = field(compare=False)
    files: Any = field(compare=False, repr=False)  # the file system

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.url).stem

    @property
    def parent(self) -> str:
        return self.url.rpartition("/")[0]

    def with_name(self, name: str) -> "RemoteFile":
        """Return the file beside this one that has another name."""
        return RemoteFile(f"{self.parent}/{name}", self.size, self.version, self.files)

    def with_suffix(self, suffix: str) -> "RemoteFile":
        """Return the file whose name differs by its suffix."""
        return self.with_name(f"{self.stem}{suffix}")

    def exists(self) -> bool:
        """Return whether it was there when the files were listed: always."""
        return True

    def stat(self) -> RemoteStat:
        """Return size and version, as they were when the files were listed."""
        return RemoteStat(self.size, int(hashlib.sha256(self.version.encode()).hexdigest()[:15], 16))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file to read its bytes; whatever goes wrong is an OSError."""
        assert mode == "rb"
        try:
            raw = self.files.open(self.files._strip_protocol(self.url), "rb", block_size=READ_AHEAD)
        except Exception as error:
            raise OSError(said(error)) from error
        return io.BufferedReader(_Raw(raw), READ_AHEAD)  # pyright: ignore[reportReturnType] (it is one)


TextFile = Path | RemoteFile


class _Raw(io.RawIOBase):
    """An open remote file whose errors are OSErrors: each service has exceptions of its own."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.raw.read(len(buffer))
        except Exception as error:
            raise OSError(said(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def close(self) -> None:
        if not self.closed:
            self.raw.close()
        super().close()


def is_remote(name: str) -> bool:
    """Return whether a name is an address, as gs://BUCKET/NAME is; a local name with "://" in it is none."""
    protocol, separator, _ = name.strip().partition("://")
    return bool(separator) and len(protocol) > 1 and protocol.isalnum()


def find_remote(address: str) -> list[RemoteFile]:
    """List the files that an address names: one file, all files in a folder, or what a glob matches; sorted.

    As in a shell, a "*" stands for no name that begins with a dot. Raises UserError where the address cannot be listed.
    """
    import fsspec  # here: it takes a while, and most text is local

    try:
        files, path = fsspec.core.url_to_fs(address)
        if glob.has_magic(path) and not files.exists(path):
            found = files.glob(path, detail=True)
        elif files.isdir(path):
            found = files.find(path, detail=True)
        else:
            found = {path: files.info(path)} if files.exists(path) else {}
    except ImportError as error:
        raise UserError(f"data.text_glob: {address!r} needs a package: {error}. Install it with pip.") from error
    except Exception as error:  # of the service, of its client, of the network: each has its own
        raise UserError(
            f"data.text_glob: {address!r} cannot be listed: {said(error)}. Its name and the credentials must be "
            "right. Check them with the tools of the service (gcloud storage ls, aws s3 ls)."
        ) from error
    named = path.split("*")[0]
    return sorted(
        RemoteFile(files.unstrip_protocol(name), int(info.get("size") or 0), _version(info), files)
        for name, info in found.items()
        if info["type"] == "file" and "/." not in name.removeprefix(named)
    )


def _version(info: dict[str, Any]) -> str:
    return next((f"{key}={info[key]}" for key in VERSIONS if info.get(key)), "")


def said(error: Exception) -> str:
    """Return what an error of a service says, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
