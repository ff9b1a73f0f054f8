"""What is wrong with a config: all problems at once, before anything is done.

Beside the data path: the commands ask before the long work.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jgpt.config import moved
from jgpt.config.defaults import KEYS, LORA_TARGETS, flatten
from jgpt.config.other_names import INIT_FROM_CALLED, unknown_value
from jgpt.errors import UserError
from jgpt.redaction import find_secret

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def check(config: ConfigDict, text_bytes: int | None = None) -> None:
    """Raise one UserError that names every problem of a config; `text_bytes` is the size of its text, where known."""
    found = problems(config, text_bytes)
    if found:
        number = "this problem" if len(found) == 1 else f"these {len(found)} problems"
        raise UserError(f"the config has {number}:\n  - " + "\n  - ".join(found))


def problems(config: ConfigDict, text_bytes: int | None = None) -> list[str]:
    """List what is wrong with a config, each as: what was given, what is allowed, what to do."""
    single = _single_keys(flatten(config))
    wrong = set(single)  # nothing is computed from these below
    return [
        *single.values(),
        *_heads(config, wrong),
        *_rope_scaling(config, wrong),
        *_batch(config, wrong),
        *_learning_rate(config, wrong),
        *_muon(config),
        *_budget(config, wrong),
        *_tokenizer(config, wrong),
        *_names(config, wrong),
        *_secrets(config),
        *_length(config, wrong, text_bytes),
        *_sampling(config, wrong),
        *_lora(config, wrong),
        *_parallel(config, wrong),
    ]


def _single_keys(flat: Mapping[str, Any]) -> dict[str, str]:
    """Check each key by itself: its range, or its choices."""
    found = {}
    for name, key in KEYS.items():
        value = flat[name]
        if key.allows(value):
            continue
        renamed = moved.new_value(name, value)
        hint = f"; {value!r} is now {renamed!r}" if renamed else unknown_value(value, key.choices)
        found[name] = f"{name}={value!r}: it must be {key.allowed(in_full=True)}{hint}"
    return found


def _heads(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the heads share the width, and that the key/value heads share the query heads."""
    m = config.model
    if wrong.isdisjoint(("model.n_heads", "model.d_model", "model.d_head", "model.position")):
        d_head = m.d_head or m.d_model // m.n_heads
        if not m.d_head and m.d_model % m.n_heads:
            divisors = [n for n in range(1, 2 * m.n_heads + 1) if m.d_model % n == 0]
            closest = min(divisors, key=lambda n: abs(n - m.n_heads))
            yield (
                f"model.n_heads={m.n_heads} does not divide model.d_model={m.d_model}: heads are equal shares of the "
                f"width; set model.n_heads={closest}, or model.d_head"
            )
        elif m.position == "rope" and d_head % 2:
            yield (
                f"a head is {d_head} wide: rope rotates pairs, so it must be even; set model.d_head, or "
                "model.position='learned'"
            )
    if wrong.isdisjoint(("model.n_heads", "model.n_kv_heads")) and m.n_kv_heads and m.n_heads % m.n_kv_heads:
        yield (
            f"model.n_kv_heads={m.n_kv_heads} does not divide model.n_heads={m.n_heads}: each key/value head serves "
            "the same number of query heads; set it to a divisor, or 0"
        )


