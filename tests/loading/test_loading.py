"""Models by name: what is loaded is what was trained."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.loading import load
from jgpt.loading.load import LoadedModel, load_model
from jgpt.model.parameters import count_parameters


def test_load_model_is_the_run(trained: Path):
    loaded = load_model(str(trained))
    assert (
        loaded.step == 4
        and loaded.val_loss is not None
        and loaded.tokenizer.vocab_size <= loaded.model.config.vocab_size
    )
    assert all(leaf.devices() == {jax.local_devices()[0]} for leaf in jax.tree.leaves(loaded.params))
    assert count_parameters(loaded.model.config) == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert load_model(str(trained), 2).step == 2


def test_two_devices_share_what_one_holds(trained: Path):
    one, two = (load_model(str(trained), devices=n) for n in ("1", "2"))
    tokens = np.arange(12).reshape(1, -1) % 9

    def hidden(loaded: LoadedModel) -> np.ndarray:
        output: Any = jax.jit(lambda p: loaded.model.apply({"params": p}, tokens))(loaded.params)
        return np.asarray(output.hidden)

    assert not two.params["h_0"]["attn"]["qkv"]["kernel"].is_fully_replicated
    np.testing.assert_allclose(hidden(one), hidden(two), atol=1e-5)


@pytest.mark.parametrize("when", ["open_source", "load_params"])
def test_a_run_that_deletes_the_checkpoint_that_is_read(own_run: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    """As training does, when it has saved the next one: the model is that one, and nothing is called damaged."""
    checkpoints, real = own_run / "checkpoints", getattr(load, when)
    newest = [path.rename(own_run / path.name) for path in (checkpoints / "4", checkpoints / "4.sha256")]

    def read(*arguments: Any, **options: Any) -> Any:
        if newest:
            found = real(*arguments, **options) if when == "open_source" else None
            for path in (newest.pop(), newest.pop()):
                path.rename(checkpoints / path.name)
            shutil.rmtree(checkpoints / "2")
            (checkpoints / "2.sha256").unlink()
            if found:
                return found
        return real(*arguments, **options)

    monkeypatch.setattr(load, when, read)
    assert load_model(str(own_run)).step == 4


def test_load_model_refuses(own_run: Path, tmp_path: Path):
    with pytest.raises(UserError, match="there is no directory"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"step 3 is not among the checkpoints of .*Allowed: 2, 4\."):
        load_model(str(own_run), 3)
    (own_run / "checkpoints" / "4" / "params" / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint 4 in .* is damaged: .*_METADATA\. .*--step.*2"):
        load_model(str(own_run))
    assert load_model(str(own_run), 2).step == 2
    for step in (2, 4):
        (own_run / "checkpoints" / f"{step}.sha256").unlink()
    with pytest.raises(UserError, match="holds no trained model"):
        load_model(str(own_run))
