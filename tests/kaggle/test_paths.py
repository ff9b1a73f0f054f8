"""Where things are on Kaggle: both mount layouts, what is kept and what is not, and what is said of what is missing."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jgpt.data.find_files import RUN_FILES, find_files
from jgpt.errors import UserError
from jgpt.kaggle.session import paths

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.delenv("JGPT_KAGGLE_INPUTS", raising=False)
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    return tmp_path / "kaggle"


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}\n")
    return folder


def test_kaggle_is_told_by_its_run_type(monkeypatch):
    for value, expected in (("", False), ("Batch", True), ("Interactive", True)):
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", value)
        assert paths.on_kaggle() is expected
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert not paths.on_kaggle()


def test_the_folders(root, monkeypatch):
    assert paths.input_dir() == root / "input"
    assert paths.outputs_dir() == paths.working_dir() / "outputs" == root / "working" / "outputs"
    assert paths.scratch_dir() == root / "temp" and (root / "temp").is_dir()  # made
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", "")
    assert paths.input_dir() == Path("/kaggle/input")
    monkeypatch.setenv("JGPT_KAGGLE_ROOT", str(root / "nowhere"))
    assert paths.scratch_dir() == Path(tempfile.gettempdir())  # no such machine: nothing is made
    assert not (root / "nowhere").exists()


@pytest.mark.parametrize(
    ("kind", "name", "place"),
    [
        ("datasets", "me/texts", "datasets/me/texts"),
        ("datasets", "me/texts/3", "datasets/me/texts"),
        ("datasets", "me/texts", "texts"),
        ("notebooks", "me/my-run", "notebooks/me/my-run"),
        ("notebooks", "me/my-run", "my-run"),
        ("notebooks", "me/my-run", "somewhere/else/my-run"),
        ("models", "google/gemma/Transformers/2b-it/2", "models/google/gemma/transformers/2b-it/2"),
        ("models", "google/gemma/transformers/2b-it/2", "gemma/transformers/2b-it/2"),
        ("models", "google/gemma/transformers/2b-it/2", "gemma/2b-it/2"),
        ("competitions", "titanic", "competitions/titanic"),
    ],
)
def test_an_input_is_found_in_every_layout(root, kind, name, place):
    make(root / "input" / "datasets" / "me" / "other", "a.txt")
    expected = make(root / "input" / place)
    assert paths.find_input(kind, name) == expected


def test_what_is_not_mounted_is_said_with_what_is(root):
    make(root / "input" / "datasets" / "me" / "other")
    make(root / "input" / "old")
    with pytest.raises(UserError, match="datasets 'me/texts' is not mounted") as error:
        paths.find_input("datasets", "me/texts")
    assert f"Mounted: {root}/input/datasets/me/other, {root}/input/old." in str(error.value)
    make(root / "input" / "a" / "texts"), make(root / "input" / "b" / "texts")
    with pytest.raises(UserError, match="2 folders fit: "):
        paths.find_input("datasets", "me/texts")
    for kind, name in (("dataset", "me/texts"), ("datasets", "texts"), ("models", "me/texts")):
        with pytest.raises(UserError, match="not the name of an input"):
            paths.find_input(kind, name)


def test_all_inputs_of_a_push_must_be_there(root, monkeypatch):
    paths.check_inputs()
    monkeypatch.setenv("JGPT_KAGGLE_INPUTS", "datasets me/texts,notebooks me/my-run")
    make(root / "input" / "datasets" / "me" / "texts")
    with pytest.raises(UserError, match="notebooks 'me/my-run' is not mounted"):
        paths.check_inputs()
    make(root / "input" / "notebooks" / "me" / "my-run")
    paths.check_inputs()


def test_runs_are_found_wherever_they_are_mounted_and_links_do_not_go_round(root):
    assert paths.find_runs(root / "input") == []
    old = make(root / "input" / "my-run", *RUN_FILES)
    new = make(root / "input" / "notebooks" / "me" / "my-run" / "outputs", *RUN_FILES)
    make(root / "input" / "models" / "me" / "model", "config.json")  # what a model of Hugging Face has
    (root / "input" / "notebooks" / "again").symlink_to(root / "input")
    assert paths.find_runs(root / "input") == [old, new]


def test_the_search_is_bounded(root, monkeypatch):
    make(root / "input" / Path(*"abcdefgh") / "outputs", *RUN_FILES)
    assert paths.find_runs(root / "input") == []
    monkeypatch.setattr(paths, "MOST_FOLDERS", 3)
    for name in "abcdef":
        (root / "input" / name / "x").mkdir(parents=True, exist_ok=True)
    assert len(list(paths.folders_below(root / "input"))) < 10


def test_the_text_of_a_resumed_run_is_the_text_of_the_first(root):
    """What the last session wrote is mounted beside the text, and it is text as well."""
    text = make(root / "input" / "datasets" / "me" / "texts", "a.txt") / "a.txt"
    pattern = f"{paths.input_dir()}/**/*.txt"
    assert find_files(pattern) == [text]
    outputs = make(root / "input" / "notebooks" / "me" / "my-run" / "outputs", *RUN_FILES, "samples.txt")
    make(outputs / "checkpoints" / "3", "more.txt")
    make(root / "input" / "flat", *RUN_FILES, "samples.txt")  # published as a dataset
    assert find_files(pattern) == find_files(str(root / "input")) == [text]
    assert find_files(f"{pattern},{outputs}/samples.txt") == [text, outputs / "samples.txt"]  # who names it means it
    assert find_files(f"{outputs}/*.txt") == [outputs / "samples.txt"]
    with pytest.raises(UserError, match="only files that a run of jgpt wrote"):
        find_files(f"{root}/input/notebooks/**/*.txt")


def test_the_config_for_kaggle_has_the_paths_of_the_machine(root):
    code = "import runpy; c = runpy.run_path('configs/kaggle_t4.py')['get_config']();"
    code += "print(c.out_dir, c.data.text_glob, c.data.cache_dir)"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert found.stdout.split() == [f"{root}/working/outputs", f"{root}/input/**/*.txt", f"{root}/temp/jgpt/tokens"]
