"""From a config to the parts of a run: the arithmetic of a batch, the sizes, what is refused before the first step."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batches
from jgpt.data.token_files import TokenData
from jgpt.data.tokenizer import train_char
from jgpt.data.words import BEGINS, LEARNED
from jgpt.errors import UserError
from jgpt.loading.adopt import adopt_source
from jgpt.model.parameters import abstract_params, count_parameters, flops_per_token
from jgpt.model.shapes import ModelConfig, model_config
from jgpt.parallel import build
from jgpt.parallel import devices as devices_module
from jgpt.parallel.strategy import laid_out
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.identity import read_config
from jgpt.step.state import tree_bytes
from jgpt.training.setup import Setup, check_disk, set_up

GPT2 = ModelConfig(
    50304, 1024, 12, 12, 12, 768, 64, 3072, position="learned", norm="layernorm", mlp="gelu", bias=True
)  # fmt: skip


def config_of(**changes: Any) -> ConfigDict:
    config = default_config()
    small = {"model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16, "model.context_length": 8, "eval.batches": 1}
    config.update_from_flattened_dict(small | changes)
    return config


def data_of(n_ids: int = 50, n_tokens: int = 2000) -> TokenData:
    tokens = np.random.default_rng(0).integers(0, n_ids, n_tokens).astype(np.uint16)
    return TokenData(tokens, tokens[:500], {}, SimpleNamespace(vocab_size=n_ids))  # type: ignore[arg-type]


def set_up_of(config: ConfigDict) -> Setup:
    return set_up(config, data_of(), devices_module.training_devices(config))


def batch_of(training: Setup, step: int) -> Any:
    return training.parts.strategy.place_batch(training.batches.batch(step), training.parts.accumulation)


def test_characters_of_the_prompt_for_samples_that_the_vocabulary_lacks_are_named(caplog: Any) -> None:
    data = dataclasses.replace(data_of(28), tokenizer=train_char(["abcdefghijklmnopqrstuvwxyz"]))
    set_up(config_of(**{"sample.prompt": "what?"}), data, devices_module.training_devices(config_of()))
    assert "1 character of sample.prompt is not in the model's vocabulary, which sees each as <unk>: '?'" in caplog.text


def test_a_prompt_for_samples_that_the_chat_template_refuses_ends_the_run_before_its_first_step() -> None:
    words = np.full(2000, 7 | LEARNED, np.uint32)
    words[::5] = 7 | BEGINS
    tokenizer = train_char(["abcdefghijklmnopqrstuvwxyz"])
    tokenizer.settings["chat_template"] = "{{ raise_exception('a system message comes first') }}"
    data = TokenData(words, words[:500], {"format": "chat"}, tokenizer)
    with pytest.raises(UserError, match="does not render these messages .TemplateError: a system message"):
        set_up(config_of(**{"sample.prompt": "what"}), data, devices_module.training_devices(config_of()))


@pytest.fixture
def with_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let set_up see so many devices; it only counts them."""

    def pretend(n: int) -> None:
        devices = jax.local_devices()
        monkeypatch.setattr(devices_module, "training_devices", lambda config: [devices[i % 2] for i in range(n)])
        if n > 2:
            monkeypatch.setattr(build, "Replicate", lambda devices: SimpleNamespace(
                devices=devices, shares=n, model_for_step=lambda model, policy: model,
                train_step=lambda step: step, eval_step=lambda step: step,
                place_batch=lambda batch, accumulation: laid_out(batch, n, accumulation),
            ))  # fmt: skip

    return pretend


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
def test_rows_times_accumulation_times_devices_is_the_global_batch(devices: int, with_devices: Callable[[int], None]):
    with_devices(devices)
    for size, micro in [(24, 24), (24, 1), (24, 2), (24, 3), (24, 4), (24, 12), (48, 16), (240, 5), (72, 36)]:
        training = set_up_of(config_of(**{"batch.global_batch_size": size, "execution.micro_batch_size": micro}))
        assert training.parts.rows * training.parts.accumulation * devices == size
        assert training.parts.rows <= micro
        share = size // devices
        assert training.parts.rows == max(n for n in range(1, micro + 1) if share % n == 0)  # as large as allowed
        assert training.parts.tokens_per_step == size * 8
        assert batch_of(training, 0).tokens.shape == (devices, training.parts.accumulation, training.parts.rows, 9)


