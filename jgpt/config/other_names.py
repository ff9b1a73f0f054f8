"""What nanoGPT, Hugging Face, Keras and others call a setting, and what it is called here.

Beside the data path: the command line, config files, the checks and the API answer with it.
"""

from collections.abc import Collection, Iterable

from jgpt.config.defaults import GROUPS, KEYS
from jgpt.config.moved import new_key
from jgpt.wording import did_you_mean

_NAMES = {
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.min_learning_rate": "min_lr lr_min end_lr",
    "optimizer.total_steps": "max_iters max_steps num_steps n_steps steps iters iterations train_steps num_iterations"
    " lr_decay_iters num_training_steps",
    "optimizer.warmup_steps": "warmup_iters warmup num_warmup_steps lr_warmup_steps",
    "optimizer.beta1": "adam_beta1 beta_1 betas",
    "optimizer.beta2": "adam_beta2 beta_2",
    "optimizer.eps": "adam_epsilon epsilon adam_eps",
    "optimizer.clip_norm": "grad_clip max_grad_norm clipnorm gradient_clip_val global_clipnorm clip_grad_norm",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler decay_lr lr_schedule",
    "optimizer.kind": "optim optimizer_name optimizer_type",
    "optimizer.weight_decay": "wd l2",
    "batch.global_batch_size": "batch_size bs train_batch_size total_batch_size",
    "execution.micro_batch_size": "per_device_train_batch_size per_device_batch_size device_batch_size microbatch_size"
    " per_gpu_train_batch_size",
    "execution.parallel": "strategy distributed fsdp ddp deepspeed",
    "execution.remat": "gradient_checkpointing activation_checkpointing checkpoint_activations",
    "execution.attention": "attn_implementation flash_attn use_flash_attention flash_attention",
    "execution.deterministic": "full_determinism",
    "model.context_length": "block_size max_position_embeddings n_positions n_ctx max_seq_len seq_len context_size",
    "batch.sequence_length": "max_seq_length sequence_len seq_length max_length",
    "model.d_model": "n_embd hidden_size embed_dim embedding_dim dim d_embed n_embed hidden_dim width",
    "model.n_layers": "n_layer num_layers num_hidden_layers depth layers",
    "model.n_heads": "n_head num_heads num_attention_heads heads",
    "model.n_kv_heads": "num_key_value_heads n_kv_head num_kv_heads",
    "model.d_ff": "intermediate_size n_inner ffn_dim mlp_dim dim_feedforward",
    "model.d_head": "head_dim head_size",
    "model.dropout": "dropout_rate resid_pdrop attn_pdrop embd_pdrop attention_dropout",
    "model.mlp": "activation activation_function hidden_act",
    "model.norm_eps": "rms_norm_eps layer_norm_epsilon layer_norm_eps",
    "model.tie_embeddings": "tie_word_embeddings tie_weights",
    "precision.compute": "fp16 bf16 fp32 half dtype torch_dtype mixed_precision amp precision bfloat16 float16",
    "eval.every_steps": "eval_interval eval_steps eval_every evaluation_steps eval_freq",
    "eval.batches": "eval_iters validation_steps max_eval_batches",
    "log_every_steps": "log_interval logging_steps log_every log_steps print_every",
    "checkpoint.every_steps": "save_steps save_interval checkpoint_interval save_every checkpoint_every",
    "checkpoint.keep_last": "save_total_limit max_to_keep keep_checkpoints",
    "checkpoint.keep_best": "load_best_model_at_end save_best_only always_save_checkpoint",
    "checkpoint.resume": "resume_from_checkpoint resume_from resume",
    "out_dir": "output_dir save_dir run_dir output outdir logdir log_dir checkpoint_dir run_name"
    " logging_dir wandb_run_name",
    "logging.wandb": "wandb_log use_wandb wandb",
    "logging.tensorboard": "use_tensorboard tensorboard_log",
    "init_from": "model_name_or_path model_name pretrained_model_name_or_path base_model pretrained_model model_id",
    "data.text_glob": "path paths file files dataset dataset_name data_path data_dir train_file train_data text_file"
    " input_file input corpus text dir glob",
    "data.val_fraction": "validation_split val_split test_size eval_fraction split val_ratio",
    "data.format": "dataset_format",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "target_modules lora_target_modules",
    "sample.max_new_tokens": "max_tokens max_new_token n_tokens num_tokens max_gen_len generate_tokens",
    "sample.num_samples": "n_samples num_return_sequences",
    "deadline_hours": "max_hours time_limit max_time",
}
KEY_CALLED = {name: key for key, names in _NAMES.items() for name in names.split()}

