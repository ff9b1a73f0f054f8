"""Every key, every config file, and what is refused; and the rules that hold for the whole source."""

import ast
import difflib
import io
import math
import re
import runpy
import tokenize
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jgpt.config import moved
from jgpt.config.check import check, problems
from jgpt.config.defaults import GROUPS, KEYS, default_config, flatten
from jgpt.data.find_files import find_files
from jgpt.errors import UserError
from jgpt.wording import range_text

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SOURCES = sorted((ROOT / "jgpt").rglob("*.py"))
CHOICES = {name: tuple(key.choices) for name, key in KEYS.items() if key.choices}
RANGES = [(name, key.low, key.high) for name, key in KEYS.items() if type(key.value) in (int, float)]


def changed(**changes: object) -> ConfigDict:
    """Return the default config with changes; __ stands for the dot."""
    config = default_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


# The config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_file_is_whole(path):
    config = runpy.run_path(str(path))["get_config"]()
    assert config.is_locked
    assert flatten(config).keys() == flatten(default_config()).keys()
    assert problems(config) == []
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    for part in ("Hardware:", "Time:", "Expect", "Command:"):
        assert part in doc, f"the docstring of {path.name} has no {part}"
    assert f"python -m jgpt.train --config configs/{path.name}" in doc
    assert len(doc.splitlines()[0]) <= 120 and doc.splitlines()[0].endswith((".", "?"))
    assert "default_config()" in path.read_text(), "a config file only overrides"


def test_config_files_write_in_directories_of_their_own():
    """Those for Kaggle write where Kaggle keeps what a session leaves; each notebook has a machine of its own."""
    at_home = [path for path in CONFIGS if not path.stem.startswith("kaggle")]
    where = [runpy.run_path(str(path))["get_config"]().out_dir for path in at_home]
    assert len(set(where)) == len(where)


def test_the_default_text_is_on_this_machine():
    files = find_files(default_config().data.text_glob)
    assert len(files) > 100 and sum(file.stat().st_size for file in files) > 2_000_000
    assert all(file.suffix == ".py" for file in files)


# The default, and the tables of what is allowed


def test_the_default_is_locked_and_each_call_makes_a_new_one():
    config = default_config()
    with pytest.raises((AttributeError, KeyError)):
        config.model.n_layer = 3
    config.seed = 1
    assert default_config().seed != 1
    check(default_config())


def test_every_key_allows_its_default_and_says_why_it_is_there():
    flat = flatten(default_config())
    assert flat == {name: key.value for name, key in KEYS.items()}
    assert sum(len(group.keys) for group in GROUPS) == len(KEYS)
    for name, key in KEYS.items():
        assert key.allows(key.value) and key.reason, name
        assert not (key.choices and isinstance(key.value, int | float)), name
    assert all(math.isfinite(low) and math.isfinite(high) for _, low, high in RANGES)  # else a loop may have no end


def test_what_earlier_versions_had_is_named_as_it_is_now():
    assert set(moved.KEYS.values()) | moved.VALUES.keys() <= KEYS.keys() and not moved.KEYS.keys() & KEYS.keys()
    for key, values in moved.VALUES.items():
        for old, new in values.items():
            assert new in CHOICES[key]
            (found,) = problems(changed(**{key: old, "init_from": "some/model", "lora.rank": 8}))
            assert found.startswith(f"{key}='{old}': it must be ") and found.endswith(f"; {old!r} is now {new!r}")


@pytest.mark.parametrize("key", CHOICES)
def test_a_wrong_choice_is_named_with_all_right_ones(key):
    config = default_config()
    config.update_from_flattened_dict({key: CHOICES[key][-1] + "x"})
    (found,) = problems(config)
    assert found.startswith(f"{key}='{CHOICES[key][-1]}x': it must be ")
    assert all(repr(choice) in found for choice in CHOICES[key])
    assert difflib.get_close_matches(CHOICES[key][-1] + "x", CHOICES[key]) == [] or "Did you mean" in found


@pytest.mark.parametrize(("key", "lowest", "highest"), RANGES)
def test_a_number_out_of_range_is_named_with_the_range(key, lowest, highest):
    kind = type(flatten(default_config())[key])
    for value in (lowest - 1, 2 * highest + 1, 2**63 - 1, *([math.nan, math.inf, -math.inf] * (kind is float))):
        config = default_config()
        config.update_from_flattened_dict({key: kind(value)})
        assert problems(config)[0] == f"{key}={kind(value)!r}: it must be {range_text(lowest, highest)}"


