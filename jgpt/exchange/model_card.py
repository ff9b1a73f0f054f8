"""Write the model card: the README.md of an export, with the metadata that the Hub reads.

Beside the data path: `write_model.py` and `write_adapter.py` put it into their directories. The metadata are those of
https://huggingface.co/docs/hub/model-cards. What the base model's own card says of its licence and its languages holds
for what was made of it as well, and is taken over from there.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jgpt.exchange.families import ARCHITECTURES
from jgpt.exchange.hub import cached_card, is_hub_name
from jgpt.model.shapes import ModelConfig
from jgpt.version import __version__

INHERITED = ("license", "license_name", "license_link", "language")
log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class Base:
    """The model that training began from: its name on the Hub, or its directory, and what its card says of it."""

    name: str
    metadata: dict[str, Any] = field(default_factory=dict)  # of INHERITED, as far as they are there

    @property
    def hub_name(self) -> str:
        """Its name on the Hub; "" where it has none."""
        return self.name if is_hub_name(self.name) else ""


def describe_base(name: str, directory: Path | None = None) -> Base:
    """Read what the card of a model says, if it is on this machine: in its directory, or in the Hub's cache.

    `name` is that on the Hub, or a directory; `directory` is where the model is, where that is known.
    """
    path = cached_card(str(directory or name))
    metadata = _metadata(path) if path else {}
    found = {key: metadata[key] for key in INHERITED if metadata.get(key)}
    base = Base(name, found)
    link = found.get("license_link")
    if base.hub_name and isinstance(link, str) and "://" not in link:  # a file of its repository
        found["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return base


def _metadata(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception as error:  # its YAML may be broken in any way
        log.warning("%s: its metadata cannot be read (%s), so the card says nothing of a licence", path, error)
        return {}


def metadata(base: Base | None, is_adapter: bool) -> str:
    """Return the YAML at the head of a card, with its lines of dashes."""
    from huggingface_hub import ModelCardData

    known: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    known |= {"pipeline_tag": "text-generation", "tags": ["jgpt", *(["lora"] if is_adapter else [])]}
    if base:
        known |= base.metadata
    if base and base.hub_name:
        known |= {"base_model": base.hub_name, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return f"---\n{ModelCardData(**known).to_yaml()}\n---\n"


def of_model(
    name: str, family: str, shapes: ModelConfig, *, n_params: int, vocab_size: int, dtype: str, base: Base | None,
    is_chat: bool,
) -> str:  # fmt: skip
    """Return the card of a whole model. `dtype` is that of its weights, in PyTorch's words."""
    c = shapes
    began = f" It was fine-tuned from {_link(base)}." if base else ""
    return f"""{metadata(base, is_adapter=False)}
# {name}

A language model of {n_params:,} parameters, written by jgpt {__version__}.{began}

| | |
|---|---|
| architecture | {ARCHITECTURES[family]} |
| layers | {c.n_layers} |
| width | {c.d_model} (MLP {c.d_ff}) |
| heads | {c.n_heads}, with {c.n_kv_heads} of keys and values, each {c.d_head} wide |
| context | {c.context_length} tokens |
| vocabulary | {vocab_size} |
| weights | {dtype} |

It opens without remote code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
{_use(is_chat)}
```

{_licence(base)}
"""


def of_adapter(
    name: str, family: str, config: dict[str, Any], *, n_params: int, dtype: str, base: Base, base_is_run: bool,
    is_chat: bool,
) -> str:  # fmt: skip
    """Return the card of LoRA adapters, whose adapter_config.json is `config`.

    `base_is_run` says that transformers cannot open the base as it is.
    """
    where, export = base.hub_name or "BASE", ""
    if base_is_run:
        where, export = (
            "BASE",
            "\n\nTheir base is a run of jgpt; `jgpt convert export` makes of it what transformers opens.",
        )
    return f"""{metadata(base, is_adapter=True)}
# {name}

LoRA adapters of {n_params:,} parameters, written by jgpt {__version__}, for the base model {_link(base)}.{export}

| | |
|---|---|
| architecture of the base | {ARCHITECTURES[family]} |
| rank | {config["r"]} |
| alpha | {config["lora_alpha"]:g} |
| layers with adapters | {", ".join(config["target_modules"])} |
| weights | {dtype} |

They open in PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
base = AutoModelForCausalLM.from_pretrained("{where}", dtype="auto")
model = PeftModel.from_pretrained(base, "PATH")
{_use(is_chat)}
```

{_licence(base)}
"""


def _link(base: Base) -> str:
    """Name the base. Of a directory only the last name: its path says nothing to others."""
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.hub_name else f"`{Path(base.name).name}`"


def _use(is_chat: bool) -> str:
    inputs = (
        'messages = [{"role": "user", "content": "Hello"}]\n'
        "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,"
        ' return_tensors="pt")'
        if is_chat
        else 'inputs = tokenizer("Once", return_tensors="pt")'
    )
    return f"{inputs}\nprint(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))"


def _licence(base: Base | None) -> str:
    """Say under which licence the base is, and what its maker has to add."""
    if base is None:
        return "What it was trained on, its licence and its limits are for its maker to add here."
    licence = base.metadata.get("license_name") or base.metadata.get("license")
    if not licence:
        found = "The licence of the base model is not known here: its page says it, and it may bind what is made of it."
    else:
        link = base.metadata.get("license_link")
        named = f"[{licence}]({link})" if link else str(licence)
        found = f"The base model is under the licence {named}, which the metadata above take over."
    return f"{found} What it was trained on and its limits are for its maker to add here."
