"""What `understudy doctor` checks without leaving the machine: the configuration, its limits, the disk."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from gateway.auth import is_loopback
from gateway.finding import Finding
from gateway.parts import tracing_of
from gateway.server import is_exposed
from serving.disk import Disk
from serving.errors import ConfigError
from serving.settings import ENV_PREFIX, Settings

_SYNCS = 20
_SLOW_SYNC_S = 0.02
_LITTLE_SPACE = 1024**3
_FILES_BESIDE = 512
"""Descriptors for segments, Redis and everything else that isn't a connection of a client or to the teacher."""
_REMOTE = ("nfs", "cifs", "smb", "9p", "fuse.", "ceph", "glusterfs", "afs")
_FLEETING = ("tmpfs", "ramfs", "overlay")


def check_sources(file: Path) -> list[Finding]:
    """Say what was read: a forgotten file or variable explains much."""
    variables = ", ".join(sorted(name for name in os.environ if _is_setting(name)))
    beside = f"; over it go {variables}" if variables else ""
    where = f"read from {file}" if file.is_file() else f"there is no {file}: every key has its default"
    return [Finding("file", "ok", where + beside)]


def _is_setting(variable: str) -> bool:
    """Tell settings from other variables that begin alike."""
    name = variable.upper()
    return (
        name.startswith(ENV_PREFIX)
        and name[len(ENV_PREFIX) :].lower().partition("__")[0] in Settings.model_fields
    )


def check_configuration(settings: Settings) -> list[Finding]:
    """Look for what contradicts itself, costs money or shows something to strangers."""
    server, teacher = settings.server, settings.teacher
    try:
        key = settings.teacher_key()
        tracing_of(settings)
    except ConfigError as error:
        return [Finding("configuration", "problem", str(error), "the gateway doesn't start like this")]
    found = []
    if is_exposed(settings):
        found.append(
            Finding(
                "keys",
                "problem",
                f"whoever reaches {server.host}:{server.port} spends your money: no key is asked for, and the "
                "teacher gets the gateway's own",
                "set server.api_keys",
            )
        )
    elif server.api_keys and key is None:
        found.append(
            Finding(
                "keys",
                "warning",
                f"clients need one of {len(server.api_keys)} keys, but the teacher is asked without any: the "
                f"environment variable {teacher.api_key_env} is empty",
                f"set {teacher.api_key_env}, unless the teacher wants no key",
            )
        )
    elif server.api_keys:
        plain = sum(not each.get_secret_value().startswith("sha256:") for each in server.api_keys)
        said = (
            f"clients need one of {len(server.api_keys)} keys; the teacher gets that of {teacher.api_key_env}"
        )
        if plain:
            advice = (
                "write them as sha256:<hex> (printf %s KEY | sha256sum), so that the file gives none away"
            )
            found.append(Finding("keys", "warning", f"{said}; {plain} stand there in plain text", advice))
        else:
            found.append(Finding("keys", "ok", said))
    elif key is None:
        found.append(Finding("keys", "ok", "the clients' own keys are forwarded to the teacher"))
    else:
        found.append(Finding("keys", "ok", f"no key is asked for; only this machine reaches {server.host}"))
    if server.admin_key is None and not is_loopback(server.host):
        found.append(
            Finding(
                "metrics",
                "warning",
                f"nobody can read /metrics: {server.host} isn't loopback, and server.admin_key isn't set",
                "set server.admin_key, and give it to Prometheus",
            )
        )
    place = urlsplit(teacher.base_url)
    if place.scheme == "http" and key is not None and not is_loopback(place.hostname or ""):
        found.append(
            Finding(
                "teacher", "warning", "the teacher's key goes over the network unencrypted", "use https://"
            )
        )
    if is_loopback(place.hostname or "") and place.port == server.port and is_loopback(server.host):
        found.append(
            Finding(
                "teacher",
                "problem",
                f"teacher.base_url is this gateway itself (port {server.port})",
                "set it to the API that the gateway stands before",
            )
        )
    found += _of_learning(settings)
    if settings.cache.share == "task" and len(server.api_keys) != 1:
        found.append(
            Finding(
                "cache",
                "warning",
                "what one client was answered is served to others of the same task (cache.share)",
                "leave cache.share at \"tenant\" if they mustn't see each other's answers",
            )
        )
    return found


