"""Chat templates render as transformers renders them, and answers are separated from prompts."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from jgpt.data import chat_template
from jgpt.data.chat_template import answers, read_template, render
from jgpt.errors import UserError

SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 8}

# As the models have them: SmolLM2, Llama 3, Qwen2.5 (its part without tools), Mistral, Qwen3 (in short).
TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "llama3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
'<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}\
{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}""",
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" \
and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "qwen3": """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and loop.index0 > ns.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "everything": """{% for message in messages %}
    {% if message.role == "system" %}{% continue %}{% endif %}
    {% generation %}
    {{ message | tojson }} {{ messages | tojson(indent=2) }}
    {% endgeneration %}
    {% if loop.last %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now("%Y %d") }} {{ unk_token }} {{ pad_token is defined }} {{ tools is none }} {{ documents is none }}
{% set ns = namespace(a=1) %}{% set ns.b = dict(c=2) %}{{ ns.b.c }} {{ messages[0] }} {{ messages[0].items() | list }}
""",
}

# Qwen3's way with thoughts, tools and calls, in short; DeepSeek-R1-Distill's with a prompt that ends in <think>.
THINKING = """{%- if tools %}
    {{- '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content or '' }}
    {%- for call in m.tool_calls or [] %}{{ '<call>' }}{{ call.function | tojson }}{{ '</call>' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
R1 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}{% else %}\
{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"""
MARKED = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}\
{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{% endfor %}"""


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * bool(system) + turns


CHATS = [
    chat("Hi"),
    chat("What is 2+2? <b>&", "It is 4.\n"),
    chat(" Größe 漢字 🙂 ", " ja ", "{{ messages }}", "nein", 'und "so" weiter\\n\'', system="Be 'brief' {% raw %}."),
    chat("one", "two", "three", "four"),
]


@pytest.mark.parametrize("family", TEMPLATES)
def test_rendering_equals_transformers(family: str) -> None:
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate(("<s>", "</s>", "<unk>"))}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATES[family]
    )
    for messages in CHATS:
        for prompt in (False, True):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert render(TEMPLATES[family], SETTINGS, messages, prompt) == expected


@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen2.5", "mistral"])
def test_parts_are_the_rendered_conversation_and_every_second_is_an_answer(family: str) -> None:
    end = {"chatml": "<|im_end|>\n", "llama3": "<|eot_id|>", "qwen2.5": "<|im_end|>\n", "mistral": "</s>"}[family]
    for messages in CHATS[1:]:
        whole = messages[: 1 + max(i for i, message in enumerate(messages) if message["role"] == "assistant")]
        (parts,) = answers(TEMPLATES[family], SETTINGS, messages).texts
        assert "".join(parts) == render(TEMPLATES[family], SETTINGS, whole, False)
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        if family == "llama3":  # it trims
            contents = [content.strip() for content in contents]
        assert parts[1::2] == [" " * (family == "mistral") + content + end for content in contents]
        for i in range(0, len(parts), 2):  # each prompt is what inference would show
            asked = [j for j, message in enumerate(messages) if message["role"] == "assistant"][i // 2]
            assert "".join(parts[: i + 1]) == render(TEMPLATES[family], SETTINGS, messages[:asked], True)


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_its_own_prompt() -> None:
    messages = chat("one", "two", "three", "four")
    texts = answers(TEMPLATES["qwen3"], SETTINGS, messages).texts
    thought = "<think>\n\n</think>\n\n"
    assert [parts[1] for parts in texts] == [thought + "two<|im_end|>\n", thought + "four<|im_end|>\n"]
    assert [parts[0] for parts in texts] == [
        render(TEMPLATES["qwen3"], SETTINGS, messages[:1], True),
        render(TEMPLATES["qwen3"], SETTINGS, messages[:3], True),
    ]
    assert "two<|im_end|>" in texts[1][0] and "think" not in texts[1][0]


def test_an_opening_message_of_the_assistant_is_shown_and_not_learned() -> None:
    opening = {"role": "assistant", "content": "Welcome!"}
    assert answers(TEMPLATES["chatml"], SETTINGS, [opening]).texts == []
    (parts,) = answers(TEMPLATES["chatml"], SETTINGS, [opening, *chat("Hi", "Hello")]).texts
    assert "Welcome!" in parts[0] and parts[1:] == ["Hello<|im_end|>\n"]


def test_there_is_nothing_to_learn_without_an_answer() -> None:
    assert answers(TEMPLATES["chatml"], SETTINGS, chat("Hi")).texts == []


def test_the_template_gets_all_that_a_line_has_and_what_it_does_not_read_is_known() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "2+2?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4.", "reasoning": "easy"},
    ]
    found = answers(THINKING, SETTINGS, messages, variables={"tools": [{"name": "add"}], "id": 7, "eos_token": "x"})
    (parts,) = found.texts
    assert parts[0].startswith('<tools>{"name": "add"}</tools>\n') and "<|im_start|>tool\n4" in parts[2]
    assert parts[1::2] == [
        '<think>\n\n</think>\n\n<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>\n',
        "<think>\neasy\n</think>\n\nIt is 4.<|im_end|>\n",
    ]
    assert {"tool_calls", "reasoning_content"} <= found.read and "name" not in found.read
    assert "tools" in found.variables and not {"id", "eos_token"} & found.variables
    assert "name" in answers("{% for m in messages %}{{ m | tojson }}{% endfor %}", {}, messages).read


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("c.function.arguments | tojson", '{"a": 2}'),
        ("c.function | tojson", '{"name": "add", "arguments": {"a": 2}}'),
        ("m.tool_calls | tojson", '[{"function": {"name": "add", "arguments": {"a": 2}}}]'),
        ("c.function.arguments.items() | list", "[('a', 2)]"),
        ("c.function.arguments | items | list", "[('a', 2)]"),
        ("'```' + c.function.arguments", '```{"a":2}'),  # DeepSeek's way
        ("c.function.arguments if c.function.arguments is string else 'an object'", '{"a":2}'),  # Qwen3's
    ],
)
def test_arguments_of_a_call_in_a_text_are_an_object_where_a_template_wants_one(written: str, found: str) -> None:
    """OpenAI's files have a text; written as JSON once more it would be learned in quotes, with backslashes."""
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a":2}'}}]}]
    template = "{% for m in messages %}{% for c in m.tool_calls %}{{ " + written + " }}{% endfor %}{% endfor %}"
    assert render(template, {}, messages, False) == found


@pytest.mark.parametrize("arguments", ["add(2)", "[2]", "", 7, None, {"a": 2}])
def test_other_arguments_of_a_call_stay_as_they_are(arguments: object) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": arguments}}, "x"]}]
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(template, {}, messages, False) == ("{}" if arguments == "" else json.dumps(arguments))


def test_what_is_not_to_be_learned_is_seen() -> None:
    messages = chat("one", "two", "three", "four", "five", "six")
    (parts,) = answers(TEMPLATES["chatml"], SETTINGS, messages, [True, False, True, True, True, True]).texts
    assert parts[1::2] == ["four<|im_end|>\n", "six<|im_end|>\n"] and "two<|im_end|>" in parts[0]
    assert "".join(parts) == render(TEMPLATES["chatml"], SETTINGS, messages, False)
    (marked,) = answers(MARKED, SETTINGS, messages, [True, False, True, True, True, False]).texts
    assert marked[1:] == ["four</s>"] and "<assistant>two</s><user>three" in marked[0]
    assert answers(MARKED, SETTINGS, messages, [False] * 6).texts == []
    with pytest.raises(UserError, match="marks 6 parts by .* where the assistant has 3 messages"):
        answers(MARKED + MARKED, SETTINGS, messages, [False] * 6)


@pytest.mark.parametrize("answer", ["Hello", "<think>\nhm</think>Hello", "<b>", "<think>"])
def test_an_answer_begins_where_the_prompts_of_training_and_of_chats_part(answer: str) -> None:
    """A chat's prompt ends in <think>, and a dataset's answers have no thought."""
    (parts,) = answers(R1, SETTINGS, chat("Hi", answer, "Bye", answer)).texts
    end = answer.split("</think>")[-1] + "</s>"
    assert parts == ["<s><User>Hi<Assistant>", end, "<User>Bye<Assistant>", end]


def test_marks_of_a_template_are_learned_as_transformers_does() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in CHATS[1:]:
        (text,), (places,) = render_jinja_template(
            [messages], chat_template=MARKED, return_assistant_tokens_mask=True, **SETTINGS
        )
        (parts,) = answers(MARKED, SETTINGS, messages).texts
        assert parts[1::2] == [text[begin:end] for begin, end in places]
        assert text.startswith("".join(parts))


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace(__init__=1) }}", "SecurityError"),
        ("{{ ('a' * 2000000000) | length }}", "MemoryError: it takes more than 1,024 MiB"),
        ("{{ 'a'.ljust(2000000000) | length }}", "MemoryError"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "MemoryError: it writes more than 67,108,864 char"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_one_message(template: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"does not render these messages .{problem}.*set tokenizer.chat_template to"):
        render(template, SETTINGS, CHATS[0], False)


def test_a_template_without_end_is_stopped_and_the_next_one_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that of the processor, so that a busy machine stops nothing."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0)
    endless = "{% for i in range(99999) %}" * 5 + "{% endfor %}" * 5
    with pytest.raises(UserError, match="was stopped: it took more than 0 seconds .*loop without end.*set tokenizer"):
        render(endless, SETTINGS, CHATS[0], False)
    assert render("{{ messages[0].content }}", SETTINGS, CHATS[0], False) == "Hi"
    with pytest.raises(UserError, match="more than 0 seconds for 1,200 messages, and each answer .*cut this conversat"):
        render(endless, SETTINGS, 1200 * CHATS[0], False)


@pytest.mark.parametrize("extra", [{1, 2}, Path("a"), b"a"])
def test_what_json_has_not_is_one_message(extra: object) -> None:
    with pytest.raises(UserError, match="the messages hold what JSON has not .*Convert it, or leave it out"):
        render("{{ messages[0].content }}", SETTINGS, [{"role": "user", "content": "Hi", "extra": extra}], False)


def test_a_reply_that_was_not_read_does_not_answer_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, whose process goes on."""
    assert render("first", SETTINGS, CHATS[0], False) == "first"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat_template._process._process.stdout, "readline", interrupt, raising=False)
        render("second", SETTINGS, CHATS[0], False)
    assert render("third", SETTINGS, CHATS[0], False) == "third"


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("template", ["{{ messages[-1].content }}", "the same"])
def test_a_template_that_does_not_append_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="does not put message 2 after its prompt"):
        answers(template, SETTINGS, chat("Hi", "Hello"))


def test_a_template_file(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("\ufeff{{ 1 }}\n", encoding="utf-8")
    assert read_template(str(tmp_path / "a.jinja")) == "{{ 1 }}\n"
    (tmp_path / "b.jinja").write_bytes(b"\xff")
    for name in ("b.jinja", "missing.jinja"):
        with pytest.raises(UserError, match=f"{name}' cannot be read"):
            read_template(str(tmp_path / name))
