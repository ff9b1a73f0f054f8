"""Train all parameters of a pretrained model further: SmolLM2-135M-Instruct, on conversations of yours.

Like configs/finetune_lora.py, without adapters: it can learn more, it forgets more, and its checkpoints are 30 times
as large (1.6 GB each for 135M parameters, the optimizer's moments included).

Hardware: one or two T4s, or any newer GPU.
Time:     not measured. Predicted for two T4s: 14,000 tokens a second, so 10 minutes for the 500 steps.
Expect:   depends on your data. With few conversations take few steps: watch where the validation loss turns up.
Command:  python -m jgpt.train --config configs/finetune_full.py --config.data.text_glob='chats/*.jsonl'
"""

from ml_collections import ConfigDict

from jgpt.config import default_config


def get_config() -> ConfigDict:
    """Return the config: a learning rate of a thirtieth of what training from scratch takes."""
    config = default_config()
    config.out_dir = "runs/finetune_full"
    config.init_from = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.format = "chat"
    config.data.text_glob = "chats/**/*.jsonl"
    config.optimizer.total_steps = 500
    config.optimizer.warmup_steps = 20
    config.optimizer.learning_rate = 3e-5
    config.optimizer.min_learning_rate = 3e-6
    config.optimizer.weight_decay = 0.01
    config.batch.global_batch_size = 16
    config.execution.micro_batch_size = 4
    config.batch.sequence_length = 1024
    config.eval.every_steps = 50
    config.sample.every_steps = 100
    config.sample.prompt = "What is the capital of France?"
    config.sample.max_new_tokens = 64
    config.checkpoint.every_steps = 250
    config.checkpoint.keep_last = 1
    return config
