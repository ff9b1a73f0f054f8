"""Write a model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) open.

Beside the data path: `loading/export.py` calls it. The names, orders and keys are those of llama.cpp's own
conversion/llama.py, qwen.py and gpt2.py. Only what those write for certain is written; all else is refused by name.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jgpt.atomic_write import atomic_path
from jgpt.data.tokenizer import WORDS, Tokenizer
from jgpt.errors import UserError
from jgpt.exchange.cast import cast
from jgpt.exchange.families import export_family
from jgpt.exchange.new_directory import place_errors
from jgpt.exchange.tensors import Entry, prefix
from jgpt.exchange.write_weights import entry_bytes, named_tensors
from jgpt.model.precision import DTYPES
from jgpt.model.rope import frequencies
from jgpt.model.shapes import ModelConfig

ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType
# The regular expressions by which llama.cpp's pre-tokenizers cut, as their makers' tokenizer.json have them.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Ours is GPT-2's but for words above 512 characters, which have other ids in llama.cpp.
SPLITS = {WORDS: "gpt-2", CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + r"\p{N}" + REST: "qwen2"}


def check_gguf(out: Path, shapes: ModelConfig, tokenizer: Tokenizer) -> str:
    """Return the family that a model would be written as.

    Raises UserError where `out` is taken, GGUF cannot hold the model for certain, or gguf is not installed.
    """
    if out.suffix != ".gguf":
        raise UserError(f"{out} does not end in .gguf, and tools know the format by that. Name a file such as m.gguf.")
    with place_errors(out):
        is_free = not out.exists() and out.absolute().parent.is_dir()
    if not is_free:
        raise UserError(f"{out} exists, or its folder does not. Allowed: a new file in a folder that is there.")
    _gguf()
    family, scaling = export_family(shapes), shapes.rope_scaling
    reasons = []
    if shapes.bias and family != "gpt2":
        reasons.append(f"bias=True in a {family} model")
    if shapes.qkv_bias and family == "qwen3":
        reasons.append("qkv_bias=True beside qk_norm=True")
    if scaling.kind == "llama3" and family not in ("llama", "mistral"):
        reasons.append(f"rope_scaling.kind='llama3' in a {family} model")
    if scaling.kind == "yarn" and scaling.attention_factor:
        reasons.append("rope_scaling.kind='yarn' with an attention_factor of its own")
    if reasons:
        raise UserError(
            f"no GGUF file is written of a model with {' and '.join(reasons)}: whether llama.cpp computes the same is"
            " not known. Allowed: GPT-2, Llama, Mistral, Qwen2 and Qwen3 in their published forms. Use"
            " jgpt.convert export, and transformers."
        )
    pre_tokenizer(tokenizer)
    return family


def pre_tokenizer(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text before its merges; raise UserError where it has none."""
    content = json.loads(tokenizer.tokenizer_json)
    model, normalizer = content["model"], content.get("normalizer")
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds, last = [step.get("type") for step in steps], steps[-1]
    found = ""
    if model.get("type") == "BPE" and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            found = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
            found = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            found = SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""), "")
    if normalizer is not None and not (found == "qwen2" and normalizer.get("type") == "NFC"):
        found = ""
    if not found:
        raise UserError(
            f"llama.cpp has no tokenizer like this one ({model.get('type')}, cut by {' and '.join(map(str, kinds))})."
            " Allowed: byte-level BPE as trained here (tokenizer.kind='bpe') and as GPT-2, SmolLM2, Llama 3 or Qwen2"
            " have it. Train with one of these, or use jgpt.convert export, and transformers."
        )
    return found


