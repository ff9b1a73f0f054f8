"""Check and time our attention kernels on a real GPU: values, gradients, determinism, speed.

    python scripts/bench/flash_check.py --json flash.json                # about a minute and a half
    python scripts/bench/flash_check.py --sanitize --json sanitize.json  # one small case under compute-sanitizer, alone

What fails is recorded, with its reason, and the rest goes on; the exit status is 1 if anything failed. The time is
bounded (--budget_seconds): what does not fit any more is left out, and named as such.

Values: at each head width and several lengths, the output and the gradients are compared with attention in fp32 (all
products at JAX's highest precision), and so are those of XLA's own fp16 form ("plain"), as a measure of what fp16
rounding does: the kernels' error may be at most 2 times that, or 0.002 of the largest number.

Speed: GPT-2's heads (12 of 64) and others, forward and forward with backward, against jgpt's other forms. FLOP/s count
the causal half: 2 products forward, 5 in the backward pass (7 are done).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jgpt.model.attention.flash import flash, flash_qkv  # noqa: E402

# B, T, K, G, H, whether segments count
VALUES = [  # a case of every width comes first
    (2, 200, 2, 2, 64, True), (2, 200, 2, 2, 32, True), (2, 200, 2, 2, 96, True), (2, 200, 2, 2, 128, True),
    (1, 4096, 1, 2, 64, False), (1, 4096, 1, 2, 128, False), (1, 1024, 2, 2, 32, False), (1, 1024, 2, 2, 96, False),
    (2, 64, 2, 1, 64, False), (2, 1024, 2, 2, 64, False), (1, 2048, 2, 1, 64, True), (1, 1024, 2, 2, 128, False),
]  # fmt: skip
FIRST = 4  # of them before any other check
SPEED = [  # B, T, K, G, H
    (8, 1024, 12, 1, 64), (2, 4096, 12, 1, 64), (4, 2048, 4, 4, 128), (8, 1024, 12, 1, 96), (8, 1024, 12, 1, 32),
]  # fmt: skip
LARGEST = (4, 1000, 4, 3, 64)  # of determinism, extremes and the transformations: B, T, K, G, H
REPEATS, RUNS = 20, 20


class Report:
    """What was found so far; written to a file after each step, so that a run that is cut off leaves something."""

    def __init__(self, path: str | None, budget_seconds: float):
        self.path, self.begin, self.budget = path, time.perf_counter(), budget_seconds
        self.found: dict[str, Any] = {"failed": [], "left_out": []}

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def step(self, section: str, name: str, check: Callable[[], dict[str, Any]]) -> None:
        """Run a check; keep its result, or the error."""
        if self.seconds() > self.budget:
            self.found["left_out"].append(f"{section}: {name}")
        else:
            try:
                result = check()
            except Exception as error:  # whatever it is: the other checks are worth having
                result = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:1500]}"}
                result["traceback"] = traceback.format_exc()[-1500:]
            if not result.get("ok", True):
                self.found["failed"].append(f"{section}: {name}")
            self.found.setdefault(section, {})[name] = result
            print(f"[{self.seconds():5.1f} s] {section}: {name}: {json.dumps(result)[:400]}", flush=True)
        self.found["seconds"] = self.seconds()
        if self.path:
            Path(self.path).write_text(json.dumps(self.found, indent=1))


def inputs(shape: tuple[int, ...], packed: bool = False) -> tuple[list[Any], Any]:
    """Return q, k, v and the output's gradient, and segments of about 100 positions."""
    batch, length, groups, members, width = shape
    rng = np.random.default_rng(sum(shape))
    big, small = (batch, length, groups, members, width), (batch, length, groups, width)
    # Even numbers of a variance of 1, and not normal ones: these take long to draw. No JAX here: it would compile.
    arrays = [((rng.random(s, np.float32) - 0.5) * 12**0.5).astype(np.float16) for s in (big, small, small, big)]
    segments = np.cumsum(rng.random((batch, length)) < 0.01, axis=1, dtype=np.int32) if packed else None
    return [jax.device_put(x) for x in arrays], None if segments is None else jax.device_put(segments)


def one_array(q: Any, k: Any, v: Any) -> jax.Array:
    """Return queries, keys and values side by side."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    return jax.device_put(np.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3))


def same_bits(found: Any, expected: Any) -> bool:
    """Compare lists of arrays on the host."""
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True))


def exact(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Attention in the dtype of q, all products at the highest precision."""
    length, width = q.shape[1], q.shape[-1]
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    product = partial(jnp.einsum, precision="highest")
    scores = product("BTKGH,BSKH->BKGTS", q, k).astype(jnp.float32) * width**-0.5
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return product("BKGTS,BSKH->BTKGH", weights, v)


