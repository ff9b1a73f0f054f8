"""Every setting of jgpt: its value, its reason and what is allowed. The files in `configs/` only override.

First in the data path: a config names the text, the tokenizer, the model, the step and the run directory.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jgpt.config.key import Group, Key

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def standard_library_glob() -> str:
    """Name the source of Python's own standard library: real text that is on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging")
    packages += ("multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml")
    return ",".join([f"{root}/*.py", *(f"{root}/{package}/**/*.py" for package in packages)])


LORA_TARGETS = ("qkv", "proj", "gate_up", "up", "down")  # the linear layers of a block, by their names
# Beyond what anybody trains, and far below what would make a program work for hours before it says no.
MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_ROWS, MOST_TOKENS, MOST_SEQUENCES = 1000, 4096, 2**17, 2**24, 2**24, 2**20
DTYPES = {"fp32": "", "fp16": "", "bf16": ""}

RUN = Group(
    "",
    "the run",
    {
        "seed": Key(1337, "decides initial parameters, order of the blocks, dropout and samples", 0),
        "out_dir": Key("runs/default", "the run directory: all that this run writes, and where it resumes from"),
        "init_from": Key("", "start from this model: a Hugging Face directory or Hub name, or a run directory"),
        "log_every_steps": Key(10, "steps between two lines of the log", low=1),
        "deadline_hours": Key(0.0, "save and exit before a machine is taken away; 0: no deadline", low=0),
    },
)

DATA = Group(
    "data",
    "the text",
    {
        "text_glob": Key(
            standard_library_glob(),
            "a glob (** goes into folders), a directory, an address (gs://, s3://), or several with commas between",
            shown="(Python's own source)",
        ),
        "format": Key(
            "text",
            "what the files hold",
            choices={
                "text": "",
                "chat": ".jsonl of conversations (messages, ShareGPT, Alpaca, prompt/completion); answers are learned",
            },
        ),
        "text_field": Key("text", "the field that holds the text in .jsonl and .parquet"),
        "cache_dir": Key("", "the token directory; '': tokens/ in the run directory"),
        "val_fraction": Key(0.1, "share of the documents (of the tokens, if there are few) held out", 1e-6, 0.5),
        "encoding": Key(
            "utf-8", "of the text files, such as 'gb18030', 'cp1252' or 'utf-16'; .parquet is always UTF-8"
        ),
        "encoding_errors": Key(
            "strict",
            "what to do with bytes that the encoding does not have",
            choices={
                "strict": "refuse them",
                "replace": "read them as U+FFFD, and count them, up to 1% of a file",
                "replace_any": "the same, however many",
            },
        ),
    },
)

TOKENIZER = Group(
    "tokenizer",
    "text to ids",
    {
        "kind": Key(
            "bpe",
            "which tokenizer",
            choices={"char": "", "bpe": "byte-level, trained on the text", "hf": "a pretrained one"},
        ),
        "vocab_size": Key(4096, "bpe: ids in all, special tokens included (257 or more)", 0, 2**20),
        "training_megabytes": Key(64, "bpe: text to learn merges from, spread over all files", 1, 1_000_000),
        "pretrained": Key("", "hf: a local directory, or a name on the Hugging Face Hub"),
        "chat_template": Key("", "a Jinja file that turns messages into text; '': the pretrained tokenizer's own"),
    },
)

