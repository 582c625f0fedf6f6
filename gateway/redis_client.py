"""Redis behind a small seam: connected to wherever a URL leads. The one module that imports the library.

Nothing here is retried: whoever calls decides what a failure means.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from redis import exceptions as errors
from redis.asyncio import (
    Connection,
    ConnectionPool,
    Redis,
    RedisCluster,
    UnixDomainSocketConnection,
)
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from serving.errors import ConfigError
from serving.redis_url import RedisUrl

_PATIENCE_S = 1.0
"""Of the library itself, for what no caller waits for: connecting, and writing in the background."""
_MAX_CONNECTIONS = 8


class RedisLost(Exception):
    """Redis can't be used. The message says why, and repeats nothing that was said to it or by it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Redis's answer to a command it won't carry out; `code` is its first word: OOM, READONLY, NOPERM."""

    code: str


Command = tuple[str | bytes | int, ...]
Reply = bytes | int | None | Refused


class RedisClient:
    """A connected client. Every method raises RedisLost for whatever goes wrong, and nothing else."""

    def __init__(self, library: Redis | RedisCluster) -> None:
        self._cluster = isinstance(library, RedisCluster)
        # Its annotations end where both kinds have their commands in common.
        self._library: Any = library

    async def get(self, names: Sequence[str]) -> list[bytes | None]:
        """Return what stands under some names, in one round trip (one for each node of a cluster)."""
        with _translated():
            values: list[Any]
            # MGET for one name too: where a GET fails on a key of another type, it finds nothing.
            if self._cluster:
                values = await self._library.mget_nonatomic(names)
            else:
                values = await self._library.mget(names)
            if len(values) != len(names) or not all(
                value is None or type(value) is bytes for value in values
            ):
                raise errors.InvalidResponse("another number or kind of values than was asked for")
            return values

    async def run(self, commands: Sequence[Command]) -> list[Reply]:
        """Run some commands, each on keys of one slot, in one round trip (one for each node of a cluster)."""
        with _translated():
            pipeline = self._library.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies = await pipeline.execute(raise_on_error=False)
            return [_reply(reply) for reply in replies]

    async def aclose(self) -> None:
        """Close every connection. Never raises."""
        with contextlib.suppress(Exception):
            await self._library.aclose()


async def connect(url: RedisUrl, tls: ssl.SSLContext | None) -> RedisClient:
    """Make a client; of sentinels, one for the master they name now. Raises RedisLost.

    Connections are made as they are needed, at most 8 (to each node of a cluster).
    """
    options: dict[str, Any] = {
        "username": url.username,
        "password": url.password,
        "socket_timeout": _PATIENCE_S,
        "socket_connect_timeout": _PATIENCE_S,
        "protocol": 2,
    }
    connection_class: type[AbstractConnection] = Connection
    if tls is not None:
        connection_class = _with_context(tls)
    if url.mode == "cluster":
        return RedisClient(_cluster(url, options, connection_class))
    if url.mode == "unix":
        address: dict[str, Any] = {"path": url.path}
        connection_class = UnixDomainSocketConnection
    else:
        host, port = await _master(url, options, connection_class) if url.mode == "sentinel" else url.nodes[0]
        address = {"host": host, "port": port}
    return RedisClient(_single({**options, **address, "db": url.db}, connection_class))


def tls_context(url: RedisUrl) -> ssl.SSLContext | None:
    """Return what a TLS connection needs, None without TLS. Raises ConfigError for files that don't fit.

    Made once: reading the system's certificates takes some 30 ms, and the library would do it for every
    connection.
    """
    if not url.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=url.options.get("ca_file"))
        if "cert_file" in url.options:
            context.load_cert_chain(url.options["cert_file"], url.options.get("key_file"))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "the certificates named in cache.url can't be used (ca_file, cert_file and key_file should be PEM, "
            f"and the key the certificate's): {error.strerror or type(error).__name__}"
        ) from None
    return context


def _single(options: dict[str, Any], connection_class: type[AbstractConnection]) -> Redis:
    pool = ConnectionPool(
        connection_class=connection_class,
        max_connections=_MAX_CONNECTIONS,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    return Redis.from_pool(pool)


def _cluster(url: RedisUrl, options: dict[str, Any], connection_class: type[Any]) -> RedisCluster:
    cluster = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.nodes],
        max_connections=_MAX_CONNECTIONS,
        retry=Retry(NoBackoff(), 0),
        ssl=url.tls,
        **options,
    )
    # Its constructor takes no class of connection; these are the two places it will look for one.
    cluster.connection_kwargs["connection_class"] = connection_class
    for node in cluster.nodes_manager.startup_nodes.values():
        node.connection_class = connection_class
    return cluster


async def _master(
    url: RedisUrl, options: dict[str, Any], connection_class: type[AbstractConnection]
) -> tuple[str, int]:
    """Ask the sentinels, one after the other, where the master is now (https://redis.io/docs/latest/develop/reference/sentinel-clients)."""
    own = {
        **options,
        "username": url.options.get("sentinel_username"),
        "password": url.options.get("sentinel_password"),
    }
    why = "they know no such service"
    for host, port in url.nodes:
        sentinel: Any = _single({**own, "host": host, "port": port}, connection_class)
        try:
            found = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.service)
            if found is not None:
                name, number = found
                return name.decode(), int(number)
        except Exception as error:
            why = _why(error)
        finally:
            await RedisClient(sentinel).aclose()
    raise RedisLost(f"none of the sentinels names a master for {url.service}: {why}")


def _with_context(context: ssl.SSLContext) -> type[SSLConnection]:
    class Shared(SSLConnection):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.ssl_context.context = context

    return Shared


def _reply(reply: object) -> Reply:
    if isinstance(reply, errors.ResponseError):
        return Refused(_code(reply))
    if isinstance(reply, Exception):
        raise reply
    if reply is True or reply == b"OK":
        return 1
    if reply is None or type(reply) is bytes or type(reply) is int:
        return reply
    raise errors.InvalidResponse("a kind of reply that none of the commands has")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A server that answers garbage makes the library raise about anything.
        raise RedisLost(_why(error)) from error


def _why(error: Exception) -> str:
    """Say what happened without the library's words: they quote replies, and those quote passwords."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "its certificate can't be trusted (the authority's file is ca_file in cache.url)"
    match error:
        case errors.AuthenticationError() | errors.AuthorizationError():
            return "it doesn't accept the user and password of cache.url"
        case errors.NoPermissionError():
            return "the user of cache.url may not do this"
        case errors.BusyLoadingError():
            return "it is still loading its data"
        case errors.TimeoutError() | TimeoutError():
            return "it didn't answer in time"
        case errors.RedisClusterException():
            return "there is no cluster that answers for every key"
        case errors.ResponseError():
            if "DB index is out of range" in str(error):
                return "it has no database of the number in cache.url"
            return f"it answers with the error {_code(error)}"
        case errors.ConnectionError() | OSError():
            return _connection(cause)
        case _:
            return f"its answers make no sense ({type(error).__name__})"


def _connection(cause: BaseException | None) -> str:
    """Say why there is no connection, without the address: asyncio repeats it in its own words."""
    if isinstance(cause, socket.gaierror):
        return "no connection: its name can't be resolved"
    if isinstance(cause, OSError) and cause.errno:
        return f"no connection: {os.strerror(cause.errno).lower()}"
    return "no connection"


def _code(error: Exception) -> str:
    """Return the first word of an error if it is one of Redis's codes."""
    found = re.match(r"[A-Z]{2,20}\b", str(error))
    return found[0] if found else type(error).__name__
