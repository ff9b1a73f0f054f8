"""Checkpoints: the whole training state on disk, saved in the background, verified before it is trusted.

In the data path: from the step to the run directory, and back. Orbax writes the arrays to checkpoints/STEP/; when it is
done, a sha256 manifest STEP.sha256 is written beside it (`sha256sum -c` reads it). Orbax does not notice a flipped bit
and lists half-written steps, so a step counts as whole only when its manifest is there and every file in it agrees.

Of several processes each writes its part of the arrays. Process 0 does all the rest: it judges, makes room, deletes,
and writes the manifest of all parts.
"""

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jgpt.atomic_write import write_file
from jgpt.errors import UserError
from jgpt.parallel.hosts import comes_from_others, first_decides, get_text, is_first, n_processes, put_text
from jgpt.run_dir.disk import cannot_write, check_room, remove_unfinished, room, silence_orbax
from jgpt.run_dir.manifest import digest, read_meta, steps_without_manifest, val_loss_of, verify, whole_steps
from jgpt.step.state import TrainState, tree_bytes

DELETED = ".deleted-"  # the start of the name of a step that is being deleted
SAVE_BYTES_PER_SECOND = 50e6  # until a save was timed: a slow disk, which is written, and read again for the manifest
log = logging.getLogger("jgpt")


