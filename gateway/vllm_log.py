"""What vLLM says, in our log: line by line, at its own level, without keys, and never without end."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Sequence

log = logging.getLogger("understudy.vllm")

_LONGEST_LINE = 2000
_LAST_LINES = 300
_TOLD_LINES = 6
_BURST = 60
_PER_S = 5.0
_CUT = re.compile(rb"[\r\n]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LEVEL = re.compile(r"(?:\([^)]*\) *)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b[: ]")
_PREFIX = re.compile(r"^(?:\([^)]*\) *)?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] *)?")
_ACCESS = re.compile(r'"(?:GET|POST|PUT|DELETE|HEAD|OPTIONS) [^"]* HTTP/[\d.]+"')
_SAYS_WHY = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b|\berror:|out of memory", re.I)


class VllmLog:
    """Passes on what one child says, and keeps its last lines. `secrets` are replaced.

    `on_line` sees each line first and says whether it was meant for it.
    """

    def __init__(self, secrets: Sequence[str], *, on_line: Callable[[str], bool] = lambda _: False) -> None:
        self._secrets = secrets
        self._on_line = on_line
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._level = logging.INFO
        self._tokens = float(_BURST)
        self._at = time.monotonic()
        self._left_out = 0

    async def follow(self, output: asyncio.StreamReader) -> None:
        """Take in all that comes, to its end. A progress bar's line begins anew with each return."""
        rest = b""
        while piece := await output.read(65536):
            *lines, rest = _CUT.split(rest + piece)
            for line in lines:
                self._take(line)
            if len(rest) > _LONGEST_LINE:
                self._take(rest)
                rest = b""
        self._take(rest)

    def why(self) -> str:
        """The last that it said, as one line: what names an error, else the very last lines."""
        lines = [_PREFIX.sub("", line).strip() for line in self._last]
        named = [line for line in lines if _SAYS_WHY.search(line)]
        told = dict.fromkeys(line for line in (named or lines) if line)
        return " | ".join(list(told)[-_TOLD_LINES:]) or "it said nothing"

    def _take(self, raw: bytes) -> None:
        line = _COLOURS.sub("", raw[:_LONGEST_LINE].decode("utf-8", "replace")).rstrip()
        for secret in self._secrets:
            line = line.replace(secret, "…")
        if not line.strip() or self._on_line(line) or _ACCESS.search(line):
            return
        self._last.append(line)
        found = _LEVEL.match(line)
        if found is not None:  # a line without a level goes on with the one before: a traceback, mostly
            self._level = logging.getLevelNamesMapping()[found[1]]
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._at) * _PER_S)
        self._at = now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        if self._left_out:
            log.warning("%d lines of vLLM's were left out: there were too many at once", self._left_out)
            self._left_out = 0
        log.log(self._level, "%s", line)
