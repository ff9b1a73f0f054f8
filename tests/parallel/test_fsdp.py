"""The state split over two devices against a copy on each: the same numbers from half the memory."""

from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.check import problems
from jgpt.config.defaults import default_config
from jgpt.data.batches import Batch
from jgpt.errors import UserError
from jgpt.model.shapes import model_config
from jgpt.parallel.build import Parts, make_parts
from jgpt.parallel.evaluation import evaluate
from jgpt.parallel.rules import group_size
from jgpt.planning.audit import collectives
from jgpt.planning.hlo import parse
from jgpt.step.state import TrainState

V, T, STEPS, HOT = 64, 12, 3, 63  # HOT: an id whose row of the embedding is infinite after `heat`
NUMBERS = 4 * 50  # bytes of the numbers that XLA may sum together with arrays: the loss, the norm of each parameter


def config_of(parallel: str, gather: str = "step", compute: str = "fp32", kind: str = "adamw") -> ConfigDict:
    config = default_config()
    config.model.update(
        n_layers=2,
        n_heads=2,
        d_model=16,
        context_length=T,
        dropout=0.1,
        bias=True,
        mlp="gelu",
        position="learned",
        tie_embeddings=False,
    )
    config.optimizer.update(warmup_steps=1, total_steps=10, learning_rate=0.02, eps=1e-3, kind=kind)
    config.batch.global_batch_size, config.execution.micro_batch_size = 8, 2  # 2 devices x 2 micro-batches x 2
    config.execution.update(parallel=parallel, gather=gather)
    config.precision.compute, config.precision.loss_scale, config.precision.gradient_average = compute, 8.0, compute
    return config


@cache
def parts(parallel: str, gather: str = "step", compute: str = "fp32", kind: str = "adamw") -> Parts:
    config = config_of(parallel, gather, compute, kind)
    return make_parts(config, model_config(config.model, V), jax.local_devices())


def batch(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, HOT, (8, T + 1)).astype(np.int32)


def step(p: Parts, state: TrainState, tokens: np.ndarray) -> tuple[TrainState, dict[str, Any]]:
    state, numbers = p.train_step(state, {}, p.strategy.place_batch(Batch(tokens), p.accumulation))
    return state, p.strategy.on_host(numbers)


@cache
def trained(parallel: str, gather: str = "step", kind: str = "adamw") -> tuple[TrainState, list[dict[str, Any]]]:
    """Train three steps in fp32; return the state, on the host, and the numbers of each step."""
    p, all_numbers = parts(parallel, gather, kind=kind), []
    state = p.first_state()
    for number in range(STEPS):
        state, numbers = step(p, state, batch(number))
        all_numbers.append(numbers)
    assert p.train_step._cache_size() == 1 if parallel == "fsdp" else True  # type: ignore[attr-defined]
    return p.strategy.on_host(state), all_numbers


def assert_close(found: Any, expected: Any) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("gather, kind", [("step", "adamw"), ("layer", "adamw"), ("step", "muon"), ("layer", "muon")])
def test_trains_as_with_a_copy_on_each_device(gather: str, kind: str):
    """Losses, norms, parameters and moments over three steps of two micro-batches with dropout."""
    (found, numbers), (expected, expected_numbers) = trained("fsdp", gather, kind), trained("data", kind=kind)
    for one, other in zip(numbers, expected_numbers, strict=True):
        assert_close(one, other)
    assert_close(found, expected)


def test_each_device_holds_half_of_the_state():
    p = parts("fsdp")
    state = p.first_state()
    held = [sum(x.addressable_shards[i].data.nbytes for x in jax.tree.leaves(state)) for i in range(2)]
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    small = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim < 2)  # vectors and counters are on both
    assert held == [p.strategy.bytes_per_device(state, {})] * 2 == [(whole + small) // 2] * 2
    assert small < whole / 10


def heat(state: TrainState) -> TrainState:
    """Make one row of the token embedding infinite: only a batch with HOT among its inputs sees it."""
    table = np.array(state.params["wte"]["embedding"])
    table[HOT] = np.inf
    return state._replace(params=state.params | {"wte": {"embedding": table}})


@pytest.mark.parametrize("gather", ["step", "layer"])
@pytest.mark.parametrize("hot_row", [1, 6])
def test_an_overflow_on_one_device_changes_no_part_of_the_state(gather: str, hot_row: int):
    """fp16 with loss scaling; rows 0 to 3 are the first device's."""
    p = parts("fsdp", gather, "fp16")
    start = heat(p.strategy.on_host(p.first_state()))
    hot = batch(1)
    hot[hot_row, 2] = HOT
    state, numbers = step(p, p.strategy.place_state(start), hot)
    after = p.strategy.on_host(state)
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), *((s.params, s.opt_state) for s in (after, start)))
    assert jax.tree.all(same)
    assert (int(after.step), int(after.updates), float(after.loss_scale.scale)) == (1, 0, 4)
    state, numbers = step(p, state, batch(2))
    assert np.isfinite(numbers["loss"]) and int(p.strategy.on_host(state).updates) == 1


