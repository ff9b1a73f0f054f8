"""The step by identities: a batch in parts is a big batch, and an overflow anywhere changes nothing."""

import re
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.model.gpt import GPT
from jgpt.model.precision import Policy
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.replicate import Replicate
from jgpt.step.eval_step import make_eval_step
from jgpt.step.gradients import Exchange
from jgpt.step.loss_scale import MAX_LOSS_SCALE
from jgpt.step.optimizer import learning_rate_schedule, make_optimizer
from jgpt.step.state import LossScale, TrainState, init_state
from jgpt.step.train_step import Step

V, T, HOT = 64, 12, 63  # HOT: an id whose row of the embedding is infinite after `heat`
FP32, FP16 = Policy(), Policy(compute=jnp.float16)
HALF = Policy(param=jnp.float16, compute=jnp.float16)
SEED = 5


class Parts(NamedTuple):
    """A step in its several forms, compiled once for all tests that use it."""

    model: GPT
    optimizer: optax.GradientTransformation
    with_seed: Any  # seed -> the pure step
    runner: Replicate
    step: Any
    initial: TrainState  # on the host
    accumulation: int


def _first_scale(policy: Policy) -> LossScale:
    zero = np.int32(0)
    return LossScale(np.float32(8 if policy.scales_loss else 1), zero, zero, zero)


def _random(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Make a parameter without compiling anything; larger than at the start of training, so that gradients are."""
    values = 0.1 * np.random.default_rng(list(str(path).encode())).normal(size=leaf.shape)
    return (values + (path[-1].key == "scale")).astype(leaf.dtype)


@cache
def parts(
    policy: Policy = FP32,
    devices: int = 2,
    accumulation: int = 1,
    dropout: float = 0.0,
    average: Any = jnp.float32,
    kind: str = "adamw",
) -> Parts:
    shapes = ModelConfig(
        V, T, n_layers=1, n_heads=2, n_kv_heads=1, d_model=16, d_head=8, d_ff=32, dropout=dropout, bias=True,
        position="learned", mlp="gelu", tie_embeddings=False,
    )  # fmt: skip
    model = GPT(shapes, policy.compute)
    o = default_config().optimizer
    # A large eps keeps Adam from blowing rounding up: its first update is otherwise the sign of the gradient.
    o.update({"eps": 1e-2, "warmup_steps": 2, "total_steps": 20, "learning_rate": 0.05, "clip_norm": 0.5})
    o.update(kind=kind, muon_learning_rate=0.05)
    optimizer = make_optimizer(o, policy)
    schedule = learning_rate_schedule(o)

    def with_seed(seed: Any) -> Any:
        return Step(
            model, policy, optimizer, schedule, accumulation=accumulation, seed=seed, loss_chunk_tokens=16,
            growth_steps=2, average_dtype=average,
        )  # fmt: skip

    runner = Replicate(jax.local_devices()[:devices])
    abstract = jax.eval_shape(lambda: init_state(model, policy, optimizer, SEED, 8.0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    params = jax.tree_util.tree_map_with_path(_random, abstract.params)
    initial = zeros._replace(params=params, loss_scale=_first_scale(policy))
    return Parts(model, optimizer, with_seed, runner, runner.train_step(with_seed(SEED)), initial, accumulation)


def tokens(seed: int, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, HOT, (rows, T + 1)).astype(np.int32)


def run(p: Parts, state: TrainState, *batches: np.ndarray) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
    """Train on global batches [rows, T+1], cut for the devices and the micro-batches as the loop does."""
    placed, metrics = p.runner.place_state(state), []
    for batch in batches:
        placed, numbers = p.step(placed, {}, p.runner.place_batch(Batch(batch), p.accumulation))
        metrics.append(p.runner.on_host(numbers))
    return placed, metrics


def same(a: Any, b: Any) -> bool:
    """Compare two trees bit for bit, NaN included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b))))  # noqa: B905


