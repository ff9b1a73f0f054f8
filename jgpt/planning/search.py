"""The search for the fastest step that fits: micro-batch, remat, loss chunk and attention, in few compiles.

Beside the data path: `page.py` prints it, `auto.py` puts its answer into a config. A `Search` knows nothing of
compilers: what it tries is a function's business.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.build import micro_batch_sizes
from jgpt.planning.devices import Target
from jgpt.planning.estimate import Choice, Estimate, estimate, least_bytes, with_choice
from jgpt.wording import GIB

REMATS = ("none", "dots", "block")  # fewer FLOPs first, less memory last
ATTENTIONS = ("chunked_vjp", "chunked", "chunked_vjp_recompute")  # of GPUs; the last computes its scores twice
FILLS = 4096  # tokens of a micro-batch that keep a device busy; from there on recomputing costs more than it gains
FIRST_TOKENS = 8192  # of the micro-batch that is tried first, where as many may fit
SAME = 0.005  # of a step's time: less of a difference is none, and less memory decides
SMALLER = "Take a smaller model, or train adapters beside a frozen one (--config.lora.rank=16 with init_from)"
DOUBT = 0.1, 0.02  # of the memory that a line through one measured size, and through two, foretells


class Tried(Protocol):
    """What is known of a choice that was tried: `peak` and `state` bytes, `seconds` of a step or None."""

    @property
    def choice(self) -> Choice: ...
    @property
    def peak(self) -> int: ...
    @property
    def state(self) -> int: ...
    @property
    def seconds(self) -> float | None: ...


Found = TypeVar("Found", bound=Tried)


@dataclass(frozen=True)
class Space:
    """What may be chosen: `sizes` of a micro-batch, smallest first; the others likely best first.

    `ways` are remat and attention: those without recomputation, then those with, the one that takes least last. `begin`
    is about the micro-batch to try first.
    """

    sizes: Sequence[int]
    ways: Sequence[tuple[str, str]]
    chunks: Sequence[int]
    sequence_length: int
    begin: int


@dataclass
class Search(Generic[Found]):
    """One search: `limit` bytes of a device, and all that was tried so far."""

    try_: Callable[[Choice], Found]
    space: Space
    limit: int
    tried: dict[Choice, Found] = field(default_factory=dict)

    def fastest(self) -> Found | None:
        """Return the fastest choice found that fits; None where none does.

        One thing after another, each with the best of those before: without recomputation the largest micro-batch that
        fits; recomputation where that is too small to keep the device busy; then the loss's chunk.
        """
        space = self.space
        for remat, attention in space.ways:
            best = self.best()
            busy = best and (best.seconds is None or best.choice.micro_batch_size * space.sequence_length >= FILLS)
            if busy and (remat != "none" or attention == "chunked_vjp_recompute"):
                break
            self.largest(Choice(0, remat, space.chunks[0], attention))
            if any(tried.state > self.limit for tried in self.tried.values()):
                return None  # the parameters and what goes with them alone are too much
        if best := self.best():
            tokens, smaller = best.choice.micro_batch_size * space.sequence_length, space.chunks[0]
            for chunk in space.chunks[1:] if best.seconds is not None else ():
                if smaller < tokens:  # else one chunk holds the micro-batch already
                    self.measure(best.choice._replace(loss_chunk_tokens=chunk))
                smaller = chunk
        return self.best()

    def best(self) -> Found | None:
        """Return the fastest of those tried that fit; of equals the one that takes least."""
        fit = [tried for tried in self.tried.values() if tried.peak <= self.limit]
        if not fit or fit[0].seconds is None:
            return max(fit, key=lambda tried: tried.choice.micro_batch_size, default=None)
        fastest = min(tried.seconds or 0.0 for tried in fit)
        return min((t for t in fit if (t.seconds or 0.0) <= (1 + SAME) * fastest), key=lambda tried: tried.peak)

    def measure(self, choice: Choice) -> Found:
        """Try a choice, once."""
        if choice not in self.tried:
            self.tried[choice] = self.try_(choice)
        return self.tried[choice]

    def largest(self, choice: Choice) -> None:
        """Find the largest micro-batch with which a choice fits.

        Memory grows with it, along a line for the most part: two sizes, or one and the state, foretell the next.
        """
        sizes = self.space.sizes
        fits, too_large = -1, len(sizes)  # the largest index that fits, the smallest that does not
        at = max(0, bisect_right(sizes, self.space.begin) - 1)
        peaks: dict[int, int] = {}
        while fits + 1 < too_large:
            tried = self.measure(choice._replace(micro_batch_size=sizes[at]))
            peaks.setdefault(0, tried.state)
            peaks[sizes[at]] = tried.peak
            fits, too_large = (at, too_large) if tried.peak <= self.limit else (fits, at)
            (x0, y0), (x1, y1) = sorted(peaks.items())[-2:]
            slope = max(y1 - y0, 1) / (x1 - x0)
            doubt = DOUBT[len(peaks) > 2]
            if 0 <= fits < len(sizes) - 1 and y1 + slope * (sizes[fits + 1] - x1) > (1 + doubt) * self.limit:
                return
            foretold = bisect_right(sizes, x1 + (self.limit - y1) / slope) - 1
            at = min(max(foretold, fits + 1), too_large - 1)


def search(
    config: ConfigDict, shapes: ModelConfig, target: Target, tell: Callable[[Estimate], None], everything: bool = False
) -> Search[Estimate]:
    """Search what a config leaves to the device, or `everything`; `tell` hears of each compile. Returns it, done.

    Raises UserError where the memory is not known, or is less than what goes with any choice.
    """
    if target.memory_bytes is None:
        raise UserError(
            f"how much memory a {target.chip.name} has is not known, so no micro-batch can be chosen for it. Set"
            " --config.execution.micro_batch_size=8, say, and --config.execution.remat=none."
        )

    check_least(config, shapes, target)

    def compiled(choice: Choice) -> Estimate:
        found = estimate(with_choice(config, choice), shapes, target)
        tell(found)
        return found

    found = Search(compiled, space_of(config, shapes, target, everything), target.memory_bytes)
    found.fastest()
    return found


def space_of(config: ConfigDict, shapes: ModelConfig, target: Target, everything: bool) -> Space:
    """Return what a config leaves open, or all there is."""
    b, chunk = config.batch, config.execution.loss_chunk_tokens
    sizes = micro_batch_sizes(b.global_batch_size, 1 if config.execution.parallel == "tensor" else len(target.devices))
    open_size, remats = (
        everything or not config.execution.micro_batch_size,
        REMATS if config.execution.remat == "auto" else [config.execution.remat],
    )
    forms = ATTENTIONS if target.chip.compute_capability else ("chunked",)  # on a CPU the others only move less memory
    ways = [*(("none", form) for form in forms), *((remat, forms[0]) for remat in REMATS[1:])]
    base, length = chunk or 2048, b.sequence_length or shapes.context_length
    return Space(
        sizes=sizes if open_size else [max(n for n in sizes if n <= config.execution.micro_batch_size)],
        chunks=[base, 2 * base, 4 * base] if everything else [chunk],
        ways=ways if everything else [(remat, config.execution.attention) for remat in remats],
        sequence_length=length,
        begin=_likely(config, shapes, target, length),
    )


def _likely(config: ConfigDict, shapes: ModelConfig, target: Target, length: int) -> int:
    """Guess the largest micro-batch that fits without recomputation, if it fills the device or less. At least 1.

    A layer keeps about 20 vectors of each token, and its scores of half the keys twice, in half precision; compiling a
    large model for 8 sequences to learn that 1 does not fit takes many minutes.
    """
    room = (target.memory_bytes or math.inf) - least_bytes(config, shapes, target)
    kept = shapes.n_layers * length * (40 * shapes.d_model + 2 * shapes.n_heads * length)
    return max(1, int(min(FIRST_TOKENS // length, room // kept)))


def check_least(config: ConfigDict, shapes: ModelConfig, target: Target) -> None:
    """Refuse, before anything is compiled, a model whose parameters and moments alone are too much for a device."""
    least, limit = least_bytes(config, shapes, target), target.memory_bytes
    if limit is not None and least > limit:
        raise UserError(
            f"this model does not fit {target.kind}: its parameters and the optimizer's moments alone take"
            f" {least / GIB:.2f} GiB of each, {(least - limit) / GIB:.2f} more than the {limit / GIB:.2f} that there"
            f" are. {SMALLER}."
        )


def refusal(found: Search[Estimate], target: Target) -> str:
    """Say that nothing fits: by how much, and what would."""
    least = min(found.tried.values(), key=lambda tried: tried.peak)
    return (
        f"this model does not fit {target.kind}: the least that was found, {least.choice.flags()}, takes"
        f" {least.peak / GIB:.2f} GiB of each, {(least.peak - found.limit) / GIB:.2f} more than the"
        f" {found.limit / GIB:.2f} that there are; {least.state / GIB:.2f} of it are parameters, moments and gradients."
        f" {SMALLER}, or shorten --config.batch.sequence_length."
    )
