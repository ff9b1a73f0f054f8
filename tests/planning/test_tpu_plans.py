"""Plans for Kaggle's TPU: what is missing is named, a step that does not fit is a number, and waste is reported."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.hardware.chips import TPUS
from jgpt.model.shapes import model_config
from jgpt.planning import estimate as estimates
from jgpt.planning.audit import products
from jgpt.planning.devices import Target, compile_only
from jgpt.planning.hlo import parse
from jgpt.planning.matrix_unit import wasted
from jgpt.planning.roofline import predict
from jgpt.planning.search import search
from jgpt.wording import GIB

REFUSED = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used {:.2f}G of"
    " 15.75G hbm. Exceeded hbm capacity by 1G."
)


@pytest.fixture
def small():
    config = default_config()
    config.model.update({"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 16})
    config.batch.global_batch_size = 8
    config.execution.update({"micro_batch_size": 0, "attention": "plain"})
    return config


def chips_played_by_cpus() -> Target:
    """Return a target that compiles here, with the record of a TPU chip; two CPU devices are its chips."""
    return Target("v5e8", jax.devices("cpu"), TPUS[0], int(15.75 * GIB), TPUS[0].rates)


def test_without_libtpu_the_pip_line_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r'libtpu, which is not installed.*pip install "jax\[tpu\]==0.10.2"$'):
        compile_only("v5e8")


def test_an_old_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(UserError, match=r'jax 0.7.2 cannot compile.*environment: pip install -U "jax\[tpu\]". Or plan'):
        compile_only("v5e8")


def test_a_step_that_the_compiler_refuses_has_its_bytes_and_the_search_goes_on(small, monkeypatch):
    real = estimates.compile_for

    def refuses_more_than_two(target: Target, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        rows = next(
            leaf.shape for leaf in jax.tree.leaves(lowered.in_avals) if leaf.ndim == 4 and leaf.dtype == jnp.int32
        )[2]
        if rows > 2:
            raise jax.errors.JaxRuntimeError(REFUSED.format(10.0 * rows))
        return real(target, lowered)

    monkeypatch.setattr(estimates, "compile_for", refuses_more_than_two)
    found = search(small, model_config(small.model, 100), chips_played_by_cpus(), lambda tried: None)
    best = found.best()
    assert best is not None and best.execution.micro_batch_size == 2
    refused = [tried for tried in found.tried.values() if tried.prediction is None]
    assert refused and all(tried.peak == int(10.0 * tried.execution.micro_batch_size * GIB) for tried in refused)


def test_other_errors_of_the_compiler_are_not_hidden(small, monkeypatch):
    def fail(target: Target, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel")

    monkeypatch.setattr(estimates, "compile_for", fail)
    small.execution.micro_batch_size = 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        estimates.estimate(small, model_config(small.model, 100), chips_played_by_cpus())


def test_what_does_not_fill_the_matrix_unit_is_named_with_what_does():
    config = default_config()
    config.model.update({"n_layers": 12, "n_heads": 10, "d_model": 640, "vocab_multiple_of": 1, "d_ff": 1700})
    told = wasted(model_config(config.model, 16_300), 128)
    assert told == [
        "mlp width 1,700: 5.1% of the mlp is padding to 1,792; --config.model.d_ff=1664",
        "heads of 64: 50% of attention is padding to 128; --config.model.n_heads=5",
        "vocabulary 16,300: 0.51% of the loss is padding to 16,384; --config.model.vocab_multiple_of=128",
    ]
    config.model.update({"n_heads": 5, "vocab_multiple_of": 128, "d_ff": 1664})
    assert wasted(model_config(config.model, 16_300), 128) == []


@pytest.mark.slow
def test_libtpu_compiles_for_eight_chips_that_are_not_here():
    try:
        target = compile_only("v5e8")
    except UserError as error:
        pytest.skip(str(error))
    assert target.kind == "8 x TPU v5e" and target.memory_bytes == int(15.75 * GIB)
    assert "197 TFLOP/s" in target.constants() and "link between devices 90 GB/s" in target.constants()
    sharding = NamedSharding(Mesh(np.array(target.devices), ("devices",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
    assert "bf16[256,256]" in jax.jit(lambda a, b: jnp.tanh(a @ b)).lower(x, x).compile().as_text()


# Lines as libtpu 0.0.42 writes them for GPT-2's step: a product, a batch of 8 x 12 products as one convolution, their
# sides in memory beside the matrix unit (S(1)), and a slice on its way there.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[8192,768], w: bf16[768,2304], q: bf16[8,256,12,64], k: bf16[8,1024,12,64]) -> bf16[8192,2304] {
  %x = bf16[8192,768]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[768,2304]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %q = bf16[8,256,12,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %k = bf16[8,1024,12,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(3)
  %slice-start.1 = ((bf16[8192,768]{1,0:T(8,128)(2,1)}), bf16[192,768]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:192], [0:768]}
  %slice-done.1 = bf16[192,768]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  %room = f32[50304,768]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %scores = bf16[8,12,256,1024]{3,2,1,0:T(8,128)(2,1)} convolution(%q, %k), window={size=8x12 stride=7x11 lhs_dilate=8x12}, dim_labels=0b1f_0o1i->01bf
  ROOT %product = bf16[8192,2304]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
}
"""  # noqa: E501 (as it is written)
FLASH = """HloModule jit_step

ENTRY %main (q: bf16[8,6,1024,128], k: bf16[8,6,1024,128], v: bf16[8,6,1024,128]) -> bf16[8,6,1024,128] {
  %q = bf16[8,6,1024,128]{3,2,1,0} parameter(0)
  %k = bf16[8,6,1024,128]{3,2,1,0} parameter(1)
  %v = bf16[8,6,1024,128]{3,2,1,0} parameter(2)
  ROOT %out = bf16[8,6,1024,128]{3,2,1,0} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"
}
"""


def test_the_program_of_a_tpu_is_read():
    rates = TPUS[0].rates
    assert rates is not None
    found = predict(parse(PROGRAM), rates, {})
    ops = {op.name: op for op in found.ops}
    assert ops["product"].flops == 2 * 8192 * 768 * 2304 and ops["product"].kind == "bf16 gemm"
    assert ops["product"].bytes == 2 * (8192 * 768 + 8192 * 2304)  # the weights are there already
    assert ops["scores"].flops == 2 * (8 * 12 * 256) * 1024 * 128  # heads of 64 fill half of the unit
    assert ops["scores"].bytes == 2 * 8 * 12 * 256 * 1024
    assert ops["slice-start.1"].bytes == 2 * 192 * 768
    assert ops["room"].seconds == 0
    assert str(next(iter(products(parse(PROGRAM))))) == "bf16*bf16->bf16"


def test_fused_attention_computes_the_blocks_up_to_the_diagonal():
    rates = TPUS[0].rates
    assert rates is not None
    (kernel,) = predict(parse(FLASH), rates, {}).ops
    pairs = 8 * 6 * 1024 * 1024 * 3 / 4  # of 2 x 2 blocks of 512, three
    assert kernel.kind == "fused attention" and kernel.flops == 2 * 2 * pairs * 128 + 14 * pairs
    assert kernel.bytes == 4 * 2 * 8 * 6 * 1024 * 128
