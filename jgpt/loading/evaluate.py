"""The loss of a loaded model on blocks of text.

Beside the data path: `jgpt.evaluate` is the caller.
"""

from collections.abc import Iterable

import jax

from jgpt.data.batches import Batch
from jgpt.loading.load import LoadedModel
from jgpt.parallel.evaluation import evaluate
from jgpt.parallel.mesh import TensorParallel
from jgpt.parallel.replicate import Pmap
from jgpt.step.eval_step import make_eval_step


def evaluate_run(
    loaded: LoadedModel, blocks: Iterable[Batch], rows: int = 8, context_length: int = 0
) -> tuple[float, int]:
    """Evaluate a loaded model on `blocks`, on every device of this machine; returns as `evaluate` does.

    A model that one device holds is copied to all of them. `context_length` is the blocks' (0: the model's).
    """
    devices = sorted(jax.tree.leaves(loaded.params)[0].devices(), key=lambda device: device.id)
    shared = len(devices) > 1
    runner = TensorParallel(devices, loaded.model.config) if shared else Pmap(jax.local_devices())
    step = runner.eval_step(make_eval_step(loaded.model, loaded.policy, loaded.config.execution.loss_chunk_tokens))
    params = loaded.params if shared else runner.place_state(loaded.params)
    return evaluate(runner, step, params, {}, blocks, rows, context_length or loaded.model.config.context_length)