def either_way(form: Callable[..., jax.Array], q: Any, k: Any, v: Any, d_out: Any, segments: Any) -> list[jax.Array]:
    """Return the output and the gradients."""
    out, pull = jax.vjp(lambda q, k, v: form(q, k, v, segments), q, k, v)
    return [out, *pull(d_out)]


both_ways = jax.jit(either_way, static_argnums=0)
# XLA tries kernels for every product, which takes most of the time of this script and changes no value that counts.
compared = jax.jit(either_way, static_argnums=0, compiler_options={"xla_gpu_autotune_level": 0})


@partial(jax.jit, static_argnums=1)
def fused_ways(qkv: jax.Array, packed: bool, d_out: jax.Array, segments: Any) -> list[jax.Array]:
    """Do the same for one array of queries, keys and values."""
    out, pull = jax.vjp(lambda qkv: flash_qkv(qkv, segments if packed else None), qkv)
    (d_qkv,) = pull(d_out)
    members = qkv.shape[3] - 2
    return [out, d_qkv[..., :members, :], d_qkv[..., members, :], d_qkv[..., members + 1, :]]


def differences(found: Any, expected: Any) -> list[float]:
    """Return the largest difference of each, over the largest number expected; infinite where one is not finite."""
    result = []
    for got, wanted in zip(found, expected, strict=True):
        a, b = np.asarray(got).astype(np.float32), np.asarray(wanted).astype(np.float32)
        worst = float(np.abs(a - b).max() / np.abs(b).max())
        result.append(worst if np.isfinite(worst) else float("inf"))
    return result


def check_values(shape: tuple[int, ...], packed: bool) -> dict[str, Any]:
    """Compare with fp32."""
    arrays, segments = inputs(shape, packed)
    expected = compared(exact, *(np.asarray(x).astype(np.float32) for x in arrays), segments)
    plain = differences(compared(exact, *arrays, segments), expected)
    found = both_ways(flash, *arrays, segments)
    ours = differences(found, expected)
    fused = fused_ways(one_array(*arrays[:3]), packed, arrays[3], segments)
    same = same_bits(fused, found)
    ok = all(a <= max(2 * b, 2e-3) for a, b in zip(ours, plain, strict=True))
    names = ("out", "d_q", "d_k", "d_v")
    result: dict[str, Any] = {"ok": ok and same, "one_array_gives_the_same_bits": same}
    return {**result, "flash": dict(zip(names, ours, strict=True)), "xla_fp16": dict(zip(names, plain, strict=True))}


def check_extremes() -> dict[str, Any]:
    """Scores around 80,000 either way, where fp32 itself is coarse, and fp16's largest numbers: nothing may be NaN."""
    q, k, v, d_out = (np.asarray(x) for x in inputs(LARGEST)[0])
    signs = np.where(np.arange(LARGEST[1]) % 3 == 1, -100.0, 100.0)[None, :, None, None]
    q, k = (q + signs[..., None]).astype(np.float16), (k + signs).astype(np.float16)
    expected = compared(exact, *(x.astype(np.float32) for x in (q, k, v, d_out)), None)
    ours = differences(both_ways(flash, q, k, v, d_out, None), expected)
    q, k = (np.sign(x) * np.float16(65504) for x in (q, k))
    nan = any(np.isnan(np.asarray(x)).any() for x in both_ways(flash, q, k, v, d_out, None))
    return {"ok": not nan and ours[0] < 3e-2, "nan": nan, "flash": ours}


def check_determinism() -> dict[str, Any]:
    """Run the same step again and again."""
    arrays, segments = inputs(LARGEST, True)
    first = both_ways(flash, *arrays, segments)
    different = 0
    for _ in range(RUNS):
        again = both_ways(flash, *arrays, segments)
        different += not same_bits(again, first)
    return {"ok": different == 0, "runs": RUNS, "different": different}