def on_each(p: Parts, state: TrainState) -> list[TrainState]:
    """Return each device's copy of a state."""
    leaves, tree = jax.tree.flatten(state)
    shards = [[np.asarray(shard.data) for shard in leaf.addressable_shards] for leaf in leaves]
    return [jax.tree.unflatten(tree, copies) for copies in zip(*shards, strict=True)]


def learned(state: TrainState) -> tuple:
    """Return what a skipped step must not touch: parameters, moments, and where the schedule stands."""
    return state.params, state.opt_state, state.updates


def heat(state: TrainState) -> TrainState:
    """Make one row of the token embedding infinite: only a batch with HOT among its inputs sees it."""
    table = np.array(state.params["wte"]["embedding"])
    table[HOT] = np.inf
    return state._replace(params=state.params | {"wte": {"embedding": table}})


def assert_close(a: Any, b: Any) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


@cache
def plain_updates() -> list[tuple[Any, float, float]]:
    """Train on three batches by jax.grad of the mean loss and one optimizer update: no chunks, scale, parts or pmap."""
    p = parts(accumulation=2)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        hidden = p.model.apply({"params": params}, batch[:, :-1]).hidden
        log_p = jax.nn.log_softmax(hidden @ params["lm_head"]["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(log_p, batch[:, 1:, None], -1))

    @jax.jit
    def update(params: Any, opt_state: Any, batch: jax.Array) -> tuple:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = p.optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, optax.tree.norm(gradient)

    params, opt_state, results = p.initial.params, p.initial.opt_state, []
    for seed in range(3):
        params, opt_state, value, norm = update(params, opt_state, tokens(seed))
        results.append(((params, opt_state), float(value), float(norm)))
    return results


@pytest.mark.parametrize("devices, accumulation", [(1, 4), (2, 2)])
def test_is_one_big_batch_in_parts(devices: int, accumulation: int):
    """Loss, gradient norm, parameters and moments over three steps, to the rounding of fp32 sums."""
    p, plain = parts(devices=devices, accumulation=accumulation), plain_updates()
    state, metrics = run(p, p.initial, *(tokens(seed) for seed in range(3)))
    for found, (_, loss, norm) in zip(metrics, plain, strict=True):
        np.testing.assert_allclose([found["loss"], found["grad_norm"]], [loss, norm], rtol=1e-5)
    assert [float(found["learning_rate"]) for found in metrics] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05])
    for each in on_each(p, state):
        assert_close((each.params, each.opt_state), plain[-1][0])
        assert not same(each.params, p.initial.params)


def test_optimizer_runs_once_a_step_and_devices_agree_bitwise():
    p = parts(accumulation=2)
    state, _ = run(p, p.initial, *(tokens(seed) for seed in range(3)))
    first, second = on_each(p, state)
    assert same(first, second)
    adam = first.opt_state[1][0]
    assert (int(first.step), int(first.updates), int(adam.count)) == (3, 3, 3)


def test_muon_shared_by_two_devices_is_muon_on_one():
    """Three shapes of matrices, of which two have an odd number: a device has nothing to do for its last place."""
    one, two = parts(devices=1, accumulation=4, kind="muon"), parts(accumulation=2, kind="muon")
    (a, [*exact]), (b, [*shared]) = (run(p, p.initial, *(tokens(seed) for seed in range(3))) for p in (one, two))
    np.testing.assert_allclose([m["loss"] for m in shared], [m["loss"] for m in exact], rtol=1e-5)
    first, second = on_each(two, b)
    assert same(first, second)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(first.params), jax.tree.leaves(on_each(one, a)[0].params), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "policy, kind", [(FP32, "adamw"), (FP16, "adamw"), (FP16, "muon")], ids=["fp32", "fp16", "muon in fp16"]
)
@pytest.mark.parametrize("hot_row", range(0, 8, 3))
def test_overflow_on_one_device_changes_nothing_on_either(policy: Policy, kind: str, hot_row: int):
    """Rows 0 to 3 are the first device's, two to a micro-batch; the row of the hot id decides who overflows."""
    p = parts(policy, accumulation=2, kind=kind)
    start, _ = run(p, p.initial, tokens(0))
    start = heat(on_each(p, start)[0])
    hot = tokens(1)
    hot[hot_row, 2] = HOT
    state, (numbers,) = run(p, start, hot)
    assert not np.isfinite(numbers["loss"]) or not np.isfinite(numbers["grad_norm"])
    for after in on_each(p, state):
        assert same(learned(after), learned(start))
        assert (int(after.step), int(after.updates)) == (2, 1)
        assert [int(n) for n in after.loss_scale[1:]] == [0, 1, 1]  # good steps, skipped in all, skipped in a row
        assert after.loss_scale.scale == (4 if policy.scales_loss else 1)
    assert (int(numbers["skipped_steps"]), int(numbers["skipped_in_a_row"])) == (1, 1)


