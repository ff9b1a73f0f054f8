"""Decoding with a cache against the slow obvious way: the whole text through the model for each token."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.errors import UserError
from jgpt.inference.decode import generate, stream
from jgpt.inference.rounds import UNLIMITED, NonFiniteLogits, bucket, compilations
from jgpt.inference.sampling import EXCLUDED, Sampling, sample
from jgpt.model.gpt import GPT, unembedding
from jgpt.model.kv_cache import empty_cache
from jgpt.model.lora import LoRA, init_adapters, merge
from jgpt.model.shapes import ModelConfig

N_IDS, EOT = 57, 0  # of 64 rows
GREEDY, RANDOM = Sampling(0), Sampling(1.0, top_k=20, top_p=0.95)
SHAPE = dict(vocab_size=64, context_length=24, n_layers=2, n_heads=4, d_model=32, d_ff=64)
GPT2 = ModelConfig(
    **SHAPE, n_kv_heads=4, d_head=8, position="learned", norm="layernorm", mlp="gelu", bias=True, norm_eps=1e-5
)
LLAMA = ModelConfig(**SHAPE, n_kv_heads=2, d_head=16, qkv_bias=True, qk_norm=True, tie_embeddings=False)
MODELS = {"gpt2": GPT(GPT2), "llama": GPT(LLAMA), "remat": GPT(LLAMA, remat="block"), "dots": GPT(GPT2, remat="dots")}
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [0]]
TENS = [[5, 6, 7, 8, 9] * 2] * 4  # most calls use these shapes, so that most tests share a compilation


@cache
def params_of(name: str) -> Any:
    """Random parameters, larger than at the start of training, so that tokens differ clearly in likelihood."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(MODELS[name].init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def fast(
    name: str,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    new: int,
    seed: int = 0,
    stops: Sequence[int] = (EOT,),
    **more: Any,
):
    ask = dict(sampling=sampling, max_new_tokens=new, stop_ids=stops, n_ids=N_IDS, seed=seed)
    return generate(MODELS[name], {"params": params_of(name)}, prompts, **ask, **more)


@partial(jax.jit, static_argnums=0)
def slow_logits(model: GPT, params: Any, window: jax.Array, length: int) -> jax.Array:
    return model.apply({"params": params}, window).hidden[:, length - 1] @ unembedding(params).T


@partial(jax.jit, static_argnums=(0, 1))
def slow_token(
    model: GPT, sampling: Sampling, params: Any, window: jax.Array, length: int, key: jax.Array
) -> jax.Array:
    logits = slow_logits(model, params, window, length)
    return sample(key[None], logits.at[:, N_IDS:].set(EXCLUDED), sampling.rules(1))[0]


def slow(name: str, prompts: Sequence[Sequence[int]], sampling: Sampling, new: int, seed: int = 0) -> list[list[int]]:
    """Draw each token from a full forward pass over the window, which loses its older half when it overflows."""
    texts = [list(prompt) for prompt in prompts]
    for b, text in enumerate(texts):
        window = text[-24:]
        for _ in range(new):
            window = window if len(window) <= 24 else window[-12:]
            padded = np.array([window + [0] * (24 - len(window))])  # causality lets the padding be
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), b), len(text))
            token = int(slow_token(MODELS[name], sampling, params_of(name), padded, len(window), key))
            text.append(token)
            window = [*window, token]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_the_uncached(name: str):
    """In one piece, and token by token with each row at another place."""
    model, params, c = MODELS[name], params_of(name), MODELS[name].config
    tokens = jax.random.randint(jax.random.key(2), (2, 24), 0, N_IDS)
    run = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    expected = run(tokens).hidden
    cache = empty_cache(c.n_layers, 2, 24, c.n_kv_heads, c.d_head, jnp.float32)
    hidden, cache = run(tokens[:, :16], None, cache)
    np.testing.assert_allclose(hidden, expected[:, :16], rtol=1e-4, atol=1e-4)
    places = np.array([[16], [5]])  # the second row goes back, over what the first pass wrote
    for _ in range(8):
        hidden, cache = run(jnp.take_along_axis(tokens, places, 1), places, cache)
        np.testing.assert_allclose(hidden[:, 0], expected[[0, 1], places[:, 0]], rtol=1e-4, atol=1e-4)
        places = places + 1


@pytest.mark.parametrize(("name", "sampling"), [("gpt2", GREEDY), ("llama", RANDOM)])
def test_equals_the_slow_way_past_the_end_of_the_context(name: str, sampling: Sampling):
    """60 new tokens in a context of 24: every row drops half of it three times or more."""
    got = fast(name, PROMPTS, sampling, 60, seed=3, stops=[])
    assert got == slow(name, PROMPTS, sampling, 60, seed=3)
    assert [len(ids) for ids in got] == [60] * 4


