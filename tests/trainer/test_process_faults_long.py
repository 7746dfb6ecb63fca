"""Many restarts on real processes."""

from pathlib import Path

import pytest

from tests.trainer.test_process_faults import check_restarts


@pytest.mark.long
def test_fifty_runs_come_back_after_a_rank_was_killed(tmp_path: Path) -> None:
    check_restarts(tmp_path, 50)
