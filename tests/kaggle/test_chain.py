"""chain and resume: one run in several sessions of a Kaggle on this machine, whose outputs advance as real ones do."""

import json
import re

import pytest
from fake_kaggle import FakeKaggle, Fault, Version

from jgpt.kaggle.laptop.progress import LOOK_BACK

SLUG = "owner/my-gpt"
CONFIG = ["--config=configs/base.py", "--config.optimizer.total_steps=1000", "--config.deadline_hours=11"]
STEPS, HOURS = 400, 4.0  # what a session trains
TIMED_OUT = "Your notebook was stopped because it exceeded the max allowed execution duration."


def output(step: int, state: str = "", reason: str = "the deadline") -> dict[str, bytes]:
    """Return what a session leaves that has come to `step`."""
    state = state or ("finished" if step >= 1000 else "stopped")
    status = {"state": state, "step": step, "total_steps": 1000, "reason": "" if state == "finished" else reason}
    metrics = json.dumps({"step": step, "elapsed_seconds": step / STEPS * HOURS * 3600}) + '\n{"step": 1'
    return {"outputs/status.json": json.dumps(status).encode(), "outputs/metrics.jsonl": metrics.encode()}


def trains(version: Version, earlier: list[Version]) -> None:
    """Go on, as the machine there does, from the newest output where that is an input."""
    step = 0
    if SLUG in version.request.get("kernelDataSources", []):
        outputs = [v.files["outputs/status.json"] for v in earlier if v.files]
        step = json.loads(outputs[-1])["step"] if outputs else 0
    step = min(step + STEPS, 1000)
    version.states = ["QUEUED", "QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    version.files, version.log = output(step), [f"step {step}\n"]


@pytest.fixture
def server(kaggle: FakeKaggle, tmp_path, monkeypatch) -> FakeKaggle:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("from jgpt.config import default_config as get_config\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "jgpt.kaggle.laptop.kernel.PROJECT", tmp_path
    )  # nothing runs: half a second less for each version
    kaggle.on_save = trains
    return kaggle


def lines(result) -> list[str]:
    """Return what was printed, without the times of day."""
    return [re.sub(r"^\d\d:\d\d  ", "", line) for line in result.out.splitlines()]


def sources(server: FakeKaggle) -> list[bool]:
    """Tell for each version whether it had its own output as an input."""
    return [SLUG in v.request.get("kernelDataSources", []) for v in server.kernels[SLUG]]


def run_arguments(version: Version) -> str:
    """Return the command in the head of a script."""
    return version.request["text"].split("\n")[0]


@pytest.fixture
def chain(command, server):
    return lambda *flags: command("kaggle.__main__", "chain", f"--slug={SLUG}", "--hours=40", *flags)


def test_a_run_in_three_sessions(chain, server):
    result = chain(*CONFIG)
    assert result.code == 0, result.err
    url = f"https://www.kaggle.com/code/{SLUG}"
    assert lines(result) == [
        f"version 1: pushed, starts from step 0. {url}",
        "version 1: QUEUED",
        "version 1: RUNNING",
        "version 1: COMPLETE",
        "version 1: stopped (the deadline) at step 400 of 1,000",
        f"version 2: pushed, continues from step 400. {url}",
        "version 2: QUEUED",
        "version 2: RUNNING",
        "version 2: COMPLETE",
        "version 2: stopped (the deadline) at step 800 of 1,000",
        f"version 3: pushed, continues from step 800. {url}",
        "version 3: QUEUED",
        "version 3: RUNNING",
        "version 3: COMPLETE",
        "version 3: finished at step 1,000 of 1,000",
        f"finished. To have the model here: python -m jgpt.kaggle pull --slug {SLUG}",
    ]
    assert sources(server) == [False, True, True] and set(server.slept) == {60.0}
    first, second, _ = server.kernels[SLUG]
    assert "resume=must" not in run_arguments(first) and "resume=must" in run_arguments(second)
    assert "deadline_hours=11" in run_arguments(second)
    again = chain()
    assert again.code == 0 and len(server.kernels[SLUG]) == 3 and "finished" in again.out


@pytest.mark.parametrize(
    "flags, hours",
    [
        ([], "40.00"),
        (["--hours=11.2"], "11.00"),  # the last 0.2 would be no session
        (["--config.optimizer.budget_hours=30"], "30.00"),
    ],
)
def test_the_chains_hours_are_those_of_a_run_that_leaves_its_steps_open(chain, server, flags, hours):
    result = chain(CONFIG[0], "--config.optimizer.total_steps=auto", *flags)
    assert result.code == 0 and "finished at step 1,000" in result.out, result.err
    for version in server.kernels[SLUG]:
        assert run_arguments(version).count("budget_hours") >= 1
        assert f"--config.optimizer.budget_hours={hours}" in run_arguments(version)


@pytest.mark.parametrize("polls", range(1, 10))
def test_interrupted_anywhere_and_started_again(chain, server, polls, monkeypatch):
    def interrupt(seconds: float) -> None:
        server.slept.append(seconds)
        if len(server.slept) == polls:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    first = chain(*CONFIG)
    assert first.code == 130 and "The run on Kaggle continues. The same command waits for it again." in first.out
    assert "interrupted" in first.err
    second = chain()
    assert second.code == 0, second.err
    assert sources(server) == [False, True, True]
    assert json.loads(server.kernels[SLUG][-1].files["outputs/status.json"])["step"] == 1000


def test_more_steps_than_it_finished_with(chain, command, server):
    assert chain(*CONFIG).code == 0
    refused = command("kaggle.__main__", "resume", f"--slug={SLUG}")
    assert refused.code == 2 and "is finished: version 3: finished at step 1,000 of 1,000" in refused.err
    more = [CONFIG[0], "--config.optimizer.total_steps=2000"]
    assert command("kaggle.__main__", "resume", f"--slug={SLUG}", *more).code == 0
    assert sources(server)[3] and "total_steps=2000" in run_arguments(server.kernels[SLUG][3])


@pytest.mark.parametrize(
    ("states", "files", "failure", "parts"),
    [
        (["RUNNING", "ERROR"], {}, "more memory than is available.", ["Kaggle says: more memory than is available."]),
        (["RUNNING", "COMPLETE"], output(7, "failed", "TrainingDiverged: nan"), "", ["failed: TrainingDiverged: nan"]),
        (["RUNNING", "COMPLETE"], {}, "", ["it left no status.json"]),
    ],
)
def test_a_run_that_failed_ends_it_with_the_end_of_the_log(chain, server, states, files, failure, parts):
    def fails(version: Version, earlier: list[Version]) -> None:
        version.states, version.files, version.failure = list(states), files, failure
        version.log = [f"line {i}\n" for i in range(50)]

    server.on_save = fails
    for flags in (CONFIG, []):  # started again it says so again, and starts nothing
        result = chain(*flags)
        assert result.code == 2 and "Traceback" not in result.err, result.err
        for part in [*parts, "version 1 of owner/my-gpt failed", "    line 30\n", "    line 49\n", "resume --slug"]:
            assert part in result.err, result.err
        assert "line 29" not in result.err and len(server.kernels[SLUG]) == 1


def test_a_session_whose_output_was_lost(chain, server):
    def second_is_cut_off(version: Version, earlier: list[Version]) -> None:
        trains(version, earlier)
        if len(earlier) == 1:
            version.states, version.files, version.failure = ["RUNNING", "CANCEL_ACKNOWLEDGED"], {}, TIMED_OUT

    server.on_save = second_is_cut_off
    result = chain(*CONFIG)
    assert result.code == 2 and "it came no further than step 400, where it started" in result.err
    assert "version 2 left no output: going back to version 1: stopped (the deadline) at step 400" in result.out
    again = chain()  # the user has read that
    assert again.code == 0 and "version 3: pushed, continues from step 400" in again.out
    assert len(server.kernels[SLUG]) == 4


def test_nothing_is_left_of_the_first_session(chain, server):
    def first_is_cut_off(version: Version, earlier: list[Version]) -> None:
        trains(version, earlier)
        if not earlier:
            version.states, version.files, version.failure = ["RUNNING", "CANCEL_ACKNOWLEDGED"], {}, TIMED_OUT

    server.on_save = first_is_cut_off
    result = chain(*CONFIG)
    assert result.code == 2 and "version 1 of owner/my-gpt failed: it left no status.json" in result.err
    again = chain()  # the user has read that
    assert again.code == 0, again.err
    assert "version 1 left no output, and no version before it did" in again.out
    assert sources(server) == [False, False, True, True]


def test_someone_cancels_it(chain, server):
    def cancelled(version: Version, earlier: list[Version]) -> None:
        trains(version, earlier)
        version.states = ["RUNNING", "CANCEL_ACKNOWLEDGED"]

    server.on_save = cancelled
    result = chain(*CONFIG)
    assert result.code == 2 and "version 1 of owner/my-gpt was cancelled" in result.err
    server.on_save = trains
    assert chain().code == 0 and sources(server) == [False, True, True]  # asked for again, it goes on


def test_the_quota_is_spent(chain, server):
    server.used_hours = 26.5

    def uses_hours(version: Version, earlier: list[Version]) -> None:
        trains(version, earlier)
        server.used_hours += 3.3

    server.on_save = uses_hours
    result = chain(*CONFIG)
    assert result.code == 0, result.err
    assert "stopping here. GPU hours: 29.8 of this week's 30 used, 0.2 left; filled up again on Saturday" in result.out
    assert len(server.kernels[SLUG]) == 1
    # Brought forward to what is left, or Kaggle would cut it off.
    assert run_arguments(server.kernels[SLUG][0]).endswith("--config.deadline_hours=3.25")


def test_the_hours_are_spent(chain, server):
    result = chain(*CONFIG, "--hours=6")
    assert result.code == 0, result.err
    assert "stopping here: 8.0 of --hours=6 are trained" in result.out
    versions = server.kernels[SLUG]
    assert [run_arguments(v).split("deadline_hours=")[-1] for v in versions] == ["6.00", "2.00"]
    assert chain(*CONFIG, "--hours=6").code == 0 and len(versions) == 2


def test_a_bad_line_on_the_way(chain, server):
    server.faults = [
        Fault("GetKernelSessionStatus", 503),
        Fault("GetKernelSessionStatus", drop_after=0),
        Fault("SaveKernel", drop_after=0),
        Fault("ListKernelSessionOutput", 429, {}, {"Retry-After": "30"}),
        Fault("status.json", drop_after=5),
    ]
    result = chain(*CONFIG)
    assert result.code == 0, result.err
    assert sources(server) == [False, True, True] and server.faults == [] and 30.0 in server.slept


def test_resume(command, server):
    resume = ["kaggle.__main__", "resume", f"--slug={SLUG}"]
    unknown = command(*resume)
    assert unknown.code == 2 and "holds no kernel" in unknown.err and "--config=FILE" in unknown.err
    assert command("kaggle.__main__", "push", f"--slug={SLUG}", *CONFIG, "--internet").code == 0
    running = command(*resume)
    assert running.code == 2 and "version 1 of owner/my-gpt is QUEUED" in running.err
    server.kernels[SLUG][0].states = ["COMPLETE"]
    result = command(*resume)
    assert result.code == 0, result.err
    assert "continuing from version 1: stopped (the deadline) at step 400 of 1,000" in result.out
    sent = server.kernels[SLUG][1].request
    assert sent["kernelDataSources"] == [SLUG] and sent["enableInternet"] is True
    server.kernels[SLUG][1].states = ["COMPLETE"]
    server.kernels[SLUG][1].files["outputs/status.json"] = b"not json"
    broken = command(*resume)
    assert broken.code == 2 and "status.json of owner/my-gpt version 2 cannot be read" in broken.err


def test_resume_when_all_was_lost(command, server):
    assert command("kaggle.__main__", "push", f"--slug={SLUG}", *CONFIG).code == 0
    server.kernels[SLUG][0].states, server.kernels[SLUG][0].files = ["ERROR"], {}
    server.kernels[SLUG] *= 2 * LOOK_BACK
    result = command("kaggle.__main__", "resume", f"--slug={SLUG}")
    assert result.code == 2 and "no version of owner/my-gpt has an output to continue from" in result.err
    assert sum("ListKernelSessionOutput" in request for request in server.requests) == LOOK_BACK


def test_dry_runs_contact_nobody(command, server):
    for verb, flags in (("chain", ["--hours=3"]), ("resume", [])):
        result = command("kaggle.__main__", verb, f"--slug={SLUG}", *CONFIG, *flags, "--dry_run")
        assert result.code == 0 and "Nothing was sent" in result.out, result.err
    assert f'"kernel_sources": [\n    "{SLUG}"' in result.out and "--config.checkpoint.resume=must" in result.out
    assert server.requests == []


def test_the_config_file_was_broken_since(command, server, tmp_path):
    assert command("kaggle.__main__", "push", f"--slug={SLUG}", *CONFIG).code == 0
    (tmp_path / "configs" / "base.py").write_text("def get_config(): raise KeyError('x')\n")
    result = command("kaggle.__main__", "resume", f"--slug={SLUG}")
    assert result.code == 2 and "cannot be read now" in result.err and "configs/base.py" in result.err