def check_transformations() -> dict[str, Any]:
    """Under jit with jax.checkpoint in a scan, and under pmap: the same gradients."""
    (q, k, v, d_out), _ = inputs(LARGEST)

    def loss(q: jax.Array, remat: bool) -> jax.Array:
        form = jax.checkpoint(flash) if remat else flash
        y, _ = jax.lax.scan(lambda y, _: (form(y, k, v), None), q, None, length=2)
        return jnp.sum(y.astype(jnp.float32) * d_out.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    remat = same_bits([gradient(q, False)], [gradient(q, True)])
    mapped = jax.pmap(lambda q: jax.grad(partial(loss, remat=True))(q), devices=jax.devices()[:1])(np.asarray(q)[None])[
        0
    ]
    pmap = same_bits([mapped], [gradient(q, False)])
    return {"ok": remat and pmap, "remat_same_bits": remat, "pmap_same_bits": pmap}


def timed(f: Callable[..., Any], *arrays: Any) -> float:
    """Return milliseconds of a call: the least of three averages over calls in a row."""
    jax.block_until_ready(f(*arrays))
    begin = time.perf_counter()
    jax.block_until_ready(f(*arrays))
    calls = max(3, min(REPEATS, int(0.05 / (time.perf_counter() - begin))))
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            result = f(*arrays)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - begin) / calls)
    return 1e3 * best


def other_form(name: str, length: int) -> Callable[..., jax.Array]:
    """Return one of jgpt's other forms."""
    from jgpt.model.attention.choose import attend_causally

    mask = jnp.tril(jnp.ones((length, length), bool))[None]
    return lambda q, k, v, segments: attend_causally(q, k, v, mask, name)


def check_speed(shape: tuple[int, ...], name: str) -> dict[str, Any]:
    """Time a form, forward and both ways."""
    batch, length, groups, members, width = shape
    (q, k, v, d_out), _ = inputs(shape)
    pairs = batch * groups * members * length * length * width  # multiply-adds of one product's causal half, doubled
    if name == "flash_qkv":
        qkv = one_array(q, k, v)
        forward = timed(jax.jit(lambda qkv: flash_qkv(qkv)), qkv)
        both = timed(lambda qkv, d_out: fused_ways(qkv, False, d_out, None), qkv, d_out)
    else:
        form = flash if name == "flash" else other_form(name, length)
        forward = timed(jax.jit(lambda q, k, v: form(q, k, v, None)), q, k, v)
        both = timed(partial(both_ways, form), q, k, v, d_out, None)
    rates = {"forward_tflops": 2 * pairs / forward / 1e9, "both_tflops": 7 * pairs / both / 1e9}
    return {"forward_ms": forward, "both_ms": both, **rates}


def check_kernels_alone(shape: tuple[int, ...]) -> dict[str, Any]:
    """Time each of the three kernels, and count the FLOPs that it does: 2, 3 and 4 products of the causal half."""
    from jgpt.model.attention.flash.attention import _backward, _forward
    from jgpt.model.attention.flash.launch import device_capability

    batch, length, groups, members, width = shape
    (q, k, v, d_out), _ = inputs(shape)
    capability = device_capability()
    pairs = batch * groups * members * length * length * width
    kept = jax.jit(lambda q, k, v: _forward((q, k, v), None, capability)[1])(q, k, v)
    first = timed(
        jax.jit(lambda kept, d: _backward(capability, kept, d)[0][0]), kept, d_out
    )  # d_k, d_v are not asked for
    both = timed(jax.jit(lambda kept, d: _backward(capability, kept, d)[0]), kept, d_out)
    return {
        "backward_q_ms": first, "backward_kv_ms": both - first,
        "backward_q_tflops": 3 * pairs / first / 1e9, "backward_kv_tflops": 4 * pairs / (both - first) / 1e9,
    }  # fmt: skip