def exchanged(gather: str, accumulation: int, kind: str = "adamw") -> tuple[Counter[tuple[str, bool]], Parts]:
    """Return the bytes that a device gives to collectives of arrays in a step, by their kind, in a loop or outside."""
    config = config_of("fsdp", gather, kind=kind)
    config.batch.global_batch_size = 2 * config.execution.micro_batch_size * accumulation
    p = make_parts(config, model_config(config.model, V), jax.local_devices())
    assert p.accumulation == accumulation
    found: Counter[tuple[str, bool]] = Counter()
    for one in collectives(parse(p.lower().compile().as_text() or "")):
        found[one.kind, one.in_loop] += one.bytes * one.times
    return found, p


def sizes(tree: Any) -> tuple[int, int]:
    """Return the bytes of the matrices and of the vectors of a tree, in fp32."""
    leaves = jax.tree.leaves(tree)
    return 4 * sum(x.size for x in leaves if x.ndim > 1), 4 * sum(x.size for x in leaves if x.ndim == 1)


@pytest.mark.parametrize("accumulation", [1, 2])  # 2: a step that is compiled for `parts`, too
def test_nothing_is_exchanged_inside_the_loop_over_micro_batches(accumulation: int):
    """With gather=step: each array once a step, whatever the accumulation."""
    found, p = exchanged("step", accumulation)
    matrices, vectors = sizes(jax.eval_shape(p.init).params)
    assert found.pop(("all-gather", False)) == matrices // 2  # each device brings its half
    # Of a matrix each device keeps half of the sum: a reduce-scatter, for which XLA on CPUs sums all of it.
    summed = found.pop(("all-reduce", False)) + found.pop(("reduce-scatter", False), 0)
    assert matrices + vectors <= summed <= matrices + vectors + NUMBERS and not found


@pytest.mark.parametrize("accumulation", [1, 2])  # 2: a step that is compiled for `parts`, too
def test_blocks_are_gathered_for_each_micro_batch(accumulation: int):
    """With gather=layer: a block's matrices forward and backward (XLA on CPUs makes one of both); vectors at the end.

    tests/planning/test_t4.py has the numbers of the program for two T4s.
    """
    found, p = exchanged("layer", accumulation)
    params = jax.eval_shape(p.init).params
    matrices, vectors = sizes(params)
    blocks = sizes({name: params[name] for name in params if name.startswith("h_")})[0]
    in_loop = accumulation > 1
    assert accumulation * blocks <= 2 * found["all-gather", in_loop] <= accumulation * (matrices + blocks)
    scattered = found["reduce-scatter", in_loop] + found["all-reduce", True]
    assert scattered in (accumulation * matrices, 0 if accumulation == 1 else accumulation * matrices)
    assert vectors <= found["all-reduce", False] <= vectors + NUMBERS + (0 if in_loop else matrices)


@pytest.mark.parametrize("gather", ["step", "layer"])
def test_whole_matrices_go_to_muon_and_come_back_once_a_step(gather: str):
    """By two all-to-alls of all matrices; their products exchange nothing, and no device gets all of them."""
    (found, p), (without, _) = exchanged(gather, 2, "muon"), exchanged(gather, 2)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(p.init).params)
    kernels = 4 * sum(x.size for path, x in leaves if path[-1].key == "kernel")  # of each shape an even number
    assert found.pop(("all-to-all", False)) == 2 * kernels // 2  # there and back, of the half that a device holds
    for exchange, size in found.items():
        assert size <= without[exchange] + NUMBERS, (exchange, found, without)


@pytest.mark.parametrize("gather", ["step", "layer"])
def test_evaluation_is_that_of_one_device(gather: str):
    blocks = [Batch(tokens) for tokens in batch(7)]

    def loss(p: Parts) -> float:
        return evaluate(p.strategy, p.eval_step, p.first_state().params, {}, blocks, rows=2, context_length=T)[0]

    assert loss(parts("fsdp", gather)) == pytest.approx(loss(parts("data")), rel=1e-5)


def test_a_device_that_decodes_gets_all_parameters():
    p = parts("fsdp")
    state = p.first_state()
    for found, split in zip(jax.tree.leaves(p.strategy.for_decoding(state)), jax.tree.leaves(state), strict=True):
        assert found.devices() == {p.strategy.devices[0]} and jnp.array_equal(found, np.asarray(split))


def test_groups_of_devices_hold_a_copy_each():
    assert group_size("data=2,fsdp=1", "fsdp", 2) == 1
    config = config_of("fsdp")
    config.execution.mesh = "data=2,fsdp=1"
    p = make_parts(config, model_config(config.model, V), jax.local_devices())
    state = p.first_state()
    assert all(x.is_fully_replicated for x in jax.tree.leaves(state))
    for number, expected in enumerate(trained("data")[1]):
        state, numbers = step(p, state, batch(number))
        assert_close(numbers, expected)


@pytest.mark.parametrize("mesh", ["fsdp=3", "data=2,fsdp=2", "fsdp", "fsdp=-2", "tensor=2", "data=2;fsdp=1", "2"])
def test_a_mesh_that_is_not_the_devices_is_refused(mesh: str):
    with pytest.raises(UserError, match="there are 2 devices.*product.*--config.execution.mesh"):
        group_size(mesh, "fsdp", 2)


def test_what_fsdp_does_not_go_with_is_named():
    config = config_of("fsdp")
    config.init_from, config.lora.rank = "a model", 4
    assert any("parallel='fsdp' with lora" in problem for problem in problems(config))
    config = config_of("data")
    config.execution.mesh = "data=2"
    assert any("divide the devices into groups" in problem for problem in problems(config))
