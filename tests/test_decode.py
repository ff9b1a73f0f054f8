"""Decoding with a cache against the slow obvious way: the whole text through the model for each token."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.config import UserError
from jgpt.inference import decode
from jgpt.inference.decode import NonFiniteLogits, bucket, generate
from jgpt.inference.sampling import RULED_OUT, Sampling, sample
from jgpt.model.gpt import GPT, ModelConfig, unembedding
from jgpt.model.kv_cache import empty_cache

N_IDS, EOT = 57, 0  # of 64 rows
GREEDY, RANDOM = Sampling(0), Sampling(1.0, top_k=20, top_p=0.95)
SHAPE = dict(vocab_size=64, context_length=24, n_layers=2, n_heads=4, d_model=32, d_ff=64)
GPT2 = ModelConfig(
    **SHAPE, n_kv_heads=4, d_head=8, position="learned", norm="layernorm", mlp="gelu", bias=True, norm_eps=1e-5
)
LLAMA = ModelConfig(**SHAPE, n_kv_heads=2, d_head=16, qkv_bias=True, qk_norm=True, tie_embeddings=False)
MODELS = {"gpt2": GPT(GPT2), "llama": GPT(LLAMA), "remat": GPT(LLAMA, remat="block"), "dots": GPT(GPT2, remat="dots")}
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [0]]


@cache
def params_of(name: str) -> Any:
    """Random parameters, larger than at the start of training, so that tokens differ clearly in likelihood."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def fast(name: str, prompts: Sequence[Sequence[int]], sampling: Sampling, new: int, seed: int = 0, eot: int = EOT):
    return generate(
        MODELS[name],
        params_of(name),
        prompts,
        sampling=sampling,
        max_new_tokens=new,
        eot_id=eot,
        n_ids=N_IDS,
        seed=seed,
    )


@partial(jax.jit, static_argnums=0)
def full_logits(model: GPT, params: Any, tokens: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens).hidden @ unembedding(params).T


def slow(name: str, prompts: Sequence[Sequence[int]], sampling: Sampling, new: int, seed: int = 0, eot: int = EOT):
    """Draw each token from a full forward pass over the window, which loses its older half when it overflows."""
    results = []
    for b, prompt in enumerate(prompts):
        text, window, length = list(prompt), list(prompt)[-24:], len(prompt)
        for _ in range(new):
            if len(window) > 24:
                window = window[-12:]
            tokens = np.zeros((1, 24), np.int32)  # causality lets the padding be; one shape compiles once
            tokens[0, : len(window)] = window
            logits = full_logits(MODELS[name], params_of(name), tokens)[:, len(window) - 1].at[:, N_IDS:].set(RULED_OUT)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), b), len(text))
            text.append(int(sample(key[None], logits, sampling)[0]))
            window = [*window, text[-1]]
            if text[-1] == eot:
                break
        results.append(text[length:-1] if len(text) > length and text[-1] == eot else text[length:])
    return results


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_the_uncached(name: str):
    """In one piece, and token by token with each row at another place."""
    model, params, c = MODELS[name], params_of(name), MODELS[name].config
    tokens = jax.random.randint(jax.random.key(2), (2, 24), 0, N_IDS)
    run = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    expected = run(tokens).hidden
    cache = empty_cache(c.n_layers, 2, 24, c.n_kv_heads, c.d_head, jnp.float32)
    hidden, cache = run(tokens[:, :16], jnp.arange(16)[None], cache)
    np.testing.assert_allclose(hidden, expected[:, :16], rtol=1e-4, atol=1e-4)
    places = np.array([[16], [5]])  # the second row goes back, over what the first pass wrote
    for _ in range(8):
        hidden, cache = run(jnp.take_along_axis(tokens, places, 1), places, cache)
        np.testing.assert_allclose(hidden[:, 0], expected[[0, 1], places[:, 0]], rtol=1e-4, atol=1e-4)
        places = places + 1


@pytest.mark.parametrize(
    ("name", "sampling"), [("gpt2", GREEDY), ("gpt2", RANDOM), ("llama", GREEDY), ("llama", RANDOM), ("remat", RANDOM)]
)
def test_equals_the_slow_way_past_the_end_of_the_context(name: str, sampling: Sampling):
    """60 new tokens in a context of 24: every row drops half of it three times or more."""
    got = fast(name, PROMPTS, sampling, 60, seed=3, eot=-1)
    assert got == slow(name, PROMPTS, sampling, 60, seed=3, eot=-1)
    assert [len(ids) for ids in got] == [60] * 4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_the_slow_way_where_texts_end(name: str):
    got = fast(name, PROMPTS, RANDOM, 60, seed=3)
    assert got == slow(name, PROMPTS, RANDOM, 60, seed=3)
    assert len({len(ids) for ids in got}) > 2


def test_prompt_longer_than_the_context():
    prompt = np.random.default_rng(0).integers(1, N_IDS, 40).tolist()
    assert fast("gpt2", [prompt], RANDOM, 5) == slow("gpt2", [prompt], RANDOM, 5)
    assert fast("gpt2", [prompt[-24:]], GREEDY, 1) == fast("gpt2", [prompt], GREEDY, 1)


