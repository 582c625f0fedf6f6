"""What stands before a release's student is redone with its decisions, whatever the student is."""

from __future__ import annotations

from pathlib import Path

from distillation.ahead import Ahead
from distillation.dataset import Row
from distillation.served_release import Answered, ServedRelease, read_served_release
from routers.confidence import Confidence
from routers.foresight import WIDTH, Foresight
from routers.router import Router
from serving.exchange import StudentAnswer
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore

LOW = Foresight((0.0,) * WIDTH, 0.1, 1.0, 0.0, 0.2, 0.5)
"""It skips whatever it is shown."""


def row(id: str) -> Row:
    return Row(id, "where is it", "late", None, None, None, None, None)


def test_a_language_models_release_skips_too(tmp_path: Path) -> None:
    answer = StudentAnswer("small", [{"message": {"content": "late"}}], None, 0.5, 9.0)
    answered = {id: Answered(answer, "late", True) for id in ("shown", "skipped", "new")}
    release = ServedRelease(
        LmPlan(base_url="http://localhost/v1", model="small"),
        Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0),
        {"shown": (9.0, "late"), "skipped": (9.0, "late")},
        answered,
        ahead=Ahead(LOW, {"skipped": 0.1}),
    )
    store = ReleaseStore(tmp_path)
    name = store.write("intents", release.files(), {"student": "lm"})
    again = read_served_release(store.read("intents", name), answered)
    assert again.ahead == release.ahead
    for one in (release, again):
        # Of rows it was fitted on, by models that weren't; of others by itself.
        assert [one.accepts_row(row(id)) for id in answered] == [True, False, False]
        redone = one.redo(row("skipped"))
        assert redone is not None
        assert (redone.decision.reason, redone.rank, redone.agreed) == ("skipped", 9.0, True)


def test_without_foresight_nothing_is_skipped_and_nothing_written() -> None:
    assert Ahead().files() == {}
    assert Ahead.read({}) == Ahead()
    assert not Ahead().skips(row("new"), set())
