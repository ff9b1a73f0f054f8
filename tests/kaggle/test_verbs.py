"""The verbs, as a user types them, against a Kaggle on this machine; what is pulled is opened for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_kaggle import SIGNATURE, FakeKaggle, Fault, Version

from jgpt.kaggle.__main__ import VERBS
from jgpt.kaggle.session.pack import pack

SLUG = "owner/my-gpt"
CONFIG = f"--config={Path(__file__).parents[2]}/configs/kaggle_t4.py"


@pytest.fixture
def server(kaggle: FakeKaggle, tmp_path, monkeypatch) -> FakeKaggle:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "jgpt.kaggle.laptop.kernel._archive", lambda files: b"nothing runs, and compressing takes a second"
    )
    return kaggle


@pytest.fixture
def verb(command, server):
    return lambda name, *flags: command("kaggle.__main__", name, *flags)


@pytest.fixture
def ran(server, trained, tmp_path) -> Version:
    """Put the small trained run on the server as a session leaves it: packed, below outputs/."""
    shutil.copytree(trained, tmp_path / "there")
    pack(tmp_path / "there")
    files = {f"outputs/{path.name}": path.read_bytes() for path in (tmp_path / "there").iterdir() if path.is_file()}
    version = Version({}, files=files | {"notes.txt": b"not of the run"}, log=["step 4\n"])
    server.kernels[SLUG] = [version]
    return version


def test_help(verb):
    result = verb("--help")
    assert result.code == 0 and max(map(len, result.out.splitlines())) <= 120, result.err
    for name in VERBS:
        assert f"\n  {name} " in result.out
        one = verb(name, "--help")
        assert one.code == 0 and one.err == "" and max(map(len, one.out.splitlines())) <= 120
        assert f"    python -m jgpt.kaggle {name} " in one.out and "--dry_run" in one.out
        assert "Exit codes:" in one.out and "a run there failed" in one.out


@pytest.mark.parametrize("folder", ["taken", "taken/x", "a" * 300])
def test_a_folder_that_cannot_be_written(verb, tmp_path, folder):
    (tmp_path / "taken").write_text("mine")
    for name in ("push", "resume", "chain"):
        result = verb(
            name, CONFIG, f"--slug={SLUG}", f"--folder={folder}", "--dry_run", *["--hours=5"] * (name == "chain")
        )
        assert result.code == 2 and "cannot be written" in result.err and "--folder=DIR" in result.err, result.err


def test_a_tilde_is_the_home_also_behind_an_equals_sign(verb, tmp_path, monkeypatch):
    """A shell leaves it there."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verb("push", CONFIG, f"--slug={SLUG}", "--folder=~/kernel", "--dry_run").code == 0
    assert (tmp_path / "home" / "kernel" / "kernel.py").is_file() and not Path("~").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_hours_and_seconds_are_finite(verb, value):
    for flag in ("hours", "poll_seconds"):
        result = verb("chain", CONFIG, f"--slug={SLUG}", f"--{flag}={value}", "--dry_run")
        assert result.code == 2 and f"--{flag}={value}: it must be a finite number" in result.err


def test_what_is_no_verb(verb):
    result = verb("pul")
    assert result.code == 2 and "'pul' is not a verb. Did you mean pull? Allowed: push, status" in result.err
    with_flags = verb("pussh", "--slug=a/b", "--config", "base")
    assert with_flags.code == 2 and "'pussh' is not a verb. Did you mean push?" in with_flags.err
    assert "no verb was given" in verb("").err


