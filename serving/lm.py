"""The student `lm`: a language model behind any OpenAI-compatible server, asked as a stream, with log-probabilities.

Always at temperature 0 and always as a stream, also where a whole answer is wanted: what is known of an answer is the
same then, at the same tokens. A release holds its plan (`serving.lm_plan`) and nothing of the model, which is its
server's to keep: a server that answers under the same name with another model makes what was tested void.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from serving.adapter import Adapter
from serving.adapter_loading import AdapterLoading
from serving.adapter_shelf import Loaded
from serving.chat import text_of, token_limit
from serving.engines import Engines
from serving.errors import DamagedRelease, UpstreamRefused, UpstreamTimeout
from serving.exchange import Json, StudentAnswer
from serving.lm_plan import LmPlan
from serving.lm_stream import LmStream
from serving.pool import served_at
from serving.pool_adapters import PoolAdapterLoading
from serving.sampled_stream import SampledStream
from serving.server_record import Asking, ServerRecord
from serving.student import Failed, StudentStream, unheard
from serving.student_server import Served, StudentBroken
from serving.tally import Metering, Tally
from serving.upstream import UpstreamResponse

_CHAT = "/chat/completions"
_NO_SUCH_MODEL = 404
_PASSED_ON = (
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "stop",
    "seed",
    "frequency_penalty",
    "presence_penalty",
)
"""What of a request the model sees. The rest is the teacher's: who asks, how it is billed, how it is sampled."""


