"""Every test runs on one thread and leaves environment and process group as it found them."""

import os
from collections.abc import Iterator

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
