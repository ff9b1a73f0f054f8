"""The search for the fastest step that fits: micro-batch, remat, loss chunk and attention, in few compiles.

Beside the data path: `page.py` prints it, `auto.py` puts its answer into a config. A `Search` knows nothing of
compilers: it calls a function for each execution that it tries.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.model.attention import flash_tpu
from jgpt.model.shapes import ModelConfig
from jgpt.parallel.build import make_parts
from jgpt.parallel.devices import batch_shares, micro_batch_sizes
from jgpt.planning.devices import CUDNN_LINE, Target, has_cudnn
from jgpt.planning.estimate import Estimate, estimate, least_bytes
from jgpt.planning.execution import Execution
from jgpt.wording import GIB

REMATS = ("none", "dots", "block")  # fewer FLOPs first, less memory last
ATTENTIONS = ("chunked_vjp", "chunked", "chunked_vjp_recompute")  # of every GPU; the last computes its scores twice
MIN_BUSY_TOKENS = 4096  # a smaller micro-batch leaves the device idle; with more, recomputation only costs time
FIRST_TOKENS = 8192  # of the micro-batch that is tried first, where as many may fit
CPU_TOKENS = 512  # more leave a core's caches: 2 to 4 rows of 128 tokens were 1.3 times faster than 8 (3M parameters)
TIE = 0.005  # step times within 0.5% are equal; then less memory wins
EXTRAPOLATION_MARGIN = 0.1, 0.02  # of the memory: 10% from one compiled size, 2% from two
SMALLER = (
    "Take a smaller model, or train adapters beside a frozen one (--config.lora.rank=16 with init_from; on several"
    " devices also --config.execution.parallel=tensor)"
)

log = logging.getLogger("jgpt")


class Tried(Protocol):
    """What is known of an execution that was tried: `peak` and `state` bytes, `seconds` of a step or None."""

    @property
    def execution(self) -> Execution: ...
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

    `ways` are remat and attention: those without recomputation, then those with, the one that takes least last.
    `first_size` is about the micro-batch to try first. `gather` is settled before: see `gather.py`.
    """

    sizes: Sequence[int]
    ways: Sequence[tuple[str, str]]
    chunks: Sequence[int]
    sequence_length: int
    first_size: int
    gather: str = "auto"