def test_a_value_of_another_type_is_refused_and_nothing_is_computed_from_it():
    """A config.json may hold what the command line never lets through; ConfigDict itself lets null through."""
    for name in KEYS:
        config = default_config()
        with config.unlocked(), config.ignore_type():
            config.update_from_flattened_dict({name: None})
        assert problems(config)[0].startswith(f"{name}=None: it must be "), name
    assert problems(changed(out_dir="a\0b")) == ["out_dir='a\\x00b': it must be a text without NUL bytes"]


# Impossible configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__n_heads": 5}, "model.n_heads=5 does not divide model.d_model=384: .* set model.n_heads=(4|6),"),
        ({"model__d_model": 6}, "a head is 1 wide: rope rotates pairs, so it must be even; set model.d_head"),
        ({"model__d_head": 7}, "a head is 7 wide"),
        ({"model__n_kv_heads": 4}, "model.n_kv_heads=4 does not divide model.n_heads=6"),
        (
            {"execution__micro_batch_size": 5},
            "micro_batch_size=5 does not divide .*size=32: .* execution.micro_batch_size=4",
        ),
        (
            {"execution__micro_batch_size": 64},
            "micro_batch_size=64 does not divide .* set execution.micro_batch_size=32",
        ),
        ({"optimizer__warmup_steps": 1000}, "warmup_steps=1000 is not below .* set optimizer.warmup_steps=100"),
        (
            {"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.95},
            "decay_fraction=0.95 of 1000 steps begins before the 100 steps of warmup end; set at most 0.9,",
        ),
        (
            {"optimizer__kind": "muon", "precision__params": "fp16"},
            "kind='muon' with precision.params='fp16': .* set precision.params='fp32'",
        ),
        (
            {"optimizer__budget_hours": 2.0},
            "budget_hours=2 with optimizer.total_steps=1000: .* optimizer.total_steps=auto",
        ),
        (
            {"optimizer__total_steps": 0},
            "total_steps=auto .* without optimizer.budget_hours and .*budget_epochs: .* optimizer.budget_hours=2",
        ),
        ({"optimizer__min_learning_rate": 1.0}, "min_learning_rate=1 is above optimizer.learning_rate=0.001"),
        ({"tokenizer__vocab_size": 256}, "tokenizer.vocab_size=256: bpe needs 256 bytes .* set 257 or more"),
        ({"tokenizer__kind": "hf"}, "tokenizer.pretrained='': .* set tokenizer.pretrained='gpt2'"),
        (
            {"model__vocab_size": 4095},
            "model.vocab_size=4095 is below tokenizer.vocab_size=4096: .* set model.vocab_size=0",
        ),
        (
            {"model__rope_scaling__kind": "yarn"},
            "original_context_length=0: kind='yarn' needs the tokens before it was stretched",
        ),
        (
            {
                "model__rope_scaling__kind": "llama3",
                "model__rope_scaling__original_context_length": 9,
                "model__rope_scaling__low_freq_factor": 4.0,
            },
            "low_freq_factor=4 is not below model.rope_scaling.high_freq_factor=4",
        ),
        (
            {
                "model__rope_scaling__kind": "yarn",
                "model__rope_scaling__original_context_length": 9,
                "model__rope_theta": 1.0,
            },
            "the logarithm of model.rope_theta=1: both must be above 0 and that above 1",
        ),
        ({"sample__temperature": 1e-7}, "sample.temperature=1e-07: fp32 would round it to 0"),
        ({"data__text_glob": " "}, "data.text_glob='': name the text"),
        ({"out_dir": ""}, "out_dir='': .* set out_dir='runs/NAME'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_each_impossible_config_says_what_to_do(changes, message):
    (found,) = problems(changed(**changes))
    assert re.search(message, found), found
    with pytest.raises(UserError, match="^the config has this problem:\n  - "):
        check(changed(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__n_heads": 5, "model__d_head": 64},
        {"model__d_model": 6, "model__position": "learned"},
        {"model__n_kv_heads": 3},
        {"tokenizer__kind": "char", "tokenizer__vocab_size": 0},
        {"tokenizer__kind": "hf", "tokenizer__pretrained": "gpt2", "model__vocab_size": 5},  # known when it is loaded
        {"model__vocab_size": 4096},
        {"optimizer__warmup_steps": 0, "optimizer__total_steps": 1},
        {"optimizer__clip_norm": 0.0, "execution.loss_chunk_tokens": 0, "sample__num_samples": 0},
    ],
    ids=lambda value: " ".join(value),
)
def test_what_looks_odd_and_is_right(changes):
    assert problems(changed(**changes)) == []


def test_a_context_longer_than_the_data():
    config = changed(model__context_length=1000)
    assert problems(config, text_bytes=1001) == [] == problems(config)
    (found,) = problems(config, text_bytes=1000)
    assert found.startswith("model.context_length=1000 is longer than the data: 1,000 bytes of text in all;")
    assert problems(changed(model__context_length=1000, data__format="chat"), text_bytes=1000) == []


def test_sequence_length_takes_the_place_of_the_context():
    config = changed(model__context_length=1000, batch__sequence_length=100)
    assert problems(config, text_bytes=101) == []
    (found,) = problems(config, text_bytes=100)
    assert found.startswith("batch.sequence_length=100 is longer than the data")
    config.batch.sequence_length = 1001
    (found,) = problems(config)
    assert found.startswith("batch.sequence_length=1001 is above model.context_length=1000")
    config.init_from = "some/model"  # whose context is not known yet
    assert problems(config) == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"precision__compute": "bfloat16"}, r"precision.compute='bfloat16': .*\. Did you mean bf16\?"),
        ({"lora__rank": 8}, "lora.rank=8 without init_from"),
        ({"init_from": "scratch"}, "init_from='scratch': a run begins from random parameters where init_from is not"),
        ({"init_from": "resume"}, "init_from='resume': a run goes on by itself where out_dir holds its checkpoints"),
        ({"lora__targets": "q_proj,v_proj"}, r"lora.targets: 'q_proj' is no layer; they are .* Did you mean qkv\?"),
        (
            {"lora__rank": 8, "init_from": "some/model", "optimizer__kind": "muon"},
            "optimizer.kind='muon' with lora.rank=8: .* set optimizer.kind='adamw'",
        ),
        ({"execution__parallel": "tensor", "init_from": "some/model"}, "execution.parallel='tensor' without lora"),
        ({"lora__targets": "qkv,gate_upp"}, "lora.targets: 'gate_upp' is no layer; .*Did you mean gate_up"),
        ({"lora__targets": ""}, "lora.targets: '' is no layer"),
    ],
)
def test_fine_tuning_that_cannot_be(changes, part):
    (found,) = problems(changed(**changes))
    assert re.match(part, found), found
    assert (
        problems(changed(execution__parallel="tensor", init_from="some/model", lora__rank=8, lora__targets="qkv, proj"))
        == []
    )


