"""The cache over every kind of Redis that a URL can name: socket, database, TLS, cluster, sentinel."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.cache import Cache
from gateway.cache_entry import CachedAnswer
from gateway.metrics import Metrics
from serving.cache_settings import CacheSettings
from serving.errors import ConfigError


def an_answer(text: str = "x") -> CachedAnswer:
    completion = {"id": "1", "choices": [{"index": 0, "message": {"content": text}}]}
    return CachedAnswer(completion, "teacher", None, None, None, True, None, None, time.time())


@asynccontextmanager
async def opened(url: str, metrics: Metrics | None = None) -> AsyncIterator[Cache]:
    """A cache without a first level, so that everything it finds comes from Redis."""
    settings = CacheSettings(url=url, single_flight="replicas", max_bytes=0)
    cache = Cache(settings, metrics or Metrics(), patience_s=5.0)
    try:
        yield cache
    finally:
        await cache.aclose()


async def becomes(holds: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 30
    while not await holds():
        assert time.monotonic() < deadline, "it didn't happen within 30 s"
        await asyncio.sleep(0.01)


async def stored(cache: Cache, key: str) -> None:
    """Put an answer until it is found."""
    answer = an_answer(key)

    async def found() -> bool:
        cache.put(key, answer)
        return (await cache.get(key)).answer == answer

    await becomes(found)


async def everything_works(cache: Cache) -> None:
    await stored(cache, "0")
    for number in range(40):
        cache.put(f"{number}", an_answer(f"{number}"))

    async def all_there() -> bool:
        found = await asyncio.gather(*(cache.get(f"{number}") for number in range(40)))
        return all(
            item.answer is not None
            and item.answer.completion["choices"][0]["message"]["content"] == f"{number}"
            for number, item in enumerate(found)
        )

    await becomes(all_there)
    leases = await asyncio.gather(*(cache.lease(f"led {number}") for number in range(20)))
    for number, lease in enumerate(leases):
        assert lease is not None
        assert lease.token is not None
        assert await cache.lease(f"led {number}") is None
        waiting = asyncio.create_task(cache.awaited(f"led {number}"))
        if number % 2:
            cache.release(lease)
            assert await waiting is None
        else:
            answer = an_answer()
            cache.put(f"led {number}", answer, lease=lease)
            assert await waiting == answer


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def test_over_a_unix_socket(redis: Any) -> None:
    async def main() -> None:
        server = redis(password="p@ss/word")
        async with opened(f"unix://:p%40ss%2Fword@{server.socket}?db=3") as cache:
            await everything_works(cache)
        assert server.command("INFO", "keyspace").keys() == {"db3"}

    run(main())


def test_in_a_database_and_as_a_user(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        server.command("ACL", "SETUSER", "me", "on", ">mine", "~understudy:cache:*", "+@all")
        async with opened(f"redis://me:mine@127.0.0.1:{server.port}/2") as cache:
            await everything_works(cache)
        assert server.command("INFO", "keyspace").keys() == {"db2"}

    run(main())


# TLS


@pytest.fixture
def certificate(tmp_path: Path, require: Any) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    require("openssl")
    pem, key = tmp_path / "redis.pem", tmp_path / "redis.key"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=redis"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(["openssl", *words.split(), *names], check=True, capture_output=True, timeout=60)
    return pem, key


@pytest.fixture
def needs_tls(require: Any) -> None:
    """Skip where redis-server was built without TLS: it names the first directive that it doesn't know."""
    require("redis-server")
    words = ["redis-server", "--tls-port", "0", "--port", "none"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if "'tls-port" in said.stdout + said.stderr:
        pytest.skip("redis-server was built without TLS")


def with_tls(port: int, certificate: tuple[Path, Path]) -> list[str]:
    pem, key = (str(path) for path in certificate)
    files = ["--tls-cert-file", pem, "--tls-key-file", key, "--tls-ca-cert-file", pem]
    return ["--tls-port", str(port), "--tls-auth-clients", "yes", *files]


@pytest.mark.usefixtures("needs_tls")
def test_over_tls_with_a_client_certificate(redis: Any, certificate: tuple[Path, Path]) -> None:
    async def main() -> None:
        port = free_port()
        redis(*with_tls(port, certificate))
        pem, key = certificate
        async with opened(f"rediss://127.0.0.1:{port}?ca_file={pem}&cert_file={pem}&key_file={key}") as cache:
            await everything_works(cache)

    run(main())


@pytest.mark.usefixtures("needs_tls")
def test_a_certificate_that_can_not_be_trusted_is_not(
    redis: Any, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        port = free_port()
        redis(*with_tls(port, certificate))
        async with opened(f"rediss://127.0.0.1:{port}") as cache:

            async def told() -> bool:
                return bool(caplog.records)

            await becomes(told)
            assert (await cache.get("a")).outcome == "error"

    run(main())
    assert "its certificate can't be trusted (the authority's file is ca_file in cache.url)" in caplog.text


def test_files_that_are_no_certificates_are_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")

    async def main() -> None:
        with pytest.raises(ConfigError, match=r"the certificates named in cache\.url can't be used"):
            Cache(CacheSettings(url=f"rediss://127.0.0.1:1?ca_file={file}"), Metrics())

    run(main())


# Cluster


@pytest.fixture
def cluster(redis: Any) -> list[Any]:
    """Three nodes that answer for all slots, without replicas."""
    return start_cluster(redis, [[], [], []])


def start_cluster(redis: Any, options: list[list[str]], ports: Sequence[int] = ()) -> list[Any]:
    nodes = []
    for own in options:
        bus = free_port()
        clustered = ["--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{bus}.conf"]
        timing = ["--cluster-port", str(bus), "--cluster-node-timeout", "2000"]
        nodes.append((redis(*own, *clustered, *timing), bus))
    first, _ = nodes[0]
    for number, (node, bus) in enumerate(nodes):
        node.command("CLUSTER", "ADDSLOTSRANGE", 16384 * number // 3, 16384 * (number + 1) // 3 - 1)
        if number:
            first.command("CLUSTER", "MEET", "127.0.0.1", ports[number] if ports else node.port, bus)
    deadline = time.monotonic() + 30
    while not all(agrees(node) for node, _ in nodes):
        assert time.monotonic() < deadline, "the nodes didn't become a cluster within 30 s"
        time.sleep(0.05)
    return [node for node, _ in nodes]


def agrees(node: Any) -> bool:
    info: dict[str, str] = dict(line.split(":") for line in node.command("CLUSTER", "INFO").decode().split())
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"


def test_over_a_cluster_whose_slots_move(cluster: list[Any]) -> None:
    async def main() -> None:
        # One of them is enough, and it may be one that is no more.
        async with opened(f"redis+cluster://127.0.0.1:1,127.0.0.1:{cluster[1].port}") as cache:
            await everything_works(cache)
            assert all(node.command("DBSIZE") > 0 for node in cluster)
            for node in cluster:
                node.command("FLUSHALL")
            name = cluster[2].command("CLUSTER", "MYID")
            for slot in range(0, 5461, 400):
                for node in cluster:
                    node.command("CLUSTER", "SETSLOT", slot, "NODE", name)
            await everything_works(cache)

    run(main())


def test_a_node_that_dies_costs_its_part_of_the_cache_at_most(cluster: list[Any]) -> None:
    async def main() -> None:
        for node in cluster:
            node.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        metrics = Metrics()
        async with opened(f"redis+cluster://127.0.0.1:{cluster[0].port}", metrics) as cache:
            await everything_works(cache)
            cluster[2].kill()
            answers = 0
            for number in range(200):
                found = await cache.get(f"{number % 40}")
                if found.answer is not None:
                    assert found.answer.completion["choices"][0]["message"]["content"] == f"{number % 40}"
                    answers += 1
                await asyncio.sleep(0.005)
            assert answers < 200
            cluster[2].start()
            await stored(cache, "0")

    run(main())


@pytest.mark.usefixtures("needs_tls")
def test_over_a_cluster_with_tls(redis: Any, certificate: tuple[Path, Path]) -> None:
    async def main() -> None:
        ports = [free_port() for _ in range(3)]
        options = [[*with_tls(port, certificate), "--tls-cluster", "yes"] for port in ports]
        nodes = start_cluster(redis, options, ports)
        pem, key = certificate
        files = f"ca_file={pem}&cert_file={pem}&key_file={key}"
        async with opened(f"rediss+cluster://127.0.0.1:{ports[0]}?{files}") as cache:
            await everything_works(cache)
        assert all(node.command("DBSIZE") > 0 for node in nodes)

    run(main())


# Sentinel


@pytest.fixture
def sentinel(redis: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a sentinel that watches a server under the name `main`."""
    running: list[subprocess.Popen[bytes]] = []

    def start(master: Any) -> Sentinel:
        watching = Sentinel(tmp_path, master)
        running.append(watching.process)
        watching.wait()
        return watching

    yield start
    for process in running:
        process.kill()
        process.wait(timeout=20)


class Sentinel:
    """A redis-sentinel process."""

    def __init__(self, directory: Path, master: Any) -> None:
        self.port = free_port()
        config = directory / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {directory}\nsentinel monitor main 127.0.0.1 {master.port} 1\n"
        )
        words = ["redis-server", str(config), "--sentinel"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL)

    def wait(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                self.command("PING")
                return
            except OSError:
                assert time.monotonic() < deadline, "the sentinel didn't start within 20 s"
                time.sleep(0.01)

    def command(self, *words: str) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(" ".join(words).encode() + b"\r\n")
            assert connection.recv(1024)[:1] in (b"+", b"*")

    def now_watches(self, master: Any) -> None:
        self.command("SENTINEL", "REMOVE", "main")
        self.command("SENTINEL", "MONITOR", "main", "127.0.0.1", str(master.port), "1")


def test_the_master_that_a_sentinel_names(redis: Any, sentinel: Any) -> None:
    async def main() -> None:
        one, other = redis(), redis()
        watching = sentinel(one)
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watching.port}/main?db=1"
        async with opened(url) as cache:
            await everything_works(cache)
            assert one.command("INFO", "keyspace").keys() == {"db1"}
            watching.now_watches(other)
            one.kill()
            await stored(cache, "after the master died")
            assert other.command("INFO", "keyspace").keys() == {"db1"}

    run(main())


def test_a_master_that_became_a_replica_is_left(redis: Any, sentinel: Any) -> None:
    async def main() -> None:
        one, other = redis(), redis()
        watching = sentinel(one)
        async with opened(f"redis+sentinel://127.0.0.1:{watching.port}/main") as cache:
            await everything_works(cache)
            watching.now_watches(other)
            one.command("REPLICAOF", "127.0.0.1", other.port)
            await stored(cache, "after the masters changed")
            assert other.command("DBSIZE") > 0

    run(main())


def test_a_service_that_no_sentinel_knows_is_said(
    redis: Any, sentinel: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        watching = sentinel(redis())
        async with opened(f"redis+sentinel://127.0.0.1:{watching.port}/other"):

            async def told() -> bool:
                return bool(caplog.records)

            await becomes(told)

    run(main())
    assert "none of the sentinels names a master for other: they know no such service" in caplog.text
