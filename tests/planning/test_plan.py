"""What a config takes: read from the compiled step, told as a page and as JSON; refused where it cannot be."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data.tokenizer import train_char
from jgpt.errors import UserError
from jgpt.planning import summary as planning
from jgpt.planning.devices import compile_only
from jgpt.planning.estimate import ACTIVATIONS
from jgpt.planning.page import merged, page
from jgpt.planning.roofline import OpCost, Prediction
from jgpt.planning.summary import Plan, make_plan, vocabulary_of
from jgpt.step.state import tree_bytes

BASE = f"--config={Path(__file__).parents[2] / 'configs' / 'base.py'}"
SMALL = {
    "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 64, "model.context_length": 64,
    "tokenizer.vocab_size": 512, "batch.global_batch_size": 8, "execution.micro_batch_size": 2,
    "execution.loss_chunk_tokens": 0,
}  # fmt: skip


def config_of(tmp_path: Path, **changes) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(SMALL | {"out_dir": str(tmp_path / "run")} | changes)
    return config


def plan_of(config: ConfigDict, device: str = "this", tune: bool = False) -> Plan:
    return make_plan(config, device, tune, run_hours=12.0, weekly_hours=30.0, tell=lambda found: None)


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_the_parts_of_the_memory_are_those_of_the_state(tmp_path: Path):
    plan = plan_of(config_of(tmp_path))
    found = plan.found
    state = jax.eval_shape(found.parts.init)
    assert found.memory["parameters"] == bytes_of(state.params)
    assert found.memory["moments"] == bytes_of(state.opt_state)
    assert found.memory["gradients"] >= bytes_of(state.params)  # their sum at least
    assert found.memory["compute copy"] == 0  # in fp32 the parameters are what is computed with
    assert found.memory[ACTIVATIONS] > 0 and found.peak == sum(found.memory.values())
    # The largest array with a side of the vocabulary: fp32 logits of a micro-batch of 2 x 64 tokens.
    assert found.logits == 2 * 64 * 512 * 4
    assert plan.fits and plan.hours is None and plan.runs is None and plan.advice is None
    assert plan.checkpoints == (4, tree_bytes(state))


def test_a_larger_micro_batch_takes_more_and_remat_less(tmp_path: Path):
    peaks = [
        plan_of(config_of(tmp_path, **{"execution.micro_batch_size": micro, "execution.remat": remat})).found.peak
        for micro, remat in [(2, "none"), (4, "none"), (4, "block")]
    ]
    assert peaks[0] < peaks[1] and peaks[2] < peaks[1]


def test_the_vocabulary_is_known_or_said_to_be_assumed(tmp_path: Path):
    def ids(**tokenizer) -> tuple[int, str]:
        return vocabulary_of(config_of(tmp_path, **tokenizer))

    assert ids() == (512, "of tokenizer.vocab_size; little text gives fewer")
    assert ids(**{"tokenizer.kind": "char"})[1] == "128 characters assumed"
    assert ids(**{"tokenizer.kind": "hf", "tokenizer.pretrained": "gpt2"}) == (50257, "GPT-2's")
    other = ids(**{"tokenizer.kind": "hf", "tokenizer.pretrained": "someone/model"})
    assert other[0] == 50257 and "assumed; set model.vocab_size" in other[1]
    tokenizer = train_char(["hello"])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer", 64)
    here = {"tokenizer.kind": "hf", "tokenizer.pretrained": str(tmp_path / "tokenizer")}
    assert ids(**here) == (tokenizer.vocab_size, "of the tokenizer")
    assert ids(**here, **{"model.vocab_size": 640})[1] == "of model.vocab_size"
    assert plan_of(config_of(tmp_path, **{"model.vocab_size": 640})).found.parts.shapes.vocab_size == 640


def test_chat_and_adapters_are_planned_as_they_are_trained(trained: Path, tmp_path: Path):
    """The batch of a chat run has weights and segments; a LoRA run's base lies beside its state."""
    lora = {"init_from": str(trained), "lora.rank": 2, "batch.global_batch_size": 4, "data.format": "chat"}
    config = default_config()
    config.update_from_flattened_dict(lora | {"out_dir": str(tmp_path / "run"), "execution.micro_batch_size": 1})
    for parallel in ("data", "tensor"):
        config.execution.parallel = parallel
        plan = plan_of(config)
        assert plan.vocabulary == "of init_from" and plan.found.parts.adapters > 0
        frozen = bytes_of(plan.found.parts.abstract_frozen())
        assert plan.found.memory["batch, frozen parameters"] >= frozen / (1 if parallel == "data" else 2)
        assert plan.found.memory["parameters"] == 4 * plan.found.parts.adapters
        assert "of LoRA beside them" in page(plan, 5)


