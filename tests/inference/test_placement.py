"""Where a model goes: by the memory of each device, which here, where a CPU does not say, the tests say."""

import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.inference import placement
from jgpt.inference.placement import MARGIN, Placement, choose_placement, needed
from jgpt.model.columns import for_devices
from jgpt.model.gpt import GPT
from jgpt.model.kv_cache import empty_cache
from jgpt.model.shapes import ModelConfig
from jgpt.wording import GIB

SMALL = ModelConfig(64, 32, 2, n_heads=4, n_kv_heads=2, d_model=32, d_head=8, d_ff=64, tie_embeddings=False)
QWEN_7B = ModelConfig(
    152_064, 32_768, 28, n_heads=28, n_kv_heads=4, d_model=3584, d_head=128, d_ff=18_944, qkv_bias=True,
    tie_embeddings=False,
)  # fmt: skip


def choose(config: ModelConfig = SMALL, length: int = 32, rows: int = 1, devices: str = "auto") -> Placement:
    return choose_placement(config, jnp.float16, length, rows, devices)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the free bytes of each device."""

    def set_free(*bytes: int) -> None:
        memory = dict(zip(jax.local_devices(), bytes, strict=True))
        monkeypatch.setattr(placement, "free_memory", lambda device: memory[device])

    return set_free


def test_a_cpu_takes_it_all(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "jgpt")
    placement = choose(QWEN_7B)
    assert placement == Placement((jax.local_devices()[0],), QWEN_7B)
    assert placement.place(("wte", "embedding"), np.ones((2, 3), np.float16)).devices() == {jax.local_devices()[0]}
    assert re.fullmatch(
        r"memory: weights 14\.2 GiB \+ cache \d+ MiB \+ working memory .* on one cpu", caplog.messages[0]
    )


def test_one_device_where_it_fits_else_all(free: Any):
    one, both = (sum(needed(SMALL, jnp.float16, 32, 1, jax.local_devices()[:n])) for n in (1, 2))
    assert both < one
    free(one, one)
    assert choose() == Placement((jax.local_devices()[0],), SMALL)
    free(one - 1, one)
    assert choose() == Placement(tuple(jax.local_devices()), for_devices(SMALL, 2))
    free(both, both)
    assert len(choose().devices) == 2
    for too_little in ((both - 1, one), (one, both - 1)):
        free(*too_little)
        with pytest.raises(UserError, match="does not fit"):
            choose(devices="all")


def test_qwen_7b_at_4096_tokens_takes_both_t4s(free: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "jgpt")
    free(int(13.4 * GIB), int(13.4 * GIB))
    assert len(choose(QWEN_7B, 4096).devices) == 2
    expected = "memory: weights 7.1 GiB + cache 0.1 GiB + working memory 1.0 GiB on each of 2 cpus, of 13.4 GiB"
    assert caplog.messages == [expected]


def test_what_is_asked_for(free: Any, monkeypatch: pytest.MonkeyPatch):
    free(GIB, GIB)
    assert [len(choose(devices=name).devices) for name in ("auto", "1", "2", "all")] == [1, 1, 2, 2]
    for wrong in ("3", "two", ""):
        with pytest.raises(UserError, match=f"devices={wrong}, and this machine has 2 .* Allowed: .* Take auto"):
            choose(devices=wrong)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    assert len(choose(devices="all").devices) == 1
    with pytest.raises(UserError, match="devices=2, and this machine has 1"):
        choose(devices="2")


def test_too_large_a_model_says_what_would_fit(free: Any):
    free(int(13.4 * GIB), int(13.4 * GIB))
    with pytest.raises(UserError, match=r"weights 7\.1 GiB .* each of 2 cpus, and 13\.4 GiB are free") as error:
        choose(QWEN_7B, 32_768, rows=4)
    fitting = re.search(r"--context_length=(\d+)", str(error.value))
    assert fitting and len(choose(QWEN_7B, int(fitting[1]), rows=4).devices) == 2
    with pytest.raises(UserError, match="does not fit"):
        choose(QWEN_7B, 2 * int(fitting[1]), rows=4)
    with pytest.raises(UserError, match="--devices=all") as error:
        choose(QWEN_7B, 32, devices="1")
    assert "--context_length" not in str(error.value)  # no context is short enough


@pytest.mark.parametrize("n", [1, 2])
def test_counts_the_bytes_that_are_placed(n: int):
    """Matrices in fp16, vectors in fp32, as the loader casts them; and the cache that decoding makes."""
    placement = choose(devices=str(n))
    shapes = jax.eval_shape(GPT(SMALL).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def put(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.ones(x.shape, np.float16 if x.ndim > 1 else np.float32)
        return placement.place(tuple(key.key for key in path), array)

    params = jax.tree_util.tree_map_with_path(put, shapes)
    need, c = needed(SMALL, jnp.float16, 32, 3, placement.devices), placement.config
    for device in placement.devices:
        shards = [s.data for x in jax.tree.leaves(params) for s in x.addressable_shards if s.device == device]
        assert sum(shard.nbytes for shard in shards) == need.weights
    cache = empty_cache(c.n_layers, 3, 32, c.n_kv_heads, c.d_head, jnp.float16)
    assert need.cache == sum(x.nbytes for x in jax.tree.leaves(cache)) // n
    assert need.work > MARGIN
