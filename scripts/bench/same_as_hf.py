"""Does jgpt compute what transformers computes? Logits and greedy texts of one model on 20 prompts, in fp32.

    pip install torch transformers        # beside jgpt
    python scripts/bench/same_as_hf.py --model DIR [--new_tokens 64]

DIR is a model directory in the Hugging Face layout. Exits with 1 where an argmax or more than one text differs.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's jgpt, installed or not

from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.loading.load import load_model
from jgpt.model.gpt import unembedding

PROMPTS = [
    "The capital of France is", "Once upon a time there was a fox who", "def fibonacci(n):\n    ", "Water boils at",
    "The three primary colours are", "In 1969, for the first time,", "My favourite recipe for bread:\n1.", "2 + 2 =",
    "The mitochondria is", "To be, or not to be:", "Dear Sir or Madam,\n\n", "SELECT name FROM users WHERE",
    "The difference between a virus and a bacterium is that", "import numpy as np\n\nx = np.", "Photosynthesis turns",
    "A list of European countries and their capitals: Germany, Berlin; Spain, Madrid; Italy,",
    "Ωmega, naïve, 東京, 🙂:",
    "The train left at noon and arrived at half past three, so the journey took", "Yes",
    "<|im_start|>user\nHello<|im_end|>\n",
]  # fmt: skip


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model directory in the Hugging Face layout")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens of each greedy text (default 64)")
    options = parser.parse_args()
    theirs = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ours = load_model(options.model, compute="fp32", devices="1")
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    same_ids = sum(ours.tokenizer.encode(text).tolist() == ids for text, ids in zip(PROMPTS, prompts, strict=True))

    @jax.jit
    def logits(params, tokens):
        return ours.model.apply({"params": params}, tokens).hidden @ unembedding(params).T

    worst, positions, same_argmax, same_texts = 0.0, 0, 0, 0
    texts = generate(
        ours.model,
        {"params": ours.params},
        prompts,
        sampling=Sampling(temperature=0, top_k=0),
        max_new_tokens=options.new_tokens,
        stop_ids=[],
        n_ids=ours.tokenizer.vocab_size,
        seed=0,
    )
    for ids, text in zip(prompts, texts, strict=True):
        with torch.inference_mode():
            tokens = torch.tensor([ids])
            expected = theirs(tokens).logits[0].numpy()
            count = options.new_tokens
            written = theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=-1,
                do_sample=False,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        found = np.asarray(logits(ours.params, jnp.asarray([ids])))[0]
        worst = max(worst, float(np.abs(found - expected).max()))
        positions += len(ids)
        same_argmax += int((found.argmax(-1) == expected.argmax(-1)).sum())
        same_texts += text == written
    print(f"prompts with the same ids           {same_ids} of {len(prompts)}")
    print(f"largest difference of logits        {worst:.1e}")
    print(f"positions with the same argmax      {same_argmax} of {positions}")
    print(f"greedy texts of {options.new_tokens} tokens the same   {same_texts} of {len(prompts)}")
    sys.exit(same_argmax < positions or same_texts < len(prompts) - 1)


if __name__ == "__main__":
    main()
