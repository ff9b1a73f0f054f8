"""Conversations as words: what is learned, what is refused, and a model that sees each by itself."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jgpt.config.defaults import default_config
from jgpt.data import pieces
from jgpt.data.batches import make_batches
from jgpt.data.chat_lines import read_chat_line
from jgpt.data.chat_template import render
from jgpt.data.conversations import ChatCorpus
from jgpt.data.token_directory import token_directory
from jgpt.data.token_files import TokenData
from jgpt.data.tokenizer import load_tokenizer, train_bpe
from jgpt.data.words import BEGINS, IDS, LEARNED
from jgpt.data.write_tokens import prepare
from jgpt.errors import UserError
from jgpt.model.gpt import GPT
from jgpt.model.parameters import abstract_params
from jgpt.model.shapes import ModelConfig

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def line(*contents: str, roles: tuple[str, ...] = ("user", "assistant") * 9) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


LINES = [line(f"How much is {n} + {n}?", f"It is {2 * n}: ça va 🙂.", "Sure?", "Yes." * (n % 5 + 1)) for n in range(40)]


def make_config(root: Path, lines: list[Any], kind: str = "bpe") -> ConfigDict:
    """Write a .jsonl file and a template, and return a config that reads them."""
    (root / "chat.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    (root / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = default_config()
    config.out_dir = str(root / "run")
    config.data.text_glob, config.data.format = str(root / "chat.jsonl"), "chat"
    config.tokenizer.update({"kind": kind, "vocab_size": 300, "chat_template": str(root / "chat.jinja")})
    return config


def split(words: np.ndarray) -> list[np.ndarray]:
    return np.split(words, np.flatnonzero(words & BEGINS))[1:]


def rendered(data: TokenData, record: dict[str, Any]) -> str:
    return render(TEMPLATE, data.tokenizer.settings, record["messages"], False)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_words_spell_the_conversations_and_what_the_assistant_wrote_is_learned(tmp_path: Path, kind: str) -> None:
    data = prepare(make_config(tmp_path, LINES, kind))
    held_out = [i for i in range(40) if i % 10 == 1]
    for words, indices in ((data.train, [i for i in range(40) if i not in held_out]), (data.val, held_out)):
        assert isinstance(words, np.memmap) and words.dtype == np.uint32
        for part, i in zip(split(words), indices, strict=True):
            assert data.tokenizer.decode(part & IDS) == rendered(data, LINES[i])
            runs = np.split(part, 1 + np.flatnonzero(np.diff(part & LEARNED)))
            learned = [data.tokenizer.decode(run & IDS) for run in runs if run[0] & LEARNED]
            messages = LINES[i]["messages"]
            assert learned == [messages[1]["content"] + "<|endoftext|>\n", messages[3]["content"] + "<|endoftext|>\n"]
            if kind == "bpe":  # as inference encodes the prompt
                prompt = render(TEMPLATE, data.tokenizer.settings, messages[:1], True)
                assert (runs[0] & IDS).tolist() == data.tokenizer.encode(prompt).tolist()


def test_meta_counts_what_is_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "jgpt"):
        data = prepare(make_config(tmp_path, [*LINES, line("nobody answers"), line("hm", roles=("system",))]))
    meta = json.loads((token_directory(make_config(tmp_path, LINES)) / "meta.json").read_text())
    assert meta == data.meta and data.is_chat and meta["format"] == "chat"
    held_out = [record["messages"][i]["content"] for record in LINES[1::10] for i in (1, 3)]
    assert meta["val_bytes"] == sum(len(text.encode()) for text in held_out)
    assert data.val_targets == meta["val_targets"] == np.count_nonzero(data.val & LEARNED)
    assert meta["train_targets"] == np.count_nonzero(data.train & LEARNED)
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(data.train), len(data.val))
    assert (meta["n_documents"], meta["unanswered_conversations"], meta["split"]) == (40, 2, "conversation")
    assert "conversations 40" in caplog.text and "2 conversations are left out: they hold no answer" in caplog.text


def test_all_fields_reach_the_template_and_what_it_does_not_read_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "2+2"}, "?"], "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_calls": None, "weight": None, "never": None},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "assistant", "content": "It is 4.", "weight": 1},
    ]
    template = (
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = make_config(tmp_path, [{"messages": messages, "tools": '["add"]', "id": 3, "source": "x"}] * 3)
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    data = prepare(config)
    (words,) = split(data.val)
    assert data.tokenizer.decode(words & IDS) == (
        '["add"]<user>2+2?;<assistant>hm{"name": "add", "arguments": {"a": 2}};'
        "<tool>4;<assistant>no;<assistant>It is 4.;"
    )
    learned = data.tokenizer.decode(words[(words & LEARNED) > 0] & IDS)
    assert learned == 'hm{"name": "add", "arguments": {"a": 2}};It is 4.;'
    assert data.meta["val_bytes"] == len(json.dumps([call]) + "hm" + "It is 4.")
    unread = (
        "does not read these fields, so the model does not see them: id of the line (3), name (3), source of the line"
    )
    assert caplog.text.count(unread) == 1 and caplog.text.count("does not read") == 1


CALL = {"name": "add", "arguments": {"a": 2}}
FULL = {  # a line of each layout with all that the layout knows, and its messages, shortened to roles and contents
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "4"}, {"from": "gpt", "value": "It is 4."},
            ],
            "system": "Be short.", "tools": '["add"]', "id": "a",
        },
        "<system>Be short.;<user>2+2?;<assistant>{'name': 'add', 'arguments': {'a': 2}};<tool>4;<assistant>It is 4.;",
        "{'name': 'add', 'arguments': {'a': 2}};It is 4.;",
    ),
    "Alpaca": (
        {
            "instruction": "Add.", "input": "2+2", "output": "4", "system": "Be short.",
            "history": [["Hi", "Ho"], ["So", "No"]], "text": "Below is an instruction", "id": "b",
        },
        "<system>Be short.;<user>Hi;<assistant>Ho;<user>So;<assistant>No;<user>Add.\n2+2;<assistant>4;",
        "Ho;No;4;",
    ),
    "prompt/completion": (
        {
            "prompt": [
                {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "2+2?"},
            ],
            "completion": [{"role": "assistant", "content": "4"}], "tools": ["add"],
        },
        "<user>Hi;<assistant>Ho;<user>2+2?;<assistant>4;",
        "4;",
    ),
    "messages": (line("Hi", "Ho") | {"system": "as a field it is the template's"}, "<user>Hi;<assistant>Ho;", "Ho;"),
}  # fmt: skip


def test_lines_of_all_layouts_in_one_file_and_all_that_is_in_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = make_config(tmp_path, [given for given, _, _ in FULL.values()] * 2)
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    config.data.val_fraction = 0.5
    with caplog.at_level("INFO", "jgpt"):
        data = prepare(config)
    found = {data.tokenizer.decode(words & IDS): words for words in split(data.train) + split(data.val)}
    assert found.keys() == {text for _, text, _ in FULL.values()}
    for _, text, learned in FULL.values():
        assert data.tokenizer.decode(found[text][(found[text] & LEARNED) > 0] & IDS) == learned
    assert data.meta["layouts"] == dict.fromkeys(FULL, 2)
    assert caplog.text.count("Alpaca 2 (the user says instruction, a new line, input; the assistant says") == 1
    unread = "id of the line (4), system of the line (2), text of the line (2), tools of the line (4)"
    assert caplog.text.count(unread) == 1 and caplog.text.count("does not read") == 1


@pytest.mark.parametrize(
    "other, question",
    [
        ({"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "Hi"),
        ({"conversations": line("Hi", "Ho", roles=("human", "gpt"))["messages"]}, "Hi"),
        ({"messages": [{"from": "human", "value": "Hi", "role": None}, {"from": "gpt", "value": "Ho"}]}, "Hi"),
        ({"instruction": "Hi", "input": "", "output": "Ho", "history": None}, "Hi"),
        ({"instruction": "Hi", "output": "Ho", "system": ""}, "Hi"),
        ({"instruction": "", "input": "Hi", "output": "Ho"}, "Hi"),
        ({"prompt": "Hi'\n", "completion": "Ho"}, "Hi'\n"),
        ({"prompt": line("Hi")["messages"], "completion": "Ho"}, "Hi"),
        ({"prompt": "Hi", "response": "Ho"}, "Hi"),
        ({"question": "Hi", "answer": "Ho"}, "Hi"),
        ({"input": "Hi", "output": "Ho"}, "Hi"),
    ],
)
def test_other_spellings_of_a_layout(other: Any, question: str) -> None:
    read = read_chat_line(other, "a.jsonl, line 1", lambda text, _: text)
    assert (read.messages, read.learned, read.variables) == (line(question, "Ho")["messages"], [True, True], {})


def test_the_developer_is_the_system() -> None:
    """OpenAI's newer name, which the server takes as well."""
    given = line("Be short.", "Hi", "Ho", roles=("developer", "user", "assistant"))
    read = read_chat_line(given | {"system": "not this one"}, "a.jsonl, line 1", lambda text, _: text)
    assert [message["role"] for message in read.messages] == ["system", "user", "assistant"]


