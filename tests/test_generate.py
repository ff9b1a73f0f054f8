"""The command that writes text: prompts from everywhere, one text a seed, nothing but the text on stdout."""

import re

import pytest

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
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert write(f"--prompt_file={tmp_path}/prompt.txt") == text
    assert write(stdin=PROMPT + "\r\n") == text
    assert write("--prompt=-", stdin=PROMPT) == text
    assert write(f"--prompt={PROMPT}", stdin="not this") == text


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


@pytest.mark.parametrize(
    ("arguments", "stdin", "parts"),
    [
        (["--run_dir={tmp}/nothing"], "", ["/nothing holds no trained model"]),
        (["--run_dir={run}", "--step=3"], "", ["step 3 is not among the checkpoints", "Allowed: 2, 4"]),
        (["--run_dir={run}", "--prompt=a", "--prompt_file=b"], "", ["both --prompt and --prompt_file"]),
        (["--run_dir={run}", "--prompt_file={tmp}/none.txt"], "", ["none.txt", "No such file"]),
        (["--run_dir={run}"], b"caf\xe9", ["not UTF-8", "offset 3"]),
        (["--run_dir={run}", "--temperature=-1"], "", ["temperature=-1"]),
        (["--run_dir={run}", "--top_k=-1", "--min_p=2"], "", ["top_k=-1", "min_p=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(command, trained, tmp_path, arguments, stdin, parts):
    refused(command("generate", *(a.format(run=trained, tmp=tmp_path) for a in arguments), stdin=stdin), *parts)
