"""Every setting of jgpt, born here with its unit and its reason; the files in `configs/` only override.

First in the data path: a config names the text, the tokenizer, the model, the step and the run directory.
"""

import difflib
import math
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class UserError(ValueError):
    """A mistake that the user can mend: the commands print it without a traceback and exit with 2.

    The message says three things: what was given, what is allowed, what to do.
    """


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
    config.parallel = "pmap"  # several devices: "pmap" copies the model to each, "tensor" splits it over all (lora)
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
    batch.micro_batch_size = 32  # sequences on one device at a time, at most; the rest is accumulated; 0, auto: search

    config.remat = "none"  # recomputed in the backward pass: "none", "dots" (all but matmuls), "block" (all), "auto"
    config.attention = (
        "auto"  # of training: "plain", "chunked" (5/8 of the pairs), "kept" (so, and a backward pass that moves less
        # memory), "light" (so, and keeps no weights), "cudnn" (a fused kernel, from sm_80 on); auto: by the device
    )
    config.loss_chunk_tokens = 2048  # tokens whose logits are in memory at one time; 0: all

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


CHOICES = {
    "parallel": ("pmap", "tensor"),
    "data.format": ("text", "chat"),
    "data.encoding_errors": ("strict", "replace"),
    "tokenizer.kind": ("char", "bpe", "hf"),
    "model.position": ("learned", "rope"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.mlp": ("gelu", "swiglu"),
    "model.rope_scaling.kind": ("none", "linear", "llama3", "yarn"),
    "precision.compute": ("auto", "fp32", "fp16", "bf16"),
    "precision.params": ("fp32", "fp16", "bf16"),
    "precision.gradient_average": ("fp32", "fp16"),
    "remat": ("none", "dots", "block", "auto"),
    "attention": ("auto", "plain", "chunked", "kept", "light", "cudnn"),
    "checkpoint.resume": ("auto", "must", "never"),
}

LORA_TARGETS = ("qkv", "proj", "gate_up", "up", "down")  # the linear layers of a block, by their names

RANGES = (  # key, lowest, highest
    ("seed", 0, 2**31 - 1),
    ("log_every_steps", 1, math.inf),
    ("deadline_hours", 0, math.inf),
    ("loss_chunk_tokens", 0, math.inf),
    ("data.val_fraction", 1e-6, 0.5),
    ("tokenizer.training_megabytes", 1, math.inf),
    ("model.n_layers", 1, math.inf),
    ("model.n_heads", 1, math.inf),
    ("model.n_kv_heads", 0, math.inf),
    ("model.d_model", 1, math.inf),
    ("model.d_head", 0, math.inf),
    ("model.d_ff", 0, math.inf),
    ("model.context_length", 1, math.inf),
    ("model.vocab_size", 0, math.inf),
    ("model.vocab_multiple_of", 1, math.inf),
    ("model.dropout", 0, 0.99),
    ("model.rope_theta", 1, math.inf),
    ("model.rope_scaling.factor", 1, math.inf),
    ("model.rope_scaling.original_context_length", 0, math.inf),
    ("model.rope_scaling.low_freq_factor", 0, math.inf),
    ("model.rope_scaling.high_freq_factor", 0, math.inf),
    ("model.rope_scaling.beta_fast", 0, math.inf),
    ("model.rope_scaling.beta_slow", 0, math.inf),
    ("model.rope_scaling.attention_factor", 0, math.inf),
    ("model.norm_eps", 0, 1),
    ("lora.rank", 0, 4096),
    ("lora.alpha", 1e-6, math.inf),
    ("lora.dropout", 0, 0.99),
    ("precision.loss_scale", 1, 2.0**24),
    ("precision.loss_scale_growth_steps", 1, math.inf),
    ("optimizer.total_steps", 1, 2**31 - 1),
    ("optimizer.warmup_steps", 0, math.inf),
    ("optimizer.learning_rate", 1e-12, 10),
    ("optimizer.min_learning_rate", 0, 10),
    ("optimizer.beta1", 0, 0.99999),
    ("optimizer.beta2", 0, 0.9999999),
    ("optimizer.eps", 0, 1),
    ("optimizer.weight_decay", 0, math.inf),
    ("optimizer.clip_norm", 0, math.inf),
    ("batch.global_batch_size", 1, math.inf),
    ("batch.sequence_length", 0, math.inf),
    ("batch.micro_batch_size", 0, math.inf),
    ("eval.every_steps", 1, math.inf),
    ("eval.batches", 1, math.inf),
    ("sample.every_steps", 0, math.inf),
    ("sample.num_samples", 0, math.inf),
    ("sample.max_new_tokens", 1, math.inf),
    ("sample.temperature", 0, 100),
    ("sample.top_k", 0, math.inf),
    ("sample.top_p", 1e-6, 1),
    ("sample.min_p", 0, 1),
    ("checkpoint.every_steps", 1, math.inf),
    ("checkpoint.every_minutes", 0, math.inf),
    ("checkpoint.keep_last", 1, math.inf),
    ("checkpoint.disk_gb", 0, math.inf),
    ("checkpoint.upload_every_minutes", 0, math.inf),
)


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


def check(config: ConfigDict, text_bytes: int | None = None) -> None:
    """Raise one UserError that names every problem of a config; `text_bytes` is the size of its text, where known."""
    found = problems(config, text_bytes)
    if found:
        number = "this problem" if len(found) == 1 else f"these {len(found)} problems"
        raise UserError(f"the config has {number}:\n  - " + "\n  - ".join(found))


def problems(config: ConfigDict, text_bytes: int | None = None) -> list[str]:
    """List what is wrong with a config, each as: what was given, what is allowed, what to do."""
    found = []
    flat = flatten(config)
    wrong = set()  # keys that are wrong by themselves: nothing is computed from them below

    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            wrong.add(key)
            close = difflib.get_close_matches(str(flat[key]), allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            found.append(f"{key}={flat[key]!r}: it must be {_either(map(repr, allowed))}{hint}")
    for key, lowest, highest in RANGES:
        if not lowest <= flat[key] <= highest:  # nan is in no range
            wrong.add(key)
            found.append(f"{key}={flat[key]!r}: it must be {range_text(lowest, highest)}")

    def fine(*keys: str) -> bool:
        return wrong.isdisjoint(keys)

    m, b, o, t = config.model, config.batch, config.optimizer, config.tokenizer
    if fine("model.n_heads", "model.d_model", "model.d_head", "model.position"):
        if not m.d_head and m.d_model % m.n_heads:
            near = [n for n in range(1, 2 * m.n_heads + 1) if m.d_model % n == 0]
            close_heads = min(near, key=lambda n: abs(n - m.n_heads))
            found.append(
                f"model.n_heads={m.n_heads} does not divide model.d_model={m.d_model}: heads are equal shares of the "
                f"width; set model.n_heads={close_heads}, or model.d_head"
            )
        elif m.position == "rope" and (m.d_head or m.d_model // m.n_heads) % 2:
            found.append(
                f"a head is {m.d_head or m.d_model // m.n_heads} wide: rope turns pairs, so it must be even; set "
                "model.d_head, or model.position='learned'"
            )
    if fine("model.n_heads", "model.n_kv_heads") and m.n_kv_heads and m.n_heads % m.n_kv_heads:
        found.append(
            f"model.n_kv_heads={m.n_kv_heads} does not divide model.n_heads={m.n_heads}: each key/value head serves as "
            "many query heads as the next; set it to a divisor, or 0"
        )
    cut = fine("batch.global_batch_size", "batch.micro_batch_size") and b.micro_batch_size
    if cut and b.global_batch_size % b.micro_batch_size:
        near = max(n for n in range(1, b.micro_batch_size + 1) if b.global_batch_size % n == 0)
        found.append(
            f"batch.micro_batch_size={b.micro_batch_size} does not divide batch.global_batch_size="
            f"{b.global_batch_size}: a step is made of equal micro-batches; set batch.micro_batch_size={near}"
        )
    if fine("optimizer.warmup_steps", "optimizer.total_steps") and o.warmup_steps >= o.total_steps:
        found.append(
            f"optimizer.warmup_steps={o.warmup_steps} is not below optimizer.total_steps={o.total_steps}: the learning "
            f"rate would never come down; set optimizer.warmup_steps={o.total_steps // 10}"
        )
    if fine("optimizer.min_learning_rate", "optimizer.learning_rate") and o.min_learning_rate > o.learning_rate:
        found.append(
            f"optimizer.min_learning_rate={o.min_learning_rate:g} is above optimizer.learning_rate="
            f"{o.learning_rate:g}, the peak that it comes down from; set it to a tenth of that"
        )
    if t.kind == "bpe" and t.vocab_size < 257:
        found.append(
            f"tokenizer.vocab_size={t.vocab_size}: bpe needs 256 bytes and an end-of-text token; set 257 or more"
        )
    if t.kind == "hf" and not t.pretrained:
        found.append(
            "tokenizer.pretrained='': kind 'hf' needs a local directory or a Hub name; set tokenizer.pretrained='gpt2'"
        )
    if t.kind == "bpe" and 0 < m.vocab_size < t.vocab_size:
        found.append(
            f"model.vocab_size={m.vocab_size} is below tokenizer.vocab_size={t.vocab_size}: the model needs a row for "
            "every id; set model.vocab_size=0"
        )
    if not config.out_dir.strip():
        found.append("out_dir='': a run writes into a directory of its own; set out_dir='runs/NAME'")
    if not config.data.text_glob.strip():
        found.append("data.text_glob='': name the text, a glob or a directory; set data.text_glob='texts/**/*.txt'")
    length = "batch.sequence_length" if b.sequence_length else "model.context_length"
    if fine("model.context_length", "batch.sequence_length"):
        # With init_from the context is that model's, which is not known here.
        if not config.init_from and b.sequence_length > m.context_length:
            found.append(
                f"batch.sequence_length={b.sequence_length} is above model.context_length={m.context_length}, which is "
                "all that the model sees; set batch.sequence_length=0"
            )
        given = b.sequence_length or not config.init_from
        fills = config.data.format == "text"  # a conversation may be shorter than its row
        if text_bytes is not None and text_bytes <= flat[length] and given and fills:
            found.append(
                f"{length}={flat[length]} is longer than the data: {text_bytes:,} bytes of text in all; set a smaller "
                f"{length}, or give more text"
            )
    if config.lora.rank and not config.init_from:
        found.append(
            f"lora.rank={config.lora.rank} without init_from: adapters are trained beside a model that is there; set "
            "init_from to a model, or lora.rank=0"
        )
    if config.parallel == "tensor" and not config.lora.rank:
        found.append(
            "parallel='tensor' without lora: the optimizer of all parameters is not split over devices; set "
            "lora.rank=16, or parallel='pmap'"
        )
    targets = [target.strip() for target in config.lora.targets.split(",")]
    if unknown := [target for target in targets if target not in LORA_TARGETS]:
        close = difflib.get_close_matches(unknown[0], LORA_TARGETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        found.append(f"lora.targets: {unknown[0]!r} is no layer; they are {', '.join(LORA_TARGETS)}{hint}")
    return found


def range_text(lowest: float, highest: float) -> str:
    """Say a range in words.

    >>> range_text(0, 0.99), range_text(1, math.inf), range_text(0, 2**31 - 1)
    ('0 to 0.99', '1 or more', '0 to 2,147,483,647')
    """
    low, high = (f"{int(x):,}" if x < math.inf and x == int(x) else repr(x) for x in (lowest, highest))
    return f"{low} or more" if highest == math.inf else f"{low} to {high}"


def _either(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
