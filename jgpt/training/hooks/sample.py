"""Every `sample.every_steps` and at the end: the model writes some text, into the log and samples.txt.

In the data path: from the state to decoding.
"""

import logging

import jax

from jgpt.inference.decode import generate
from jgpt.inference.rounds import NonFiniteLogits
from jgpt.inference.sampling import Sampling
from jgpt.parallel.hosts import is_first
from jgpt.planning.remedies import SAMPLING
from jgpt.run_dir.samples import append_samples
from jgpt.step.train_step import variables
from jgpt.training.run import Run
from jgpt.training.setup import sample_prompt
from jgpt.training.status import explain_shortage
from jgpt.waiting import waiting

log = logging.getLogger("jgpt")


def sample_due(run: Run) -> bool:
    """Tell whether the model writes samples at this step."""
    c = run.config.sample
    return c.num_samples > 0 and (run.is_done or (c.every_steps > 0 and run.step % c.every_steps == 0))


def sample(run: Run) -> None:
    """Let the model write; a failure of memory, or logits that are not finite, cost the samples and not the run."""
    c, parts, tokenizer = run.config.sample, run.parts, run.data.tokenizer
    text = sample_prompt(run.config, run.data)
    prompt = tokenizer.encode(text).tolist() if text else [tokenizer.eot_id]
    try:
        given = variables(parts.model, *parts.strategy.for_decoding((run.state.params, run.frozen)))
        if not is_first() and parts.strategy.decodes_alone:
            return
        with waiting("writing samples"):
            texts = generate(
                parts.model,
                given,
                [prompt] * c.num_samples,
                sampling=Sampling(c.temperature, c.top_k, c.top_p, c.min_p),
                max_new_tokens=c.max_new_tokens,
                stop_ids=run.stop_ids,
                n_ids=tokenizer.vocab_size,
                seed=run.config.seed,
            )
    except (NonFiniteLogits, jax.errors.JaxRuntimeError) as error:
        not_finite = isinstance(error, NonFiniteLogits)
        reason = str(error) if not_finite else explain_shortage(error, run.status, SAMPLING, run.config, parts)
        if not reason:
            raise
        log.warning("no samples at step %d: %s", run.step, reason)
        return
    if not is_first():
        return
    decoded = [text + tokenizer.decode(ids) for ids in texts]
    append_samples(run.run_dir / "samples.txt", run.step, run.val_loss, decoded)
    log.info("%s", "\n".join(f"--- sample {i} at step {run.step} ---\n{text}" for i, text in enumerate(decoded, 1)))
    log.info("---")