def test_lines_without_an_answer_are_counted_in_every_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unanswered = [{"instruction": "Hi", "output": " "}, {"prompt": "Hi", "completion": ""}, line("nobody answers")]
    unanswered += [{"instruction": "Hi", "input": None, "output": None}, {"question": "Hi", "answer": None}]
    data = prepare(make_config(tmp_path, [*LINES[:2], *unanswered]))
    assert data.meta["n_documents"] == 2 and "5 conversations are left out: they hold no answer" in caplog.text


def test_the_template_goes_with_the_tokenizer_and_another_template_makes_new_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = make_config(tmp_path, LINES)
    first = prepare(config)
    saved = token_directory(config) / "tokenizer"
    assert load_tokenizer(saved).settings["chat_template"] == TEMPLATE
    auto = AutoTokenizer.from_pretrained(str(saved), local_files_only=True)
    messages = LINES[0]["messages"]
    assert auto.apply_chat_template(messages, tokenize=False) == rendered(first, LINES[0])
    at = (token_directory(config) / "train_00000.bin").stat().st_mtime_ns
    first.tokenizer.save(tmp_path / "tokenizer", 8)
    prepare(config)
    prepare(config, tmp_path / "tokenizer")  # a resumed run
    assert (token_directory(config) / "train_00000.bin").stat().st_mtime_ns == at

    config.tokenizer.update({"kind": "hf", "pretrained": str(tmp_path / "tokenizer"), "chat_template": ""})
    own = prepare(config)  # the tokenizer's own template
    assert own.meta["train_sha256"] == first.meta["train_sha256"] != own.meta["fingerprint"]
    (tmp_path / "chat.jinja").write_text(TEMPLATE.replace("<", "["), encoding="utf-8")
    config.tokenizer.chat_template = str(tmp_path / "chat.jinja")
    changed = prepare(config)
    assert changed.meta["train_sha256"] != first.meta["train_sha256"]
    assert "[assistant>" in load_tokenizer(saved).settings["chat_template"]
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")  # the same name, another text
    assert prepare(config).meta["train_sha256"] == first.meta["train_sha256"]
    config.data.format, config.data.text_field = "text", "id"
    (tmp_path / "chat.jsonl").write_text('{"id": "plain text"}\n' * 50)
    assert not prepare(config).is_chat


