"""Kaggle as the laptop sees it: versions of a kernel, their state, logs and output, and the quota.

Beside the data path: the verbs of `python -m jgpt.kaggle` call it. A thin layer over the `kaggle` package: it reads the
answers and not the exit codes, repeats a call that fails for a short time, and never shows a token. Import this file
only where a verb needs it: the package is an extra.
"""

import contextlib
import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import requests
from kagglesdk.kernels.types.kernels_api_service import (
    ApiGetAcceleratorQuotaStatisticsRequest,
    ApiGetKernelRequest,
    ApiGetKernelSessionStatusRequest,
    ApiListKernelSessionOutputRequest,
)
from requests.adapters import HTTPAdapter

from jgpt.errors import UserError
from jgpt.kaggle.laptop.answers import Pushed, Quota, Status, plain_log
from jgpt.kaggle.laptop.retry import TOKEN_HELP, NotFound, Retries, Unauthorized
from jgpt.redaction import redact

WAITING = ("NEW_SCRIPT", "QUEUED")
POLL_SECONDS = 10.0
PAGE_SIZE = 200  # output files an answer; the most that Kaggle gives
TIMEOUT_SECONDS = 120.0  # without a byte of an answer

T = TypeVar("T")


class Kaggle:
    """The service, as one account sees it. A slug is OWNER/NAME; versions count from 1, None is the newest."""

    def __init__(self) -> None:
        self.retries = Retries()
        self.api = _open_api()
        self._sign_in()

    def newest_version(self, slug: str) -> int:
        """Return the number of a kernel's newest version, 0 when there is no such kernel."""
        request = ApiGetKernelRequest()
        request.user_name, request.kernel_slug = slug.split("/")
        try:
            answer = self._ask(f"looking for {slug}", lambda kernels: kernels.get_kernel(request))
        except NotFound:
            return 0
        return answer.metadata.current_version_number or 0

    def push(self, slug: str, folder: Path) -> Pushed:
        """Push the kernel folder as the next version, which Kaggle queues and runs.

        Raises UserError when Kaggle does not take it, or takes it without one of its inputs.
        """
        before, printed = self.newest_version(slug), io.StringIO()

        def save() -> Any:
            if self.newest_version(slug) > before:
                return None  # the last attempt arrived, only its answer was lost: a second push would run it twice
            with contextlib.redirect_stdout(printed):
                return self.api.kernels_push(str(folder))

        try:
            answer = self._call(f"pushing {slug}", save)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"{folder}: the kaggle package refuses this kernel: {error}. Push with other flags."
            ) from None
        url = f"https://www.kaggle.com/code/{slug}"
        notes = self.retries.clean(printed.getvalue()).splitlines()
        if answer is None:
            return Pushed(before + 1, url, [*notes, "The connection broke, but the push had arrived."])
        if answer.error:
            raise UserError(
                f"pushing {slug}: Kaggle did not take it: {self.retries.clean(answer.error).rstrip('.')}. Nothing was"
                " started. Fix what it names, and push again."
            )
        pushed = Pushed(answer.version_number or before + 1, answer.url or url, notes)
        _check_inputs(slug, answer, pushed)
        return pushed

    def status(self, slug: str, version: int | None = None) -> Status:
        """Return the state of a version's session."""
        request = _with_version(ApiGetKernelSessionStatusRequest(), slug, version)
        what = f"asking for the status of {slug}"
        answer = self._ask(what, lambda kernels: kernels.get_kernel_session_status(request))
        return Status(answer.status.name, self.retries.clean(answer.failure_message or "").strip())

    def quotas(self) -> dict[str, Quota]:
        """Return the week's hours of "GPU" and "TPU"; without those of which Kaggle does not say."""
        request = ApiGetAcceleratorQuotaStatisticsRequest()
        answer = self._ask("asking for the quota", lambda kernels: kernels.get_accelerator_quota_statistics(request))
        found = {}
        for unit, quota in (("GPU", answer.gpu_quota), ("TPU", answer.tpu_quota)):
            if quota is not None and quota.total_time_allowed is not None:
                used = quota.time_used.total_seconds() / 3600 if quota.time_used else 0.0
                allowed = quota.total_time_allowed.total_seconds() / 3600
                found[unit] = Quota(used, allowed, answer.quota_refresh_time)
        return found

    def quota(self, unit: str) -> Quota | None:
        """Return the week's hours of "GPU" or "TPU"; None when Kaggle does not say."""
        return self.quotas().get(unit)

    def log_lines(self, slug: str, version: int | None = None) -> list[str]:
        """Return the log of a session that has ended."""
        request = _with_version(ApiListKernelSessionOutputRequest(), slug, version)
        what = f"fetching the log of {slug}"
        answer = self._ask(what, lambda kernels: kernels.list_kernel_session_output(request))
        return redact(plain_log(answer.log or "")).splitlines()

    def follow_log(self, slug: str, version: int | None = None) -> Iterator[str]:
        """Yield the log of a session in pieces, as it is written, until the session ends."""
        name, seen, what = f"{slug}/{version}" if version else slug, 0, f"following the log of {slug}"
        while self.status(slug, version).state in WAITING:
            time.sleep(POLL_SECONDS)
        stream: Iterator[dict[str, Any]] | None = None

        def next_event() -> dict[str, Any] | None:
            nonlocal stream
            if stream is None:  # after every break Kaggle sends the log from its start again
                stream = itertools.islice(self.api.kernels_logs_stream(name), seen, None)
            try:
                return next(stream, None)
            except requests.RequestException:
                stream = None
                raise
            except ValueError as error:  # the package raises it when Kaggle refuses
                raise UserError(f"{what}: {error} Check the spelling of {slug}, and whose token this is.") from None

        while True:
            event = self._call(what, next_event)
            if event is not None:
                seen += 1
                yield redact(str(event.get("data") or ""))
            elif self.status(slug, version).ended:
                return
            else:
                stream = None
                time.sleep(POLL_SECONDS)

    def output_files(self, slug: str, version: int | None = None) -> dict[str, str]:
        """Return the names of a version's output files and their addresses, which are secret while they are valid."""
        files: dict[str, str] = {}
        request = _with_version(ApiListKernelSessionOutputRequest(), slug, version)
        request.page_size, request.page_token = PAGE_SIZE, ""
        while True:
            what = f"listing the output of {slug}"
            answer = self._ask(what, lambda kernels: kernels.list_kernel_session_output(request))
            files |= {file.file_name: file.url for file in answer.files or []}
            if not answer.next_page_token:
                return files
            request.page_token = answer.next_page_token

    def download(self, url: str, target: Path) -> None:
        """Download a file: it appears only when it is complete. The next attempt continues a broken one."""
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")

        def fetch() -> None:
            with requests.get(url, stream=True, timeout=TIMEOUT_SECONDS) as response:
                response.raise_for_status()
                # It compares sizes, and appends only to what the server's ETag proves to be of the same file.
                self.api.download_file(response, str(part), None, quiet=True, resume=True, max_retries=0)

        try:
            self._call(f"downloading {target.name}", fetch)
        except NotFound:
            raise UserError(
                f"downloading {target.name}: its address has expired. Repeat the command: it asks for a new one, and"
                " continues the download."
            ) from None
        part.replace(target)

    def read_output(self, slug: str, version: int | None, name: str) -> bytes | None:
        """Return a small output file whose path ends in `name`; None when there is no such file."""
        files = self.output_files(slug, version)
        urls = [url for path, url in files.items() if PurePosixPath(path).name == name]
        if not urls:
            return None

        def fetch() -> bytes:
            response = requests.get(urls[0], timeout=TIMEOUT_SECONDS)
            response.raise_for_status()
            return response.content

        return self._call(f"downloading {name} of {slug}", fetch)

    def _ask(self, what: str, call: Callable[[Any], Any]) -> Any:
        """Call the kernels' service."""

        def ask() -> Any:
            with self.api.build_kaggle_client() as client:
                for scheme in ("https://", "http://"):
                    client.http_client()._session.mount(scheme, _WithTimeout())
                return call(client.kernels.kernels_api_client)

        return self._call(what, ask)

    def _call(self, what: str, function: Callable[[], T]) -> T:
        """Call with retries. When the credentials have expired, as OAuth's do within a day, sign in and call again."""
        try:
            return self.retries.call(what, function)
        except Unauthorized:
            self._sign_in()
            return self.retries.call(what, function)

    def _sign_in(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints pages of advice
            try:
                self.retries.call("signing in to Kaggle", self.api.authenticate)
            except SystemExit:
                raise UserError(
                    f"no Kaggle token was found, or Kaggle refused the one there is. {TOKEN_HELP}"
                ) from None
        values = self.api.config_values
        self.retries = Retries([values.get("token", ""), values.get("key", "")])


class _WithTimeout(HTTPAdapter):
    """Adds a timeout to each request. Without it the package would wait for ever, such as after a laptop slept."""

    def send(self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None):
        return super().send(request, stream, timeout or TIMEOUT_SECONDS, verify, cert, proxies)


def _open_api() -> Any:
    """Return the package's API, set up to print nothing of what it sends."""
    with contextlib.redirect_stdout(io.StringIO()):  # the import signs in, and prints advice when it cannot
        from kaggle import KaggleApi
    api = KaggleApi()
    api.args = [argument for argument in api.args if argument != "--verbose"]  # VERBOSE=1 would print the token
    logging.getLogger("urllib3").setLevel(logging.INFO)  # its debug log has signed addresses
    return api


def _with_version(request: Any, slug: str, version: int | None) -> Any:
    request.user_name, request.kernel_slug = slug.split("/")
    if version is not None:
        request.version_label = f"v{version}"  # a bare number is not found
    return request


def _check_inputs(slug: str, answer: Any, pushed: Pushed) -> None:
    """Raise UserError when Kaggle left out an input: the version that it started would train on the wrong data."""
    left_out = {
        "--dataset": answer.invalid_dataset_sources,
        "--model": answer.invalid_model_sources,
        "kernel": answer.invalid_kernel_sources,
    }
    wrong = [f"{flag} {name}" for flag, names in left_out.items() for name in names or []]
    if wrong:
        raise UserError(
            f"pushing {slug}: Kaggle does not know {', '.join(wrong)}, or your account may not read it. A dataset is"
            " OWNER/NAME, a model OWNER/MODEL/FRAMEWORK/VARIATION/VERSION. A new one can be used after some minutes."
            f" Version {pushed.version} was started without it: stop it at {pushed.url}, then push again."
        )
