from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from serving.recording import read_recording

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_generator_makes_the_committed_file(tmp_path: Path) -> None:
    for name in ("generate.py", "phrases.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    assert (tmp_path / "parcels.csv").read_bytes() == (EXAMPLES / "parcels.csv").read_bytes()


def test_the_messages_look_like_traffic() -> None:
    rows = read_recording(EXAMPLES / "parcels.csv").rows
    labels = Counter(row.gold for row in rows)
    assert len({row.text for row in rows}) == len(rows)
    assert 0.03 < sum(row.teacher != row.gold for row in rows) / len(rows) < 0.08
    assert labels.most_common()[0][1] > 5 * labels.most_common()[-1][1]


def test_the_prompt_names_every_label() -> None:
    prompt = (EXAMPLES / "system_prompt.txt").read_text()
    named = {line[2:].split(":")[0] for line in prompt.splitlines() if line.startswith("- ")}
    with (EXAMPLES / "parcels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert named == {row["teacher"] for row in rows} == {row["gold"] for row in rows}
