"""Everything runs offline and on the CPU, on a tiny random model that is made once a session."""

import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), "trl-capo-tests"))
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models are too small for more, and processes share the cores

from pathlib import Path

import pytest

from tests.fake_hub import running_hub
from tests.helpers import save_tiny_model


# A failing assert of these modules shows its values, as one in a test module does.
pytest.register_assert_rewrite("tests.trainer.runs", "tests.publish.pushed")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a two-layer random Qwen2 with a character tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture
def repositories(tmp_path, monkeypatch) -> Path:
    """The folder of `TRL_CAPO_DATA`, with a small local repository for each dataset of the catalogue."""
    from tests.data.standins import make_repositories

    monkeypatch.setenv("TRL_CAPO_DATA", str(tmp_path / "data"))
    return make_repositories(tmp_path / "data")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the client in this process talks to. Waits between attempts are counted, not waited for."""
    from transformers.utils import hub as transformers_hub

    with running_hub() as hub:
        for name, value in (("ENDPOINT", hub.endpoint), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # it would keep the endpoint of another test
        hub.waits = []
        monkeypatch.setattr("trl_capo.publish.push.sleep", hub.waits.append)
        yield hub
