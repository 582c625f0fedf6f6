"""What can be set: every key with its default, its meaning and what it may be. `serving/configuration.py` reads it.

Settings are read once, checked whole and passed down.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from serving.errors import ConfigError
from serving.layout import is_task_name
from serving.redaction import parse_kinds
from serving.redis_url import RedisUrl
from serving.sight import Sees

ENV_PREFIX = "UNDERSTUDY_"
_MOST_CHECKPOINTS = 16
RESERVED_TASKS = frozenset({"other"})
"""`other` takes the requests of every prompt that is no task (yet, or beyond `server.max_tasks`); nothing is learned
from it."""

_OUR_VLLM_FLAGS = frozenset({"--api-key", "--host", "--model", "--port", "--uds"})
_OTLP_ENDPOINTS = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"}


def _check_name(name: str) -> str:
    if not is_task_name(name):
        raise ValueError("should be 1 to 64 of a-z 0-9 . _ - and begin with a letter or a digit")
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about the keys it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Section):
    """Where the gateway listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    workers: int = Field(1, ge=1, le=64)
    max_body_bytes: int = Field(
        20 * 1024 * 1024, ge=1024, description="a larger request body is refused with 413"
    )
    max_upload_bytes: int = Field(
        1024**3, ge=1024, description="the same for any other request, whose body isn't held"
    )
    receive_timeout_s: float = Field(
        30.0,
        gt=0,
        description="the head of a request comes within this time, its body brings 1 KiB a second over it",
    )
    grace_s: float = Field(
        30.0, ge=0, description="how long requests under way may take after the gateway was told to stop"
    )
    max_concurrency: int = Field(
        2000, ge=1, description="requests under way at once, in each worker; beyond, 429"
    )
    max_held_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="request bodies under way at once, in each worker; beyond, 429",
    )
    max_tasks: int = Field(200, ge=1, description="unseen prompts become tasks by themselves up to this many")
    pass_through: list[str] | None = Field(
        None,
        description="what is passed on besides chat completions: paths below /v1/, with all below them; absent: all",
    )
    api_keys: list[SecretStr] = Field(
        default=[], description="the gateway's own keys, plain or as sha256:<hex>"
    )
    admin_key: SecretStr | None = Field(
        None, description="the key for /metrics and the details of /readyz, plain or as sha256:<hex>"
    )

    @field_validator("pass_through")
    @classmethod
    def _are_paths(cls, value: list[str] | None) -> list[str] | None:
        for path in value or ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*", path):
                raise ValueError(
                    f"should be paths below /v1/, such as embeddings or images/generations, not {path!r}"
                )
        return value

    @field_validator("api_keys")
    @classmethod
    def _can_be_sent(cls, value: list[SecretStr]) -> list[SecretStr]:
        for position, key in enumerate(value, start=1):
            _check_key(key, f"key {position} of {len(value)}")
        return value

    @field_validator("admin_key")
    @classmethod
    def _admin_key_can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _check_key(value, "the key")
        return value


def _check_key(key: SecretStr, which: str) -> None:
    """Raise ValueError, without showing it, for a key that no client could ever send."""
    text = key.get_secret_value()
    if not text or text != text.strip() or not (text.isascii() and text.isprintable()):
        raise ValueError(
            f"no client can send {which}: it is empty, has spaces around it or "
            "characters that can't stand in a header"
        )
    if text.startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", text):
        raise ValueError(
            f"{which} begins with sha256: and should go on with the 64 hex digits of the key's SHA-256"
        )


