"""Publishing for real: kagglehub and huggingface_hub send to a server of this test, which speaks their endpoints."""
# ruff: noqa: F811 (tests name the fixtures that they import)

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from fake_kaggle import HUB_TOKEN, KAGGLE_TOKEN, FakeKaggle, hub, server  # noqa: F401

from jgpt.errors import UserError
from jgpt.kaggle.session import publish as module
from jgpt.kaggle.session.publish import LEFT_OUT, check_target, fetch, parse_target, publish


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A directory that looks like a run's, with things in it that must stay here."""
    root = tmp_path / "mine"
    for path, text in {
        "config.json": "{}", "versions.json": "{}", "metrics.jsonl": "{}\n", "status.json": "{}", "samples.txt": "a",
        "checkpoints/4/params/data": "weights", "checkpoints/4.sha256": "sum", "tokenizer/tokenizer.json": "{}",
        "tokens/train.bin": "ids", ".lock": "", ".netrc": "login me password planted", "kaggle.json": "planted",
        "tokenizer/.env": "planted", "tokenizer/access_token": "planted",
    }.items():  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def names_in_tar(data: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name for member in tar.getmembers() if member.isfile()}


PACKED = {
    "config.json", "versions.json", "metrics.jsonl", "status.json", "samples.txt", "checkpoint-4.tar", "tokenizer.tar",
}  # fmt: skip


def test_a_run_becomes_a_private_dataset_and_then_a_new_version(server: FakeKaggle, run_dir: Path, capfd):
    before = sorted(run_dir.rglob("*"))
    assert publish(run_dir, "dataset:owner/my-slug") == "https://www.kaggle.com/datasets/owner/my-slug"
    created = dict(server.calls)["CreateDataset"]
    assert (created["ownerSlug"], created["slug"], created["isPrivate"]) == ("owner", "my-slug", True)
    files = server.sent("CreateDataset")
    assert set(files) == PACKED and names_in_tar(files["tokenizer.tar"]) == {"tokenizer/tokenizer.json"}
    assert names_in_tar(files["checkpoint-4.tar"]) == {"4/params/data", "4.sha256"}
    assert not any(b"planted" in data for data in server.blobs.values())
    assert publish(run_dir, "dataset:owner/my-slug", "again")
    assert set(server.sent("CreateDatasetVersion")) == PACKED
    assert dict(server.calls)["CreateDatasetVersion"]["body"]["versionNotes"] == "again"
    assert server.authorization == {f"Bearer {KAGGLE_TOKEN}"}
    assert sorted(run_dir.rglob("*")) == before and not list((run_dir.parent / "kaggle").rglob("publish-*"))
    shown = capfd.readouterr()
    assert KAGGLE_TOKEN not in shown.out + shown.err


def test_an_export_becomes_a_model(server: FakeKaggle, tmp_path: Path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
    url = publish(tmp_path / "export", "model:owner/gpt/transformers/small")
    assert url == "https://www.kaggle.com/models/owner/gpt/transformers/small"
    assert dict(server.calls)["CreateModel"]["isPrivate"] is True
    assert set(server.sent("CreateModelInstance")) == {"config.json", "model.safetensors"}


def test_a_dataset_comes_back_as_it_was_sent(server: FakeKaggle, run_dir: Path, tmp_path: Path):
    assert fetch("dataset:owner/my-slug", tmp_path / "none") is None  # there is none yet
    publish(run_dir, "dataset:owner/my-slug")
    found = fetch("dataset:owner/my-slug", tmp_path / "back")
    assert found is not None and {path.name for path in found.iterdir()} >= PACKED
    assert names_in_tar((found / "checkpoint-4.tar").read_bytes()) == {"4/params/data", "4.sha256"}


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Publish in a process of its own: huggingface_hub reads the environment when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "jgpt.kaggle.session.publish", *arguments], capture_output=True, text=True
    )