def test_prompt_longer_than_the_context():
    prompt = np.random.default_rng(0).integers(1, N_IDS, 40).tolist()
    prompts = [prompt, prompt[-24:], [1], [2]]
    assert fast("gpt2", prompts, RANDOM, 5, stops=[]) == slow("gpt2", prompts, RANDOM, 5)
    first, second, *_ = fast("gpt2", prompts, GREEDY, 5)
    assert first == second


def test_greedy_rows_are_each_alone():
    together = fast("llama", PROMPTS, GREEDY, 30)
    assert [together[0], together[2]] == [fast("llama", [PROMPTS[b]], GREEDY, 30)[0] for b in (0, 2)]


def test_sampled_row_does_not_depend_on_the_others_nor_on_the_bucket():
    """Alone, the prompt is padded to 16 in a cache of 16; beside the long one, to 24 in a cache of 24."""
    assert fast("llama", PROMPTS[:1], RANDOM, 12) == fast("llama", PROMPTS, RANDOM, 12)[:1]


def test_going_on_is_never_having_stopped():
    whole = fast("gpt2", TENS, RANDOM, 14, stops=[])
    half = fast("gpt2", TENS, RANDOM, 7, stops=[])
    more = fast("gpt2", [[*prompt, *ids] for prompt, ids in zip(TENS, half, strict=True)], RANDOM, 7, stops=[])
    assert whole == [[*ids, *rest] for ids, rest in zip(half, more, strict=True)]


def test_rows_and_seeds_differ():
    ids = fast("gpt2", TENS, RANDOM, 10, stops=[])
    assert len(set(map(tuple, ids))) == 4
    assert fast("gpt2", TENS, RANDOM, 10, stops=[]) == ids
    assert fast("gpt2", TENS, RANDOM, 10, stops=[], seed=1) != ids


def test_end_of_text_ends_its_row_and_no_other():
    endless = fast("gpt2", PROMPTS, RANDOM, 60, seed=3, stops=[])
    for eot in (endless[0][2], endless[1][30], endless[2][59]):
        expected = [ids[: ids.index(eot)] if eot in ids else ids for ids in endless]
        assert fast("gpt2", PROMPTS, RANDOM, 60, seed=3, stops=[eot]) == expected


def test_any_of_many_stop_tokens_ends_a_row():
    endless = fast("gpt2", PROMPTS, RANDOM, 20, seed=3, stops=[])
    stops = [endless[0][12], endless[1][3], endless[2][7], endless[3][15], 63]
    expected = [ids[: min(i for i, token in enumerate(ids) if token in stops)] for ids in endless]
    assert fast("gpt2", PROMPTS, RANDOM, 20, seed=3, stops=stops) == expected


@pytest.mark.parametrize("stops", [[], [EOT, 5, 6]])
def test_tokens_are_reported_while_they_are_made(stops: list[int]):
    """Row by row in order, the first one alone, no more than four at a time; all of them are what is returned."""
    ask = dict(sampling=RANDOM, max_new_tokens=60, stop_ids=stops, n_ids=N_IDS, seed=3)
    calls = list(stream(MODELS["gpt2"], {"params": params_of("gpt2")}, PROMPTS, **ask))
    got = fast("gpt2", PROMPTS, RANDOM, 60, seed=3, stops=stops)
    for row, ids in enumerate(got):
        pieces = [piece for b, piece in calls if b == row]
        assert sum(pieces, []) == ids
        assert not ids or len(pieces[0]) == 1 and max(map(len, pieces)) == 4
    assert stops or [row for row, _ in calls[:4]] == [0, 1, 2, 3]


def test_repetition_penalty_counts_the_prompt_and_what_was_written():
    """Against the uncached model and the paper's formula, past the end of the context too."""
    sampling = Sampling(0, repetition_penalty=1.3)
    got = fast("llama", PROMPTS, sampling, 30, stops=[])
    for prompt, ids in zip(PROMPTS, got, strict=True):
        text, window = list(prompt), prompt[-24:]
        for token in ids:
            window = window if len(window) <= 24 else window[-12:]
            padded = np.array([[*window, *[0] * (24 - len(window))]])
            logits = np.asarray(slow_logits(MODELS["llama"], params_of("llama"), padded, len(window)))[0]
            seen = np.isin(np.arange(64), text)
            logits = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
            assert token == logits[:N_IDS].argmax()
            text, window = [*text, token], [*window, token]
    assert got != fast("llama", PROMPTS, GREEDY, 30, stops=[])


