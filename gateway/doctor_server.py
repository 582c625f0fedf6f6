"""What `understudy doctor` says of a language model's server: what it gives, and what it refuses, each by asking it."""

from __future__ import annotations

from serving.errors import UnderstudyError
from serving.exchange import Json, StudentAnswer
from serving.lm import LmStudent
from serving.student_server import StudentRefused

_QUESTION: Json = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 16}
_YES: Json = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}
_TOOLS: Json = {
    "tools": [{"type": "function", "function": {"name": "say", "parameters": _YES, "strict": True}}]
}
_SHOWN = 100


async def server_limits(student: LmStudent) -> str:
    """Say what the server of a student gives that has just answered. Asks it three more questions of a few tokens."""
    seen = student.record.seen
    gives = [f"log-probabilities ({seen.alternatives} alternatives a token)"] if seen.logprobs else []
    lacks: list[str] = [] if seen.logprobs else ["log-probabilities"]
    (gives if seen.usage else lacks).append("usage")
    (gives if seen.streamed else lacks).append("streams")
    schema: Json = {"type": "json_schema", "json_schema": {"name": "yes", "schema": _YES, "strict": True}}
    named: Json = {"type": "function", "function": {"name": "say"}}
    for what, more in (
        ("JSON schemas", {"response_format": schema}),
        ("tools", _TOOLS),
        ("a tool that is named", {**_TOOLS, "tool_choice": named}),
    ):
        try:
            answer = await student.answer({**_QUESTION, **more})
        except StudentRefused as error:
            lacks.append(f"{what} (it says {_why(error)})")
        except UnderstudyError as error:
            lacks.append(f"{what} ({_why(error)})")
        else:
            if what == "JSON schemas" and not _said(answer).lstrip().startswith("{"):
                lacks.append("JSON schemas, which it takes and ignores")
            else:
                gives.append(what)
    told = student.record.seen.model
    named_so = f", as {told!r}" if told not in (None, student.plan.served_as) else ""
    return f"with {', '.join(gives)}{named_so}" + (f"; without {'; '.join(lacks)}" if lacks else "")


def _why(error: Exception) -> str:
    said = str(error).partition(" answered with ")[2] or str(error)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"


def _said(answer: StudentAnswer) -> str:
    content = answer.choices[0]["message"].get("content") if answer.choices else None
    return content if isinstance(content, str) else ""
