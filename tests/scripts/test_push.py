"""`trl-capo push` as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_hub import running_hub
from tests.publish.pushed import assert_arrived, contents, save_run
from trl_capo.publish.hub import push_command


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return save_run(tiny_model, tmp_path / "capo")


@pytest.mark.parametrize("private", [False, True])
def test_command_in_a_process_of_its_own(model, private):
    """Nothing is patched: HF_ENDPOINT and the token are in the environment, as a user's are."""
    before = contents(model)
    with running_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_of_this_test"}
        words = push_command("capo", "tiny", private).split()[1:]
        command = [sys.executable, "-m", "trl_capo.cli", *words]
        path = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
        environment["PYTHONPATH"] = path
        result = subprocess.run(
            command, cwd=model.parent, env=environment, capture_output=True, text=True, timeout=120
        )
    assert result.returncode == 0, result.stderr
    assert f"{hub.endpoint}/me/tiny" in result.stdout
    assert hub.private == {"me/tiny": private}
    assert_arrived(hub.repositories["me/tiny"], model)
    assert contents(model) == before