class LmStudent:
    """A language model, asked at `server`, which it owns. `metering` makes the signals of each answer.

    `loading` has its adapter loaded there; None: there is no adapter, or the server is known to have it.
    """

    streams = True

    def __init__(
        self,
        plan: LmPlan,
        server: Served,
        metering: Metering,
        loading: AdapterLoading | PoolAdapterLoading | None = None,
    ) -> None:
        self.plan = plan
        self._loading = loading
        self.patience_s = plan.timeout_s
        self._server = server
        self._metering = metering
        self.record = ServerRecord(Asking(logprobs=not plan.samples))
        self._open: set[LmStream] = set()

    @classmethod
    def of(cls, plan: LmPlan, metering: Metering, engines: Engines | None = None) -> LmStudent:
        """The student of a plan, with its key from the environment. Raises ConfigError as `served_at` does.

        `engines` is what it shares with other students of the process, the shelf with its adapter among it; None: there
        are none, and nothing is loaded for it.
        """
        engines = engines or Engines()
        server = served_at(
            plan.base_url,
            below="/v1",
            timeout_s=plan.timeout_s,
            api_key_env=plan.api_key_env,
            engines=engines,
        )
        loading: AdapterLoading | PoolAdapterLoading | None = None
        if plan.adapter is not None and engines.adapters is not None:
            if plan.base_url is not None:
                told = Loaded(plan.base_url, plan.api_key_env)
                loading = AdapterLoading(plan.adapter, server, engines.adapters, told)
            elif engines.pool is not None:
                loading = PoolAdapterLoading(
                    plan.adapter, engines.pool, engines.adapters, timeout_s=plan.timeout_s
                )
        return cls(plan, server, metering, loading)

    async def prepare(self) -> None:
        """Have its adapter loaded, if it has one. Raises AdapterNotLoaded or UpstreamError."""
        if self._loading is not None:
            await self._loading.load()

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        return bool(self._open)

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` that isn't left to a student, or that its server refused just now, or None."""
        return unsupported(request) or ("refused" if self.record.refuses(request) else None)

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        """The whole answer to a supported request. Raises UpstreamBroken or UpstreamTimeout."""
        stream = self.stream(request)
        try:
            # A server that sends signs of life, or a token now and then, is never silent.
            async with asyncio.timeout(self.patience_s):
                async for _ in stream:
                    pass
        except TimeoutError:
            raise UpstreamTimeout(f"the student's answer wasn't whole after {self.patience_s:g} s") from None
        finally:
            await stream.aclose()
            answer = stream.answer()
            if not answer.complete:
                failed(answer.took_s)
        return answer

    def stream(self, request: Json) -> StudentStream:
        """The same while it is made: from the beginning of the iteration on."""
        answer = self._begun(request, drawn=False)
        if not self.plan.samples:
            return answer

        def draw() -> list[LmStream]:
            return [self._begun(request, drawn=True) for _ in range(self.plan.samples)]

        return SampledStream(answer, draw, self._metering(request))

    def _begun(self, request: Json, *, drawn: bool) -> LmStream:
        async def ask() -> UpstreamResponse:
            self._open.add(stream)
            try:
                response = await self._ask(request, drawn=drawn)
            except BaseException:
                self._open.discard(stream)
                raise
            response.when_closed(lambda: self._open.discard(stream))
            return response

        tally = Tally(self._metering(request), self.plan.marks)
        stream = LmStream(
            ask,
            request,
            tally,
            plan=self.plan,
            limit=self._limit(request),
            record=self.record,
            refused=lambda error: self._refused(request, error),
            device=self._server.device,
        )
        return stream

    async def aclose(self) -> None:
        """Close every connection."""
        if self._loading is not None:
            await self._loading.aclose()
        await self._server.aclose()

    async def _ask(self, request: Json, *, drawn: bool) -> UpstreamResponse:
        """Send a request; from the time on that the server has refused something optional, without that."""
        asking = usual = self.record.asking
        while True:
            try:
                response = await self._sent(self._body(request, asking, drawn=drawn))
            except UpstreamRefused as error:
                instead = asking.instead(error)
                if instead is None:
                    raise self._refused(request, error) from None
                asking = instead
            else:
                if asking != usual:
                    self.record.asking = asking
                return response

    def _refused(self, request: Json, error: UpstreamRefused) -> StudentBroken:
        """Take note of a refusal; return the error that it is."""
        self.record.refuse(request, error)
        return self._server.refusal(error)

    async def _sent(self, asked: Json) -> UpstreamResponse:
        """Send a body; a server that was started anew has lost the adapter, and loads it before it is asked again."""
        try:
            return await self._server.post(_CHAT, asked)
        except UpstreamRefused as error:
            if error.status != _NO_SUCH_MODEL or self._loading is None:
                raise
        await self._loading.load()
        return await self._server.post(_CHAT, asked)

    def _body(self, request: Json, asking: Asking, *, drawn: bool) -> Json:
        asked: Json = {name: request[name] for name in _PASSED_ON if request.get(name) is not None}
        asked |= {
            "model": self.plan.served_as,
            "temperature": int(drawn),
            asking.limit: self._limit(request),
            "stream": True,
        }
        if asking.usage:
            asked["stream_options"] = {"include_usage": True}
        if drawn:
            asked.pop("seed", None)  # all of them would be the same
        if asking.logprobs:
            asked["logprobs"] = True
        if asking.logprobs and asking.alternatives:
            asked["top_logprobs"] = self.plan.top_logprobs
        return asked

    def _limit(self, request: Json) -> int:
        limit = token_limit(request)
        return self.plan.max_tokens if limit is None else min(limit, self.plan.max_tokens)

    def files(self) -> dict[str, bytes]:
        """The student as files of a release; `load` reads them back."""
        return self.plan.files()

    @classmethod
    def load(
        cls, files: Mapping[str, bytes], metering: Metering, engines: Engines | None = None
    ) -> LmStudent:
        """Read the files of a release; its adapter is put on the shelf, if there is one.

        Raises DamagedRelease, ConfigError for a key that can't be sent, and OSError as the disk does.
        """
        plan = LmPlan.load(files)
        if plan.adapter is not None:
            adapter = Adapter.of_release(files)
            if adapter.name != plan.adapter:
                raise DamagedRelease(f"the adapter is {adapter.name}, and {plan.adapter} was tested")
            if engines is not None and engines.adapters is not None:
                engines.adapters.put(adapter)
        return cls.of(plan, metering, engines)


def unsupported(request: Json) -> str | None:
    """The feature of `request` that isn't left to a student, or None: text, tools and formats are."""
    for name, feature in (("functions", "tools"), ("logit_bias", "logit_bias"), ("audio", "audio")):
        if request.get(name):
            return feature
    if request.get("n") not in (None, 1):
        return "n"
    if request.get("logprobs") or request.get("top_logprobs"):
        return "logprobs"
    if request.get("modalities") not in (None, [], ["text"]):
        return "audio"
    if request.get("web_search_options") is not None:
        return "web_search"
    messages = request["messages"]
    if messages[-1].get("role") == "assistant":
        return "prefill"
    spoken = (message.get("content") for message in messages)
    return "content" if any(said and text_of(said) is None for said in spoken) else None
