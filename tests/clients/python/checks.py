"""LangChain, LlamaIndex, pydantic-ai and instructor through the gateway: see ../run.py."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import instructor
import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, direct
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelRequest, TextPart, ToolCallPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition

BASE_URL, STAND_IN_URL = sys.argv[1:3]
WORDS = "one two three four five six seven"
KEY = "unused"
MODEL = "stand-in"


class Label(BaseModel):
    label: str
    score: int


class look_up(BaseModel):  # noqa: N801 - the name of the recorded call
    city: str


def expect(holds: object, said: object) -> None:
    if not holds:
        raise AssertionError(f"got {said!r}"[:200])


def raised(kinds: type[Exception] | tuple[type[Exception], ...], act: Callable[[], Any]) -> Exception:
    try:
        got = act()
    except kinds as error:
        return error
    raise AssertionError(f"no error, but {got!r}"[:200])


def disconnected() -> int:
    with urllib.request.urlopen(STAND_IN_URL.removesuffix("/v1") + "/stats") as answer:
        return int(json.load(answer)["disconnected"])


def given_up(stream: Callable[[], Iterator[Any]]) -> None:
    """Read one piece, close the stream, and see that the teacher's connection is closed."""
    before = disconnected()
    pieces = stream()
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while disconnected() == before:
        expect(time.monotonic() < deadline, "the teacher's connection is still open after 5 s")
        time.sleep(0.05)


def langchain() -> Iterator[tuple[str, Callable[[], None]]]:
    llm = ChatOpenAI(base_url=BASE_URL, api_key=KEY, model=MODEL, max_retries=0, stream_usage=True)

    @tool
    def look_up(city: str) -> str:
        """Look a city up."""
        return city

    def whole() -> None:
        got = llm.invoke("hello")
        expect(got.content == WORDS and got.usage_metadata["total_tokens"] > 0, got)

    def stream() -> None:
        parts = list(llm.stream("hello"))
        expect("".join(part.content for part in parts) == WORDS and len(parts) > 5, parts)
        reasons = [part.response_metadata.get("finish_reason") for part in parts]
        expect([reason for reason in reasons if reason] == ["stop"], reasons)

    def usage() -> None:
        total = None
        for part in llm.stream("hello"):
            total = part if total is None else total + part
        whole = llm.invoke("hello").usage_metadata
        expect(total.usage_metadata["output_tokens"] == whole["output_tokens"], total.usage_metadata)

    def tools() -> None:
        total = None
        for part in llm.bind_tools([look_up]).stream("tools"):
            total = part if total is None else total + part
        (call,) = total.tool_calls
        expect(call["name"] == "look_up" and call["args"] == {"city": "Paris"} and call["id"], call)

    def structured() -> None:
        got = llm.with_structured_output(Label, method="json_schema").invoke("structured")
        expect(got == Label(label="refund", score=3), got)

    def limited() -> None:
        raised(openai.RateLimitError, lambda: llm.invoke("limited"))
        raised(openai.RateLimitError, lambda: list(llm.stream("limited")))

    def broken() -> None:
        raised(openai.APIError, lambda: list(llm.stream("breaks")))

    yield from {
        "whole": whole, "stream": stream, "usage": usage, "tools": tools, "structured": structured,
        "429": limited, "break": broken, "cancel": lambda: given_up(lambda: llm.stream("slow")),
    }.items()  # fmt: skip


def llama_index() -> Iterator[tuple[str, Callable[[], None]]]:
    def made(**more: Any) -> OpenAILike:
        return OpenAILike(
            model=MODEL, api_base=BASE_URL, api_key=KEY, is_chat_model=True, is_function_calling_model=True,
            max_retries=0, context_window=8000, **more,
        )  # fmt: skip

    llm = made()

    def asks(text: str) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=text)]

    def look_up(city: str) -> str:
        """Look a city up."""
        return city

    def whole() -> None:
        got = llm.chat(asks("hello"))
        expect(got.message.content == WORDS, got)

    def stream() -> None:
        parts = list(llm.stream_chat(asks("hello")))
        expect("".join(part.delta or "" for part in parts) == WORDS, parts)

    def usage() -> None:
        options = {"stream_options": {"include_usage": True}}
        *_, last = made(additional_kwargs=options).stream_chat(asks("hello"))
        expect(last.raw.usage is not None and last.raw.usage.total_tokens > 0, last.raw)

    def tools() -> None:
        offered = [FunctionTool.from_defaults(look_up)]
        *_, last = llm.stream_chat_with_tools(offered, user_msg="tools")
        (call,) = llm.get_tool_calls_from_response(last)
        expect(call.tool_name == "look_up" and call.tool_kwargs == {"city": "Paris"} and call.tool_id, call)

    def structured() -> None:
        schema = {"name": "label", "schema": Label.model_json_schema()}
        wanted = {"response_format": {"type": "json_schema", "json_schema": schema}}
        got = made(additional_kwargs=wanted).chat(asks("structured")).message.content
        expect(Label.model_validate_json(got or "") == Label(label="refund", score=3), got)

    def limited() -> None:
        raised(openai.RateLimitError, lambda: llm.chat(asks("limited")))
        raised(openai.RateLimitError, lambda: list(llm.stream_chat(asks("limited"))))

    def broken() -> None:
        raised(openai.APIError, lambda: list(llm.stream_chat(asks("breaks"))))

    # No cancelling: LlamaIndex has no way to close a stream before its end.
    yield from {
        "whole": whole, "stream": stream, "usage": usage, "tools": tools, "structured": structured,
        "429": limited, "break": broken,
    }.items()  # fmt: skip


