"""The execution of a step: the keys of a config that change its memory and speed and, but for rounding, no result.

Beside the data path: a search tries several, and the fastest that fits is put into the config.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict


class Execution(NamedTuple):
    """The keys of `config.execution` that are searched."""

    micro_batch_size: int
    remat: str
    loss_chunk_tokens: int
    attention: str
    gather: str = "auto"  # see planning/gather.py

    def put_into(self, config: ConfigDict) -> ConfigDict:
        """Return a copy of a config with these values."""
        config = config.copy_and_resolve_references()
        config.execution.update(self._asdict())
        return config.lock()

    def overrides(self) -> dict[str, Any]:
        """Return the values by their keys in a config; of `gather` only what a default would not choose first."""
        values = {f"execution.{key}": value for key, value in self._asdict().items()}
        return values if self.gather == "layer" else {key: values[key] for key in values if key != "execution.gather"}

    def described(self) -> str:
        """Say it in words."""
        chunk = f"loss in chunks of {self.loss_chunk_tokens}" if self.loss_chunk_tokens else "loss in one chunk"
        gather = ", gather layer" if self.gather == "layer" else ""
        return f"micro-batch {self.micro_batch_size}, remat {self.remat}, attention {self.attention}, {chunk}{gather}"

    def flags(self) -> str:
        """Return the values as a command line has them."""
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides().items())


def execution_of(config: ConfigDict) -> Execution:
    """Return what a config says."""
    e = config.execution
    return Execution(e.micro_batch_size, e.remat, e.loss_chunk_tokens, e.attention, e.gather)
