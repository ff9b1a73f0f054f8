"""How the work of each kernel is cut: the one table that the build, the launch and the tests share.

In the data path: beside it; `launch.py` makes grids of it, `build.sh` compiles by it. Imports nothing of jgpt or JAX.

    python -m jgpt.model.attention.flash.shapes  # what build.sh reads: a line for each kernel
"""

from typing import NamedTuple

KERNELS = ("forward", "backward_q", "backward_kv")
WIDTHS = (32, 64, 96, 128)  # of a head


class Shape(NamedTuple):
    """A block has `warps` warps with 16 * `row_tiles` rows each, and takes `columns` columns of scores at a time.

    Rows are queries, but keys in "backward_kv". `blocks` of them are to fit an SM of a T4 at once, by their registers.
    """

    row_tiles: int
    warps: int
    columns: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 16 * self.row_tiles * self.warps

    def shared_bytes(self, kernel: str, width: int) -> int:
        """Return the shared memory of a block: two arrays' tiles, twice, so that one is filled while one is read."""
        numbers = 2 * 2 * self.columns * 4 if kernel == "backward_kv" else 0  # logarithms and dots, fp32
        return 2 * 2 * self.columns * width * 2 + numbers


SHAPES = {
    ("forward", 32): Shape(2, 4, 32, 3),
    ("forward", 64): Shape(2, 4, 32, 2),
    ("forward", 96): Shape(2, 4, 32, 2),
    ("forward", 128): Shape(1, 4, 32, 2),
    ("backward_q", 32): Shape(2, 4, 32, 2),
    ("backward_q", 64): Shape(2, 4, 32, 2),
    ("backward_q", 96): Shape(1, 4, 32, 2),
    ("backward_q", 128): Shape(1, 4, 32, 2),
    ("backward_kv", 32): Shape(2, 4, 32, 2),
    ("backward_kv", 64): Shape(1, 4, 32, 3),
    ("backward_kv", 96): Shape(1, 4, 32, 2),
    ("backward_kv", 128): Shape(1, 4, 16, 2),
}


def entry(kernel: str, width: int) -> str:
    """Return the name of a kernel in its PTX, which is also the file's."""
    return f"flash_{kernel}_{width}"


def options(kernel: str, width: int) -> list[str]:
    """Return the compiler's options that make one kernel of its source."""
    s = SHAPES[kernel, width]
    names = {"WIDTH": width, "M": s.row_tiles, "WARPS": s.warps, "N": s.columns, "BLOCKS": s.blocks}
    return [f"-DENTRY={entry(kernel, width)}", *(f"-DSHAPE_{name}={value}" for name, value in names.items())]


def grid(kernel: str, width: int, batch: int, length: int, groups: int, members: int) -> tuple[int, int, int]:
    """Return how many blocks there are: along the rows, of heads (of groups in "backward_kv") and of the batch."""
    return -(-length // SHAPES[kernel, width].rows), groups * (1 if kernel == "backward_kv" else members), batch


def layout(length: int, groups: int, members: int, width: int, fused: bool, packed: bool) -> list[int]:
    """Return the int32 parameters that all kernels end with: `Layout` in tiles.cuh says what each is.

    `fused`: q, k and v are one array [B, T, K, G + 2, H]; else q is [B, T, K, G, H], k and v are [B, T, K, H].
    `packed`: whether segments count.
    """
    if fused:
        group = (members + 2) * width
        strides = [groups * group, group, groups * group, group, members * width, (members + 1) * width]
    else:
        strides = [groups * members * width, members * width, groups * width, width, 0, 0]
    return [length, members, *strides, int(packed)]


if __name__ == "__main__":
    for kernel, width in SHAPES:
        print(kernel, width, *options(kernel, width))