@pytest.mark.parametrize("step", [0, 7])
def test_global_batch_does_not_depend_on_devices_or_micro_batches(step: int, with_devices: Callable[[int], None]):
    """The same rows in the same order, only cut otherwise."""
    seen = []
    for devices, micro in [(1, 24), (1, 2), (2, 12), (2, 3), (4, 6), (8, 1)]:
        with_devices(devices)
        training = set_up_of(config_of(**{"batch.global_batch_size": 24, "execution.micro_batch_size": micro}))
        seen.append(np.asarray(batch_of(training, step).tokens).reshape(24, 9))
    for batch in seen:
        np.testing.assert_array_equal(batch, seen[0])
    np.testing.assert_array_equal(seen[0], Batches(data_of().train, 1337, 24, 8, 64).batch(step).tokens)


def test_validation_blocks_are_as_many_as_planned():
    training = set_up_of(config_of(**{"batch.global_batch_size": 4, "eval.batches": 3}))
    assert [block.tokens.shape for block in training.val_blocks] == [(9,)] * 12
    assert len(set_up_of(config_of(**{"eval.batches": 9})).val_blocks) == 62  # all there are


def test_half_precision_parameters_come_with_a_warning(caplog: pytest.LogCaptureFixture):
    training = set_up_of(config_of(**{"precision.params": "bf16"}))
    assert "precision.params=bf16: updates smaller than" in caplog.text
    state = jax.eval_shape(training.parts.init)
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"bfloat16"}


def test_model_config_derives_what_is_zero():
    model = default_config().model
    model.update({"d_model": 768, "n_heads": 12})
    filled = model_config(model, 50257)
    assert (filled.d_head, filled.n_kv_heads, filled.vocab_size) == (64, 12, 50304)
    assert filled.d_ff == 2048 and model_config(model, 64).vocab_size == 64
    model.update({"mlp": "gelu", "n_kv_heads": 4, "d_head": 32, "vocab_size": 50257})
    filled = model_config(model, 50257)
    assert (filled.d_ff, filled.n_kv_heads, filled.d_head, filled.vocab_size) == (3072, 4, 32, 50257)
    model.update({"d_ff": 100, "vocab_size": 0, "vocab_multiple_of": 1})
    assert (model_config(model, 301).d_ff, model_config(model, 301).vocab_size) == (100, 301)


def test_swiglu_width_is_eight_thirds_rounded_up():
    model = default_config().model
    for width in (24, 192, 384, 768, 1000, 4096):
        model.d_model = width
        d_ff = model_config(model, 10).d_ff
        assert d_ff % 64 == 0 and 0 <= d_ff - 8 * width / 3 < 64


def test_a_vocabulary_below_the_tokenizers_is_refused():
    model = default_config().model
    model.vocab_size = 300
    with pytest.raises(UserError, match="vocab_size=300, and the tokenizer has 301 ids.*--config.model.vocab_size=0"):
        model_config(model, 301)
    assert model_config(model, 300).vocab_size == 300


def test_gpt2_124m_has_its_size_and_cost():
    """124,475,904: the published 124,439,808 and 47 rows more of the embedding; 0.855 GFLOP a token."""
    assert count_parameters(GPT2) == 124_439_808 + 47 * 768
    assert flops_per_token(GPT2) == pytest.approx(0.855e9, rel=0.01)


def test_flops_count_matrix_products_alone():
    """6 for each parameter that multiplies: looked-up tables are left out, whichever they are."""
    base = dataclasses.replace(GPT2, n_layers=2)
    untied = dataclasses.replace(base, tie_embeddings=False)
    assert flops_per_token(untied) == flops_per_token(base)
    assert count_parameters(untied) == count_parameters(base) + 50304 * 768
    rope = dataclasses.replace(base, position="rope")
    assert flops_per_token(rope) == flops_per_token(base)
    longer = dataclasses.replace(rope, context_length=2048)
    assert flops_per_token(longer) - flops_per_token(rope) == 12 * 2 * 768 * 1024
    names = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(untied))}
    assert {"wte/embedding", "wpe/embedding", "lm_head/embedding", "h_1/mlp/down/bias"} <= names


@pytest.fixture(scope="module")
def abstract() -> Any:
    training = set_up_of(config_of(**{"model.d_model": 128, "model.n_layers": 2, "batch.global_batch_size": 2}))
    return jax.eval_shape(training.parts.init)


def test_check_disk_knows_the_size_of_a_checkpoint(tmp_path: Path, abstract: Any, monkeypatch: pytest.MonkeyPatch):
    """Against the files of a real one, moments as random as they become: within a tenth. And refuses just below it."""
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), abstract)
    checkpoints = Checkpoints(tmp_path / "measured", 1, False)
    checkpoints.save(state, {})
    checkpoints.close()
    on_disk = sum(path.stat().st_size for path in (tmp_path / "measured").rglob("*") if path.is_file())
    size = tree_bytes(abstract)
    assert abs(size / on_disk - 1) < 0.1
    options = default_config().checkpoint
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    for keep_last, keep_best in [(1, False), (2, True), (5, False)]:
        options.update({"keep_last": keep_last, "keep_best": keep_best})
        planned = keep_last + keep_best + 1  # one is being written
        free = planned * size
        check_disk(tmp_path, tree_bytes(abstract), options)
        free -= 1
        with pytest.raises(UserError, match=f"too small for the checkpoints planned: {planned} of .*keep_last=1"):
            check_disk(tmp_path, tree_bytes(abstract), options)


