"""Micro-batch and remat that the config leaves to the device: found once, remembered, kept by a run that goes on."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.model.shapes import model_config
from jgpt.parallel.build import training_devices
from jgpt.planning import auto
from jgpt.planning.auto import as_begun, is_auto, settle
from jgpt.planning.estimate import choice_of, least_bytes, with_choice
from jgpt.planning.search import search
from jgpt.run_dir.identity import write_identity


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jgpt" / "chosen.json"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[ConfigDict]:
    """Count the searches; they are real ones."""
    seen: list[ConfigDict] = []
    monkeypatch.setattr(auto, "search", lambda config, *rest: seen.append(config) or search(config, *rest))
    return seen


def config_of(**changes) -> ConfigDict:
    config = default_config()
    small = {
        "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16, "model.context_length": 8,
        "batch.global_batch_size": 8, "execution.micro_batch_size": 0, "execution.remat": "auto",
    }  # fmt: skip
    config.update_from_flattened_dict(small | changes)
    return config


def settled(config: ConfigDict) -> ConfigDict:
    return settle(config, model_config(config.model, 50), training_devices(config))


def test_it_searches_once_and_remembers(cache: Path, searches: list, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "jgpt")
    first = settled(config_of())
    assert choice_of(first) == (4, "none", 2048, "auto")  # a share of the batch in one piece: there is room for it
    assert not is_auto(first) and len(searches) == 1 and len(json.loads(cache.read_text())) == 1
    assert (
        "chosen for" in caplog.text
        and "--config.execution.micro_batch_size=4 --config.execution.remat=none" in caplog.text
    )
    assert choice_of(settled(config_of())) == choice_of(first) and len(searches) == 1
    assert "as found before" in caplog.text
    settled(config_of(**{"model.d_model": 32}))  # another model is another question
    assert len(searches) == 2 and len(json.loads(cache.read_text())) == 2


def test_a_damaged_memory_is_none(cache: Path, searches: list):
    cache.parent.mkdir(parents=True)
    for content in ("", "[]", '{"a": 1}', '{"a": [1]}', '{"a": ["x", "none", 3, "chunked_vjp"]}', "\x00\xff", "{"):
        cache.write_text(content)
        assert auto._remembered() == {}
    settled(config_of())
    assert len(searches) == 1 and len(json.loads(cache.read_text())) == 1


def test_where_nothing_can_be_remembered_it_still_searches(cache: Path, searches: list):
    cache.parent.parent.write_text("a file where the directory would be")
    assert choice_of(settled(config_of())).micro_batch_size == 4


def test_only_what_is_asked_for_is_chosen(cache: Path, searches: list):
    assert choice_of(settled(config_of(**{"execution.remat": "block"}))) == (4, "block", 2048, "auto")
    assert choice_of(settled(config_of(**{"execution.micro_batch_size": 2}))) == (2, "none", 2048, "auto")
    config = config_of(**{"execution.micro_batch_size": 2, "execution.remat": "dots"})
    assert settled(config) is config and len(searches) == 2


def test_a_model_that_cannot_fit_is_refused_with_the_numbers(cache: Path, monkeypatch: pytest.MonkeyPatch):
    machine, config = auto.this_machine, config_of()
    least = least_bytes(config, model_config(config.model, 50), machine(training_devices(config)))
    monkeypatch.setattr(auto, "this_machine", lambda devices: replace(machine(devices), memory_bytes=least + 1000))
    with pytest.raises(
        UserError, match=r"does not fit.*micro_batch_size=1 --config.execution.remat=.*GiB.*Take a smaller model"
    ):
        settled(config_of())
    assert not cache.exists()


def test_a_run_that_goes_on_keeps_what_it_began_with(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    asked = config_of()
    assert as_begun(asked, run_dir) is asked  # there is no run yet
    begun = with_choice(asked, choice_of(asked)._replace(micro_batch_size=2, remat="dots"))
    write_identity(run_dir, begun)
    assert choice_of(as_begun(asked, run_dir)) == (2, "dots", 2048, "auto")
    assert choice_of(as_begun(config_of(**{"execution.remat": "block"}), run_dir)) == (2, "block", 2048, "auto")
    versions = run_dir / "versions.json"
    versions.write_text(versions.read_text().replace(f"{len(jax.local_devices())} x", "7 x"))
    assert as_begun(asked, run_dir) is asked  # other devices, another question
    versions.write_text("{")
    assert as_begun(asked, run_dir) is asked


def test_training_chooses_records_and_goes_on_bit_for_bit(command, tiny, tmp_path, cache: Path, searches: list):
    """A run that chose, and goes on elsewhere, has the losses of one that was told: to the last bit."""

    def losses(name: str, *flags: str) -> list[float]:
        for steps in (2, 4):
            to_there = [f"--config.out_dir={tmp_path / name}", f"--config.optimizer.total_steps={steps}"]
            result = command("train", *tiny, *flags, *to_there)
            assert result.code == 0, result.err
            assert "changed since this run was last started: batch" not in result.out
            cache.unlink(missing_ok=True)  # as on another machine
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 4
        return [line[key] for line in lines for key in ("loss", "val_loss") if key in line]

    chosen = losses("chosen", "--config.execution.micro_batch_size=auto", "--config.execution.remat=auto")
    recorded = json.loads((tmp_path / "chosen" / "config.json").read_text())
    assert recorded["execution"]["micro_batch_size"] == 2 and recorded["execution"]["remat"] == "none"
    assert len(searches) == 1  # the run's own record is enough
    assert chosen == losses("told", "--config.execution.micro_batch_size=2")