def test_compressed_files_and_only_jsonl_of_a_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path, LINES)
    expected = prepare(config).meta["train_sha256"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("no conversation")
    (folder / "chat.jsonl.gz").write_bytes(gzip.compress((tmp_path / "chat.jsonl").read_bytes()))
    config.data.text_glob = str(folder)
    assert prepare(config).meta["train_sha256"] == expected
    config.data.text_glob = str(folder / "README.md")
    with pytest.raises(
        UserError, match=r"only files that are not .jsonl \(.md\).*Supported are .jsonl or .ndjson, also with .gz"
    ):
        prepare(config)


def test_the_command_for_a_json_array_of_conversations_makes_lines(tmp_path: Path) -> None:
    config = make_config(tmp_path, LINES[:3])
    expected = prepare(config).meta["train_sha256"]
    (tmp_path / "OLD.json").write_text(json.dumps(LINES[:3], ensure_ascii=False), encoding="utf-8")
    config.data.text_glob = str(tmp_path / "OLD.json")
    with pytest.raises(UserError, match=r"only files that are not .jsonl \(.json\)") as refused:
        prepare(config)
    command = str(refused.value).split("one list: ")[1].split(".jsonl)")[0] + ".jsonl"
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, cwd=tmp_path, check=True)
    config.data.text_glob = str(tmp_path / "NEW.jsonl")
    assert prepare(config).meta["train_sha256"] == expected


