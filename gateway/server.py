"""`understudy serve`: the listening socket, the workers, and what a person sees of them."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from gateway.app import create_app
from gateway.auth import is_loopback
from gateway.log_format import configure_logging
from gateway.parts import tracing_of
from gateway.vllm import Vllm
from gateway.worker import BACKLOG, Beat, Worker, relieve_collector
from gateway.workers import Supervisor
from serving.configuration import DEFAULT_FILE
from serving.disk import Disk
from serving.errors import ConfigError
from serving.settings import Settings

log = logging.getLogger("understudy.server")

_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
"""Where Linux keeps files in memory. Writing to a memory-mapped file on a full disk ends the process."""


def serve(
    settings: Settings,
    *,
    config_path: Path | None = None,
    reread: Callable[[], Settings] | None = None,
    with_vllm: bool = False,
) -> None:
    """Run the gateway until it is told to stop (SIGTERM, SIGINT): requests under way are finished first.

    `with_vllm`: and the vLLM of `student.vllm`, which ends after that. `reread` reads the configuration again on
    SIGHUP. Exits with code 3 when the gateway can't start. Raises ConfigError when the address, the state directory or
    the teacher's key can't be used, or when traces are wanted and can't be made.
    """
    # A worker that can't start would be started again and again.
    settings.teacher_key()
    tracing_of(settings)
    raise_file_limit()
    with ExitStack() as stack:
        early = _note_early_hangups() if reread is not None else []
        listening = stack.enter_context(_bind(settings.server.host, settings.server.port))
        _check_state_dir(settings.state_dir)
        configure_logging(settings.observe.log_format)
        _share_metrics(settings.server.workers, stack)
        print(_start_line(settings, config_path or DEFAULT_FILE, listening), flush=True)
        for warning in warnings(settings):
            log.warning(warning)
        if not with_vllm and settings.student.vllm is not None and not settings.student.vllm.urls:
            log.info(
                "student.vllm names a model, which `understudy serve --vllm` would serve: this one doesn't"
            )
        vllm = stack.enter_context(Vllm(settings)) if with_vllm else None
        if settings.server.workers > 1:
            supervisor = Supervisor(
                settings,
                listening,
                config_path=config_path,
                reread=reread,
                early=early,
                reloaded=_tell(vllm),
            )
            code = supervisor.run()
        else:
            gateway = create_app(settings, config_path=config_path)
            worker = Worker(
                gateway,
                settings,
                lambda worker: _obey_signals(worker, reread, early),
                Beat(),
                reloaded=_tell(vllm),
            )
            relieve_collector()
            worker.run(sockets=[listening])
            code = 0 if worker.started else 3
    if code:
        sys.exit(code)


def _tell(vllm: Vllm | None) -> Callable[[Settings], None]:
    return (lambda _: None) if vllm is None else vllm.adopt


def warnings(settings: Settings) -> list[str]:
    """Say what of a configuration its owner may not have meant."""
    found = []
    if is_exposed(settings):
        found.append(
            f"ANYONE WHO REACHES {settings.server.host} SPENDS YOUR MONEY: server.host isn't loopback, "
            "server.api_keys is empty, and the gateway holds the teacher's key. Set server.api_keys."
        )
    if settings.server.api_keys and settings.teacher_key() is None:
        found.append(
            f"server.api_keys is set but the environment variable {settings.teacher.api_key_env} isn't: the "
            "teacher is asked without a key. Set it, unless the teacher wants none."
        )
    return found


def is_exposed(settings: Settings) -> bool:
    """Say whether strangers could use the teacher's key: no keys of our own, and reachable from elsewhere."""
    return (
        not settings.server.api_keys
        and settings.teacher_key() is not None
        and not is_loopback(settings.server.host)
    )


def _note_early_hangups() -> list[int]:
    """Have SIGHUP noted in the list until somebody obeys it: left alone, it would end the process."""
    early: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: early.append(number))
    return early


def _obey_signals(worker: Worker, reread: Callable[[], Settings] | None, early: list[int]) -> None:
    """Have the only worker hear the signals itself: the second that says stop means at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if worker.should_exit:
            worker.stop_at_once()
        else:
            worker.stop()

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    if reread is not None:
        loop.add_signal_handler(signal.SIGHUP, worker.reload, reread)
        if early:
            worker.reload(reread)


def _share_metrics(workers: int, stack: ExitStack) -> None:
    """Set up the folder where workers' metrics meet, before a worker imports prometheus-client.

    It is a new one each time, since old files would be counted too: inside the user's, if
    PROMETHEUS_MULTIPROC_DIR names one.
    """
    given = os.environ.get(_METRICS_VARIABLE)
    if workers == 1 and not given:
        return
    try:
        if given:
            Path(given).mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="understudy-metrics-", dir=given or _memory())
    except OSError as error:
        raise ConfigError(
            f"the folder for metrics {given or tempfile.gettempdir()} can't be used: {error.strerror}; "
            f"set {_METRICS_VARIABLE} to another"
        ) from None
    os.environ[_METRICS_VARIABLE] = stack.enter_context(folder)


def _memory() -> str | None:
    return str(_IN_MEMORY) if os.access(_IN_MEMORY, os.W_OK | os.X_OK) else None


def raise_file_limit() -> None:
    """Let this process and its workers open as many files as the system allows them to: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family, backlog=BACKLOG)
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


def _start_line(settings: Settings, file: Path, listening: socket.socket) -> str:
    host = settings.server.host
    port = listening.getsockname()[1]
    tasks = ", ".join(task.name for task in settings.task) or "found in the traffic"
    teacher = urlsplit(settings.teacher.base_url)
    where = teacher.hostname or ""
    if teacher.port is not None:
        where += f":{teacher.port}"
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    return (
        f"understudy listens on {address} · tasks: {tasks} · teacher: {where} · state: {settings.state_dir} · "
        f"configuration: {file if file.is_file() else f'defaults, there is no {file}'}"
    )