def test_check_disk_counts_what_the_old_checkpoints_hold(
    tmp_path: Path, abstract: Any, monkeypatch: pytest.MonkeyPatch
):
    """A run that goes on writes over its own."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=tree_bytes(abstract)))
    options = default_config().checkpoint
    options.update({"keep_last": 1, "keep_best": False})
    with pytest.raises(UserError):
        check_disk(tmp_path, tree_bytes(abstract), options)
    (tmp_path / "checkpoints" / "5" / "params").mkdir(parents=True)
    (tmp_path / "checkpoints" / "5" / "params" / "data").write_bytes(b"x" * tree_bytes(abstract))
    check_disk(tmp_path, tree_bytes(abstract), options)


def test_sequence_length_is_what_is_trained_on(trained: Path):
    """Batches, validation and FLOPs have it; the model sees its whole context."""
    whole = set_up_of(config_of())
    short = set_up_of(config_of(**{"batch.sequence_length": 4}))
    assert short.parts.model.config.context_length == 8 and short.parts.sequence_length == 4
    assert batch_of(short, 0).tokens.shape[-1] == 5 and all(len(block.tokens) == 5 for block in short.val_blocks)
    assert short.parts.tokens_per_step == whole.parts.tokens_per_step / 2
    assert (
        whole.parts.flops_per_token - short.parts.flops_per_token == 12 * 2 * 8 * 4
    )  # attention's: 12 L N H for each position


def test_frozen_matrices_cost_two_thirds():
    """Of 6 operations for a parameter 2 are its own gradient's; adapters have theirs."""
    attention = 12 * 12 * 768 * 1024
    assert flops_per_token(GPT2, 1000) == pytest.approx((flops_per_token(GPT2) - attention) * 2 / 3 + attention + 6000)


def from_trained(trained: Path, **changes: Any) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict({"init_from": str(trained)} | changes)
    return config


def test_init_from_settles_the_model_and_the_tokenizer(trained: Path, tmp_path: Path):
    given = from_trained(trained, **{"model.dropout": 0.2, "model.d_model": 16, "tokenizer.chat_template": "a.jinja"})
    config, source = adopt_source(given, tmp_path)
    assert source is not None and source.step == 4
    theirs = read_config(trained).model
    assert {**config.model, "dropout": 0.0} == dict(theirs) and config.model.dropout == 0.2
    assert (config.tokenizer.kind, config.tokenizer.pretrained) == ("hf", str(trained / "tokenizer"))
    assert config.tokenizer.chat_template == "a.jinja" and given.model.n_layers == 6
    untouched = default_config()
    assert adopt_source(untouched, tmp_path) == (untouched, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.d_model": 32, "model.context_length": 8},
            r"(?s)model.context_length: 8 .* has 16.*model.d_model: 32 ",
        ),
        ({"tokenizer.kind": "char"}, "tokenizer.kind: 'char' was given, the model has 'hf'"),
        ({"batch.sequence_length": 17}, "batch.sequence_length=17, and .* sees 16 tokens"),
        ({"init_from": "/nowhere/at/all"}, "there is no directory '/nowhere/at/all'"),
    ],
)
def test_what_contradicts_the_source_is_refused(changes: dict[str, Any], message: str, trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        adopt_source(from_trained(trained, **changes), tmp_path)


def test_adapters_need_a_layer_to_adapt():
    lora = {"init_from": "some/model", "lora.rank": 2}
    training = set_up_of(config_of(**lora, **{"lora.targets": "qkv, up"}))
    assert set(jax.eval_shape(training.parts.init).params["h_0"]) == {
        "attn"
    }  # the other name is of the other architecture
    with pytest.raises(UserError, match=r"lora.targets='up', .* has none of these layers.*gate_up"):
        set_up_of(config_of(**lora, **{"lora.targets": "up"}))


def test_a_model_without_a_home_is_refused_where_export_is_required():
    set_up_of(config_of(**{"export.require": True}))
    with pytest.raises(UserError, match="no Hugging Face architecture"):
        set_up_of(config_of(**{"export.require": True, "model.mlp": "gelu"}))