MODEL = Group(
    "model",
    "the architecture; with init_from, all but dropout are that model's",
    {
        "n_layers": Key(6, "blocks", 1, MOST_LAYERS),
        "n_heads": Key(6, "query heads", 1, MOST_HEADS),
        "n_kv_heads": Key(0, "key/value heads (grouped-query attention); 0: as many as n_heads", 0, MOST_HEADS),
        "d_model": Key(384, "width of the residual stream", 1, MOST_WIDTH),
        "d_head": Key(0, "width of one head; 0: d_model / n_heads", 0, MOST_WIDTH),
        "d_ff": Key(
            0, "hidden width of the MLP; 0: 4 d_model, or 8/3 d_model rounded up to 64 for swiglu", 0, 8 * MOST_WIDTH
        ),
        "context_length": Key(256, "tokens that the model sees at once", 1, MOST_TOKENS),
        "vocab_size": Key(
            0, "rows of the embedding; 0: the tokenizer's, rounded up to vocab_multiple_of", 0, MOST_ROWS
        ),
        "vocab_multiple_of": Key(64, "GPUs multiply matrices faster when their sides are multiples of 64", 1, 65_536),
        "dropout": Key(0.0, "share of activations set to zero in training", 0, 0.99),
        "position": Key("rope", "how positions enter the model", choices={"learned": "GPT-2", "rope": ""}),
        "norm": Key("rmsnorm", "the normalization", choices={"layernorm": "GPT-2", "rmsnorm": ""}),
        "mlp": Key("swiglu", "the MLP's activation", choices={"gelu": "GPT-2's tanh form", "swiglu": ""}),
        "bias": Key(False, "biases in every linear layer and in LayerNorm"),
        "qkv_bias": Key(False, "biases in the query, key and value layers alone (Qwen2); implied by bias"),
        "qk_norm": Key(False, "RMSNorm on each query and key head (Qwen3)"),
        "tie_embeddings": Key(True, "the output layer is the token embedding, transposed"),
        "rope_theta": Key(10_000.0, "base of the rotary frequencies", 1, 1e15),
        "norm_eps": Key(1e-5, "added to the variance in every norm", 0, 1),
    },
)

ROPE_SCALING = Group(
    "model.rope_scaling",
    "how a pretrained model was stretched over a longer context",
    {
        "kind": Key("none", "the method", choices={"none": "", "linear": "", "llama3": "", "yarn": ""}),
        "factor": Key(1.0, "how many times longer the context became", low=1),
        "original_context_length": Key(0, "tokens, before it was stretched", low=0),
        "low_freq_factor": Key(1.0, "llama3", low=0),
        "high_freq_factor": Key(4.0, "llama3", low=0),
        "beta_fast": Key(32.0, "yarn", low=0),
        "beta_slow": Key(1.0, "yarn", low=0),
        "attention_factor": Key(0.0, "yarn: of cosine and sine; 0: 0.1 ln(factor) + 1", low=0),
    },
)

LORA = Group(
    "lora",
    "train small matrices beside the frozen ones of init_from",
    {
        "rank": Key(0, "columns of an adapter; 0: train all parameters", 0, 4096),
        "alpha": Key(16.0, "the adapters' output is scaled by alpha / rank", low=1e-6),
        "dropout": Key(0.0, "dropout on the adapters' input", 0, 0.99),
        "targets": Key(",".join(LORA_TARGETS), "which of these layers have adapters; commas between"),
    },
)

PRECISION = Group(
    "precision",
    "number formats",
    {
        "compute": Key(
            "auto",
            "dtype of the matrix products",
            choices={"auto": "fp32 on CPU, fp16 on GPUs below sm_80, bf16 from sm_80 and on TPUs", **DTYPES}
            | {"bf16": "on a CPU faster than fp32 where `lscpu` shows avx512_bf16 or amx_bf16"},
        ),
        "params": Key(
            "fp32", "dtype of the stored parameters; half precision loses small Adam updates", choices=DTYPES
        ),
        "first_moment": Key(
            "fp32",
            "dtype of the mean of gradients that AdamW and Muon keep",
            choices={"fp32": "", "bf16": "2 bytes a parameter less"},
        ),
        "gradient_average": Key(
            "fp32",
            "what devices send each other",
            choices={"fp32": "", "fp16": "half as many bytes, where compute is fp16"},
        ),
        "loss_scale": Key(32_768.0, "fp16 only: the first loss scale", 1, 2.0**24),
        "loss_scale_growth_steps": Key(1000, "fp16 only: doubled after so many steps without overflow", low=1),
    },
)

