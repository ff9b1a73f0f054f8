"""A run in this process: what it is, and where it stands. The loop moves it on; the hooks read it.

In the data path: between `start.py`, which builds it, and `loop.py`.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jgpt.data.batches import Batch, Batches, ChatBatches
from jgpt.data.token_files import TokenData
from jgpt.loading.source import Source, load_params
from jgpt.parallel.build import Parts
from jgpt.planning.remedies import TRAINING
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.step.state import TrainState
from jgpt.step.train_step import Numbers
from jgpt.training.extend import pass_over_decayed
from jgpt.training.setup import Setup
from jgpt.training.status import Status

log = logging.getLogger("jgpt")


@dataclass
class Run:
    """One process's part of a run."""

    config: ConfigDict
    run_dir: Path
    parts: Parts  # the model, its steps, and how they run on the devices
    data: TokenData
    batches: Batches | ChatBatches
    val_blocks: list[Batch]  # single sequences
    status: Status
    state: TrainState
    frozen: Any  # LoRA's base parameters; {} without it
    base: str | None  # fingerprint of the model that the run began from
    stop_ids: tuple[int, ...]  # that end a sample
    resumed: bool = False
    tokens: int = 0  # seen so far
    val_loss: float | None = None  # at this very step
    lowest_loss: float | None = None  # of the last steps before this process, on the same text
    elapsed_before: float = 0.0  # seconds of the run's earlier processes
    started: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.status.step

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.status.total_steps

    @property
    def is_done(self) -> bool:
        """Tell whether no step is left."""
        return self.step >= self.total_steps

    @property
    def elapsed_seconds(self) -> float:
        """Seconds that this run has taken, in all its processes."""
        return self.elapsed_before + time.monotonic() - self.started

    def batch(self, step: int) -> Batch:
        """Return the batch that follows `step` steps, on its way to the devices."""
        return self.parts.own_batch(self.batches, step)

    def advance(self, batch: Batch) -> Numbers:
        """Dispatch a train step, and return its numbers, which the devices are still computing."""
        self.state, numbers = self.parts.train_step(self.state, self.frozen, batch)
        self.status.step += 1
        self.tokens += self.parts.tokens_per_step
        self.val_loss = None
        return numbers


def begin(
    config: ConfigDict, run_dir: Path, setup: Setup, source: Source | None, checkpoints: Checkpoints, status: Status
) -> Run:
    """Restore the newest whole checkpoint, or make the first state; return the run as it stands then.

    `source` is the model that `init_from` names, where its parameters are needed.
    """
    parts, data = setup.parts, setup.data
    pass_over_decayed(checkpoints, config.optimizer)
    abstract = jax.eval_shape(parts.init)
    restored = checkpoints.restore(abstract, parts.strategy.shardings(abstract))
    state, meta = restored or (_first_state(parts, source), {})
    run = Run(
        config=config,
        run_dir=run_dir,
        parts=parts,
        data=data,
        batches=setup.batches,
        val_blocks=setup.val_blocks,
        status=status,
        state=state,
        frozen=_frozen(parts, source),
        base=source.fingerprint if source else None,
        stop_ids=source.stop_ids if source else (data.tokenizer.eot_id,),
    )
    if restored is not None:
        _continue_from(run, meta)
    status.activity = TRAINING
    status.write("running")
    return run


def _continue_from(run: Run, meta: dict[str, Any]) -> None:
    """Put the run where its checkpoint was made, and say where it will differ from a run that was never stopped."""
    run.resumed, run.status.step, run.tokens = True, meta["step"], meta["tokens"]
    run.elapsed_before, run.val_loss = meta["elapsed_seconds"], meta["val_loss"]
    run.base, run.stop_ids = meta.get("base"), tuple(meta.get("stop_ids") or run.stop_ids)
    log.info("resuming from step %d of %d", run.step, run.total_steps)
    if meta["train_sha256"] != run.data.meta["train_sha256"]:
        log.warning("the text has changed since this run began: its next batches are not those it would have seen")
    else:
        run.lowest_loss = meta.get("lowest_loss")
    n_devices = len(run.parts.strategy.devices)
    if meta["devices"] != n_devices:
        log.info(
            "saved on %d devices, going on with %d: the same batches in the same order, sums rounded differently",
            meta["devices"], n_devices,
        )  # fmt: skip
    if run.parts.policy.scales_loss and not meta["scales_loss"]:  # computed in fp32 or bf16 so far
        scale = run.parts.strategy.place_state(jnp.float32(run.config.precision.loss_scale))
        run.state = run.state._replace(loss_scale=run.state.loss_scale._replace(scale=scale))


def _first_state(parts: Parts, source: Source | None) -> TrainState:
    """Make the state of step 0, on the devices, from the parameters of `source` where all of them are trained."""
    params = None
    if source is not None and parts.model.lora is None:
        params = load_params(source, parts.policy.param, parts.strategy.place_param)
    return parts.first_state(params)


def _frozen(parts: Parts, source: Source | None) -> Any:
    """Load the base parameters that LoRA leaves as they are, matrices in the compute dtype; without it {}."""
    if parts.model.lora is None:
        return {}
    assert source is not None
    return load_params(source, parts.policy.compute, parts.strategy.place_param)
