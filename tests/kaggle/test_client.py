"""The client: the real `kaggle` package against a server on this machine, on good days and bad ones."""

import json

import pytest
from fake_kaggle import SIGNATURE, FakeKaggle, Fault, Version

from jgpt.errors import UserError
from jgpt.redaction import HIDDEN

SLUG = "owner/a-run"


@pytest.fixture
def server(kaggle) -> FakeKaggle:
    return kaggle


@pytest.fixture
def client(server):
    from jgpt.kaggle.laptop.client import Kaggle

    client = Kaggle()
    server.requests.clear()
    return client


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "kernel"
    folder.mkdir()
    metadata = {
        "id": SLUG, "title": "a run", "code_file": "run.py", "language": "python", "kernel_type": "script",
        "enable_internet": False, "machine_shape": "NvidiaTeslaT4", "dataset_sources": ["owner/text"],
        "model_sources": ["owner/m/jax/small/1"], "kernel_sources": [],
    }  # fmt: skip
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata))
    (folder / "run.py").write_text("print('hello')\n")
    return folder


def ran(server, **kwargs) -> Version:
    """Put a version there that has run."""
    version = Version({}, **kwargs)
    server.kernels.setdefault(SLUG, []).append(version)
    return version


def test_push(server, client, folder):
    server.sources |= {"owner/text", "owner/m/jax/small/1"}
    pushed = client.push(SLUG, folder)
    assert (pushed.version, pushed.url, pushed.notes) == (1, f"https://www.kaggle.com/code/{SLUG}", [])
    sent = server.kernels[SLUG][0].request
    assert sent["text"] == "print('hello')\n" and sent["machineShape"] == "NvidiaTeslaT4" and sent["isPrivate"]
    assert sent["enableInternet"] is False and sent["datasetDataSources"] == ["owner/text"]
    assert client.push(SLUG, folder).version == 2 == client.newest_version(SLUG)
    assert client.newest_version("owner/another") == 0  # Kaggle answers 403
    server.faults = [Fault("GetKernel", 404)]
    assert client.newest_version("owner/another") == 0


def test_what_the_package_prints_is_passed_on(server, client, folder):
    server.sources |= {"owner/text", "owner/m/jax/small/1"}
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata | {"title": "another title"}))
    assert "title does not resolve" in client.push(SLUG, folder).notes[0]


def test_invalid_sources_are_an_error(client, folder):
    with pytest.raises(UserError) as error:
        client.push(SLUG, folder)
    for part in ("--dataset owner/text", "--model owner/m/jax/small/1", "Version 1 was started without it", "stop it"):
        assert part in str(error.value)


@pytest.mark.parametrize("status", [200, 400])
def test_an_error_body(server, client, folder, status):
    server.faults = [Fault("SaveKernel", status, {"code": 400, "message": "Maximum batch GPU session count reached"})]
    with pytest.raises(UserError, match=r"pushing owner/a-run: .*Maximum batch GPU session count reached"):
        client.push(SLUG, folder)
    assert SLUG not in server.kernels


def test_an_error_in_a_good_answer(server, client, folder):
    server.faults = [Fault("SaveKernel", body={"error": "The title is in use."})]
    with pytest.raises(UserError, match=r"did not take it: The title is in use\. Nothing was started"):
        client.push(SLUG, folder)


def test_what_the_package_refuses_before_it_sends(server, client, folder):
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata | {"model_sources": ["owner/m"]}))
    with pytest.raises(UserError, match="the kaggle package refuses this kernel: Model instance version"):
        client.push(SLUG, folder)
    assert not any("SaveKernel" in request for request in server.requests)


def test_too_many_requests(server, client, folder):
    server.sources |= {"owner/text", "owner/m/jax/small/1"}
    server.faults = [Fault("SaveKernel", 429, {"code": 429, "message": "Too many"}, {"Retry-After": "77"})]
    assert client.push(SLUG, folder).version == 1
    assert server.slept == [77.0]