def test_a_shorter_context_is_that_of_a_shorter_model():
    """With rope, a model of 24 positions with context_length=12 writes what a model of 12 does."""
    short = GPT(replace(LLAMA, context_length=12))
    ask = dict(sampling=RANDOM, max_new_tokens=30, stop_ids=[], n_ids=N_IDS, seed=0)
    expected = generate(short, {"params": params_of("llama")}, PROMPTS, **ask)
    assert fast("llama", PROMPTS, RANDOM, 30, stops=[], context_length=12) == expected
    assert fast("llama", TENS, RANDOM, 10, context_length=99) == fast("llama", TENS, RANDOM, 10)


def test_adapters_count():
    """A model with LoRA adapters writes what the merged one does."""
    lora, rng = LoRA(rank=2, alpha=4), np.random.default_rng(0)
    model, base = MODELS["llama"].clone(lora=lora), params_of("llama")
    shapes = jax.eval_shape(partial(init_adapters, model), jax.random.key(0))
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    merged = jax.tree_util.tree_map_with_path(
        lambda path, x: merge(tuple(key.key for key in path), np.asarray(x), adapters, lora), base
    )
    ask = dict(sampling=GREEDY, max_new_tokens=8, stop_ids=[], n_ids=N_IDS, seed=0)
    beside = generate(model, {"params": base, "lora": adapters}, TENS, **ask)
    assert beside == generate(MODELS["llama"], {"params": merged}, TENS, **ask)
    assert beside != generate(MODELS["llama"], {"params": base}, TENS, **ask)


def test_padding_of_the_vocabulary_is_never_drawn():
    params = dict(params_of("gpt2"))
    params["norm"] = {**params["norm"], "bias": 5 * jnp.sign(params["wte"]["embedding"][60])}
    hidden = MODELS["gpt2"].apply({"params": params}, jnp.ones((1, 1), jnp.int32)).hidden
    assert jnp.argmax(hidden[0, 0] @ unembedding(params).T) >= N_IDS
    ask = dict(max_new_tokens=20, stop_ids=[], n_ids=N_IDS, seed=0)
    for sampling in (GREEDY, RANDOM):
        ids = generate(MODELS["gpt2"], {"params": params}, TENS, sampling=sampling, **ask)
        assert max(map(max, ids)) < N_IDS


def test_half_precision_from_fp32_masters():
    """Cast by `generate` or before it, as numpy or JAX arrays: the same."""
    model, masters = MODELS["llama"].clone(dtype=jnp.float16), params_of("llama")
    halves = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float16) if x.ndim > 1 else x), masters)
    ask = dict(sampling=GREEDY, max_new_tokens=8, stop_ids=[], n_ids=N_IDS, seed=0)
    results = [generate(model, {"params": params}, PROMPTS, **ask) for params in (masters, halves)]
    assert results[0] == results[1]


def test_logits_that_overflow_are_refused():
    """Hidden states past 65,504 break fp16 alone; a broken parameter breaks fp32 as well."""
    ask = dict(sampling=GREEDY, max_new_tokens=3, stop_ids=[], n_ids=N_IDS, seed=0)
    params = dict(params_of("gpt2"))
    params["norm"] = {**params["norm"], "scale": params["norm"]["scale"] * 1e6}
    with pytest.raises(NonFiniteLogits, match="precision.compute=fp32"):
        generate(MODELS["gpt2"].clone(dtype=jnp.float16), {"params": params}, PROMPTS, **ask)
    assert len(generate(MODELS["gpt2"], {"params": params}, PROMPTS, **ask)[0]) == 3
    params["norm"] = {**params["norm"], "scale": params["norm"]["scale"] * jnp.nan}
    with pytest.raises(NonFiniteLogits, match="--step"):
        generate(MODELS["gpt2"], {"params": params}, PROMPTS, **ask)


def test_new_prompts_compile_nothing():
    fast("gpt2", TENS, RANDOM, 10)
    before = compilations()
    for length in range(1, 11):
        rules = replace(RANDOM, temperature=length / 5, top_k=length, top_p=1 / length, min_p=0.1 / length)
        more = dict(steps=4) if length % 2 else dict(steps=UNLIMITED)
        ask = dict(sampling=rules, max_new_tokens=20 - length, stop_ids=range(length % 5), n_ids=N_IDS, seed=length)
        for _ in stream(MODELS["gpt2"], {"params": params_of("gpt2")}, [[1] * length] * 4, **ask, **more):
            pass
    assert compilations() == before


def test_nothing_to_do():
    assert fast("gpt2", [], GREEDY, 5) == []
    assert fast("gpt2", [[1], [2]], GREEDY, 0) == [[], []]
    assert bucket(1, 3) == 3


@pytest.mark.parametrize(("prompt", "new"), [([N_IDS], 1), ([-1], 1), ([1], -1), ([], 1)])
def test_bad_input(prompt: list[int], new: int):
    with pytest.raises(UserError, match="Allowed: "):
        fast("gpt2", [prompt], GREEDY, new)
