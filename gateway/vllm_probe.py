"""Whether a vLLM that we run is there, and whether it still answers."""

from __future__ import annotations

import asyncio

import orjson

from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.upstream import Upstream

_LOOK_S = 10.0
_QUESTIONS: dict[str, list[tuple[str, Json]]] = {
    "generate": [("/v1/completions", {"prompt": "a", "max_tokens": 1})],
    "pooling": [
        ("/classify", {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/pooling", {"input": "a"}),
    ],
}
"""The shortest there is, by runner; which of the poolings a model does, its server knows."""
_PROGRESS = (b"vllm:generation_tokens_total", b"vllm:prompt_tokens_total", b"vllm:request_success_total")


class VllmProbe:
    """Asks one server; `url` is its root. To be closed."""

    def __init__(self, url: str, key: str, model: str, runner: str) -> None:
        self._upstream = Upstream(url, timeout_s=3600.0, who="vLLM")
        self._headers = [("authorization", f"Bearer {key}"), ("content-type", "application/json")]
        self._model = model
        self._questions = _QUESTIONS[runner]

    async def is_healthy(self, within_s: float) -> bool:
        """Whether `/health` says so."""
        return (await self._ask("GET", "/health", within_s))[0] == 200

    async def names_model(self) -> bool:
        """Whether the model is there, and takes our key: else somebody else listens on that port."""
        status, body = await self._ask("GET", "/v1/models", _LOOK_S)
        try:
            return status == 200 and any(one["id"] == self._model for one in orjson.loads(body)["data"])
        except (KeyError, TypeError, ValueError):
            return False

    async def answers(self, within_s: float) -> bool:
        """Whether a smallest question is answered in time, or at least others were meanwhile: a queue is no stall."""
        before = await self._progress()
        for path, question in self._questions:
            status, _ = await self._ask("POST", path, within_s, {"model": self._model, **question})
            if status not in (0, 404):
                return status < 500
            if status == 0:
                break
        after = await self._progress()
        return before != after

    async def aclose(self) -> None:
        """Close every connection."""
        await self._upstream.aclose()

    async def _progress(self) -> list[bytes]:
        """What it counts of answers; the same as long as there are none."""
        _, body = await self._ask("GET", "/metrics", _LOOK_S)
        return [line for line in body.splitlines() if line.startswith(_PROGRESS)]

    async def _ask(
        self, method: str, path: str, within_s: float, body: Json | None = None
    ) -> tuple[int, bytes]:
        """Status and body; 0 where there was no answer in time."""
        sent = b"" if body is None else orjson.dumps(body)
        try:
            async with asyncio.timeout(within_s):
                response = await self._upstream.request(method, path, headers=self._headers, body=sent)
                async with response:
                    return response.status, await response.read()
        except (TimeoutError, UnderstudyError):
            return 0, b""
