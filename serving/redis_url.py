"""Where a Redis is, as one URL.

    redis://[user:password@]host[:6379][/db]              one server
    rediss://…                                            the same over TLS
    unix://[user:password@]/path/to/socket[?db=0]         one server on this machine
    redis+cluster://host[:6379][,host[:port]…]            a cluster; any of its nodes will do
    redis+sentinel://host[:26379][,…]/service[?db=0]      the master that the sentinels name
    rediss+cluster://, rediss+sentinel://                 the same over TLS

Options behind the `?`: `db`; with TLS `ca_file`, `cert_file` and `key_file`; for sentinels with a password of
their own `sentinel_username` and `sentinel_password`. User, password and options are percent-encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote

Mode = Literal["single", "unix", "cluster", "sentinel"]

_SCHEMES: dict[str, tuple[Mode, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
}
_TLS_FILES = ("ca_file", "cert_file", "key_file")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A URL that was read; printing it shows no password.

    `nodes` are hosts with ports: the server, some nodes of the cluster, or the sentinels. `path` is that of
    the Unix socket, `service` the name under which the sentinels know the master.
    """

    mode: Mode
    tls: bool
    nodes: tuple[tuple[str, int], ...] = ()
    path: str | None = None
    service: str | None = None
    db: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    options: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """Read a URL. Raises ValueError, whose message never repeats more of it than its scheme or port."""
        scheme, found, rest = url.partition("://")
        if not found or scheme not in _SCHEMES:
            raise ValueError(f"should begin with one of {', '.join(f'{name}://' for name in _SCHEMES)}")
        mode, tls = _SCHEMES[scheme]
        rest, _, query = rest.partition("?")
        netloc, slash, path = rest.partition("/")
        credentials, _, hosts = netloc.rpartition("@")
        if "@" in path:
            raise ValueError("has an @ behind the first /: percent-encode the password (/ is %2F, @ is %40)")
        username, _, password = credentials.partition(":")
        options = _options(query, mode, tls=tls)
        db = options.pop("db", "")
        service = None
        if mode == "unix":
            if hosts or not path:
                raise ValueError("should name a socket by its whole path, as in unix:///run/redis.sock")
        elif mode == "sentinel":
            service = unquote(path)
            if not service or "/" in service:
                raise ValueError(
                    "should end with the service's name, as in redis+sentinel://host:26379/service"
                )
        elif path:
            if db:
                raise ValueError("names the db twice: behind the / and as an option")
            db = path
        if not (db.isascii() and db.isdigit()) and db != "":
            raise ValueError("should name the db as a number, as in redis://host:6379/0")
        if mode == "cluster" and int(db or 0):
            raise ValueError("names a db other than 0, which a cluster doesn't have")
        nodes = () if mode == "unix" else _nodes(hosts, 26379 if mode == "sentinel" else 6379)
        if mode == "single" and len(nodes) > 1:
            raise ValueError(
                "should name one server only; several are a redis+cluster:// or redis+sentinel://"
            )
        return cls(
            mode=mode,
            tls=tls,
            nodes=nodes,
            path=unquote(slash + path) if mode == "unix" else None,
            service=service,
            db=int(db or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
            options=options,
        )


def _options(query: str, mode: Mode, *, tls: bool) -> dict[str, str]:
    known = ("db", *(_TLS_FILES if tls else ()), *(_SENTINEL_OPTIONS if mode == "sentinel" else ()))
    try:
        pairs = parse_qsl(query, strict_parsing=True, keep_blank_values=True) if query else []
    except ValueError:
        raise ValueError("has options that can't be read: write them as ?name=value&name=value") from None
    options = dict(pairs)
    if len(options) < len(pairs) or not set(options) <= set(known):
        raise ValueError(f"knows these options here, each once: {', '.join(known)}")
    for name in _TLS_FILES:
        if name in options and not Path(options[name]).is_file():
            raise ValueError(f"has the option {name}, but that file isn't there")
    if "key_file" in options and "cert_file" not in options:
        raise ValueError("has a key_file without its cert_file")
    return options


def _nodes(hosts: str, default_port: int) -> tuple[tuple[str, int], ...]:
    nodes = []
    for item in hosts.split(","):
        if item.startswith("["):
            host, closed, port = item[1:].partition("]")
            port = port.removeprefix(":") if closed else "?"
        else:
            host, _, port = item.partition(":")
        if not host or any(c.isspace() for c in host):
            raise ValueError("should name a host, as in redis://host:6379")
        number = int(port) if port.isascii() and port.isdigit() else default_port if not port else 0
        if not 0 < number < 65536:
            raise ValueError("should name ports as numbers from 1 to 65535")
        nodes.append((host, number))
    return tuple(nodes)
