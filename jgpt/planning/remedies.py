"""What to change in a config when its run has not enough memory.

Beside the data path: the loop asks when a step, an evaluation, a sample or the state itself did not fit. Plain
arithmetic, no compilation: `jgpt.plan --tune` compiles, and knows which of these is the fastest that fits.
"""

import jax
from ml_collections import ConfigDict

from jgpt.parallel.build import Parts
from jgpt.step.state import tree_bytes
from jgpt.wording import gib

PLACING, EVALUATING, TRAINING, SAMPLING, SAVING = "the first state", "evaluation", "training", "sampling", "saving"
LEAST_CHUNK = 256  # tokens: a smaller chunk of logits saves nothing that matters


def explain(shortage: str, doing: str, on_host: bool, config: ConfigDict, training: Parts, command: str) -> str:
    """Return the message: what happened while `doing` what, and the overrides that help, the cheapest first."""
    state = tree_bytes(jax.eval_shape(training.init))
    first, *others = on_the_host(config, state) if on_host else overrides(doing, config, training)
    plan = command if "jgpt.train" in command else "python -m jgpt.train --config FILE"
    lines = [f"out of memory in {doing}: {shortage}. Take {first}.", *(f"  or {other}" for other in others)]
    if not on_host and doing != SAMPLING:
        lines += [
            f"Parameters and moments take {gib(state)}, whatever the batch. What fits, and how fast it is:",
            f"  {plan.replace('jgpt.train', 'jgpt.plan')} --tune",
        ]
    if doing != SAMPLING:
        lines += ["What was saved is whole: the same command with such an override goes on from there."]
    return "\n".join(lines)


def overrides(doing: str, config: ConfigDict, training: Parts) -> list[str]:
    """List what makes a device's work smaller, each as an override and its price."""
    c, rows, length = config, training.rows, training.sequence_length
    found = []
    if doing == SAMPLING:
        fewer = c.sample.num_samples // 2
        return [f"--config.sample.num_samples={fewer} (it was {c.sample.num_samples}; 0: no samples)"]
    if doing != PLACING:  # what a save finds may be the step's before it, which ran in the background
        share = training.accumulation * rows  # sequences of a step on a device
        if smaller := [n for n in range(1, rows) if share % n == 0]:
            found.append(
                f"--config.execution.micro_batch_size={smaller[-1]} (it was {rows}; the global batch stays as it is)"
            )
        if doing != EVALUATING and training.model.remat != "block":
            found.append("--config.execution.remat=block (computes the forward pass twice: a third more work)")
        chunk = min(c.execution.loss_chunk_tokens or rows * length, rows * length)
        if chunk > LEAST_CHUNK:
            found.append(
                f"--config.execution.loss_chunk_tokens={max(LEAST_CHUNK, chunk // 2)} (fewer logits at a time)"
            )
        if length > LEAST_CHUNK:
            found.append(f"--config.batch.sequence_length={length // 2} (shorter texts to learn from)")
    if training.model.lora is None:
        found.append("a smaller model in a new --config.out_dir: fewer model.n_layers, a smaller model.d_model")
        found.append(
            "adapters beside a frozen model instead of all its parameters: --config.lora.rank=16 and init_from"
        )
    else:
        found.append(f"--config.lora.rank={max(1, c.lora.rank // 2)} in a new --config.out_dir, or a smaller init_from")
    return found


def on_the_host(config: ConfigDict, state: int) -> list[str]:
    """List what takes less of the machine's own memory."""
    found = []
    if config.tokenizer.kind == "bpe" and config.tokenizer.training_megabytes > 1:
        found.append(f"--config.tokenizer.training_megabytes={config.tokenizer.training_megabytes // 2}")
    found.append(f"a smaller model: each save copies the state, {gib(state)}, into the machine's memory")
    return [*found, "fewer programs beside this one"]