def pydantic_ai() -> Iterator[tuple[str, Callable[[], None]]]:
    client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=client))
    offered = ModelRequestParameters(
        function_tools=[ToolDefinition(name="look_up", parameters_json_schema=look_up.model_json_schema())],
        allow_text_output=True,
    )

    def asks(text: str) -> list[Any]:
        return [ModelRequest.user_text_prompt(text)]

    def streamed(text: str, **more: Any) -> Any:
        with direct.model_request_stream_sync(model, asks(text), **more) as stream:
            for _ in stream:
                pass
            return stream.response

    def whole() -> None:
        got = direct.model_request_sync(model, asks("hello"))
        expect([part.content for part in got.parts if isinstance(part, TextPart)] == [WORDS], got)

    def stream() -> None:
        got = streamed("hello")
        expect([part.content for part in got.parts if isinstance(part, TextPart)] == [WORDS], got)
        expect(got.finish_reason == "stop" and got.provider_response_id, got)

    def usage() -> None:
        whole = direct.model_request_sync(model, asks("hello")).usage
        expect(streamed("hello").usage.output_tokens == whole.output_tokens > 0, whole)

    def tools() -> None:
        got = streamed("tools", model_request_parameters=offered)
        (call,) = [part for part in got.parts if isinstance(part, ToolCallPart)]
        expect(call.tool_name == "look_up" and call.args_as_dict() == {"city": "Paris"}, call)

    def structured() -> None:
        got = Agent(model, output_type=NativeOutput(Label)).run_sync("structured").output
        expect(got == Label(label="refund", score=3), got)

    def limited() -> None:
        for ask in (lambda: direct.model_request_sync(model, asks("limited")), lambda: streamed("limited")):
            error = raised(ModelHTTPError, ask)
            expect(isinstance(error, ModelHTTPError) and error.status_code == 429, error)

    def broken() -> None:
        raised((openai.APIError, ModelHTTPError), lambda: streamed("breaks"))

    yield from {
        "whole": whole, "stream": stream, "usage": usage, "tools": tools, "structured": structured,
        "429": limited, "break": broken,
    }.items()  # fmt: skip


def of_instructor() -> Iterator[tuple[str, Callable[[], None]]]:
    client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
    by_schema = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    by_tools = instructor.from_openai(client, mode=instructor.Mode.TOOLS)

    def asks(text: str) -> Any:
        return {"model": MODEL, "max_retries": 0, "messages": [{"role": "user", "content": text}]}

    def structured() -> None:
        got = by_schema.create(response_model=Label, **asks("structured"))
        expect(got.model_dump() == {"label": "refund", "score": 3}, got)

    def stream() -> None:
        *_, last = by_schema.create_partial(response_model=Label, **asks("structured"))
        expect((last.label, last.score) == ("refund", 3), last)

    def tools() -> None:
        got = by_tools.create(response_model=look_up, **asks("tools"))
        expect(got.model_dump() == {"city": "Paris"}, got)

    def tools_streamed() -> None:
        *_, last = by_tools.create_partial(response_model=look_up, **asks("tools"))
        expect(last.city == "Paris", last)

    def limited() -> None:
        error = raised(Exception, lambda: by_schema.create(response_model=Label, **asks("limited")))
        expect("429" in str(error), error)

    yield from {
        "structured": structured, "stream": stream, "tools": tools, "tools streamed": tools_streamed,
        "429": limited,
    }.items()  # fmt: skip


def main() -> None:
    for client, package, checks in (
        ("LangChain", "langchain-openai", langchain),
        ("LlamaIndex", "llama-index-llms-openai-like", llama_index),
        ("pydantic-ai", "pydantic-ai-slim", pydantic_ai),
        ("instructor", "instructor", of_instructor),
    ):
        for name, check in checks():
            ok, detail = True, ""
            try:
                check()
            except Exception as error:
                ok, detail = False, f"{type(error).__name__}: {error}"[:300]
            found = {"client": client, "version": version(package), "check": name, "ok": ok, "detail": detail}
            print(json.dumps(found), flush=True)


main()
