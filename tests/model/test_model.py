"""The model by identities: causality by gradient, remat on = off, grouped = repeated heads, GPT-2 in plain numpy."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgpt.model.block import INIT, Block
from jgpt.model.gpt import GPT, unembedding
from jgpt.model.layers import dropout, random_words
from jgpt.model.shapes import ModelConfig

V, T, B = 50, 12, 2
SIZES = dict(vocab_size=V, context_length=T, n_layers=2, n_heads=4, n_kv_heads=4, d_model=16, d_head=4, d_ff=32)
GPT2 = ModelConfig(**SIZES, position="learned", norm="layernorm", mlp="gelu", bias=True)
LLAMA = ModelConfig(**{**SIZES, "n_kv_heads": 2}, tie_embeddings=False)
QWEN = ModelConfig(**{**SIZES, "n_kv_heads": 2, "d_head": 8}, qkv_bias=True, qk_norm=True)
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)


def changed(config: ModelConfig, **fields: Any) -> ModelConfig:
    return ModelConfig(**{**vars(config), **fields})


@cache
def params(config: ModelConfig) -> Any:
    """Make parameters of the initial shapes with nothing at zero or one, where it would be hidden."""
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(1)

    def value(path, x):
        return jnp.asarray(random.normal((path[-1].key == "scale"), 0.1, x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


@cache
def forward(config: ModelConfig, dtype: Any = jnp.float32) -> Any:
    """Compile (params, tokens) -> logits."""
    model = GPT(config, dtype)
    return jax.jit(lambda p, x: model.apply({"params": p}, x).hidden @ unembedding(p).T)


def keys(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params(config))
    return {"/".join(part.key for part in path): leaf.shape for path, leaf in leaves}


def test_names_and_shapes_of_a_gpt2_are_those_in_checkpoints():
    block = {
        "attn/proj/bias": (16,), "attn/proj/kernel": (16, 16),
        "attn/qkv/bias": (4, 3, 4), "attn/qkv/kernel": (16, 4, 3, 4),
        "attn_norm/bias": (16,), "attn_norm/scale": (16,),
        "mlp/down/bias": (16,), "mlp/down/kernel": (16, 32), "mlp/up/bias": (32,), "mlp/up/kernel": (16, 32),
        "mlp_norm/bias": (16,), "mlp_norm/scale": (16,),
    }  # fmt: skip
    ends = {"norm/bias": (16,), "norm/scale": (16,), "wpe/embedding": (T, 16), "wte/embedding": (V, 16)}
    assert keys(GPT2) == ends | {f"h_{i}/{name}": shape for i in range(2) for name, shape in block.items()}


def test_names_and_shapes_of_a_llama_are_those_in_checkpoints():
    block = {
        "attn/proj/kernel": (16, 16), "attn/qkv/kernel": (16, 2, 4, 4), "attn_norm/scale": (16,),
        "mlp/down/kernel": (16, 32), "mlp/gate_up/kernel": (16, 1, 2, 32), "mlp_norm/scale": (16,),
    }  # fmt: skip
    ends = {"norm/scale": (16,), "wte/embedding": (V, 16), "lm_head/embedding": (V, 16)}
    assert keys(LLAMA) == ends | {f"h_{i}/{name}": shape for i in range(2) for name, shape in block.items()}


def test_names_of_the_optional_parts():
    names = keys(QWEN)
    assert names["h_0/attn/q_norm/scale"] == names["h_0/attn/k_norm/scale"] == (8,)
    assert names["h_0/attn/qkv/bias"] == (2, 4, 8) and "h_0/attn/proj/bias" not in names and "lm_head" not in names


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_remat_changes_no_name(remat):
    shapes = jax.eval_shape(GPT(GPT2, remat=remat).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params(GPT2))


def test_initial_values_follow_the_table():
    config = changed(GPT2, n_layers=2, d_model=128, d_head=32, d_ff=512, vocab_size=1000, context_length=256)
    tree = jax.jit(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    block, residual = tree["h_1"], INIT["residual"] / 2  # sqrt(2 L) = 2
    expected = {
        "wte": (tree["wte"]["embedding"], INIT["embedding"]),
        "wpe": (tree["wpe"]["embedding"], INIT["position"]),
        "qkv": (block["attn"]["qkv"]["kernel"], INIT["linear"]),
        "up": (block["mlp"]["up"]["kernel"], INIT["linear"]),
        "proj": (block["attn"]["proj"]["kernel"], residual),
        "down": (block["mlp"]["down"]["kernel"], residual),
    }
    for name, (x, std) in expected.items():
        assert abs(np.std(x) / std - 1) < 0.03 and abs(np.mean(x)) < 0.05 * std, name
    assert all(np.all(block[norm]["scale"] == 1) for norm in ("attn_norm", "mlp_norm"))
    assert not any(np.any(x) for x in (block["attn"]["qkv"]["bias"], block["mlp"]["up"]["bias"], tree["norm"]["bias"]))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_no_token_sees_a_later_one(config):
    """The gradient of the hidden state at t with respect to what enters at s is zero for s > t, and not for s <= t."""
    model = GPT(config)
    tree = params(config)
    tokens = jnp.arange(T, dtype=jnp.int32)[None]  # each token once, so that a row of the embedding is a place

    def hidden(embedding):
        return model.apply({"params": {**tree, "wte": {"embedding": embedding}}}, tokens).hidden[0].sum(-1)

    gradient = jax.jit(jax.jacrev(hidden))(tree["wte"]["embedding"] + jnp.arange(16.0)[None] / 16)[:, :T]  # [T, S, D]
    seen = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((T, T), bool)))


@cache
def loss_and_gradients(remat: str) -> Any:
    config = changed(GPT2, n_layers=1, dropout=0.3)  # the recomputed masks must be the same, too
    model = GPT(config, remat=remat)

    def loss(tree):
        output = model.apply({"params": tree}, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(3)})
        return jnp.sum(jnp.sin(output.hidden))

    return jax.jit(jax.value_and_grad(loss))(params(config))


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_remat_changes_neither_values_nor_gradients(remat):
    pairs = zip(jax.tree.leaves(loss_and_gradients("none")), jax.tree.leaves(loss_and_gradients(remat)), strict=True)
    for plain, recomputed in pairs:
        np.testing.assert_allclose(plain, recomputed, rtol=1e-4, atol=1e-5)


def test_gpt2_equals_its_plain_form_in_numpy():
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params(GPT2))

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = tree["wte"]["embedding"][TOKENS] + tree["wpe"]["embedding"]
    for i in range(2):
        p = tree[f"h_{i}"]
        y = norm(x, p["attn_norm"])
        mixed = np.zeros((B, T, 4, 4))
        for h in range(4):
            kernel, bias = p["attn"]["qkv"]["kernel"][:, h], p["attn"]["qkv"]["bias"][h]
            q, k, v = (y @ kernel[:, j] + bias[j] for j in range(3))
            scores = np.where(np.tril(np.ones((T, T))), q @ k.swapaxes(1, 2) / 2, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, :, h] = weights / weights.sum(-1, keepdims=True) @ v
        x = x + mixed.reshape(B, T, 16) @ p["attn"]["proj"]["kernel"] + p["attn"]["proj"]["bias"]
        y = gelu(norm(x, p["mlp_norm"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
        x = x + y @ p["mlp"]["down"]["kernel"].T + p["mlp"]["down"]["bias"]
    expected = norm(x, tree["norm"]) @ tree["wte"]["embedding"].T
    np.testing.assert_allclose(forward(GPT2)(params(GPT2), TOKENS), expected, rtol=1e-3, atol=1e-4)


def test_grouped_heads_equal_repeated_ones():
    """Two key/value heads for four queries are four key/value heads, each of the two written down twice."""
    full = changed(LLAMA, n_kv_heads=4)
    tree = jax.tree.map(lambda x: x, params(LLAMA))
    for i in range(2):
        kernel = tree[f"h_{i}"]["attn"]["qkv"]["kernel"]  # [D, K, G + 2, H]
        heads = [jnp.stack([kernel[:, k, g], kernel[:, k, 2], kernel[:, k, 3]], 1) for k in range(2) for g in range(2)]
        tree[f"h_{i}"] = {**tree[f"h_{i}"], "attn": {**tree[f"h_{i}"]["attn"], "qkv": {"kernel": jnp.stack(heads, 1)}}}
    grouped, repeated = forward(LLAMA)(params(LLAMA), TOKENS), forward(full)(tree, TOKENS)
    np.testing.assert_allclose(grouped, repeated, rtol=1e-4, atol=1e-5)


def test_learned_positions_and_rope_both_tell_places_apart():
    same = np.full((1, T), 7, np.int32)
    mixed = np.array([[3, 5, 7]]), np.array([[5, 3, 7]])  # the last sees the same set of tokens, in another order
    learned = forward(GPT2)(params(GPT2), same)
    assert np.abs(learned[0, 1] - learned[0, 2]).max() > 1e-3
    rope = [forward(LLAMA)(params(LLAMA), tokens)[0, -1] for tokens in mixed]
    assert np.abs(rope[0] - rope[1]).max() > 1e-4


@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN], ids=["gpt2", "llama", "qwen"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float16, 0.01), (jnp.bfloat16, 0.08)], ids=["fp16", "bf16"])
def test_half_precision_is_close(config, dtype, tolerance):
    exact = np.asarray(forward(config)(params(config), TOKENS))
    half = np.asarray(forward(config, dtype)(params(config), TOKENS))
    assert half.dtype == np.float32
    assert np.abs(half - exact).max() < tolerance * np.abs(exact).max()


def test_random_words_are_uniform_and_differ_by_key_and_place():
    words = [np.asarray(jax.jit(random_words, static_argnums=1)(jax.random.key(seed), (512, 1024))) for seed in (0, 1)]
    n = words[0].size
    for x in words:
        bits = np.array([(x >> i & 1).mean() for i in range(32)])
        assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(n)  # each bit is a fair coin
        assert len(np.unique(x)) > n * (1 - n / 2**32)  # as many doubles as chance makes, not more
        kept = (x >= 0.2 * 2**32).astype(float)
        assert abs(kept.mean() - 0.8) < 5 * 0.4 / np.sqrt(n)
        assert kept.mean(0).std() < 1.2 * 0.4 / np.sqrt(512) and kept.mean(1).std() < 1.2 * 0.4 / np.sqrt(1024)
        for shift in (1, 2, 1024):  # neighbours know nothing of each other
            assert abs(np.corrcoef(kept.ravel()[shift:], kept.ravel()[:-shift])[0, 1]) < 5 / np.sqrt(n)
    both = np.corrcoef(words[0].ravel(), words[1].ravel())[0, 1]
    assert abs(both) < 5 / np.sqrt(n)


def test_random_words_never_change():
    """The masks of a resumed run are those of the interrupted one, whatever the machine and the version of JAX."""
    words = np.asarray(random_words(jax.random.key(42), (2, 3)))
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(words, [[1193237460, 1993420832, 443644950], [1853256513, 28032604, 2519810003]])


@cache
def dropped(config: ModelConfig, deterministic: bool) -> Any:
    """Compile (params, key) -> hidden states, with dropout unless `deterministic`."""
    model = GPT(config)
    return jax.jit(
        lambda p, key: model.apply({"params": p}, TOKENS, deterministic=deterministic, rngs={"dropout": key}).hidden
    )


class TestDropout:
    config = changed(GPT2, dropout=0.25, n_layers=1)

    def run(self, seed: int, deterministic: bool = False) -> np.ndarray:
        return np.asarray(dropped(self.config, deterministic)(params(self.config), jax.random.key(seed)))

    def test_the_same_key_drops_the_same_and_another_drops_others(self):
        np.testing.assert_array_equal(self.run(0), self.run(0))
        assert np.abs(self.run(0) - self.run(1)).max() > 0.01

    def test_deterministic_drops_nothing(self):
        np.testing.assert_array_equal(self.run(0, True), self.run(1, True))
        none = GPT(changed(self.config, dropout=0.0))
        hidden = jax.jit(lambda p: none.apply({"params": p}, TOKENS).hidden)(params(self.config))
        np.testing.assert_allclose(self.run(0, True), hidden, rtol=1e-5, atol=1e-6)

    def test_rate_and_mean_are_right_and_layers_differ(self):
        """Judged by the masks themselves, which a traced forward pass returns."""
        from jgpt.model import layers

        traced = []

        def spy(key, shape):
            words = random_words(key, shape)
            traced.append(words >= round(0.25 * 2**32))
            return words

        config = changed(GPT2, dropout=0.25)
        model = GPT(config)

        def masks_of(tree: Any) -> list[jax.Array]:
            model.apply({"params": tree}, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(5)})
            return traced

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "random_words", spy)
            masks = jax.jit(masks_of)(params(config))
        assert len(masks) == 1 + 2 * (2 + 1)  # the embedding; in each block two branches and the weights of attention
        everything = np.concatenate([np.asarray(mask).ravel() for mask in masks])
        assert abs(everything.mean() - 0.75) < 5 * 0.433 / np.sqrt(everything.size)
        whole = [np.asarray(mask) for mask in masks if mask.shape == (B, T, 16)]
        assert len(whole) == 5
        for i in range(5):
            for j in range(i):
                assert abs((whole[i] == whole[j]).mean() - 0.625) < 0.12  # agree as strangers do: 0.75^2 + 0.25^2

    @pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
    def test_what_is_kept_is_scaled_up(self, rate):
        block = Block(changed(self.config, dropout=rate), jnp.float32, jnp.float32)
        ones = jnp.ones((64, 64, 16))
        out = np.asarray(
            block.apply({}, ones, rngs={"dropout": jax.random.key(0)}, method=lambda m, x: dropout(m, rate, False)(x))
        )
        np.testing.assert_allclose(np.unique(out), [0, 1 / (1 - rate)], rtol=1e-6)
        assert abs(out.mean() - 1) < 5 * np.sqrt(rate / (1 - rate) / out.size)
