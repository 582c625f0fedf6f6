"""Answers named in the configuration that nobody ever gave: misspelt ones guard nothing, and it is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillation.named_answers import answer_terms, never_given
from serving.task_settings import AgreementChoice, TaskPolicy

ANSWERS = ["refund_request", "where_is_my_parcel"] * 30
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)


def test_a_misspelt_answer_is_named_with_what_was_meant() -> None:
    policy = TaskPolicy(always_escalate=["refund"], prove={"where_is_my_parcell": 0.01})
    assert never_given(policy, ANSWERS) == [
        "always_escalate names 'refund', an answer that none of 60 labels has: did you mean 'refund_request'?",
        "prove names 'where_is_my_parcell', an answer that none of 60 labels has: did you mean 'where_is_my_parcel'?",
    ]
    assert never_given(TaskPolicy(always_escalate=["zzz"]), ANSWERS) == [
        "always_escalate names 'zzz', an answer that none of 60 labels has"
    ]


def test_nothing_is_said_of_answers_that_were_given_or_before_there_are_labels() -> None:
    policy = TaskPolicy(always_escalate=["  refund_request "], prove={"where_is_my_parcel": 0.01})
    assert never_given(policy, ANSWERS) == []
    assert never_given(TaskPolicy(always_escalate=["refund"]), ANSWERS[:49]) == []


def test_an_agreement_without_keys_names_no_answers() -> None:
    policy = TaskPolicy(agreement=AgreementChoice(kind="numeric"), always_escalate=["12"])
    assert never_given(policy, ANSWERS) == []
    assert answer_terms(policy).always_escalate == frozenset()


@pytest.mark.parametrize("kind", ["exact", "json"])
@given(names=st.lists(NAMES, max_size=4))
def test_what_is_escalated_is_either_among_the_labels_or_named(kind: str, names: list[str]) -> None:
    policy = TaskPolicy.model_validate({"agreement": {"kind": kind}, "always_escalate": names})
    unknown = answer_terms(policy).always_escalate - set(ANSWERS)
    assert bool(unknown) == bool(never_given(policy, ANSWERS))
