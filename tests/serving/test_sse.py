from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import UpstreamBroken
from serving.sse import EventParser


def parse(*pieces: bytes) -> list[bytes]:
    parser = EventParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.end()


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b'data: {"a":1}\n\ndata: [DONE]\n\n', [b'{"a":1}', b"[DONE]"]),
        (b"data:[DONE]\n\n", [b"[DONE]"]),
        (b"data:  two spaces\n\n", [b" two spaces"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b": ping\n\n: ping\n\ndata: a\n\n", [b"a"]),
        (b"event: error\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b'data: {"a":\ndata: 1}\n\n', [b'{"a":\n1}']),
        (b"data: a\n\ndata: last", [b"a", b"last"]),
        (b"data: a\n\ndata: last\n", [b"a", b"last"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data\n\n", []),
        (b"database: a\n\n", []),
        ("data: é🙂\n\n".encode(), ["é🙂".encode()]),
        (b"", []),
    ],
)
def test_events_of_a_stream(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events
    assert parse(*(stream[i : i + 1] for i in range(len(stream)))) == events


lines = st.one_of(
    st.just(b""),
    st.sampled_from([b": ping", b"event: x", b"data:[DONE]", b"data", b"id: 1"]),
    st.text("aé🙂: {}", max_size=8).map(lambda text: b"data: " + text.encode()),
)
streams = st.lists(st.tuples(lines, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=12).map(
    lambda parts: b"".join(line + end for line, end in parts)
)


@given(streams, st.lists(st.integers(0, 200), max_size=8), st.booleans())
def test_any_split_gives_the_same_events(stream: bytes, cuts: list[int], cut_tail: bool) -> None:
    if cut_tail:
        stream = stream[:-1]
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    assert parse(*pieces) == parse(stream)


def test_an_endless_event_is_refused() -> None:
    parser = EventParser(max_event_bytes=100)
    with pytest.raises(UpstreamBroken, match="more than 100 bytes"):
        for _ in range(20):
            parser.feed(b"data: 0123456789")
    parser = EventParser(max_event_bytes=100)
    with pytest.raises(UpstreamBroken, match="more than 100 bytes"):
        for _ in range(20):
            parser.feed(b"data: 0123456789\n")