def test_push(verb, server):
    server.sources.add("owner/text")
    few = ["--config.optimizer.total_steps=10", "--config.optimizer.warmup_steps=1"]
    result = verb("push", CONFIG, *few, f"--slug={SLUG}", "--dataset=owner/text")
    assert result.code == 0, result.err
    assert f"version 1 is pushed: https://www.kaggle.com/code/{SLUG}" in result.out
    sent = server.kernels[SLUG][0].request
    assert sent["machineShape"] == "NvidiaTeslaT4" and sent["enableInternet"] is False and sent["isPrivate"] is True
    assert sent["datasetDataSources"] == ["owner/text"] and sent["kernelType"] == "script"
    assert " ".join(["jgpt.train", "--config=configs/kaggle_t4.py", *few]) in sent["text"].split("\n")[0]
    assert sent["text"] == Path("runs/kaggle/owner-my-gpt/kernel.py").read_text()
    compile(sent["text"], "kernel.py", "exec")
    again = verb("push", CONFIG, f"--slug={SLUG}", "--dataset=owner/text", "--accelerator=", "--internet")
    assert (
        "version 2 is pushed" in again.out
        and "this starts from step 0. To continue version 1, use `resume`" in again.out
    )
    sent = server.kernels[SLUG][1].request
    assert sent["enableInternet"] is True and not sent.get("machineShape") and not sent.get("enableGpu")
    server.kernels[SLUG][1].states = ["RUNNING"]
    refused = verb("push", CONFIG, f"--slug={SLUG}")
    assert refused.code == 2 and "version 2 of owner/my-gpt is RUNNING" in refused.err
    assert len(server.kernels[SLUG]) == 2


def test_push_without_an_input_that_there_is(verb):
    result = verb("push", CONFIG, f"--slug={SLUG}", "--dataset=owner/txet")
    assert result.code == 2 and "Kaggle does not know --dataset owner/txet" in result.err


def test_push_dry_run_shows_what_would_be_sent(verb, server, tmp_path):
    result = verb("push", CONFIG, f"--slug={SLUG}", "--folder=here", "--dry_run")
    assert result.code == 0, result.err
    for path in sorted(Path("here").iterdir()):
        assert f"here/{path.name}  {path.stat().st_size:,} bytes" in result.out
    shown = result.out[result.out.index("{") : result.out.rindex("}") + 1]
    assert json.loads(shown) == json.loads(Path("here/kernel-metadata.json").read_text())
    assert "runs on Kaggle: python -m jgpt.train --config=" in result.out and server.requests == []


def test_what_takes_the_internet_is_told_before_the_push(verb):
    wants = [
        "--config.tokenizer.kind=hf",
        "--config.tokenizer.pretrained=gpt2",
        "--config.checkpoint.upload=hub:me/run",
    ]
    told = verb("push", CONFIG, *wants, f"--slug={SLUG}", "--dry_run")
    assert told.code == 0 and "note: tokenizer.pretrained=gpt2 is on the Hugging Face Hub" in told.err
    assert "note: checkpoint.upload=hub:me/run, and this session has no internet: add --internet" in told.err
    for fine in ([*wants, "--internet"], [], ["--config.tokenizer.kind=hf", "--config.tokenizer.pretrained=/kaggle/x"]):
        assert "note:" not in verb("push", CONFIG, *fine, f"--slug={SLUG}", "--dry_run").err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([CONFIG], ["no --slug was given", "--slug=me/my-gpt"]),
        ([CONFIG, "--slug=nobody"], ["slug='nobody'", "owner/name"]),
        ([f"--slug={SLUG}"], ["no --config was given"]),
        ([CONFIG, f"--slug={SLUG}", "--config.model.n_heads=7"], ["model.n_heads=7 does not divide"]),
        ([CONFIG, f"--slug={SLUG}", "--config.optimzer.beta1=1"], ["Did you mean optimizer.beta1?"]),
        ([CONFIG, f"--slug={SLUG}", "--accelerator=NvidiaTeslaP100"], ["accelerator='NvidiaTeslaP100'"]),
        ([CONFIG, f"--slug={SLUG}", "--model=a/b"], ["owner/model/framework/variation/version"]),
        ([CONFIG, f"--slug={SLUG}", "--dataset=text"], ["dataset 'text'", "owner/name"]),
        ([CONFIG, f"--slug={SLUG}", "--interent"], ["unknown flag --interent", "--internet"]),
    ],
)
def test_what_push_refuses_before_anything_is_sent(verb, server, flags, parts):
    result = verb("push", *flags)
    assert result.code == 2 and "Traceback" not in result.err and server.requests == []
    for part in parts:
        assert part in result.err, result.err


