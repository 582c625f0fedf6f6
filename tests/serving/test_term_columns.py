"""Terms as columns: what is remembered of words changes nothing, and is bounded."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.term_columns import TermColumns
from serving.text_terms import terms

TEXTS = (
    st.text(alphabet="ab c!\u0130\ufb01\n", max_size=60)
    | st.text(max_size=60)
    | st.text("abc", min_size=30, max_size=50)
)


@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, min_size=1, max_size=6))
def test_counting_is_looking_every_term_up(known: list[str], asked: list[str]) -> None:
    seen = [terms(text) for text in known]
    words = sorted({term for found, _ in seen for term in found})
    characters = sorted({term for _, found in seen for term in found})
    columns = TermColumns([*words, *characters], len(words))
    places = ({t: i for i, t in enumerate(words)}, {t: len(words) + i for i, t in enumerate(characters)})
    for text in [*asked, *known, *asked]:
        expected = [
            Counter(place[term] for term in found if term in place)
            for place, found in zip(places, terms(text), strict=True)
        ]
        found, times, of_words = columns.count(text)
        # In this order, too: sums of floats depend on it.
        counted = list(zip(found.tolist(), times.tolist(), strict=True))
        assert counted == [pair for part in expected for pair in part.items()]
        assert of_words == len(expected[0])


def test_it_goes_with_its_student() -> None:
    # Garbage is looked for seldom, and a vocabulary takes megabytes.
    columns = TermColumns(["aa", "bb", "bb "], 1)
    columns.count("aa bb")
    gone = weakref.ref(columns)
    gc.disable()
    try:
        del columns
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_remembered_is_bounded() -> None:
    columns = TermColumns(["  ", "aa"], 0)
    for number in range(10_000):
        columns.count(f"a{number} {'a' * 1000}{number}")
    remembered = columns._remembered.cache_info()
    assert remembered.currsize == remembered.maxsize == 4096
    found, times, _ = columns.count("a" * 1000)
    assert (found.tolist(), times.tolist()) == ([1], [999])
