"""Two CPU devices for every test, and no silent rank promotion; the commands, and one small trained run."""

import atexit
import contextlib
import importlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import jax
import pytest
from absl import flags
from fake_kaggle import FakeKaggle, reach
from fake_machine import python_without
from fsspec.implementations.memory import MemoryFileSystem
from server import Server, learn_by_heart, serving

from jgpt.file_lock import hold

# A shell starts what runs in the background (nohup, &) with these ignored, and so would be what the tests start.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _default)

jax.config.update("jax_num_cpu_devices", 2)  # before any test touches a device
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is most of what the tests do. Few optimizations halve it, and what one test, worker or program of the
# session compiled is read by the others. Programs that tests start must agree with this process bit for bit, so they
# get the same settings.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest-xdist's workers have that of the process that started them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jgpt-tests-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
COMPILING: dict[str, Any] = {
    "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_disable_most_optimizations": True,
}
for _name, _value in COMPILING.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)
if jax.__version_info__ <= (0, 7, 2):  # its way to compile fused loops takes four times as long; later versions lack it
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# 1,289 characters and an end-of-text token: 1,161 tokens to train on, and for validation 8 blocks of 16 and one.
TEXT = ("".join(f"{n} times {n} is {n * n}, says the table.\n" for n in range(99)))[:1289]

# What a run that starts from another model, with its tokenizer, sets; and one that trains adapters only.
FROM_A_MODEL = ["--config.tokenizer.kind=bpe"]
LORA = ["--config.lora.rank=2", "--config.optimizer.learning_rate=0.1"]


@dataclass
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """An empty bucket, at memory://."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


# Every program on CPU maps memory, and a process may have 65,530 maps (vm.max_map_count).
MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_let_go() -> Iterator[None]:
    """After a file, where there are many of them: what later files compile again costs a tenth of the whole time."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def traced_alone() -> Iterator[None]:
    """Share nothing that JAX has traced or compiled with other files, where a file changes what would be the same."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimized(traced_alone: None) -> Iterator[None]:
    """Compile as a user's process does, where a test judges what was compiled."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def command() -> Command:
    """Run a command as `python -m jgpt.NAME` would, in this process: command("train", "--config=...", stdin="")."""
    return _run


def _run(name: Any, *arguments: str, stdin: str | bytes = "") -> Result:
    from jgpt.cli import flags as cli_flags
    from jgpt.cli import run as cli_run

    module = importlib.import_module(f"jgpt.{name}") if isinstance(name, str) else name
    raw = stdin.encode() if isinstance(stdin, str) else stdin
    out, err = io.StringIO(), io.StringIO()
    with own_process_state(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", [str(module.__file__), *arguments]):
            with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw))):
                with pytest.raises(SystemExit) as exit:
                    if hasattr(module, "entry"):  # a command with verbs, each with flags of its own
                        module.entry()
                    getattr(module, "define_flags", cli_flags.define_config)()
                    cli_run.run(module.main, module.__doc__)
    assert isinstance(exit.value.code, int)
    return Result(exit.value.code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """Put back what a command changes in its process: flags, the log of jgpt, the environment."""
    from jgpt.cli import run as cli_run

    log, names = logging.getLogger("jgpt"), set(flags.FLAGS)
    before = log.handlers[:], log.level, log.propagate
    try:
        with mock.patch.dict(os.environ), jax.numpy_rank_promotion("allow"):  # as a user's process has it
            yield
    finally:
        log.handlers[:], log.propagate = before[0], before[2]
        log.setLevel(before[1])
        atexit.unregister(cli_run.exit_at_once)  # of a command that was interrupted
        for name in set(flags.FLAGS) - names:
            delattr(flags.FLAGS, name)
        sys.modules.pop("config_config", None)  # the config file, as ml_collections calls it
        flags.FLAGS.unparse_flags()


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKaggle]:
    """Return a Kaggle on this machine that the real package talks to, and nobody waits for."""
    with FakeKaggle() as server:
        reach(server, monkeypatch, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", server.slept.append)
        yield server


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return the arguments of a run that takes a second: a small text, a small model, 4 steps, in `tmp_path`/run."""
    return small_run(tmp_path)


def small_run(root: Path) -> list[str]:
    """Return the same in the folder `root`."""
    (root / "text.txt").write_text(TEXT)
    config = {
        "out_dir": root / "run", "log_every_steps": 1, "data.text_glob": root / "text.txt", "tokenizer.kind": "char",
        "model.n_layers": 1, "model.n_heads": 2, "model.d_model": 16, "model.context_length": 16,
        "optimizer.total_steps": 4, "optimizer.warmup_steps": 1, "batch.global_batch_size": 4,
        "execution.micro_batch_size": 2, "eval.every_steps": 2, "sample.max_new_tokens": 4, "checkpoint.every_steps": 2,
    }  # fmt: skip
    base = Path(__file__).parent / "defaults.py"
    return [f"--config={base}", *(f"--config.{key}={value}" for key, value in config.items())]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train that run once for all tests; they only read what it wrote (see `own_run` for a copy)."""
    root = tmp_path_factory.mktemp("trained")
    result = _run("train", *small_run(root))
    assert result.code == 0, result.err
    return root / "run"


@pytest.fixture(scope="session")
def adapted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train adapters to a copy of the trained run, once for all tests; return the folder of both, `base` and `run`."""
    root = tmp_path_factory.mktemp("adapted")
    base = shutil.copytree(trained, root / "base")
    result = _run("train", *small_run(root), *FROM_A_MODEL, *LORA, f"--config.init_from={base}")
    assert result.code == 0, result.err
    return root


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a chat model that knows a few conversations by heart (tests/serve/server.py).

    One worker trains it, and another that needs it waits; the tests only read it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "parrot"
    with hold(root, wait_for="training"):
        if not (root / "is_whole").exists():
            with own_process_state():
                learn_by_heart(root)
            (root / "is_whole").touch()
    return root / "parrot"


@pytest.fixture(scope="session")
def server(parrot: Path) -> Iterator[Server]:
    """Return a server of that model: 4 texts are written at a time, 8 wait."""
    with serving(parrot, "--rows=4", "--queue=8") as found:
        yield found


@pytest.fixture(scope="session")
def python_without_ml_collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python with all packages of this one but ml_collections and jgpt: Kaggle's image has neither."""
    return python_without(("ml_collections", "jgpt"), tmp_path_factory.mktemp("python") / "venv")


@pytest.fixture(scope="session")
def compiled_on_kaggle() -> Path:
    """Return the directory of compiled programs, for the sessions on an imitated Kaggle."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture
def own_run(trained: Path, tmp_path: Path, tiny: list[str]) -> Path:
    """Return a copy of the trained run, where the arguments of `tiny` put theirs."""
    shutil.copytree(trained.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"
