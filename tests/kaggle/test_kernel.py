"""A kernel's folder: what Kaggle's own client takes, one script with everything in it, and every mistake named."""

import base64
import io
import json
import lzma
import os
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from jgpt.errors import UserError
from jgpt.kaggle.laptop import kernel as module
from jgpt.kaggle.laptop.kernel import Kernel, code_file, read_folder, write_folder

REPOSITORY = Path(__file__).parents[2]
CONFIG = str(REPOSITORY / "configs" / "kaggle_t4.py")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Compress less: only one test asks how large the script is."""
    compress = lzma.compress
    monkeypatch.setattr(lzma, "compress", lambda data, preset: compress(data, preset=2))


@pytest.fixture
def kernel():
    return Kernel(
        "me/my-run",
        arguments=("--config", CONFIG, "--config.seed=1"),
        config=CONFIG,
        datasets=("me/texts", "You_2/more-texts/3"),
        models=("google/gemma-2/transformers/2b-it/2",),
        kernels=("me/my-run",),
    )


def carried(code: str) -> dict[str, bytes]:
    text = re.search(r'^ARCHIVE = """\n(.*?)"""', code, re.DOTALL | re.MULTILINE)
    assert text
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(base64.b85decode("".join(text[1].split()))))) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]


def called_with(code: str) -> dict:
    """Execute the script as a cell, but for what `start` does."""
    found = {}
    source, call = code.rsplit("\nstart(", 1)
    namespace: dict = {}
    exec(compile(source, "<cell>", "exec"), namespace)
    namespace["start"] = lambda archive, **options: found.update(options, archive=archive)
    exec("start(" + call, namespace)
    return found


def test_the_metadata_is_what_the_client_reads(kernel, tmp_path):
    write_folder(kernel, tmp_path)
    found = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert found["id"] == "me/my-run" and found["code_file"] == "kernel.py"
    assert (found["language"], found["kernel_type"]) == ("python", "script")
    assert found["machine_shape"] == "NvidiaTeslaT4" and found["enable_gpu"] is True
    assert found["is_private"] is True and found["enable_internet"] is False  # said, as the client's default is true
    assert found["dataset_sources"] == ["me/texts", "You_2/more-texts/3"] and found["kernel_sources"] == ["me/my-run"]
    assert found["model_sources"] == ["google/gemma-2/transformers/2b-it/2"] and "docker_image" not in found
    changed = replace(kernel, accelerator="", internet=True, docker_image="gcr.io/kaggle-images/python@sha256:1")
    write_folder(changed, tmp_path)
    found = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert (found["machine_shape"], found["enable_gpu"], found["enable_internet"]) == ("", False, True)
    assert found["docker_image"] == "gcr.io/kaggle-images/python@sha256:1"


@pytest.mark.parametrize("slug", ["me/my-run", "me/gpt2-124m-2", "Me_2/abcde"])
def test_the_title_makes_the_slug_again(kernel, slug):
    slugify = pytest.importorskip("slugify").slugify  # what the client asks
    title = module.metadata(replace(kernel, slug=slug))["title"]
    assert slugify(title) == slug.split("/")[1] and len(str(title)) >= 5


def test_the_folder_holds_the_kernel_that_it_was_made_of(kernel, tmp_path):
    script = write_folder(kernel, tmp_path / "new" / "folder")
    assert script == tmp_path / "new" / "folder" / "kernel.py"
    assert sorted(path.name for path in script.parent.iterdir()) == ["kernel-metadata.json", "kernel.json", "kernel.py"]
    assert read_folder(script.parent) == kernel


def test_a_folder_that_is_none_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(tmp_path)
    wrong = ("{", "[]", '{"slug": "me/my-run", "unknown": 1}', '{"slug": 5}', '{"slug": "a/b", "arguments": [1]}')
    for text in (*wrong, '{"slug": "a/b", "internet": "no"}', "[" * 100_000):
        (tmp_path / "kernel.json").write_text(text)
        with pytest.raises(UserError, match="It must be a folder that a push wrote"):
            read_folder(tmp_path)


def test_the_script_carries_the_project_and_what_kaggle_lacks(kernel):
    files = carried(code_file(kernel))
    for name in (
        "jgpt/__init__.py",
        "jgpt/train.py",
        "jgpt/kaggle/session/bootstrap.py",
        "configs/base.py",
        "pyproject.toml",
    ):
        assert files[name] == (REPOSITORY / name).read_bytes()
    everything = [
        path for path in (REPOSITORY / "jgpt").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {f"jgpt/{path.relative_to(REPOSITORY / 'jgpt').as_posix()}" for path in everything} <= set(files)
    assert "packages/ml_collections/config_dict/config_dict.py" in files
    assert [name for name in files if name.endswith("LICENSE") and "ml_collections" in name]
    assert not [name for name in files if ".pyc" in name or "/tests/" in name or ".git" in name]


def test_the_script_begins_with_what_it_is_and_ends_with_what_it_does(kernel):
    code = code_file(kernel)
    lines = code.splitlines()
    assert lines[0] == "# me/my-run: python -m jgpt.train --config configs/kaggle_t4.py --config.seed=1"
    assert lines[1].startswith(f"# Written by jgpt {module.__version__}")
    assert str(REPOSITORY) not in code  # nothing of the machine it was written on
    found = called_with(code)
    assert found["module"] == "jgpt.train" and found["trains"] is True and found["internet"] is False
    assert found["arguments"] == ["--config", "configs/kaggle_t4.py", "--config.seed=1"]
    assert found["inputs"] == [
        "datasets me/texts", "datasets You_2/more-texts/3", "models google/gemma-2/transformers/2b-it/2",
        "notebooks me/my-run",
    ]  # fmt: skip
    assert max(map(len, lines)) < 4000


def test_equal_inputs_give_equal_bytes(kernel):
    once = code_file(kernel)
    assert once == code_file(kernel) != code_file(replace(kernel, internet=True))


def test_the_script_is_small_enough_for_kaggle(kernel, monkeypatch):
    monkeypatch.undo()  # compressed as it is for Kaggle
    assert len(code_file(kernel).encode()) < module.MOST_BYTES


@pytest.mark.parametrize("form", ["--config {}", "--config={}", "-config={}:variant"])
def test_a_config_of_ones_own_is_carried_wherever_it_lies(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def get_config(): ...\n")
    config = "mine.py:variant" if form.endswith("variant") else "mine.py"
    kernel = Kernel("me/my-run", arguments=tuple(form.format("mine.py").split()), config=config)
    code = code_file(kernel)
    assert carried(code)["own/mine.py"] == b"def get_config(): ...\n"
    assert called_with(code)["arguments"] == form.format("own/mine.py").split()


def test_a_module_without_a_config_has_no_run_directory(tmp_path):
    assert (
        called_with(code_file(Kernel("me/doctor", module="jgpt.check_env", arguments=("--json",))))["trains"] is False
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slug": "my-run"}, "slug='my-run': it must be owner/name"),
        ({"slug": "me/My Run"}, "slug='me/My Run'"),
        ({"slug": "me/my--run"}, "slug='me/my--run'"),
        ({"slug": "me/gpt"}, "5 to 50 characters"),
        ({"slug": "me/" + "x" * 51}, "5 to 50 characters"),
        ({"datasets": ("texts",)}, "dataset 'texts': it must be owner/name"),
        ({"kernels": ("me/my-run/x",)}, "kernel 'me/my-run/x'"),
        ({"models": ("google/gemma",)}, "model 'google/gemma': it must be owner/model/framework/variation/version"),
        ({"models": ("a/b/c/d/latest",)}, "the version a number"),
        ({"accelerator": "NvidiaTeslaP100"}, "accelerator='NvidiaTeslaP100': it must be NvidiaTeslaT4,"),
        ({"accelerator": "TpuV38"}, "or empty; set --accelerator=TpuV5E8"),
        ({"accelerator": "t4"}, "or empty; set --accelerator=NvidiaTeslaT4"),
        ({"module": "jgpt/train.py"}, "module='jgpt/train.py'"),
        ({"config": "nowhere.py"}, "config='nowhere.py': there is no such file"),
        ({"arguments": ("--config.out_dir=/tmp",)}, "--config.out_dir: on Kaggle a run's directory is"),
    ],
    ids=str,
)
def test_what_kaggle_would_refuse_is_refused_before(kernel, tmp_path, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        write_folder(replace(kernel, **change), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_all_problems_are_named_at_once():
    with pytest.raises(UserError) as error:
        Kernel("x", accelerator="GPU", datasets=("y",)).check()
    assert str(error.value).count("\n  - ") == 3


def test_a_script_that_is_too_large_is_refused(kernel, tmp_path):
    big = tmp_path / "big.py"
    big.write_text(f"NOISE = {base64.b64encode(os.urandom(600_000)).decode()!r}\n")
    with pytest.raises(UserError, match=r"the script would be [\d,]+ bytes, and Kaggle takes 700,000") as error:
        write_folder(replace(kernel, config=str(big), arguments=("--config", str(big))), tmp_path / "folder")
    assert "mount data as a dataset" in str(error.value) and not (tmp_path / "folder").exists()


def test_a_folder_is_never_half_written(kernel, tmp_path):
    write_folder(kernel, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with mock.patch.object(os, "fsync", side_effect=OSError("No space left on device")):
        with pytest.raises(UserError, match="cannot be written: No space left on device. It must be a folder"):
            write_folder(replace(kernel, internet=True), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_must_be_carried_must_be_installed(kernel):
    with mock.patch.object(module, "CARRIED_PACKAGES", ("no_such_package",)):
        with pytest.raises(UserError, match="pip install no_such_package"):
            code_file(kernel)


def test_the_version_names_the_commit_of_a_checkout_and_of_nothing_else(tmp_path):
    assert re.fullmatch(r"[\d.]+( \([0-9a-f]{7,}\+?\))?", module.version())
    with mock.patch.object(module, "PROJECT", tmp_path):
        assert module.version() == module.__version__
    with mock.patch.dict(os.environ, {"PATH": ""}):
        assert module.version() == module.__version__