def test_bounded_memory_gives_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, LINES)
    expected = prepare(config).meta["train_sha256"]
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 100)
    config.out_dir = str(tmp_path / "other")
    assert prepare(config).meta["train_sha256"] == expected


@pytest.mark.parametrize(
    "bad, problem",
    [
        ("{", "is not JSON"),
        ("1", "is no conversation: it is '1'. Allowed: {.messages.*{.conversations.*{.instruction.*{.prompt"),
        (f"[{json.dumps(line('Hi', 'Ho'))}]", r"is a list, .*one conversation, an object.*array, convert it: jq -c '"),
        ('{"text": "Hi"}', r"is no conversation: it has the fields \['text'\]"),
        ('{"instruction": "Hi"}', r"is no conversation: it has the fields \['instruction'\]"),
        ('{"conversations": []}', r"is no conversation: it has conversations: '\[\]', not a list with a message"),
        ('{"messages": "Hi"}', "is no conversation: it has messages: 'Hi'"),
        ('{"instruction": "Hi", "output": 4}', "has the output '4'. Allowed: text"),
        ('{"instruction": "Hi", "input": ["a"], "output": "4"}', "has the input ...a.... Allowed: text"),
        ('{"instruction": "Hi", "output": "4", "history": [["a"]]}', "has the history .*a.*. Allowed: a list of"),
        ('{"prompt": "Hi", "completion": ["Ho"]}', "message 2 is 'Ho', which is not an object"),
        ('{"conversations": [{"from": "bing", "value": "Hi"}]}', "the role 'bing'. Allowed: .*, human, gpt, observat"),
        ('{"conversations": [{"from": "human", "value": 4}]}', "message 1 has the content '4', which is not text"),
        ('{"conversations": [{"from": "function_call", "value": "add(2)"}]}', "1 is a function_call of 'add.2.'"),
        ('{"conversations": [{"from": "function_call", "value": "[]"}]}', "1 is a function_call of '..'. Allowed"),
        ('{"messages": ["Hi"]}', "message 1 is 'Hi', which is not an object"),
        ('{"messages": [{"role": "me", "content": "Hi"}]}', "message 1 has the role 'me'. Allowed: system, user"),
        ('{"messages": [{"content": "Hi"}]}', "message 1 has the role None"),
        ('{"messages": [{"role": "user", "content": ["Hi", 3]}]}', "message 1 has a content with a part of type '3'"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "a part of type 'image', which is not text",
        ),
        ('{"messages": [{"role": "user", "content": "Hi", "weight": 1}]}', "message 1, of the user, has the weight 1"),
        ('{"messages": [{"role": "assistant", "content": "Hi", "weight": 0.5}]}', "has the weight 0.5. Allowed: 0"),
        ('{"messages": [{"role": "user", "content": "Hi"}], "tools": "["}', "has the tools '\\['. Allowed: a list"),
        ('{"messages": [{"role": "user"}]}', "message 1 has the content 'None'"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "message 1 has the content 'None'"),
        (json.dumps(line("Hi", " \n")), "message 2 is an empty answer"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 1 holds half a surrogate pair"),
        (
            '{"messages": [{"role": "user", "content": "Hi"}], "x": ' + "[" * 1200 + "]" * 1200 + "}",
            "(is nested too deeply|is not JSON: maximum recursion depth)",  # Python 3.11 reads less
        ),
        (json.dumps(line("refuse", "me")), "the chat template does not render these messages .TemplateError: no"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: str, problem: str) -> None:
    template = "{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n\n" + bad + "\n", encoding="utf-8")
    corpus = ChatCorpus([path], template=template, settings={"eos_token": "</s>"})
    with pytest.raises(UserError, match=f"chat.jsonl, line 3.*{problem}"):
        list(corpus.conversations())


@pytest.mark.parametrize("lines", [[], [line("Hi")] * 5, [line("Hi", "Hello"), line("Hi")]])
def test_too_few_conversations_are_refused(tmp_path: Path, lines: list[Any]) -> None:
    config = make_config(tmp_path, LINES)
    prepare(config).tokenizer.save(tmp_path / "tokenizer", 8)
    config = make_config(tmp_path, lines)
    with pytest.raises(UserError, match=f"hold {len(lines) == 2:d} conversations with an answer .*At least two"):
        prepare(config, tmp_path / "tokenizer")
    assert not list(token_directory(config).rglob("*.bin*"))


def test_two_conversations_are_one_to_learn_and_one_held_out(tmp_path: Path) -> None:
    data = prepare(make_config(tmp_path, LINES[:2]))
    assert len(split(data.train)) == len(split(data.val)) == 1


def test_no_template_is_answered_before_any_work(tmp_path: Path) -> None:
    config = make_config(tmp_path, LINES)
    config.tokenizer.chat_template = ""
    with pytest.raises(UserError, match="needs a chat template.*set tokenizer.chat_template to a Jinja file"):
        prepare(config)
    train_bpe(["Hi"], 300).save(tmp_path / "bare", 8)
    config.tokenizer.update({"kind": "hf", "pretrained": str(tmp_path / "bare")})
    with pytest.raises(UserError, match="needs a chat template"):
        prepare(config)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_packed_conversation_is_to_the_model_as_if_alone(tmp_path: Path, position: str) -> None:
    """Row by row, beside the same conversations one a row, in one call."""
    context = 120
    batch = make_batches(prepare(make_config(tmp_path, LINES)), 1, 4, context, 320, length_key="length").batch(0)
    inputs = batch.tokens[:, :-1]
    texts = [(row, number) for row in range(4) for number in range(batch.segments[row].max() + 1)]
    places = [np.flatnonzero(batch.segments[row] == number) for row, number in texts]
    alone = np.zeros((len(texts), context), np.int32)
    for i, (row, _) in enumerate(texts):
        alone[i, : len(places[i])] = inputs[row, places[i]]
    config = ModelConfig(320, context, 1, 2, 1, 16, 8, 32, position=position)
    model, random = GPT(config), np.random.default_rng(0)
    # Far from zero, so that the position of a token matters.
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), abstract_params(config))

    @jax.jit
    def run(tokens: jax.Array, segments: jax.Array) -> Any:
        return model.apply({"params": params}, tokens, segments=segments)

    tokens, segments = np.concatenate([inputs, alone]), np.concatenate([batch.segments, np.zeros_like(alone)])
    hidden = np.asarray(run(tokens, segments).hidden)
    assert len(texts) > 6
    for i, (row, _) in enumerate(texts):
        np.testing.assert_allclose(hidden[row, places[i]], hidden[4 + i, : len(places[i])], rtol=1e-4, atol=1e-4)
