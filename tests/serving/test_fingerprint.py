import datetime
import time
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.fingerprint import fingerprint, mask

TEMPLATE = "Today is {}. Answer with one label."


def request(system: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "hello"}]
    return {"model": "gpt-4o", "messages": messages, **fields}


SAME = {
    "numbers": ["7", "12", "1,234.50", "-3", "3.14", "0"],
    "dates": [
        "2026-03-01",
        "3 March 2026",
        "17 Apr. 2025",
        "03/04/26",
        "31.12.2026",
        "March 2026",
        "1st of May 2026",
    ],
    "dates with words before": ["March 3, 2026", "December 31, 2025", "Tuesday, May 5, 2026"],
    "weekdays": ["Monday, 3 March 2026", "Thursday, 30 April 2026", "Sun 5 Jul 2026"],
    "times": ["12:30", "9:05", "23:59:59.123", "5:30 PM", "9am", "2026-03-01T12:30:00Z"],
    "uuids": [
        "9f8a7c6e-1b2d-4c3e-8f90-abcdefabcdef",
        "deadbeef-cafe-babe-face-feedfacefeed",
        "12345678-1234-1234-1234-123456789012",
    ],
    "hex ids": ["a3f9c2d4", "3fa9c2d4", "beef1234", "00000001", "9F8A7C6E1B2D4C3E8F90"],
    "mixed ids": ["8Fk2Lm9Q", "xK93jdPq", "N2frFeUfNVHib"],
    "e-mails": ["a@example.com", "first.last+tag@mail.example.co.uk", "x-2@xn--mnchen-3ya.de"],
    "URLs": ["https://example.com", "http://a.b.c/d/e?f=1&g=Alice#x", "www.example.org/path"],
    "quoted names": ['"Alice"', '"Bob Smith"', '"Ludwig van Beethoven"', '"王伟"'],
    "single quotes": ["'Alice'", "'Bob Smith'", "'Liam O'Brien'"],
    "curly quotes": ["“Alice”", "“María José López”", "“Bank of England”"],
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME.keys())
def test_prompts_that_differ_in_a_variable_part_only_have_one_fingerprint(values: list[str]) -> None:
    masked = {value: mask(TEMPLATE.format(value)) for value in values}
    assert len(set(masked.values())) == 1, masked
    assert len({fingerprint(request(TEMPLATE.format(value))) for value in masked}) == 1


@given(a=st.uuids(), b=st.uuids())
def test_any_two_uuids_look_the_same(a: uuid.UUID, b: uuid.UUID) -> None:
    assert mask(TEMPLATE.format(a)) == mask(TEMPLATE.format(b))


FORMS = ["%Y-%m-%d", "%d %B %Y", "%a, %d %b %Y", "%B %d, %Y", "%d/%m/%y"]
DATES = st.dates(datetime.date(1000, 1, 1))


@given(a=DATES, b=DATES, form=st.sampled_from(FORMS))
def test_any_two_dates_of_one_form_look_the_same(a: datetime.date, b: datetime.date, form: str) -> None:
    assert mask(TEMPLATE.format(a.strftime(form))) == mask(TEMPLATE.format(b.strftime(form)))


@given(a=st.integers(), b=st.integers())
def test_any_two_numbers_look_the_same_inside_order_numbers(a: int, b: int) -> None:
    assert mask(f"Order INV{abs(a)}, version v{abs(b)}") == mask(f"Order INV{abs(b)}, version v{abs(a)}")


@given(st.text())
def test_mask_takes_any_text_and_leaves_nothing_more_to_mask(text: str) -> None:
    assert mask(mask(text)) == mask(text)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Don't answer; it's late.", "Don't reply; it's late."),
        ("the customer's name isn't known", "the customer's age isn't known"),
        ('Answer "yes" or "no".', 'Answer "good" or "bad".'),
        ("a 3-day offer", "a 3-week offer"),
        ("Classify the ticket.", "Summarise the ticket."),
        ("mail us @home", "mail us @work"),
        ('He said "Please answer politely." to all', 'He said "Please answer quickly." to all'),
        ("labels: card_arrival, top_up", "labels: card_lost, top_up"),
        ("Q3 report", "H3 report"),
        ("共3条评论", "共3个问题"),
    ],
)
def test_other_wording_is_another_fingerprint(a: str, b: str) -> None:
    assert mask(a) != mask(b)
    assert fingerprint(request(a)) != fingerprint(request(b))


def test_an_apostrophe_opens_no_quotation() -> None:
    text = "Don't touch the customers' Orders, it's Alice's Own 'Big Deal' here."
    assert mask(text) == "Don't touch the customers' Orders, it's Alice's Own '<name>' here."


def test_what_a_mask_looks_like() -> None:
    text = 'On Tuesday, 3 March 2026 at 5:30 p.m. "Bob Smith" (b@example.com) paid $1,250: https://example.com/r/1.'
    assert mask(text) == 'On <n> at <n> "<name>" (<email>) paid $<n>: <url>'


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SAME_TOOL = {
    "function": {"parameters": {"properties": {}, "type": "object"}, "name": "f"},
    "type": "function",
}


def test_model_tools_and_response_format_count_but_not_the_order_of_their_keys() -> None:
    plain = request("x")
    others = [
        plain,
        {**plain, "model": "gpt-4o-mini"},
        {**plain, "tools": [TOOL]},
        {**plain, "tools": [TOOL, TOOL]},
        {**plain, "response_format": {"type": "json_object"}},
    ]
    assert len({fingerprint(other) for other in others}) == len(others)
    assert fingerprint({**plain, "tools": [TOOL]}) == fingerprint({**plain, "tools": [SAME_TOOL]})
    assert fingerprint({**plain, "tools": [], "response_format": None}) == fingerprint(plain)


def test_what_the_user_says_and_how_it_is_sampled_does_not_count() -> None:
    other = request("x", temperature=0.3, stream=True, user="alice")
    other["messages"][1]["content"] = "something else"
    assert fingerprint(other) == fingerprint(request("x"))


def test_developer_messages_and_lists_of_text_parts_are_system_prompts_too() -> None:
    plain = fingerprint(request("Be brief."))
    developer = request("Be brief.")
    developer["messages"][0]["role"] = "developer"
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    assert fingerprint(developer) == plain
    assert fingerprint(request(parts)) == plain
    assert len(plain) == 12
    assert int(plain, 16) >= 0


def test_a_prompt_full_of_marks_takes_linear_time() -> None:
    # 400 kB of each beginning that a careless pattern would try again; quadratic would take minutes.
    for mark in ("@", "a@", "://", "a", "1", "a1-", '"', "'A", "“A", "-", "1 "):
        mask(mark * (400_000 // len(mark)))


@pytest.mark.parametrize(
    "piece", ["Mon ", "Mon, ", "3-day-", "1..", "1 a", "'A ", "a@", "x@b.", '"A ', "1٣-", "://"]
)
def test_no_text_takes_long(piece: str) -> None:
    began = time.perf_counter()
    mask(piece * (4_000_000 // len(piece)) + "1")
    assert time.perf_counter() - began < 2