def _of_learning(settings: Settings) -> list[Finding]:
    found = []
    if not settings.teacher.trainable:
        found.append(
            Finding(
                "learning",
                "warning",
                "nothing is learned: teacher.trainable is false",
                "set it to true if the provider's terms let you train on its answers",
            )
        )
    elif settings.learning.interval_s == 0:
        found.append(
            Finding(
                "learning",
                "warning",
                "the gateway never learns by itself: learning.interval_s is 0",
                "run `understudy learn`, or set an interval",
            )
        )
    else:
        found.append(Finding("learning", "ok", f"looked at every {settings.learning.interval_s:g} s"))
    unlearned = [
        task.name
        for task in map(settings.for_task, [task.name for task in settings.task])
        if task.agreement.kind == "numeric" and task.student.kind == "linear"
    ]
    if unlearned:
        found.append(
            Finding(
                "learning",
                "warning",
                f"a linear student can't learn numeric answers: {', '.join(unlearned)}",
                "expect these tasks to stay with the teacher",
            )
        )
    return found


def check_machine(settings: Settings) -> list[Finding]:
    """Look at the limits of the machine."""
    found = []
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # `serve` takes all it may have
    needed = 2 * settings.teacher.max_concurrency + _FILES_BESIDE
    if limit != resource.RLIM_INFINITY and limit < needed:
        found.append(
            Finding(
                "open files",
                "warning",
                f"a worker may have {limit} files open; {settings.teacher.max_concurrency} requests at once need "
                f"about {needed}",
                f"raise the limit (ulimit -Hn, LimitNOFILE), or lower teacher.max_concurrency to {(limit - 512) // 2}"
                if limit > 2 * _FILES_BESIDE
                else "raise the limit (ulimit -Hn, LimitNOFILE)",
            )
        )
    else:
        found.append(Finding("open files", "ok", f"{limit} per worker, about {needed} are needed"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = settings.server.workers
    if workers > cores:
        advice = f"{cores} are enough: they only wait for each other"
        found.append(Finding("workers", "warning", f"{workers} workers on {cores} cores", advice))
    else:
        found.append(Finding("workers", "ok", f"{workers} on {cores} cores"))
    return found


def check_disk(state_dir: Path) -> list[Finding]:
    """Write, sync and lock where the log will lie."""
    try:
        Disk().make_directory(state_dir.absolute())
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=state_dir) as folder:
            found = [_sync(Path(folder)), _lock(Path(folder) / "lock")]
    except OSError as error:
        return [
            Finding(
                "disk",
                "problem",
                f"the state directory {state_dir} can't be written: {error.strerror}",
                "make it writable for the user that runs the gateway, or set state_dir",
            )
        ]
    free = shutil.disk_usage(state_dir).free
    if free < _LITTLE_SPACE:
        advice = "a full disk loses exchanges, not answers: make room, or set log.retention_days"
        found.append(Finding("disk", "warning", f"{free / 1024**2:.0f} MiB are free", advice))
    else:
        found.append(Finding("disk", "ok", f"{free / 1024**3:.1f} GiB are free"))
    kind = _file_system(state_dir)
    if kind is not None and kind.startswith(_REMOTE):
        advice = "the log rests on fsync and flock: put state_dir on a local file system"
        found.append(Finding("disk", "warning", f"{state_dir} lies on a network ({kind})", advice))
    elif kind is not None and kind.startswith(_FLEETING):
        advice = "log and releases go with the machine or container: put state_dir on a volume"
        found.append(Finding("disk", "warning", f"{state_dir} doesn't last ({kind})", advice))
    return found


def _sync(folder: Path) -> Finding:
    disk = Disk()
    took = []
    fd = disk.create(folder / "synced")
    try:
        for _ in range(_SYNCS):
            began = time.perf_counter()
            disk.write(fd, b"x" * 1024)
            disk.sync(fd)
            took.append(time.perf_counter() - began)
    finally:
        os.close(fd)
    median = statistics.median(took)
    said = (
        f"an fsync takes {median * 1000:.1f} ms (median of {_SYNCS}, the longest {max(took) * 1000:.1f} ms)"
    )
    if median > _SLOW_SYNC_S:
        return Finding(
            "disk",
            "warning",
            f"{said}: every answer waits for one",
            'use a faster disk, or log.durability = "relaxed"',
        )
    return Finding("disk", "ok", said)


def _lock(path: Path) -> Finding:
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("disk", "ok", "locks hold")
        except OSError as error:
            return _no_locks(f"can't lock files: {error.strerror}")
    return _no_locks("gives one lock to two")


def _no_locks(what: str) -> Finding:
    return Finding(
        "disk",
        "problem",
        f"the file system {what}: several workers would all be the keeper",
        "put state_dir on a local file system",
    )


def _file_system(path: Path) -> str | None:
    """Return the kind of file system that `path` lies on; None where the system doesn't tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    best, kind = "", None
    place = f"{path.resolve()}/"
    for line in lines:
        before, _, after = line.partition(" - ")
        mounted = before.split()[4].replace("\\040", " ").rstrip("/") + "/"
        if place.startswith(mounted) and len(mounted) >= len(best):
            best, kind = mounted, after.split()[0]
    return kind
