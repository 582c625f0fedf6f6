"""A text as terms: what is counted, in every script, in bounded time."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from serving.text_terms import MAX_CHARACTERS, terms


def test_words_pairs_and_characters() -> None:
    words, characters = terms("Lost card")
    assert words == ["lost", "card", "lost card"]
    of_lost = [" l", "lo", "os", "st", "t ", " lo", "los", "ost", "st ", " los", "lost", "ost "]
    of_card = [" c", "ca", "ar", "rd", "d ", " ca", "car", "ard", "rd ", " car", "card", "ard "]
    assert Counter(characters) == Counter([*of_lost, *of_card])


@pytest.mark.parametrize(
    ("text", "words", "characters"),
    [
        ("", [], ["  "]),
        (" \n\t ", [], ["  "]),
        ("a", ["a"], [" a", "a ", " a "]),
        ("!", [], [" !", "! ", " ! "]),
        ("ＡＢ", ["ab"], [" a", "ab", "b ", " ab", "ab ", " ab "]),
        ("😀", [], [" 😀", "😀 ", " 😀 "]),
        ("\x00", [], [" \x00", "\x00 ", " \x00 "]),
    ],
)
def test_short_texts(text: str, words: list[str], characters: list[str]) -> None:
    assert terms(text) == (words, characters)


@pytest.mark.parametrize("text", ["где моя карта", "私のカードはどこ", "أين بطاقتي", "मेरा कार्ड", "σάς ΣΑΣ"])
def test_words_of_any_script(text: str) -> None:
    words, characters = terms(text)
    assert words
    assert characters


# NFKC and case folding are ours; where they change nothing, the scheme is scikit-learn's.
@given(st.text(alphabet=st.characters(codec="ascii"), max_size=80))
def test_the_scheme_is_scikit_learns(text: str) -> None:
    words, characters = terms(text)
    by_word = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\w+").build_analyzer()
    assert Counter(words) == Counter(by_word(text))
    if text.split():
        by_character = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).build_analyzer()
        assert Counter(characters) == Counter(by_character(text))


@given(st.text(max_size=200))
def test_no_term_holds_a_newline(text: str) -> None:
    """Releases store the vocabulary one term a line."""
    assert not any("\n" in term for kind in terms(text) for term in kind)


@pytest.mark.parametrize(
    "unit",
    ["card ", "x", "\ufdfa", "a\u0301\u0327\u0323", "\u0301\u0316", "\U0001f469\u200d\U0001f469 ", "Ǆ"],
    ids=["words", "one word", "grows under NFKC", "marks", "only marks", "joined emoji", "digraph"],
)
def test_a_megabyte_takes_no_longer_than_its_beginning(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    began = time.thread_time()
    assert terms(text) == terms(text[:MAX_CHARACTERS])
    assert time.thread_time() - began < 1.0
