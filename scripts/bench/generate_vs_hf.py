"""Speed of greedy decoding beside Hugging Face transformers: one model, both with their caches of keys and values.

    pip install torch transformers        # beside jgpt
    python scripts/bench/generate_vs_hf.py --model DIR --batches 1,8 --json result.json

DIR is any model directory that both open (a Llama, Qwen or GPT-2 in the Hugging Face layout). Both compute in fp32 on
the CPU (--dtype for others, on a GPU), continue the same prompt by the same number of tokens, and must write the same
ones. Each lives in a process of its own and they take turns, round by round. Reported, from the fastest of the rounds:

    first token   seconds from the prompt to the first new token (compiled before)
    tokens/s      of all rows together, over the tokens after the first
    of the limit  tokens/s over what the memory allows if every weight is read once a token for the whole batch:
                  copy bandwidth (read and written bytes, all cores, measured here) / bytes of the weights
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import Contestant, cores, machine, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's jgpt, installed or not

PROMPT = "The three most important inventions of the last hundred years, and what each of them changed for people, are"
Answer = Callable[[list[int]], dict[str, Any]]  # [batch, new tokens] -> seconds, ids


def jgpt_contestant(model: str, dtype: str) -> Answer:
    """Decode with jgpt."""
    from jgpt.hardware.process import set_up_process

    set_up_process()
    import jax

    from jgpt.inference.decode import generate
    from jgpt.inference.sampling import Sampling
    from jgpt.loading.load import load_model

    loaded = load_model(model, compute=dtype)
    prompt = loaded.tokenizer.encode(PROMPT).tolist()
    weights = sum(x.nbytes for x in jax.tree.leaves(loaded.params))

    def answer(request: list[int]) -> dict[str, Any]:
        batch, new_tokens = request

        def run(n: int) -> tuple[float, list[list[int]]]:
            began = time.perf_counter()
            ids = generate(
                loaded.model,
                {"params": loaded.params},
                [prompt] * batch,
                sampling=Sampling(temperature=0, top_k=0),
                max_new_tokens=n,
                stop_ids=[],
                n_ids=loaded.tokenizer.vocab_size,
                seed=0,
            )
            return time.perf_counter() - began, ids

        return timed(run, new_tokens) | {"weights_bytes": weights}

    return answer


def hf_contestant(model: str, dtype: str) -> Answer:
    """Decode with transformers' generate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=kind).to(device).eval()
    prompt = AutoTokenizer.from_pretrained(model)(PROMPT, add_special_tokens=False)["input_ids"]

    def answer(request: list[int]) -> dict[str, Any]:
        batch, new_tokens = request
        inputs = torch.tensor([prompt] * batch, device=device)

        def run(n: int) -> tuple[float, list[list[int]]]:
            began = time.perf_counter()
            with torch.inference_mode():
                ids = loaded.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=n,
                    min_new_tokens=n,
                    do_sample=False,
                    pad_token_id=0,
                )
            rows = ids[:, len(prompt) :].tolist()  # waits for the device
            return time.perf_counter() - began, rows

        return timed(run, new_tokens)

    return answer


def timed(run: Callable[[int], tuple[float, list[list[int]]]], new_tokens: int) -> dict[str, Any]:
    """Time one token, then all of them."""
    first, _ = run(1)
    seconds, ids = run(new_tokens)
    return {"first_seconds": first, "seconds": seconds, "ids": ids}


def copy_bandwidth() -> float:
    """Measure the bytes a second, read and written, of copying large arrays with a thread for each core."""
    n, pairs = 64 << 20, []
    for _ in range(cores()):
        pairs.append((np.ones(n, np.uint8), np.empty(n, np.uint8)))
        np.copyto(pairs[-1][1], pairs[-1][0])
    best = 0.0
    with ThreadPoolExecutor(cores()) as pool:
        for _ in range(20):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            best = max(best, 2 * n * len(pairs) / (time.perf_counter() - began))
    return best


def main() -> None:
    """Parse the flags; be the parent, or one of its children."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory in the Hugging Face layout")
    parser.add_argument("--batches", default="1,8", help="batch sizes (default 1,8)")
    parser.add_argument("--new_tokens", type=int, default=128, help="tokens to write (default 128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="of weights and products")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the machine and the rows there")
    parser.add_argument("--contestant", choices=["transformers", "jgpt"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        make = jgpt_contestant if options.contestant == "jgpt" else hf_contestant
        return serve(lambda: make(options.model, options.dtype))

    description = machine("jax", "torch", "transformers", "numpy")
    bandwidth = copy_bandwidth()
    print(f"{description['cores']} cores of {description['cpu']}, copying {bandwidth / 1e9:.1f} GB/s")
    print(", ".join(f"{package} {number}" for package, number in description["versions"].items()), flush=True)
    arguments = ["--model", options.model, "--dtype", options.dtype]
    contestants = [Contestant(__file__, name, arguments) for name in ("transformers", "jgpt")]
    rows = []
    for batch in map(int, options.batches.split(",")):
        results: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
        for contestant in contestants:
            contestant.ask([batch, options.new_tokens])  # compiles, wakes threads and caches; not counted
        for _ in range(options.rounds):
            for contestant in contestants:
                results[contestant.name].append(contestant.ask([batch, options.new_tokens]))
        weights = results["jgpt"][0]["weights_bytes"]
        same = sum(a == b for a, b in zip(*(found[0]["ids"] for found in results.values()), strict=True))
        for name, found in results.items():
            first = min(result["first_seconds"] for result in found)
            after = min(result["seconds"] - result["first_seconds"] for result in found)
            speed = batch * (options.new_tokens - 1) / after
            rows.append(
                {
                    "batch": batch,
                    "contestant": name,
                    "first_token_seconds": first,
                    "tokens_per_second": speed,
                    "share_of_limit": speed / (batch * bandwidth / weights),
                    "same_texts": same,
                }
            )
        ratio = rows[-1]["tokens_per_second"] / rows[-2]["tokens_per_second"]
        print(f"\nbatch {batch}, {options.new_tokens} new tokens, {same} of {batch} texts the same")
        print(f"{'':14}{'first token s':>14}{'tokens/s':>10}{'of the limit':>14}{'ratio':>8}")
        for row, times in zip(rows[-2:], (1.0, ratio), strict=True):
            print(
                f"{row['contestant']:14}{row['first_token_seconds']:14.3f}{row['tokens_per_second']:10.1f}"
                f"{row['share_of_limit']:14.0%}{times:8.2f}",
                flush=True,
            )
    for contestant in contestants:
        contestant.close()
    if options.json:
        result = {"machine": description, "copy_bytes_per_second": bandwidth, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
