"""The command that writes text: prompts from everywhere, one text a seed, nothing but the text on stdout."""

import json
import re
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from jgpt.exchange.write_model import export_model
from jgpt.inference.decode import generate
from jgpt.inference.sampling import Sampling
from jgpt.loading.load import load_model

PROMPT = "7 times "


def refused(result, *parts: str) -> None:
    assert (result.code, result.out) == (2, ""), result.err
    assert "error: " in result.err and "Traceback" not in result.err
    for part in parts:
        assert part in result.err, result.err


@pytest.fixture
def write(command, trained):
    def run(*arguments: str, stdin: str | bytes = "") -> str:
        result = command("generate", f"--run_dir={trained}", "--max_new_tokens=12", *arguments, stdin=stdin)
        assert result.code == 0, result.err
        assert "step 4" in result.err and re.search(r"tokens in [\d.]+ s", result.err)
        return result.out

    return run


def test_the_prompt_comes_from_the_flag_a_file_or_a_pipe(write, tmp_path):
    text = write(f"--prompt={PROMPT}")
    assert text.startswith(PROMPT) and len(PROMPT) < len(text) <= len(PROMPT) + 13
    (tmp_path / "prompt.txt").write_text("\ufeff" + PROMPT + "\n")
    assert write(f"--prompt_file={tmp_path}/prompt.txt") == text
    assert write(stdin="\ufeff" + PROMPT + "\r\n") == text
    assert write("--prompt=-", stdin=PROMPT) == text
    assert write(f"--prompt={PROMPT}", stdin="not this") == text


def test_characters_that_the_vocabulary_lacks_are_named(command, trained):
    result = command("generate", f"--run_dir={trained}", "--max_new_tokens=1", f"--prompt={PROMPT}\u6f22\u5b57\u6f22")
    assert result.code == 0 and result.out.startswith(f"{PROMPT}<unk><unk><unk>")
    assert "3 characters of the prompt are not in the model's vocabulary" in result.err
    assert "as <unk>: '\u6f22' (2), '\u5b57' (1)\n" in result.err


def test_without_a_prompt_a_new_document_begins(write):
    text = write()
    assert 1 <= len(text.replace("<unk>", "?")) <= 13 and write("--prompt=") == text


def test_the_seed_decides(write):
    texts = [write(f"--seed={seed}", f"--prompt={PROMPT}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [write(f"--seed={seed}", "--temperature=0", f"--prompt={PROMPT}") for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_many_samples_are_set_apart(write):
    samples = write("--num_samples=3", f"--prompt={PROMPT}").split("-" * 80 + "\n")
    assert len(samples) == 3 and all(sample.startswith(PROMPT) for sample in samples)
    assert len(set(samples)) > 1


def test_an_older_checkpoint(command, trained):
    result = command("generate", f"--run_dir={trained}", "--step=2", "--max_new_tokens=1")
    assert result.code == 0 and "step 2" in result.err


def test_streamed_text_is_the_same(write):
    text = write(f"--prompt={PROMPT}")
    assert write(f"--prompt={PROMPT}", "--stream") == text == write(f"--prompt={PROMPT}", "--nostream")


def test_longer_than_the_context(write):
    """The run's context is 16; with a single token in view some of many texts differ."""
    ask = f"--prompt={PROMPT}", "--max_new_tokens=40", "--num_samples=50"
    whole = write(*ask)
    assert write(*ask, "--context_length=1") != whole == write(*ask, "--context_length=999")


def test_penalized_repetitions_are_fewer(write):
    ask = f"--prompt={PROMPT}", "--max_new_tokens=16", "--temperature=0"
    plain, penalized = write(*ask), write(*ask, "--repetition_penalty=5")
    assert len(set(plain[8:])) < len(set(penalized[8:]))


@pytest.fixture
def exported(trained, tmp_path) -> Path:
    loaded = load_model(str(trained))
    out, n_ids = tmp_path / "model", loaded.tokenizer.vocab_size
    ids = dict(vocab_size=n_ids, stop_ids=loaded.stop_ids)
    export_model(out, loaded.params, loaded.model.config, loaded.tokenizer, **ids, dtype="fp32")
    return out


def test_a_hugging_face_directory(command, write, exported):
    result = command("generate", f"--model={exported}", "--max_new_tokens=12", f"--prompt={PROMPT}")
    assert result.code == 0, result.err
    assert result.out == write(f"--prompt={PROMPT}") and "step" not in result.err


def test_a_text_begins_as_the_tokenizer_has_it(command, exported):
    """Llama's models have seen a token before every text, which their tokenizer.json names: they are shown it here."""
    path = exported / "tokenizer.json"
    content = json.loads(path.read_text())
    unknown = next(token["id"] for token in content["added_tokens"] if token["content"] == "<unk>")
    processor = TemplateProcessing("<unk> $A", "$A $B", [("<unk>", unknown)])
    path.write_text(json.dumps(content | {"post_processor": json.loads(processor.__getstate__())}))
    loaded = load_model(str(exported))
    for prompt in (PROMPT, ""):
        ids = loaded.tokenizer.encode(prompt).tolist()
        ask = dict(sampling=Sampling(0), max_new_tokens=12, stop_ids=loaded.stop_ids, seed=0)
        n_ids = loaded.tokenizer.vocab_size
        (new,) = generate(loaded.model, {"params": loaded.params}, [[unknown, *ids]], **ask, n_ids=n_ids)
        flags = f"--model={exported}", "--max_new_tokens=12", f"--prompt={prompt}", "--temperature=0"
        assert command("generate", *flags).out == loaded.tokenizer.decode(ids + new) + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        (["--run_dir={tmp}/nothing"], "", ["there is no directory", "/nothing"]),
        ([], "", ["no --model was given", "runs/quickstart"]),
        (["--run_dir={run}", "--step=3"], "", ["step 3 is not among the checkpoints", "Allowed: 2, 4"]),
        (["--run_dir={run}", "--prompt=a", "--prompt_file=b"], "", ["both --prompt and --prompt_file"]),
        (["--run_dir={run}", "--prompt_file={tmp}/none.txt"], "", ["none.txt", "No such file"]),
        (["--run_dir={run}", "--max_new_tokens=99999999999"], "", ["--max_new_tokens='99999999999'"]),
        (["--run_dir={run}"], b"caf\xe9", ["not UTF-8", "offset 3"]),
        (["--run_dir={run}", "--temperature=-1"], "", ["temperature=-1"]),
        (["--run_dir={run}", "--top_k=-1", "--min_p=2"], "", ["top_k=-1", "min_p=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(command, trained, tmp_path, arguments, stdin, parts):
    refused(command("generate", *(a.format(run=trained, tmp=tmp_path) for a in arguments), stdin=stdin), *parts)