class Price(Section):
    """USD per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)


def _check_url(value: str) -> str:
    if not re.match(r"https?://[^/?#]", value):
        raise ValueError("should begin with http:// or https://, then name a host")
    return value


def _check_variable(value: str, such_as: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise ValueError(
            f"should be the name of the environment variable that holds the key, such as {such_as}, "
            "not the key itself"
        )
    return value


class TeacherSettings(Section):
    """The expensive model: any OpenAI-compatible base URL."""

    base_url: str = "https://api.openai.com/v1"
    model: str | None = Field(
        None, description="sent instead of the client's model; absent: the client's own"
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="the environment variable that holds the teacher's key"
    )
    trainable: bool = Field(False, description="whether the provider's terms let you train on its answers")
    timeout_s: float = Field(600.0, gt=0, description="deadline of one request, retries included")
    stall_timeout_s: float = Field(
        120.0, gt=0, description="the longest silence of a stream whose answer has begun"
    )
    max_retries: int = Field(2, ge=0, le=10)
    logprobs: bool = Field(False, description="ask for log-probabilities, which only the log gets to see")
    breaker: bool = Field(True, description="whether a teacher that fails most of the time is left alone")
    max_concurrency: int = Field(
        1000, ge=1, description="requests at the teacher at once, in each worker; more wait for 5 s, then 429"
    )
    price: Price | None = Field(None, description="overrides the price list of genai-prices")

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        return _check_url(value)

    @field_validator("api_key_env")
    @classmethod
    def _is_the_name_of_a_variable(cls, value: str) -> str:
        return _check_variable(value, "OPENAI_API_KEY")


class OnnxSettings(Section):
    """What students on ONNX Runtime run on."""

    providers: list[str] = Field(
        default=["CPUExecutionProvider"],
        min_length=1,
        description="ONNX Runtime's execution providers, the first that can do an operation does it",
    )
    threads: int = Field(1, ge=1, le=1024, description="threads that work at one request of theirs")


class VllmSettings(Section):
    """The vLLM that students are served by: one that `serve --vllm` runs, or `urls` of those that others run.

    Keys are called what vLLM's flags are; absent, vLLM's own default holds.
    """

    model: str | None = Field(None, description="what `serve --vllm` serves: a folder, or a name vLLM knows")
    served_model_name: str | None = Field(None, description="its name for students; absent: `model`")
    python: str | None = Field(
        None, description="the Python of the environment vLLM is installed in; absent: the gateway's own"
    )
    runner: Literal["generate", "pooling"] = "generate"
    host: str = Field("127.0.0.1", description="where it listens; its key guards only what is below /v1")
    port: int = Field(0, ge=0, le=65535, description="0: a free one")
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    quantization: str | None = Field(None, description="fp8, awq, gptq, … as vLLM calls them")
    enable_prefix_caching: bool | None = None
    tensor_parallel_size: int | None = Field(None, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    enable_lora: bool = False
    max_loras: int | None = Field(None, ge=1)
    args: list[str] = Field(default=[], description="further flags of vLLM's")
    ready_timeout_s: float = Field(
        900.0, gt=0, description="a start that takes longer is given up, and tried again"
    )
    urls: list[str] = Field(default=[], description="servers that others run; the least busy is asked")
    api_key_env: str | None = Field(
        None, description="the environment variable that holds their key, if they want one"
    )
    usd_per_hour: float | None = Field(
        None, ge=0, description="price of all of them together; absent: that of a core"
    )

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: list[str]) -> list[str]:
        return [_check_url(url) for url in value]

    @field_validator("api_key_env")
    @classmethod
    def _is_the_name_of_a_variable(cls, value: str | None) -> str | None:
        return None if value is None else _check_variable(value, "VLLM_API_KEY")

    @field_validator("args")
    @classmethod
    def _leave_what_is_ours(cls, value: list[str]) -> list[str]:
        for flag in value:
            name = flag.partition("=")[0].replace("_", "-")  # vLLM takes either
            if name in _OUR_VLLM_FLAGS:
                raise ValueError(
                    f"should leave out {name}: where it listens, and with which key, the gateway has to know"
                )
        return value

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Self:
        if self.urls:
            foreign = sorted(self.model_fields_set - {"urls", "api_key_env", "usd_per_hour"})
            if foreign:
                raise ValueError(
                    f"has urls, servers that others run, and {', '.join(foreign)}, which is about one run here: "
                    "leave one of the two out"
                )
        elif self.model is None:
            raise ValueError(
                "needs model, what `understudy serve --vllm` is to serve, or urls of servers that others run"
            )
        elif self.api_key_env is not None:
            raise ValueError("has api_key_env without urls: the one run here gets a key of its own")
        if self.max_loras is not None and not self.enable_lora:
            raise ValueError("has max_loras without enable_lora = true")
        return self


class StudentSettings(Section):
    """What running students costs, and takes, and what they are served by."""

    onnx: OnnxSettings = OnnxSettings()
    usd_per_hour: float = Field(
        0.05, ge=0, description="price of a core, for students in process and wherever nothing else is said"
    )
    waiting_usd_per_hour: float = Field(
        1.0,
        ge=0,
        description="what an hour of clients' waiting is worth, where time is weighed against money",
    )
    vllm: VllmSettings | None = None
    adapters_at: Path | None = Field(
        None,
        description="where the servers of language models see `state_dir`/adapters; absent: where the gateway does",
    )


class CacheSettings(Section):
    """The response cache: a first level in each process, and Redis behind it if there is a URL."""

    url: SecretStr | None = Field(
        None,
        description="redis://, rediss://, unix://, redis+cluster://, redis+sentinel://; absent: no Redis",
    )
    ttl_s: float = Field(3600.0, gt=0, le=31_536_000, description="how long an answer is kept, ±10 %")
    max_bytes: int = Field(64 * 1024 * 1024, ge=0, description="memory of the first level, per worker")
    max_entry_bytes: int = Field(1024 * 1024, ge=1024, description="a larger answer isn't cached")
    share: Literal["tenant", "task"] = "tenant"
    single_flight: Literal["process", "replicas"] = Field(
        "process", description="among whom identical concurrent requests are asked once"
    )
    lease_s: float = Field(
        10.0, gt=0, le=3600, description="how long others wait for the one that asks, without a sign of life"
    )

    @field_validator("url")
    @classmethod
    def _names_a_redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            RedisUrl.parse(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _replicas_meet_somewhere(self) -> Self:
        if self.single_flight == "replicas" and self.url is None:
            raise ValueError('single_flight = "replicas" needs the Redis in which they meet: set cache.url')
        return self


class LogSettings(Section):
    """The event log."""

    durability: Literal["fsync", "relaxed"] = "fsync"
    segment_bytes: int = Field(64 * 1024 * 1024, ge=4096, description="a segment is sealed at this size")
    redact: list[str] = Field(
        default=[], description="kinds of text that never reach the disk: built-in ones, or name:pattern"
    )
    retention_days: float | None = Field(
        None, gt=0, description="sealed segments whose newest event is older are removed; absent: never"
    )
    max_wait_s: float = Field(2.0, gt=0, description="an answer waits at most so long for a slow disk")
    max_waiting_bytes: int = Field(
        64 * 1024 * 1024, ge=4096, description="what waits for a slow disk beyond this is lost"
    )

    @field_validator("redact")
    @classmethod
    def _can_be_redacted(cls, value: list[str]) -> list[str]:
        parse_kinds(value)
        return value


class LearningSettings(Section):
    """When the gateway learns by itself."""

    interval_s: float = Field(
        60.0, ge=0, description="how often to see whether a look is due; 0: never by itself"
    )
    python: Path | None = Field(
        None,
        description="the Python that has torch, to fine-tune encoders (the extra `train`); absent: the gateway's own",
    )
    threads: int = Field(1, ge=1, le=256, description="cores that fine-tuning may take")


class ObserveSettings(Section):
    """What the gateway says of itself beside its metrics."""

    log_format: Literal["text", "json"] = "text"
    access_log_sample: float = Field(
        0.0, ge=0, le=1, description="share of requests that get a line in the log though nothing failed"
    )
    otel: bool | None = Field(
        None, description="whether to send traces; absent: if OTEL_EXPORTER_OTLP_ENDPOINT is set"
    )

    def traced(self) -> bool:
        """Say whether traces are wanted. OpenTelemetry's own switches go before ours.

        Raises ConfigError for a protocol that we don't speak.
        """
        environment = {name: value.strip().lower() for name, value in os.environ.items() if value.strip()}
        exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
        if environment.get("OTEL_SDK_DISABLED") == "true" or exporter == "none" or self.otel is False:
            return False
        if self.otel is None and not _OTLP_ENDPOINTS & environment.keys():
            return False
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if environment.get(name, "http/protobuf") != "http/protobuf":
                raise ConfigError(
                    f"traces go out over http/protobuf only, and {name} says {environment[name]}: change it, or "
                    "set observe.otel = false"
                )
        return True


_OF_EVERY_STUDENT = {"kind", "skip", "skip_at_most", "usd_per_hour"}
_OF_SERVED_STUDENTS = {"base_url", "model", "api_key_env", "timeout_s", "trained_until"}
_OF_FINE_TUNED_STUDENTS = {"base", "precision", "train_share"}
_OF_ONE_STUDENT: Mapping[str, set[str]] = {
    "linear": {"sees", "features", "embedder"},
    "encoder": {"sees", *_OF_FINE_TUNED_STUDENTS, *_OF_SERVED_STUDENTS},
    "lm": {
        "adapter",
        "hedge",
        "checkpoints",
        "commit_tokens",
        "hold_back_s",
        "max_tokens",
        "top_logprobs",
        "samples",
        "price",
        *_OF_SERVED_STUDENTS,
    },
}
"""Which keys a kind of student has."""


class StudentChoice(Section):
    """Which student a task gets. It acts with the next release: what is live keeps what it was tested with."""

    kind: Literal["linear", "encoder", "lm"] = "linear"
    sees: Sees = Field(
        "message", description="of `linear` and `encoder`: what of a conversation the student sees"
    )
    features: Literal["tfidf", "embedding"] = Field("tfidf", description="of `linear`: what it is fitted to")
    embedder: Path | None = Field(
        None, description="of `linear` over embeddings: the folder of a sentence encoder"
    )
    base: Path | None = Field(
        None, description="of `encoder`: the folder of the Hugging Face encoder to fine-tune"
    )
    precision: Literal["fp32", "int8"] = Field(
        "fp32", description="of `encoder`, fine-tuned: int8 is smaller and faster, and a student of its own"
    )
    train_share: float = Field(
        0.6,
        ge=0.1,
        le=0.9,
        description="of `encoder`, fine-tuned: the share of exchanges that trains it; the others judge it, for ever",
    )
    hedge: bool = Field(
        False, description="of `lm`: whether the teacher starts beside it where an escalation is foreseen"
    )
    base_url: str | None = Field(
        None,
        description="of `lm`: an OpenAI-compatible server; of `encoder`: a vLLM with a classifier; absent: "
        "those of `student.vllm`",
    )
    model: str | None = Field(None, description="of `lm` and `encoder`: the model's name there")
    adapter: Path | None = Field(
        None,
        description="of `lm`: the folder of a LoRA adapter (peft) that makes `model` this task's student",
    )
    api_key_env: str | None = Field(
        None,
        description="of `lm` and `encoder`: the environment variable that holds the server's key, if it wants one",
    )
    usd_per_hour: float | None = Field(
        None, ge=0, description="price of what it runs on; absent: as for all students; acts at once"
    )
    price: Price | None = Field(
        None, description="of `lm`: what a provider bills, in place of a price by the hour; acts at once"
    )
    skip: Literal["auto", "never"] = Field(
        "auto",
        description="whether requests foreseen to be escalated skip the student, where that pays",
    )
    skip_at_most: float = Field(
        0.02, gt=0, le=0.2, description="the share of what the student would answer that skipping may lose"
    )
    checkpoints: list[int] = Field(
        default=[8, 24, 64], description="of `lm`: numbers of tokens at which a hopeless answer is given up"
    )
    commit_tokens: int = Field(64, ge=1, description="of `lm`: where a streamed answer is judged")
    hold_back_s: float = Field(
        1.0, gt=0, description="of `lm`: how long a streamed request waits for that at most"
    )
    timeout_s: float = Field(
        30.0, gt=0, description="of `lm` and `encoder`: deadline of an answer, and of every silence"
    )
    max_tokens: int = Field(1024, ge=1, description="of `lm`: bound of an answer; the client's may be lower")
    top_logprobs: int = Field(5, ge=0, le=20, description="of `lm`: alternatives to ask for of each token")
    samples: int = Field(
        0,
        ge=0,
        le=20,
        description="of `lm`: more answers to draw for each, to tell how sure it is without log-probabilities",
    )
    trained_until: AwareDatetime | None = Field(
        None,
        description="of `lm` and `encoder`: what was logged until then, the model may have been trained on",
    )

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        return None if value is None else _check_url(value)

    @field_validator("api_key_env")
    @classmethod
    def _is_the_name_of_a_variable(cls, value: str | None) -> str | None:
        return None if value is None else _check_variable(value, "STUDENT_API_KEY")

    @field_validator("checkpoints")
    @classmethod
    def _are_counts(cls, value: list[int]) -> list[int]:
        if len(value) > _MOST_CHECKPOINTS or not all(tokens >= 1 for tokens in value):
            raise ValueError(f"should be at most {_MOST_CHECKPOINTS} numbers of tokens, each at least 1")
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.served:
            if not self.model:
                or_base = "; or base, the folder of one to fine-tune" if self.kind == "encoder" else ""
                raise ValueError(
                    f'a student of kind "{self.kind}" needs model, its name where it is served, and base_url, which '
                    f"says where, unless student.vllm does{or_base}"
                )
            if self.base_url is None and self.api_key_env is not None:
                raise ValueError("api_key_env is the key of base_url: name that, too")
        if self.kind == "encoder":
            foreign = self.model_fields_set & (
                _OF_FINE_TUNED_STUDENTS if self.served else _OF_SERVED_STUDENTS
            )
            if foreign:
                raise ValueError(
                    "an encoder is fine-tuned here (base) or served elsewhere (model, base_url): "
                    f"{', '.join(sorted(foreign))} is for the other"
                )
        if self.price is not None and self.usd_per_hour is not None:
            raise ValueError(
                "a student is paid by its tokens (price) or by the hour (usd_per_hour), not both"
            )
        foreign = self.model_fields_set - _OF_EVERY_STUDENT - _OF_ONE_STUDENT[self.kind]
        if foreign == {"sees"}:
            raise ValueError(
                f'a student of kind "{self.kind}" has no sees: a language model sees the whole request'
            )
        if foreign:
            others = [f'"{kind}"' for kind, own in _OF_ONE_STUDENT.items() if foreign <= own]
            raise ValueError(
                f'a student of kind "{self.kind}" has no {", ".join(sorted(foreign))}: '
                f"that is for students of kind {' or '.join(others)}"
            )
        if (self.features == "embedding") != (self.embedder is not None):
            raise ValueError(
                'features = "embedding" and embedder, the folder of a sentence encoder, need each other'
            )
        return self

    @property
    def served(self) -> bool:
        """Whether its model is given, and served elsewhere."""
        return self.kind != "linear" and self.base is None


class AgreementChoice(Section):
    """How two answers of a task are compared."""

    kind: Literal["exact", "json", "numeric"] = "exact"
    tolerance: float = Field(
        0.0, ge=0, description="of `numeric`: the largest relative difference that still agrees"
    )


class Match(Section):
    """Which requests belong to a task; every given condition must hold."""

    header: str | None = Field(
        None, description="value of x-understudy-task (the task's own name always matches)"
    )
    model: str | None = Field(None, description="the client's model, or an alias of yours")
    metadata: dict[str, str] = Field(default={}, description="entries of the request's `metadata`")
    system: str | None = Field(None, description="a regular expression searched for in the system prompt")

    @field_validator("system")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"should be a regular expression: {error}") from None
        return value


class TaskPolicy(Section):
    """How one task is learned and served; `[task_defaults]` sets it for all, discovered ones included."""

    student: StudentChoice = StudentChoice()
    agreement: AgreementChoice = AgreementChoice()
    max_disagreement: float = Field(0.05, gt=0, lt=1)
    certainty: float = Field(0.9, gt=0, lt=1)
    admission: Literal["looks", "e-process"] = Field(
        "looks",
        description="how the promise is tested: now and then by all labels, or by those to come, at any time",
    )
    audit_rate: float | None = Field(None, gt=0, le=1, description="absent: 5 %, then 2 % (STATISTICS.md §2)")
    noise_rate: float = Field(
        0.005,
        ge=0,
        le=1,
        description="share of requests that the teacher is asked twice, while no release is live, to see whether it "
        "agrees with itself (STATISTICS.md §5); 0: none",
    )
    always_escalate: list[str] = Field(
        default=[], description="student answers that always go to the teacher"
    )
    prove: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default={},
        description="answers that are served only once they have kept a bound of their own: the most that may disagree",
    )
    on_teacher_failure: Literal["error", "student"] = "error"
    cache: bool | None = Field(
        None,
        description="which answers may be cached: absent, those at temperature 0; true, all; false, none",
    )


def _check_task(policy: TaskPolicy, where: str = "") -> None:
    """Raise ValueError for keys that contradict each other.

    A named answer may not disagree more than all may: it would loosen what is promised of them.
    """
    if policy.admission == "e-process" and policy.student.kind != "linear":
        raise ValueError(f'{where}admission = "e-process" tests students of kind "linear" only, so far')
    for answer, bound in policy.prove.items():
        if bound > policy.max_disagreement:
            raise ValueError(
                f"{where}prove lets {bound:g} of the answers {answer!r} disagree, but max_disagreement is "
                f"{policy.max_disagreement:g}: name an answer there to hold it to that or less"
            )


def _check_served(policy: TaskPolicy, info: ValidationInfo, where: str = "") -> None:
    """Raise ValueError for a student that nobody serves."""
    student = info.data.get("student")
    if not isinstance(student, StudentSettings):
        return  # what is wrong with it is said
    if policy.student.served and policy.student.base_url is None and student.vllm is None:
        raise ValueError(
            f'{where}a student of kind "{policy.student.kind}" needs base_url, where it is served, or [student.vllm], '
            "which says that for all"
        )


class TaskSettings(TaskPolicy):
    """One task with settings of its own; what it leaves out comes from `[task_defaults]`."""

    name: Name
    match: Match | None = None


class Settings(BaseSettings):
    """The whole configuration. Everything is optional but the teacher's key."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_ignore_empty=True
    )

    state_dir: Path = Path("state")
    server: ServerSettings = ServerSettings()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    cache: CacheSettings = CacheSettings()
    log: LogSettings = LogSettings()
    learning: LearningSettings = LearningSettings()
    observe: ObserveSettings = ObserveSettings()
    task_defaults: TaskPolicy = TaskPolicy()
    task: list[TaskSettings] = []

    @field_validator("task")
    @classmethod
    def _names_differ(cls, value: list[TaskSettings]) -> list[TaskSettings]:
        names = [task.name for task in value]
        for name in RESERVED_TASKS.intersection(names):
            raise ValueError(f"{name} is a name of our own (prompts beyond server.max_tasks go there)")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"should name every task once; {', '.join(twice)} is there more than once")
        return value

    @field_validator("task_defaults")
    @classmethod
    def _defaults_hold_named_answers_to_more(cls, value: TaskPolicy, info: ValidationInfo) -> TaskPolicy:
        _check_task(value)
        _check_served(value, info)
        return value

    @field_validator("task")
    @classmethod
    def _tasks_hold_named_answers_to_more(
        cls, value: list[TaskSettings], info: ValidationInfo
    ) -> list[TaskSettings]:
        defaults = info.data.get("task_defaults")
        if isinstance(defaults, TaskPolicy):  # else what is wrong with it is said
            for task in value:
                given = {**defaults.model_dump(exclude_unset=True), **task.model_dump(exclude_unset=True)}
                _check_task(TaskSettings(**given), f"task {task.name}: ")
                _check_served(TaskSettings(**given), info, f"task {task.name}: ")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file (which comes in as init arguments); nothing else is read."""
        return env_settings, init_settings

    def for_task(self, name: str) -> TaskSettings:
        """Return the settings of one task: its own, else the defaults under its name."""
        own: dict[str, Any] = {"name": name}
        for task in self.task:
            if task.name == name:
                own = task.model_dump(exclude_unset=True)
        return TaskSettings(**{**self.task_defaults.model_dump(exclude_unset=True), **own})

    def teacher_key(self) -> SecretStr | None:
        """Return the teacher's key from the environment, or None: then the client's own key is forwarded.

        Raises ConfigError for a key that can't stand in a header, without showing it.
        """
        value = os.environ.get(self.teacher.api_key_env, "").strip()
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(
                f"the teacher's key in the environment variable {self.teacher.api_key_env} has characters "
                "that can't be sent (a line break, a letter with an accent, …): set it again"
            )
        return SecretStr(value) if value else None
