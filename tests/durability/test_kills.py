"""A short version of `python -m loadtest.kills`: real processes, a real load, and SIGKILL."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from loadtest.kills import Campaign, run_campaign
from serving.log import LogReader


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="finds the keeper in /proc")
def test_every_answer_that_was_received_is_in_the_log_once(tmp_path: Path) -> None:
    campaign = Campaign(kills=4, clients=8, victims=("worker", "keeper", "everything", "supervisor"))
    casualties = run_campaign(campaign, tmp_path, Console(quiet=True))
    assert casualties.kills.total() == 4
    assert {"keeper", "everything", "supervisor"} <= set(casualties.kills)
    assert casualties.clean, casualties
    assert casualties.received >= 4 * campaign.answers_between
    assert casualties.received <= casualties.logged <= casualties.asked
    assert casualties.failed > 0, "nothing was killed in the middle of anything"
    assert casualties.received + casualties.failed <= casualties.asked
    assert LogReader(tmp_path / "state").tasks() == ["kills"]
    assert not list(tmp_path.rglob("*.jsonl.open"))
