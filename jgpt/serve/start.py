"""From a loaded model to endpoints that are ready: the batch, compiled, and the worker that decodes it.

In the data path: between `jgpt.load` and `app.py`.
"""

import sys

from jgpt.errors import UserError
from jgpt.inference.batch import Batch, Row
from jgpt.inference.sampling import Sampling
from jgpt.loading.model import Model
from jgpt.serve.app import Endpoints
from jgpt.serve.ask import Limits
from jgpt.serve.worker import Worker
from jgpt.waiting import waiting


def make_endpoints(
    model: Model, *, name: str, rows: int, queue: int, max_new_tokens: int, context_length: int
) -> Endpoints:
    """Return endpoints for a model, after a first token was made: a first request need not wait for the compiler.

    Up to `rows` texts are written at a time and up to `queue` wait; see `Limits` for the rest (`context_length` 0: the
    model's own). Raises UserError where the chat template is broken, or the model's logits are not finite.
    """
    prompts = model.chat_prompts() if model.chat_template else None
    loaded = model.loaded
    batch = Batch(
        loaded.model,
        {"params": loaded.params},
        n_ids=model.tokenizer.vocab_size,
        most_rows=rows,
        most_stop_ids=len(prompts.stop_ids if prompts else loaded.stop_ids),
        context_length=context_length,
    )
    warm_up(batch, model.tokenizer.eot_id)
    limits = Limits(max_new_tokens, rows, batch.context)
    return Endpoints(model, Worker(batch, queue), limits, name, prompts)


def warm_up(batch: Batch, first_id: int) -> None:
    """Compile what the first request needs, by writing two tokens. Raises UserError where none can be drawn."""
    batch.add(Row([first_id], 2, Sampling()))
    with waiting("compiling", sys.stderr):
        while len(batch):
            for news in batch.step():
                if news.error:
                    raise UserError(news.error)
