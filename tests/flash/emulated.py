"""The kernels of jgpt/model/attention/flash on an emulated GPU: compiled by g++, called with NumPy arrays."""

import ctypes
import hashlib
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jgpt.file_lock import hold
from jgpt.model.attention.flash.shapes import KERNELS, SHAPES, grid, layout

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "jgpt" / "model" / "attention" / "flash"

Array = NDArray


class Emulator:
    """Run kernels. Those of a width are compiled from the files in `source`, once for all processes of the tests.

    Raises RuntimeError with what the emulated GPU found wrong.
    """

    def __init__(self, source: Path = SOURCE):
        self._source = source
        self._libraries: dict[int, ctypes.CDLL] = {}
        self._alone = threading.Lock()  # there is one emulated GPU

    def _library(self, width: int) -> ctypes.CDLL:
        if width not in self._libraries:
            chosen = {(k, w): s for (k, w), s in SHAPES.items() if w == width}
            shapes = " ".join(f"SHAPE({k}, {w}, {s.row_tiles}, {s.warps}, {s.columns})" for (k, w), s in chosen.items())
            self._libraries[width] = ctypes.CDLL(str(_compiled(shapes, self._source)))
            self._libraries[width].error.restype = ctypes.c_char_p
        return self._libraries[width]

    def run(
        self, kernel: str, arrays: list[Array], outputs: int, dims: tuple[int, ...], packed: bool, seed: int
    ) -> None:
        """Run one kernel. `arrays` are its parameters in order, the last `outputs` are what it writes.

        `dims` are B, T, K, G, H and whether q, k and v are one array.
        """
        batch, length, groups, members, width, fused = dims
        scalars = layout(length, groups, members, width, bool(fused), packed)
        blocks = grid(kernel, width, batch, length, groups, members)
        n = len(arrays)
        pointers = (ctypes.c_void_p * n)(*(a.ctypes.data for a in arrays))
        sizes = (ctypes.c_longlong * n)(*(a.nbytes for a in arrays))
        writable = (ctypes.c_int * n)(*(int(i >= n - outputs) for i in range(n)))
        shared = SHAPES[kernel, width].shared_bytes(kernel, width)
        with self._alone:
            library = self._library(width)
            library.set_arrays(pointers, sizes, writable, n)
            ok = library.emulate(
                kernel.encode(), width, pointers, (ctypes.c_int * len(scalars))(*scalars), (ctypes.c_int * 3)(*blocks),
                shared, ctypes.c_uint(seed),
            )  # fmt: skip
            if not ok:
                raise RuntimeError(f"{kernel} {width}: {library.error().decode()}")

    def forward(
        self, q: Array, k: Array, v: Array, segments: Array | None = None, seed: int = 1
    ) -> tuple[Array, Array]:
        """Return the output [B, T, K, G, H] and the logarithms, base 2, of the sums of exponentials [B, N, T]."""
        dims = (*q.shape, False)
        return self._forward([q, k, v], dims, segments, seed)

    def forward_fused(self, qkv: Array, segments: Array | None = None, seed: int = 1) -> tuple[Array, Array]:
        """Do the same for qkv [B, T, K, G + 2, H]."""
        return self._forward([qkv] * 3, (*_fused_dims(qkv), True), segments, seed)

    def _forward(
        self, qkv: list[Array], dims: tuple[int, ...], segments: Array | None, seed: int
    ) -> tuple[Array, Array]:
        batch, length, groups, members, width, _ = dims
        out = np.full((batch, length, groups, members, width), np.nan, np.float16)
        log_sums = np.full((batch, groups * members, length), np.nan, np.float32)
        seg = qkv[0] if segments is None else segments
        self.run(KERNELS[0], [*qkv, seg, out, log_sums], 2, dims, segments is not None, seed)
        return out, log_sums

    def backward(
        self, q: Array, k: Array, v: Array, d_out: Array, segments: Array | None = None, seed: int = 1
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of q, k and v, from a forward pass of its own."""
        dims = (*q.shape, False)
        gradients = [np.full_like(x, np.nan) for x in (q, k, v)]
        self._backward([q, k, v], d_out, gradients[0], gradients[1:], dims, segments, seed)
        return gradients[0], gradients[1], gradients[2]

    def backward_fused(self, qkv: Array, d_out: Array, segments: Array | None = None, seed: int = 1) -> Array:
        """Return the gradient of qkv."""
        gradient = np.full_like(qkv, np.nan)
        self._backward([qkv] * 3, d_out, gradient, [gradient, gradient], (*_fused_dims(qkv), True), segments, seed)
        return gradient

    def _backward(
        self, qkv: list[Array], d_out: Array, d_q: Array, d_kv: list[Array], dims: tuple[int, ...],
        segments: Array | None, seed: int,
    ) -> None:  # fmt: skip
        out, log_sums = self._forward(qkv, dims, segments, seed)
        dots = np.full_like(log_sums, np.nan)
        seg = qkv[0] if segments is None else segments
        packed = segments is not None
        self.run(KERNELS[1], [*qkv, out, d_out, log_sums, seg, d_q, dots], 2, dims, packed, seed)
        self.run(KERNELS[2], [*qkv, d_out, log_sums, dots, seg, *d_kv], 2, dims, packed, seed)


def _compiled(shapes: str, source: Path) -> Path:
    """Return the library of these kernels, which one process compiles while others wait for it."""
    files = sorted([*HERE.glob("emulate.*"), *source.glob("*.cu*")])
    digest = hashlib.sha256(b"".join([shapes.encode(), *(file.read_bytes() for file in files)])).hexdigest()
    target = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / f"emulated-{digest}" / "kernels.so"
    with hold(target.parent, wait_for="compiling"):
        if not target.exists():
            options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-DFLASH_EMULATED"]
            options += [f"-DSHAPES={shapes}", f"-I{HERE}", f"-I{source}"]
            made = target.with_suffix(".new")
            command = ["g++", *options, str(HERE / "emulate.cpp"), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            made.replace(target)
    return target


def _fused_dims(qkv: Array) -> tuple[int, ...]:
    batch, length, groups, members, width = qkv.shape
    return batch, length, groups, members - 2, width
