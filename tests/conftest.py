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

from tests.helpers import save_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a two-layer random Qwen2 with a character tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent
