"""What `understudy doctor` checks over the network: the teacher and Redis."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import ssl
import statistics
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import orjson
from pydantic import SecretStr

from gateway.finding import Finding
from serving.errors import ConfigError, UnderstudyError
from serving.exchange import Json
from serving.pricing import PriceList
from serving.redis_url import RedisUrl
from serving.settings import Settings
from serving.upstream import Upstream, UpstreamResponse

_PATIENCE_S = 10.0
_ASK_PATIENCE_S = 60.0
_SKEW_S = 30.0
_PINGS = 10
_SLOW_REDIS_S = 0.01
_ALL_GO = ("allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-lfu", "volatile-ttl")


async def check_teacher(settings: Settings, *, ask: bool) -> list[Finding]:
    """Find the teacher, show it the key, and see whether its answers have a price."""
    try:
        key = settings.teacher_key()
    except ConfigError:
        return []  # found already
    base_url = settings.teacher.base_url
    upstream = Upstream(base_url, timeout_s=_PATIENCE_S)
    try:
        found = await _check_way(base_url, upstream)
        if not found or found[-1].verdict != "problem":
            found += await _check_models(settings, upstream, key)
            found += [_check_price(settings)]
            if ask:
                found.append(await _ask(settings, upstream, key))
        return found
    finally:
        await upstream.aclose()


async def _check_way(base_url: str, upstream: Upstream) -> list[Finding]:
    """Resolve the name and connect, so that what is wrong below HTTP has its own line."""
    place = urlsplit(base_url)
    host = place.hostname or ""
    port = place.port or (443 if place.scheme == "https" else 80)
    if upstream.proxied:
        return [Finding("teacher", "ok", f"{upstream.place} is reached through a proxy")]
    began = time.perf_counter()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError):
        return [
            Finding(
                "teacher", "problem", f"the name {host} can't be resolved", "correct teacher.base_url, or DNS"
            )
        ]
    resolved = time.perf_counter()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            _, writer = await asyncio.open_connection(
                host, port, ssl=ssl.create_default_context() if place.scheme == "https" else None
            )
        writer.transport.abort()
    except ssl.SSLCertVerificationError:
        # The system's own certificates don't do; the gateway knows others too, and says so when it asks.
        return []
    except (OSError, TimeoutError) as error:
        return [
            Finding(
                "teacher",
                "problem",
                f"no connection to {upstream.place}: {_why(error)}",
                "correct teacher.base_url, or the network (firewall, HTTPS_PROXY)",
            )
        ]
    said = (
        f"{upstream.place}: {_count(len({each[4][0] for each in addresses}), 'address', 'es')} in "
        f"{(resolved - began) * 1000:.0f} ms, connected in {(time.perf_counter() - resolved) * 1000:.0f} ms"
    )
    return [Finding("teacher", "ok", said)]


def _why(error: OSError | TimeoutError) -> str:
    """Say in words why there is no connection: asyncio's own repeat the address, OpenSSL's name its source file."""
    if isinstance(error, ssl.SSLError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return "it doesn't speak TLS; is it http:// there?"
        return f"TLS failed ({(error.reason or 'unknown').lower().replace('_', ' ')})"
    if isinstance(error, TimeoutError):
        return f"no answer within {_PATIENCE_S:g} s"
    return os.strerror(error.errno).lower() if error.errno else "all its addresses failed"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


async def _check_models(settings: Settings, upstream: Upstream, key: SecretStr | None) -> list[Finding]:
    """`GET /models`, the one request that costs nothing and shows whether the key is good."""
    variable = settings.teacher.api_key_env
    began = time.perf_counter()
    try:
        async with await upstream.request("GET", "/models", headers=_headers(key), body=b"") as response:
            body = await response.read()
            took = f"{(time.perf_counter() - began) * 1000:.0f} ms"
            found = _check_clock(response)
            status = response.status
    except UnderstudyError as error:
        return [Finding("teacher", "problem", str(error), "correct teacher.base_url, or the network")]
    if status in (401, 403) and key is None:
        said = f"asks for a key ({status}, {took}); the clients' own will be forwarded"
        verdict = Finding("teacher", "ok", said)
        if settings.server.api_keys:
            verdict = Finding(
                "teacher", "problem", f"asks for a key ({status}), and there is none", f"set {variable}"
            )
    elif status in (401, 403):
        verdict = Finding(
            "teacher",
            "problem",
            f"doesn't accept the key in {variable}: {status} for GET /models",
            f"set {variable} to a key of this teacher; one with restricted rights may still do: try --ask",
        )
    elif status in (404, 405):
        said = f"has no GET /models ({status}, {took}), so the key is untried"
        verdict = Finding("teacher", "warning", said, "see whether teacher.base_url ends in /v1; try --ask")
    elif status == 200:
        verdict = _check_model(settings, body, took)
    else:
        verdict = Finding(
            "teacher", "warning", f"answers GET /models with {status} ({took})", "try again; try --ask"
        )
    return [verdict, *found]


def _check_model(settings: Settings, body: bytes, took: str) -> Finding:
    try:
        models = {str(model["id"]) for model in orjson.loads(body)["data"]}
    except (orjson.JSONDecodeError, KeyError, TypeError):
        said = f"answers GET /models ({took}), but not as OpenAI's API does"
        return Finding("teacher", "warning", said, "see whether teacher.base_url is the API's, ending in /v1")
    wanted = settings.teacher.model
    if wanted is not None and wanted not in models:
        said = f"doesn't list teacher.model = {wanted!r} among its {_count(len(models), 'model')}"
        return Finding("teacher", "warning", said, "correct the name, unless it is an alias; try --ask")
    return Finding("teacher", "ok", f"accepts us and lists {_count(len(models), 'model')} ({took})")


def _check_clock(response: UpstreamResponse) -> list[Finding]:
    dates = [value for name, value in response.headers if name == "date"]
    try:
        skew = time.time() - parsedate_to_datetime(dates[0]).timestamp()
    except (IndexError, ValueError):
        return []
    if abs(skew) <= _SKEW_S:
        return [Finding("clock", "ok", "agrees with the teacher's")]
    ahead = "ahead of" if skew > 0 else "behind"
    said = f"this machine's clock is {abs(skew):.0f} s {ahead} the teacher's"
    return [Finding("clock", "warning", said, "set it (NTP): exchanges, retention and certificates go by it")]


def _check_price(settings: Settings) -> Finding:
    model = settings.teacher.model
    if settings.teacher.price is not None:
        return Finding("price", "ok", "as configured in teacher.price")
    if model is None:
        return Finding("price", "ok", "by the list of genai-prices, for the models that clients ask for")
    if _price(settings, model, {"prompt_tokens": 1, "completion_tokens": 1}) is None:
        said = f"no price is known for {model!r}: costs and savings will be missing"
        return Finding("price", "warning", said, "set teacher.price.input and teacher.price.output")
    return Finding("price", "ok", f"known for {model!r} (genai-prices)")


async def _ask(settings: Settings, upstream: Upstream, key: SecretStr | None) -> Finding:
    """One chat completion of one token."""
    model = settings.teacher.model
    if model is None:
        advice = "set teacher.model, or send a request through the gateway"
        return Finding("answer", "warning", "no model to ask: teacher.model isn't set", advice)
    if key is None:
        return Finding("answer", "warning", "no key to ask with", f"set {settings.teacher.api_key_env}")
    question: Json = {"model": model, "messages": [{"role": "user", "content": "Say yes."}]}
    headers = [*_headers(key), ("content-type", "application/json")]
    status, answer, took = 0, b"", 0.0
    for limit in (
        "max_completion_tokens",
        "max_tokens",
    ):  # one is refused by older servers, one by newer models
        began = time.perf_counter()
        body = orjson.dumps({**question, limit: 1})
        try:
            async with await upstream.request(
                "POST", "/chat/completions", headers=headers, body=body, timeout_s=_ASK_PATIENCE_S
            ) as response:
                status, answer = response.status, await response.read()
        except UnderstudyError as error:
            return Finding("answer", "problem", str(error), "correct teacher.base_url, or the network")
        took = time.perf_counter() - began
        if status not in (400, 422):
            break
    if status != 200:
        return Finding(
            "answer",
            "problem",
            f"{model!r} was asked and answered {status}{_code(answer)}",
            _ADVICE.get(status),
        )
    try:
        usage = orjson.loads(answer).get("usage")
    except (orjson.JSONDecodeError, AttributeError):
        return Finding("answer", "problem", f"{model!r} answered with something else than JSON", _ADVICE[404])
    usd = _price(settings, model, usage)
    cost = "at a price that isn't known" if usd is None else f"for ${usd:.6f}"
    return Finding("answer", "ok", f"{model!r} answered in {took * 1000:.0f} ms {cost}")


_ADVICE = {
    401: "set the key again",
    403: "let the key use this model",
    404: "correct teacher.model or teacher.base_url",
    429: "the account is out of quota or over its rate: see the provider's console",
}


def _code(body: bytes) -> str:
    """Return the error's code, if it is plainly one: messages may quote what was sent."""
    try:
        code = orjson.loads(body)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return f" ({code})" if isinstance(code, str) and code.isidentifier() and len(code) < 60 else ""


