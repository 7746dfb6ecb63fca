"""Every test runs on one thread and leaves environment and process group as it found them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _restore_process_state() -> Iterator[None]:
    """Environment variables, default dtype and process group are each test's own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def speech_data() -> Path:
    """The folder of recorded speech that tests marked `real` read; they skip where it is not."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPEECH_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no recorded speech in {folder}: say where it is by SPEECH_DATA")
    return folder
