"""LoRA adapters for PEFT: the pairs make what a merger makes, and the cards of exports say what they came from.

PEFT itself opens them in test_against_transformers.py.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import FROM_A_MODEL, LORA
from huggingface_hub import metadata_load
from safetensors.numpy import load_file

from jgpt.exchange.model_card import describe_base, metadata
from jgpt.exchange.tensors import prefix, table
from jgpt.exchange.write_adapter import adapter_config, adapter_tensors
from jgpt.model.lora import LoRA, merge
from jgpt.model.parameters import abstract_adapters, abstract_params
from jgpt.model.shapes import ModelConfig

LLAMA = ModelConfig(40, 12, n_layers=2, n_heads=6, n_kv_heads=2, d_model=20, d_head=4, d_ff=28)
GPT2 = ModelConfig(40, 12, 2, 4, 4, 16, 4, 32, position="learned", norm="layernorm", mlp="gelu", bias=True)
CARD = (
    "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage:\n- en\n- de\ntags:\n- x\n---\n# Base\n"
)


def random(abstract: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("family", "shapes", "targets", "names"),
    [
        ("llama", LLAMA, "qkv,proj,gate_up,up,down", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("qwen3", replace(LLAMA, qk_norm=True), "qkv,down", "down_proj k_proj q_proj v_proj"),
        ("gpt2", GPT2, "qkv,proj,gate_up,up,down", "attn.c_proj c_attn c_fc mlp.c_proj"),
        ("gpt2", GPT2, "proj", "attn.c_proj"),
    ],
)
def test_the_pairs_make_the_weights_that_a_merger_makes(family, shapes, targets, names):
    lora = LoRA(3, 7.5, 0.0, tuple(targets.split(",")))
    params, adapters = random(abstract_params(shapes), 0), random(abstract_adapters(shapes, lora), 1)
    pairs = dict(adapter_tensors(adapters, shapes, family))
    config = adapter_config(list(pairs), lora, family, "base")
    assert config["target_modules"] == names.split() and config["fan_in_fan_out"] == (family == "gpt2")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 7.5, "base")
    changed = 0
    for entry in table(family, shapes):
        plain = params
        for key in entry.path:
            plain = plain[key]
        merged = entry.split(merge(entry.path, plain, adapters, lora))
        for name, before, after in zip(entry.names, entry.split(plain), merged, strict=True):
            layer = f"base_model.model.{prefix(family)}{name.removesuffix('.weight')}"
            if np.array_equal(before, after):
                assert f"{layer}.lora_A.weight" not in pairs
                continue
            a, b = pairs.pop(f"{layer}.lora_A.weight"), pairs.pop(f"{layer}.lora_B.weight")
            update = b @ a * lora.scale
            np.testing.assert_allclose(before + (update.T if family == "gpt2" else update), after, atol=1e-6)
            changed += 1
    assert pairs == {} and changed == shapes.n_layers * len(names.split())


@pytest.fixture(scope="module")
def base(command, trained, tmp_path_factory) -> Path:
    """Return the small run, exported, with the card of somebody else's model."""
    out = tmp_path_factory.mktemp("base") / "small"
    assert command("convert", "export", str(trained), str(out)).code == 0
    (out / "README.md").write_text(CARD)
    return out


def test_the_adapters_of_a_run_and_its_cards(command, base, tiny, tmp_path):
    done = command("train", *tiny, *FROM_A_MODEL, f"--config.init_from={base}", *LORA)
    assert done.code == 0, done.err
    result = command("convert", "adapter", str(tmp_path / "run"), str(tmp_path / "out"))
    assert result.code == 0, result.err
    assert f"LoRA adapters, fp32, 0.0 MB, for the base model {base}. To open it:" in result.out
    assert f'from_pretrained("{base}")' in result.out and f'(base, "{tmp_path}/out")' in result.out
    assert read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert command("convert", "export", str(tmp_path / "run"), str(tmp_path / "merged")).code == 0
    pairs, before = load_file(tmp_path / "out" / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name, after in load_file(tmp_path / "merged" / "model.safetensors").items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = pairs.pop(f"{layer}.lora_A.weight", None), pairs.pop(f"{layer}.lora_B.weight", None)
        update = 0 if a is None else b @ a * (read_json(tmp_path / "out" / "adapter_config.json")["lora_alpha"] / 2)
        np.testing.assert_allclose(before[name] + update, after, atol=1e-6)
        assert a is None or np.abs(update).max() > 1e-3
    assert pairs == {}
    half = command("convert", "adapter", str(tmp_path / "run"), str(tmp_path / 'ha"lf'), "--dtype=bf16", "--step=2")
    assert half.code == 0 and "bf16" in half.out and r'/ha\"lf")' in half.out
    assert (tmp_path / 'ha"lf' / "tokenizer.json").is_file()

    known = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["en", "de"]}
    for folder, library in (("out", "peft"), ("merged", "transformers")):
        card = (tmp_path / folder / "README.md").read_text()
        found = metadata_load(tmp_path / folder / "README.md")
        assert found is not None and found | known == found and found["library_name"] == library
        assert "base_model" not in found  # it has no name on the Hub
        assert "`small`" in card and str(base.parent) not in card and "under the licence [mine](LICENSE)" in card
    assert 'PeftModel.from_pretrained(base, "PATH")' in (tmp_path / "out" / "README.md").read_text()


def test_a_full_fine_tune_names_the_first_model_of_a_chain(command, base, trained, tmp_path):
    for name, began_from in (("first", base), ("second", tmp_path / "first")):
        run = shutil.copytree(trained, tmp_path / name)
        config = read_json(run / "config.json") | {"init_from": str(began_from)}
        (run / "config.json").write_text(json.dumps(config))
    assert command("convert", "export", str(tmp_path / "second"), str(tmp_path / "out")).code == 0
    assert "fine-tuned from `small`" in (tmp_path / "out" / "README.md").read_text()
    assert command("convert", "export", str(trained), str(tmp_path / "own")).code == 0
    assert metadata_load(tmp_path / "own" / "README.md") == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["jgpt"],
    }  # fmt: skip


def test_adapters_of_a_run_of_ours_name_what_to_export_first(command, adapted, tmp_path):
    result = command("convert", "adapter", str(adapted / "run"), str(tmp_path / "out"))
    assert result.code == 0 and f"jgpt.convert export {adapted / 'base'} NEW_DIR" in result.out, result.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "`jgpt convert export` makes of it" in card and "is not known here" in card and 'from_pretrained("BASE"' in card
    )


def test_what_is_refused(command, adapted, trained, tmp_path):
    for run, out, part in (
        (trained, tmp_path / "out", "holds no LoRA adapters, but all parameters of a model"),
        (adapted / "run", adapted, "exists and is not empty"),
    ):
        result = command("convert", "adapter", str(run), str(out))
        assert result.code == 2 and part in result.err and "Traceback" not in result.err, result.err


def test_a_base_of_the_hub_is_named_in_the_metadata(tmp_path, caplog):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "a.md").write_text(metadata(describe_base("owner/Base-1B", tmp_path), is_adapter=True))
    assert metadata_load(tmp_path / "a.md") == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["jgpt", "lora"], "license": "other",
        "license_name": "mine", "license_link": "https://huggingface.co/owner/Base-1B/blob/main/LICENSE",
        "language": ["en", "de"], "base_model": "owner/Base-1B", "base_model_relation": "adapter",
    }  # fmt: skip
    assert describe_base("owner/nowhere").metadata == {} and caplog.text == ""
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert describe_base("owner/Base-1B", tmp_path).metadata == {} and "cannot be read" in caplog.text
