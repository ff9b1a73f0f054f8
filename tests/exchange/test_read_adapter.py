"""Adapters in PEFT's layout as a model: the same logits as the run that they come from, and what is refused by name."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import FROM_A_MODEL, LORA, small_run
from safetensors.numpy import load_file, save_file

import jgpt
from jgpt.errors import UserError
from jgpt.exchange.read_adapter import check_adapter, load_adapter, open_adapter
from jgpt.exchange.tensors import prefix, table
from jgpt.exchange.write_adapter import adapter_config, adapter_tensors
from jgpt.loading.source import load_params, open_source
from jgpt.model.lora import LoRA, merge
from jgpt.model.parameters import abstract_adapters, abstract_params
from jgpt.model.shapes import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LLAMA = ModelConfig(40, 12, n_layers=2, n_heads=6, n_kv_heads=2, d_model=20, d_head=4, d_ff=28)
GPT2 = ModelConfig(40, 12, 2, 4, 4, 16, 4, 32, position="learned", norm="layernorm", mlp="gelu", bias=True)
FAMILIES = pytest.mark.parametrize(("family", "shapes"), [("llama", LLAMA), ("gpt2", GPT2)])


def random(abstract: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)


def written(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """Write a directory as PEFT does, with what LoraConfig says where nobody has chosen."""
    defaults = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base", "r": 3,
        "lora_alpha": 8, "bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "loftq_config": {}, "lora_bias": False,
        "target_modules": ["q_proj"], "fan_in_fan_out": False, "peft_version": "0.19.0",
    }  # fmt: skip
    directory.mkdir()
    (directory / CONFIG).write_text(json.dumps(defaults | config))
    save_file(tensors, directory / WEIGHTS)
    return directory


def kernels(params: Any, shapes: ModelConfig, family: str) -> dict[str, np.ndarray]:
    """Return the weights of all linear layers, as transformers has them, by PEFT's names of the layers."""
    found = {}
    for entry in table(family, shapes):
        if entry.path[-1] == "kernel":
            leaf = params
            for key in entry.path:
                leaf = leaf[key]
            for name, array in zip(entry.names, entry.split(leaf), strict=True):
                found[f"base_model.model.{prefix(family)}{name.removesuffix('.weight')}"] = array
    return found


@FAMILIES
@pytest.mark.parametrize("targets", ["qkv,proj,gate_up,up,down", "qkv", "down"])
def test_what_was_written_is_read_back(family: str, shapes: ModelConfig, targets: str, tmp_path: Path):
    lora = LoRA(3, 7.5, 0.1, tuple(targets.split(",")))
    adapters = random(abstract_adapters(shapes, lora), 1)
    tensors = dict(adapter_tensors(adapters, shapes, family))
    adapter = open_adapter(written(tmp_path / "out", tensors, **adapter_config(list(tensors), lora, family, "base")))
    check_adapter(adapter, shapes, family)
    found = load_adapter(adapter, shapes, family)
    assert (adapter.base, adapter.lora.rank, adapter.lora.scale) == ("base", 3, 2.5)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)


@FAMILIES
@pytest.mark.parametrize("rslora", [False, True])
def test_pairs_of_each_layer_are_added_to_its_weight(family: str, shapes: ModelConfig, rslora: bool, tmp_path: Path):
    """PEFT trains a lora_A of its own for each of query, key and value, and for some of the layers only."""
    params, rng, tensors = random(abstract_params(shapes), 0), np.random.default_rng(1), {}
    before = kernels(params, shapes, family)
    chosen = [name for name in before if not name.endswith(("k_proj", "up_proj"))]
    for name in chosen:
        outputs, inputs = before[name].shape[::-1] if family == "gpt2" else before[name].shape
        tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.3, (3, inputs)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.3, (outputs, 3)).astype(np.float32)
    adapter = open_adapter(written(tmp_path / "out", tensors, use_rslora=rslora))
    check_adapter(adapter, shapes, family)
    adapters = load_adapter(adapter, shapes, family)
    merged = jax.tree_util.tree_map_with_path(
        lambda path, x: merge(tuple(key.key for key in path), x, adapters, adapter.lora), params
    )
    for name, after in kernels(merged, shapes, family).items():
        expected = before[name]
        if name in chosen:
            update = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            scaled = update * 8 / (math.sqrt(3) if rslora else 3)
            expected = expected + (scaled.T if family == "gpt2" else scaled)
        np.testing.assert_allclose(after, expected, atol=1e-5)


