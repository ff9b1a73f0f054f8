"""Get the user's keys from Kaggle's secrets (Add-ons > Secrets): the labels HF_TOKEN and WANDB_API_KEY.

Beside the data path: commands call it before they load a model by its name, and before they train.
"""

import importlib
import logging
import os

from jgpt.exchange.hub import is_hub_name

log = logging.getLogger("jgpt")


def provide_hub_token(name: str) -> None:
    """Set the variable HF_TOKEN, which huggingface_hub reads, if the model `name` may have to be downloaded.

    Only on Kaggle, where no token is set yet and the notebook has the secret. The token is never printed.
    """
    if is_hub_name(name):
        _provide("HF_TOKEN")


def provide_wandb_key() -> None:
    """Set the variable WANDB_API_KEY, which wandb reads; the same as for the token."""
    _provide("WANDB_API_KEY")


def _provide(label: str) -> None:
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ or label in os.environ:
        return
    try:
        secrets = importlib.import_module("kaggle_secrets")
        os.environ[label] = secrets.UserSecretsClient().get_secret(label)
    except Exception as error:  # no such secret, or no internet; public models need no token
        log.debug("no %s among Kaggle's secrets (%s)", label, type(error).__name__)
