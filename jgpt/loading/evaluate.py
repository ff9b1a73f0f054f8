"""The loss of a loaded model on blocks of text.

Beside the data path: `jgpt.evaluate` is the caller.
"""

from collections.abc import Iterable

import jax

from jgpt.data.batches import Batch
from jgpt.loading.load import LoadedModel
from jgpt.parallel.evaluation import evaluate
from jgpt.parallel.mesh import Sharded
from jgpt.parallel.replicate import Replicate
from jgpt.parallel.strategy import Strategy
from jgpt.step.eval_step import make_eval_step


def evaluate_loaded(
    loaded: LoadedModel, blocks: Iterable[Batch], rows: int = 8, context_length: int = 0
) -> tuple[float, int]:
    """Evaluate a loaded model on `blocks`, on every device of this machine; returns as `evaluate` does.

    A model that one device holds is copied to all of them. `context_length` is the blocks' (0: the model's).
    """
    strategy: Strategy
    if len(loaded.placement.devices) > 1:
        strategy, params = Sharded(loaded.placement.devices, loaded.placement.config), loaded.params
    else:
        strategy = Replicate(jax.local_devices())
        params = strategy.place_state(loaded.params)
    step = strategy.eval_step(make_eval_step(loaded.model, loaded.policy, loaded.config.execution.loss_chunk_tokens))
    return evaluate(strategy, step, params, {}, blocks, rows, context_length or loaded.model.config.context_length)
