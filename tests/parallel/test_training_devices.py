"""Which devices a run takes, and how they share its batch."""

from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.parallel.devices import batch_shares, training_devices


def config_of(size: int, parallel: str = "data") -> ConfigDict:
    config = default_config()
    config.batch.global_batch_size, config.execution.parallel = size, parallel
    return config


def test_cpu_devices_are_as_many_as_divide_the_batch():
    both = jax.local_devices()
    assert len(both) == 2
    assert training_devices(config_of(12)) == both
    assert training_devices(config_of(7)) == both[:1]
    assert training_devices(config_of(7, "tensor")) == both


@pytest.mark.parametrize(("platform", "one"), [("gpu", "CUDA_VISIBLE_DEVICES=0"), ("tpu", "TPU_VISIBLE_CHIPS=0 TPU_")])
def test_accelerators_are_all_used_or_the_batch_is_refused(platform, one, monkeypatch):
    pair = [SimpleNamespace(platform=platform, process_index=0)] * 2
    monkeypatch.setattr(jax, "devices", lambda: pair)
    assert training_devices(config_of(12)) == pair
    with pytest.raises(UserError, match=r"is 7, and there are 2 devices.*multiple of 2.*global_batch_size=8") as error:
        training_devices(config_of(7))
    assert one in str(error.value) and str(error.value).count("VISIBLE") == 1  # no other platform's variable


def test_several_processes_bring_equally_many_devices(monkeypatch):
    two, one = ([SimpleNamespace(platform="cpu", process_index=i) for i in (0, 0, 1, 1)[:n]] for n in (4, 3))
    monkeypatch.setattr(jax, "devices", lambda: two)
    assert training_devices(config_of(12)) == two
    assert training_devices(config_of(6)) == [two[0], two[2]]
    with pytest.raises(UserError, match="must be a multiple of 4"):
        training_devices(config_of(7))
    monkeypatch.setattr(jax, "devices", lambda: one)
    with pytest.raises(UserError, match="have 2, 1 devices.*the same number in each.*set JAX_NUM_CPU_DEVICES to"):
        training_devices(config_of(12))


def test_a_batch_is_divided_among_devices_that_do_not_share_a_model():
    assert batch_shares(config_of(12), 2) == 2 and batch_shares(config_of(7, "tensor"), 2) == 1
    with pytest.raises(UserError, match="a multiple of 2: set --config.batch.global_batch_size=16, or take one.$"):
        batch_shares(config_of(15), 2, "take one")
    groups = config_of(8, "tensor")
    groups.execution.mesh = "data=2,tensor=2"
    assert batch_shares(groups, 4) == 2
    groups.batch.global_batch_size = 7
    with pytest.raises(UserError, match="there are 2 groups of devices.*global_batch_size=8"):
        batch_shares(groups, 4)
    with pytest.raises(UserError, match="mesh='data=2,tensor=2', and there are 2 devices.*product"):
        batch_shares(groups, 2)
