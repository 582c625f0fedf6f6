"""`[teacher]`: the expensive model, and how it is asked."""

from __future__ import annotations

from pydantic import Field, field_validator

from serving.section import Section, check_url, check_variable


class Price(Section):
    """USD per million tokens."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cached_input: float | None = Field(None, ge=0)


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
        return check_url(value)

    @field_validator("api_key_env")
    @classmethod
    def _is_the_name_of_a_variable(cls, value: str) -> str:
        return check_variable(value, "OPENAI_API_KEY")