def test_one_bad_batch_does_not_poison_the_next():
    """After the skipped step a good batch does, bit for bit, what it would have done at once."""
    p = parts(accumulation=2)
    start = heat(p.initial)
    hot, good = tokens(1), tokens(2)
    hot[:, 3] = HOT
    direct, _ = run(p, start, good, good)
    after, metrics = run(p, start, hot, good, hot, hot, good)
    assert same(learned(direct), learned(after))
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [1, 0, 1, 2, 0]
    assert int(after.loss_scale.skipped_steps) == 3 and int(after.step) == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.opt_state))


def test_schedule_waits_for_skipped_steps():
    p = parts(accumulation=2)
    hot = tokens(1)
    hot[:, 3] = HOT
    _, skipping = run(p, heat(p.initial), tokens(0), hot, tokens(2), tokens(3))
    _, going = run(p, heat(p.initial), tokens(0), tokens(2), tokens(3))
    rates = [[float(m["learning_rate"]) for m in metrics] for metrics in (skipping, going)]
    assert [rates[0][0], *rates[0][2:]] == rates[1] and rates[0][1] == rates[0][2]


@cache
def poisoned_step(policy: Policy) -> Any:
    """Return the pure step on one device, its averaged gradient and loss replaced by a number: 0, inf or nan."""
    p = parts(policy, devices=1)

    def step(state: TrainState, batch: jax.Array, factor: jax.Array) -> Any:
        average = partial(jax.tree.map, lambda x: jnp.full(x.shape, factor))
        return p.with_seed(SEED)(state, {}, Batch(batch), Exchange(average))

    return jax.jit(step)


def scale_after(policy: Policy, start: float, factors: str) -> list[float]:
    """Return the loss scale after each of a row of steps: "." is a good one, "i" and "n" overflow to inf and nan."""
    state, scales = parts(policy, devices=1).initial, []
    state = state._replace(loss_scale=state.loss_scale._replace(scale=np.float32(start)))
    for factor in factors:
        factor = np.float32({".": 0.0, "i": np.inf, "n": np.nan}[factor])
        state, _ = poisoned_step(policy)(state, tokens(0)[None], factor)
        scales.append(float(state.loss_scale.scale))
    return scales


def test_scale_doubles_after_good_steps_and_halves_after_bad_ones():
    assert scale_after(FP16, 8, "....") == [8, 16, 16, 32]  # growth_steps is 2
    assert scale_after(FP16, 8, ".i..n") == [8, 4, 4, 8, 4]  # an overflow begins the count anew
    assert scale_after(FP16, 2, "ninni.") == [1, 1, 1, 1, 1, 1]  # the floor
    assert scale_after(FP16, MAX_LOSS_SCALE / 2, "....")[1::2] == [MAX_LOSS_SCALE, MAX_LOSS_SCALE]  # the cap


@pytest.mark.parametrize("bad", ["i", "n"])
def test_a_policy_without_scaling_skips_and_leaves_the_scale_alone(bad: str):
    assert scale_after(FP32, 1, f"...{bad}{bad}.") == [1] * 6
    state = parts(devices=1).initial
    after, numbers = poisoned_step(FP32)(state, tokens(0)[None], np.float32(np.inf if bad == "i" else np.nan))
    assert same(learned(after), learned(state)) and int(after.loss_scale.skipped_in_a_row) == 1
    assert not np.isfinite(numbers["grad_norm"])


