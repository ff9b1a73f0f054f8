"""Devices to plan for: known, compiled for where the wheels are, refused with the way out where they are not."""

import importlib.metadata
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.hardware.devices import MEMORY_SHARE, chip_of
from jgpt.model.shapes import model_config
from jgpt.planning import devices as targets
from jgpt.planning import estimate
from jgpt.planning.devices import TARGETS, compile_only, this_machine


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Pretend that these packages are there in these versions, None for not at all."""
    real, named = importlib.metadata.version, {name.replace("_", "-"): version for name, version in found.items()}

    def version(package: str) -> str:
        if package in named and named[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return named.get(package) or real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name", ["t4x3", "T4", "", "v100"])
def test_an_unknown_device_is_answered_with_those_there_are(name):
    with pytest.raises(UserError, match=f"--device={name} is not known.*Allowed: t4x2, .*h100x8, t4, .*v5e8, this"):
        compile_only(name)


@pytest.mark.parametrize(("name", "meant"), [("t4x", "t4x2"), ("t5", "t4"), ("h200", "h100"), ("T4", "t4")])
def test_a_near_miss_is_guessed(name, meant):
    with pytest.raises(UserError, match=f"Did you mean {meant}"):
        compile_only(name)


@pytest.mark.parametrize("plugin", [None, "0.1.2"])
def test_missing_and_wrong_wheels_give_the_pip_line_of_this_jax(monkeypatch, plugin):
    monkeypatch.setattr(jax, "__version__", "0.11.3")
    versions(monkeypatch, jaxlib="0.11.3", jax_cuda12_plugin=plugin, jax_cuda12_pjrt="0.11.3")
    line = r"pip install jax-cuda12-plugin==0.11.3 jax-cuda12-pjrt==0.11.3 nvidia-cuda-nvcc-cu12"
    with pytest.raises(UserError, match=f"jax-cuda12-plugin {plugin or 'is missing'}, jax-cuda12-pjrt 0.11.3.*{line}"):
        compile_only("t4x2")


def test_an_old_jax_is_refused_with_the_one_that_it_takes(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.7.2")
    with pytest.raises(
        UserError, match=r"jax 0.7.2 cannot.*0.10 or newer.*pip install -U jax jax-cuda12-plugin.*--device=this"
    ):
        compile_only("t4")


def test_a_missing_assembler_is_named(monkeypatch):
    def fail():
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: No PTX compilation provider is available. Details")

    target = targets.Target("t4", [], chip_of(fake("Tesla T4", "7.5")), None, None)
    with pytest.raises(UserError, match="no assembler.*pip install.*nvidia-cuda-nvcc-cu12"):
        targets.compile_for(target, SimpleNamespace(compile=fail))  # type: ignore[arg-type]
    here = targets.Target("this", [], target.chip, None, None)
    with pytest.raises(jax.errors.JaxRuntimeError):  # on the machine itself that is no matter of wheels
        targets.compile_for(here, SimpleNamespace(compile=fail))  # type: ignore[arg-type]


def test_a_missing_cudnn_is_named(monkeypatch):
    try:
        h100 = compile_only("h100")
    except UserError as error:
        pytest.skip(str(error))
    config = default_config()
    config.execution.update({"attention": "flash", "deterministic": False})
    monkeypatch.setattr(estimate, "has_cudnn", lambda: False)
    with pytest.raises(UserError, match="'flash'.*H100.*pip install nvidia-cudnn-cu12.*attention=chunked_vjp"):
        estimate.estimate(config, model_config(config.model, 100), h100)


@pytest.mark.parametrize("found", [True, False])
def test_cudnn_is_what_jax_finds(found: bool, monkeypatch):
    def attention(query, key, value, *, is_causal: bool, implementation: str):
        if not found:
            raise RuntimeError("cuDNN not found.")
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    assert targets.has_cudnn() == found


def fake(kind: str, capability: str) -> jax.Device:
    found = SimpleNamespace(device_kind=kind, compute_capability=capability, platform="gpu", process_index=0)
    return found  # type: ignore[return-value]


def test_this_machine_has_half_its_memory_for_its_devices_and_no_rates():
    devices = jax.local_devices()
    target = this_machine(devices)
    alone = this_machine(devices[:1])
    assert target.rates is None and "no speed is predicted" in target.constants()
    assert target.memory_bytes is not None and alone.memory_bytes is not None
    assert abs(alone.memory_bytes - len(devices) * target.memory_bytes) < 10
    assert target.kind == f"{len(devices)} x {devices[0].device_kind}"


def test_a_gpu_that_is_here_says_what_it_has():
    gpu = fake("Tesla T4", "7.5")
    gpu.memory_stats = lambda: {"bytes_limit": 123, "bytes_in_use": 1}  # type: ignore[method-assign]
    target = this_machine([gpu])
    assert target.memory_bytes == 123
    assert target.rates == chip_of(gpu).rates
    gpu.memory_stats = lambda: None  # type: ignore[method-assign]
    assert this_machine([gpu]).memory_bytes == int(MEMORY_SHARE * 14.6 * 2**30)


@pytest.mark.parametrize("name", TARGETS)
def test_every_device_file_compiles(name):
    try:
        target = compile_only(name)
    except UserError as error:
        pytest.skip(str(error))
    count = TARGETS[name][1]
    assert len(target.devices) == count and target.rates is not None and target.memory_bytes is not None
    assert name.split("x")[0].upper() in target.chip.name.upper()  # `chip_of` knows what the file says it is
    assert f"{target.rates.fp16_flops / 1e12:.4g} TFLOP/s" in target.constants()
    assert ("link" in target.constants()) == (count > 1) and "network" not in target.constants()
    sharding = NamedSharding(jax.sharding.Mesh(np.array(target.devices), ("devices",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((256, 256), jnp.float16, sharding=sharding)
    try:
        compiled = targets.compile_for(target, jax.jit(lambda a, b: jnp.tanh(a @ b)).lower(x, x))
    except UserError as error:  # CUDA 13's ptxas knows no P100
        pytest.skip(str(error))
    assert "f16[256,256]" in compiled.as_text()


def test_several_hosts_have_as_many_devices_each_and_a_network():
    try:
        target = compile_only("h100x8", hosts=2, network=5e9)
    except UserError as error:
        pytest.skip(str(error))
    assert (len(target.devices), target.hosts, target.kind) == (16, 2, "16 x H100 SXM on 2 hosts")
    assert [device.process_index for device in target.devices] == [0] * 8 + [1] * 8  # in the order of the mesh
    assert "link between devices 360 GB/s, network of a host 5 GB/s" in target.constants()
