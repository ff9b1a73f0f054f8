"""The one line in `jgpt.train` that opens its session on Kaggle; on any other machine it changes nothing.

Beside the data path: before the loop it gets the inputs and the earlier run, during the loop it uploads checkpoints.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from jgpt.kaggle.session.limits import fit_to_kaggle
from jgpt.kaggle.session.paths import check_inputs, on_kaggle
from jgpt.kaggle.session.resume import restore_earlier_run, unpack_model
from jgpt.kaggle.session.secrets import provide_hub_token, provide_wandb_key
from jgpt.kaggle.session.uploads import Uploads
from jgpt.parallel.watch import together


@contextmanager
def open_session(config: ConfigDict) -> Iterator[tuple[ConfigDict, Callable[[Path, int], None]]]:
    """Yield the config as this machine allows it, and the function to call after each save (run directory, step).

    On Kaggle the inputs are checked and an earlier run is restored first. With `checkpoint.upload` set, checkpoints are
    uploaded while the block runs, and the last one when it ends, also by an error.

    Raises UserError when an input is not mounted, or when nothing can be uploaded from here.
    """
    for name in (config.init_from, config.tokenizer.pretrained, config.checkpoint.upload.removeprefix("hub:")):
        provide_hub_token(name)
    if config.logging.wandb:
        provide_wandb_key()
    with together():  # with several processes an error in one of them ends all
        uploads = Uploads(config.checkpoint)
        if on_kaggle():
            check_inputs()
            config.init_from = unpack_model(config.init_from)
        if on_kaggle() or config.checkpoint.upload:
            restore_earlier_run(config)
    with uploads:
        yield fit_to_kaggle(config), uploads.saved
