"""The command that measures a model: the run's own number, and that of any other text."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import pytest
from conftest import TEXT
from small_chat import CHATML

import jgpt
from jgpt.data.blocks import blocks
from jgpt.data.token_files import open_token_data
from jgpt.loading.load import load_model
from jgpt.loading.measure import evaluate_loaded
from jgpt.run_dir.manifest import read_meta
from jgpt.run_dir.metrics_file import read_metrics


def refused(result, *parts: str) -> None:
    assert (result.code, result.out) == (2, ""), result.err
    assert "error: " in result.err and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


def numbers(result) -> dict[str, float]:
    assert result.code == 0 and result.err.startswith("memory: "), result.err
    rows = re.findall(r"^(\w[\w ]*?)  +([\d.,]+)", result.out, re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in rows}


def test_loss_of_the_validation_split_is_that_of_training(trained):
    with jax.numpy_rank_promotion("allow"):
        loaded = load_model(str(trained))
        loss, n_tokens = evaluate_loaded(loaded, blocks([open_token_data(trained / "tokens").val], 16), rows=3)
    assert n_tokens == 128
    assert loss == pytest.approx(read_meta(trained / "checkpoints", 4)["val_loss"], rel=1e-6)


def test_the_command_prints_it_and_measures_other_text_the_same(command, trained, tmp_path):
    found = numbers(command("evaluate", f"--run_dir={trained}"))
    assert found["tokens"] == 128
    assert found["loss"] == pytest.approx(read_meta(trained / "checkpoints", 4)["val_loss"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-3)
    logged = read_metrics(trained / "metrics.jsonl")[-1]["bits_per_byte"]
    assert found["bits per byte"] == pytest.approx(logged, abs=1e-4)
    (tmp_path / "val.txt").write_text(TEXT[-128:])
    other = numbers(command("evaluate", f"--run_dir={trained}", f"--text_glob={tmp_path}/*.txt"))
    assert other == found


def test_text_that_the_model_has_never_seen_is_named_as_such(command, trained, tmp_path):
    (tmp_path / "val.txt").write_text("Съешь ещё этих мягких французских булок. " * 9, encoding="utf-8")
    result = command("evaluate", f"--run_dir={trained}", f"--text_glob={tmp_path}/*.txt")
    assert numbers(result)["loss"] > math.log(50)
    assert "306 characters of the text are not in the model's vocabulary" in result.err and ", and " in result.err
    assert "which guessing among all tokens would give" in result.err and "script" in result.err


def test_an_older_checkpoint_and_a_run_that_was_moved(command, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = numbers(command("evaluate", "--run_dir=moved", "--step=2"))
    assert found["loss"] == pytest.approx(read_meta(trained / "checkpoints", 2)["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--run_dir={tmp}/nothing"], ["there is no directory", "/nothing"]),
        (["--run_dir={run}", "--step=3"], ["step 3 is not among the checkpoints", "Allowed: 2, 4"]),
        (
            ["--run_dir={run}", "--text_glob={tmp}/*.md"],
            ["matches no file", "data.text_glob is --text_glob"],
        ),
        (["--run_dir={run}", "--text_glob={tmp}/empty.txt"], ["the text is too short. At least 2 tokens are needed"]),
        (
            ["--run_dir={run}", "--text_glob={tmp}/bad.txt"],
            ["byte offset 3", "encoding_errors is --encoding_errors"],
        ),
        (["--run_dir={run}", "--text_glob={tmp}/a.jsonl"], ["line 1", "data.text_field is --text_field"]),
    ],
)
def test_bad_input(command, trained, tmp_path, arguments, parts):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "a.jsonl").write_text('{"body": "b"}')
    refused(command("evaluate", *(a.format(run=trained, tmp=tmp_path) for a in arguments)), *parts)


def test_damage_is_named(command, own_run):
    array = max((own_run / "checkpoints" / "4" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(array.read_bytes())
    data[len(data) // 2] ^= 1
    array.write_bytes(data)
    refused(command("evaluate", f"--run_dir={own_run}"), "checkpoint 4", "is damaged", "--step")
    (own_run / "tokenizer" / "tokenizer.json").unlink()
    refused(command("evaluate", f"--run_dir={own_run}"), str(own_run / "tokenizer"))


def test_tokens_of_another_tokenizer_are_not_measured(command, own_run, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("another alphabet? yes! " * 99)
    shutil.rmtree(own_run / "tokens")
    assert command("prepare", *tiny).code == 0
    refused(command("evaluate", f"--run_dir={own_run}"), "tokens of another tokenizer", "--text_glob=GLOB")


def test_bytes_that_are_not_utf8_can_be_replaced(command, trained, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    arguments = [f"--run_dir={trained}", f"--text_glob={tmp_path}/bad.txt", "--encoding_errors=replace_any"]
    assert numbers(command("evaluate", *arguments))["tokens"] == 12
    assert numbers(command("evaluate", *arguments[:2], "--encoding=cp1252"))["tokens"] == 12
    refused(
        command("evaluate", *arguments[:2], "--encoding=cp125"),
        "--encoding='cp125': it must be another value, such as utf-8",
    )


SHAREGPT, ALPACA = "ShareGPT", "Alpaca"


def in_layout(layout: str, question: str, answer: str) -> dict:
    return {
        "messages": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
        SHAREGPT: {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        ALPACA: {"instruction": question[:5], "input": question[6:], "output": answer},
        "prompt/completion": {"prompt": question, "completion": answer},
    }[layout]


@pytest.fixture(scope="module")
def chat_run(command, tmp_path_factory):
    """Train a small model on conversations in all layouts; return its folder, with those held out in `held_out`."""
    root = tmp_path_factory.mktemp("chat")
    layouts = ["messages", SHAREGPT, ALPACA, "prompt/completion"]
    lines = [in_layout(layouts[n // 4 % 4], f"count\nto {n}, please", f"{n} and {n + 1}") for n in range(24)]
    files = {"chats": lines, "held_out": lines[1::4]}  # the second of each four conversations
    for name, kept in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (root / "t.jinja").write_text(CHATML)
    config = {
        "out_dir": root / "run", "data.text_glob": root / "chats.jsonl", "data.format": "chat",
        "data.val_fraction": 0.25, "tokenizer.kind": "bpe", "tokenizer.vocab_size": 300,
        "tokenizer.chat_template": root / "t.jinja", "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16,
        "model.context_length": 128, "optimizer.total_steps": 4, "optimizer.warmup_steps": 1,
        "batch.global_batch_size": 4, "execution.micro_batch_size": 2, "eval.every_steps": 4, "sample.num_samples": 0,
    }  # fmt: skip
    base = Path(__file__).parents[1] / "defaults.py"
    done = command("train", f"--config={base}", *(f"--config.{key}={value}" for key, value in config.items()))
    assert done.code == 0, done.err
    assert "Alpaca 4 (the user says instruction, a new line, input" in done.out
    return root


def test_the_answers_of_conversations_are_measured_as_training_measures_them(command, chat_run):
    logged = read_metrics(chat_run / "run" / "metrics.jsonl")[-1]
    own = command("evaluate", f"--model={chat_run}/run")
    files = command("evaluate", f"--model={chat_run}/run", f"--text_glob={chat_run}/held_out.jsonl")
    named = command("evaluate", f"--model={chat_run}/run", "--format=chat", f"--text_glob={chat_run}/held_out.jsonl")
    for result in (own, files, named):
        assert result.code == 0 and "bytes of answers\n" in result.out, result.err
        assert f"loss              {logged['val_loss']:.4f} " in result.out
        assert f"bits per byte     {logged['bits_per_byte']:.4f}\n" in result.out
    assert (
        "layout of the lines: messages 2, ShareGPT 2, Alpaca 1 (the user" in named.err
        and own.out.splitlines()[1:] == named.out.splitlines()[1:]
    )
    text = command("evaluate", f"--model={chat_run}/run", "--format=text", f"--text_glob={chat_run}/t.jinja")
    assert text.code == 0 and f"of {len(CHATML)} bytes of text\n" in text.out


def test_the_api_measures_conversations_too(chat_run):
    model = jgpt.load(chat_run / "run")
    wanted = read_metrics(chat_run / "run" / "metrics.jsonl")[-1]["val_loss"]
    lines = [json.loads(line) for line in (chat_run / "held_out.jsonl").read_text().splitlines()]
    found = model.evaluate(lines)
    assert found.loss == pytest.approx(wanted, rel=1e-5) and found.is_chat
    one = in_layout("messages", "count\nto 9", "9 and 10")["messages"]
    assert model.evaluate(one) == model.evaluate([one]) == model.evaluate([{"messages": one}])
    for wrong, part in (
        ([], "no answer of the assistant to measure: 0"),
        ([one[:1]], "no answer of the assistant to measure: 1"),
        ([{"text": "x"}], "conversation 1 is no conversation: it has the fields"),
        (["x"], "with texts in it. Allowed: one text, or conversations"),
        (5, "given was '5'"),
    ):
        with pytest.raises(jgpt.UserError, match=part):
            model.evaluate(wrong)


def test_what_is_refused_of_conversations(command, chat_run, trained, tmp_path):
    chat, files = f"--model={chat_run}/run", f"--text_glob={chat_run}/held_out.jsonl"
    refused(
        command("evaluate", f"--model={trained}", "--format=chat", files), "no chat template", "--chat_template=FILE"
    )
    refused(command("evaluate", f"--model={trained}", "--format=chat"), "is of format text. Leave --format out")
    refused(
        command("evaluate", chat, f"--text_glob={chat_run}/*.jinja"), ".jsonl or .ndjson", "data.format is --format"
    )
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    refused(command("evaluate", chat, f"--text_glob={tmp_path}/*"), "a.jsonl, line 1 is no conversation")
    given = command("evaluate", f"--model={trained}", "--format=chat", files, f"--chat_template={chat_run}/t.jinja")
    assert given.code == 2 and "has an answer within its first 16 tokens" in given.err, given.err
