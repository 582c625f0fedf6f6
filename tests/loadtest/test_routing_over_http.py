from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loadtest.routing.over_http import Replayed, ReplayFailed, replay, table_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(EXAMPLES / "parcels.csv", tmp_path / "stream.csv")
    shutil.copy(EXAMPLES / "system_prompt.txt", tmp_path / "system_prompt.txt")
    return tmp_path


def test_a_replay_is_read_from_what_the_command_prints(folder: Path) -> None:
    found = replay(folder, seed=1, limit=40)
    assert (found.seed, found.failed, found.share) == (1, 0, 1.0)  # too few to learn from
    assert found.disagreement is None and found.live == []
    assert found.right is not None and found.right > 0.5


def test_a_replay_that_fails_says_why(folder: Path) -> None:
    (folder / "stream.csv").write_text("nothing,here\n1,2\n")
    with pytest.raises(ReplayFailed, match="seed 7, ended with exit code 2: "):
        replay(folder, seed=7, limit=40)


def test_the_table_has_the_multiple_of_the_floor() -> None:
    shown = table_of(
        [
            Replayed(1, 0.66, 0.02, 0.5, 0.828, 0.08, [("r0001", 100, 0.09), ("r0002", 50, 0.06)], 0),
            Replayed(2, None, None, None, None, None, [], 3),
        ],
        3080,
    )
    assert [*shown.columns[4].cells] == ["1.32 ×", "–"]
    assert [*shown.columns[6].cells] == ["8.0% (r0001 9.0% of 100, r0002 6.0% of 50)", "–"]
    assert "1.32 ×" in str(shown.caption)
