"""Models on disk by their names: adapters with their base, the files' fingerprint, and what is told when they moved."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.exchange.pretrained import open_pretrained
from jgpt.exchange.write_model import export_model
from jgpt.loading.load import import_model, load_model
from jgpt.loading.source import Source, load_params, open_source
from jgpt.model.lora import lora_config
from jgpt.model.parameters import abstract_adapters
from jgpt.run_dir.identity import look_for_run, read_config
from jgpt.run_dir.params import restore_params


def as_stored(source: Source) -> Any:
    return load_params(source, np.float32, lambda path, array: array)


def assert_same(a: Any, b: Any) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the trained run in Hugging Face's layout."""
    source, out = open_source(str(trained)), tmp_path_factory.mktemp("exported") / "model"
    rows = source.shapes.vocab_size
    export_model(out, as_stored(source), source.shapes, source.tokenizer, vocab_size=rows, stop_ids=(3,), dtype="fp32")
    return out


def test_a_run_and_its_export_are_one_model(trained: Path, exported: Path):
    run, theirs = open_source(str(trained)), open_source(str(exported))
    assert_same(as_stored(run), as_stored(theirs))
    assert (run.step, theirs.step) == (4, None)
    assert run.tokenizer.encode("12 times 3").tolist() == theirs.tokenizer.encode("12 times 3").tolist()
    assert run.stop_ids == (run.tokenizer.eot_id,) and set(theirs.stop_ids) == {3, run.tokenizer.eot_id}
    with pytest.raises(UserError, match="a step was given, and .* is no run directory"):
        open_source(str(exported), 4)


def test_a_lora_run_is_its_base_with_the_adapters_merged(adapted: Path):
    run, base = adapted / "run", adapted / "base"
    source = open_source(str(run))
    assert source.base is not None and source.base.directory == base
    merged, plain = as_stored(source), as_stored(open_source(str(base)))
    scale = source.config.lora.alpha / source.config.lora.rank
    files = run / "checkpoints"
    lora = lora_config(source.config.lora)
    assert lora is not None
    abstract = abstract_adapters(source.shapes, lora)
    adapter = restore_params(files, 4, abstract, lambda path, array: array)["h_0"]["mlp"]["down"]
    np.testing.assert_allclose(
        merged["h_0"]["mlp"]["down"]["kernel"],
        plain["h_0"]["mlp"]["down"]["kernel"] + scale * (adapter["a"] @ adapter["b"]).T,
        atol=1e-6,
    )
    assert np.abs(adapter["b"]).max() > 0.01
    assert_same({k: merged[k] for k in ("norm", "wte")}, {k: plain[k] for k in ("norm", "wte")})
    assert sum(f.stat().st_size for f in (files / "4" / "params").rglob("*")) < sum(
        f.stat().st_size for f in (base / "checkpoints" / "4" / "params").rglob("*")
    )


def test_the_base_may_move_and_must_be_the_same(adapted: Path, trained: Path, tmp_path: Path):
    run, base = (shutil.copytree(adapted / name, tmp_path / name) for name in ("run", "base"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"init_from": str(tmp_path / "gone")}))
    with pytest.raises(
        UserError,
        match=r"holds LoRA adapters.*looked for at .*/gone.*--base=DIR, or correct init_from in .*config.json",
    ):
        open_source(str(run))
    assert_same(as_stored(open_source(str(run), base=str(base))), as_stored(open_source(str(adapted / "run"))))
    for step in (2, 4):
        manifest = base / "checkpoints" / f"{step}.sha256"
        manifest.write_text(manifest.read_text().replace("a", "b"))
    with pytest.raises(UserError, match="holds another model than the one that this run began from"):
        open_source(str(run), base=str(base))


def test_a_base_that_was_trained_on_is_still_found(adapted: Path, tmp_path: Path):
    """Its fingerprint is that of the checkpoint which the run began from, not that of the newest."""
    base = shutil.copytree(adapted / "base", tmp_path / "base")
    fingerprints = [open_source(str(base), step).fingerprint for step in (2, 4)]
    assert len(set(fingerprints)) == 2
    assert [open_source(str(base), fingerprint=one).step for one in fingerprints] == [2, 4]


@pytest.mark.parametrize(
    ("group", "key", "value", "part"),
    [
        ("model", "n_heads", 0, "model.n_heads=0: it must be 1 to 4,096"),
        ("model", "n_layers", 10**9, "model.n_layers=1000000000: it must be 1 to 1,000"),
        ("model", "n_layers", None, "model.n_layers=None"),
        ("model", "d_model", "16", "is damaged"),
        ("model", "d_model", 32, "norm/scale [16] where config.json describes [32]"),
        ("model", "n_layers", 2, "h_1/attn/proj/kernel missing where config.json describes [16, 16]"),
    ],
)
def test_a_runs_own_config_is_checked_as_a_users(own_run: Path, group: str, key: str, value: Any, part: str):
    config = json.loads((own_run / "config.json").read_text())
    config[group][key] = value
    (own_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json") as error:
        as_stored(open_source(str(own_run)))
    assert part in str(error.value)


def test_fingerprint_of_an_hf_directory_is_that_of_its_content(exported: Path, tmp_path: Path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    first = open_source(str(exported)).fingerprint
    assert open_source(str(copy), fingerprint=first).fingerprint == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="holds another model"):
        open_source(str(copy), fingerprint=first)


@pytest.mark.parametrize("params", ["fp32", "fp16"])
def test_an_imported_model_is_a_run_to_begin_from(exported: Path, tmp_path: Path, params: str):
    import_model(open_pretrained(exported), tmp_path / "run", params)
    source = open_source(str(tmp_path / "run"))
    dtype = {"fp32": np.float32, "fp16": np.float16}[params]
    expected = jax.tree.map(
        lambda x: x.astype(dtype if x.ndim > 1 else np.float32), as_stored(open_source(str(exported)))
    )
    assert_same(load_params(source, dtype, lambda path, array: array), expected)
    assert (source.step, source.stop_ids) == (0, open_source(str(exported)).stop_ids)
    with pytest.raises(UserError, match="imported model: its checkpoint has no optimizer state.*--config.init_from="):
        look_for_run(tmp_path / "run", read_config(tmp_path / "run"))
    with pytest.raises(UserError, match="holds a run or an imported model"):
        import_model(open_pretrained(exported), tmp_path / "run", params)


def test_values_past_fp16_are_named(exported: Path, tmp_path: Path):
    """A model kept in bf16 or fp32 that is loaded for a T4."""
    run = tmp_path / "run"
    import_model(open_pretrained(exported), run, "fp32")
    loaded = load_model(str(run))
    assert loaded.policy.compute == np.float32 and loaded.step == 0

    def hot(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
        return array * (1e6 if path == ("wte", "embedding") else 1)

    from jgpt.run_dir.params import save_params

    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    save_params(run / "checkpoints", 0, load_params(open_source(str(exported)), np.float32, hot), {"step": 0})
    with pytest.raises(UserError, match="wte/embedding does not fit in fp16"):
        load_params(open_source(str(run)), np.float16, lambda path, array: array)