def _price(settings: Settings, model: str, usage: Json | None) -> float | None:
    usd, _ = PriceList(settings.teacher.price, base_url=settings.teacher.base_url).cost(model, usage)
    return usd


def _headers(key: SecretStr | None) -> list[tuple[str, str]]:
    return [] if key is None else [("authorization", f"Bearer {key.get_secret_value()}")]


async def check_redis(url: SecretStr | None) -> list[Finding]:
    """Connect, write, read, and see what Redis does when it is full."""
    if url is None:
        return [Finding("redis", "ok", "not used: each process caches for itself")]
    # A gateway without Redis doesn't load its library, and neither does its doctor.
    from gateway.redis_client import RedisLost, Refused, connect, tls_context

    name = f"understudy:cache:doctor:{secrets.token_hex(8)}"
    advice = "correct cache.url, or start Redis; until then each process caches for itself"
    parsed = RedisUrl.parse(url.get_secret_value())
    try:
        async with asyncio.timeout(_PATIENCE_S):
            client = await connect(parsed, tls_context(parsed))
            try:
                (stored,) = await client.run([("SET", name, "x", "PX", 60_000)])
                if isinstance(stored, Refused):
                    said = f"refuses to store anything ({stored.code})"
                    return [
                        Finding(
                            "redis", "problem", said, "see its memory, its replication and the user's rights"
                        )
                    ]
                took = []
                for _ in range(_PINGS):
                    began = time.perf_counter()
                    await client.get([name])
                    took.append(time.perf_counter() - began)
                script = "return redis.call('INFO', ARGV[1])"
                told = await client.run(
                    [
                        ("EVAL", script, 1, name, "server"),
                        ("EVAL", script, 1, name, "memory"),
                        ("UNLINK", name),
                    ]
                )
            finally:
                await client.aclose()
    except TimeoutError:
        return [Finding("redis", "problem", f"no answer within {_PATIENCE_S:g} s", advice)]
    except (RedisLost, ConfigError) as error:
        return [Finding("redis", "problem", f"it can't be used: {error}", advice)]
    median = statistics.median(took)
    info = _info(b"\n".join(part for part in told[:2] if isinstance(part, bytes)))
    said = f"version {info.get('redis_version', 'unknown')}, {median * 1000:.2f} ms a question (median of {_PINGS})"
    found = [Finding("redis", "ok", said)]
    if median > _SLOW_REDIS_S:
        found = [Finding("redis", "warning", said, "put it nearer: beyond 50 ms it isn't waited for")]
    return [*found, *_check_memory(info)]


def _check_memory(info: dict[str, str]) -> list[Finding]:
    limit, policy = info.get("maxmemory"), info.get("maxmemory_policy", "")
    if limit is None:
        return []
    if limit == "0":
        said = "its memory has no limit (maxmemory 0)"
        return [Finding("redis", "warning", said, "set maxmemory, and maxmemory-policy allkeys-lru")]
    if policy not in _ALL_GO:
        said = f"once full, it takes no new answers (maxmemory-policy {policy})"
        return [Finding("redis", "warning", said, "set maxmemory-policy allkeys-lru")]
    return [Finding("redis", "ok", f"makes room by {policy}")]


def _info(text: bytes) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {name: value.strip() for name, found, value in pairs if found}