def check_memory() -> dict[str, Any]:
    """Ask XLA what a long context takes, with no array of [queries, keys]."""
    arrays, _ = inputs((1, 8 * LARGEST[1], 4, 1, LARGEST[4]))
    compiled = both_ways.lower(flash, *arrays, None).compile()
    result = {"temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}
    return {"ok": result["temp_mib"] < 100, **result}


SANITIZED = """
import jax, jax.numpy as jnp
from jgpt.model.attention.flash import flash
for width in (32, 64, 96, 128):
    k1, k2 = jax.random.split(jax.random.key(0))
    q = jax.random.normal(k1, (1, 150, 1, 2, width), jnp.float16)
    k = jax.random.normal(k2, (1, 150, 1, width), jnp.float16)
    segments = (jnp.arange(150, dtype=jnp.int32) // 40)[None]
    for s in (None, segments):
        f = jax.jit(jax.grad(lambda q, k, v: jnp.sum(flash(q, k, v, s).astype(jnp.float32) ** 2), (0, 1, 2)))
        jax.block_until_ready(f(q, k, k))
print("ran to its end")
"""


def check_sanitizer(tool: str, program: str, seconds: float) -> dict[str, Any]:
    """Run small cases of all kernels under one of compute-sanitizer's tools."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n{SANITIZED}"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    begin = time.perf_counter()
    for only_ours in (["--kernel-name", "kernel_substring=flash_"], []):  # not every version knows the filter
        left = seconds - (time.perf_counter() - begin)
        command = [program, f"--tool={tool}", *only_ours, "--error-exitcode=9", sys.executable, "-c", code]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment)
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode(errors="replace")
            return {"ok": False, "error": f"not done after {seconds:g} s", "output": out[-1500:]}
        output = done.stdout + done.stderr
        if "SUMMARY" in output:
            break
    ok = done.returncode == 0 and "ran to its end" in output
    return {"ok": ok, "status": done.returncode, "filtered": bool(only_ours), "output": output[-1500:]}


def find_sanitizer() -> str | None:
    """Return compute-sanitizer, on the path or where CUDA is commonly installed."""
    folders = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    folders += [folder for path in sys.path for folder in Path(path).glob("nvidia/*/bin") if path]
    found = shutil.which("compute-sanitizer")
    return found or next((str(f / "compute-sanitizer") for f in folders if (f / "compute-sanitizer").exists()), None)


def main() -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--budget_seconds", type=float, default=85.0, help="begin no check after so many seconds")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer, and nothing else")
    parser.add_argument("--sanitize_seconds", type=float, default=60.0, help="for each of its tools")
    arguments = parser.parse_args()
    report = Report(arguments.json, arguments.budget_seconds)
    if arguments.sanitize:
        program = find_sanitizer()
        report.found["sanitizer"] = {"program": program}
        for tool in ("memcheck", "racecheck") if program else ():
            report.budget = float("inf")
            report.step("sanitizer", tool, partial(check_sanitizer, tool, str(program), arguments.sanitize_seconds))
        if not program:
            report.step("sanitizer", "found", lambda: {"ok": False, "error": "there is no compute-sanitizer here"})
        return 1 if report.found["failed"] else 0
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", None))
    report.found["device"] = {"kind": device.device_kind, "capability": capability, "jax": jax.__version__}
    run_checks(report)
    print(json.dumps(report.found["failed"]), f"{report.seconds():.0f} s")
    return 1 if report.found["failed"] else 0


def run_checks(report: Report) -> None:
    """The most telling first: what comes late may be left out."""
    gpt2 = SPEED[0]
    for *shape, packed in VALUES[:FIRST]:
        report.step("values", _name(shape, packed), partial(check_values, tuple(shape), packed))
    report.step("extremes", "H=64", check_extremes)
    report.step("determinism", f"{RUNS} runs", check_determinism)
    for form in ("flash", "chunked_vjp", "flash_qkv"):
        report.step("speed", f"{_name(gpt2)} {form}", partial(check_speed, gpt2, form))
    report.step("kernels", _name(gpt2), partial(check_kernels_alone, gpt2))
    for *shape, packed in VALUES[FIRST:]:
        report.step("values", _name(shape, packed), partial(check_values, tuple(shape), packed))
    for shape in SPEED[2:]:  # the other widths
        report.step("speed", f"{_name(shape)} flash", partial(check_speed, shape, "flash"))
        report.step("kernels", _name(shape), partial(check_kernels_alone, shape))
    report.step("transformations", "remat, scan, pmap", check_transformations)
    for form in ("flash_qkv", "chunked_vjp", "cudnn"):
        report.step("speed", f"{_name(SPEED[1])} {form}", partial(check_speed, SPEED[1], form))
    for form in ("cudnn", "plain", "chunked"):
        report.step("speed", f"{_name(gpt2)} {form}", partial(check_speed, gpt2, form))
    report.step("memory", "T=8000", check_memory)
    for shape in SPEED[2:4]:
        for form in ("cudnn", "chunked_vjp"):
            report.step("speed", f"{_name(shape)} {form}", partial(check_speed, shape, form))


def _name(shape: Any, packed: bool = False) -> str:
    return " ".join(f"{letter}={x}" for letter, x in zip("BTKGH", shape, strict=True)) + (" packed" if packed else "")


if __name__ == "__main__":
    sys.exit(main())
