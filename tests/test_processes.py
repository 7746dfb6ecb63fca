"""Two processes are started as ranks of one group, and none outlives the test."""

import time
from pathlib import Path

import pytest

from tests.processes import launch

NAMES = "import os, sys; open(f'{sys.argv[1]}/' + os.environ['RANK'], 'w').write(os.environ['{}'])"
SAYS = "import os, sys, time; {} if os.environ['RANK'] == '1' else time.sleep(60)"
FAILS = SAYS.replace("{}", "sys.exit('so it is')")


def test_each_has_a_rank_and_both_the_same_port(tmp_path: Path) -> None:
    launch(tmp_path, "-c", NAMES.replace("{}", "MASTER_PORT"))
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second
    assert int(first) > 1024


def test_one_that_fails_ends_the_other_and_its_last_words_are_told(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)exit codes \[None, 1\].*rank 1: so it is"):
        launch(tmp_path, "-c", FAILS)
    assert time.monotonic() - started < 30


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[None, None\] \(None: not ready within"):
        launch(tmp_path, "-c", "import time; time.sleep(60)", seconds=0.5)
