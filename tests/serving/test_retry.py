from __future__ import annotations

import email.utils
import time

import pytest

from serving.errors import UpstreamBroken, UpstreamRefused, UpstreamTimeout
from serving.retry import delay_before_retry


def refused(status: int, **headers: str) -> UpstreamRefused:
    return UpstreamRefused(status, {name.replace("_", "-"): value for name, value in headers.items()}, b"")


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_these_statuses_are_worth_repeating(status: int) -> None:
    assert delay_before_retry(refused(status), 0) is not None


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 413, 422])
def test_these_are_not(status: int) -> None:
    assert delay_before_retry(refused(status), 0) is None


def test_the_teacher_has_the_last_word() -> None:
    assert delay_before_retry(refused(500, x_should_retry="false"), 0) is None
    assert delay_before_retry(refused(400, x_should_retry="true"), 0) is not None


def test_broken_is_repeated_and_timeout_is_not() -> None:
    assert delay_before_retry(UpstreamBroken("gone"), 0) is not None
    assert delay_before_retry(UpstreamTimeout("late"), 0) is None


def test_backoff_doubles_up_to_its_cap_with_full_jitter() -> None:
    for failed, longest in [(0, 0.5), (1, 1.0), (3, 4.0), (4, 8.0), (30, 8.0)]:
        delays = [delay_before_retry(refused(500), failed) for _ in range(300)]
        waits = [delay for delay in delays if delay is not None]
        assert len(waits) == 300
        assert 0 <= min(waits) < longest * 0.1
        assert longest * 0.9 < max(waits) <= longest


def test_retry_after_is_followed() -> None:
    assert delay_before_retry(refused(429, retry_after="3"), 0) == 3.0
    assert delay_before_retry(refused(429, retry_after="3", retry_after_ms="20"), 0) == pytest.approx(0.02)
    assert delay_before_retry(refused(429, retry_after="-5"), 0) == 0.0
    at = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert delay_before_retry(refused(503, retry_after=at), 0) == pytest.approx(30, abs=2)


@pytest.mark.parametrize("nonsense", ["soon", "", "nan", "inf", "1e300"])
def test_nonsense_means_backoff(nonsense: str) -> None:
    delay = delay_before_retry(refused(429, retry_after=nonsense), 0)
    assert delay is not None and delay <= 0.5
