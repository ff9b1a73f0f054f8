"""Teach a pretrained model to answer your way: LoRA adapters on SmolLM2-135M-Instruct, from conversations of yours.

The data are .jsonl files, a conversation a line: {"messages": [{"role": "user", "content": "..."}, {"role":
"assistant", "content": "..."}]}, or lines of ShareGPT, Alpaca or prompt/completion (docs/finetuning.md). Only what the
assistant says is learned. For plain text set data.format=text.

Hardware: one or two T4s, or any newer GPU; with patience a CPU. A model too large for one card is split over all by
          --config.execution.parallel=tensor --config.execution.remat=block --config.execution.micro_batch_size=1
          --config.execution.loss_chunk_tokens=512: Qwen2.5-7B then takes 8.2 GiB of each of two T4s (predicted,
          scripts/bench/t4_large_models.py).
Time:     measured on 2 CPU cores with shorter sequences (192 tokens, 4 a step): 10 seconds a step. Predicted for two
          T4s: 20,000 tokens a second, so 7 minutes for the 500 steps.
Expect:   depends on your data. Measured: 200 conversations in one tone, validation loss 4.89 before, 2.04 after 5
          steps, 0.07 after 20 (learning rate 1e-3). The adapters' checkpoint is 3% of a full fine-tune's.
Command:  python -m jgpt.train --config configs/finetune_lora.py --config.data.text_glob='chats/*.jsonl'
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config; init_from names any model that jgpt imports, on the Hub, in a directory, or a run of yours."""
    config = default_config()
    config.out_dir = "runs/finetune_lora"
    config.init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.format = "chat"
    config.data.text_glob = "chats/**/*.jsonl"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.dropout = 0.05
    config.optimizer.total_steps = 500
    config.optimizer.warmup_steps = 20
    config.optimizer.learning_rate = 2e-4
    config.optimizer.min_learning_rate = 2e-5
    config.optimizer.weight_decay = 0.0
    config.batch.global_batch_size = 16
    config.execution.micro_batch_size = 4
    config.batch.sequence_length = 1024
    config.eval.every_steps = 50
    config.sample.every_steps = 100
    config.sample.prompt = "What is the capital of France?"
    config.sample.max_new_tokens = 64
    config.checkpoint.every_steps = 100
    return config
