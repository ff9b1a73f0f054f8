"""What optax.MultiSteps costs: jgpt's step beside one that adds up its gradients by hand.

    python scripts/bench/accumulation.py
    python scripts/bench/accumulation.py --rows 8 --accumulation 8 --rounds 10

Both are the same step otherwise, and one run on the same batches must give both the same losses. They take turns, each
in a process of its own; the fastest step of each counts. MultiSteps touches every parameter once a micro-batch, which
costs the less, the more tokens that micro-batch has: GPT-2 on a T4 has 8192 of them, four times those of the default.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import machine, serve
from trainers import RunSteps, Shape, Trainer, devices_for, jgpt_step, take_turns, timed

CONTESTANTS = ("multisteps", "by-hand")


def make_by_hand(
    model: Any,
    policy: Any,
    optimizer: Any,
    schedule: Any,
    accumulation: int,
    seed: int,
    loss_chunk_tokens: int,
    growth_steps: int,
) -> Any:
    """Make the step of jgpt/step/train_step.py, its gradients added up in the scan's carry; fp32, no loss scaling."""
    import jax
    import jax.numpy as jnp
    import optax

    from jgpt.model.loss import cross_entropy
    from jgpt.step.train_step import hidden_states

    def mean_loss(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        hidden, matrix = hidden_states(model, params, frozen, batch, deterministic=False, rngs={"dropout": key})
        targets = batch.tokens[:, 1:]
        weights = jnp.ones(targets.shape, jnp.float32)
        return cross_entropy(hidden, matrix, targets, weights, loss_chunk_tokens) / targets.size

    def train_step(state: Any, frozen: Any, batch: Any, exchange: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), exchange.device)
        params = policy.cast_to_compute(state.params)

        def micro_step(total: Any, x: Any) -> Any:
            micro_batch, index = x
            loss, gradient = jax.value_and_grad(mean_loss)(params, frozen, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(lambda t, g: t + g.astype(jnp.float32) / accumulation, total, gradient), loss

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        gradient, losses = jax.lax.scan(micro_step, zeros, (batch, jnp.arange(accumulation)))
        gradient, loss = exchange.average((gradient, jnp.mean(losses)))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        next_state = state._replace(
            step=state.step + 1,
            updates=state.updates + finite,
            params=keep(optax.apply_updates(state.params, updates), state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        return next_state, {"loss": loss, "grad_norm": norm, "learning_rate": jnp.asarray(schedule(state.updates))}

    return train_step


def make_contestant(name: str, shape: Shape, rows: int) -> RunSteps:
    """Build a contestant by its name, on all devices of this machine."""
    from jgpt.hardware.process import set_up_process

    set_up_process()
    from jgpt.model.precision import Policy

    make_step, devices = (make_by_hand if name == "by-hand" else None), devices_for(shape.batch)
    return timed(jgpt_step(shape.model, shape.batch, devices, rows, Policy(), make_step=make_step), shape)


def main() -> None:
    """Parse the flags; be the parent, or one of its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a step, on two devices")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each (default 6)")
    parser.add_argument("--steps_per_round", type=int, default=2, help="steps in a turn (default 2)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the machine and the numbers there")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch = 2 * options.rows * options.accumulation
    heads = max(1, options.width // 64)
    shape = Shape(options.layers, heads, options.width, options.length, batch, vocab_size=options.vocabulary)
    if options.contestant:
        return serve(lambda: make_contestant(options.contestant, shape, options.rows))

    trainers = [Trainer(__file__, name, sys.argv[1:]) for name in CONTESTANTS]
    take_turns(trainers, options.rounds, options.steps_per_round, "accumulation")
    fastest = {trainer.name: min(trainer.seconds) for trainer in trainers}
    ratio = fastest["multisteps"] / fastest["by-hand"]
    for trainer in trainers:
        print(f"{trainer.name:12}{1e3 * fastest[trainer.name]:10.1f} ms   last loss {trainer.losses[-1]:.6f}")
        trainer.close()
    print(f"MultiSteps over by hand: {ratio:.3f}")
    if options.json:
        result = {"seconds": fastest, "ratio": ratio, "flags": {k: v for k, v in vars(options).items() if k != "json"}}
        options.json.write_text(json.dumps({"machine": machine("jax", "optax"), **result}, indent=2) + "\n")
    a, b = (trainer.losses for trainer in trainers)
    if any(abs(x - y) > 1e-3 * abs(x) for x, y in zip(a, b, strict=True)):
        sys.exit("the two steps do not compute the same: their losses differ")


if __name__ == "__main__":
    main()