def write_gguf(
    out: Path,
    params: Any,
    entries: list[Entry],
    shapes: ModelConfig,
    tokenizer: Tokenizer,
    *,
    family: str,
    vocab_size: int,
    stop_ids: tuple[int, ...],
    dtype: str,
) -> None:
    """Write a model to the new file `out`, which appears when it is whole, or not at all.

    `params` is the parameter tree of the plain model, `entries` its table in the layout of `family`, which `check_gguf`
    returned. Matrices are written in `dtype` ("fp32" or "fp16"), vectors and learned positions in fp32, as llama.cpp
    needs them. Raises UserError for a value that fp16 cannot hold, and where the disk is too small.
    """
    gguf = _gguf()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    names = gguf.get_tensor_name_map(arch, shapes.n_layers)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        if shapes.rope_scaling.kind == "llama3":
            yield "rope_freqs.weight", _llama3_factors(shapes)
        for entry in entries:
            for name, array in named_tensors(params, entry, np.float32, prefix(family)):
                new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
                assert new_name is not None, name
                in_fp32 = array.ndim == 1 or new_name == "position_embd.weight"
                array = cast(_arranged(array, name, shapes, family), np.float32 if in_fp32 else DTYPES[dtype], name)
                yield new_name, np.ascontiguousarray(array)

    size, free = sum(entry_bytes(entry, np.float32) for entry in entries), shutil.disk_usage(out.absolute().parent).free
    if size > free:
        raise UserError(f"{out} may take {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there. Make room.")
    with place_errors(out), atomic_path(out) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[family])
        _describe_model(writer, gguf, shapes, family, vocab_size, dtype, out.stem)
        _describe_tokenizer(writer, tokenizer, vocab_size, stop_ids)
        for name, array in tensors():  # first what they are, then what they hold: one at a time is copied
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array in tensors():
            writer.write_tensor_data(array)
        writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files are written by the package gguf, which is missing. Run: pip install gguf") from None
    return gguf


def _describe_model(
    writer: Any, gguf: Any, shapes: ModelConfig, family: str, vocab_size: int, dtype: str, name: str
) -> None:
    c, s = shapes, shapes.rope_scaling
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "fp32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_vocab_size(vocab_size)
    if family == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.d_head)
    writer.add_value_length(c.d_head)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.d_head)
    writer.add_rope_freq_base(c.rope_theta)
    if s.kind in ("linear", "yarn"):
        kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
        writer.add_rope_scaling_type(kinds[s.kind])
        writer.add_rope_scaling_factor(s.factor)
    if s.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(s.original_context_length)
        writer.add_rope_scaling_yarn_beta_fast(s.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(s.beta_slow)


def _describe_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
    """Write the vocabulary, with a token for each row of the embedding, the merges, and the special ids."""
    content = json.loads(tokenizer.tokenizer_json)
    vocabulary = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    added = {i: token for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
    tokens = [vocabulary.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [
        (CONTROL if added[i].special else USER_DEFINED) if i in added else NORMAL if i in vocabulary else UNUSED
        for i in range(vocab_size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(bool(tokenizer.start_ids))
    writer.add_bos_token_id(tokenizer.start_ids[0] if tokenizer.start_ids else tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    if others := [i for i in stop_ids if i != tokenizer.eot_id]:
        writer.add_eot_token_id(others[0])
    if template := tokenizer.settings.get("chat_template"):
        writer.add_chat_template(template)


def _arranged(array: np.ndarray, name: str, shapes: ModelConfig, family: str) -> np.ndarray:
    """Return a tensor of transformers as llama.cpp lays it out.

    GPT-2's weights are [outputs, inputs] there. Llama's RoPE turns neighbours, so element i of a head's first half
    stands beside element i of its second.
    """
    if family == "gpt2" and array.ndim == 2 and ".h." in name:
        return array.T
    heads = {"q_proj.weight": shapes.n_heads, "k_proj.weight": shapes.n_kv_heads}.get(".".join(name.split(".")[-2:]))
    if family in ("llama", "mistral") and heads:
        return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    return array


def _llama3_factors(shapes: ModelConfig) -> np.ndarray:
    """Return what llama.cpp divides each plain frequency by, fp32 [H/2]."""
    half = shapes.d_head // 2
    plain = shapes.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    return (plain / frequencies(shapes.d_head, shapes.rope_theta, shapes.rope_scaling)[0]).astype(np.float32)
