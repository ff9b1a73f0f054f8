"""What a config takes: read from the compiled step, printed as a page and as JSON; refused where it cannot be."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data.tokenizer import train_char
from jgpt.errors import UserError
from jgpt.hardware.chips import Rates
from jgpt.model.scopes import SCOPES
from jgpt.model.shapes import ModelConfig
from jgpt.planning import search
from jgpt.planning import summary as planning
from jgpt.planning.devices import Target
from jgpt.planning.estimate import ACTIVATIONS, Estimate, estimate
from jgpt.planning.page import merge_layers, page
from jgpt.planning.roofline import OpCost, Prediction, predict
from jgpt.planning.summary import Plan, make_plan, vocabulary_of
from jgpt.step.state import tree_bytes

BASE = f"--config={Path(__file__).parents[2] / 'configs' / 'base.py'}"
SMALL = {
    "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 32, "model.context_length": 64,
    "tokenizer.vocab_size": 320, "batch.global_batch_size": 8, "execution.micro_batch_size": 2,
    "execution.attention": "plain", "execution.loss_chunk_tokens": 0,
}  # fmt: skip


def config_of(tmp_path: Path, **changes) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(SMALL | {"out_dir": str(tmp_path / "run")} | changes)
    return config


def plan_of(config: ConfigDict, device: str = "this", tune: bool = False) -> Plan:
    return make_plan(config, device, tune=tune, run_hours=12.0, weekly_hours=30.0, on_compiled=lambda found: None)


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """Compile a config's step once for all tests of this file, whatever memory its target has."""
    compiled: dict[str, Estimate] = {}

    def estimate_once(config: ConfigDict, shapes: ModelConfig, target: Target) -> Estimate:
        key = repr([config.to_dict() | {"out_dir": ""}, shapes, target.devices])
        compiled[key] = compiled.get(key) or estimate(config, shapes, target)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "estimate", estimate_once)
        patch.setattr(search, "estimate", estimate_once)
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return the plan of SMALL."""
    return plan_of(config_of(tmp_path_factory.mktemp("small")))


def test_the_parts_of_the_memory_are_those_of_the_state(small: Plan):
    plan, found = small, small.found
    state = jax.eval_shape(found.parts.init)
    assert found.memory["parameters"] == bytes_of(state.params)
    assert found.memory["moments"] == bytes_of(state.opt_state)
    assert found.memory["gradients"] >= bytes_of(state.params)  # their sum at least
    assert found.memory["compute copy"] == 0  # in fp32 the parameters are what is computed with
    assert found.memory[ACTIVATIONS] > 0 and found.peak == sum(found.memory.values())
    # The largest array with a side of the vocabulary: fp32 logits of a micro-batch of 2 x 64 tokens.
    assert found.logits == 2 * 64 * 320 * 4
    assert plan.fits and plan.hours is None and plan.runs is None and plan.advice is None
    assert plan.checkpoints == (4, tree_bytes(state))


def test_sums_of_gradients_that_are_scattered_at_once_are_a_devices_part(tmp_path: Path):
    """With gather=layer the loop over micro-batches carries parts: half of each matrix, on two devices."""
    plan = plan_of(config_of(tmp_path, **{"execution.parallel": "fsdp", "execution.gather": "layer"}))
    whole, part = bytes_of(jax.eval_shape(plan.found.parts.init).params), bytes_of(plan.found.parts.params_in_loop())
    assert plan.found.memory["parameters"] == part < 0.52 * whole
    assert part <= plan.found.memory["gradients"] < whole and plan.found.memory["compute copy"] == 0


def test_a_larger_micro_batch_takes_more_and_remat_less(small: Plan, tmp_path: Path):
    def peak(**execution: Any) -> int:
        changes = {f"execution.{key}": value for key, value in execution.items()}
        return plan_of(config_of(tmp_path, **changes)).found.peak

    larger = peak(micro_batch_size=4)
    assert small.found.peak < larger and peak(micro_batch_size=4, remat="block") < larger


def test_flops_of_a_compiled_step_are_those_of_the_model(small: Plan):
    """GEMMs of a step that keeps all pairs of attention and recomputes nothing: what flops_per_token counts."""
    program, parts = small.found.program, small.found.parts
    assert program is not None
    found = predict(program, Rates(1.0, 1.0, 1.0, 1.0), SCOPES)
    on_a_device = parts.flops_per_token * parts.tokens_per_step / parts.strategy.shares
    assert found.gemm_flops == pytest.approx(on_a_device, rel=0.02)


def test_hours_become_the_steps_that_fit_at_the_predicted_speed(small: Plan):
    config = small.config.copy_and_resolve_references()
    config.optimizer.update(total_steps=0, budget_hours=2.0)
    unknown = replace(small, config=config)
    assert unknown.steps is None and "steps                     what 2 hours hold; training" in page(unknown, 1)
    second = Prediction((OpCost("x", "fusion", "mlp", "jit(f)/h_0/mlp", 1, 1.0, 1.0, "memory", 1.0),), ("mlp",))
    assert replace(unknown, found=replace(small.found, prediction=second)).steps == 6984  # 3% are spare


def test_the_vocabulary_is_known_or_said_to_be_assumed(tmp_path: Path):
    def ids(**tokenizer) -> tuple[int, str]:
        return vocabulary_of(config_of(tmp_path, **tokenizer))

    assert ids() == (320, "of tokenizer.vocab_size; little text gives fewer")
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


def test_a_config_that_does_not_fit_is_answered_with_what_does(
    small: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, whole = config_of(tmp_path), small.found
    machine = planning.this_machine

    def with_memory(n_bytes: int) -> Plan:
        def tight(devices: list[jax.Device]) -> Target:
            return replace(machine(devices), memory_bytes=n_bytes)

        monkeypatch.setattr(planning, "this_machine", tight)
        return plan_of(config)

    plan = with_memory(whole.peak - 1)
    assert not plan.fits and plan.advice is not None and plan.advice.micro_batch_size == 1
    text = page(plan, 5)
    assert "DOES NOT FIT" in text and plan.advice.flags() in text.splitlines()[-1]
    nothing = with_memory(sum(whole.memory[part] for part in ("parameters", "moments")) + 100)
    assert nothing.advice is None and "Nothing does: this model does not fit" in page(nothing, 5)
    with pytest.raises(UserError, match="does not fit .*: its parameters and the optimizer's moments alone take"):
        with_memory(whole.memory["parameters"])


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    two_t4s = planning.Target("t4x2", jax.local_devices(), planning.this_machine(jax.local_devices()).chip, None, None)
    monkeypatch.setattr(planning, "compile_only", lambda *_: two_t4s)
    with pytest.raises(UserError, match="there are 2 devices.*: set --config.batch.global_batch_size=16"):
        plan_of(config_of(tmp_path, **{"batch.global_batch_size": 15, "execution.micro_batch_size": 1}), "t4x2")


def test_ops_of_all_layers_are_added_up():
    def op(name: str, seconds: float) -> OpCost:
        return OpCost("x", "fusion", "mlp", name, 2, 10.0, 1.0, "memory", seconds)

    ops = [op(f"jit(f)/transpose(jvp(GPT))/h_{i}/mlp/up/dot", 1.0) for i in range(12)] + [op("jit(f)/h_1/mlp/dot", 5.0)]
    prediction = Prediction(tuple(ops), ("mlp",))
    found = merge_layers(prediction)
    assert [(one.seconds, one.times, one.bytes, one.op_name) for one in found] == [
        (12.0, 24, 120.0, "backward mlp/up/dot"), (5.0, 2, 10.0, "h_*/mlp/dot"),
    ]  # fmt: skip
    assert np.isclose(sum(one.seconds for one in found), prediction.seconds)


def test_the_command_prints_a_page_and_json(command, tmp_path: Path):
    flags = [f"--config.{key}={value}" for key, value in (SMALL | {"out_dir": tmp_path / "run"}).items()]
    result = command("plan", BASE, *flags, "--device=this")
    assert result.code == 0, result.err
    assert "micro-batch 2, remat none" in result.out and "in all, at the peak" in result.out
    assert "tokens a second" not in result.out and "no speed is predicted" in result.out
    assert not (tmp_path / "run").exists()  # it only looks
    facts = json.loads(command("plan", BASE, *flags, "--device=this", "--json", "--tune").out)
    assert facts["fits"] and facts["peak_bytes"] == sum(facts["memory_bytes"].values()) <= facts["usable_bytes"]
    assert facts["advice"] == facts["choice"] and len(facts["tried"]) >= 1


def test_the_command_refuses_what_it_cannot_plan(command):
    unknown = command("plan", BASE, "--device=t5")
    assert unknown.code == 2 and "--device=t5 is not known" in unknown.err and "Allowed: t4x2" in unknown.err
    wrong = command("plan", BASE, "--device=this", "--config.execution.remat=blok")
    assert wrong.code == 2 and "did you mean 'block'" in wrong.err