@pytest.mark.parametrize("policy", [FP32, FP16, HALF], ids=["fp32", "fp16", "half"])
def test_first_state(policy: Policy):
    """Parameters of the policy's dtype from the seed, fp32 zeros for moments, and a scale where one is needed."""
    p = parts(policy, accumulation=2)
    made = jax.jit(lambda: init_state(p.model, policy, p.optimizer, SEED, 8.0))()
    assert same(made._replace(params=p.initial.params), p.initial)
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {np.dtype(policy.param)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params))


def test_fp16_gradient_overflow_with_a_finite_loss():
    """The scale alone overflows: loss finite, gradient not; halving it mends that within its 24 powers of two."""
    p = parts(FP16, accumulation=2)
    table = 64 * np.asarray(p.initial.params["lm_head"]["embedding"])
    start = p.initial._replace(params=p.initial.params | {"lm_head": {"embedding": table}})
    start = start._replace(loss_scale=start.loss_scale._replace(scale=np.float32(MAX_LOSS_SCALE)))
    state, (numbers,) = run(p, start, tokens(0))
    assert np.isfinite(numbers["loss"]) and not np.isfinite(numbers["grad_norm"])
    assert same(learned(state), learned(start)) and float(state.loss_scale.scale) == MAX_LOSS_SCALE / 2
    state, _ = run(p, on_each(p, state)[0], *[tokens(0)] * 24)
    assert int(state.updates) > 0


def test_scale_cancels_out():
    """fp16's update does not depend on the loss scale, but for what falls below its smallest number."""
    p = parts(FP16, accumulation=2)
    results = []
    for scale in (2.0**8, 2.0**10):
        start = p.initial._replace(loss_scale=p.initial.loss_scale._replace(scale=np.float32(scale)))
        results.append(on_each(p, run(p, start, tokens(0), tokens(1))[0])[0].params)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_state_is_donated():
    p = parts(accumulation=2)
    before = p.runner.place_state(p.initial)
    p.step(before, {}, p.runner.place_batch(Batch(tokens(0)), 2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_one_gradient_all_reduce():
    """The compiled step holds one all-reduce of everything, though two micro-batches make the gradient."""
    p = parts(accumulation=2)
    state, batch = p.runner.place_state(p.initial), p.runner.place_batch(Batch(tokens(0)), 2)
    text = p.step.lower(state, {}, batch).compile().as_text()
    reduces = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    n_parameters = sum(x.size for x in jax.tree.leaves(p.initial.params))
    sizes = [
        sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"f32\[([\d,]*)\]", operands))
        for operands in reduces
    ]
    assert [size for size in sizes if size > 1] in ([n_parameters], [n_parameters + 1])  # with the loss, or beside it
    assert len(sizes) <= 2


