"""Import a Hugging Face model as a run directory, or export a run: as a Hugging Face model, LoRA adapters, or GGUF.

    python -m jgpt.convert import HuggingFaceTB/SmolLM2-135M-Instruct runs/smollm2
    python -m jgpt.convert export runs/quickstart exported/quickstart
    python -m jgpt.convert adapter runs/finetune_lora exported/adapter
    python -m jgpt.convert gguf runs/quickstart quickstart.gguf

import SRC RUN_DIR writes a run directory that generate, chat, evaluate and --config.init_from take. SRC is a model
directory, a directory with one somewhere below it (as Kaggle mounts models), or a name on the Hub, which is downloaded:
GPT-2, Llama (SmolLM2, TinyLlama), Mistral, Qwen2, Qwen2.5 or Qwen3, from safetensors. (These commands also take
SRC directly, without a copy.)

export RUN_DIR OUT writes a directory that transformers.AutoModelForCausalLM.from_pretrained(OUT) opens, and every tool
that reads such directories. The adapters of a LoRA run are merged into their base.

adapter RUN_DIR OUT writes the adapters of a LoRA run alone, a few megabytes, in the layout of PEFT:
peft.PeftModel.from_pretrained(BASE, OUT) opens them.

gguf RUN_DIR OUT.gguf writes one file, in fp32 or fp16, that llama.cpp and what is built on it open (Ollama, LM Studio).
It takes the package gguf (pip install gguf). What llama.cpp is not known to compute alike is refused.

Beside the data path: between the Hugging Face layout and run directories.
"""

import json
import shlex
from pathlib import Path

from absl import flags

from jgpt.cli.run import run
from jgpt.errors import UserError

KINDS = ["auto", "fp32", "fp16", "bf16"]


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_enum("params", "auto", KINDS, "import: the dtype to keep the weights in; auto: the one they have")
    flags.DEFINE_enum("dtype", "auto", KINDS, "of what is written (not import); auto: the one the weights are kept in")
    flags.DEFINE_integer("step", None, "the checkpoint of the run to take; without it the newest", lower_bound=0)
    flags.DEFINE_string("base", "", "where the base model of LoRA adapters is now, if it has moved")


def main(action: str = "", source: str = "", target: str = "") -> None:
    """Do what the first argument says."""
    actions = {"import": _import, "export": _export, "adapter": _adapter, "gguf": _gguf}
    if action not in actions or not source or not target:
        given = " ".join(filter(None, (action, source, target))) or "nothing"
        raise UserError(
            f"given was {given!r}. Allowed: import SRC RUN_DIR, export RUN_DIR OUT, adapter RUN_DIR OUT, or gguf"
            " RUN_DIR OUT.gguf. For example: python -m jgpt.convert export runs/quickstart exported/quickstart"
        )
    actions[action](source, target)


def _import(name: str, run_dir: str) -> None:
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.exchange.hub import is_adapter, locate
    from jgpt.exchange.pretrained import open_pretrained
    from jgpt.kaggle.session.secrets import provide_hub_token
    from jgpt.loading.load import import_model
    from jgpt.model.parameters import count_parameters
    from jgpt.wording import format_count

    args = flags.FLAGS
    provide_hub_token(name)
    if is_adapter(directory := locate(name)):
        raise UserError(
            f"{directory} holds adapters in PEFT's layout. Allowed: a whole model. The other commands take it as it is"
            f" (--model, --config.init_from); python -m jgpt.convert export {shlex.quote(name)} NEW_DIR merges it into"
            " its model."
        )
    pretrained = open_pretrained(directory)
    dtype = pretrained.dtype if args.params == "auto" else args.params
    n_params = format_count(count_parameters(pretrained.shapes))
    print(f"{pretrained.directory}: {pretrained.family}, {n_params} parameters, {pretrained.dtype} kept in {dtype}")
    answers = import_model(pretrained, Path(run_dir), dtype)
    command, prompt = ("chat", "") if answers else ("generate", ' --prompt "Once"')
    print(f"{run_dir} is written. To try it:\n    python -m jgpt.{command} --model {shlex.quote(run_dir)}{prompt}")


def _export(run_dir: str, out: str) -> None:
    from jgpt.loading.export import export_run  # here: --help must not wait for JAX

    args = flags.FLAGS
    family, dtype = export_run(run_dir, Path(out), step=args.step, base=args.base, dtype=args.dtype)
    megabytes = sum(path.stat().st_size for path in Path(out).iterdir()) / 1e6
    print(f"{out} is written: {family}, {dtype}, {megabytes:,.1f} MB. To open it:")
    print(f"    transformers.AutoModelForCausalLM.from_pretrained({_literal(out)})")


def _adapter(run_dir: str, out: str) -> None:
    from jgpt.loading.export import export_adapter  # here: --help must not wait for JAX

    args = flags.FLAGS
    base, dtype, is_run = export_adapter(run_dir, Path(out), step=args.step, base=args.base, dtype=args.dtype)
    megabytes = sum(path.stat().st_size for path in Path(out).iterdir()) / 1e6
    print(f"{out} is written: LoRA adapters, {dtype}, {megabytes:,.1f} MB, for the base model {base}. To open it:")
    if is_run:  # transformers does not open it
        base, run = "NEW_DIR", base
        print(f"    python -m jgpt.convert export {shlex.quote(run)} {base}")
    print(f"    base = transformers.AutoModelForCausalLM.from_pretrained({_literal(base)})")
    print(f"    peft.PeftModel.from_pretrained(base, {_literal(out)})")


def _gguf(run_dir: str, out: str) -> None:
    from jgpt.loading.export import export_gguf  # here: --help must not wait for JAX

    args = flags.FLAGS
    family, dtype = export_gguf(run_dir, Path(out), step=args.step, base=args.base, dtype=args.dtype)
    print(f"{out} is written: {family}, {dtype}, {Path(out).stat().st_size / 1e6:,.1f} MB. To try it:")
    print(f'    llama-cli -m {shlex.quote(out)} -no-cnv -p "Once"')


def _literal(text: str) -> str:
    """Write a string of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
