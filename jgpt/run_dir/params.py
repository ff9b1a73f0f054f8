"""Parameters alone, in and out of a checkpoint.

Beside the data path: what `loading/` reads a run's model with, and an import writes.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jgpt.atomic_write import write_file
from jgpt.errors import UserError
from jgpt.model.parameters import PlaceParam, path_names
from jgpt.run_dir.disk import cannot_write, remove_unfinished, silence_orbax
from jgpt.run_dir.manifest import check_whole, digest, verify


def save_params(directory: Path, step: int, params: Any, meta: dict[str, Any]) -> None:
    """Write a checkpoint of parameters alone (numpy arrays) and its `meta` (JSON): one to begin from, not to go on.

    Raises UserError where it cannot be written (a full disk); nothing of it is left then.
    """
    args = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))  # pyright: ignore[reportCallIssue]
    silence_orbax()
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(directory / str(step), args=args, force=True)
        write_file(directory / f"{step}.sha256", digest(directory / str(step)))
    except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
        remove_unfinished(directory)
        raise UserError(f"{cannot_write(directory, error)} Make room, then run the same command again.") from error


def restore_params(directory: Path, step: int, abstract: Any, place: PlaceParam) -> Any:
    """Restore the parameters of a step alone, verified, in the dtypes of `abstract`.

    Each goes through `place(path, array)`, `path` its keys in the tree; no more than one layer waits on the host.
    Raises UserError where the step is damaged, or its parameters have other shapes.
    """
    check_whole(directory, step, verify(directory, step))
    _check_shapes(directory, step, abstract)
    restored = {}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for name in abstract:
            layer = {name: abstract[name]}
            as_numpy = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), layer)
            args = ocp.args.PyTreeRestore(item=layer, restore_args=as_numpy, partial_restore=True)  # pyright: ignore[reportCallIssue]
            arrays = checkpointer.restore(directory / str(step) / "params", args=args)
            restored |= jax.tree_util.tree_map_with_path(lambda path, x: place(path_names(path), x), arrays)
    return restored


def _check_shapes(directory: Path, step: int, wanted: Any) -> None:
    """Refuse parameters of other shapes than the run's config.json says; Orbax would pass over what is missing."""
    stored = ocp.PyTreeCheckpointHandler().metadata(directory / str(step) / "params").tree
    found, expected = (
        {"/".join(path_names(path)): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (stored, wanted)
    )
    differ = [
        f"{name} {found.get(name, 'missing')} where config.json describes {expected.get(name, 'none')}"
        for name in sorted(found | expected)
        if found.get(name) != expected.get(name)
    ]
    if differ:
        raise UserError(
            f"checkpoint {step} in {directory} holds another model than the config.json of the run:"
            f" {'; '.join(differ[:3])}. They must be of one run. Put back the config.json that the run wrote."
        )
