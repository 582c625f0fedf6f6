from __future__ import annotations

import pytest

from serving.errors import RequestError
from serving.wire import forwardable_request, forwardable_response, upstream_path


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/embeddings", "/embeddings"),
        ("/v1/files/a%2Fb?limit=2&after=%41", "/files/a%2Fb?limit=2&after=%41"),
        ("/v1/files/..a/b..", "/files/..a/b.."),
        ("/v1/files?path=../x", "/files?path=../x"),
    ],
)
def test_what_follows_v1_is_kept_as_it_is(target: str, path: str) -> None:
    assert upstream_path(target) == path


@pytest.mark.parametrize(
    "target",
    [
        "/metrics",
        "/v10/x",
        "//v1/x",
        "/v1/../admin",
        "/v1/a/%2e%2E/b",
        "/v1/a/.%2e",
        "/v1/./x",
        "/v1/..",
        "/v1/a\\..\\b",
        "/v1/a\\b",
        "/v1/a b",
        "/v1/a\tb",
        "/v1/a#b",
        "/v1/a\r\nx: y",
    ],
)
def test_nothing_climbs_out_of_v1(target: str) -> None:
    with pytest.raises(RequestError) as caught:
        upstream_path(target)
    assert caught.value.status == 404


def test_headers_of_one_connection_and_of_ours_stay_here() -> None:
    sent = [
        ("host", "localhost"),
        ("connection", "keep-alive, X-Private"),
        ("x-private", "1"),
        ("te", "trailers"),
        ("transfer-encoding", "chunked"),
        ("authorization", "Bearer client"),
        ("cookie", "a=b"),
        ("x-understudy-task", "t"),
        ("x-forwarded-for", "10.0.0.1"),
        ("content-type", "multipart/form-data; boundary=x"),
        ("content-length", "12"),
        ("openai-beta", "assistants=v2"),
        ("accept-encoding", "gzip"),
    ]
    assert [name for name, _ in forwardable_request(sent)] == [
        "content-type",
        "content-length",
        "openai-beta",
        "accept-encoding",
    ]


def test_headers_of_an_answer() -> None:
    received = [
        ("connection", "close, x-hop"),
        ("x-hop", "1"),
        ("transfer-encoding", "chunked"),
        ("content-encoding", "gzip"),
        ("content-type", "audio/mpeg"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("x-request-id", "theirs"),
        ("x-ratelimit-remaining-requests", "9"),
    ]
    assert forwardable_response(received, whole=True) == [received[i] for i in (3, 4, 5, 6, 7, 8)]
    assert forwardable_response(received, whole=False) == [received[8]]