def test_the_hub_keeps_the_newest_checkpoint_alone_and_gives_it_back(
    server: FakeKaggle, hub, run_dir: Path, tmp_path: Path
):
    assert fetch("hub:owner/name", tmp_path / "back") is None
    done = ask(str(run_dir), "hub:owner/name")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "https://huggingface.co/owner/name"
    created = dict(server.calls)["create"]  # the name of the field depends on the version
    assert created.get("private") is True or created.get("visibility") == "private", created
    assert set(server.hub) == PACKED
    (run_dir / "checkpoints" / "4").rename(run_dir / "checkpoints" / "8")
    (run_dir / "checkpoints" / "4.sha256").rename(run_dir / "checkpoints" / "8.sha256")
    assert publish(run_dir, "hub:owner/name") == "https://huggingface.co/owner/name"
    assert set(server.hub) == PACKED - {"checkpoint-4.tar"} | {"checkpoint-8.tar"}
    assert fetch("hub:owner/name", tmp_path / "back") == tmp_path / "back"
    assert names_in_tar((tmp_path / "back" / "checkpoint-8.tar").read_bytes()) == {"8/params/data", "8.sha256"}
    assert server.authorization == {f"Bearer {HUB_TOKEN}"} and HUB_TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "these credentials are not enough"), (403, "these credentials are not enough"), (500, "it answered 500")],
)
@pytest.mark.parametrize("where", ["dataset:owner/my-slug", "model:a/b/jax/d"])
def test_what_kaggle_refuses_is_told_without_the_token(
    server: FakeKaggle, run_dir: Path, where: str, status: int, words: str
):
    server.status = status
    with pytest.raises(UserError, match=f"nothing could be sent to '{where}': .*{words}") as error:
        publish(run_dir, where)
    assert KAGGLE_TOKEN not in str(error.value)


def test_what_the_hub_refuses_is_told_without_the_token(server: FakeKaggle, hub, run_dir: Path, capfd):
    server.status = 403
    assert module.main([str(run_dir), "hub:owner/name"]) == 2
    shown = capfd.readouterr()
    assert "these credentials are not enough" in shown.err.splitlines()[-1], shown.err
    assert HUB_TOKEN not in shown.out + shown.err and "Traceback" not in shown.err


def test_no_network(server: FakeKaggle, hub, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="there is no connection. Turn the internet on"):
        publish(run_dir, "dataset:owner/my-slug")
    assert fetch("dataset:owner/my-slug", run_dir / "none") is None
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="there is no connection. Turn the internet on"):
        publish(run_dir, "hub:owner/name")


def test_no_credentials_and_no_package(
    server: FakeKaggle, run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    with pytest.raises(UserError, match="needs your Kaggle credentials, and there are none.*KAGGLE_API_TOKEN"):
        publish(run_dir, "dataset:owner/my-slug")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token of the Hugging Face Hub.*HF_TOKEN"):
        publish(run_dir, "hub:owner/name")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package kagglehub.*pip install kagglehub"):
        check_target("dataset:owner/my-slug")
    assert server.calls == []


def test_a_notebooks_session_token_serves(
    server: FakeKaggle, run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """As in a Kaggle notebook: a file that KAGGLE_API_V1_TOKEN names, and nothing else."""
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    (tmp_path / "session").write_text("session-token-0123456789")
    monkeypatch.setenv("KAGGLE_API_V1_TOKEN", str(tmp_path / "session"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_DATA_PROXY_URL", server.url)
    publish(run_dir, "dataset:owner/my-slug")
    assert server.authorization == {"Bearer session-token-0123456789"}


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("dataset:me/My_Weights", "Kaggle does not take the name 'My_Weights'.*Set 'dataset:me/my-weights'"),
        ("dataset:me/two--hyphens", "Set 'dataset:me/two-hyphens'"),
        ("dataset:me/ab", "has 6 to 50 characters, and 'ab' has 2"),
        (f"dataset:me/{'a' * 51}", "has 51"),
        ("model:me/My_GPT/jax/small", "does not take the name 'My_GPT'"),
        ("model:me/my-gpt/jax/Small_1", "does not take the name 'Small_1'"),
        ("model:me/my-gpt/caffe/small", "'caffe' is not a valid ModelFramework.*jax, flax or transformers"),
        ("hub:me/two--hyphens", "Cannot have -- or .. in repo_id"),
    ],
)
def test_names_that_would_be_refused_after_hours_of_training_are_refused_now(where: str, words: str):
    with pytest.raises(UserError, match=words):
        check_target(where)


def test_bad_places_and_empty_directories(tmp_path: Path):
    for where in ("", "owner/my-slug", "dataset:slug", "dataset:a/b/c", "model:a/b", "hub:a/../b", "s3:a/b", "hub:/b"):
        with pytest.raises(UserError, match="is not a place to publish to. Allowed: dataset:OWNER/SLUG"):
            parse_target(where)
    with pytest.raises(UserError, match="is not a directory with files to publish"):
        publish(tmp_path / "nothing", "hub:owner/name")
    assert module.main([str(tmp_path / "nothing"), "hub:owner/name"]) == 2
    assert ".lock" in LEFT_OUT
