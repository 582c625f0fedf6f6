"""Rows that a release was fitted on are redone by vetoes that other rows gave, whatever its student is."""

from __future__ import annotations

from pathlib import Path

from distillation.dataset import Row
from distillation.refused import Refused
from distillation.served_release import Answered, ServedRelease, read_served_release
from routers.confidence import Confidence
from routers.router import Router
from serving.exchange import StudentAnswer
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore


def test_a_language_models_release_goes_by_other_rows_too(tmp_path: Path) -> None:
    answer = StudentAnswer("small", [{"message": {"content": "late"}}], None, 0.5, 9.0)
    keys = {"own": "late", "refused": "early", "escalated": "never", "new": "late", "as new": "early"}
    answered = {id: Answered(answer, key, True) for id, key in keys.items()}
    release = ServedRelease(
        LmPlan(base_url="http://localhost/v1", model="small"),
        Router(
            Confidence.of_score(1.0, 0.0),
            1.0,
            always_escalate=frozenset({"never"}),
            vetoed=frozenset({"late"}),
        ),
        {id: (9.0, keys[id]) for id in ("own", "refused", "escalated")},
        answered,
        refused=Refused(frozenset({"refused"})),
    )
    store = ReleaseStore(tmp_path)
    name = store.write("intents", release.files(), {"student": "lm"})
    again = read_served_release(store.read("intents", name), answered)
    assert again.refused == release.refused
    for one in (release, again):
        reasons = {}
        for id in keys:
            redone = one.redo(Row(id, "where is it", "late", None, None, None, None, None))
            assert redone is not None
            reasons[id] = redone.decision.reason
        assert reasons == {
            "own": "confident",
            "refused": "vetoed_answer",
            "escalated": "always_escalate",
            "new": "vetoed_answer",
            "as new": "confident",
        }


def test_without_vetoes_nothing_is_written_and_an_older_release_goes_by_its_own() -> None:
    assert Refused(frozenset()).files(frozenset()) == {}
    assert set(Refused(frozenset()).files(frozenset({"late"}))) == {"refused.json"}
    assert Refused.read({}) == Refused()
    assert Refused().vetoed("own", {"own"}) is None
    assert Refused(frozenset()).vetoed("own", {"own"}) is False
