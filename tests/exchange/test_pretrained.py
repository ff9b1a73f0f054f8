"""Whole model directories: written, opened again, and refused where something is missing or wrong."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jgpt.config.defaults import default_config
from jgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_char
from jgpt.errors import UserError
from jgpt.exchange.new_directory import new_directory
from jgpt.exchange.pretrained import open_pretrained
from jgpt.exchange.write_model import check_export, export_model
from jgpt.loading.source import is_run
from jgpt.model.parameters import abstract_params
from jgpt.model.shapes import ModelConfig, model_config

OWN = ModelConfig(320, 8, 1, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_ff=6)
TEXT = "the same ids, whoever opens it"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 300)


def random_params(shapes: ModelConfig) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_params(shapes))


def export(out: Path, tokenizer: Tokenizer, shapes: ModelConfig = OWN, **options: Any) -> Any:
    params = random_params(shapes)
    options = {"vocab_size": shapes.vocab_size, "stop_ids": (), "dtype": "fp32"} | options
    export_model(out, params, shapes, tokenizer, **options)
    return params


def loaded(directory: Path) -> Any:
    return open_pretrained(directory).load_params(np.float32, lambda path, array: array)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("gpt2", replace(OWN, n_kv_heads=4, position="learned", norm="layernorm", mlp="gelu", bias=True)),
        ("llama", replace(OWN, tie_embeddings=False)), ("mistral", replace(OWN, n_heads=6)),
        ("qwen2", replace(OWN, qkv_bias=True)), ("qwen3", replace(OWN, qk_norm=True)),
    ],
)  # fmt: skip
def test_what_is_written_opens_as_the_same_model(family, shapes, tokenizer, tmp_path):
    params = export(tmp_path / "out", tokenizer, shapes, shard_bytes=5000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    opened = open_pretrained(tmp_path / "out")
    assert (opened.family, opened.shapes, opened.dtype) == (family, shapes, "fp32")
    assert model_config(opened.model, 300) == shapes
    assert opened.stop_ids == (tokenizer.eot_id,)
    assert opened.tokenizer().encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path / "out"), params)
    assert not is_run(tmp_path / "out")
    (tmp_path / "out" / "checkpoints").mkdir()
    assert is_run(tmp_path / "out")


def test_rows_that_pad_the_vocabulary_stay_behind(tokenizer, tmp_path):
    shapes = replace(OWN, tie_embeddings=False)
    params = export(tmp_path / "out", tokenizer, shapes, vocab_size=tokenizer.vocab_size, dtype="bf16")
    opened = open_pretrained(tmp_path / "out")
    assert opened.shapes.vocab_size == tokenizer.vocab_size < 320 and opened.dtype == "bf16"
    params = loaded(tmp_path / "out")
    for name in ("wte", "lm_head"):
        kept = params[name]["embedding"][: tokenizer.vocab_size]
        np.testing.assert_allclose(params[name]["embedding"], kept, rtol=2**-8)


def test_special_ids_and_stops(tokenizer, tmp_path):
    export(tmp_path / "own", tokenizer, stop_ids=(7, tokenizer.eot_id))
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (tokenizer.eot_id, tokenizer.eot_id)
    generation = json.loads((tmp_path / "own" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, tokenizer.eot_id] and generation["pad_token_id"] == tokenizer.eot_id
    assert open_pretrained(tmp_path / "own").stop_ids == (tokenizer.eot_id, 7)
    change(tmp_path / "own" / "config.json", eos_token_id=[3, 4])
    (tmp_path / "own" / "generation_config.json").unlink()
    assert open_pretrained(tmp_path / "own").stop_ids == (3, 4)
    change(tmp_path / "own" / "config.json", eos_token_id=None)
    assert open_pretrained(tmp_path / "own").stop_ids == ()

    chat = Tokenizer(
        tokenizer.tokenizer_json,
        tokenizer.settings | {"bos_token": "t", "pad_token": "h", "chat_template": "{{ messages }}"},
    )
    export(tmp_path / "chat", chat)
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert config["bos_token_id"] == tokenizer.backend.token_to_id("t")
    assert config["pad_token_id"] == tokenizer.backend.token_to_id("h")
    assert open_pretrained(tmp_path / "chat").tokenizer().settings["chat_template"] == "{{ messages }}"
    assert "apply_chat_template" in (tmp_path / "chat" / "README.md").read_text()


def test_what_means_off_is_read_and_what_cannot_be_is_left_out_with_a_line(tokenizer, tmp_path, caplog):
    export(tmp_path / "out", tokenizer)
    path = tmp_path / "out" / "generation_config.json"
    change(path, top_k=-1, top_p=None, temperature=0.6)
    assert open_pretrained(tmp_path / "out").sampling == {"top_k": 0, "temperature": 0.6} and caplog.text == ""
    change(path, top_k=20.0, min_p=0, repetition_penalty=1)
    assert open_pretrained(tmp_path / "out").sampling == {
        "top_k": 20, "temperature": 0.6, "min_p": 0, "repetition_penalty": 1,
    }  # fmt: skip
    assert caplog.text == ""
    change(path, top_k=2.5, top_p=90, temperature="hot", min_p=[0.1], repetition_penalty=True, eos_token_id=[3, 10**30])
    opened = open_pretrained(tmp_path / "out")
    assert opened.sampling == {} and opened.stop_ids == (tokenizer.eot_id, 3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6 and all(line.startswith(f"{path}: ") and "is left out" in line for line in lines)
    assert f"{path}: top_p=90 is left out: it must be 1e-06 to 1" in lines


def test_an_added_token_without_a_row_is_refused_only_where_a_text_holds_it(tokenizer, tmp_path, caplog):
    """Many recipes add [PAD] to the tokenizer and do not resize the embedding."""
    shapes = replace(OWN, vocab_size=tokenizer.vocab_size)
    export(tmp_path / "out", tokenizer, shapes)
    padded = json.loads(tokenizer.tokenizer_json)
    added = padded["added_tokens"][0] | {"id": tokenizer.vocab_size, "content": "[PAD]"}
    padded["added_tokens"].append(added)
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(padded))
    change(tmp_path / "out" / "tokenizer_config.json", pad_token="[PAD]")
    opened = open_pretrained(tmp_path / "out").tokenizer()
    assert "none for [PAD]" in caplog.text
    opened.save(tmp_path / "again", 8)  # as a run keeps it
    for one in (opened, load_tokenizer(tmp_path / "again")):
        assert one.vocab_size == shapes.vocab_size == model_config_rows(one, shapes)
        assert one.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        for encode in (one.encode, lambda text: one.encode_parts([[text, TEXT]])):  # noqa: B023
            with pytest.raises(UserError, match=r"the text holds '\[PAD\]', a token that was added to the tokenizer"):
                encode("a [PAD]")
    export(tmp_path / "out_again", opened, shapes)
    assert json.loads((tmp_path / "out_again" / "config.json").read_text())["eos_token_id"] == tokenizer.eot_id
    assert "pad_token_id" not in json.loads((tmp_path / "out_again" / "config.json").read_text())


def model_config_rows(tokenizer: Tokenizer, shapes: ModelConfig) -> int:
    """Return the rows of a model that is set to those of `shapes`; it refuses a tokenizer with more ids."""
    config = default_config()
    config.model.vocab_size = shapes.vocab_size
    return model_config(config.model, tokenizer.vocab_size).vocab_size


def test_the_model_card_counts_what_is_in_the_file(tokenizer, tmp_path):
    export(tmp_path / "out", tokenizer, vocab_size=tokenizer.vocab_size)
    n_params = sum(stored_size(stored.shape) for stored in open_pretrained(tmp_path / "out").tensors.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"A language model of {n_params:,} parameters" in card and "| architecture | LlamaForCausalLM |" in card


def stored_size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def test_a_half_export_is_never_there(tokenizer, tmp_path):
    params = random_params(OWN)
    params["norm"]["scale"] = np.full(8, 1e9, np.float32)  # the last that is written
    with pytest.raises(UserError, match="model.norm.weight|norm.weight does not fit in fp16"):
        export_model(
            tmp_path / "out", params, OWN, tokenizer, vocab_size=320, stop_ids=(), dtype="fp16", shard_bytes=500
        )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    export(tmp_path / "out", tokenizer)  # an empty directory will do
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="exists and is not empty"):
        export(tmp_path / "out", tokenizer)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()) == before
    with pytest.raises(UserError, match="exists and is not empty"):
        check_export(tmp_path / "out" / "README.md", OWN)
    with pytest.raises(UserError, match="no Hugging Face architecture"):
        export(tmp_path / "other", tokenizer, replace(OWN, norm="layernorm"))
    assert not (tmp_path / "other").exists()


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        open_pretrained(directory)
    for part in (str(directory), *parts):
        assert part in str(error.value)


def test_config_json(tokenizer, tmp_path):
    refused(tmp_path, "has no config.json", "It must be a Hugging Face model directory")
    export(tmp_path / "out", tokenizer)
    path = tmp_path / "out" / "config.json"
    whole = path.read_text()
    for text in ("not json", whole[:50], "[1, 2]", ""):
        path.write_text(text)
        refused(tmp_path / "out", "config.json is not a JSON object", "Download it again")
    path.write_bytes(b"\xff\xfe")
    refused(tmp_path / "out", "config.json is not a JSON object")
    path.write_text(whole)
    change(path, model_type="gemma2", architectures=["Gemma2ForCausalLM"])
    refused(tmp_path / "out", "model_type 'gemma2'", "Supported are GPT-2")
    path.write_text(whole)
    change(path, num_hidden_layers=2)
    refused(tmp_path / "out", "layers.1.input_layernorm.weight is missing (wanted: [8])")
    path.write_text(whole)
    change(path, intermediate_size=7)
    refused(tmp_path / "out", "down_proj.weight is [8, 6] (wanted: [8, 7])")
    (tmp_path / "out" / "generation_config.json").write_text("{")
    refused(tmp_path / "out", "generation_config.json is not a JSON object")


def test_a_tokenizer_of_another_model(tokenizer, tmp_path):
    export(tmp_path / "out", tokenizer, replace(OWN, vocab_size=20), vocab_size=20)
    with pytest.raises(UserError, match="the tokenizer has .* ids, and the model's embedding 20 rows"):
        open_pretrained(tmp_path / "out").tokenizer()
    export(tmp_path / "char", train_char([TEXT]), replace(OWN, vocab_size=20), vocab_size=20)
    opened = open_pretrained(tmp_path / "char").tokenizer()
    assert opened.decode(opened.encode(TEXT)) == TEXT


def test_two_exports_to_one_place_leave_one_that_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "export"
    with pytest.raises(UserError, match="export cannot be made: .*Another process wrote there"):
        with new_directory(out, 0) as first, new_directory(out, 0) as second:
            (first / "config.json").write_text("first")
            (second / "config.json").write_text("second")
    assert list(tmp_path.iterdir()) == [out] and (out / "config.json").read_text() == "second"


def test_an_error_about_another_file_is_not_blamed_on_the_new_directory(tmp_path: Path) -> None:
    weights = str(tmp_path / "weights")
    with pytest.raises(PermissionError, match="weights"), new_directory(tmp_path / "export", 0):
        raise PermissionError(errno.EACCES, "Permission denied", weights)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="export cannot be made: File exists"):
        with new_directory(tmp_path / "file" / "export", 0):
            pass