OPTIMIZER = Group(
    "optimizer",
    "the update of the parameters, and the learning rate's way up and down",
    {
        "kind": Key(
            "adamw",
            "the rule of the matrices in the blocks; all other parameters (embeddings, head, norms, biases) have AdamW",
            choices={
                "adamw": "GPT-2's and most others'",
                "muon": "fewer steps to the same loss, and one moment less to keep; not with lora",
            },
        ),
        "total_steps": Key(
            1000, "optimizer steps of the whole run; 0 or auto: what fits in budget_hours and budget_epochs", 0
        ),
        "budget_hours": Key(
            0.0,
            "total_steps=auto: hours of the whole run, also in several sessions; nobody has to guess the steps",
            0,
            100_000,
        ),
        "budget_epochs": Key(
            0.0, "total_steps=auto: how often the text is read, or as often as budget_hours allow; 0: no limit", 0, 1e6
        ),
        "schedule": Key(
            "cosine",
            "the learning rate between its peak and its minimum",
            choices={
                "cosine": "falls from the warmup's end on",
                "wsd": "stays at the peak, and falls at the end: with more total_steps a run goes on from before that",
            },
        ),
        "decay_fraction": Key(0.4, "wsd: share of total_steps in which the learning rate falls", 0.001, 1),
        "warmup_steps": Key(100, "steps until the peak learning rate", low=0),
        "learning_rate": Key(1e-3, "the peak, after warmup; with muon, that of AdamW's parameters", 1e-12, 10),
        "min_learning_rate": Key(1e-4, "at the end of the schedule", 0, 10),
        "muon_learning_rate": Key(
            4e-3, "muon: the peak for the matrices, at every width; it falls with learning_rate", 1e-12, 10
        ),
        "muon_momentum": Key(0.95, "muon: decay of the sum of gradients (Nesterov)", 0, 0.9999),
        "beta1": Key(0.9, "decay of the mean of gradients", 0, 0.99999),
        "beta2": Key(0.99, "decay of the mean of squared gradients", 0, 0.9999999),
        "eps": Key(1e-8, "added to the root of the squared mean", 0, 1),
        "weight_decay": Key(0.1, "on matrices, not on norms and biases", low=0),
        "clip_norm": Key(1.0, "largest global norm of the gradient; 0: no clipping", low=0),
    },
)

BATCH = Group(
    "batch",
    "what one optimizer step sees",
    {
        "global_batch_size": Key(32, "sequences of an optimizer step, on all devices together", 1, MOST_SEQUENCES),
        "sequence_length": Key(0, "tokens of a training sequence; 0: model.context_length", 0, MOST_TOKENS),
    },
)

EXECUTION = Group(
    "execution",
    "what changes memory and speed and, except for rounding, no result",
    {
        "parallel": Key(
            "data",
            "how several devices share the work",
            choices={
                "data": "each has a copy of the model",
                "fsdp": "parameters and moments are split over all, each takes a share of the batch; not with LoRA",
                "tensor": "the model is split over all; LoRA only",
            },
        ),
        "gather": Key(
            "auto",
            "with parallel=fsdp, when a device gets the parameters that the others keep",
            choices={
                "auto": "step where that fits",
                "step": "all, once a step: fast",
                "layer": "those of a block, when it runs: least memory, much is sent",
            },
        ),
        "mesh": Key(
            "",
            "the devices as groups: with parallel=fsdp, data=2,fsdp=4 are 2 groups of 4, each of which holds the whole "
            "state, split over its devices; with parallel=tensor, data=2,tensor=4; '': one group",
        ),
        "micro_batch_size": Key(
            32, "most sequences on a device at a time, others wait their turn; 0 or auto: search", 0, MOST_SEQUENCES
        ),
        "remat": Key(
            "none",
            "what the backward pass computes again instead of keeping it",
            choices={"none": "nothing", "dots": "all but matrix products", "block": "everything", "auto": "search"},
        ),
        "attention": Key(
            "auto",
            "the attention of training",
            choices={
                "auto": "by the device",
                "plain": "",
                "chunked": "5/8 of the pairs",
                "chunked_vjp": "chunked, with a backward pass that moves less memory",
                "chunked_vjp_recompute": "chunked_vjp that keeps no weights",
                "flash": "a fused kernel: ours in fp16 from sm_75 on, cuDNN's from sm_80 on where not deterministic",
            },
        ),
        "loss_chunk_tokens": Key(2048, "tokens whose logits are in memory at one time; 0: all", low=0),
        "deterministic": Key(True, "on a GPU, a resumed run computes the same bits; False can be faster"),
    },
)