def test_a_server_that_asks_for_hours(server, client):
    server.faults = [Fault("GetKernelSessionStatus", 429, {}, {"Retry-After": "7200"})]
    with pytest.raises(UserError, match="in 120 minutes"):
        client.status(SLUG)
    assert server.slept == []


def test_a_server_that_is_down_and_comes_back(server, client):
    ran(server, states=["RUNNING"])
    server.faults = [Fault("GetKernelSessionStatus", 503), Fault("GetKernelSessionStatus", drop_after=0)]
    assert client.status(SLUG).state == "RUNNING"
    assert len(server.slept) == 2 and 1 < server.slept[0] < server.slept[1] < 5


def test_an_answer_that_does_not_come(server, client, monkeypatch):
    monkeypatch.setattr("jgpt.kaggle.laptop.client.TIMEOUT_SECONDS", 0.1)
    ran(server, states=["RUNNING"])
    server.faults = [Fault("GetKernelSessionStatus", hang_seconds=0.5, drop_after=10_000)]
    assert client.status(SLUG).state == "RUNNING" and len(server.slept) == 1  # whole, but too late


def test_a_server_that_stays_down(server, client):
    server.faults = [Fault("GetKernelSessionStatus", 503)] * 9
    with pytest.raises(UserError, match=r"503.* 6 times in a row\. .*repeat the command later"):
        client.status(SLUG)
    assert len(server.slept) == 5 and sum(server.slept) < 80


@pytest.mark.parametrize("fault", [Fault("SaveKernel", drop_after=0), Fault("SaveKernel", drop_after=9)])
def test_a_push_whose_answer_is_lost_is_not_made_twice(server, client, folder, fault):
    server.faults = [fault]
    pushed = client.push(SLUG, folder)
    assert pushed.version == 1 and "had arrived" in pushed.notes[0]
    assert len(server.kernels[SLUG]) == 1


def test_status(server, client):
    ran(server, states=["ERROR"], failure="Your notebook tried to allocate more memory than is available.")
    ran(server, states=["RUNNING"])
    assert client.status(SLUG).state == "RUNNING" and not client.status(SLUG).ended
    first = client.status(SLUG, 1)
    assert first.ended and first.state == "ERROR" and "more memory" in first.message
    with pytest.raises(UserError, match=r"403: Permission .*Check the spelling"):
        client.status("owner/nothing")


def test_quota(server, client):
    server.used_hours = 26.5
    quota = client.quota("GPU")
    assert (quota.used, quota.allowed, quota.left) == (26.5, 30.0, 3.5) and quota.refresh.day == 28
    server.used_tpu_hours = 4.5
    assert (client.quota("TPU").allowed, client.quota("TPU").left) == (20.0, 15.5)


def test_log(server, client):
    ran(server, log=["step 1\n", "two ", "parts\n", "a bar\r", "\n", "end\n"])
    assert client.log_lines(SLUG) == ["step 1", "two parts", "a bar", "end"]


def test_follow_a_log_over_breaks(server, client):
    version = ran(server, states=["QUEUED", "RUNNING", "RUNNING", "COMPLETE"], log=["one\n", "two\n", "three\n"])
    server.faults = [Fault("logs/stream", drop_after=75)]  # in the middle of the second line
    assert list(client.follow_log(SLUG)) == version.log
    assert len([r for r in server.requests if "logs/stream" in r]) >= 2
    with pytest.raises(UserError, match="Permission 'kernels.get' was denied"):
        list(client.follow_log("owner/nothing"))


def test_output_has_pages(server, client, tmp_path):
    files = ran(server, files={f"outputs/file-{i}.bin": bytes([i]) * 10 for i in range(10)}).files
    found = client.output_files(SLUG)
    assert found.keys() == files.keys()
    assert sum("ListKernelSessionOutput" in r for r in server.requests) == 4  # of 3 each
    for name, url in found.items():
        client.download(url, tmp_path / name)
        assert (tmp_path / name).read_bytes() == files[name]
    assert client.read_output(SLUG, 1, "file-3.bin") == files["outputs/file-3.bin"]
    assert client.read_output(SLUG, 1, "file-99.bin") is None


