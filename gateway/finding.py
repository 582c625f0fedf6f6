"""What a check of `understudy doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.exchange import Json

Verdict = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was seen, and what to do about it unless all is well.

    A `problem` keeps requests from being served, or costs money or answers; a `warning` may be meant.
    """

    check: str
    verdict: Verdict
    said: str
    advice: str | None = None

    def to_json(self) -> Json:
        """Return it as an object."""
        return {"check": self.check, "verdict": self.verdict, "said": self.said, "advice": self.advice}
