"""A server that a student is asked at, over HTTP: sending a request, and what its refusals mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import orjson

from serving.device_time import DeviceTime
from serving.errors import ConfigError, RequestError, UpstreamBroken, UpstreamRefused
from serving.exchange import Json
from serving.upstream import Headers, StaleConnection, Upstream, UpstreamResponse

_OF_THE_REQUEST = (400, 413, 422)


class StudentBroken(UpstreamBroken):
    """The student's server answered with an error, with nothing that is an answer, or not to the end."""


class StudentRefused(StudentBroken):
    """The student's server won't have this request: too long, mostly. It wouldn't a second time either."""


class Served(Protocol):
    """Where a student is asked: at one server, or at whichever of several (serving/pool.py)."""

    device: DeviceTime

    @property
    def place(self) -> str:
        """What it is called in messages."""
        ...

    async def post(self, path: str, asked: Json) -> UpstreamResponse:
        """Send a request and wait for the head of a good answer.

        Raises UpstreamRefused for any status that isn't one (see `refusal`), in the server's words without our key;
        UpstreamError, or StudentUnavailable.
        """
        ...

    async def get(self, path: str) -> UpstreamResponse:
        """The same for a question without a body."""
        ...

    def refusal(self, error: UpstreamRefused) -> StudentBroken:
        """What a refusal means, in the server's own words, without keys."""
        ...

    async def aclose(self) -> None:
        """Close what is its own."""
        ...


class StudentServer:
    """A server behind `upstream`, which it owns. `key` goes with every request, and into no message.

    `device` measures how long it works for this process. Whoever asks says when, since only the asker knows an answer's
    end.
    """

    def __init__(self, upstream: Upstream, device: DeviceTime, *, key: str | None = None) -> None:
        self.device = device
        self._upstream = upstream
        self._key = key
        self._headers: Headers = [
            ("content-type", "application/json"),
            ("accept-encoding", "identity"),
            *([] if key is None else [("authorization", f"Bearer {key}")]),
        ]

    @classmethod
    def at(
        cls, base_url: str, *, timeout_s: float, api_key_env: str | None, device: DeviceTime
    ) -> StudentServer:
        """The server at `base_url`, with its key from the environment.

        Raises ConfigError for a key that can't be sent.
        """
        upstream = Upstream(base_url, timeout_s=timeout_s, who="the student")
        return cls(upstream, device, key=key_of(api_key_env))

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        return self._upstream.place

    async def post(self, path: str, asked: Json, *, silence_s: float | None = None) -> UpstreamResponse:
        """Send a request below the base URL and wait for the head of a good answer.

        `silence_s` bounds each of its silences; None: as for all. Raises UpstreamRefused for any status that isn't a
        good one (see `refusal`), and what `Upstream.request` raises.
        """
        return await self._send("POST", path, orjson.dumps(asked), silence_s)

    async def get(self, path: str, *, silence_s: float | None = None) -> UpstreamResponse:
        """The same for a question without a body."""
        return await self._send("GET", path, b"", silence_s)

    async def _send(self, method: str, path: str, body: bytes, silence_s: float | None) -> UpstreamResponse:
        ask = partial(
            self._upstream.request, method, path, headers=self._headers, body=body, silence_s=silence_s
        )
        try:
            try:
                response = await ask()
            except StaleConnection:
                response = await ask()
        except RequestError:
            # Path and headers are the operator's: no client has sent anything wrong.
            raise StudentBroken(
                "the student can't be asked: its base_url has a port, credentials beside a key, or characters that "
                "HTTP doesn't allow; see student.base_url and student.api_key_env"
            ) from None
        if 200 <= response.status < 300:
            return response
        async with response:
            said = await response.read()
        # Some repeat our key, and what they say stands in logs and reports.
        said = said if self._key is None else said.replace(self._key.encode(), "…".encode())
        raise UpstreamRefused(response.status, dict(response.headers), said)

    def refusal(self, error: UpstreamRefused) -> StudentBroken:
        """What a refusal means, in the server's own words: without our key, which some repeat."""
        return refusal_of(error, self.place, [] if self._key is None else [self._key])

    async def aclose(self) -> None:
        """Close every connection."""
        await self._upstream.aclose()


def refusal_of(error: UpstreamRefused, place: str, keys: Sequence[str]) -> StudentBroken:
    """What a refusal means, in the server's own words: without our keys, which some repeat."""
    said = error.body.decode("utf-8", "replace")
    for key in keys:
        said = said.replace(key, "…")
    kind = StudentRefused if error.status in _OF_THE_REQUEST else StudentBroken
    return kind(f"the student at {place} answered with status {error.status}: {said[:200].strip()}")


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable, if there is one. Raises ConfigError for one that can't be sent."""
    value = os.environ.get(variable, "").strip() if variable is not None else ""
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"the student's key in the environment variable {variable} has characters that can't be sent: set it again"
        )
    return value or None