def test_greedy_rows_are_each_alone():
    together = fast("llama", PROMPTS, GREEDY, 30)
    assert together == [fast("llama", [prompt], GREEDY, 30)[0] for prompt in PROMPTS]


def test_sampled_row_does_not_depend_on_the_others_nor_on_the_bucket():
    alone = fast("llama", PROMPTS[:1], RANDOM, 12)
    assert fast("llama", PROMPTS, RANDOM, 12)[:1] == alone
    assert fast("llama", [PROMPTS[0], [8] * 24], RANDOM, 12)[:1] == alone


def test_going_on_is_never_having_stopped():
    whole = fast("gpt2", [[5, 6, 7]], RANDOM, 16, eot=-1)[0]
    half = fast("gpt2", [[5, 6, 7]], RANDOM, 8, eot=-1)[0]
    assert half == whole[:8]
    assert fast("gpt2", [[5, 6, 7, *half]], RANDOM, 8, eot=-1)[0] == whole[8:]


def test_seeds_and_rows_differ():
    first, second = fast("gpt2", [[5]] * 2, RANDOM, 10, eot=-1)
    assert first != second
    assert fast("gpt2", [[5]] * 2, RANDOM, 10, eot=-1) == [first, second]
    assert fast("gpt2", [[5]] * 2, RANDOM, 10, seed=1, eot=-1) != [first, second]


def test_top_k_1_is_greedy():
    assert fast("gpt2", PROMPTS, Sampling(1.0, top_k=1), 12) == fast("gpt2", PROMPTS, GREEDY, 12)


def test_end_of_text_ends_its_row_alone():
    without = fast("gpt2", PROMPTS[:2], GREEDY, 20, eot=-1)
    eot = next(i for i in without[0] if i not in without[1])  # a token that the first row alone comes to
    ended = fast("gpt2", PROMPTS[:2], GREEDY, 20, eot=eot)
    assert ended == [without[0][: without[0].index(eot)], without[1]]


def test_padding_of_the_vocabulary_is_never_drawn():
    params = jax.tree.map(lambda x: x, params_of("gpt2"))
    params["norm"]["bias"] = params["norm"]["bias"] + 5 * jnp.sign(params["wte"]["embedding"][60])
    logits = full_logits(MODELS["gpt2"], params, jnp.ones((1, 24), jnp.int32))
    assert int(jnp.argmax(logits[0, 0])) >= N_IDS
    for sampling in (GREEDY, Sampling(5.0, 0)):
        ids = generate(
            MODELS["gpt2"], params, [[1]] * 3, sampling=sampling, max_new_tokens=20, eot_id=-1, n_ids=N_IDS, seed=0
        )
        assert max(map(max, ids)) < N_IDS


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_from_fp32_masters(dtype: Any):
    """The cast happens once, and numpy parameters do."""
    model, masters = MODELS["llama"].clone(dtype=dtype), jax.tree.map(np.asarray, params_of("llama"))
    rounded = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params_of("llama"))
    results = [
        generate(model, params, PROMPTS, sampling=GREEDY, max_new_tokens=8, eot_id=-1, n_ids=N_IDS, seed=0)
        for params in (masters, rounded)
    ]
    assert results[0] == results[1]


def test_overflow_is_told():
    """Hidden states past 65,504 break fp16 alone; a broken parameter breaks fp32 as well."""
    for scale, dtype, advice in ((1e6, jnp.float16, "precision.compute=fp32"), (np.nan, jnp.float32, "--step")):
        model, params = MODELS["gpt2"].clone(dtype=dtype), dict(params_of("gpt2"))
        params["norm"] = {**params["norm"], "scale": params["norm"]["scale"] * scale}
        ask = dict(sampling=GREEDY, max_new_tokens=3, eot_id=-1, n_ids=N_IDS, seed=0)
        with pytest.raises(NonFiniteLogits, match=advice):
            generate(model, params, [[1, 2], [3]], **ask)
        if dtype == jnp.float16:
            assert len(generate(MODELS["gpt2"], params, [[1, 2], [3]], **ask)[0]) == 3


def test_new_prompts_compile_nothing():
    fast("gpt2", [[1] * 3], RANDOM, 20)
    before = decode.prefill._cache_size(), decode.decode._cache_size()
    for length in range(1, 11):
        fast("gpt2", [[1] * length], RANDOM, 20 - length, seed=length, eot=length)
    assert (decode.prefill._cache_size(), decode.decode._cache_size()) == before


def test_no_prompts_and_empty_ones():
    assert fast("gpt2", [], GREEDY, 5) == []
    assert fast("gpt2", [[]], RANDOM, 20) == fast("gpt2", [[EOT]], RANDOM, 20)
    assert fast("gpt2", [[1], []], GREEDY, 0) == [[], []]
    assert bucket(1, 3) == 3


@pytest.mark.parametrize(("prompt", "new"), [([N_IDS], 1), ([-1], 1), ([1], -1)])
def test_bad_input(prompt: list[int], new: int):
    with pytest.raises(UserError, match="Allowed: "):
        fast("gpt2", [prompt], GREEDY, new)
