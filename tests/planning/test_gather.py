"""When devices that split a state gather parameters: what fits decides, the same way for a plan and for training."""

import logging
from dataclasses import replace
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.model.shapes import model_config
from jgpt.parallel.build import make_parts
from jgpt.planning import auto, summary
from jgpt.planning.auto import choose_execution
from jgpt.planning.devices import Target, this_machine
from jgpt.planning.gather import FOR_ACTIVATIONS, with_gather
from jgpt.planning.summary import make_plan

IDS = 320


def config_of(**changes: Any) -> ConfigDict:
    config = default_config()
    config.model.update(n_layers=1, n_heads=2, d_model=32, context_length=64)
    config.tokenizer.vocab_size, config.batch.global_batch_size = IDS, 8
    config.execution.update({"parallel": "fsdp", "micro_batch_size": 2} | changes)
    return config


def memory_for_step() -> int:
    """Return the bytes of a device with which gather=step is just taken."""
    config = config_of(gather="step")
    parts = make_parts(config, model_config(config.model, IDS), jax.local_devices())
    state, params = jax.eval_shape(parts.init), sum(x.size for x in jax.tree.leaves(jax.eval_shape(parts.init).params))
    # In fp32: a device's part of the state; all parameters, the gradients of a micro-batch, their sums.
    return int((parts.strategy.bytes_per_device(state, {}) + 12 * params) / (1 - FOR_ACTIVATIONS)) + 1


def target_of(memory: int | None) -> Target:
    return replace(this_machine(jax.local_devices()), memory_bytes=memory)


@pytest.mark.parametrize(("less", "gather"), [(0, "step"), (2, "layer"), (None, "step")])
def test_what_fits_is_chosen_and_named(less: int | None, gather: str, caplog: pytest.LogCaptureFixture):
    config = config_of()
    with caplog.at_level(logging.INFO, logger="jgpt"):
        target = target_of(None if less is None else memory_for_step() - less)
        chosen = with_gather(config, model_config(config.model, IDS), target)
    assert chosen.execution.gather == gather and f"execution.gather={gather}: with all parameters" in caplog.text


def test_what_the_config_says_is_kept():
    for config in (config_of(gather="step"), config_of(gather="layer"), config_of(parallel="data")):
        assert with_gather(config, model_config(config.model, IDS), target_of(1)) is config


def test_a_plan_and_training_choose_the_same(monkeypatch: pytest.MonkeyPatch):
    class Compiled(Exception):
        """The planner's config, in the place of a compile."""

    def estimate(config: ConfigDict, *_: Any) -> None:
        raise Compiled(config.execution.gather)

    for memory, gather in ((memory_for_step(), "step"), (memory_for_step() - 2, "layer")):
        for module in (auto, summary):
            monkeypatch.setattr(module, "this_machine", lambda devices, memory=memory: target_of(memory))
        monkeypatch.setattr(summary, "estimate", estimate)
        config = config_of()
        trained = choose_execution(config, model_config(config.model, IDS), jax.local_devices())
        assert trained.execution.gather == gather
        with pytest.raises(Compiled, match=gather):
            make_plan(config, "this", tune=False, run_hours=1.0, weekly_hours=1.0, on_compiled=lambda found: None)
