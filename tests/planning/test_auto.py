"""Micro-batch and remat that the config leaves to the device: found once, remembered, kept by a resumed run."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.model.shapes import model_config
from jgpt.parallel.devices import training_devices
from jgpt.planning import auto
from jgpt.planning.auto import choose_execution, is_auto, with_execution_of_run
from jgpt.planning.estimate import least_bytes
from jgpt.planning.execution import Execution, execution_of
from jgpt.planning.search import Search, space_of
from jgpt.run_dir.identity import write_identity


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jgpt" / "chosen.json"


@dataclass(frozen=True)
class Step:
    """A made-up step: everything fits, and the largest micro-batch without recomputation is the best."""

    execution: Execution
    peak: int = 1
    state: int = 1
    seconds: float | None = None
    tokens_per_second: float | None = None


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[ConfigDict]:
    """Count the searches; what they try is not compiled."""
    seen: list[ConfigDict] = []

    def without_compiling(config: ConfigDict, shapes, target, on_compiled) -> Search[Step]:
        seen.append(config)
        found = Search(Step, space_of(config, shapes, target, everything=False), limit=10)
        found.fastest()
        return found

    monkeypatch.setattr(auto, "search", without_compiling)
    return seen


def config_of(**changes) -> ConfigDict:
    config = default_config()
    small = {
        "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16, "model.context_length": 8,
        "batch.global_batch_size": 8, "execution.micro_batch_size": 0, "execution.remat": "auto",
    }  # fmt: skip
    config.update_from_flattened_dict(small | changes)
    return config


def chosen(config: ConfigDict) -> ConfigDict:
    return choose_execution(config, model_config(config.model, 50), training_devices(config))


def test_it_searches_once_and_remembers(cache: Path, searches: list, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jgpt")
    first = chosen(config_of())
    assert execution_of(first) == (
        4,
        "none",
        2048,
        "auto",
        "auto",
    )  # a share of the batch in one piece: there is room for it
    assert not is_auto(first) and len(searches) == 1 and len(json.loads(cache.read_text())) == 1
    assert (
        "chosen for" in caplog.text
        and "--config.execution.micro_batch_size=4 --config.execution.remat=none" in caplog.text
    )
    assert execution_of(chosen(config_of())) == execution_of(first) and len(searches) == 1
    assert "as found before" in caplog.text
    chosen(config_of(**{"model.d_model": 32}))  # another model is another question
    assert len(searches) == 2 and len(json.loads(cache.read_text())) == 2


def test_an_unreadable_cache_is_ignored(cache: Path, searches: list):
    cache.parent.mkdir(parents=True)
    for content in ("", "[]", '{"a": 1}', '{"a": [1]}', '{"a": ["x", "none", 3, "chunked_vjp"]}', "\x00\xff", "{"):
        cache.write_text(content)
        assert auto._read_cache() == {}
    chosen(config_of())
    assert len(searches) == 1 and len(json.loads(cache.read_text())) == 1


def test_where_nothing_can_be_remembered_it_still_searches(cache: Path, searches: list):
    cache.parent.parent.write_text("a file where the directory would be")
    assert execution_of(chosen(config_of())).micro_batch_size == 4


def test_only_what_is_asked_for_is_chosen(cache: Path, searches: list):
    assert execution_of(chosen(config_of(**{"execution.remat": "block"}))) == (4, "block", 2048, "auto", "auto")
    assert execution_of(chosen(config_of(**{"execution.micro_batch_size": 2}))) == (2, "none", 2048, "auto", "auto")
    config = config_of(**{"execution.micro_batch_size": 2, "execution.remat": "dots"})
    assert chosen(config) is config and len(searches) == 2


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(cache: Path, monkeypatch: pytest.MonkeyPatch):
    machine, config = auto.this_machine, config_of()
    least = least_bytes(config, model_config(config.model, 50), machine(training_devices(config)))
    monkeypatch.setattr(auto, "this_machine", lambda devices: replace(machine(devices), memory_bytes=least + 1000))
    with pytest.raises(
        UserError, match=r"does not fit.*micro_batch_size=1 --config.execution.remat=.*GiB.*Take a smaller model"
    ):
        chosen(config_of())
    assert not cache.exists()


def test_processes_choose_by_the_smallest_device_of_all(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Where they chose different gathers, or searched in different orders, they would wait for each other for ever."""
    machine, config = auto.this_machine, config_of()
    config.execution.update(parallel="fsdp", gather="auto", micro_batch_size=1, remat="none")
    here = machine(training_devices(config))
    step = choose_execution(config, model_config(config.model, 50), here.devices)
    assert execution_of(step).gather == "step"
    monkeypatch.setattr(auto, "gather_texts", lambda memory: [memory, "1000"])  # another process has a smaller device
    assert execution_of(choose_execution(config, model_config(config.model, 50), here.devices)).gather == "layer"


def test_a_resumed_run_keeps_what_it_started_with(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    asked = config_of()
    assert with_execution_of_run(asked, run_dir) is asked  # there is no run yet
    write_identity(run_dir, execution_of(asked)._replace(micro_batch_size=2, remat="dots").put_into(asked))
    assert execution_of(with_execution_of_run(asked, run_dir)) == (2, "dots", 2048, "auto", "auto")
    own = with_execution_of_run(config_of(**{"execution.remat": "block"}), run_dir)
    assert execution_of(own) == (2, "block", 2048, "auto", "auto")
    versions = run_dir / "versions.json"
    versions.write_text(versions.read_text().replace(f"{len(jax.local_devices())} x", "7 x"))
    assert with_execution_of_run(asked, run_dir) is asked  # other devices, another question
    versions.write_text("{")
    assert with_execution_of_run(asked, run_dir) is asked


def test_a_run_that_chooses_is_the_run_that_was_given_the_same(
    command, tiny: list[str], trained: Path, tmp_path: Path, cache: Path, searches: list
):
    """To the last bit of every loss; and it needs no second search to go on, even where none is remembered."""

    def losses(run_dir: Path) -> list[tuple]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]

    flags = "execution.micro_batch_size=auto", "execution.remat=auto", "sample.num_samples=0"
    for _ in range(2):
        result = command("train", *tiny, *(f"--config.{flag}" for flag in flags))
        assert result.code == 0, result.err
        assert "changed since this run was last started: batch" not in result.out
        cache.unlink(missing_ok=True)  # as on another machine
    assert losses(tmp_path / "run") == losses(trained)  # whose config says 2 and none
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["execution"]
    assert (recorded["micro_batch_size"], recorded["remat"], len(searches)) == (2, "none", 1)
