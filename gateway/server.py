"""`understudy serve`: the listening socket, the workers, and what a person sees of them."""

from __future__ import annotations

import ipaddress
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from gateway import names
from gateway.app import Gateway, create_app, tracing_of
from gateway.client import request_id_of
from gateway.envelope import refuse
from gateway.log_format import configure_logging
from serving.disk import Disk
from serving.errors import ConfigError
from serving.settings import Settings

log = logging.getLogger("understudy.server")

_BACKLOG = 2048
_GRACEFUL_S = 30
_HUNG_AFTER_S = 30
"""A worker that doesn't answer its supervisor for so long is replaced. uvicorn's 5 s kill a worker on a busy
machine before it has imported what it needs, and the next one, and the next."""


def serve(settings: Settings, *, config_path: Path | None = None) -> None:
    """Run the gateway until it is told to stop (SIGTERM, SIGINT): requests under way are finished first.

    Raises ConfigError when the address, the state directory or the teacher's key can't be used, or when traces
    are wanted and can't be made.
    """
    # A worker that can't start would be started again and again.
    settings.teacher_key()
    tracing_of(settings)
    with ExitStack() as stack:
        listening = stack.enter_context(_bind(settings.server.host, settings.server.port))
        _check_state_dir(settings.state_dir)
        configure_logging(settings.observe.log_format)
        workers = settings.server.workers
        if workers > 1:
            # Where the workers' metrics meet; prometheus-client looks for it when a worker imports it.
            folder = tempfile.TemporaryDirectory(prefix="understudy-metrics-")
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = stack.enter_context(folder)
        config = uvicorn.Config(
            partial(_create_worker, settings, config_path),
            factory=True,
            workers=workers,
            loop="uvloop",
            http=_Http,
            ws="none",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_GRACEFUL_S,
            timeout_worker_healthcheck=_HUNG_AFTER_S,
        )
        print(_start_line(settings, listening), flush=True)
        if is_exposed(settings):
            log.warning(
                "ANYONE WHO REACHES %s SPENDS YOUR MONEY: server.host isn't loopback, server.api_keys "
                "is empty, and the gateway holds the teacher's key. Set server.api_keys.",
                settings.server.host,
            )
        server = uvicorn.Server(config)
        try:
            if workers > 1:
                Multiprocess(config, sockets=[listening]).run()
            else:
                server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        if workers == 1 and not server.started:
            sys.exit(3)


class _Http(HttpToolsProtocol):
    """uvicorn's HTTP, except that what isn't HTTP is answered in OpenAI's envelope too."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what can't be parsed, and close the connection."""
        body = refuse(400, f"this isn't HTTP/1.1: {msg}", kind="invalid_request_error").body
        head = (
            "HTTP/1.1 400 Bad Request\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            f"{names.REQUEST_ID_HEADER}: {request_id_of(None)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def is_exposed(settings: Settings) -> bool:
    """Say whether strangers could use the teacher's key: no keys of our own, and reachable from elsewhere."""
    return (
        not settings.server.api_keys
        and settings.teacher_key() is not None
        and not _is_loopback(settings.server.host)
    )


def _create_worker(settings: Settings, config_path: Path | None) -> Gateway:
    """Build the application in the process that runs it."""
    configure_logging(settings.observe.log_format)
    if settings.server.workers > 1:
        log.info("worker %d starts", os.getpid())
        _end_with_supervisor()
    return create_app(settings, config_path=config_path)


def _end_with_supervisor() -> None:
    """Stop this worker, in order, when its supervisor is killed.

    Nobody would supervise it any more, and the address would stay taken for the next start.
    """
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        return

    def wait() -> None:
        supervisor.join()
        log.error("the supervisor is gone: worker %d stops", os.getpid())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="supervisor-watch", daemon=True).start()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family, backlog=_BACKLOG)
    except socket.gaierror as error:
        raise ConfigError(f"can't listen on {host}: {error.strerror}") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"can't listen on {host}:{port}: {why}; choose another with --host and --port"
        ) from None


def _check_state_dir(state_dir: Path) -> None:
    try:
        Disk().make_directory(state_dir / "tasks")
        with tempfile.TemporaryFile(dir=state_dir):
            pass
    except OSError as error:
        raise ConfigError(f"the state directory {state_dir} can't be written: {error.strerror}") from None


def _start_line(settings: Settings, listening: socket.socket) -> str:
    host = settings.server.host
    port = listening.getsockname()[1]
    tasks = ", ".join(task.name for task in settings.task) or "found in the traffic"
    teacher = urlsplit(settings.teacher.base_url)
    where = teacher.hostname or ""
    if teacher.port is not None:
        where += f":{teacher.port}"
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return (
        f"understudy listens on {address} · tasks: {tasks} · teacher: {where} · state: {settings.state_dir}"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
