"""The search finds what trying everything would, in few tries. It knows nothing of compilers, nor do these tests."""

from dataclasses import dataclass, replace
from itertools import product

import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.model.shapes import model_config
from jgpt.parallel.devices import training_devices
from jgpt.planning import search as search_room
from jgpt.planning.devices import compile_only, this_machine
from jgpt.planning.execution import Execution
from jgpt.planning.search import ATTENTIONS, REMATS, TIE, Search, Space, attentions_of, check_parameters_fit, space_of

T, STATE, DIVISORS = 1024, 3000, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
WAYS = [
    ("none", "chunked_vjp"),
    ("none", "chunked"),
    ("none", "chunked_vjp_recompute"),
    ("dots", "chunked_vjp"),
    ("block", "chunked_vjp"),
]
SAVED = {"chunked_vjp": 0.0, "chunked": -20.0, "chunked_vjp_recompute": 120.0}  # MB a sequence
SLOWER = {"chunked_vjp": 0.0, "chunked": 0.04, "chunked_vjp_recompute": 0.05}  # seconds a sequence
ACTIVATIONS = {"none": 700.0, "dots": 500.0, "block": 150.0}  # MB a sequence
COST = {"none": 1.0, "dots": 1.1, "block": 1.3}  # seconds a sequence


@dataclass(frozen=True)
class Step:
    """A made-up step: memory along a line, bent a little; time a line as well."""

    execution: Execution
    state: int = STATE
    knows_speed: bool = True

    @property
    def peak(self) -> int:
        micro, remat, chunk, attention, _ = self.execution
        return int(
            STATE + micro * (ACTIVATIONS[remat] - SAVED[attention]) + 0.05 * micro**1.5 + min(chunk, micro * T) * 0.2
        )

    @property
    def seconds(self) -> float | None:
        micro, remat, chunk, attention, _ = self.execution
        chunks = -(-micro * T // chunk)
        return 96 * (COST[remat] + SLOWER[attention]) + 96 / micro * (0.2 + 0.05 * chunks) if self.knows_speed else None


def search(limit: int, knows_speed: bool = True, **space) -> Search[Step]:
    given = {
        "sizes": DIVISORS,
        "ways": WAYS,
        "chunks": [2048, 4096, 8192],
        "sequence_length": T,
        "first_size": 8,
    } | space
    return Search(lambda execution: Step(execution, knows_speed=knows_speed), Space(**given), limit)


@pytest.mark.parametrize("limit", [4000, 5000, 6500, 8000, 9000, 10_000, 13_500, 20_000, 30_000, 100_000])
def test_it_finds_what_trying_everything_finds(limit: int):
    found = search(limit)
    best = found.fastest()
    everything = [
        Step(Execution(micro, remat, chunk, attention))
        for micro, (remat, attention), chunk in product(DIVISORS, WAYS, (2048, 4096, 8192))
    ]
    fit = [step for step in everything if step.peak <= limit]
    assert best is not None and best.peak <= limit
    # Less than TIE is no difference, and a chunk that does not fit the largest micro-batch is not tried with others.
    assert best.seconds <= (1 + 2 * TIE) * min(step.seconds for step in fit)
    assert len(found.tried) <= 12  # of 180


def test_few_tries_where_the_first_is_nearly_the_answer():
    found = search(STATE + 8 * 700 + 1000, chunks=[2048], ways=WAYS[:1])
    best = found.fastest()
    assert best is not None and best.execution == Execution(8, "none", 2048, "chunked_vjp")
    assert len(found.tried) <= 2


def test_recomputation_is_tried_only_where_micro_batches_are_small():
    roomy, narrow = search(20_000, chunks=[2048]), search(4600, chunks=[2048])
    assert roomy.fastest() is not None and {execution.remat for execution in roomy.tried} == {"none"}
    assert {execution.attention for execution in roomy.tried} == {"chunked_vjp", "chunked"}
    best = narrow.fastest()
    assert best is not None and {execution.remat for execution in narrow.tried} >= {"none", "dots"}


def test_none_fits():
    found = search(STATE + 100)
    assert found.fastest() is None
    assert Execution(1, "block", 2048, "chunked_vjp") in found.tried  # the least was tried
    hopeless = search(STATE - 1)
    assert hopeless.fastest() is None and len(hopeless.tried) <= 3  # no recomputation makes the parameters smaller


def test_without_rates_the_largest_micro_batch_without_recomputation_wins():
    best = search(9000, knows_speed=False).fastest()
    assert best is not None and best.execution == Execution(6, "none", 2048, "chunked_vjp")
    best = search(3800, knows_speed=False, chunks=[256]).fastest()
    assert best is not None and best.execution == Execution(1, "none", 256, "chunked_vjp")
    best = search(3600, knows_speed=False, chunks=[256]).fastest()
    assert best is not None and best.execution == Execution(1, "dots", 256, "chunked_vjp")


@pytest.mark.parametrize(("limit", "size"), [(STATE + 1200, 1), (5000, 2), (13_500, 12)])
def test_the_first_size_changes_the_tries_and_not_the_answer(limit: int, size: int):
    for first in (1, 3, 96):
        best = search(limit, ways=WAYS[:1], chunks=[2048], first_size=first).fastest()
        assert best is not None and best.execution.micro_batch_size == size


def test_a_model_that_fills_the_device_starts_with_one_sequence():
    config = default_config()
    config.update_from_flattened_dict(
        {"model.n_layers": 2, "model.d_model": 4096, "model.n_heads": 32, "model.context_length": 1024}
        | {"batch.global_batch_size": 16, "execution.micro_batch_size": 0, "execution.remat": "auto"}
    )
    shapes, machine = model_config(config.model, 50_304), this_machine(training_devices(config))

    def first_size(gib: float) -> int:
        return space_of(config, shapes, replace(machine, memory_bytes=int(gib * 2**30)), everything=False).first_size

    least = 6.81  # GiB of parameters and moments; a sequence takes 0.44
    assert [first_size(gib) for gib in (least - 1, least + 0.1, least + 1, 80)] == [1, 1, 2, 8]
    config.execution.attention = "flash"  # which keeps no scores
    assert [first_size(gib) for gib in (least + 1, least + 2)] == [3, 6]
    check_parameters_fit(config, shapes, replace(machine, memory_bytes=7 * 2**30))
    with pytest.raises(UserError, match="moments alone take 6.81 GiB of each, 0.81 more than the 6.00 that there are"):
        check_parameters_fit(config, shapes, replace(machine, memory_bytes=6 * 2**30))


@pytest.mark.parametrize(("name", "compute", "first"), [("t4", "fp16", "chunked_vjp"), ("h100", "bf16", "flash")])
def test_the_form_of_attention_that_suits_the_device_is_tried_first(
    name: str, compute: str, first: str, monkeypatch, caplog
):
    """On a newer GPU that is fused attention, where it can be compiled; on a CPU nothing else is worth a try."""
    config = config_of(**{"model.d_model": 128, "precision.compute": compute, "execution.deterministic": False})
    shapes = model_config(config.model, 100)
    try:
        target = compile_only(name)
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(search_room, "has_cudnn", lambda: True)
    assert attentions_of(config, shapes, target) == list(dict.fromkeys((first, *ATTENTIONS))) and not caplog.text
    monkeypatch.setattr(search_room, "has_cudnn", lambda: False)
    assert attentions_of(config, shapes, target) == list(ATTENTIONS)
    assert ("pip install nvidia-cudnn-cu12" in caplog.text) == (first == "flash")
    config.precision.compute = "fp32"
    assert attentions_of(config, shapes, this_machine(training_devices(config))) == ["chunked_vjp"]


def test_nothing_is_tried_twice():
    tried: list[Execution] = []

    def once(execution: Execution) -> Step:
        tried.append(execution)
        return Step(execution)

    Search(once, Space(DIVISORS, WAYS, [2048, 4096], T, 8), 8000).fastest()
    assert len(tried) == len(set(tried))


def config_of(**changes) -> ConfigDict:
    config = default_config()
    small = {"model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16, "batch.global_batch_size": 24}
    config.update_from_flattened_dict(small | {"execution.micro_batch_size": 5} | changes)
    return config


def test_only_what_the_config_leaves_open_is_searched():
    def space(everything: bool = False, **changes) -> Space:
        config = config_of(**changes)
        return space_of(config, model_config(config.model, 100), this_machine(training_devices(config)), everything)

    own = [("none", "auto")]
    assert space() == Space([4], own, [2048], 256, 32)  # as training takes it: the largest divisor of 12 below 5
    assert space(**{"execution.micro_batch_size": 0}) == Space([1, 2], own, [2048], 256, 32)  # what a CPU's caches hold
    long = {"execution.micro_batch_size": 0, "batch.sequence_length": 1024, "model.context_length": 1024}
    assert space(**long).sizes == [1]
    assert space(**{"execution.remat": "auto", "execution.loss_chunk_tokens": 0}) == Space(
        [4], [(remat, "auto") for remat in REMATS], [0], 256, 32
    )
    all_ways = [(remat, "chunked_vjp") for remat in REMATS]  # on a CPU
    assert space(everything=True) == Space([1, 2], all_ways, [2048, 4096, 8192], 256, 32)
