"""Upload a run directory or an exported model to Kaggle, the Hub or a bucket, and download it again.

Beside the data path: `python -m jgpt.kaggle publish` and the uploads of a run call it. kagglehub, huggingface_hub and
fsspec (`bucket.py`) do the work, and find the credentials: KAGGLE_API_TOKEN, ~/.kaggle or a notebook's session token;
HF_TOKEN or ~/.cache/huggingface; those of a bucket's service. As a program it runs beside training:

    python -m jgpt.kaggle.session.publish DIRECTORY WHERE
"""

import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

from jgpt.data.find_files import holds_run
from jgpt.data.remote import is_remote
from jgpt.errors import UserError
from jgpt.kaggle.session import bucket, pack
from jgpt.kaggle.session.paths import scratch_dir
from jgpt.redaction import redact

KINDS = {"dataset": "OWNER/SLUG", "model": "OWNER/MODEL/FRAMEWORK/VARIATION", "hub": "OWNER/NAME"}
# Never sent, in any folder: files with credentials, and files that only this machine needs.
LEFT_OUT = (
    ".lock", ".netrc", "kaggle.json", "access_token", "access_token.txt", "token", "stored_tokens", ".env", ".env.*",
    "credentials*", ".git-credentials", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".git", ".cache", ".ssh", ".kaggle",
    ".huggingface", ".staging", "__pycache__", "*.tmp", "*.orbax-checkpoint-tmp*",
)  # fmt: skip

log = logging.getLogger("jgpt")


class Target(NamedTuple):
    """A place to publish to."""

    kind: Literal["dataset", "model", "hub", "bucket"]
    handle: str

    @property
    def url(self) -> str:
        """Return the address of its page, or of the bucket."""
        if self.kind == "bucket":
            return self.handle
        if self.kind == "hub":
            return f"https://huggingface.co/{self.handle}"
        return f"https://www.kaggle.com/{self.kind}s/{self.handle}"


def parse_target(where: str) -> Target:
    """Read "dataset:OWNER/SLUG", "model:OWNER/MODEL/FRAMEWORK/VARIATION", "hub:OWNER/NAME" or "gs://BUCKET/FOLDER".

    Raises UserError for any other text, and for a name that Kaggle would refuse when the upload begins.
    """
    if is_remote(where):
        return Target("bucket", where.strip().rstrip("/"))
    kind, _, handle = where.partition(":")
    parts = handle.split("/")
    fits = kind in KINDS and len(parts) == len(KINDS[kind].split("/"))
    if not (fits and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)):
        allowed = ", ".join([*(f"{name}:{shape}" for name, shape in KINDS.items()), "gs://BUCKET/FOLDER", "s3://..."])
        raise UserError(
            f"{where!r} is not a place to publish to. Allowed: {allowed}. Copy OWNER and the name from the address of"
            " its page; what does not exist yet is created, private."
        )
    # As kaggle 2.2.5 has it (kaggle_api_extended.py: dataset_create_new, _validate_slug_syntax). Models of others have
    # dots in their names.
    names = {"dataset": parts[1:], "model": parts[1::2], "hub": []}[kind]
    separators = {"dataset": "-", "model": ".-", "hub": ""}[kind]
    for name in names:
        if not re.fullmatch(rf"[a-z0-9]+(?:[{separators}][a-z0-9]+)*", name):
            fixed = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "my-run"
            raise UserError(
                f"{where!r}: Kaggle does not take the name {name!r}. Allowed: lower-case letters, digits and single"
                f" hyphens between them. Set {where.replace(name, fixed)!r}, for example."
            )
    if kind == "dataset" and not 6 <= len(parts[1]) <= 50:
        raise UserError(
            f"{where!r}: the name of a dataset on Kaggle has 6 to 50 characters, and {parts[1]!r} has {len(parts[1])}."
            " Choose a name of such a length."
        )
    return Target(kind, handle)  # pyright: ignore[reportArgumentType] (one of KINDS)


def check_target(where: str) -> Target:
    """Return the target; raise UserError where its package or its credentials are missing, or where it cannot exist."""
    target = parse_target(where)
    if target.kind == "bucket":
        bucket.check(target.handle)
        return target
    package = "huggingface_hub" if target.kind == "hub" else "kagglehub"
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"publishing to {where!r} needs the package {package}, which is not installed. Install it: pip install"
            f" {package}, or name another place."
        )
    if target.kind == "hub":
        import huggingface_hub
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(target.handle)
        except ValueError as error:
            raise UserError(f"{where!r}: {str(error).rstrip('.')}. Choose another name.") from None
        if not huggingface_hub.get_token():
            raise UserError(
                f"publishing to {where!r} needs a token of the Hugging Face Hub that may write, and there is none. Make"
                " one at https://huggingface.co/settings/tokens, and put it into HF_TOKEN, run `hf auth login`, or add"
                " it to the notebook as the secret HF_TOKEN (Add-ons > Secrets)."
            )
    else:
        from kagglehub.config import get_kaggle_credentials

        if target.kind == "model":
            from kagglehub.handle import parse_model_handle

            try:
                parse_model_handle(target.handle).framework_enum()
            except ValueError as error:
                raise UserError(f"{where!r}: {error}. Set the third part to jax, flax or transformers.") from None
        if get_kaggle_credentials() is None:
            raise UserError(
                f"publishing to {where!r} needs your Kaggle credentials, and there are none. Make a token at"
                " https://www.kaggle.com/settings/api, and put it into KAGGLE_API_TOKEN or ~/.kaggle/access_token; in a"
                " notebook the session has its own."
            )
    return target