def test_a_config_that_does_not_fit_is_told_what_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of(tmp_path, **{"execution.micro_batch_size": 4})
    whole = plan_of(config).found
    machine = planning.this_machine

    def with_memory(n_bytes: int) -> Plan:
        small = lambda devices: planning.Target("this", devices, machine(devices).chip, n_bytes, None)  # noqa: E731
        monkeypatch.setattr(planning, "this_machine", small)
        return plan_of(config)

    plan = with_memory(whole.peak - 1)
    assert not plan.fits and plan.advice is not None and plan.advice.micro_batch_size < 4
    text = page(plan, 5)
    assert "DOES NOT FIT" in text and plan.advice.flags() in text.splitlines()[-1]
    nothing = with_memory(sum(whole.memory[part] for part in ("parameters", "moments")) + 100)
    assert nothing.advice is None and "Nothing does: this model does not fit" in page(nothing, 5)
    with pytest.raises(UserError, match="does not fit .*: its parameters and the optimizer's moments alone take"):
        with_memory(whole.memory["parameters"])


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path: Path):
    try:
        compile_only("t4x2")
    except UserError as error:
        pytest.skip(str(error))
    with pytest.raises(UserError, match="must be a multiple of 2: set --config.batch.global_batch_size=16"):
        plan_of(config_of(tmp_path, **{"batch.global_batch_size": 15, "execution.micro_batch_size": 1}), "t4x2")


def test_ops_of_all_layers_are_added_up():
    def op(name: str, seconds: float) -> OpCost:
        return OpCost("x", "fusion", "mlp", name, 2, 10.0, 1.0, "memory", seconds)

    ops = [op(f"jit(f)/transpose(jvp(GPT))/h_{i}/mlp/up/dot", 1.0) for i in range(12)] + [op("jit(f)/h_1/mlp/dot", 5.0)]
    found = merged(Prediction(tuple(ops)))
    assert [(one.seconds, one.times, one.bytes, one.op_name) for one in found] == [
        (12.0, 24, 120.0, "backward mlp/up/dot"), (5.0, 2, 10.0, "h_*/mlp/dot"),
    ]  # fmt: skip
    assert np.isclose(sum(one.seconds for one in found), Prediction(tuple(ops)).seconds)


@pytest.mark.parametrize("device", ["this", "t4x2"])
def test_the_command_prints_a_page_and_json(device: str, command, tmp_path: Path):
    flags = [f"--config.{key}={value}" for key, value in (SMALL | {"out_dir": tmp_path / "run"}).items()]
    result = command("plan", BASE, *flags, f"--device={device}")
    if result.code == 2 and ("pip install" in result.err):
        pytest.skip(result.err)
    assert result.code == 0, result.err
    assert "micro-batch 2, remat none" in result.out and "in all, at the peak" in result.out
    assert ("tokens a second" in result.out) == (device == "t4x2")
    assert ("no speed is predicted" in result.out) == (device == "this")
    assert not (tmp_path / "run").exists()  # it only looks
    told = json.loads(command("plan", BASE, *flags, f"--device={device}", "--json", "--tune").out)
    assert told["fits"] and told["peak_bytes"] == sum(told["memory_bytes"].values()) <= told["usable_bytes"]
    assert told["advice"] == told["choice"] and len(told["tried"]) >= 1
    if device == "t4x2":
        assert np.isclose(sum(told["seconds_by_group"].values()), told["seconds_per_step"])
        assert "optimizer" in told["seconds_by_group"] and len(told["top_ops"]) == 10
        assert told["tokens_per_second"] == pytest.approx(told["tokens_per_step"] / told["seconds_per_step"])


def test_the_command_refuses_what_it_cannot_plan(command):
    unknown = command("plan", BASE, "--device=t5")
    assert unknown.code == 2 and "--device=t5 is not known" in unknown.err and "Allowed: t4x2" in unknown.err
    wrong = command("plan", BASE, "--device=this", "--config.execution.remat=blok")
    assert wrong.code == 2 and "did you mean 'block'" in wrong.err