def test_status(verb, server, ran):
    server.used_hours = 12.34
    result = verb("status", f"--slug={SLUG}")
    assert result.code == 0, result.err
    assert "version 1: COMPLETE   https://www.kaggle.com/code/owner/my-gpt" in result.out
    assert "last output: version 1: finished at step 4 of 4, 0.0 h trained" in result.out
    assert "GPU hours: 12.3 of this week's 30 used, 17.7 left; filled up again on Saturday 2026-11-28" in result.out
    server.kernels[SLUG].append(Version({}, states=["ERROR"], failure="more memory than is available."))
    second = verb("status", f"--slug={SLUG}")
    assert "version 2: ERROR" in second.out and "Kaggle says: more memory" in second.out
    assert "last output: version 1" in second.out
    assert verb("status", "--slug=owner/nothing").code == 2
    asked = len(server.requests)
    assert "Would ask" in verb("status", f"--slug={SLUG}", "--dry_run").out and len(server.requests) == asked


def test_logs(verb, server, ran):
    assert verb("logs", f"--slug={SLUG}").out == "step 4\n"
    assert verb("logs", f"--slug={SLUG}", "--version=1", "--follow").out == "step 4\n"
    server.kernels[SLUG].append(Version({}, states=["RUNNING", "RUNNING", "COMPLETE"], log=["one\n", "two"]))
    assert "--follow shows it sooner" in verb("logs", f"--slug={SLUG}").out
    assert verb("logs", f"--slug={SLUG}", "--follow").out == "one\ntwo\n"


def test_what_is_pulled_generates(verb, command, server, ran, trained):
    result = verb("pull", f"--slug={SLUG}")
    assert result.code == 0, result.err
    target = "runs/kaggle/owner-my-gpt/run"
    assert f'python -m jgpt.generate --model {target} --prompt "Once"' in result.out
    assert not Path(target, "notes.txt").exists() and os.listdir(Path(target).parent) == ["run"]
    arguments = ["--prompt=7 times", "--seed=1", "--max_new_tokens=20", "--num_samples=1"]
    here, there = (command("generate", f"--model={model}", *arguments) for model in (target, trained))
    assert here.code == 0 and here.out == there.out and here.out.startswith("7 times"), here.err
    assert verb("pull", f"--slug={SLUG}").code == 0  # again: it is replaced
    os.utime(Path(target, "status.json"))
    refused = verb("pull", f"--slug={SLUG}")
    assert refused.code == 2 and "was trained on since it was pulled" in refused.err


def test_pull_goes_on_where_it_broke_off(verb, server, ran):
    ran.files["outputs/zzz.txt"] = b"the last one"
    server.faults = [Fault("zzz.txt", 503) for _ in range(6)]
    broken = verb("pull", f"--slug={SLUG}", "--to=model")
    assert broken.code == 2 and "downloading zzz.txt: 503" in broken.err and SIGNATURE not in broken.err + broken.out
    assert not Path("model").exists() and not [path for path in Path().rglob("*") if path.suffix == ".part"]
    asked = len(server.requests)
    result = verb("pull", f"--slug={SLUG}", "--to=model")
    assert result.code == 0 and Path("model/zzz.txt").read_bytes() == b"the last one", result.err
    fetched = [r for r in server.requests[asked:] if r.startswith("/files")]
    assert not any("checkpoint" in request for request in fetched)
    assert sorted(path.name for path in Path().iterdir() if "model" in path.name) == ["model"]


def test_what_pull_refuses(verb, server, ran):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("do not overwrite")
    refused = verb("pull", f"--slug={SLUG}", "--to=mine")
    assert refused.code == 2 and "exists and was not pulled" in refused.err
    none = verb("pull", f"--slug={SLUG}", "--version=9")
    assert none.code == 2 and "Traceback" not in none.err
    ran.files["outputs/../../../escaped.txt"] = b"out"
    escape = verb("pull", f"--slug={SLUG}", "--to=a/b/c/model")
    assert escape.code == 2 and "would land outside" in escape.err
    assert not list(Path().rglob("escaped.txt")) and not Path("a/b/c/model").exists()
    server.kernels[SLUG].append(Version({}, states=["RUNNING"]))
    server.kernels[SLUG][0].files = {}
    assert "has no output to pull" in verb("pull", f"--slug={SLUG}").err
    assert "Would download" in verb("pull", f"--slug={SLUG}", "--dry_run").out


