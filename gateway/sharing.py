"""Answers for more than one: from the cache, or made once for all who ask the same at the same time.

cache ─┬─ hit ──────────────────────────────────────────────────────────────────────→ answer
       └─ miss ─┬─ somebody is at it: follow; if that fails or takes too long, lead
                └─ lead: make the answer in a flight → log → cache → answer
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator
from typing import TypeGuard

import orjson

from gateway import names
from gateway.answers import Answers, Whole
from gateway.cache import Cache
from gateway.cache_control import CacheControl, worth_keeping
from gateway.cache_entry import CachedAnswer
from gateway.cache_key import cache_key
from gateway.flight import Flight, Flights
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.presenter import Presenter, cut, written
from gateway.reply import Headers, Reply
from gateway.turn import Turn
from serving.cache_settings import CacheSettings
from serving.chat import SSE_DONE, sse
from serving.errors import UnderstudyError, UpstreamBroken, UpstreamRefused
from serving.teacher import Chunk

log = logging.getLogger("understudy.pipeline")

_FOLLOWED_AT_MOST = 2
"""How many flights a request follows that come to nothing before it goes alone: with one more try most of a
crowd still shares an answer, and nobody waits for one leader after the other."""
_MAY_PASS = frozenset({408, 409, 429})
_ABOUT_THE_KEY = frozenset({401, 403})


class Sharing:
    """Answers requests that the cache may be used for."""

    def __init__(
        self,
        *,
        cache: Cache,
        settings: CacheSettings,
        answers: Answers,
        presenter: Presenter,
        ledger: Ledger,
        metrics: Metrics,
    ) -> None:
        self.flights = Flights()
        self._cache = cache
        self._share = settings.share
        self._lease_s = settings.lease_s
        self._answers = answers
        self._presenter = presenter
        self._ledger = ledger
        self._metrics = metrics

    def key(self, turn: Turn) -> str | None:
        """Return the key of a request's answer; None for one that has none (nested too deeply to compare)."""
        try:
            return cache_key(
                turn.chat.body,
                tenant=turn.arrival.caller.tenant,
                # A prompt that is no task yet will be one by the time it is asked again.
                task=turn.newcomer or turn.task,
                generation=turn.release.generation if turn.release else 0,
                release=turn.release.checksum if turn.release else None,
                begun=turn.chat.stream and turn.release is not None and turn.release.student.streams,
                share=self._share,
                headers=turn.arrival.headers,
            )
        except ValueError:
            return None

    async def answer(self, turn: Turn, key: str, control: CacheControl) -> Reply:
        """Answer a request. Raises as `Answers.make` does."""
        if not control.read:
            self._metrics.record_cache(turn.task, "bypass")
            return await self._lead(turn, key, control)
        found = await self._cache.get(key, max_age_s=control.max_age_s)
        if _fits(found.answer, turn):
            self._metrics.record_cache(turn.task, "hit")
            return self._hit(turn, found.answer)
        for _ in range(_FOLLOWED_AT_MOST):
            flight = self.flights.get(key)
            if flight is None:
                break
            reply = await self._follow(turn, flight)
            if reply is not None:
                self._metrics.record_cache(turn.task, "joined")
                return reply
            self.flights.close(key, flight)
        self._metrics.record_cache(turn.task, "error" if found.outcome == "error" else "miss")
        return await self._lead(turn, key, control)

    def _hit(self, turn: Turn, answer: CachedAnswer) -> Reply:
        turn.replay(answer, names.REASON_HIT)
        age = (names.AGE_HEADER, str(int(answer.age_s(time.time()))))
        completion = _own(turn, answer)
        self._settle(turn)
        if turn.chat.stream:
            return self._presenter.streamed(turn, [age], _at_once(cut(turn, completion) + SSE_DONE))
        return self._presenter.whole(turn, [age], written(completion))

    def _settle(self, turn: Turn) -> None:
        self._ledger.settle(turn)
        self._ledger.note(turn)

    async def _follow(self, turn: Turn, flight: Flight) -> Reply | None:
        """Wait for an answer that is being made; None: it came to nothing, or its leader is too slow.

        Raises the leader's error if it would be this request's as well.
        """
        flight.board()
        try:
            in_time = await self._wait(turn, flight)
        except BaseException:
            flight.leave()
            raise
        if not in_time or flight.error is not None:
            flight.leave()
            if flight.error is not None and _is_everybodys(flight.error, turn, flight.turn):
                raise flight.error
            return None
        return self._ride(turn, flight)

    async def _wait(self, turn: Turn, flight: Flight) -> bool:
        """Wait until there is something to send. False after `lease_s` without a sign of life."""
        began = time.perf_counter()
        try:
            while not _may_begin(turn, flight):
                async with asyncio.timeout(self._lease_s):
                    await flight.news()
        except TimeoutError:
            return False
        finally:
            turn.waited_s += time.perf_counter() - began
        return True

    async def _lead(self, turn: Turn, key: str, control: CacheControl) -> Reply:
        flight = self.flights.start(key, turn, functools.partial(self._make, key, control))
        flight.board()
        try:
            while not _may_begin(turn, flight):
                await flight.news()
        except BaseException:
            self._leave(key, flight)
            raise
        if flight.error is not None:
            flight.leave()
            raise flight.error
        return self._ride(turn, flight, key)

    def _ride(self, turn: Turn, flight: Flight, key: str = "") -> Reply:
        """Reply with what a flight brings; who has led it gets it as it is."""
        follows = turn is not flight.turn or flight.elsewhere
        headers: Headers = [] if follows else flight.headers
        if follows:
            turn.task = flight.turn.task
            turn.replay(flight.answer or flight.turn.kept({}, at=0.0), names.REASON_JOINED)
        if turn.chat.stream:

            async def leave() -> None:
                self._leave(key, flight)

            return self._presenter.streamed(turn, headers, self._frames(turn, flight, follows), leave)
        flight.leave()
        if flight.answer is None:
            raise RuntimeError("a flight is over without answer or error")
        if not follows:
            return self._presenter.whole(turn, headers, flight.raw or written(flight.answer.completion))
        self._settle(turn)
        return self._presenter.whole(turn, headers, written(_own(turn, flight.answer)))

    def _leave(self, key: str, flight: Flight) -> None:
        if flight.leave():
            self.flights.close(key, flight)

    async def _frames(self, turn: Turn, flight: Flight, follows: bool) -> AsyncGenerator[bytes, None]:
        """Stream a flight: what has come, then what comes, then its end."""
        sent = 0
        while True:
            fresh = flight.chunks[sent:]
            if fresh:
                sent += len(fresh)
                shown = [chunk for chunk in fresh if not chunk.usage_only or turn.chat.wants_usage]
                if shown:
                    yield b"".join(
                        sse(_readdressed(turn, chunk) if follows else chunk.raw) for chunk in shown
                    )
            elif flight.over or flight.answer is not None:
                break
            else:
                await flight.news()
        if flight.answer is not None and not sent:
            yield cut(turn, _own(turn, flight.answer) if follows else flight.answer.completion)
        while not flight.over:
            await flight.news()
        if flight.error is not None or flight.answer is None:
            yield self._presenter.broken(turn, flight.error or RuntimeError("no answer"))
            return
        if follows:
            turn.replay(flight.answer, names.REASON_JOINED)
            self._settle(turn)
        yield SSE_DONE

    async def _make(self, key: str, control: CacheControl, flight: Flight) -> None:
        """Make the answer of a flight, log it, and keep it."""
        turn = flight.turn
        turn.shared = True
        lease, source = None, None
        error: Exception | None = UpstreamBroken("the answer was given up while it was made")
        try:
            if control.read:
                lease = await self._cache.lease(key, max_age_s=control.max_age_s)
                if lease is None:
                    theirs = await self._told_elsewhere(turn, key, control)
                    if theirs is not None:
                        flight.elsewhere = True
                        flight.arrive(theirs)
                        error = None
                        return
                    # Whoever was at it is gone or too slow. Somebody else may have taken over: no second wait.
                    lease = await self._cache.lease(key, max_age_s=control.max_age_s)
            source = await self._answers.make(turn)
            flight.headers = source.headers
            raw = None
            if isinstance(source, Whole):
                completion, raw = source.completion, source.raw
            else:
                async for chunk in source.chunks():
                    flight.add(chunk)
                completion = source.completion()
            answer = turn.kept(completion, at=time.time())
            flight.arrive(answer, raw)
            await self._ledger.commit(turn)
            if worth_keeping(turn, completion):
                self._cache.put(key, answer, lease=lease)
                lease = None
            error = None
        except UnderstudyError as failure:
            error = failure
        except Exception as failure:
            if turn.left:  # otherwise it is raised where its own request is served
                log.exception("request %s failed after its client had left", turn.arrival.request_id)
            error = failure
        finally:
            turn.shared = False
            if turn.left:
                self._ledger.cancelled(turn)
            self.flights.close(key, flight)
            flight.land(error)
            if lease is not None:
                self._cache.release(lease)
            if source is not None and not isinstance(source, Whole):
                await source.aclose()

    async def _told_elsewhere(self, turn: Turn, key: str, control: CacheControl) -> CachedAnswer | None:
        """Wait for the answer that another replica is at; None if none comes."""
        began = time.perf_counter()
        try:
            answer = await self._cache.awaited(key, max_age_s=control.max_age_s)
        finally:
            turn.waited_s += time.perf_counter() - began
        return answer if _fits(answer, turn) else None


