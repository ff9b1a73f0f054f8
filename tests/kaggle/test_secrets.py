"""The Hub's token from Kaggle's secrets: taken where it helps, and never shown."""

import os
import sys
from types import ModuleType

import pytest

from jgpt.kaggle.session.secrets import provide_hub_token, provide_wandb_key


class Client:
    """What Kaggle's image has as kaggle_secrets.UserSecretsClient."""

    labels: dict[str, str] = {}
    asked = 0

    def get_secret(self, label: str) -> str:
        Client.asked += 1
        if label not in self.labels:
            raise ConnectionError("no such secret, or no internet")
        return self.labels[label]


@pytest.fixture(autouse=True)
def kaggle(monkeypatch):
    module = ModuleType("kaggle_secrets")
    module.UserSecretsClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(Client, "labels", {"HF_TOKEN": "hf_of_kaggle"})
    monkeypatch.setattr(Client, "asked", 0)


def test_it_is_put_where_huggingface_hub_looks(caplog, capfd):
    caplog.set_level("DEBUG", "jgpt")
    provide_hub_token("owner/name")
    assert os.environ["HF_TOKEN"] == "hf_of_kaggle"
    shown = capfd.readouterr()
    assert "hf_of_kaggle" not in caplog.text + shown.out + shown.err


def test_a_token_that_is_set_stays(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "mine")
    provide_hub_token("owner/name")
    assert os.environ["HF_TOKEN"] == "mine" and Client.asked == 0


def test_nobody_is_asked_where_nothing_is_downloaded(tmp_path, monkeypatch):
    provide_hub_token(str(tmp_path))
    provide_hub_token("")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    provide_hub_token("owner/name")
    assert "HF_TOKEN" not in os.environ and Client.asked == 0


def test_no_secret_is_no_error(monkeypatch, caplog):
    caplog.set_level("INFO", "jgpt")
    monkeypatch.setattr(Client, "labels", {})
    provide_hub_token("owner/name")
    monkeypatch.setitem(sys.modules, "kaggle_secrets", None)  # an image without it
    provide_hub_token("owner/name")
    assert "HF_TOKEN" not in os.environ and caplog.text == ""


def test_the_key_of_weights_and_biases_comes_from_its_own_label(monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG", "jgpt")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setattr(Client, "labels", {"WANDB_API_KEY": "key_of_kaggle"})
    provide_wandb_key()
    assert os.environ["WANDB_API_KEY"] == "key_of_kaggle" and "HF_TOKEN" not in os.environ
    shown = capfd.readouterr()
    assert "key_of_kaggle" not in caplog.text + shown.out + shown.err
