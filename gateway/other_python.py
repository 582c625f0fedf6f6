"""Another Python that the configuration names, asked what it lacks without importing it: torch alone takes seconds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence

from serving.errors import UnderstudyError

_LISTING = (
    "import importlib.util as u, json, sys\n"
    "print(json.dumps([name for name in sys.argv[1:] if u.find_spec(name) is None]))"
)
_TIMEOUT_S = 30.0


class PythonSilent(UnderstudyError):
    """It can't be run, or doesn't answer; says why."""


def missing_modules(python: str, names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Those of the modules that this Python lacks in the environment that it is to run in. Raises PythonSilent."""
    try:
        asked = subprocess.run(  # noqa: S603 - a line of our own, under the Python that the operator names
            [python, "-c", _LISTING, *names],
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
            env={**environment, "PYTHONSAFEPATH": "1"},  # as `-P`, which Python 3.10 doesn't know
        )
        return [str(name) for name in json.loads(asked.stdout)]
    except OSError as error:
        raise PythonSilent(error.strerror or str(error)) from error
    except (ValueError, subprocess.SubprocessError) as error:
        raise PythonSilent(str(error)) from error
