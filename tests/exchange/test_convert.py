"""The convert command: a run out to Hugging Face's layout, and in again."""

import json
import shutil

import jax
import numpy as np
import pytest

from jgpt.exchange.pretrained import open_pretrained
from jgpt.loading.source import load_params as load_source
from jgpt.loading.source import open_source


def refused(result, *parts: str) -> None:
    assert result.code == 2, result.err
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


def host_params(name) -> dict:
    return load_source(open_source(str(name)), np.float32, lambda path, array: np.asarray(array))


@pytest.fixture
def exported(command, trained, tmp_path):
    """Return the small run, exported."""
    result = command("convert", "export", str(trained), str(tmp_path / "out"))
    assert result.code == 0, result.err
    assert f"{tmp_path}/out is written: llama, fp32" in result.out
    assert f'transformers.AutoModelForCausalLM.from_pretrained("{tmp_path}/out")' in result.out
    return tmp_path / "out"


def test_a_run_goes_out_without_its_padding(exported, trained):
    opened, source = open_pretrained(exported), open_source(str(trained))
    assert opened.shapes.vocab_size == source.tokenizer.vocab_size < source.shapes.vocab_size
    params = opened.load_params(np.float32, lambda path, array: array)
    wanted = host_params(trained)
    wanted["wte"]["embedding"] = wanted["wte"]["embedding"][: source.tokenizer.vocab_size]
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    text = "7 times 7 is"
    assert opened.tokenizer().encode(text).tolist() == source.tokenizer.encode(text).tolist()


def test_in_again_and_out_again_in_another_dtype(command, exported, tmp_path):
    result = command("convert", "import", str(exported), str(tmp_path / "run"))
    assert result.code == 0, result.err
    assert "parameters, fp32 kept in fp32" in result.out and f"{tmp_path}/run is written" in result.out
    assert f'python -m jgpt.generate --model {tmp_path}/run --prompt "Once"' in result.out
    jax.tree.map(np.testing.assert_array_equal, host_params(tmp_path / "run"), host_params(exported))
    again = command("convert", "export", str(tmp_path / "run"), str(tmp_path / "again"), "--dtype=bf16")
    assert again.code == 0 and "llama, bf16" in again.out, again.err
    assert open_pretrained(tmp_path / "again").dtype == "bf16"
    assert open_pretrained(tmp_path / "again").model == open_pretrained(exported).model
    kept = command("convert", "import", "--params", "auto", str(tmp_path / "again"), str(tmp_path / "half"))
    assert kept.code == 0 and "bf16 kept in bf16" in kept.out
    assert open_source(str(tmp_path / "half")).config.precision.params == "bf16"
    auto = command("convert", "export", str(tmp_path / "half"), str(tmp_path / "half_out"))
    assert auto.code == 0 and "llama, bf16" in auto.out


def test_an_imported_chat_model_is_tried_by_chat(command, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    result = command("convert", "import", str(tmp_path / "chat"), str(tmp_path / "run"))
    assert result.code == 0 and f"To try it:\n    python -m jgpt.chat --model {tmp_path}/run\n" in result.out


def test_a_checkpoint_by_its_step(command, trained, tmp_path):
    assert command("convert", "export", str(trained), str(tmp_path / "two"), "--step=2").code == 0
    assert command("convert", "export", str(trained), str(tmp_path / "four"), "--step=4").code == 0
    two, four = (open_pretrained(tmp_path / name) for name in ("two", "four"))
    changed = [x.load_params(np.float32, lambda path, array: array)["wte"]["embedding"] for x in (two, four)]
    assert not np.array_equal(*changed)
    refused(command("convert", "export", str(trained), str(tmp_path / "x"), "--step=3"), "step 3 is not among")


def test_what_is_refused(command, trained, exported, tmp_path):
    for arguments in ([], ["onnx", "a", "b"], ["import", "a"], ["export", "a"], ["gguf", "a"]):
        refused(command("convert", *arguments), "adapter RUN_DIR OUT, or gguf RUN_DIR OUT.gguf")
    refused(command("convert", "export", "a", "b", "c"), "unexpected argument 'c'")
    refused(command("convert", "export", "a", "b", "--dtype=int8"), "--dtype='int8'", "auto, fp32, fp16, bf16")
    refused(command("convert", "export", str(trained), str(exported)), "exists and is not empty")
    refused(command("convert", "export", str(tmp_path / "nothing"), str(tmp_path / "b")), "nothing")
    (tmp_path / "file").write_text("")
    for out in ("x" * 300, "x" * 250, "file/x"):  # to 250 characters a temporary name adds too many
        refused(command("convert", "export", str(trained), str(tmp_path / out)), "cannot be made")
    refused(command("convert", "gguf", str(trained), str(tmp_path / ("x" * 300 + ".gguf"))), "cannot be made")
    refused(command("convert", "import", str(tmp_path / "nothing"), str(tmp_path / "b")), "there is no directory")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 99), ["is not a complete safetensors file"]),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), ["pickles (.bin, .pt) are never opened"]),
        (lambda d: (d / "config.json").unlink(), ["holds no model"]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json is not a JSON object"]),
        (lambda d: (d / "tokenizer.json").unlink(), ["does not open"]),
        (
            lambda d: (
                (d / "model.safetensors").unlink(),
                (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}})),
            ),
            ["'../x.safetensors'"],
        ),
    ],
)
def test_damaged_models_give_one_clear_error(command, exported, tmp_path, damage, parts):
    damage(exported)
    refused(command("convert", "import", str(exported), str(tmp_path / "run")), *parts)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_help(command):
    result = command("convert", "--help")
    assert result.code == 0 and result.err == "" and max(map(len, result.out.splitlines())) <= 120
    assert "pip install gguf" in result.out and "--params" in result.out and "exit code" in result.out.lower()