def publish(directory: Path, where: str, note: str = "") -> str:
    """Upload the content of `directory` to `where`, and return the address of its page. What is new is private.

    A run directory is packed (`pack.py`), without its token files, which can be made from the text; anything else is
    uploaded as it is. Files in LEFT_OUT are never uploaded. `note` describes the version.

    Raises UserError, with the reason, when it cannot be sent.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        raise UserError(f"{directory} is not a directory with files to publish. Name a run directory or an export.")
    target = check_target(where)
    with tempfile.TemporaryDirectory(dir=scratch_dir(), prefix="publish-") as folder:
        staged = Path(folder) / "files"
        try:
            copy_tree(directory, staged, "tokens" if holds_run(directory) else "")
            if holds_run(staged):
                pack.pack(staged)
            _send(staged, target, note or f"jgpt: {directory.name}")
        except UserError:
            raise
        except Exception as error:  # the network libraries may raise anything
            raise UserError(f"nothing could be sent to {where!r}: {_reason(error)}") from None
    return target.url


def copy_tree(source: Path, target: Path, *left_out: str) -> None:
    """Copy files to publish, except LEFT_OUT and more such patterns; by hard links, where the disk has them."""
    shutil.copytree(
        source, target, ignore=shutil.ignore_patterns(*LEFT_OUT, *left_out), copy_function=_link, dirs_exist_ok=True
    )


def _link(source: str, target: str) -> None:
    """Link a file; copy it where a run may append to it during the upload."""
    try:
        if not source.endswith((".jsonl", ".txt")):
            os.link(source, target)
            return
    except OSError:  # another disk, or one without hard links
        pass
    shutil.copyfile(source, target)


def _send(directory: Path, target: Target, note: str) -> None:
    if target.kind == "bucket":
        bucket.send(directory, target.handle)
    elif target.kind == "hub":
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(target.handle, private=True, exist_ok=True)
        old = bucket.CHECKPOINTS
        api.upload_folder(repo_id=target.handle, folder_path=directory, commit_message=note, delete_patterns=old)
    elif target.kind == "dataset":
        import kagglehub

        kagglehub.dataset_upload(target.handle, str(directory), version_notes=note)
    else:
        import kagglehub

        kagglehub.model_upload(target.handle, str(directory), version_notes=note)


def fetch(where: str, folder: Path) -> Path | None:
    """Download the newest version published to `where`, and return its folder.

    That is `folder` for the Hub and a bucket; for Kaggle it is where kagglehub has it, mounted or in its cache. Returns
    None when there is nothing yet, or when Kaggle or the Hub cannot be reached, and logs the reason; these two keep
    earlier versions. Raises UserError when a bucket cannot be read.
    """
    target = parse_target(where)
    if target.kind == "bucket":
        return bucket.fetch(target.handle, folder)
    try:
        if target.kind == "hub":
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(target.handle, local_dir=folder))
        import kagglehub

        download = kagglehub.dataset_download if target.kind == "dataset" else kagglehub.model_download
        return Path(download(target.handle))
    except Exception as error:  # the network libraries may raise anything
        status = _status(error)
        reason = "nothing is there yet" if status == 404 else _reason(error)
        log.info("nothing to resume from at %s: %s", where, reason)
        return None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status in an error of requests, of httpx, or of Kaggle's own code."""
    match error:
        case BaseException(response=response) if response is not None:
            return response.status_code
        case BaseException(error_code=code):
            return code
    return None


def _reason(error: BaseException) -> str:
    """Say in one line what went wrong and what to do, without secrets."""
    status, message = _status(error), redact(" ".join(str(error).split()))[:300]
    if status in (401, 403):
        return (
            f"it answered {status}: these credentials are not enough. Check OWNER, and that the token may read and"
            f" write (it said: {message})."
        )
    if status is not None:
        return f"it answered {status}. Try again later (it said: {message})."
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"ConnectionError", "ConnectError", "Timeout", "TimeoutException", "LocalEntryNotFoundError"}:
        return "there is no connection. Turn the internet on (in a notebook: Settings > Internet), and try again."
    return f"{type(error).__name__}: {message}"


def main(arguments: list[str]) -> int:
    """Publish DIRECTORY to WHERE; print the address, or the error."""
    try:
        directory, where = arguments
        print(publish(Path(directory), where))
    except ValueError as error:  # UserError is one
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