def test_a_download_that_breaks_goes_on_where_it_was(server, client, tmp_path):
    content = bytes(range(256)) * 40_000
    ran(server, files={"big.tar": content})
    server.faults = [Fault("big.tar", drop_after=3_000_000), Fault("big.tar", 503), Fault("big.tar", 429)]
    client.download(client.output_files(SLUG)["big.tar"], tmp_path / "big.tar")
    assert (tmp_path / "big.tar").read_bytes() == content
    assert server.ranges and int(server.ranges[0].removeprefix("bytes=").rstrip("-")) > 1_000_000
    assert {path.name for path in tmp_path.iterdir() if "big" in path.name} == {"big.tar"}


def test_a_download_that_stays_broken_leaves_no_file(server, client, tmp_path):
    content = b"0123456789" * 1_000_000
    ran(server, files={"big.tar": content})
    server.faults = [Fault("big.tar", drop_after=2_000_000)] * 20
    url = client.output_files(SLUG)["big.tar"]
    with pytest.raises(UserError, match=r"downloading big.tar: the connection broke .* 6 times in a row") as error:
        client.download(url, tmp_path / "big.tar")
    assert not (tmp_path / "big.tar").exists() and SIGNATURE not in str(error.value)
    server.faults = []
    client.download(url, tmp_path / "big.tar")  # the command again
    assert (tmp_path / "big.tar").read_bytes() == content


def test_an_expired_address_is_no_file(server, client, tmp_path):
    ran(server, files={"status.json": b"{}"})
    url = client.output_files(SLUG)["status.json"]
    server.faults = [Fault("status.json", 403, {"message": f"expired: https://x/y?X-Signature={SIGNATURE}"})]
    with pytest.raises(UserError, match="its address has expired") as error:
        client.download(url, tmp_path / "status.json")
    assert SIGNATURE not in str(error.value) and not (tmp_path / "status.json").exists()


def test_no_token(server, monkeypatch, capfd):
    from jgpt.kaggle.laptop.client import Kaggle

    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(UserError, match=r"no Kaggle token .*https://www.kaggle.com/settings/api"):
        Kaggle()
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-wrong-token")
    with pytest.raises(UserError, match="refused the one there is") as error:
        Kaggle()
    shown = capfd.readouterr()
    assert "a-wrong-token" not in str(error.value) + shown.out + shown.err and shown.out == ""


def test_a_token_that_expires_is_renewed(server, client, monkeypatch):
    ran(server, states=["RUNNING"])
    server.token = "the-next-token"
    monkeypatch.setenv("KAGGLE_API_TOKEN", server.token)
    assert client.status(SLUG).state == "RUNNING"
    server.token = "one-we-do-not-have"
    with pytest.raises(UserError, match="refused the one there is"):
        client.status(SLUG)


def test_no_secret_is_shown(server, folder, monkeypatch, capfd):
    """VERBOSE=1 makes the package print all that it sends, token included; servers may repeat it."""
    from kaggle import KaggleApi

    from jgpt.kaggle.laptop.client import Kaggle

    monkeypatch.setattr(KaggleApi, "args", ["--verbose"])
    client = Kaggle()
    ran(server, states=["ERROR"], failure=f"died with {server.token}")
    shown = client.status(SLUG).message
    server.faults = [Fault("SaveKernel", 400, {"message": f"no: Bearer {server.token}"})]
    with pytest.raises(UserError) as error:
        client.push(SLUG, folder)
    printed = capfd.readouterr()
    assert server.token not in shown + str(error.value) + printed.out + printed.err
    assert HIDDEN in shown and HIDDEN in str(error.value)
