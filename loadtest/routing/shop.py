"""FrugalML's recorded shop reviews: a cheap and an expensive sentiment model on 62,774 texts (arXiv 2006.07512)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.errors import UnderstudyError

STUDENT, TEACHER = "4", "3"
"""The ids of Amazon's model (0.75 USD for 10,000 texts) and of Baidu's (3.5 USD)."""


class UnreadableShop(UnderstudyError):
    """The recording isn't there, or isn't what FrugalML published."""


@dataclass(frozen=True, slots=True)
class Shop:
    """What was recorded of each text, arrays of one length.

    `confidence` is the student's own, `answer` its label, `agreed` whether the teacher gave the same; `student_right`
    and `teacher_right` go by the true label.
    """

    confidence: NDArray[np.float64]
    answer: NDArray[np.int64]
    agreed: NDArray[np.bool_]
    student_right: NDArray[np.bool_]
    teacher_right: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.confidence)

    def first(self, rows: int) -> Shop:
        """The first `rows` of it."""
        return Shop(
            self.confidence[:rows],
            self.answer[:rows],
            self.agreed[:rows],
            self.student_right[:rows],
            self.teacher_right[:rows],
        )


def read_shop(path: Path) -> Shop:
    """Read `SHOP.csv`. Raises UnreadableShop."""
    try:
        with path.open(encoding="utf-8") as lines:
            names = lines.readline().strip().split(",")
            wanted = ["true", f"pred_{STUDENT}", f"conf_{STUDENT}", f"pred_{TEACHER}"]
            columns = [names.index(name) for name in wanted]
            read = np.loadtxt(lines, delimiter=",", usecols=columns, ndmin=2)
    except (OSError, ValueError) as error:
        raise UnreadableShop(f"{path} can't be read as FrugalML's SHOP.csv: {error}") from error
    true, answer, confidence, teacher = read.T
    return Shop(confidence, answer.astype(np.int64), answer == teacher, answer == true, teacher == true)