@pytest.fixture(scope="module")
def hugging_face(command, adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the run of adapters (`run`), what convert writes of it (`adapter`), and its base (`base`).

    The base is a Hugging Face directory, as that of nearly all adapters.
    """
    root = tmp_path_factory.mktemp("peft")
    assert command("convert", "export", str(adapted / "base"), str(root / "base")).code == 0
    done = command("train", *small_run(root), *FROM_A_MODEL, *LORA, f"--config.init_from={root / 'base'}")
    assert done.code == 0, done.err
    assert command("convert", "adapter", str(root / "run"), str(root / "adapter")).code == 0
    return root


def logits(name: Path, **how: Any) -> np.ndarray:
    model = jgpt.load(name, **how)
    output: Any = model.loaded.model.apply({"params": model.loaded.params}, np.arange(14).reshape(2, 7))
    return np.asarray(output.hidden @ model.loaded.params["wte"]["embedding"].T)


def test_an_adapter_of_a_run_has_the_logits_of_the_run(hugging_face: Path):
    expected = logits(hugging_face / "run")
    np.testing.assert_array_equal(logits(hugging_face / "adapter"), expected)
    assert np.abs(expected - logits(hugging_face / "base")).max() > 0.01


def test_an_adapter_to_a_run_of_ours(command, adapted: Path, tmp_path: Path):
    assert command("convert", "adapter", str(adapted / "run"), str(tmp_path / "adapter")).code == 0
    np.testing.assert_array_equal(logits(tmp_path / "adapter"), logits(adapted / "run"))
    source = open_source(str(tmp_path / "adapter"))
    assert Path(source.tokenizer_directory) == tmp_path / "adapter"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).unlink()
    assert Path(open_source(str(tmp_path / "adapter")).tokenizer_directory) == adapted / "base" / "tokenizer"
    np.testing.assert_array_equal(logits(tmp_path / "adapter"), logits(adapted / "run"))


def test_the_commands_take_it(command, hugging_face: Path, tiny: list[str], tmp_path: Path):
    adapter = hugging_face / "adapter"
    texts = [
        command("generate", f"--model={name}", "--prompt=12 times", "--max_new_tokens=8")
        for name in (adapter, hugging_face / "run")
    ]
    assert texts[0].code == 0, texts[0].err
    assert texts[0].out == texts[1].out
    text = next(Path(argument.split("=", 1)[1]) for argument in tiny if "text_glob" in argument)
    measured = [
        command("evaluate", f"--model={name}", f"--text_glob={text}").out for name in (adapter, hugging_face / "run")
    ]
    assert measured[0].splitlines()[-1] == measured[1].splitlines()[-1] and "loss" in measured[0]
    assert "is no run: it has no validation split" in command("evaluate", f"--model={adapter}").err

    assert command("convert", "export", str(adapter), str(tmp_path / "merged")).code == 0
    np.testing.assert_allclose(logits(tmp_path / "merged"), logits(adapter), atol=1e-6)
    begun = command("train", *tiny, *FROM_A_MODEL, *LORA, f"--config.init_from={adapter}")
    assert begun.code == 0, begun.err
    assert command("generate", f"--model={tmp_path / 'run'}", "--max_new_tokens=2").code == 0
    for action, part in (
        ("import", f"python -m jgpt.convert export {adapter} NEW_DIR"), ("adapter", "in PEFT's layout already"),
    ):  # fmt: skip
        refused = command("convert", action, str(adapter), str(tmp_path / "out"))
        assert refused.code == 2 and part in refused.err and "Traceback" not in refused.err


def test_the_base_may_be_elsewhere_and_must_fit(command, hugging_face: Path, adapted: Path, tmp_path: Path):
    adapter = shutil.copytree(hugging_face / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())

    def refused(where: str, *arguments: str) -> str:
        (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": where}))
        result = command("generate", f"--model={adapter}", *arguments)
        assert result.code == 2 and "Traceback" not in result.err, result.err
        return result.err

    gone = refused(f"{tmp_path}/gone")
    assert f"looked for at {tmp_path}/gone" in gone and "there is no directory" in gone
    assert f"--base=DIR, or correct base_model_name_or_path in {adapter / CONFIG}" in gone
    expected = logits(hugging_face / "run")
    np.testing.assert_array_equal(logits(adapter, base=hugging_face / "base"), expected)
    assert "does not name the model that the adapters belong to" in refused("")
    assert "holds adapters of PEFT. Needed: a whole model" in refused(str(adapter))
    other = json.loads((hugging_face / "base" / "config.json").read_text()) | {"intermediate_size": 8}
    shutil.copytree(hugging_face / "base", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(other))
    assert "intermediate_size" not in (found := refused(str(tmp_path / "other"))) and "wanted: [8, 16]" in found

    # Below a directory, as Kaggle mounts them.
    refused("")
    (tmp_path / "input").mkdir()
    shutil.move(adapter, tmp_path / "input" / "adapter")
    np.testing.assert_array_equal(logits(tmp_path / "input", base=hugging_face / "base"), expected)


def test_an_adapter_has_a_fingerprint_of_its_own_and_its_bases(hugging_face: Path, tmp_path: Path):
    base, adapter = (shutil.copytree(hugging_face / name, tmp_path / name) for name in ("base", "adapter"))
    first = open_source(str(adapter), base=str(base)).fingerprint
    assert open_source(str(hugging_face / "adapter")).fingerprint == first
    tensors = load_file(base / "model.safetensors")
    save_file({name: x * 2 for name, x in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds another model"):
        open_source(str(adapter), base=str(base), fingerprint=first)


def test_weights_are_cast_once_after_the_sum(hugging_face: Path):
    source = open_source(str(hugging_face / "adapter"))
    exact, half = (
        load_params(source, dtype, lambda path, x: x)["h_0"]["mlp"]["down"]["kernel"]
        for dtype in (np.float32, np.float16)
    )
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, exact, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type='PREFIX_TUNING'. Allowed: 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'. Allowed: 'CAUSAL_LM'"),
        ({"use_dora": True}, "use_dora=True. Allowed: False"),
        ({"bias": "lora_only"}, "bias='lora_only'. Allowed: 'none'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']. Allowed: []"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern={'q_proj': 8}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"r": 0}, "r=0. Allowed: a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha='16'. Allowed: a number above 0"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3. Allowed: a text"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(change: dict[str, Any], part: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        open_adapter(written(tmp_path / "out", {}, **change))
    assert part in str(error.value) and f"{tmp_path / 'out'}: its {CONFIG} has" in str(error.value)
    assert f"from_pretrained({str(tmp_path / 'out')!r}).merge_and_unload()" in str(error.value)


def test_what_is_not_in_the_layers_is_refused_by_name(tmp_path: Path):
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_A.weight": np.zeros((3, 20), "f"), f"{layer}.lora_B.weight": np.zeros((24, 3), "f")}
    for number, (tensors, part) in enumerate([
        ({}, "it is empty"),
        ({f"{layer}.lora_A.weight": pair[f"{layer}.lora_A.weight"]}, f"{layer}.lora_B.weight is missing"),
        (pair | {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 20), "f")}, "lm_head.lora_A.weight [3, 20] is"),
        (pair | {f"{layer}.lora_magnitude_vector": np.zeros(24, "f")}, "q_proj.lora_magnitude_vector [24] is no"),
        (pair | {f"{layer}.lora_A.weight": np.zeros((2, 20), "f")}, "is [2, 20] of F32 (wanted: [3, 20] of F32"),
        (pair | {f"{layer}.lora_A.weight": np.zeros((3, 20), np.int8)}, "is [3, 20] of I8 (wanted"),
    ]):  # fmt: skip
        adapter = open_adapter(written(tmp_path / str(number), tensors))
        with pytest.raises(UserError) as error:
            check_adapter(adapter, LLAMA, "llama")
        assert part in str(error.value) and "merge_and_unload" in str(error.value)


def test_damaged_files(tmp_path: Path):
    (out := written(tmp_path / "out", {}) / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        open_adapter(out.parent)
    out.unlink()
    (out.parent / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"has adapter_config.json and no adapter_model.safetensors.*never opened"):
        open_adapter(out.parent)
    (out.parent / CONFIG).write_text("[]")
    with pytest.raises(UserError, match="adapter_config.json is not a JSON object"):
        open_adapter(out.parent)
