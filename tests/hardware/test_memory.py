"""Errors that mean "out of memory", as XLA and NumPy word them, and what is read from them."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jgpt.hardware.memory import shortage

T4: Any = SimpleNamespace(
    platform="gpu", device_kind="Tesla T4", memory_stats=lambda: {"bytes_limit": 14_416_000_000, "bytes_in_use": 2**31}
)
IN_PIECES: Any = SimpleNamespace(
    platform="gpu", device_kind="Tesla T4",
    memory_stats=lambda: {"bytes_limit": 2**34, "bytes_in_use": 2**31, "largest_free_block_bytes": 2**30},
)  # fmt: skip
SILENT: Any = SimpleNamespace(platform="gpu", device_kind="Tesla T4", memory_stats=lambda: None)
WITH_BUFFERS = """RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.
BufferAssignment OOM Debugging.
BufferAssignment stats:
             parameter allocation:  372.76MiB
     preallocated temp allocation:    4.44GiB
                 total allocation:   14.44GiB
Peak buffers:
\tBuffer 1:
\t\tSize: 1.54GiB
\t\tOperator: op_name="pmap(step)/while/body/dot_general" source_file="loss.py" source_line=9
\t\tXLA Label: custom-call
"""


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (
            WITH_BUFFERS,
            "asked for 4.44 GiB in one piece (the program takes 14.44GiB in all, its largest array 1.54GiB in "
            "pmap(step)/while/body/dot_general)",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.", "asked for 8.00 GiB in one piece,"),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0",
            "asked for 0.17 GiB",
        ),
        ("INTERNAL: Failed to allocate 98697216 bytes for new constant", "asked for 0.09 GiB"),
        ("INTERNAL: Failed to instantiate CUDA graph: CUDA_ERROR_OUT_OF_MEMORY: out of memory", "ran out of memory,"),
        ("INTERNAL: cuBLAS call failed: CUBLAS_STATUS_ALLOC_FAILED", "ran out of memory,"),
        (
            "INTERNAL: Error preparing computation: Out of memory allocating 310546309896 bytes.",
            "asked for 289.22 GiB",
        ),
    ],
    ids=lambda text: text[:60],
)
def test_what_xla_says_on_gpus(text, asked):
    """Texts of real reports (jax issues 13428 and 27354, octo issue 22, jax_privacy issue 10) and of runs here."""
    found = shortage(jax.errors.JaxRuntimeError(text), T4)
    assert asked in found and found.startswith("the Tesla T4 ")
    assert found.endswith("has 13.43 GiB for JAX, of which 2.00 GiB are taken")


def test_what_the_compiler_of_a_tpu_says():
    """Its words as in EasyDeL issue 166; vmem is a kernel's own scratch, and no batch changes that."""
    words = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space {0}. Used 63.80G of"
        " 15.75G {0}. Exceeded {0} capacity by 48.05G.\n\nTotal {0} usage >= 65.05G:\n    reserved 1.25G"
    )
    chip: Any = SimpleNamespace(
        platform="tpu", device_kind="TPU v5 lite", memory_stats=lambda: {"bytes_limit": 2**34, "bytes_in_use": 0}
    )
    found = shortage(jax.errors.JaxRuntimeError(words.format("hbm")), chip)
    assert found.startswith("the TPU v5 lite was asked for 63.80 GiB by one program, and has 16.00 GiB for JAX")
    assert shortage(jax.errors.JaxRuntimeError(words.format("vmem")), chip) == ""


def test_memory_in_fragments_and_an_allocator_that_does_not_count():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.")
    assert "2.00 GiB are taken and 1.00 GiB the largest free piece" in shortage(error, IN_PIECES)
    assert shortage(error, SILENT).endswith("has less than that free")


def test_a_real_shortage_of_the_cpu():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.numpy.zeros(1 << 44, "float32"))
    found = shortage(caught.value, jax.devices("cpu")[0])
    assert "asked for 65536.00 GiB in one piece, and has" in found and "are free" in found


def test_a_real_shortage_of_numpy_also_as_a_cause():
    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 50)
    wrapped = ValueError("no batch")
    wrapped.__cause__ = caught.value
    for error in (caught.value, wrapped):
        found = shortage(error)
        assert found.startswith("the machine was asked for 8388608.00 GiB in one piece for an array with shape (11258")
    assert shortage(MemoryError()).startswith("the machine ran out of memory, and has")


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 96 KiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: no space left"),  # tensorstore's, of a disk
        ValueError("out of memory"),
        KeyError("x"),
    ],
    ids=repr,
)
def test_other_errors_are_not_about_memory(error):
    assert shortage(error, T4) == ""
