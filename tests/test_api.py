"""The Python API: what a notebook calls, what it returns, and what it shows of a mistake."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, own_process_state

import jgpt
from jgpt.config.check import problems
from jgpt.config.files import find_config
from jgpt.config.named import changed, config_named, plain
from jgpt.loading import load as load_module
from jgpt.run_dir.metrics_file import read_metrics
from jgpt.step.eval_step import make_eval_step

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def as_a_process_of_its_own():
    with own_process_state():
        yield


@pytest.fixture(scope="module")
def model(trained):
    with own_process_state():
        return jgpt.load(trained)


def test_the_package_is_imported_without_jax():
    program = """
import sys, jgpt
assert not {"jax", "numpy", "ml_collections"} & sys.modules.keys()
assert {"load", "train", "Model", "UserError"} <= set(dir(jgpt)) and jgpt.UserError is not None
assert not {"jax", "numpy", "ml_collections"} & sys.modules.keys()
try:
    jgpt.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_train_is_the_function_also_after_the_command_was_imported():
    import jgpt.train  # noqa: F401 (the command's module)
    from jgpt import train
    from jgpt.api import train as function

    assert jgpt.train is train is function and sys.modules["jgpt.train"].__doc__.startswith("Train a GPT")


def test_a_text_goes_on_as_the_command_writes_it(command, trained, model):
    written = command("generate", f"--model={trained}", "--prompt=7 times ", "--max_new_tokens=12").out
    text = model.generate("7 times ", max_new_tokens=12)
    assert f"7 times {text}\n" == written and 1 < len(text) <= 12
    assert "".join(model.stream("7 times ", max_new_tokens=12)) == text
    assert model.generate("7 times ", max_new_tokens=12, temperature=0) != text
    assert model.generate("7 times ", max_new_tokens=12, seed=8) != text
    assert len(model.generate(max_new_tokens=40, seed=3)) > 16  # past the end of the context of 16, without a text


def test_an_answer_is_a_text_after_the_template(trained, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    model = jgpt.load(str(trained), chat_template=tmp_path / "t.jinja")
    messages = [{"role": "user", "content": "7 times"}]
    answer = model.chat(messages, max_new_tokens=5, temperature=0)
    assert answer == model.generate("7 times.", max_new_tokens=5, temperature=0) != ""
    assert answer == model.chat("7 times", max_new_tokens=5, temperature=0)
    assert answer == "".join(model.stream(messages, max_new_tokens=5, temperature=0))
    assert len(model.chat("7 times")) <= 8  # what the context of 16 leaves
    for wrong, part in (
        ("7 times 7 is 49", "has 16 tokens. Allowed: 15"),
        ([], "Allowed: a list of one message"),
        (["7"], "message 1 is '7'. Allowed: an object"),
        ([{"role": "me", "content": "7"}], "has the role 'me'. Allowed: system, user"),
        ([{"role": "user", "content": 7}], "has the content '7'. Allowed: text"),
    ):
        with pytest.raises(jgpt.UserError, match=part):
            model.chat(wrong)


def test_a_text_is_measured_as_a_file_is(command, trained, model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[-128:])
    found, printed = model.evaluate(TEXT[-128:]), command("evaluate", f"--model={trained}", f"--text_glob={tmp_path}/*")
    assert f"loss              {found.loss:.4f} " in printed.out
    assert f"bits per byte     {found.bits_per_byte:.4f}\n" in printed.out
    assert model.evaluate().loss == pytest.approx(read_metrics(trained / "metrics.jsonl")[-1]["val_loss"], rel=1e-5)
    with pytest.raises(jgpt.UserError, match="At least 2 tokens"):
        model.evaluate("")
    with contextlib.chdir(trained.parent):
        again = jgpt.load("run")
    assert again.evaluate().loss == model.evaluate().loss  # wherever the program is now


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"prompt": None}, "the prompt=None, of the type NoneType. Allowed: a text"),
        ({"prompt": ["a", "b"]}, "the prompt=.'a', 'b'., of the type list"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5', of the type str. Allowed: a whole number from 0"),
        ({"max_new_tokens": 5.5}, "max_new_tokens=5.5, of the type float"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1. Allowed: a whole number from 0"),
        ({"max_new_tokens": 10**20}, "max_new_tokens=1000.*Allowed: a whole number from 0 to 16,777,216"),
        ({"temperature": "0.5"}, "temperature='0.5', of the type str. Allowed: a number"),
        ({"top_k": 2.5}, "top_k=2.5, of the type float. Allowed: a whole number"),
        ({"top_p": [0.5]}, "top_p=.0.5., of the type list"),
        ({"seed": "a"}, "seed='a', of the type str. Allowed: a whole number, or None"),
        ({"stop": 5}, "stop='5'. Allowed: a text, or several"),
        ({"stop": ["a", ""]}, "none of them empty"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_named(model, arguments, part):
    """Without this, numpy or JAX fail inside, or a value is cut without a word."""
    given = {"prompt": "7"} | arguments
    with pytest.raises(jgpt.UserError, match=part):
        model.generate(**given)
    with pytest.raises(jgpt.UserError):
        list(model.stream(**given))


def test_values_of_other_libraries_are_taken(model):
    text = model.generate("7", max_new_tokens=5, top_k=3, seed=3)
    numpy = dict(max_new_tokens=np.int64(5), top_k=np.int32(3), temperature=np.float32(0.8), seed=np.int64(3))
    assert model.generate(np.str_("7"), **numpy, stop=None) == text
    assert model.generate("7", max_new_tokens=5, top_k=3, seed=3 - 2**32) == text  # as the server counts seeds
    assert len({model.generate("7", max_new_tokens=8, temperature=9.0, top_k=0, seed=None) for _ in range(9)}) > 1


def test_what_the_vocabulary_lacks_is_named(model, caplog):
    model.generate("7 \N{SNOWMAN}", max_new_tokens=1)
    assert "1 character of the prompt is not in the model's vocabulary" in caplog.text


def test_what_is_measured_is_a_text_and_not_the_name_of_one(model, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    with pytest.raises(jgpt.UserError, match="with texts in it. Allowed: one text, or conversations"):
        model.evaluate([TEXT, TEXT])
    for wrong in (path, str(path), TEXT.encode(), 7):
        with pytest.raises(jgpt.UserError, match="Allowed: the text itself, as .*--text_glob=NAME"):
            model.evaluate(wrong)
    with pytest.raises(jgpt.UserError, match="sequence_length=-1. Allowed: a whole number"):
        model.evaluate(TEXT, sequence_length=-1)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"name": None}, "the model is None. Allowed: a run directory"),
        ({"name": ""}, "the model is ''"),
        ({"step": "4"}, "step='4', of the type str"),
        ({"devices": 3}, "devices=3, and this machine has 2"),
        ({"compute": "float16"}, "compute='float16'.*Allowed: .*fp16"),
        ({"context_length": -1}, "context_length=-1. Allowed: a whole number from 0"),
        ({"rows": 0}, "rows=0. Allowed: a whole number from 1"),
    ],
    ids=str,
)
def test_a_model_is_loaded_with_what_is_allowed(trained, arguments, part):
    with pytest.raises(jgpt.UserError, match=part):
        jgpt.load(**{"name": trained} | arguments)


