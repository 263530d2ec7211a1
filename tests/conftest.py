"""What every test shares: one thread, no network, and the optional folder of real data."""

from __future__ import annotations

import gc
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["FORGETLESS_CACHE"] = tempfile.mkdtemp(prefix="forgetless-tests-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from forgetless.core import progress

# Tests name their types, so that they are imported before they are plugins.
pytest.register_assert_rewrite("tests.hub", "tests.postgres")

# Two threads on two busy cores are several times slower than one.
torch.set_num_threads(1)
# What it would warn of once a process is an error in each test, whatever ran before.
torch.set_warn_always(True)
# Importing and training make few cycles, and looking for them takes a tenth of the time.
gc.set_threshold(50_000, 10, 10)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """All that was imported is no garbage, which each `Trainer` looks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Real data sets, a pretrained model and reference outputs, kept outside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}, which is not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def shared_data(shared_folder: Path) -> Path:
    """The real data sets of `shared_folder`."""
    return shared_folder / "data"


@pytest.fixture(autouse=True, scope="session")
def _no_flushing() -> Iterator[None]:
    """Bringing files to the disk guards against power cuts, and costs tests more than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture
def seeded() -> int:
    """A fixed global seed for tests that draw random tensors."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_bar_is_left() -> Iterator[None]:
    """Work that a test stops in the middle leaves its bar, and the command line its console."""
    yield
    progress.clear()
    progress._console = None
