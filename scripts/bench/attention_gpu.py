"""Every form of attention on the GPU that is here: values, gradients and times beside an fp32 reference.

    python scripts/bench/attention_gpu.py --json attention.json

For each dtype and form of `attend_causally`: the largest difference of the output and of the three gradients from
plain attention in fp32, as a share of the reference's largest value, and the median milliseconds of a forward pass with
its backward pass at GPT-2 124M's shape. The run fails where a difference is above the bound of its dtype.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's jgpt, installed or not

import jax
import jax.numpy as jnp
import numpy as np

from jgpt.hardware.devices import chip_of
from jgpt.hardware.process import set_up_process
from jgpt.model.attention.choose import attend_causally

FORMS = ("chunked_vjp", "flash", "cudnn", "plain", "chunked", "chunked_vjp_recompute")
BOUND = {"float16": 0.01, "bfloat16": 0.05}  # of a difference; an error in a mask or a factor is 0.1 and more


def inputs(batch: int, length: int, kv_heads: int, groups: int, width: int, dtype: Any) -> list[jax.Array]:
    """Return q [B, T, K, G, H], k and v [B, T, K, H], and the output's cotangent."""
    shapes = [(batch, length, kv_heads, groups, width)] + 2 * [(batch, length, kv_heads, width)]
    shapes.append(shapes[0])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def both_passes(form: str, mask: jax.Array) -> Callable[..., Any]:
    """Compile (q, k, v, cotangent) -> (output, the gradients of q, k and v)."""

    def run(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        output, backward = jax.vjp(lambda q, k, v: attend_causally(q, k, v, mask, form), q, k, v)
        return output, *backward(cotangent)

    return jax.jit(run)


def difference(found: Any, reference: Any) -> list[float]:
    """Return the largest difference of each array, as a share of its reference's largest value."""
    pairs = [(np.asarray(a, np.float32), np.asarray(b)) for a, b in zip(found, reference, strict=True)]
    return [float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs]


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call, after two that warm up."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[2:])


def main() -> None:
    """Compare, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    set_up_process()
    rows = []
    print(f"{chip_of(jax.local_devices()[0]).name}, jax {jax.__version__}")
    print(f"{'':10}{'dtype':>10}{'ms':>9}{'output':>10}{'d q':>10}{'d k':>10}{'d v':>10}")
    shapes = [("causal", options.heads, 1, options.length), ("grouped", options.heads // 4, 4, options.length)]
    for dtype in (jnp.float16, jnp.bfloat16):
        for case, kv_heads, groups, length in shapes:
            mask = jnp.tril(jnp.ones((1, length, length), bool))
            arrays = inputs(options.batch, length, kv_heads, groups, 64, dtype)
            with jax.default_matmul_precision("highest"):
                wide = [a.astype(jnp.float32) for a in arrays]
                reference = [np.asarray(a) for a in both_passes("plain", mask)(*wide)]
            for form in options.forms.split(","):
                row: dict[str, Any] = {"form": form, "case": case, "dtype": jnp.dtype(dtype).name}
                rows.append(row)
                try:
                    run = both_passes(form, mask)
                    row["differences"] = difference(run(*arrays), reference)
                    row["same_bits_twice"] = all(
                        np.array_equal(np.asarray(a), np.asarray(b))
                        for a, b in zip(run(*arrays), run(*arrays), strict=True)
                    )
                    row["ms"] = milliseconds(lambda run=run, arrays=arrays: run(*arrays), options.repeats)
                except Exception as error:  # one form that fails must not hide the others
                    row["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
                    print(f"{form:10}{row['dtype']:>10}  {case}: {row['failed'][:160]}")
                    continue
                cells = "".join(f"{share:10.1e}" for share in row["differences"])
                print(f"{form:10}{row['dtype']:>10}{row['ms']:9.2f}{cells}  {case}", flush=True)
    if options.json:
        device = jax.local_devices()[0].device_kind
        options.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=2) + "\n")
    wrong = [r for r in rows if "failed" in r or not max(r["differences"]) < BOUND[r["dtype"]]]
    if wrong:
        sys.exit(
            "these differ by more than rounding, or failed: " + ", ".join(f"{r['form']} {r['dtype']}" for r in wrong)
        )


if __name__ == "__main__":
    main()
