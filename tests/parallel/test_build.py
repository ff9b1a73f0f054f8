"""Which devices a run takes, and how they share its batch."""

from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.errors import UserError
from jgpt.parallel.build import batch_shares, training_devices


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


def test_gpus_are_all_used_or_the_batch_is_refused(monkeypatch):
    pair = [SimpleNamespace(platform="gpu")] * 2
    monkeypatch.setattr(jax, "local_devices", lambda: pair)
    assert training_devices(config_of(12)) == pair
    with pytest.raises(UserError, match=r"is 7, and there are 2 devices.*multiple of 2.*global_batch_size=8"):
        training_devices(config_of(7))


def test_a_batch_is_divided_among_devices_that_do_not_share_a_model():
    assert batch_shares(config_of(12), 2) == 2 and batch_shares(config_of(7, "tensor"), 2) == 1
    with pytest.raises(UserError, match="must be a multiple of 2: set --config.batch.global_batch_size=16"):
        batch_shares(config_of(15), 2)
    groups = config_of(8, "tensor")
    groups.execution.mesh = "data=2,tensor=2"
    assert batch_shares(groups, 4) == 2
    groups.batch.global_batch_size = 7
    with pytest.raises(UserError, match="there are 2 groups of devices.*global_batch_size=8"):
        batch_shares(groups, 4)
    with pytest.raises(UserError, match="mesh='data=2,tensor=2', and there are 2 devices.*product"):
        batch_shares(groups, 2)
