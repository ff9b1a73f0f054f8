"""Train, resume, fine-tune and run GPT language models in JAX on the hardware that people get for free.

The data path, which is also the architecture:

    files --corpus--> documents --tokenizer--> ids --memmap--> token files --batches--> [A, B, T]
      --model + optimizer, one pmap'd step--> state --checkpoint--> run directory
      --decode--> text        --exchange--> a Hugging Face model directory, and back

`jgpt.data` holds the first line, `jgpt.model` and `jgpt.training` the second, `jgpt.inference` and `jgpt.exchange`
the third; `jgpt.hardware` knows the machine, and every setting is born in `jgpt.config`.
"""

__version__ = "0.1.0"
