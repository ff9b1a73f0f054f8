"""What is wrong with a config: all problems at once, before anything is done.

Beside the data path: the commands ask before the long work.
"""

import difflib
import math

from ml_collections import ConfigDict

from jgpt.config.defaults import LORA_TARGETS, flatten
from jgpt.errors import UserError
from jgpt.wording import either, range_text

CHOICES = {
    "execution.parallel": ("data", "tensor"),
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
    "execution.remat": ("none", "dots", "block", "auto"),
    "execution.attention": ("auto", "plain", "chunked", "chunked_vjp", "chunked_vjp_recompute", "flash"),
    "checkpoint.resume": ("auto", "must", "never"),
}
RANGES = (  # key, lowest, highest
    ("seed", 0, 2**31 - 1),
    ("log_every_steps", 1, math.inf),
    ("deadline_hours", 0, math.inf),
    ("execution.loss_chunk_tokens", 0, math.inf),
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
    ("execution.micro_batch_size", 0, math.inf),
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
            found.append(f"{key}={flat[key]!r}: it must be {either(map(repr, allowed))}{hint}")
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
    micro = config.execution.micro_batch_size
    cut = fine("batch.global_batch_size", "execution.micro_batch_size") and micro
    if cut and b.global_batch_size % micro:
        near = max(n for n in range(1, micro + 1) if b.global_batch_size % n == 0)
        found.append(
            f"execution.micro_batch_size={micro} does not divide batch.global_batch_size="
            f"{b.global_batch_size}: a step is made of equal micro-batches; set execution.micro_batch_size={near}"
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
    if config.execution.parallel == "tensor" and not config.lora.rank:
        found.append(
            "execution.parallel='tensor' without lora: the optimizer of all parameters is not split over devices; set "
            "lora.rank=16, or execution.parallel='data'"
        )
    targets = [target.strip() for target in config.lora.targets.split(",")]
    if unknown := [target for target in targets if target not in LORA_TARGETS]:
        close = difflib.get_close_matches(unknown[0], LORA_TARGETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        found.append(f"lora.targets: {unknown[0]!r} is no layer; they are {', '.join(LORA_TARGETS)}{hint}")
    return found