def test_measuring_again_compiles_nothing(trained, monkeypatch):
    steps = []
    monkeypatch.setattr(load_module, "make_eval_step", lambda *given: steps.append(make_eval_step(*given)) or steps[-1])
    fresh = jgpt.load(str(trained))
    assert fresh.evaluate(TEXT[-64:]) == fresh.evaluate(TEXT[-64:]) and len(steps) == 1


@pytest.fixture
def small(tmp_path) -> dict[str, object]:
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "out_dir": str(tmp_path / "run"), "log_every_steps": 1, "data.text_glob": str(tmp_path / "text.txt"),
        "tokenizer.kind": "char", "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16,
        "model.context_length": 16, "optimizer.total_steps": 4, "optimizer.warmup_steps": 1,
        "batch.global_batch_size": 4, "execution.micro_batch_size": 2, "eval.every_steps": 2, "sample.num_samples": 0,
    }  # fmt: skip


def test_training_returns_how_it_ended_and_calls_back_with_each_record(small, tmp_path):
    seen: list[dict] = []
    result = jgpt.train("base", small, on_record=seen.append)
    assert seen == read_metrics(tmp_path / "run" / "metrics.jsonl") and [r["step"] for r in seen] == [0, 1, 2, 3, 4]
    losses = {r["step"]: r["val_loss"] for r in seen if "val_loss" in r}
    assert (result.run_dir, result.step, result.is_finished) == (tmp_path / "run", 4, True)
    assert (result.last_loss, result.last_val_loss) == (seen[-1]["loss"], losses[4])
    assert result.best_val_loss == min(losses.values()) == losses[result.best_val_step]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["resume_command"].startswith("jgpt.train('base', {'out_dir': ")

    config = config_named("base")
    config.update_from_flattened_dict(small)
    longer = jgpt.train(config, {"optimizer.total_steps": 6})
    assert longer.step == 6 and config.optimizer.total_steps == 4  # the given config stays as it is
    assert jgpt.load(longer.run_dir).step == 6


def test_an_error_in_the_callback_ends_the_run(small, tmp_path):
    def refuse(record: dict) -> None:
        if record["step"] == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        jgpt.train("base", small, on_record=refuse)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "enough" in status["reason"]


