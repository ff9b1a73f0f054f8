"""Train, resume, fine-tune and run GPT language models in JAX on the hardware that people get for free.

The data path, which is also the architecture:

    files --corpus--> documents --tokenizer--> ids --memmap--> token files --batches--> [A, B, T]
      --model + optimizer, one pmap'd step--> state --checkpoint--> run directory
      --decode--> text        --exchange--> a Hugging Face model directory, and back

The first line is in `jgpt.data`; the second in `jgpt.model`, `jgpt.step`, `jgpt.parallel`, `jgpt.training` and
`jgpt.run_dir`; the third in `jgpt.loading`, `jgpt.inference` and `jgpt.exchange`. Every setting is in
`jgpt.config.defaults`. The commands (`jgpt --help`) are the files beside this one.
"""

__version__ = "0.1.0"
