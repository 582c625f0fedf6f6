from __future__ import annotations

import subprocess
import sys
import tracemalloc
from importlib.metadata import version
from pathlib import Path

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data import providers
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.pricing import PriceList
from serving.teacher_settings import Price

ROOT = Path(__file__).parents[2]
OPENAI = next(provider for provider in providers if provider.id == "openai")
# The ids of fine-tuned models are prefixes: only the names made from them are known.
MODELS = [model.id for model in OPENAI.models if not model.id.startswith("ft:")]
PRICES = PriceList(None, base_url="https://api.openai.com/v1")


def test_the_list_knows_what_an_answer_cost() -> None:
    usage = {
        "prompt_tokens": 1000,
        "completion_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 400},
        "completion_tokens_details": {"reasoning_tokens": 60},
    }
    cost, prices = PriceList(None).cost("gpt-4o", usage)
    assert cost == pytest.approx((600 * 2.5 + 400 * 1.25 + 100 * 10) / 1e6)
    assert prices == f"genai-prices {version('genai-prices')}"


@settings(deadline=None)
@given(
    model=st.sampled_from(MODELS),
    asked=st.integers(0, 2_000_000),
    cached=st.floats(0, 1),
    answered=st.integers(0, 200_000),
)
def test_every_model_costs_what_genai_prices_says(
    model: str, asked: int, cached: float, answered: int
) -> None:
    hits = int(asked * cached)
    usage = {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "prompt_tokens_details": {"cached_tokens": hits},
    }
    theirs = calc_price(
        Usage(input_tokens=asked, cache_read_tokens=hits, output_tokens=answered), model, provider_id="openai"
    )
    ours, _ = PRICES.cost(model, usage)
    assert ours == pytest.approx(float(theirs.total_price), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("gpt-4.1-mini-2025-04-14", "gpt-4.1-mini"),
        ("openai/gpt-4o", "gpt-4o"),
        ("GPT-4o", "gpt-4o"),
    ],
)
def test_other_names_of_a_model(name: str, same_as: str) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 10}
    prices = PriceList(None)
    assert prices.cost(name, usage)[0] == prices.cost(same_as, usage)[0] is not None


def test_a_fine_tuned_model_has_its_own_price() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    tuned, _ = PRICES.cost("ft:gpt-4o-mini-2024-07-18:acme::abc", usage)
    plain, _ = PRICES.cost("gpt-4o-mini", usage)
    assert tuned is not None and plain is not None
    assert tuned > plain


def test_a_service_tier_has_its_own_price() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100}
    usual, _ = PRICES.cost("gpt-5", usage)
    flex, _ = PRICES.cost("gpt-5", usage, service_tier="flex")
    assert usual is not None and flex is not None
    assert flex < usual
    assert PRICES.cost("gpt-5", usage, service_tier="nothing known")[0] == usual


@pytest.mark.parametrize("model", ["nobody-knows-this", "", "x" * 10_000, "gpt-4o\n", "a/b"])
def test_an_unknown_model_has_no_price(model: str) -> None:
    assert PriceList(None).cost(model, {"prompt_tokens": 1, "completion_tokens": 1})[0] is None


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": None},
        {"prompt_tokens": "12"},
        {"prompt_tokens": -1},
        {"prompt_tokens": True},
        {"prompt_tokens": 1, "completion_tokens": -1},
    ],
)
def test_nonsense_has_no_price(usage: dict[str, object] | None) -> None:
    assert PRICES.cost("gpt-4o", usage)[0] is None


def test_more_cached_than_asked_is_no_discount_below_zero() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 99}}
    assert PRICES.cost("gpt-4o", usage)[0] == pytest.approx(10 * 1.25 / 1e6)
    assert PRICES.cost("gpt-4o", {**usage, "prompt_tokens_details": "?"})[0] == pytest.approx(10 * 2.5 / 1e6)


def test_the_configured_price_wins() -> None:
    prices = PriceList(Price(input=3, output=5, cached_input=1))
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    cost, source = prices.cost("gpt-4o", usage)
    assert cost == pytest.approx((6 * 3 + 4 * 1 + 2 * 5) / 1e6)
    assert source == "config"
    assert PriceList(Price(input=3, output=5)).cost("anything", usage)[0] == pytest.approx(40 / 1e6)


def test_made_up_names_do_not_pile_up() -> None:
    prices = PriceList(None)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    for number in range(1100):
        prices.cost(f"gpt-4o-made-up-{number}", usage)
    tracemalloc.start()
    for number in range(1100):
        prices.cost(f"gpt-4o-made-up-again-{number}", usage)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 400_000


def test_nothing_is_fetched() -> None:
    code = """
import sys
def hook(event, args):
    if event.startswith(("socket.connect", "socket.getaddrinfo")):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
import threading
from serving.pricing import PriceList
cost, _ = PriceList(None).cost("gpt-4o", {"prompt_tokens": 1000, "completion_tokens": 0})
assert threading.active_count() == 1
print(cost)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (ran.returncode, ran.stdout.strip()) == (0, "0.0025"), ran.stderr
