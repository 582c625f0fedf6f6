"""The answers a task's owner names (`always_escalate`, `prove`): by their keys, and whether anybody ever gave them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

from routers.admission import AnswerTerms
from serving.agreement import comparison
from serving.task_settings import TaskPolicy

_ENOUGH = 50
"""Labels from which on it is worth a word that none of them has an answer that was named."""
_LIKELY, _SHORT = 1000, 100
"""How many answers, and of how many characters at most, are compared with what may be misspelt: names, not essays."""


def answer_terms(policy: TaskPolicy) -> AnswerTerms:
    """What the policy says about answers, which are named there as one would write them, by their keys."""
    prove: dict[str, float] = {}
    for key, text in _keys(policy, policy.prove):
        prove[key] = min(policy.prove[text], prove.get(key, 1.0))
    return AnswerTerms(frozenset(key for key, _ in _keys(policy, policy.always_escalate)), prove)


def never_given(policy: TaskPolicy, answers: list[str]) -> list[str]:
    """A line for each named answer that isn't among `answers`, the keys of a task's labels.

    Most likely it is misspelt, and then it guards nothing: the likeliest one that was meant stands in the line. With a
    handful of labels nothing is said, since what is rare hasn't come yet.
    """
    if len(answers) < _ENOUGH:
        return []
    known = Counter(answers)
    likely = [answer for answer, _ in known.most_common(_LIKELY) if len(answer) <= _SHORT]
    lines = []
    for setting, written in (("always_escalate", policy.always_escalate), ("prove", policy.prove)):
        for key, text in _keys(policy, written):
            if key in known:
                continue
            near = difflib.get_close_matches(key[:_SHORT], likely, n=1, cutoff=0.5)
            meant = f": did you mean {near[0]!r}?" if near else ""
            lines.append(
                f"{setting} names {text!r}, an answer that none of {len(answers):,} labels has{meant}"
            )
    return lines


def _keys(policy: TaskPolicy, written: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Each answer's key and how it was written; none where the task's agreement knows no keys."""
    comparing = comparison(policy.agreement)
    for text in written:
        key = comparing.key([{"message": {"content": text}, "finish_reason": "stop"}])
        if key is not None:
            yield key, text
