"""What the benchmarks of training share: shapes, the text, jgpt's own step, and trainers that take turns."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import Contestant

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's jgpt, installed or not

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 0.1
StepFunction = Callable[[np.ndarray], float]  # a batch [B, T+1] -> its loss, when the update is done
RunSteps = Callable[[int], list[tuple[float, float]]]  # how many steps -> (seconds, loss) of each


@dataclass(frozen=True)
class Shape:
    """A GPT of GPT-2's kind, and the batch of its step."""

    n_layers: int
    n_heads: int
    d_model: int
    context_length: int
    batch: int
    dropout: float = 0.0
    vocab_size: int = 65
    bias: bool = False

    @property
    def model(self) -> Any:
        """Return it as jgpt's ModelConfig."""
        from jgpt.model.shapes import ModelConfig

        return ModelConfig(
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_model=self.d_model,
            d_head=self.d_model // self.n_heads,
            d_ff=4 * self.d_model,
            dropout=self.dropout,
            position="learned",
            norm="layernorm",
            mlp="gelu",
            bias=self.bias,
        )


def windows(shape: Shape) -> Iterator[np.ndarray]:
    """Yield batches int32 [B, T+1] at random places of the text; the same ones to every contestant."""
    from jgpt.config.defaults import standard_library_glob

    first = standard_library_glob().split(",")[0]
    files = sorted(Path(first).parent.glob(Path(first).name))
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)[:4_000_000]
    n_ids = min(shape.vocab_size, 65)
    common = [character for character, _ in Counter(text).most_common(n_ids - 1)]
    table = {character: i for i, character in enumerate(common)}
    ids = np.array([table.get(character, n_ids - 1) for character in text], np.int32)
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(ids) - shape.context_length - 1, shape.batch)
        yield np.stack([ids[start : start + shape.context_length + 1] for start in starts])


def timed(step: StepFunction, shape: Shape) -> RunSteps:
    """Make a runner of a step on the text."""
    batches = windows(shape)

    def run_steps(n: int) -> list[tuple[float, float]]:
        results = []
        for _ in range(n):
            batch = next(batches)
            start = time.perf_counter()
            loss = step(batch)
            results.append((time.perf_counter() - start, loss))
        return results

    return run_steps


class Trainer(Contestant):
    """A contestant that trains when it is told to, and what is known of its steps."""

    def __init__(self, script: str, name: str, arguments: list[str]) -> None:
        super().__init__(script, name, arguments)
        self.seconds, self.losses = [], []
        self.first_step_seconds = self.run(1)[0]

    def run(self, steps: int) -> list[float]:
        """Run steps in the child and return the seconds of each."""
        results = self.ask(steps)
        self.losses += [loss for _, loss in results]
        return [seconds for seconds, _ in results]


def take_turns(trainers: Sequence[Trainer], rounds: int, steps: int, title: str) -> None:
    """Let each train `steps` steps, round by round."""
    for turn in range(rounds):
        for trainer in trainers:
            trainer.run(1)  # wakes its threads and caches up; not counted
            seconds = trainer.run(steps)
            trainer.seconds += seconds
            print(f"{title} round {turn + 1}: {trainer.name} {1e3 * min(seconds):.1f} ms", file=sys.stderr)


def devices_for(batch_size: int) -> list[Any]:
    """Return the devices of this machine on which jgpt would train with so many sequences a step."""
    from jgpt.config.defaults import default_config
    from jgpt.parallel.devices import training_devices

    config = default_config()
    config.batch.global_batch_size = batch_size
    return training_devices(config)


def jgpt_step(
    shapes: Any,
    batch_size: int,
    devices: Sequence[Any],
    rows: int,
    policy: Any,
    remat: str = "none",
    make_step: Callable[..., Any] | None = None,
    compile_only: bool = False,
    deterministic: bool = False,
) -> StepFunction:
    """Build jgpt's train step through its own functions, of a model of `shapes` in micro-batches of `rows`.

    `make_step` stands in for its Step. With `compile_only` the devices need not be here: the step only
    compiles, and its loss is 0.
    """
    import jax

    from jgpt.config.defaults import default_config
    from jgpt.data.batches import Batch
    from jgpt.hardware.devices import compute_capability
    from jgpt.model.attention.choose import choose_attention
    from jgpt.model.gpt import GPT
    from jgpt.parallel.replicate import Replicate
    from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
    from jgpt.step.state import init_state
    from jgpt.step.train_step import Step

    config = default_config()
    config.optimizer.update(learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY)
    config.optimizer.update(warmup_steps=0, total_steps=100_000, clip_norm=1.0)
    accumulation = batch_size // (len(devices) * rows)
    device = devices[0]
    attention = choose_attention(
        "auto",
        policy.compute,
        device.platform,
        compute_capability(device),
        shapes.d_model // shapes.n_heads,
        deterministic,
    )
    model = GPT(shapes, policy.compute, remat, attention=attention, activations=policy.activations)
    optimizer, runner = make_optimizer(config.optimizer), Replicate(devices)
    step = (make_step or Step)(
        model,
        policy,
        optimizer,
        learning_rate_schedule(config.optimizer),
        accumulation=accumulation,
        seed=0,
        loss_chunk_tokens=config.execution.loss_chunk_tokens,
        growth_steps=config.precision.loss_scale_growth_steps,
    )
    train_step = runner.train_step(step)

    def init() -> Any:
        return init_state(model, policy, optimizer, seed=0, loss_scale=config.precision.loss_scale)

    if compile_only:

        def compile_it(batch: np.ndarray) -> float:
            shape_of = Batch(jax.ShapeDtypeStruct(batch.shape, batch.dtype))
            runner.lower(train_step, jax.eval_shape(init), {}, shape_of, accumulation).compile()
            return 0.0

        return compile_it

    state = runner.place_state(jax.jit(init)())

    def one_step(batch: np.ndarray) -> float:
        nonlocal state
        state, metrics = train_step(state, {}, runner.place_batch(Batch(batch), accumulation))
        return float(metrics["loss"])

    return one_step
