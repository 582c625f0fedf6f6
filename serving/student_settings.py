"""`[student]`: what students run on and cost. Which one a task gets stands in `serving/student_choice.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.execution_providers import CPU
from serving.section import Section, check_url, check_variable

_OUR_VLLM_FLAGS = frozenset({"--api-key", "--host", "--model", "--port", "--uds"})


class OnnxSettings(Section):
    """What students on ONNX Runtime run on."""

    providers: list[str] = Field(
        default=[CPU],
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
        return [check_url(url) for url in value]

    @field_validator("api_key_env")
    @classmethod
    def _is_the_name_of_a_variable(cls, value: str | None) -> str | None:
        return None if value is None else check_variable(value, "VLLM_API_KEY")

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