EVAL = Group(
    "eval",
    "the validation loss",
    {
        "every_steps": Key(100, "steps between two evaluations", low=1),
        "batches": Key(20, "global batches of validation text, spread evenly over it (all of it when it has fewer)", 1),
    },
)

SAMPLE = Group(
    "sample",
    "text that the model writes during training",
    {
        "every_steps": Key(500, "steps between two samples; 0: only at the end", low=0),
        "prompt": Key("", "'': start a new document; with data.format='chat' it is what the user says"),
        "num_samples": Key(2, "texts each time", 0, 1024),
        "max_new_tokens": Key(200, "most tokens of a text", 1, MOST_TOKENS),
        "temperature": Key(0.8, "0: always the likeliest token; 1: the model's own distribution", 0, 100),
        "top_k": Key(50, "draw from the k likeliest tokens only; 0: from all", low=0),
        "top_p": Key(1.0, "draw from the fewest likeliest tokens that add up to this; 1: from all", 1e-6, 1),
        "min_p": Key(0.0, "draw from tokens at least this share as likely as the likeliest; 0: from all", 0, 1),
    },
)

CHECKPOINT = Group(
    "checkpoint",
    "what is saved, when, and what a second start does",
    {
        "every_steps": Key(500, "steps between two checkpoints", low=1),
        "every_minutes": Key(20.0, "also after so many minutes; 0: by steps alone", low=0),
        "keep_last": Key(2, "newest checkpoints to keep", low=1),
        "keep_best": Key(True, "also keep the one with the lowest validation loss"),
        "disk_gb": Key(0.0, "GB (1e9 bytes) that the run directory may hold; 0: what is free", low=0),
        "upload": Key("", "also send the newest to gs://BUCKET/FOLDER, s3://..., hub:OWNER/NAME or dataset:OWNER/SLUG"),
        "upload_every_minutes": Key(60.0, "at least so long between uploads, each a new version; one at the end", 0),
        "resume": Key(
            "auto",
            "what to do when out_dir holds a run",
            choices={
                "auto": "resume if there is a run, else start one",
                "must": "refuse to start a new run",
                "never": "refuse to resume",
            },
        ),
    },
)

EXPORT = Group(
    "export",
    "what other tools must be able to read",
    {"require": Key(False, "refuse, before training, a model that no Hugging Face architecture can hold")},
)

LOGGING = Group(
    "logging",
    "copies of metrics.jsonl for other programs, in the run directory",
    {
        "tensorboard": Key(False, "events for TensorBoard in tensorboard/; needs jgpt[tensorboard]"),
        "wandb": Key(False, "a run of Weights & Biases, in wandb/ until it is sent; needs jgpt[wandb]"),
        "wandb_project": Key("jgpt", "the project of that run"),
    },
)

GROUPS = (RUN, DATA, TOKENIZER, MODEL, ROPE_SCALING, LORA, PRECISION, OPTIMIZER, BATCH, EXECUTION, EVAL, SAMPLE)
GROUPS += (CHECKPOINT, EXPORT, LOGGING)

KEYS = {f"{group.name}.{name}".lstrip("."): key for group in GROUPS for name, key in group.keys.items()}


AUTO_KEYS = ("execution.micro_batch_size", "optimizer.total_steps")  # whole numbers, where a user may say auto for 0


def default_config() -> ConfigDict:
    """Return the locked config that every file in `configs/` starts from: a small modern GPT on Python's own source."""
    from ml_collections import ConfigDict  # here: --help needs only the table, and loads faster without it

    values: dict[str, Any] = {}
    for group in GROUPS:
        place = values
        for part in filter(None, group.name.split(".")):
            place = place.setdefault(part, {})
        place.update({name: key.value for name, key in group.keys.items()})
    return ConfigDict(values).lock()


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return a nested config as {"group.key": value}.

    >>> flatten({"seed": 1, "model": {"n_layers": 2}})
    {'seed': 1, 'model.n_layers': 2}
    """
    flat = {}
    for key, value in config.items():
        is_group = hasattr(value, "items")
        flat |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return flat
