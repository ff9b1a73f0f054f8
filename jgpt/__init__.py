"""Train, resume, fine-tune and run GPT language models in JAX on the hardware that people get for free.

The data path, which is also the architecture:

    files --corpus--> documents --tokenizer--> ids --memmap--> token files --batches--> [A, B, T]
      --model + optimizer, one pmap'd step--> state --checkpoint--> run directory
      --decode--> text        --exchange--> a Hugging Face model directory, and back

The first line is in `jgpt.data`; the second in `jgpt.model`, `jgpt.step`, `jgpt.parallel`, `jgpt.training` and
`jgpt.run_dir`; the third in `jgpt.loading`, `jgpt.inference` and `jgpt.exchange`. Every setting is in
`jgpt.config.defaults`. The commands (`jgpt --help`) are the files beside this one.

In Python: `model = jgpt.load("runs/mine")` and `jgpt.train(config)`, see `jgpt.api`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jgpt.errors import OutOfMemory, TrainingDiverged, UserError
from jgpt.version import __version__ as __version__

if TYPE_CHECKING:
    from jgpt.api import Model, TrainResult, load, train

__all__ = ["Model", "OutOfMemory", "TrainResult", "TrainingDiverged", "UserError", "load", "train"]


class _Package(ModuleType):
    """This package: the names of the API are imported when they are first used, as JAX takes seconds."""

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        import jgpt.api as api

        return getattr(api, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    @property
    def train(self) -> Any:
        """The function of the API. The command's file has the same name: Python would put its module here."""
        return self.__getattr__("train")

    @train.setter
    def train(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
