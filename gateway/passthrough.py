"""Everything under `/v1/` but chat completions: streamed to the teacher and back, unchanged.

Bodies pass in both directions without being held, whatever their type and encoding; the gateway adds its
authentication, counts the requests, and ends uploads beyond a limit. Only an error that isn't JSON is put into
OpenAI's envelope, since clients read it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from gateway import names
from gateway.auth import Gate
from gateway.client import Client, ClientGone, too_large
from gateway.envelope import Refusal, enveloped, passed_on, refusal_of
from gateway.metrics import NOWHERE, Metrics
from serving.errors import RequestError, UnderstudyError, UpstreamError
from serving.slots import UpstreamBusy
from serving.teacher import Teacher
from serving.upstream import UpstreamResponse
from serving.wire import leads_below

_HELD_BYTES = 64 * 1024
_OURS = frozenset({names.REQUEST_ID_HEADER, "date"})
"""Headers of the teacher's answer that the gateway, or the server it runs in, writes itself."""
_TOLD = [(names.ROUTE_HEADER, "teacher"), (names.REASON_HEADER, names.REASON_PASSTHROUGH)]


class Passthrough:
    """Passes requests on. A body of more than `max_upload_bytes` is refused with 413.

    Of a body, `max_held_bytes` are in memory at most. `paths` are what is passed on, below /v1/; None: everything.
    """

    max_held_bytes = _HELD_BYTES

    def __init__(
        self,
        teacher: Teacher,
        gate: Gate,
        metrics: Metrics,
        *,
        max_upload_bytes: int,
        paths: Sequence[str] | None = None,
    ) -> None:
        self._teacher = teacher
        self._gate = gate
        self._metrics = metrics
        self._max_upload_bytes = max_upload_bytes
        self._paths = paths

    async def __call__(self, client: Client) -> None:
        """Serve one request to its end."""
        began = time.perf_counter()
        code = 499
        try:
            code = await self._serve(client)
        except ClientGone:
            pass
        except UnderstudyError as error:
            if client.gone:
                return
            if isinstance(error, UpstreamError) and not isinstance(error, UpstreamBusy):
                self._metrics.record_upstream_error("teacher", error.kind)
            refusal = refusal_of(error)
            code = refusal.status
            if client.started:
                # Too late to say it: an answer that isn't ended makes the server close the connection.
                client.failure = str(error)
                return
            await client.refuse(refusal, _TOLD)
        finally:
            self._metrics.record_request(
                NOWHERE, "teacher", names.REASON_PASSTHROUGH, code, time.perf_counter() - began
            )

    async def _serve(self, client: Client) -> int:
        caller = self._gate.admit(client.header("authorization"))
        if self._paths is not None and not leads_below(client.target, self._paths):
            path = client.target.partition("?")[0]
            raise RequestError(
                f"{client.method[:20]} {path[:200]} isn't offered here: this gateway passes on chosen paths only "
                "(server.pass_through).",
                status=404,
                code="not_passed_through",
            )
        upload = _Upload(client, self._max_upload_bytes)
        body = await upload.body()
        # The id that the client gets back and the log names, also where the client sent none or one of no use.
        headers = [header for header in client.headers if header[0] != names.REQUEST_ID_HEADER]
        headers.append((names.REQUEST_ID_HEADER, client.request_id))
        with client.watched():
            try:
                response = await self._teacher.forward(
                    client.method, client.target, headers, body, authorization=caller.authorization
                )
            except UpstreamError:
                if upload.refused is not None:
                    # The HTTP client tells of what its request's body raises as a broken connection.
                    raise upload.refused from None
                raise
            async with response:
                await self._relay(client, response)
            return response.status
        return 499  # the client has gone: `watched` was left quietly

    async def _relay(self, client: Client, response: UpstreamResponse) -> None:
        headers = [
            (name, value)
            for name, value in response.headers
            if name not in _OURS and not name.startswith(names.OWN_HEADER_PREFIX)
        ]
        kind = next((value for name, value in headers if name == "content-type"), "")
        if response.status >= 400 and "json" not in kind:
            packed = any(name == "content-encoding" for name, _ in headers)
            # A page that is compressed can't be quoted, and isn't worth unpacking.
            body = enveloped(response.status, b"" if packed else await response.read())
            await client.refuse(Refusal(response.status, body, passed_on(headers)), _TOLD)
            return
        await client.start(response.status, [*headers, *_TOLD])
        async for piece in response.chunks():
            await client.piece(piece)
        await client.end()


class _Upload:
    """A request's body on its way through; `refused` is the error once it has turned out too large."""

    def __init__(self, client: Client, limit: int) -> None:
        self.refused: RequestError | None = None
        self._client = client
        self._limit = limit

    async def body(self) -> bytes | AsyncIterator[bytes]:
        """Return the body: whole if it is small, so that it can be sent again, else as it comes in.

        Raises RequestError (413), for one of unknown length while it is iterated.
        """
        declared = self._client.declared_bytes()
        if (declared or 0) > self._limit:
            raise self._too_large()
        if not self._client.has_body() or (declared is not None and declared <= _HELD_BYTES):
            return await self._client.read(_HELD_BYTES)
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        size = 0
        async for piece in self._client.pieces():
            size += len(piece)
            if size > self._limit:
                self.refused = self._too_large()
                raise self.refused
            yield piece

    def _too_large(self) -> RequestError:
        return too_large(self._limit, "server.max_upload_bytes")