def _may_begin(turn: Turn, flight: Flight) -> bool:
    return flight.over or (turn.chat.stream and flight.begun)


def _fits(answer: CachedAnswer | None, turn: Turn) -> TypeGuard[CachedAnswer]:
    return answer is not None and answer.release == (turn.release.name if turn.release else None)


def _is_everybodys(error: Exception, turn: Turn, leader: Turn) -> bool:
    """Whether a leader's error is a follower's too: the teacher finds the request itself wrong.

    What is said of a key is for those who sent that key.
    """
    if not isinstance(error, UpstreamRefused) or not 400 <= error.status < 500 or error.status in _MAY_PASS:
        return False
    same_key = turn.arrival.caller.authorization == leader.arrival.caller.authorization
    return same_key or error.status not in _ABOUT_THE_KEY


def _own(turn: Turn, answer: CachedAnswer) -> dict[str, object]:
    """Return the completion under an id of this request's own: clients tell answers apart by it."""
    return {**answer.completion, "id": f"chatcmpl-{turn.id}"}


def _readdressed(turn: Turn, chunk: Chunk) -> bytes:
    data = {**chunk.data, "id": f"chatcmpl-{turn.id}"}
    if not turn.chat.wants_usage and data.get("usage") is not None:
        data["usage"] = None  # the leader asked for it in every chunk
    return orjson.dumps(data)


async def _at_once(frames: bytes) -> AsyncGenerator[bytes, None]:
    yield frames
