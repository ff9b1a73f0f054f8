"""Every setting of jgpt, born here with its unit and its reason; the files in `configs/` only override.

First in the data path: a config names the text, the tokenizer, the model, the step and the run directory.
"""

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


def standard_library_glob() -> str:
    """Name the source of Python's own standard library: real text that is on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = ("asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging")
    packages += ("multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml")
    return ",".join([f"{root}/*.py", *(f"{root}/{package}/**/*.py" for package in packages)])


def default_config() -> ConfigDict:
    """Return the locked config that every file in `configs/` starts from: a small modern GPT on Python's own source."""
    config = ConfigDict()
    config.seed = 1337  # initial parameters, order of the blocks, dropout, samples
    config.out_dir = "runs/default"  # the run directory: everything that this run writes, and where it resumes from
    config.init_from = ""  # begin from this model: a Hugging Face directory or Hub name, or a run directory
    config.log_every_steps = 10
    config.deadline_hours = 0.0  # stop, save and exit in time for a machine that is taken away; 0: no deadline

    config.data = data = ConfigDict()
    data.text_glob = standard_library_glob()  # a glob (** goes down), a directory, or several with commas between
    data.format = "text"  # "text"; "chat": .jsonl whose lines have "messages", of which the assistant's are learned
    data.text_field = "text"  # the field that holds the text in .jsonl and .parquet
    data.cache_dir = ""  # the token directory; "": tokens/ in the run directory
    data.val_fraction = 0.1  # share of the documents (of the tokens when there are few documents) held out
    data.encoding_errors = "strict"  # bytes that are not UTF-8: "strict" refuses, "replace" puts U+FFFD and counts

    config.tokenizer = tokenizer = ConfigDict()
    tokenizer.kind = "bpe"  # "char", "bpe" (byte-level, trained on the corpus), "hf" (pretrained)
    tokenizer.vocab_size = 4096  # bpe: ids in all, special tokens included
    tokenizer.training_megabytes = 64  # bpe: text to learn merges from, spread over the corpus (its counts sit in RAM)
    tokenizer.pretrained = ""  # hf: a local directory, or a name on the Hugging Face Hub
    tokenizer.chat_template = ""  # a Jinja file that turns messages into text; "": the pretrained tokenizer's own

    config.model = model = ConfigDict()  # with init_from, all but dropout are that model's
    model.n_layers = 6
    model.n_heads = 6
    model.n_kv_heads = 0  # grouped-query attention: key/value heads; 0: as many as n_heads
    model.d_model = 384  # width of the residual stream
    model.d_head = 0  # width of one head; 0: d_model / n_heads
    model.d_ff = 0  # hidden width of the MLP; 0: 4 d_model, or 8/3 d_model rounded up to 64 for swiglu
    model.context_length = 256  # tokens
    model.vocab_size = 0  # rows of the embedding; 0: the tokenizer's, rounded up to vocab_multiple_of
    model.vocab_multiple_of = 64  # GPUs multiply matrices faster when their sides are multiples of 64
    model.dropout = 0.0
    model.position = "rope"  # "learned" (GPT-2), "rope"
    model.norm = "rmsnorm"  # "layernorm" (GPT-2), "rmsnorm"
    model.mlp = "swiglu"  # "gelu" (GPT-2's tanh form), "swiglu"
    model.bias = False  # biases in every linear layer and in LayerNorm
    model.qkv_bias = False  # biases in the query, key and value layers alone (Qwen2); implied by bias
    model.qk_norm = False  # RMSNorm on each query and key head (Qwen3)
    model.tie_embeddings = True  # the output layer is the token embedding, transposed
    model.rope_theta = 10_000.0
    model.rope_scaling = rope_scaling = ConfigDict()  # how a pretrained model was stretched over a longer context
    rope_scaling.kind = "none"  # "none", "linear", "llama3", "yarn"
    rope_scaling.factor = 1.0
    rope_scaling.original_context_length = 0  # tokens, before it was stretched
    rope_scaling.low_freq_factor = 1.0  # llama3
    rope_scaling.high_freq_factor = 4.0  # llama3
    rope_scaling.beta_fast = 32.0  # yarn
    rope_scaling.beta_slow = 1.0  # yarn
    rope_scaling.attention_factor = 0.0  # yarn: of cosine and sine; 0: 0.1 ln(factor) + 1
    model.norm_eps = 1e-5

    config.lora = lora = ConfigDict()  # train small matrices beside the frozen ones of init_from
    lora.rank = 0  # columns of an adapter; 0: train all parameters
    lora.alpha = 16.0  # the adapters' output is scaled by alpha / rank
    lora.dropout = 0.0  # on the adapters' input
    lora.targets = "qkv,proj,gate_up,up,down"  # the layers of a block that have adapters, of these; commas between

    config.precision = precision = ConfigDict()
    precision.compute = "auto"  # "fp32", "fp16", "bf16"; auto: fp32 on CPU, fp16 on GPUs below sm_80, bf16 from sm_80
    precision.params = "fp32"  # dtype of the stored parameters; half precision loses small Adam updates
    precision.gradient_average = "fp32"  # what devices send each other; "fp16", half of it, where compute is fp16
    precision.loss_scale = 32_768.0  # fp16 only: the first loss scale
    precision.loss_scale_growth_steps = 1000  # fp16 only: doubled after so many steps without overflow

    config.optimizer = optimizer = ConfigDict()
    optimizer.total_steps = 1000  # optimizer steps
    optimizer.warmup_steps = 100
    optimizer.learning_rate = 1e-3  # the peak, after warmup
    optimizer.min_learning_rate = 1e-4  # at the end of the cosine
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.99
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1  # on matrices, not on norms and biases
    optimizer.clip_norm = 1.0  # global norm of the gradient; 0: no clipping

    config.batch = batch = ConfigDict()
    batch.global_batch_size = 32  # sequences an optimizer step, on all devices together
    batch.sequence_length = 0  # tokens of a training sequence; 0: model.context_length

    config.execution = execution = ConfigDict()  # what changes memory and speed and, but for rounding, no result
    execution.parallel = "data"  # several devices: "data" copies the model to each, "tensor" splits it over all (lora)
    execution.micro_batch_size = (
        32  # sequences on one device at a time, at most; the rest is accumulated; 0, auto: search
    )
    execution.remat = "none"  # recomputed in the backward pass: "none", "dots" (all but matmuls), "block" (all), "auto"
    execution.attention = (
        "auto"  # of training: "plain", "chunked" (5/8 of the pairs), "chunked_vjp" (so, with a backward pass that moves
        # less memory), "chunked_vjp_recompute" (the same, keeping no weights), "flash" (fused); auto: by the device
    )
    execution.loss_chunk_tokens = 2048  # tokens whose logits are in memory at one time; 0: all

    config.eval = evaluation = ConfigDict()
    evaluation.every_steps = 100
    evaluation.batches = 20  # global batches of validation text, spread evenly over it (all of it when there are fewer)

    config.sample = sample = ConfigDict()
    sample.every_steps = 500  # 0: only at the end
    sample.prompt = ""  # "": begin a new document; of conversations it is what the user says
    sample.num_samples = 2
    sample.max_new_tokens = 200
    sample.temperature = 0.8
    sample.top_k = 50  # 0: all
    sample.top_p = 1.0
    sample.min_p = 0.0

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500
    checkpoint.every_minutes = 20.0  # as well; 0: by steps alone
    checkpoint.keep_last = 2
    checkpoint.keep_best = True  # also keep the one with the lowest validation loss
    checkpoint.disk_gb = 0.0  # GB (1e9 bytes) that the run directory may hold; 0: what is free
    checkpoint.upload = ""  # also send the newest to "hub:OWNER/NAME", "dataset:OWNER/SLUG"; "": nowhere
    checkpoint.upload_every_minutes = 60.0  # at most so often, as each is a new version there, and once at the end
    checkpoint.resume = (
        "auto"  # "auto": go on if out_dir holds a run; "must": refuse to start anew; "never": refuse to go on
    )

    config.export = export = ConfigDict()
    export.require = False  # refuse, before training, a model that no Hugging Face architecture can hold
    return config.lock()


LORA_TARGETS = ("qkv", "proj", "gate_up", "up", "down")  # the linear layers of a block, by their names


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as {"group.key": value}.

    >>> flatten({"seed": 1, "model": {"n_layers": 2}})
    {'seed': 1, 'model.n_layers': 2}
    """
    flat = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping | ConfigDict) else {f"{prefix}{key}": value}
        )
    return flat