def test_all_problems_are_reported_at_once():
    config = changed(model__n_heads=5, execution__micro_batch_size=5, model__context_length=100)
    with pytest.raises(UserError, match="these 3 problems") as error:
        check(config, text_bytes=10)
    for part in ("n_heads=5 does not divide", "micro_batch_size=5 does not divide", "longer than the data: 10 bytes"):
        assert part in str(error.value)
    # A key that is wrong by itself is reported once, and hides nothing of the others.
    config.update_from_flattened_dict({"model.d_model": 0, "execution.remat": "all", "optimizer.learning_rate": 0.0})
    config.optimizer.warmup_steps = 5000
    with pytest.raises(UserError, match="these 6 problems") as error:
        check(config, text_bytes=10)
    for part in (
        "model.d_model=0: it must be 1 to 131,072",
        "execution.remat='all'",
        "learning_rate=0.0: it must be 1e-12 to 10",
    ):
        assert part in str(error.value)
    assert "does not divide model.d_model" not in str(error.value) and "warmup_steps=5000" in str(error.value)


# Rules that hold for the whole source


def code(path: Path) -> list[str]:
    """Return the tokens of a source file but for its comments and strings."""
    found = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return [token.string for token in found if token.type not in (tokenize.COMMENT, tokenize.STRING)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rules_of_the_house(path):
    words, tree = code(path), ast.parse(path.read_text(encoding="utf-8"))
    if path != ROOT / "jgpt" / "parallel" / "replicate.py":
        assert not [word for word in words if word == "pmap"], "only parallel/replicate.py may say pmap"
    banned = {"torch", "tensorflow", "clu", "chex", "pickle"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert banned.isdisjoint(name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in banned
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            owner = ast.unparse(node.func.value)
            assert "config" not in owner and owner.split(".")[0] not in ("c", "m", "o", "t", "b"), (
                f"{owner}.get: every key is in default_config()"
            )