def test_publish(verb, server, trained, monkeypatch):
    result = verb("publish", str(trained), "--to=dataset:owner/my-run", "--dry_run")
    assert result.code == 0 and "Nothing was sent" in result.out, result.err
    assert "https://www.kaggle.com/datasets/owner/my-run" in result.out and server.requests == []
    for flags in ([], [str(trained)], ["--to=hub:a/b"]):
        refused = verb("publish", *flags)
        assert refused.code == 2 and "Allowed: DIRECTORY --to WHERE" in refused.err
    wrong = verb("publish", str(trained), "--to=s3:bucket", "--dry_run")
    assert wrong.code == 2 and "is not a place to publish to" in wrong.err
    sent = []
    monkeypatch.setattr(
        "jgpt.kaggle.session.publish.publish", lambda *arguments: sent.append(arguments) or "https://there"
    )
    assert verb("publish", str(trained), "--to=hub:me/gpt").out == "sent: https://there\n"
    assert sent == [(trained, "hub:me/gpt")]


def test_doctor(verb, server):
    def examines(version: Version, earlier: list[Version]) -> None:
        version.states, version.log = ["QUEUED", "RUNNING", "COMPLETE"], ["looking\n"]
        version.files = {"doctor.json": json.dumps({"jax": "0.7.2", "gpu": {"name": "Tesla T4"}}).encode()}
        if earlier:
            version.files = {}

    server.on_save = examines
    result = verb("doctor", "--slug=owner/jgpt-doctor")
    assert result.code == 0, result.err
    assert "version 1: RUNNING" in result.out and "  jax  0.7.2" in result.out and "  gpu  name Tesla T4" in result.out
    path = Path("runs/kaggle/owner-jgpt-doctor/doctor-1.json")
    assert f"{path} is written" in result.out and json.loads(path.read_text())["jax"] == "0.7.2"
    assert (
        "module='jgpt.kaggle.session.doctor'" in server.kernels["owner/jgpt-doctor"][0].request["text"].splitlines()[-1]
    )
    nothing = verb("doctor", "--slug=owner/jgpt-doctor")
    assert nothing.code == 2 and "left no doctor.json" in nothing.err and "looking" in nothing.out
    assert "Nothing was sent" in verb("doctor", "--slug=owner/jgpt-doctor", "--dry_run").out


def test_no_token_and_no_package(verb, server, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "a-token-that-is-wrong")
    result = verb("status", f"--slug={SLUG}")
    assert result.code == 2 and "https://www.kaggle.com/settings/api" in result.err
    assert "a-token-that-is-wrong" not in result.err + result.out
    monkeypatch.setitem(sys.modules, "kaggle", None)
    result = verb("status", f"--slug={SLUG}")
    assert result.code == 2 and "pip install 'jgpt[kaggle]'" in result.err


def test_as_a_program(server):
    """What `python -m jgpt.kaggle` does that a call in this process does not: the package is imported anew."""
    program = (
        "from kagglesdk.kaggle_env import KaggleEnv, _env_to_endpoint\n"
        f"_env_to_endpoint[KaggleEnv.PROD] = {server.url!r}\n"
        f"import sys; sys.argv = ['jgpt-kaggle', 'status', '--slug={SLUG}']\n"
        "from jgpt.kaggle.__main__ import entry; entry()"
    )
    command = [sys.executable, "-c", program]
    server.kernels[SLUG] = [Version({}, states=["RUNNING"])]
    environment = os.environ | {"VERBOSE": "1"}  # the package would print its requests, token included
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("version 1: RUNNING")
    assert server.token not in result.stdout + result.stderr and SIGNATURE not in result.stdout + result.stderr
    environment["KAGGLE_API_TOKEN"] = ""
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stdout == "" and "no Kaggle token was found" in result.stderr
