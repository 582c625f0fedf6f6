"""From a split to a release: the training half becomes a log, and `understudy learn` does the rest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from loadtest.learner import learn
from loadtest.stack import KEY_VARIABLE
from loadtest.students.candidates import Means
from loadtest.students.split import TASK, Split
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.pricing import PriceList
from serving.releases import Release, ReleaseStore


class NotLearned(UnderstudyError):
    """`understudy learn` made no release; says why."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A release, where its task's state is, and the configuration it was learned with."""

    release: Release
    state_dir: Path
    config: Path
    bytes_on_disk: int


def learned(split: Split, choice: Json, means: Means, work: Path, prices: PriceList, keep: Path) -> Learned:
    """Write the log and learn from it, in `work`; take what was learned before from `keep`, if that is there.

    What is measured is never what is kept: load on it is logged, and may suspend its release. Raises NotLearned.
    """
    state_dir = work / "state"
    store = ReleaseStore(state_dir)
    config = work / "understudy.toml"
    config.write_text(configuration(state_dir, choice, means), encoding="utf-8")
    if keep.is_dir():
        shutil.copytree(keep, state_dir)
    else:
        split.write_log(state_dir, prices)
        lesson = asyncio.run(learn(config, TASK, after=0, own_stack=True))
        if lesson.report is None:
            raise NotLearned(lesson.error or "understudy learn said nothing")
        (said,) = lesson.report["tasks"]
        if said["release"] is None:
            raise NotLearned(said["message"])
    live = store.live(TASK)
    if live is None or live.release is None:
        raise NotLearned(f"no release is live in {keep}: remove that folder to learn anew")
    release = store.read(TASK, live.release)
    folder = state_dir / "tasks" / TASK / "releases" / release.name
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Learned(release, state_dir, config, size)


def configuration(
    state_dir: Path, choice: Json, means: Means, teacher_url: str = "http://127.0.0.1:9/v1"
) -> str:
    """A configuration under which every student is released and stays live, however well it does.

    What it would be trusted with is measured here, on labels that it hasn't seen.
    """
    learning = ""
    if "base" in choice or "embedder" in choice:
        learning = f"python = {json.dumps(str(means.python))}\nthreads = {len(os.sched_getaffinity(0))}\n"
    return f"""\
state_dir = {json.dumps(str(state_dir))}

[server]
port = 0

[teacher]
base_url = {json.dumps(teacher_url)}
api_key_env = "{KEY_VARIABLE}"
trainable = true
price = {{ input = 30.0, output = 60.0 }}

[learning]
interval_s = 0
{learning}
[[task]]
name = "{TASK}"
match = {{ model = "{TASK}" }}
max_disagreement = 0.99
certainty = 0.5
noise_rate = 0
audit_rate = 1e-9  # another teacher stands in for the load: audits by it would suspend the release
student = {_toml({**choice, "skip": "never"})}
"""


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    return json.dumps(value)