@pytest.mark.parametrize("how", ["removed", "renamed", "made again"])
def test_a_run_directory_that_is_lost_while_the_run_writes(small, tmp_path, how):
    """Orbax makes what is missing: a checkpoint without its config, or among those of another run, helps nobody."""
    run = tmp_path / "run"

    def lose(record: dict) -> None:
        if record["step"] != 1:
            return
        if how == "renamed":
            run.rename(tmp_path / "other")
        else:
            shutil.rmtree(run)
        if how == "made again":
            run.mkdir()
            (run / "config.json").write_text("{}")
            (run / ".lock").write_text("1 elsewhere\n")

    part = "another process (pid 1 on elsewhere) has made it again" if how == "made again" else "was removed or renamed"
    with pytest.raises(jgpt.UserError, match=re.escape(part)):
        jgpt.train("base", small, on_record=lose)
    assert not run.exists() or {path.name for path in run.iterdir()} <= {"config.json", ".lock"}


@pytest.mark.parametrize(
    ("config", "changes", "parts"),
    [
        ("bsae", {}, ["no config 'bsae'", "base"]),
        ("{own}", {}, ["own.py has no get_config() that returns a config"]),
        ("base", {"epochs": 5, "lr": 1}, ["optimizer.budget_epochs", "Did you mean optimizer.learning_rate?"]),
        ("base", {"optimizer.total_step": 5, "seed": "x"}, ["Did you mean optimizer.total_steps?", "seed='x'"]),
        ("base", {"remat": "block"}, ["config.remat is now config.execution.remat"]),
        ("base", {"model.d_model": -1}, ["model.d_model"]),
        ("base", {"optimizer.learning_rate": 10**400}, ["optimizer.learning_rate=1000"]),
    ],
)  # fmt: skip
def test_mistakes_in_a_config(config, changes, parts, tmp_path):
    (tmp_path / "own.py").write_text("x = 1\n")
    with pytest.raises(jgpt.UserError) as error:
        jgpt.train(config.format(own=tmp_path / "own.py"), changes)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (({"out_dir": "runs/mine"},), "the config is of the type dict.*Settings come second"),
        ((None,), "the config is of the type NoneType"),
        (("base", ["optimizer.total_steps=5"]), "the changes are .*, of the type list. Allowed: a dict"),
        (("base", {}, "print"), "on_record='print'. Allowed: a function"),
    ],
)
def test_training_takes_a_config_then_changes(arguments, part):
    with pytest.raises(jgpt.UserError, match=part):
        jgpt.train(*arguments[:2], on_record=arguments[2] if len(arguments) > 2 else None)


def test_numbers_of_numpy_are_numbers():
    given = {"optimizer.total_steps": np.int64(9), "optimizer.beta1": np.float32(0.5)}
    o = changed(config_named("base"), given).optimizer
    assert (o.total_steps, type(o.total_steps), o.beta1, type(o.beta1)) == (9, int, 0.5, float)
    assert repr(plain(given | {"out_dir": Path("a")})) == (  # a command that can be typed again
        "{'optimizer.total_steps': 9, 'optimizer.beta1': 0.5, 'out_dir': 'a'}"
    )


def test_every_config_of_ours_is_found_by_its_name():
    path = find_config("quickstart")
    assert path is not None and config_named("quickstart") == config_named(str(path))


def test_a_notebook_shows_a_mistake_in_one_line(tmp_path):
    """IPython itself runs the cell."""
    pytest.importorskip("IPython")
    cell = "import jgpt\njgpt.load('runs/none/such')"
    program = "from IPython.core.interactiveshell import InteractiveShell as Shell\n"
    program += f"Shell.instance(colors='NoColor').run_cell({cell!r})"
    where = dict(cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **where)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("UserError: there is no directory 'runs/none/such'"), done


def test_auto_is_a_number_of_steps():
    config = changed(config_named("quickstart"), {"optimizer.total_steps": "auto", "optimizer.budget_epochs": 3.0})
    assert config.optimizer.total_steps == 0 and problems(config) == []


def test_a_length_that_is_given_replaces_the_configs(caplog):
    caplog.set_level("INFO", "jgpt")
    o = changed(config_named("quickstart"), {"optimizer.budget_epochs": 3.0}).optimizer
    assert (o.total_steps, o.budget_epochs) == (0, 3)
    o = changed(config_named("laptop"), {"optimizer.total_steps": 500}).optimizer
    assert (o.total_steps, o.budget_hours, o.budget_epochs) == (500, 0, 0)
    assert "optimizer.budget_epochs=3 in the place of the config's total_steps=800" in caplog.text
    both = changed(config_named("quickstart"), {"optimizer.budget_epochs": 3.0, "optimizer.total_steps": 900})
    assert "optimizer.budget_epochs=3 with optimizer.total_steps=900" in problems(both)[0]
