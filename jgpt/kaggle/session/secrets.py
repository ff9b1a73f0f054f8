"""Get the user's Hugging Face token from Kaggle's secrets (Add-ons > Secrets, label HF_TOKEN).

Beside the data path: commands call it before they load a model by its name.
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
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ or "HF_TOKEN" in os.environ or not is_hub_name(name):
        return
    try:
        secrets = importlib.import_module("kaggle_secrets")
        os.environ["HF_TOKEN"] = secrets.UserSecretsClient().get_secret("HF_TOKEN")
    except Exception as error:  # no such secret, or no internet; public models need no token
        log.debug("no HF_TOKEN among Kaggle's secrets (%s)", type(error).__name__)
