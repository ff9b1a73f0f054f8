"""What a model wastes of a device's matrix unit: sides that do not fill it are padded, and the padding is multiplied.

Beside the data path: a plan says it, with the key to change. It matters on a TPU, whose unit multiplies 128 x 128.
"""

from collections.abc import Iterator

from jgpt.model.shapes import ModelConfig


def wasted(shapes: ModelConfig, side: int) -> list[str]:
    """Name each side of the model's products that is no multiple of `side`, and what to set instead.

    >>> gpt2 = {"n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "d_model": 768, "d_head": 64, "d_ff": 2048}
    >>> wasted(ModelConfig(vocab_size=50_304, context_length=1024, **gpt2), 128)
    ['heads of 64: 50% of attention is padding to 128; --config.model.n_heads=6']
    """
    return list(_wasted(shapes, side))


def _wasted(shapes: ModelConfig, side: int) -> Iterator[str]:
    def padding(size: int, what: str, share_of: str, instead: str) -> str:
        filled = -(-size // side) * side
        return f"{what} {size:,}: {100 * (1 - size / filled):.2g}% of {share_of} is padding to {filled:,}; {instead}"

    def nearest(size: int) -> int:
        return max(1, round(size / side)) * side

    if shapes.d_model % side:
        yield padding(shapes.d_model, "width", "every layer", f"--config.model.d_model={nearest(shapes.d_model)}")
    if shapes.d_ff % side:
        yield padding(shapes.d_ff, "mlp width", "the mlp", f"--config.model.d_ff={nearest(shapes.d_ff)}")
    if shapes.d_head % side:
        heads = shapes.d_model // side
        fits = shapes.d_model % side == 0 and heads % max(1, heads // (shapes.n_heads // shapes.n_kv_heads)) == 0
        instead = f"--config.model.n_heads={heads}" if fits else f"heads of {side} fill it"
        yield padding(shapes.d_head, "heads of", "attention", instead)
    if shapes.vocab_size % side:
        yield padding(shapes.vocab_size, "vocabulary", "the loss", f"--config.model.vocab_multiple_of={side}")