# Switches elsewhere, values here.
_VALUES = {
    "fp16": "fp16", "half": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16", "fp32": "fp32",
    "gradient_checkpointing": "block", "activation_checkpointing": "block", "checkpoint_activations": "block",
    "fsdp": "fsdp", "deepspeed": "fsdp", "ddp": "data", "flash_attn": "flash", "use_flash_attention": "flash",
    "flash_attention": "flash",
}  # fmt: skip

# What a flag of generate, chat, serve or evaluate is called elsewhere.
FLAG_CALLED = {
    "max_tokens": "max_new_tokens", "max_length": "max_new_tokens", "n_predict": "max_new_tokens",
    "num_tokens": "max_new_tokens", "length": "max_new_tokens", "temp": "temperature", "n": "num_samples",
    "num_return_sequences": "num_samples", "n_samples": "num_samples", "start": "prompt", "text": "prompt",
    "input": "prompt", "message": "prompt", "file": "prompt_file", "repeat_penalty": "repetition_penalty",
    "frequency_penalty": "repetition_penalty", "out_dir": "model", "ckpt": "model", "checkpoint": "model",
    "model_name": "model", "model_name_or_path": "model", "model_path": "model", "path": "model", "dtype": "compute",
    "torch_dtype": "compute", "precision": "compute", "system_prompt": "system", "ctx_size": "context_length",
    "n_ctx": "context_length", "max_seq_len": "context_length", "device": "devices", "data": "text_glob",
    "dataset": "text_glob", "block_size": "sequence_length", "gpu": "device", "served_model_name": "name",
    "random_seed": "seed", "topk": "top_k", "topp": "top_p",
}  # fmt: skip

VALUE_CALLED = {
    "float16": "fp16", "half": "fp16", "16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32",
    "32": "fp32", "adam": "adamw", "linear": "cosine", "ddp": "data", "dp": "data", "zero3": "fsdp",
    "deepspeed": "fsdp", "tp": "tensor", "eager": "plain", "sdpa": "auto", "flash_attention_2": "flash",
    "jsonl": "chat", "sharegpt": "chat", "relu": "gelu", "silu": "swiglu", "byte": "bpe", "characters": "char",
    "huggingface": "hf", "full": "block",
    # The layers of transformers, for lora.targets.
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "c_attn": "qkv", "o_proj": "proj", "gate_proj": "gate_up",
    "up_proj": "gate_up", "c_fc": "up", "down_proj": "down",
}  # fmt: skip

# What nanoGPT's init_from takes beside the name of a model.
INIT_FROM_CALLED = {
    "scratch": "a run begins from random parameters where init_from is not set; leave it out",
    "resume": "a run goes on by itself where out_dir holds its checkpoints; leave init_from out",
}

_EPOCHS = "epochs num_train_epochs num_epochs n_epochs max_epochs epoch nb_epoch train_epochs".split()
_ACCUMULATION = "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches grad_accum accumulation_steps"
_SENTENCES = {
    **dict.fromkeys(
        _EPOCHS,
        "The length of a run is in steps: steps = epochs x tokens of the text / tokens of a step. Set"
        " optimizer.budget_epochs to the number of epochs, and jgpt works out the steps for your text.",
    ),
    **dict.fromkeys(
        _ACCUMULATION.split(),
        "There is no such setting: micro-batches are accumulated until they make a batch. Set the whole batch by"
        " batch.global_batch_size, and what a device takes at a time by execution.micro_batch_size.",
    ),
    "compile": "There is no such setting: JAX always compiles.",
    **dict.fromkeys(
        "device devices n_gpu num_gpus n_gpus gpus gpu use_cpu no_cuda accelerator device_map".split(),
        "There is no such setting: all devices that JAX finds are used. The environment chooses others:"
        " JAX_PLATFORMS=cpu, or CUDA_VISIBLE_DEVICES=0.",
    ),
    "warmup_ratio": "The warmup is in steps: optimizer.warmup_steps = warmup_ratio x optimizer.total_steps.",
    "report_to": "Set logging.wandb=true or logging.tensorboard=true.",
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit"),
        "There is no such setting: weights have 16 or 32 bits here. precision.params=bf16 takes the least memory.",
    ),
}
# What a value may be that is given to a whole group of keys.
_GROUP_MEANT = {
    "tokenizer": "tokenizer.kind=bpe, char or hf, and tokenizer.pretrained for a name",
    "model": "init_from for a model to begin from",
    "optimizer": "optimizer.kind",
    "data": "data.text_glob for the files",
    "precision": "precision.compute",
    "lora": "lora.rank, which turns it on",
    "logging": "logging.wandb or logging.tensorboard",
    "batch": "batch.global_batch_size",
}