class Checkpoints:
    """The checkpoints of one run directory. `keep_last` whole ones are kept, and the best one where `keep_best`.

    `keep_steps` are steps whose checkpoints are kept too. `disk_gb`, above 0, is what the run directory may hold in GB.
    `on_saved(run directory, step)` is called once a checkpoint is whole, in the thread that finished it; the next save
    waits for it, and it must not raise.
    """

    def __init__(
        self,
        run_dir: Path,
        keep_last: int,
        keep_best: bool,
        disk_gb: float = 0.0,
        on_saved: Callable[[Path, int], None] | None = None,
        keep_steps: Collection[int] = (),
    ) -> None:
        self.directory = run_dir.absolute() / "checkpoints"
        self.keep_last, self.keep_best, self.disk_gb = keep_last, keep_best, disk_gb
        self.keep_steps = frozenset(keep_steps)
        self.save_seconds = 0.0  # the longest so far, for the deadline
        self._on_saved = on_saved
        self._finishing: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed = False  # a save failed, and it was said
        self._damaged: set[int] = set()  # steps that restore passed over: in the way of what is saved from now on
        silence_orbax()
        if is_first():
            for leftover in self.directory.glob(f"{DELETED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("params", "training", "meta")
        )

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Begin to save `state` (arrays that nothing else will change) with `meta` (JSON), and return.

        Waits for the save before this one, and deletes old ones where this one would not fit beside them. Raises
        UserError if the one before failed (a full disk), or this one would exceed `disk_gb`.
        """
        self.wait()
        step, started = int(state.step), time.monotonic()
        try:
            name = first_decides(lambda: self._make_ready(step, tree_bytes(state)))
            if not name:
                return
            if not is_first():
                self._damaged.discard(step)
                self._manager.reload()  # process 0 may have deleted some
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),  # pyright: ignore[reportCallIssue]
                    training=ocp.args.StandardSave(state._replace(params={})._asdict()),  # pyright: ignore[reportCallIssue]
                    meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
                ),
                force=True,
            )
        except UserError:  # no room in the budget
            raise
        except Exception as error:  # a disk can be full before the background has begun
            self._error = error
            self.wait()
        self._finishing = threading.Thread(target=self._finish, args=(step, started, name), name=f"save {step}")
        self._finishing.start()

    def _make_ready(self, step: int, n_bytes: int) -> str:
        """Make room for a step of so many bytes; return a name for this save, "" where the step is saved already."""
        if step in self.steps() and step not in self._damaged:
            return ""
        self._make_room(n_bytes)
        self._delete(step)  # a save that was cut off before its manifest, or a damaged one
        return f"saved-{step}-{time.time_ns()}"

    def _finish(self, step: int, started: float, name: str) -> None:
        try:
            self._manager.wait_until_finished()  # until the parts of all processes are written
            if is_first():
                write_file(self.manifest(step), digest(self.directory / str(step)))
                self._prune()
                if n_processes() > 1:
                    put_text(name, "")
            else:
                get_text(name)
            self.save_seconds = max(self.save_seconds, time.monotonic() - started)
        except Exception as error:  # `wait` raises it, in the thread that saves or waits next
            self._error = error
            return
        if self._on_saved is not None and is_first():
            self._on_saved(self.directory.parent, step)

    def expected_seconds(self, n_bytes: int) -> float:
        """Return the most seconds that a save of so many bytes may take: the longest so far or, before one, a guess."""
        return self.save_seconds or n_bytes / SAVE_BYTES_PER_SECOND

    def wait(self) -> None:
        """Wait until the save under way is whole on disk; raise UserError if it failed."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._error is not None:
            error, self._error, self._failed = self._error, None, True
            remove_unfinished(self.directory)
            if isinstance(error, MemoryError) or comes_from_others(error):
                raise error
            raise UserError(
                f"{cannot_write(self.directory, error)} Earlier checkpoints are whole. Make room (a smaller"
                " --config.checkpoint.keep_last, another --config.out_dir), then run the same command again."
            ) from error

    def close(self) -> None:
        """Wait for the save under way and let go of the directory."""
        try:
            self.wait()
        finally:
            try:
                self._manager.close()
            except Exception:  # Orbax raises the error of a failed save again, which `wait` has raised before
                if not self._failed:
                    raise
            if self._failed:  # what its threads still wrote
                remove_unfinished(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close. Where the block ended by an error, a save that failed as well is a warning: the first one counts."""
        try:
            self.close()
        except Exception as second:
            if error is None:
                raise
            log.warning("%s", second)

    def manifest(self, step: int) -> Path:
        """Return where a step's manifest is."""
        return self.directory / f"{step}.sha256"

    def pass_over(self, steps: Iterable[int]) -> None:
        """Do not restore these steps; they stay until the next save is whole."""
        self._damaged.update(steps)

    def steps(self) -> list[int]:
        """List the steps that have a manifest, oldest first."""
        return whole_steps(self.directory)

    def _prune(self) -> None:
        steps = [step for step in self.steps() if step not in self._damaged]
        keep = {*steps[-self.keep_last :], *self._best(steps), *self.keep_steps.intersection(steps)}
        for step in {*self.steps(), *self._cut_off(), *self._damaged} - keep:
            self._delete(step)

    def _cut_off(self) -> list[int]:
        """Return the step that a killed process left without a manifest; where there are more, nobody judged them."""
        without = steps_without_manifest(self.directory)
        return without if len(without) == 1 else []

    def _best(self, steps: list[int]) -> list[int]:
        """Return the one of these steps that `keep_best` keeps, where there is one."""
        losses = {step: val_loss_of(self.directory, step) for step in steps} if self.keep_best else {}
        best = min(losses, key=lambda step: losses[step], default=None)
        return [best] if best is not None and losses[best] < math.inf else []

    def _make_room(self, n_bytes: int) -> None:
        """Delete, while a save of so many bytes would not fit: what is not whole, then the oldest, last the best one.

        The newest whole one always stays, and what was not judged.
        """
        whole = [step for step in self.steps() if step not in self._damaged]
        spare = sorted({*self._cut_off(), *self._damaged}) + whole[:-1]
        best = {*self._best(whole), *self.keep_steps}
        spare.sort(key=lambda step: (step in whole, step in best))
        run_dir = self.directory.parent
        for step in spare:
            if room(run_dir, self.disk_gb) >= n_bytes:
                return
            log.info("checkpoint %d is deleted before its time: the next one needs its room", step)
            self._delete(step)
        check_room(run_dir, n_bytes, self.disk_gb)

    def _delete(self, step: int) -> None:
        path, manifest = self.directory / str(step), self.manifest(step)
        if path.exists():  # renamed first: a half-deleted step is never taken for a step
            gone = path.rename(self.directory / f"{DELETED}{step}")
            shutil.rmtree(gone)
            self._manager.reload()
        if manifest.is_dir() and not manifest.is_symlink():
            shutil.rmtree(manifest)
        else:
            manifest.unlink(missing_ok=True)
        self._damaged.discard(step)

    def restore(self, abstract: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Return the newest whole state and its meta; None when there is no checkpoint at all.

        `abstract` are its shapes, `shardings` say where each of its arrays is to lie.

        A damaged one is named and passed over. Raises UserError when there are some and none is whole, and when the
        newest whole one is of another model.
        """
        placed = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract, shardings
        )
        step = first_decides(self._newest_whole)
        if step is None:
            return None
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(placed.params),  # pyright: ignore[reportCallIssue]
            training=ocp.args.StandardRestore(placed._replace(params={})._asdict()),  # pyright: ignore[reportCallIssue]
        )
        try:
            restored = self._manager.restore(step, args=args)
        except ValueError as error:  # its files are what was saved, so they were saved for other shapes
            raise UserError(
                f"checkpoint {step} in {self.directory} does not fit the model that config.json and the tokenizer"
                f" of its run describe: {str(error).splitlines()[0][:200]} Put back the files that the run wrote,"
                " or set another --config.out_dir. Its checkpoints were not changed."
            ) from error
        state = TrainState(**restored.training)._replace(params=restored.params)
        return state, read_meta(self.directory, step)

    def _newest_whole(self) -> int | None:
        """Return the newest step whose files are those of its manifest; None where there is no checkpoint at all."""
        for step in self._cut_off():
            log.warning("checkpoint %d has no manifest: it was cut off while it was saved, and is passed over", step)
        steps = self.steps()
        for step in [step for step in reversed(steps) if step not in self._damaged]:
            damage = verify(self.directory, step)
            if not damage:
                return step
            log.warning("checkpoint %d is damaged and passed over: %s", step, damage)
            self._damaged.add(step)
        if steps:
            raise UserError(
                f"{self.directory} holds checkpoints, and none is whole. Nothing was changed. Allowed: a run directory "
                "with a whole checkpoint, or a new one. Copy an undamaged checkpoint there, or take another "
                "--config.out_dir."
            )
        return None
