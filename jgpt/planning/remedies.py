"""What to change in a config when its run ran out of memory.

Beside the data path: training asks when a step, an evaluation, a sample or the state itself did not fit. This is plain
arithmetic without a compile; `jgpt.plan --tune` compiles, and finds the fastest change that fits.
"""

from ml_collections import ConfigDict

from jgpt.parallel.build import Parts
from jgpt.wording import gib

PLACING, EVALUATING, TRAINING, SAMPLING, SAVING = "the first state", "evaluation", "training", "sampling", "saving"
MIN_CHUNK_TOKENS = 256  # a smaller chunk of logits saves too little to matter


def explain(shortage: str, doing: str, on_host: bool, config: ConfigDict, parts: Parts, command: str) -> str:
    """Return the message: what ran out in which work (`doing`), and the overrides that help, the cheapest first."""
    state = parts.state_bytes
    first, *others = host_remedies(config, state) if on_host else device_remedies(doing, config, parts)
    plan = command if "-m jgpt.train" in command else "python -m jgpt.train --config FILE"
    lines = [f"out of memory in {doing}: {shortage}. Take {first}.", *(f"  or {other}" for other in others)]
    if not on_host and doing != SAMPLING:
        lines += [
            f"Parameters and moments take {gib(state)}, whatever the batch. What fits, and how fast it is:",
            f"  {plan.replace('jgpt.train', 'jgpt.plan')} --tune",
        ]
    if doing != SAMPLING:
        lines += ["Saved checkpoints are whole: the same command with such an override continues from the last one."]
    return "\n".join(lines)


def device_remedies(doing: str, config: ConfigDict, parts: Parts) -> list[str]:
    """List what takes less of a device's memory, each as an override and its price."""
    c, rows, length = config, parts.rows, parts.sequence_length
    found = []
    if doing == SAMPLING:
        fewer = c.sample.num_samples // 2
        return [f"--config.sample.num_samples={fewer} (it was {c.sample.num_samples}; 0: no samples)"]
    if doing != PLACING:  # also while saving: it waits for the step before it, which may be what failed
        share = parts.accumulation * rows  # sequences of a step on a device
        if smaller := [n for n in range(1, rows) if share % n == 0]:
            found.append(
                f"--config.execution.micro_batch_size={smaller[-1]} (it was {rows}; the global batch stays as it is)"
            )
        if doing != EVALUATING and parts.model.remat != "block":
            found.append("--config.execution.remat=block (computes the forward pass twice: a third more work)")
        chunk = min(c.execution.loss_chunk_tokens or rows * length, rows * length)
        if chunk > MIN_CHUNK_TOKENS:
            found.append(
                f"--config.execution.loss_chunk_tokens={max(MIN_CHUNK_TOKENS, chunk // 2)} (fewer logits at a time)"
            )
        if length > MIN_CHUNK_TOKENS:
            found.append(f"--config.batch.sequence_length={length // 2} (the model learns from shorter texts)")
    n_devices = len(parts.strategy.devices)
    if parts.model.lora is None and n_devices > 1 and c.execution.parallel == "data":
        found.append(f"--config.execution.parallel=fsdp (each of {n_devices} devices keeps its part of the state)")
    elif c.execution.parallel == "fsdp" and c.execution.gather != "layer":
        found.append("--config.execution.gather=layer (no device holds all parameters; slower)")
    elif c.execution.parallel == "fsdp" and c.precision.first_moment == "fp32":
        found.append("--config.precision.first_moment=bf16 (2 bytes a parameter less; rounds the mean of gradients)")
    if parts.model.lora is None:
        found.append("a smaller model in a new --config.out_dir: fewer model.n_layers, a smaller model.d_model")
        found.append(
            "adapters beside a frozen model instead of all its parameters: --config.lora.rank=16 and init_from"
        )
    else:
        found.append(f"--config.lora.rank={max(1, c.lora.rank // 2)} in a new --config.out_dir, or a smaller init_from")
    return found


def host_remedies(config: ConfigDict, state: int) -> list[str]:
    """List what takes less of the machine's own memory."""
    found = []
    if config.tokenizer.kind == "bpe" and config.tokenizer.training_megabytes > 1:
        found.append(f"--config.tokenizer.training_megabytes={config.tokenizer.training_megabytes // 2}")
    found.append(f"a smaller model: each save copies the state, {gib(state)}, into the machine's memory")
    return [*found, "fewer programs beside this one"]
