"""Conversations with a small random model: what it is shown, what is kept of it, and the command around that."""

import contextlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_chat import CHATML, parts

from jgpt.cli.terminal import read_message
from jgpt.data.chat_template import render
from jgpt.errors import UserError
from jgpt.exchange.write_model import export_model
from jgpt.inference.chat import Answer, Chat, talk
from jgpt.inference.chat_prompt import ChatPrompts
from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling

GREEDY = Sampling(0)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "small"
    model, params, tokenizer = parts()
    ids = dict(vocab_size=tokenizer.vocab_size, stop_ids=(tokenizer.eot_id,))
    export_model(out, params, model.config, tokenizer, **ids, dtype="fp32")
    return out


def make(**how: Any) -> Chat:
    model, params, tokenizer = parts()
    defaults = dict(sampling=GREEDY, max_new_tokens=8, context_length=0, seed=0)
    given = dict(template=CHATML, stop_ids=[], system=[])
    given |= {name: how.pop(name) for name in given if name in how}
    return Chat(model, {"params": params}, ChatPrompts(tokenizer, **given), **{**defaults, **how})


def answer_to(messages: list[dict[str, str]], new: int = 8) -> str:
    model, params, tokenizer = parts()
    ids = tokenizer.encode(render(CHATML, tokenizer.settings, messages, True)).tolist()
    end = tokenizer.backend.token_to_id("<|im_end|>")
    ask = dict(sampling=GREEDY, max_new_tokens=new, stop_ids=[end], n_ids=tokenizer.vocab_size, seed=0)
    return tokenizer.decode(generate(model, {"params": params}, [ids], **ask)[0])


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_the_model_is_shown_all_that_was_said():
    chat, pieces = make(system=[said("system", "one two")]), []
    shown = [said("system", "one two")]
    for question in ("one", "two", "one two"):
        shown.append(said("user", question))
        answer = chat.ask(question, pieces.append)
        assert answer.text == answer_to(shown) == "".join(pieces)
        assert len(pieces) > 2 and answer.n_tokens == 8 and "cut at 8" in answer.summary()
        shown.append(said("assistant", answer.text.strip()))
        pieces.clear()
    assert chat.prompts.system + chat.turns == shown
    chat.reset()
    assert chat.ask("one", pieces.append).text == answer_to(shown[:2])


def test_an_answer_ends_with_its_turn():
    """Whatever the model says its texts end with, the template's own end of turn is known as well."""
    tokenizer = parts()[2]
    assert make(stop_ids=[7]).prompts.stop_ids == (7, tokenizer.backend.token_to_id("<|im_end|>"))
    assert make(template="{% for m in messages %}{{ m.content }} {% endfor %}").prompts.stop_ids == ()
    endless = answer_to([said("user", "one")])
    stop = tokenizer.encode(endless).tolist()[3]
    answer = make(stop_ids=[stop]).ask("one", lambda _: None)
    assert endless.startswith(answer.text) and answer.n_tokens <= 3 and "cut" not in answer.summary()


def test_the_oldest_turns_make_room():
    chat = make(system=[said("system", "one")], context_length=64)
    answers = [chat.ask("two", lambda _: None) for _ in range(4)]
    assert "without the first" not in answers[0].summary() and "without the first" in answers[-1].summary()
    shown = [*chat.prompts.system, *chat.turns[chat.forgotten : -2], said("user", "two")]
    assert chat.forgotten in (2, 4) and answers[-1].text == answer_to(shown)
    assert len(chat.turns) == 8  # they are kept for /save
    with pytest.raises(UserError, match="too long.*Allowed: 56"):
        chat.ask("one " * 99, lambda _: None)
    assert len(chat.turns) == 8


def test_interrupting_keeps_what_was_said():
    chat, pieces = make(max_new_tokens=60), []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    answer = chat.ask("one", write)
    assert "stopped" in answer.summary() and answer.n_tokens == 9
    assert answer_to([said("user", "one")], 60).startswith(answer.text)
    assert chat.turns[1] == said("assistant", answer.text.strip())


def test_interrupting_at_the_prompt_is_answered():
    def read() -> str:
        event = events.pop()
        if isinstance(event, str):
            return event
        raise event

    events, heard = [EOFError(), "/help", KeyboardInterrupt()], []
    talk(make(), read, heard.append, heard.append)
    assert "Ctrl-D" in heard[0] and "/save FILE" in heard[1]


def test_only_known_commands_are_commands():
    questions = ["/no_think one", "/etc/hosts is what?", "/quit smoking", "/reset\none", "/save a\nb"]
    messages, heard, chat = iter([*questions, "/save", "/quit", "never"]), [], make(max_new_tokens=1, context_length=0)
    asked = []
    chat.ask = lambda message, write: asked.append(message) or Answer()
    talk(chat, lambda: next(messages), lambda _: None, heard.append)
    assert asked == questions and heard[-1] == "/save needs the name of a file: /save FILE"


