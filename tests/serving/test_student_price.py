"""What a student's answer cost."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import ValidationError

from serving.exchange import STUDENT_FIELDS, StudentAnswer
from serving.student_choice import StudentChoice
from serving.student_price import StudentPrices
from serving.student_settings import StudentSettings, VllmSettings
from serving.teacher_settings import Price

PRICES = StudentPrices(StudentSettings(usd_per_hour=0.36))
USAGE = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
ANSWER = StudentAnswer("small", [{"index": 0}], USAGE, 2.0, 1.0, device_s=0.5)
PLAIN = StudentAnswer("", [], None, 0.0, 0.0)
LM = StudentChoice(kind="lm", base_url="http://gpu:8000/v1", model="small")
SERVER = LM.model_copy(update={"usd_per_hour": 7.2})
BILLED = LM.model_copy(update={"price": Price(input=1.0, output=5.0)})


def test_an_answer_costs_the_time_of_what_it_ran_on() -> None:
    assert PRICES.usd(ANSWER, "lm", LM) == pytest.approx(0.5 * 0.36 / 3600)
    assert PRICES.usd(ANSWER, "lm", SERVER) == pytest.approx(0.5 * 7.2 / 3600)


def test_one_on_a_vllm_of_ours_costs_what_that_does() -> None:
    prices = StudentPrices(
        StudentSettings(usd_per_hour=0.36, vllm=VllmSettings(urls=["http://a", "http://b"], usd_per_hour=3.6))
    )
    ours = LM.model_copy(update={"base_url": None})
    assert prices.usd(ANSWER, "lm", ours) == pytest.approx(0.5 * 3.6 / 3600)
    assert prices.usd(ANSWER, "lm", LM) == pytest.approx(0.5 * 0.36 / 3600), "it names a server of its own"
    assert prices.usd(ANSWER, "lm", SERVER.model_copy(update={"base_url": None})) == pytest.approx(1e-3)
    assert prices.usd(ANSWER, "linear", StudentChoice()) == pytest.approx(0.5 * 0.36 / 3600)


def test_an_answer_that_is_priced_is_the_same_but_for_that() -> None:
    whole = StudentAnswer("m", [{}], USAGE, 2.0, 1.0, None, {"a": 1.0}, [{"tokens": 1}], False, 0.5, USAGE)
    assert all(getattr(whole, name) != getattr(PLAIN, name) for name in STUDENT_FIELDS if name != "cost_usd")
    assert whole.priced(0.25) == dataclasses.replace(whole, cost_usd=0.25)


def test_where_that_was_not_measured_it_costs_as_long_as_it_took() -> None:
    old = StudentAnswer("small", [{"index": 0}], USAGE, 2.0, 1.0)
    assert PRICES.usd(old, "lm", LM) == pytest.approx(2.0 * 0.36 / 3600)


def test_a_provider_bills_tokens_those_of_drawn_answers_included() -> None:
    assert PRICES.usd(ANSWER, "lm", BILLED) == pytest.approx(1050e-6)
    drawn = StudentAnswer(
        "small", [{"index": 0}], USAGE, 2.0, 1.0, billed={"prompt_tokens": 3000, "completion_tokens": 30}
    )
    assert PRICES.usd(drawn, "lm", BILLED) == pytest.approx(3150e-6)
    assert PRICES.usd(StudentAnswer("small", [], USAGE, 2.0, 1.0), "lm", BILLED) == 0.0, "nothing came"


def test_what_is_said_of_one_kind_is_not_about_another_that_is_live_still() -> None:
    assert PRICES.usd(ANSWER, "linear", SERVER) == pytest.approx(0.5 * 0.36 / 3600)
    assert PRICES.usd(ANSWER, "linear", BILLED) == pytest.approx(0.5 * 0.36 / 3600)


def test_it_is_paid_by_the_hour_or_by_the_token() -> None:
    given = {"kind": "lm", "base_url": "http://gpu/v1", "model": "m", "price": {"input": 1, "output": 1}}
    with pytest.raises(ValidationError, match="not both"):
        StudentChoice(**given, usd_per_hour=1.0)
    with pytest.raises(ValidationError, match='"linear" has no price'):
        StudentChoice(price=Price(input=1.0, output=1.0))