@dataclass
class Search(Generic[Found]):
    """One search: `limit` bytes of a device, and all that was tried so far."""

    measure: Callable[[Execution], Found]
    space: Space
    limit: int
    tried: dict[Execution, Found] = field(default_factory=dict)

    def fastest(self) -> Found | None:
        """Return the fastest execution that fits; None where none does.

        It chooses one key after another, each with the best of those before: without recomputation the largest
        micro-batch that fits; recomputation where that is too small to keep the device busy; then the loss's chunk.
        """
        space = self.space
        for remat, attention in space.ways:
            best = self.best()
            busy = best and (best.seconds is None or self._tokens(best) >= MIN_BUSY_TOKENS)
            if busy and (remat != "none" or attention == "chunked_vjp_recompute"):
                break
            self._try_sizes(Execution(0, remat, space.chunks[0], attention, space.gather))
            if any(tried.state > self.limit for tried in self.tried.values()):
                return None  # the parameters and what goes with them alone are too much
        if best := self.best():
            smaller = space.chunks[0]
            for chunk in space.chunks[1:] if best.seconds is not None else ():
                if smaller < self._tokens(best):  # else one chunk holds the micro-batch already
                    self._try(best.execution._replace(loss_chunk_tokens=chunk))
                smaller = chunk
        return self.best()

    def best(self) -> Found | None:
        """Return the fastest of those tried that fit; of equals the one that takes least."""
        fit = [tried for tried in self.tried.values() if tried.peak <= self.limit]
        if not fit or fit[0].seconds is None:
            return max(fit, key=lambda tried: tried.execution.micro_batch_size, default=None)
        fastest = min(tried.seconds or 0.0 for tried in fit)
        return min((t for t in fit if (t.seconds or 0.0) <= (1 + TIE) * fastest), key=lambda tried: tried.peak)

    def smallest(self) -> Found:
        """Return the one of those tried that takes the least memory."""
        return min(self.tried.values(), key=lambda tried: tried.peak)

    def _tokens(self, tried: Found) -> int:
        return tried.execution.micro_batch_size * self.space.sequence_length

    def _try(self, execution: Execution) -> Found:
        """Measure an execution, once."""
        if execution not in self.tried:
            self.tried[execution] = self.measure(execution)
        return self.tried[execution]

    def _try_sizes(self, execution: Execution) -> None:
        """Try micro-batches until the largest with which an execution fits is known.

        Memory grows with the micro-batch, nearly along a line: two sizes, or one and the state, predict the next.
        """
        sizes = self.space.sizes
        fits, too_large = -1, len(sizes)  # the largest index that fits, the smallest that does not
        at = max(0, bisect_right(sizes, self.space.first_size) - 1)
        peaks: dict[int, int] = {}  # by the micro-batch; 0 stands for the state alone
        while fits + 1 < too_large:
            tried = self._try(execution._replace(micro_batch_size=sizes[at]))
            peaks.setdefault(0, tried.state)
            peaks[sizes[at]] = tried.peak
            fits, too_large = (at, too_large) if tried.peak <= self.limit else (fits, at)
            (x0, y0), (x1, y1) = sorted(peaks.items())[-2:]
            slope = max(y1 - y0, 1) / (x1 - x0)
            margin = EXTRAPOLATION_MARGIN[len(peaks) > 2]
            if 0 <= fits < len(sizes) - 1 and y1 + slope * (sizes[fits + 1] - x1) > (1 + margin) * self.limit:
                return
            predicted = bisect_right(sizes, x1 + (self.limit - y1) / slope) - 1
            at = min(max(predicted, fits + 1), too_large - 1)


def search(
    config: ConfigDict,
    shapes: ModelConfig,
    target: Target,
    on_compiled: Callable[[Estimate], None],
    everything: bool = False,
) -> Search[Estimate]:
    """Search the keys that a config leaves open, or `everything`; return the search when it is done.

    `on_compiled` is called after each compile. Raises UserError where the memory is not known, or is less than what any
    execution takes.
    """
    if target.memory_bytes is None:
        raise UserError(
            f"how much memory a {target.chip.name} has is not known, so no micro-batch can be chosen for it. Set"
            " --config.execution.micro_batch_size=8, say, and --config.execution.remat=none."
        )
    check_parameters_fit(config, shapes, target)

    def compiled(execution: Execution) -> Estimate:
        found = estimate(execution.put_into(config), shapes, target)
        on_compiled(found)
        return found

    found = Search(compiled, space_of(config, shapes, target, everything), target.memory_bytes)
    found.fastest()
    return found


def space_of(config: ConfigDict, shapes: ModelConfig, target: Target, everything: bool) -> Space:
    """Return what a config leaves open, or all there is."""
    b, e = config.batch, config.execution
    sizes = micro_batch_sizes(b.global_batch_size, batch_shares(config, len(target.devices)))
    length = b.sequence_length or shapes.context_length
    if target.devices[0].platform == "cpu" and (everything or not e.micro_batch_size):
        sizes = [n for n in sizes if n * length <= CPU_TOKENS] or sizes[:1]
    if everything:
        forms = attentions_of(config, shapes, target)
        ways = [*(("none", form) for form in forms), *((remat, forms[0]) for remat in REMATS[1:])]
        base = e.loss_chunk_tokens or 2048
        chunks = [base, 2 * base, 4 * base]
    else:
        if e.micro_batch_size:
            sizes = [max(n for n in sizes if n <= e.micro_batch_size)]
        ways = [(remat, e.attention) for remat in (REMATS if e.remat == "auto" else [e.remat])]
        chunks = [e.loss_chunk_tokens]
    return Space(sizes, ways, chunks, length, _first_size(config, shapes, target, length), e.gather)


