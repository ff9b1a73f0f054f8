"""Launch a kernel's PTX from XLA, with what jaxlib has for Triton's kernels. The one file that knows jaxlib's side.

In the data path: below `attention.py`, which is what jgpt calls.

`jaxlib.gpu_triton` is no public interface. Its TritonKernel takes any PTX; at the first launch XLA has ptxas (or the
driver) make machine code of it for the device that is there. The constructor's signature has changed before and may
change again: every known form is tried, and where none fits, or there is no such module, `FlashUnavailable` is raised,
for which a caller has another form of attention.
"""

import zlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jax

from .shapes import KERNELS, SHAPES, WIDTHS, entry, grid, layout


class FlashUnavailable(Exception):
    """This jaxlib has no entry for a kernel of our own, or one that we do not know. The message says which."""


@cache
def ptx(kernel: str, width: int) -> str:
    """Return the text of a kernel, as `build.sh` made it."""
    return resources.files(__name__.rpartition(".")[0]).joinpath("ptx", f"{entry(kernel, width)}.ptx").read_text()


@cache
def _gpu_triton() -> Any:
    try:
        from jaxlib import gpu_triton  # registers the call's target with XLA
    except ImportError as error:
        raise FlashUnavailable(f"this jaxlib has no module gpu_triton ({error})") from error
    wanted = ("TritonKernel", "TritonKernelCall", "create_array_parameter", "create_scalar_parameter")
    missing = [name for name in wanted if not hasattr(gpu_triton, name)]
    if missing:  # as without JAX's CUDA plugin
        raise FlashUnavailable(f"jaxlib.gpu_triton has no {', '.join(missing)}: is JAX's CUDA plugin installed?")
    return gpu_triton


def _kernel(module: Any, kernel: str, width: int, capability: int) -> Any:
    """Call TritonKernel's constructor: the form of jaxlib 0.8 to 0.12, then that of 0.7."""
    shape, name, text = SHAPES[kernel, width], entry(kernel, width), ptx(kernel, width)
    shared = shape.shared_bytes(kernel, width)
    forms: list[tuple[Any, ...]] = [
        (name, shape.warps, 1, shared, text, "", capability),  # 1: blocks of a cluster
        (name, shape.warps, shared, text, "", capability, 1, 1, 1),  # 1, 1, 1: a cluster's dimensions
    ]
    for form in forms:
        try:
            return module.TritonKernel(*form)
        except TypeError:
            continue
    raise FlashUnavailable(f"jaxlib.gpu_triton.TritonKernel has a signature that is not known: {_signature(module)}")


def _signature(module: Any) -> str:
    return str(module.TritonKernel.__init__.__doc__).strip().splitlines()[0]


def device_capability() -> int:
    """Return the compute capability of this process's first GPU as 10 x major + minor; 75 (a T4's) without any."""
    try:
        return int(str(jax.local_devices(backend="gpu")[0].compute_capability).replace(".", ""))
    except (RuntimeError, IndexError, AttributeError):
        return 75


def check(capability: int = 75) -> None:
    """Raise FlashUnavailable where this jaxlib cannot launch the kernels."""
    for kernel in KERNELS:
        _kernel(_gpu_triton(), kernel, WIDTHS[0], capability)
    if not hasattr(jax, "ffi") or not hasattr(jax.ffi, "ffi_call"):
        raise FlashUnavailable(f"jax {jax.__version__} has no jax.ffi.ffi_call")


def launch(
    kernel: str,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    dims: tuple[int, int, int, int, int],
    fused: bool,
    packed: bool,
    capability: int,
    aliases: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
    """Add a kernel's launch to the program that is traced. Its parameters: operands, results, the layout's numbers.

    `dims` are B, T, K, G, H; `fused`, `packed`: see `shapes.layout`. `capability`: 75 for a T4. `aliases` name operands
    (by index) that are written in place of results. Raises FlashUnavailable.
    """
    batch, length, groups, members, width = dims
    module = _gpu_triton()
    scalars = [module.create_scalar_parameter(x, "i32") for x in layout(length, groups, members, width, fused, packed)]
    arrays = [module.create_array_parameter(0, 16)] * (len(operands) + len(results))  # nothing to zero; aligned to 16
    blocks = grid(kernel, width, batch, length, groups, members)
    call = module.TritonKernelCall(_kernel(module, kernel, width, capability), *blocks, [*arrays, *scalars])
    launched = jax.ffi.ffi_call(  # pyright: ignore[reportCallIssue]
        "triton_kernel_call",
        list(results),
        input_output_aliases=aliases or {},
        custom_call_api_version=2,
        legacy_backend_config=zlib.compress(call.to_proto(entry(kernel, width), b"")),  # pyright: ignore[reportArgumentType]
    )
    return launched(*operands)
