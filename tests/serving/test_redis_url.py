"""A Redis URL is understood as written, or refused without showing its password."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.configuration import load_settings
from serving.errors import ConfigError
from serving.redis_url import RedisUrl


@pytest.mark.parametrize(
    ("url", "understood"),
    [
        ("redis://cache", RedisUrl("single", False, (("cache", 6379),))),
        ("redis://127.0.0.1:7000/2", RedisUrl("single", False, (("127.0.0.1", 7000),), db=2)),
        ("redis://[::1]:7000/?db=2", RedisUrl("single", False, (("::1", 7000),), db=2)),
        ("rediss://[fe80::1]", RedisUrl("single", True, (("fe80::1", 6379),))),
        ("redis://:p%40ss%2F@h", RedisUrl("single", False, (("h", 6379),), password="p@ss/")),
        ("redis://me:it@h/0", RedisUrl("single", False, (("h", 6379),), username="me", password="it")),
        ("unix:///run/redis.sock?db=1", RedisUrl("unix", False, path="/run/redis.sock", db=1)),
        ("unix://:pw@/run/redis.sock", RedisUrl("unix", False, path="/run/redis.sock", password="pw")),
        ("redis+cluster://a,b:7001", RedisUrl("cluster", False, (("a", 6379), ("b", 7001)))),
        ("rediss+cluster://a", RedisUrl("cluster", True, (("a", 6379),))),
        (
            "redis+sentinel://me:pw@a,b:7001/main?db=3&sentinel_password=s",
            RedisUrl(
                "sentinel",
                False,
                (("a", 26379), ("b", 7001)),
                service="main",
                db=3,
                username="me",
                password="pw",
                options={"sentinel_password": "s"},
            ),
        ),
    ],
)
def test_it_is_understood(url: str, understood: RedisUrl) -> None:
    assert RedisUrl.parse(url) == understood
    assert "pw" not in repr(understood)


def test_files_of_tls_are_looked_for(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    with pytest.raises(ValueError, match="ca_file, but that file isn't there"):
        RedisUrl.parse(f"rediss://h?ca_file={file}")
    file.touch()
    assert RedisUrl.parse(f"rediss://h?ca_file={file}").options == {"ca_file": str(file)}
    with pytest.raises(ValueError, match="key_file without its cert_file"):
        RedisUrl.parse(f"rediss://h?key_file={file}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "should begin with one of redis://"),
        ("secret", "should begin with one of"),
        ("http://:secret@h", "should begin with one of"),
        ("redis://", "should name a host"),
        ("redis://:secret@", "should name a host"),
        ("redis://a,,b", "should name a host"),
        ("redis://:secret@h:port", "should name ports as numbers"),
        ("redis://h:0", "should name ports as numbers"),
        ("redis://h:65536", "should name ports as numbers"),
        ("redis://[::1", "should name ports as numbers"),
        ("redis://:sec/ret@h", "percent-encode the password"),
        ("redis://:secret@h/one", "should name the db as a number"),
        ("redis://h/1?db=1", "names the db twice"),
        ("redis://h?password=secret", "knows these options here, each once: db"),
        ("redis://h?db=1&db=2", "each once: db"),
        ("redis://h?secret", "has options that can't be read"),
        ("redis://h?ca_file=x", "knows these options here"),
        ("unix://run/redis.sock", "by its whole path"),
        ("unix://", "by its whole path"),
        ("redis+cluster://h/1", "names a db other than 0"),
        ("redis+sentinel://h", "should end with the service's name"),
        ("redis+sentinel://h/a/b", "should end with the service's name"),
        ("redis://a,b", "one server only"),
    ],
)
def test_it_is_refused_with_advice_and_without_the_password(
    url: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "understudy.toml"
    config.write_text(f'[cache]\nurl = "{url}"\n')
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    assert ": cache.url = (hidden): " in str(caught.value)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)


@given(
    st.sampled_from(["redis://", "rediss://", "unix://", "redis+cluster://", "redis+sentinel://", ""]),
    st.text(),
)
def test_no_text_breaks_the_reader(scheme: str, rest: str) -> None:
    try:
        read = RedisUrl.parse(scheme + rest)
    except ValueError as error:
        assert str(error).isascii()
    else:
        assert read.nodes or read.path


def test_the_password_is_never_shown(tmp_path: Path) -> None:
    config = tmp_path / "understudy.toml"
    config.write_text('[cache]\nurl = "redis://:secret@h?db=0"\nttl_s = -1\n')
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    assert "cache.ttl_s = -1" in str(caught.value)
    assert "secret" not in str(caught.value)
    config.write_text('[cache]\nurl = "redis://:secret@h?db=0"\n')
    assert "secret" not in repr(load_settings(config))


def test_replicas_need_a_redis(tmp_path: Path) -> None:
    config = tmp_path / "understudy.toml"
    config.write_text('[cache]\nsingle_flight = "replicas"\n')
    with pytest.raises(ConfigError, match=r"needs the Redis in which they meet: set cache\.url"):
        load_settings(config)