def test_gradients_averaged_in_fp16_are_those_averaged_in_fp32_to_rounding():
    """Two devices with different batches; what they send is fp16, and the loss is not rounded with it."""
    wide, narrow = parts(FP16, accumulation=2), parts(FP16, accumulation=2, average=jnp.float16)
    state, batch = narrow.runner.place_state(narrow.initial), tokens(0)
    lowered = narrow.step.lower(state, {}, narrow.runner.place_batch(Batch(batch), 2)).as_text()
    n_parameters = sum(x.size for x in jax.tree.leaves(narrow.initial.params))
    sent = re.findall(r"all_reduce.*?: \(tensor<([\dx]*)x?(f\d+)>\) ->", lowered, re.DOTALL)
    assert (str(n_parameters) + "x", "f16") in [(size.rstrip("x") + "x", dtype) for size, dtype in sent]
    (a, [exact]), (b, [rounded]) = (run(p, p.initial, tokens(0)) for p in (wide, narrow))
    assert rounded["loss"] == exact["loss"]
    np.testing.assert_allclose(rounded["grad_norm"], exact["grad_norm"], rtol=1e-3)
    for x, y in zip(
        jax.tree.leaves(on_each(wide, a)[0].params), jax.tree.leaves(on_each(narrow, b)[0].params), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert not same(on_each(wide, a)[0].params, on_each(narrow, b)[0].params)


def test_dropout_is_a_function_of_seed_step_device_and_micro_batch():
    p = parts(accumulation=2, dropout=0.4)
    a, b = tokens(0, rows=2), tokens(1, rows=2)

    @jax.jit  # once for all seeds, steps and devices
    def loss_of(state: TrainState, batch: jax.Array, seed: jax.Array, device: jax.Array) -> jax.Array:
        return p.with_seed(seed)(state, {}, Batch(batch), Exchange(device=device))[1]["loss"]

    def loss(first: Any = a, second: Any = b, step: int = 0, device: int = 0, seed: int = SEED) -> float:
        at_step = p.initial._replace(step=np.int32(step))
        return float(loss_of(at_step, np.stack([first, second]), np.int32(seed), np.int32(device)))

    assert loss() == loss() and loss(step=3, device=1) == loss(step=3, device=1)
    different = [loss(), loss(step=1), loss(device=1), loss(step=1, device=1), loss(seed=6)]
    assert len(set(different)) == len(different)
    assert abs(loss(a, b) - loss(b, a)) > 1e-4  # the mean of both micro-batches, each with dropout of its own
    # Both devices get the same rows here: their loss is the mean of what each would have alone.
    _, (numbers,) = run(p, p.initial, np.concatenate([a, b, a, b]))
    assert float(numbers["loss"]) == pytest.approx((loss() + loss(device=1)) / 2, rel=1e-5)


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key.key]
    return tree


def test_half_precision_parameters_update():
    """They stay fp16, their moments fp32, and a large enough update arrives."""
    p = parts(HALF, accumulation=2)
    batches = [tokens(seed) for seed in range(3)]
    state, metrics = run(p, p.initial, *batches)
    after = on_each(p, state)[0]
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {np.dtype(np.float16)}
    assert {x.dtype for x in jax.tree.leaves(after.opt_state) if x.ndim} == {np.dtype(np.float32)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(p.initial.params):
        if path[-1].key in ("kernel", "embedding"):  # norms sit at 1, where fp16's steps are large
            assert not same(leaf, jax.tree_util.tree_leaves(_at(after.params, path))[0])
    assert int(after.updates) == 3 and all(np.isfinite(m["grad_norm"]) for m in metrics)


def test_fp16_follows_fp32():
    batches = [tokens(0)] * 6
    _, exact = run(parts(accumulation=2), parts(accumulation=2).initial, *batches)
    _, half = run(parts(FP16, accumulation=2), parts(FP16, accumulation=2).initial, *batches)
    np.testing.assert_allclose([m["loss"] for m in half], [m["loss"] for m in exact], rtol=2e-3)
    assert exact[-1]["loss"] < exact[0]["loss"] - 0.05


def test_eval_step_counts_what_its_weights_say_and_drops_nothing():
    p = parts(dropout=0.4)
    evaluate = p.runner.eval_step(make_eval_step(p.model, FP32, 16))
    params, batch = p.runner.place_state(p.initial.params), tokens(0)

    def total(weights: np.ndarray) -> float:
        placed = p.runner.place_sequences(Batch(batch, weights))
        return float(evaluate(params, {}, placed))

    @jax.jit
    def log_probabilities(params: Any) -> jax.Array:
        hidden = p.model.apply({"params": params}, batch[:, :-1]).hidden
        return jax.nn.log_softmax(hidden @ params["lm_head"]["embedding"].T)

    log_p = log_probabilities(p.initial.params)
    losses = -np.take_along_axis(np.asarray(log_p), batch[:, 1:, None], -1)[..., 0]
    random = np.random.default_rng(0).random((8, T)).astype(np.float32)
    for weights in (np.ones((8, T), np.float32), np.zeros((8, T), np.float32), random, (random > 0.7) * random):
        assert total(weights) == pytest.approx(float((losses * weights).sum()), rel=1e-5, abs=1e-5)
