"""Decoding with one model over eight devices, as a TPU v5e-8 has chips: fewer key/value heads than devices."""

import json
import os
import subprocess
import sys

import pytest

MODELS = {  # query and key/value heads, mlp width
    "4 heads, 2 copies each": (16, 4, 48),
    "1 head, 8 copies": (8, 1, 48),
    "28 and 4 as in Qwen2.5-7B: attention whole": (28, 4, 48),
    "9 and 3 as in SmolLM2-135M: attention whole, the mlp as well": (9, 3, 36),
}
# Eight devices need a process of their own: the tests' has two.
SCRIPT = """
import json, sys
import jax, numpy as np
import jax.numpy as jnp
from jgpt.inference.decode import generate
from jgpt.inference.placement import choose_placement
from jgpt.inference.sampling import Sampling
from jgpt.model.parameters import path_names
from jgpt.model.gpt import GPT
from jgpt.model.shapes import ModelConfig

assert jax.local_device_count() == 8

def texts(shapes, devices):
    placement = choose_placement(shapes, jnp.float32, 24, 2, devices)
    random = np.random.default_rng(1)
    abstract = jax.eval_shape(GPT(shapes).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: placement.place(
            path_names(path), random.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32)
        ),
        abstract,
    )
    return generate(
        GPT(placement.config), {"params": params}, [[1, 2, 3], [4]], sampling=Sampling(temperature=0),
        max_new_tokens=30, stop_ids=(0,), n_ids=60, seed=0,
    )

for heads, kv_heads, d_ff in json.loads(sys.argv[1]):
    sizes = dict(vocab_size=64, context_length=24, n_layers=1, d_model=32, d_head=8)
    shapes = ModelConfig(**sizes, n_heads=heads, n_kv_heads=kv_heads, d_ff=d_ff)
    print(json.dumps([texts(shapes, "all"), texts(shapes, "1")]))
"""


@pytest.mark.slow
def test_text_is_that_of_one_device_with_fewer_heads_than_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(list(MODELS.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(MODELS)
    for name, (on_eight, on_one) in zip(MODELS, found, strict=True):
        assert on_eight == on_one, name
        assert len({id for ids in on_one for id in ids}) > 3, name  # or a constant would pass