def test_a_message_may_have_several_lines(monkeypatch):
    text = '\ufeffone\n"""two\n\n  three"""\n"""four"""\n"""\nfive\n""" \n"""six\nseven'
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    heard = [read_message() for _ in range(5)]
    assert heard == ["one", "two\n\n  three", "four", "\nfive\n", "six\nseven"]
    with pytest.raises(EOFError):
        read_message()


def test_what_is_pasted_into_a_terminal_is_one_message():
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit has no bracketed paste")
    program = "from jgpt.cli.terminal import read_message; print(ascii([read_message(), read_message()]))"
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    with subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT, **streams) as process:
        os.close(terminal)
        for keys in (b"\x1b[200~one\rtwo\rthree\x1b[201~\r", b"four\r"):
            shown = b""
            while not shown.endswith(b"> "):
                shown += os.read(main, 1)
            os.write(main, keys)
        with contextlib.suppress(OSError):  # Linux ends a terminal so
            while piece := os.read(main, 1000):
                shown += piece
    os.close(main)
    assert process.returncode == 0 and b"['one\\ntwo\\nthree', 'four']" in shown


def test_the_command_holds_a_conversation(command, directory, tmp_path):
    lines = ["one", "", "two", f"/save {tmp_path}/a.jsonl", "/save", "/reset", "one", f"/save {tmp_path}/a.jsonl"]
    lines += [f"/save {tmp_path}/none/a.jsonl", f"/save {tmp_path}/b.jsonl", "/quit", "two"]
    (tmp_path / "b.jsonl").write_text("{}")  # without a newline at its end
    flags = [f"--model={directory}", "--temperature=0", "--max_new_tokens=8", "--system=one two"]
    result = command("chat", *flags, stdin="\n".join(lines))
    system, one, two = said("system", "one two"), said("user", "one"), said("user", "two")
    first = answer_to([system, one])
    second = answer_to([system, one, said("assistant", first.strip()), two])
    assert (result.code, result.out) == (0, f"{first}\n{second}\n{first}\n"), result.err
    assert result.err.count("8 tokens, ") == 3 and "/save needs" in result.err and "cannot be written" in result.err
    saved = [json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    first, second = said("assistant", first.strip()), said("assistant", second.strip())
    assert saved == [[system, one, first, two, second], [system, one, first]]
    assert (tmp_path / "b.jsonl").read_text().splitlines()[0] == "{}"


def test_one_question(command, directory):
    ask = ["chat", f"--model={directory}", "--prompt=one", "--max_new_tokens=8"]
    result = command(*ask, "--temperature=0", stdin="two\n")
    assert (result.code, result.out) == (0, answer_to([said("user", "one")]) + "\n"), result.err
    assert "a second" in result.err and "/help" not in result.err
    texts = [command(*ask, "--temperature=2", f"--seed={seed}").out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_model_says_how_to_draw(command, directory, tmp_path):
    shutil.copytree(directory, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 5.0, "top_k": 1}))
    ask = ["chat", f"--model={tmp_path}/model", "--prompt=one", "--max_new_tokens=8"]
    greedy = answer_to([said("user", "one")]) + "\n"
    assert command(*ask).out == greedy != command(*ask, "--top_k=0").out


def test_a_run_with_a_template_from_a_file(command, trained, tmp_path):
    """A model of characters, which has no template of its own."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}.{% endfor %}")
    flags = [f"--run_dir={trained}", f"--chat_template={tmp_path}/t.jinja", "--prompt=7", "--max_new_tokens=3"]
    result = command("chat", *flags)
    assert result.code == 0 and "context 16 tokens" in result.err, result.err
    assert len(result.out) > 1 and "not in the model's vocabulary" not in result.err
    result = command("chat", *flags, "--prompt=7 \u00e9\u00e9")
    assert (
        "2 characters of the conversation are not in the model's vocabulary" in result.err
        and "'\u00e9' (2)" in result.err
    )


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        ([], "", ["no --model was given", "Allowed: "]),
        (["--model={tmp}/none"], "", ["none"]),
        (["--model={run}"], "", ["has no chat template", "--chat_template=FILE", "jgpt.generate"]),
        (["--model={run}", "--chat_template={tmp}/none.jinja"], "", ["none.jinja"]),
        (["--model={run}", "--chat_template={tmp}/bad.jinja"], "", ["template"]),
        (["--model={run}", "--temperature=-1", "--top_p=2"], "", ["temperature=-1", "top_p=2"]),
        (["--model={dir}", "--prompt=" + "one " * 99], "", ["question is too long"]),
        (["--model={dir}"], b"caf\xe9\n", ["not UTF-8"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input(command, trained, directory, tmp_path, arguments, stdin, parts):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    given = [a.format(run=trained, tmp=tmp_path, dir=directory) for a in arguments]
    result = command("chat", *given, stdin=stdin)
    assert (result.code, result.out) == (2, ""), result.err
    assert "error: " in result.err and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err
