from __future__ import annotations

from gateway.attempts import Attempts


def test_the_latest_attempt_is_found_within_the_window() -> None:
    now = [0.0]
    attempts = Attempts(window_s=600, clock=lambda: now[0])
    key = attempts.key("tenant", b"body")
    assert attempts.earlier(key) is None
    attempts.remember(key, "first", coin=True, audit_rate=0.05)
    attempts.remember(key, "second", coin=True, audit_rate=0.05)
    now[0] = 599
    found = attempts.earlier(key)
    assert found is not None
    assert (found.id, found.coin, found.audit_rate) == ("second", True, 0.05)
    now[0] = 600
    assert attempts.earlier(key) is None


def test_attempts_of_others_and_at_other_things_are_told_apart() -> None:
    keys = {Attempts.key("a", b"x"), Attempts.key("b", b"x"), Attempts.key("a", b"y")}
    assert len(keys) == 3


def test_the_oldest_are_forgotten() -> None:
    attempts = Attempts(limit=2)
    keys = [attempts.key("t", bytes([number])) for number in range(3)]
    for key in keys:
        attempts.remember(key, key.hex(), coin=False, audit_rate=0.0)
    assert attempts.earlier(keys[0]) is None
    assert attempts.earlier(keys[1]) is not None
    assert attempts.earlier(keys[2]) is not None