def _rope_scaling(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the frequencies of a stretched model can be computed."""
    s, name = config.model.rope_scaling, "model.rope_scaling"
    if s.kind not in ("llama3", "yarn") or any(key.startswith(name) for key in wrong):
        return
    if not s.original_context_length:
        yield f"{name}.original_context_length=0: kind={s.kind!r} needs the tokens before it was stretched; set them"
    if s.kind == "llama3" and s.low_freq_factor >= s.high_freq_factor:
        yield (
            f"{name}.low_freq_factor={s.low_freq_factor:g} is not below {name}.high_freq_factor="
            f"{s.high_freq_factor:g}: frequencies between them are mixed; set both as the model's publisher has them"
        )
    if s.kind == "yarn" and not (s.beta_fast and s.beta_slow and config.model.rope_theta > 1):
        yield (
            f"{name}: yarn divides by beta_fast={s.beta_fast:g}, beta_slow={s.beta_slow:g} and the logarithm of"
            f" model.rope_theta={config.model.rope_theta:g}: both must be above 0 and that above 1; set them as the"
            " model's publisher has them"
        )


def _batch(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that equal micro-batches make the batch."""
    whole, micro = config.batch.global_batch_size, config.execution.micro_batch_size
    if not wrong.isdisjoint(("batch.global_batch_size", "execution.micro_batch_size")) or not micro:
        return
    if whole % micro:
        largest = next(n for n in range(min(micro, whole), 0, -1) if whole % n == 0)
        yield (
            f"execution.micro_batch_size={micro} does not divide batch.global_batch_size={whole}: a step is made of "
            f"equal micro-batches; set execution.micro_batch_size={largest}"
        )


def _learning_rate(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the learning rate rises to its peak and falls from it."""
    o = config.optimizer
    steps_known = o.total_steps and wrong.isdisjoint(("optimizer.warmup_steps", "optimizer.total_steps"))
    if steps_known and o.warmup_steps >= o.total_steps:
        yield (
            f"optimizer.warmup_steps={o.warmup_steps} is not below optimizer.total_steps={o.total_steps}: the learning "
            f"rate would never decay; set optimizer.warmup_steps={o.total_steps // 10}"
        )
    elif steps_known and o.schedule == "wsd" and "optimizer.decay_fraction" not in wrong:
        most = 1 - o.warmup_steps / o.total_steps
        if o.decay_fraction > most:
            yield (
                f"optimizer.decay_fraction={o.decay_fraction:g} of {o.total_steps} steps begins before the "
                f"{o.warmup_steps} steps of warmup end; set at most {math.floor(1000 * most) / 1000:g}, or a smaller "
                "optimizer.warmup_steps"
            )
    rates = ("optimizer.min_learning_rate", "optimizer.learning_rate")
    if wrong.isdisjoint(rates) and o.min_learning_rate > o.learning_rate:
        yield (
            f"optimizer.min_learning_rate={o.min_learning_rate:g} is above optimizer.learning_rate="
            f"{o.learning_rate:g}, the peak that it decays from; set it to a tenth of that"
        )


def _muon(config: ConfigDict) -> Iterator[str]:
    """Check that Muon has matrices of the blocks to update, and that its updates are not lost."""
    if config.optimizer.kind != "muon":
        return
    if config.lora.rank:
        yield (
            f"optimizer.kind='muon' with lora.rank={config.lora.rank}: the blocks' matrices are frozen, and adapters "
            "have AdamW; set optimizer.kind='adamw'"
        )
    if config.precision.params != "fp32":
        yield (
            f"optimizer.kind='muon' with precision.params={config.precision.params!r}: its updates are smaller than a "
            "half-precision parameter's last bit; set precision.params='fp32' (precision.compute may be half)"
        )


def _budget(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the length of a run is given once: in steps, or in hours and epochs."""
    steps = config.optimizer.total_steps
    given = {f"optimizer.{name}": config.optimizer[name] for name in ("budget_hours", "budget_epochs")}
    if not wrong.isdisjoint(("optimizer.total_steps", *given)) or bool(steps) != any(given.values()):
        return
    if steps:
        limits = " and ".join(f"{name}={value:g}" for name, value in given.items() if value)
        unset = " and ".join(f"{name}=0" for name, value in given.items() if value)
        yield (
            f"{limits} with optimizer.total_steps={steps}: a run is so many steps long, or as many as hours and epochs"
            f" hold; set optimizer.total_steps=auto (0 in a config file), or {unset}"
        )
    else:
        yield (
            "optimizer.total_steps=auto (0) without optimizer.budget_hours and optimizer.budget_epochs: the steps are"
            " those that they hold; set optimizer.budget_hours=2, say, or optimizer.total_steps"
        )


def _tokenizer(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the vocabulary is large enough, and that a pretrained tokenizer has a name."""
    t, n_rows = config.tokenizer, config.model.vocab_size
    if t.kind == "hf" and not t.pretrained:
        yield "tokenizer.pretrained='': kind 'hf' needs a directory or a Hub name; set tokenizer.pretrained='gpt2'"
    if t.kind != "bpe" or "tokenizer.vocab_size" in wrong:
        return
    if t.vocab_size < 257:
        yield f"tokenizer.vocab_size={t.vocab_size}: bpe needs 256 bytes and an end-of-text token; set 257 or more"
    if "model.vocab_size" not in wrong and 0 < n_rows < t.vocab_size:
        yield (
            f"model.vocab_size={n_rows} is below tokenizer.vocab_size={t.vocab_size}: the model needs a row for every "
            "id; set model.vocab_size=0"
        )


def _names(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the run directory and the text are named, and that the encoding is one."""
    if "out_dir" not in wrong and not config.out_dir.strip():
        yield "out_dir='': a run writes into a directory of its own; set out_dir='runs/NAME'"
    for key, name in {"out_dir": config.out_dir, "data.cache_dir": config.data.cache_dir}.items():
        if key not in wrong and "://" in name:
            yield (
                f"{key}={name!r}: it must be a folder of this machine, because files there are locked, renamed and "
                "mapped into memory, which gs:// and s3:// do not have; set a local folder. data.text_glob may be such "
                f"an address, and checkpoints go to one with checkpoint.upload={name!r}, from where the same command "
                "takes them on another machine"
            )
    if "data.text_glob" not in wrong and not config.data.text_glob.strip():
        yield "data.text_glob='': name the text, a glob or a directory; set data.text_glob='texts/**/*.txt'"
    if "data.encoding" not in wrong and not is_encoding(config.data.encoding):
        yield (
            f"data.encoding={config.data.encoding!r}: Python knows no such text encoding; set it to 'utf-8', or one "
            "of docs.python.org/3/library/codecs.html#standard-encodings"
        )


def is_encoding(name: str) -> bool:
    """Return whether Python reads text in an encoding of this name.

    >>> is_encoding("gb18030"), is_encoding("utf-9"), is_encoding("rot13"), is_encoding("")
    (True, False, False, False)
    """
    try:
        b"a".decode(name, "ignore")  # refused for codecs from bytes to bytes, and from text to text
        return codecs.getincrementaldecoder(name) is not None
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        return False


def _secrets(config: ConfigDict) -> Iterator[str]:
    """Check that no value is or holds a secret: config.json and the report keep every value as it is."""
    for name, value in flatten(config).items():
        if isinstance(value, str) and (secret := find_secret(value)):
            yield (
                f"{name} holds {secret}: a config is written to files that others may read, so it has no secrets; take"
                " it out (tokens are read from the environment), or, if it is no secret, give it another name there"
            )


def _length(config: ConfigDict, wrong: set[str], text_bytes: int | None) -> Iterator[str]:
    """Check that a training sequence fits the model, and that the text fills at least one."""
    if not wrong.isdisjoint(("model.context_length", "batch.sequence_length")):
        return
    given, context = config.batch.sequence_length, config.model.context_length
    # With init_from the context is that model's, which is not known here.
    if not config.init_from and given > context:
        yield (
            f"batch.sequence_length={given} is above model.context_length={context}, which is all that the model sees; "
            "set batch.sequence_length=0"
        )
    name, length = ("batch.sequence_length", given) if given else ("model.context_length", context)
    is_known = given or not config.init_from
    fills_rows = config.data.format == "text"  # a conversation may be shorter than its row
    if text_bytes is not None and text_bytes <= length and is_known and fills_rows:
        yield (
            f"{name}={length} is longer than the data: {text_bytes:,} bytes of text in all; set a smaller {name}, or "
            "give more text"
        )


def _sampling(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that samples can be drawn: a sample must not end a run after hours."""
    temperature = config.sample.temperature
    if "sample.temperature" not in wrong and 0 < temperature < 1e-6:
        yield f"sample.temperature={temperature:g}: fp32 would round it to 0; set 0, or 0.000001 or more"


def _lora(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that adapters have a model beside them, and are on layers that exist."""
    if not wrong.isdisjoint(("lora.rank", "lora.targets", "init_from")):
        return
    if said := INIT_FROM_CALLED.get(config.init_from):
        yield f"init_from={config.init_from!r}: {said}"
    if config.lora.rank and not config.init_from:
        yield (
            f"lora.rank={config.lora.rank} without init_from: adapters are trained beside a pretrained model; set "
            "init_from to a model, or lora.rank=0"
        )
    targets = [target.strip() for target in config.lora.targets.split(",")]
    if unknown := [target for target in targets if target not in LORA_TARGETS]:
        hint = unknown_value(unknown[0], LORA_TARGETS)
        yield f"lora.targets: {unknown[0]!r} is no layer; they are {', '.join(LORA_TARGETS)}{hint}"


def _parallel(config: ConfigDict, wrong: set[str]) -> Iterator[str]:
    """Check that the way in which devices share the work goes with what is trained."""
    e, rank = config.execution, config.lora.rank
    if e.mesh and e.parallel == "data":
        yield (
            f"execution.mesh={e.mesh!r} with execution.parallel='data': only fsdp and tensor divide the devices into "
            "groups; set execution.mesh='', or execution.parallel='fsdp'"
        )
    if "lora.rank" in wrong:
        return
    if e.parallel == "fsdp" and rank:
        yield (
            "execution.parallel='fsdp' with lora: adapters are small, and the frozen base is what needs splitting; set "
            "execution.parallel='tensor', or lora.rank=0"
        )
    if e.parallel == "tensor" and not rank:
        yield (
            "execution.parallel='tensor' without lora: the optimizer of all parameters is not split over devices; set "
            "lora.rank=16, or execution.parallel='fsdp'"
        )
