"""Causal attention and its gradients, in NumPy and fp64, written for clearness."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray


class Attention(NamedTuple):
    """What the kernels give, exactly: the output, logarithms (base 2) of the sums of exponentials, and gradients."""

    out: Array
    log_sums: Array
    d_q: Array
    d_k: Array
    d_v: Array


def attention(q: Array, k: Array, v: Array, d_out: Array, segments: Array | None = None) -> Attention:
    """Return all of it for q and d_out [B, T, K, G, H], k and v [B, T, K, H]; segments [B, T]."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    visible = np.tril(np.ones((length, length), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    scores = np.where(visible[:, None, None], np.einsum("BTKGH,BSKH->BKGTS", q, k) * scale, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= total
    log_sums = ((highest + np.log(total)) / np.log(2.0))[..., 0]
    d_weights = np.einsum("BTKGH,BSKH->BKGTS", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * scale
    return Attention(
        np.einsum("BKGTS,BSKH->BTKGH", weights, v),
        log_sums.reshape(log_sums.shape[0], -1, length),
        np.einsum("BKGTS,BSKH->BTKGH", d_scores, k),
        np.einsum("BKGTS,BTKGH->BSKH", d_scores, q),
        np.einsum("BKGTS,BTKGH->BSKH", weights, d_out),
    )