def attentions_of(config: ConfigDict, shapes: ModelConfig, target: Target) -> list[str]:
    """List the forms of attention to try on a device: the one that "auto" takes there, then the others."""
    parts = make_parts(Execution(1, "none", 0, "auto").put_into(config), shapes, target.devices)
    auto = parts.model.attention
    if target.devices[0].platform == "tpu":
        fused = flash_tpu.supports(shapes.d_head, parts.policy.compute) and config.execution.parallel != "tensor"
        return ["flash", "chunked_vjp"] if fused else [auto]
    if target.chip.compute_capability is None:
        return [auto]  # on a CPU the others only move less memory
    first = "flash" if auto == "cudnn" else auto  # by its name in a config
    forms = list(dict.fromkeys((first, *ATTENTIONS)))
    if auto == "cudnn" and not has_cudnn():
        log.warning(
            "fused attention (cuDNN), the likely fastest, is not tried: compiling it needs cuDNN. Run: %s", CUDNN_LINE
        )
        forms.remove(first)
    return forms


def _first_size(config: ConfigDict, shapes: ModelConfig, target: Target, length: int) -> int:
    """Guess the largest micro-batch that fits without recomputation, or one that fills the device. At least 1.

    A layer keeps about 20 vectors of each token, and, but for fused attention, its scores of half the keys twice, in
    half precision. Compiling a large model for 8 sequences to learn that 1 does not fit takes many minutes.
    """
    room = (target.memory_bytes or math.inf) - least_bytes(config, shapes, target)
    scores = 0 if config.execution.attention == "flash" else 2 * shapes.n_heads * length
    kept = shapes.n_layers * length * (40 * shapes.d_model + scores)
    return max(1, int(min(FIRST_TOKENS // length, room // kept)))


def check_parameters_fit(config: ConfigDict, shapes: ModelConfig, target: Target) -> None:
    """Raise UserError, before any compile, for a model whose parameters and moments alone do not fit a device."""
    least, limit = least_bytes(config, shapes, target), target.memory_bytes
    if limit is not None and least > limit:
        raise UserError(
            f"this model does not fit {target.kind}: its parameters and the optimizer's moments alone take"
            f" {least / GIB:.2f} GiB of each, {(least - limit) / GIB:.2f} more than the {limit / GIB:.2f} that there"
            f" are. {_instead(config, target, gathered=False)}{SMALLER}."
        )


def _instead(config: ConfigDict, target: Target, gathered: bool = True) -> str:
    """Name the next way to have less on each of several devices; "" where all are taken. `gathered`: all count."""
    e, n = config.execution, len(target.devices)
    if n == 1 or config.lora.rank or e.parallel not in ("data", "fsdp"):
        return ""
    if e.parallel == "data":
        return f"Split them over the {n} devices with --config.execution.parallel=fsdp. Or: "
    if gathered and e.gather != "layer":
        return "Gather the parameters of one block at a time with --config.execution.gather=layer. Or: "
    if config.precision.first_moment == "fp32":
        return "Keep the mean of gradients in 2 bytes with --config.precision.first_moment=bf16. Or: "
    return ""


def refusal(found: Search[Estimate], config: ConfigDict, target: Target) -> str:
    """Say by how much nothing fits, and what to change."""
    least = found.smallest()
    return (
        f"this model does not fit {target.kind}: the least that was found, {least.execution.flags()}, takes"
        f" {least.peak / GIB:.2f} GiB of each, {(least.peak - found.limit) / GIB:.2f} more than the"
        f" {found.limit / GIB:.2f} that there are; {least.state / GIB:.2f} of it are parameters, moments and gradients."
        f" {_instead(config, target)}{SMALLER}, or shorten --config.batch.sequence_length."
    )
