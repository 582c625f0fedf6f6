"""Every error we raise on purpose, in one tree. Foreign errors are translated where they enter.

UnderstudyError
├── ConfigError            a setting is unknown, missing or out of range
├── RecordingError         a recording can't be read
├── DamagedRelease         a release's files are missing or don't match their checksums
├── UnknownTask, UnknownRelease
├── TooFewExchanges        not enough in the log to learn from; the message says how many more
├── RequestError           the client's fault: becomes OpenAI's envelope with its own status
└── UpstreamError          the teacher answered with an error, or not at all
    ├── UpstreamRefused    a status of 400 or more, with the upstream's own body
    ├── UpstreamTimeout    no answer within the deadline
    └── UpstreamBroken     no connection, or one that ended in the middle of an answer
"""

from __future__ import annotations

from collections.abc import Mapping


class UnderstudyError(Exception):
    """Base of everything raised on purpose. `str(error)` is one line meant for a person."""


class ConfigError(UnderstudyError):
    """A setting is unknown, missing or out of range."""


class RecordingError(UnderstudyError):
    """A recording can't be read: the message names file, line and column."""


class DamagedRelease(UnderstudyError):
    """A release's files are missing or don't match the checksums on its card."""


class UnknownTask(UnderstudyError):
    """No task of that name has left anything in the state directory."""


class UnknownRelease(UnderstudyError):
    """The task has no release of that name."""


class TooFewExchanges(UnderstudyError):
    """The log holds too little to learn from yet."""


class RequestError(UnderstudyError):
    """The client's request can't be served as it is.

    `status` is the HTTP status; `param` and `code` go into OpenAI's error envelope
    (https://platform.openai.com/docs/guides/error-codes).
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code


class UpstreamError(UnderstudyError):
    """The teacher gave no usable answer. `kind` is a metric label: `status`, `timeout` or `broken`."""

    kind = "broken"


class UpstreamRefused(UpstreamError):
    """The upstream answered with a status of 400 or more.

    `status`, `headers` (lower-case names) and `body` (bytes) are the upstream's own and are forwarded as they are.
    """

    kind = "status"

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"the teacher answered with status {status}")
        self.status = status
        self.headers = headers
        self.body = body


class UpstreamTimeout(UpstreamError):
    """No answer within the deadline."""

    kind = "timeout"


class UpstreamBroken(UpstreamError):
    """No connection, or one that ended in the middle of an answer."""

    kind = "broken"
