"""What trains with torch runs in a process of its own: a script, in a Python that need not be ours.

torch is large, and a gateway's environment does without it: `learning.python` names the Python that has what
`pip install 'understudy[train]'` installs; absent, it is our own. The script imports nothing of ours. It is given the
path of a job, a JSON file, and says on standard output, a JSON object a line, how far it is (`progress`), then what it
came to (`done`), or why it can't be (`error`), or which module there isn't (`missing`). Standard error is for whatever
else its libraries say; the end of it is shown where a script dies without a word.

A script ends with us, however we end: it reads its standard input, whose other end only we hold. And it ends when it
has hung, since whoever waits for it holds the task's lock: it says every few seconds how far it is, but for what
libraries do in one piece, and is killed once it has said nothing for `learning.stall_timeout_s`, with whatever it has
started. One that even so doesn't end, as it waits for a disk that doesn't answer, is left to itself, and said.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson

from serving.child_environment import child_environment
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.layout import training_directory
from serving.settings import Settings

log = logging.getLogger("understudy.learning")

_NICENESS = 10
_KILLED_S = 10.0
"""What was killed gets so long to be gone."""
_LAST_BYTES = 4096
_LAST_LINES = 5
_MOST_AT_ONCE = 65536


class TrainingFailed(UnderstudyError):
    """A script didn't come to its end. Says why, and what to do."""


class NothingTrains(TrainingFailed):
    """What it takes isn't there, as a Python that runs or a module: that shows at once, and costs nothing."""


def clear_training(state_dir: Path, task: str) -> None:
    """Remove what training that was killed has left, copies of texts among it; only who holds the task's lock may."""
    shutil.rmtree(training_directory(state_dir, task), ignore_errors=True)


@contextmanager
def training_folder(state_dir: Path, task: str) -> Iterator[Path]:
    """A folder for what training leaves in between. Whoever asks for it holds the task's lock: nobody else is in it.

    It is empty, whatever a process that was killed has left in it, and gone afterwards. Raises OSError.
    """
    clear_training(state_dir, task)
    folder = training_directory(state_dir, task)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_script(
    script: Path, job: Json, settings: Settings, folder: Path, progress: Callable[[Json], None]
) -> Json:
    """Run a script on a job, to its end; gives what it came to. `progress` hears how far it is.

    What the script writes beside that goes into `folder`, where it also runs. Raises TrainingFailed, also for one that
    has hung: it was killed then, too.
    """
    python = _python(settings.learning.python)
    path, errors = folder / "job.json", folder / "stderr"
    patience_s = settings.learning.stall_timeout_s
    path.write_bytes(orjson.dumps(job))
    try:
        with errors.open("wb") as stderr:
            child = subprocess.Popen(  # noqa: S603 - our own script, under the Python that the operator names
                [python, "-P", str(script.resolve()), str(path.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=folder,
                env=_environment(settings),
                start_new_session=True,  # so that what it starts can be ended with it
            )
    except OSError as error:
        raise NothingTrains(
            f"{python} can't be run ({error.strerror}): set learning.python to a Python that has "
            "what `pip install 'understudy[train]'` installs"
        ) from error
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
        ended = {} if child.stdout is None else _listen(child.stdout, progress, patience_s)
        code = child.wait(timeout=patience_s)
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        raise TrainingFailed(
            f"{script.name} was ended: for {patience_s:g} s it hadn't said how far it is, as one that has hung; if "
            f"this machine is so slow, raise learning.stall_timeout_s{_last_words(errors)}"
        ) from error
    finally:
        _end(child, script.name)
    if code == 0 and isinstance(ended.get("done"), dict):
        done: Json = ended["done"]
        return done
    if "missing" in ended:
        raise NothingTrains(
            f"{python} has no module {ended['missing']}: run `pip install 'understudy[train]'` there (in a checkout: "
            "'.[train]'), or set learning.python to a Python that has it"
        )
    if "error" in ended:
        raise TrainingFailed(str(ended["error"]))
    raise TrainingFailed(f"{script.name} {_ending(code)}{_last_words(errors)}")


def _end(child: subprocess.Popen[bytes], name: str) -> None:
    """Kill what hasn't ended by itself, with all that it has started, and let go of it."""
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    if child.returncode is not None:
        return  # its group, if nobody is left in it, may be another's by now
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the second of zombies
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(timeout=_KILLED_S)
    except subprocess.TimeoutExpired:
        log.warning(
            "%s (process %d) was killed %g s ago and hasn't ended: it waits for the system, perhaps for a disk that "
            "doesn't answer; it is left to itself",
            name,
            child.pid,
            _KILLED_S,
        )


def _python(named: Path | None) -> str:
    """The command that runs a script. A bare name is looked for in PATH; a path is seen from where we are.

    Links are kept: by them a Python knows its environment.
    """
    if named is None:
        return sys.executable
    return str(named.absolute()) if named.name != str(named) else str(named)


def _environment(settings: Settings) -> dict[str, str]:
    """Our environment without keys: nothing is fetched, no more cores are taken, and no path of ours leads in."""
    return {
        **child_environment(settings, own_python=False),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(settings.learning.threads),
    }


def _listen(stdout: IO[bytes], progress: Callable[[Json], None], patience_s: float) -> Json:
    """What a script says to its end: the last thing that isn't progress.

    Raises TimeoutError if it says nothing for `patience_s`. What libraries print isn't said by the script: some
    report for ever that they try again.
    """
    ended: Json = {}
    rest, heard_at = b"", time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(stdout, selectors.EVENT_READ)
        while ready.select(max(0.0, heard_at + patience_s - time.monotonic())):
            piece = os.read(stdout.fileno(), _MOST_AT_ONCE)
            *lines, rest = (rest + piece).split(b"\n") if piece else (rest, b"")
            for said in filter(None, map(_said, lines)):
                if isinstance(said.get("progress"), dict):
                    progress(said["progress"])
                else:
                    ended = said
                heard_at = time.monotonic()
            if not piece:
                return ended
            if time.monotonic() - heard_at > patience_s:
                break
    raise TimeoutError


def _said(line: bytes) -> Json | None:
    """What a line says; None: it is a library that talks."""
    try:
        said = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return said if isinstance(said, dict) else None


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed, as the system does when memory runs out"
    if code < 0:
        return f"was ended by signal {-code}"
    return f"ended with code {code}"


def _last_words(errors: Path) -> str:
    with errors.open("rb") as file:
        file.seek(max(0, errors.stat().st_size - _LAST_BYTES))
        lines = file.read().decode("utf-8", "replace").split("\n")
    said = [line.strip() for line in lines if line.strip()][-_LAST_LINES:]
    return f": {' | '.join(said)}" if said else ""
