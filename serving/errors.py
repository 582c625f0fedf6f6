"""Every error we raise on purpose, in one tree. Foreign errors are translated where they enter.

UnderstudyError
├── ConfigError            a setting is unknown, missing or out of range
├── RecordingError         a recording can't be read
├── DamagedRelease         a release's files are missing or don't match their checksums
├── UnknownTask, UnknownRelease
├── WithdrawnMeanwhile     a release was withdrawn while its successor was learned from labels of before
├── LearningElsewhere      another process is learning this task (distillation/journal.py)
├── StudentSilent          a student that is asked about the log gave no answers (distillation/kind.py)
├── ErasedMeanwhile        something was erased while it was asked (serving/student_answers.py)
├── StudentBusy            a student in process has no more time (serving/text_thread.py)
├── UnreadableText         its model made nothing of a text (serving/text_thread.py)
├── TextTooLong            a student can't read so much (serving/closed_answers.py)
├── StackError             a process that a replay started has died (loadtest/stack.py)
├── UnreadableShop         a recording to measure with isn't there (loadtest/routing/shop.py)
├── NothingToMeasure       it gave no release to measure with (loadtest/routing/cost.py)
├── ReplayFailed           a replay that is measured ended with an error (loadtest/routing/over_http.py)
├── NoRecording            what students are measured on isn't there (loadtest/students/split.py)
├── Missing                a student that is measured needs what isn't there (loadtest/students/candidates.py)
├── NotLearned             it gave no release (loadtest/students/lesson.py)
├── ProbeFailed            its measurement ended without a result (loadtest/students/probe.py)
├── AdapterNotLoaded       a server doesn't serve an adapter (serving/adapter_loading.py)
├── UnfitEncoder           a folder holds no encoder that can be fine-tuned or used (serving/encoder_folder.py)
├── TrainingFailed         a child that trains or exports ended badly (distillation/training_process.py)
│   └── NothingTrains      what it takes isn't there, which shows at once (distillation/training_process.py)
├── PythonSilent           another Python can't be asked what it has (gateway/other_python.py)
├── NoServer               a vLLM to measure isn't there (loadtest/students/vllm_server.py)
├── StudentUnavailable     a student took too long or is left alone (serving/guarded_student.py)
├── RequestError           the client's fault: becomes OpenAI's envelope with its own status
│   └── ScriptedError      an error that the stand-in was asked for (serving/stand_in.py)
└── UpstreamError          the teacher answered with an error, or not at all
    ├── UpstreamRefused    a status of 400 or more, with the upstream's own body
    ├── UpstreamTimeout    no answer within the deadline
    ├── UpstreamUnavailable  not asked: it has failed too often just now
    ├── UpstreamBusy       not asked: too many requests wait for it already (serving/slots.py)
    └── UpstreamBroken     no connection, or one that ended in the middle of an answer
        ├── NothingSent      no connection: the upstream saw nothing (serving/upstream.py)
        ├── StudentBroken    a student's server gave no whole answer (serving/student_server.py)
        │   └── StudentRefused   it won't have this request
        ├── StaleConnection  a kept connection had ended (serving/upstream.py)
        └── StreamFailed     the teacher reported an error in its stream (serving/teacher_stream.py)

An error stands beside what raises it when nobody else has to know it.
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


class WithdrawnMeanwhile(UnderstudyError):
    """A release may not become live: its labels are from before the watch withdrew another."""


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
    """The teacher gave no usable answer.

    `kind` is a metric label: `status`, `timeout`, `broken`, `unavailable` or `busy`.
    """

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


class UpstreamUnavailable(UpstreamError):
    """The upstream wasn't asked: it has failed too often just now. `retry_after_s`: when to try again."""

    kind = "unavailable"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamBroken(UpstreamError):
    """No connection, or one that ended in the middle of an answer."""

    kind = "broken"