def wrong_key(shown: str, key: str) -> str:
    """Say what is wrong with a key that cannot be set, and what may be meant; `shown` is how the user wrote it.

    >>> wrong_key("--config.lora", "lora")
    '--config.lora is a group of keys: rank, alpha, dropout, targets. Did you mean lora.rank, which turns it on?'
    >>> wrong_key("'lr'", "lr")
    "unknown config key 'lr'. Did you mean optimizer.learning_rate?"
    """
    keys = next((", ".join(group.keys) for group in GROUPS if group.name == key and key), "")
    if not keys:
        return f"unknown config key {shown}.{unknown_key(key)}"
    meant = f" Did you mean {_GROUP_MEANT[key]}?" if key in _GROUP_MEANT else ""
    return f"{shown} is a group of keys: {keys}.{meant}"


def unknown_key(key: str) -> str:
    """Say what a key that does not exist may be called here, as a sentence with a space before it; "" if nobody knows.

    >>> unknown_key("optimizer.lr"), unknown_key("n_layers"), unknown_key("model.n_layrs")
    (' Did you mean optimizer.learning_rate?', ' Did you mean model.n_layers?', ' Did you mean model.n_layers?')
    >>> unknown_key("zzz")
    ''
    """
    elsewhere = [other for other in KEYS if _last(other) == _last(key)]  # the same key in another group
    if elsewhere and not new_key(key):
        return f" Did you mean {' or '.join(elsewhere)}?"
    return called_here(key) or did_you_mean(key, KEYS)


def called_here(key: str) -> str:
    """Say what a key of another tool, or of an earlier version, is called here; "" where it is none.

    >>> called_here("n_embd"), called_here("remat"), called_here("n_lay")
    (' Did you mean model.d_model?', ' config.remat is now config.execution.remat.', '')
    """
    if moved := new_key(key):
        return f" {moved}"
    name = _last(key)
    if name in _SENTENCES:
        return f" {_SENTENCES[name]}"
    if name in _GROUP_MEANT:
        return f" Did you mean {_GROUP_MEANT[name]}?"
    value = f"={_VALUES[name]}" if name in _VALUES else ""
    return f" Did you mean {KEY_CALLED[name]}{value}?" if name in KEY_CALLED else ""


def unknown_flag(name: str, flags: Collection[str], takes_config: bool) -> str:
    """Say what a flag that does not exist may be, of the command's `flags` or of the keys of the config that it takes.

    >>> unknown_flag("max-tokens", ["max_new_tokens", "model"], False), unknown_flag("lr", ["config"], True)
    (' Did you mean --max_new_tokens?', ' Did you mean optimizer.learning_rate?')
    """
    meant = FLAG_CALLED.get(_last(name))
    if meant in flags:
        return f" Did you mean --{meant}?"
    hint = did_you_mean(name.replace("-", "_"), flags).replace(" mean ", " mean --")
    return hint or (unknown_key(name) if takes_config else "")


def unknown_value(value: object, choices: Iterable[str]) -> str:
    """Say which of the choices a value that is none may be, as a sentence with ". " before it; "" if nobody knows.

    >>> unknown_value("bfloat16", ["fp32", "bf16"]), unknown_value("blok", ["none", "block"]), unknown_value(7, ["a"])
    ('. Did you mean bf16?', '. Did you mean block?', '')
    """
    choices, meant = list(choices), VALUE_CALLED.get(str(value).lower())
    hint = f" Did you mean {meant}?" if meant in choices else did_you_mean(str(value), choices)
    return f".{hint}" if hint else ""


def _last(name: str) -> str:
    return name.split(".")[-1].replace("-", "_").lower()
