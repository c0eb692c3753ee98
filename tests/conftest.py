from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("vitkit", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("vitkit")
# two noisy cores: more threads than that only wait for each other
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data sets; tests that need it are skipped where it does not exist."""
    folder = Path(os.environ.get("VITKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the folder of small real data sets is not here (VITKIT_DATA names it)")
    return folder
