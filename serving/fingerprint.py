"""Which requests look like the same task: the fingerprint of everything but the user's words.

A prompt template is filled in anew for each request: dates, order numbers, the customer's name. `mask` takes
these out, so that what is left is the template. When in doubt it leaves a word in: two tasks taken for one
would spoil each other, one task taken for two only learns more slowly.
"""

from __future__ import annotations

import hashlib
import re
from string import ascii_letters, digits

import orjson

from serving.chat import system_text
from serving.exchange import Json

# Every pattern begins with a literal or a set of characters: then `re` skips over ordinary text without
# trying to match. What stands before such a beginning (an e-mail's mailbox, the letters of an id) is cut off
# afterwards with `rstrip`.
_URL_REST = re.compile(r"[^\s\"'<>)\]}“”]+")
_WWW = re.compile(r"www\.[^\s\"'<>)\]}“”]+")
_SCHEME = ascii_letters + digits + "+-."
_DOMAIN = re.compile(r"\w[\w-]*(?:\.\w[\w-]*)+")
_MAILBOX = ascii_letters + digits + "._%+-"
_UUID_REST = re.compile(
    r"-(?<=[0-9a-fA-F]{8}-)[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}(?![0-9a-zA-Z])"
)
_QUOTED = re.compile(
    r"""
      "(?<!\w")[^"\n]{1,64}"
    | '(?<!\w')(?:[^'\n]|'(?=\w)){1,64}'(?!\w)     # an apostrophe may stand inside: 'Liam O'Brien'
    | “[^”\n]{1,64}” | ‘[^’\n]{1,64}’ | „[^“”\n]{1,64}[“”] | «[^»\n]{1,64}»
    """,
    re.VERBOSE,
)
_NAME_PARTICLES = frozenset(
    (
        "&",
        "and",
        "da",
        "das",
        "de",
        "del",
        "della",
        "der",
        "di",
        "dos",
        "du",
        "la",
        "le",
        "of",
        "the",
        "van",
        "von",
        "y",
    )
)
# Two patterns for where a number begins: `[0-9]` is found twice as fast as `\d`, which also knows ٣ and ३.
_DIGIT = re.compile(r"[0-9]")
_ANY_DIGIT = re.compile(r"\d")
_NUMERIC = re.compile(r"[0-9.,:/+-]*")
_AFTER_NUMBERS = ".,:/+-"
_RUN = re.compile(r"\d[\dA-Za-z]*")  # 7, 3rd, 5kg, 8f3a
_RUNS = re.compile(
    r"\d[\dA-Za-z]*(?:[-.,:/+][A-Za-z]*\d[\dA-Za-z]*)*"
)  # 2026-03-01T12:30:00Z, but of 3-day only 3
_MONTH_AFTER = re.compile(
    r"[ -](?:of )?"
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b"
    r"(?:\.?,?[ -]\d{2,4}\b)?"
)
_NOON_AFTER = re.compile(r" ?[AaPp](?:[Mm]\b|\.[Mm]\.)")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "Sept", "October", "November", "December"),
)
_DAYS = (
    *("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    *("Tues", "Thur", "Thurs"),
)
_DATE_WORDS = frozenset(form for word in _MONTHS + _DAYS for form in (word, word[:3]))
_BEFORE_SIGN = " \t\n([{<>=:,*/\"'"  # or nothing: after anything else it is a hyphen
_HEX_LETTERS = "abcdefABCDEF"
_MASKED_CHARACTERS = 64 * 1024
_DATE_WORDS_AT_MOST = 4


def fingerprint(request: Json) -> str:
    """Twelve hex digits that requests of one task share.

    They stand for the model, the masked system prompt, the tools and the response format. `request` is a
    well-formed chat completion request (`serving.chat.ChatRequest.body`). The order of keys doesn't matter,
    the order of tools does.
    """
    parts = [
        request.get("model"),
        mask(system_text(request)),
        request.get("tools") or request.get("functions"),
        request.get("response_format"),
    ]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]


def mask(text: str) -> str:
    """`text` with what changes from request to request replaced by placeholders.

    `<n>`: numbers, dates, times and ids. `<email>`, `<url>`. `<name>`: a quotation of at most 64 characters
    in which every word is capitalised (or in a script without capitals); others stay, since they are
    wording: "yes" or "no".

    Takes time in proportion to the text, whatever it holds. What is beyond 64 Ki characters stays as it is.
    """
    rest = text[_MASKED_CHARACTERS:]
    text = text[:_MASKED_CHARACTERS]
    if "://" in text:
        text = _mask_around(text, "://", _SCHEME, _URL_REST, "<url>")
    if "www." in text:
        text = _WWW.sub("<url>", text)
    if "@" in text:
        text = _mask_around(text, "@", _MAILBOX, _DOMAIN, "<email>")
    text = _QUOTED.sub(_mask_name, text)
    text = _UUID_REST.sub("0", text)
    return _mask_numbers(text) + rest


def _mask_around(text: str, mark: str, before: str, after: re.Pattern[str], placeholder: str) -> str:
    """Replace each `mark` with the `before` characters in front of it and the match of `after` behind it."""
    first, *rest = text.split(mark)
    parts = [first]
    for tail in rest:
        head = parts[-1].rstrip(before)
        match = after.match(tail)
        if match is None or head == parts[-1]:
            parts += [mark, tail]
        else:
            parts[-1] = head
            parts += [placeholder, tail[match.end() :]]
    return "".join(parts)


def _mask_name(match: re.Match[str]) -> str:
    quoted = match[0]
    words = quoted[1:-1].split()
    if not words or not words[0][0].isalpha() or words[0][0].islower():
        return quoted
    if any(word[0].islower() and word not in _NAME_PARTICLES for word in words):
        return quoted
    return f"{quoted[0]}<name>{quoted[-1]}"


def _mask_numbers(text: str) -> str:
    pattern = _DIGIT if text.isascii() else _ANY_DIGIT
    parts: list[str] = []
    end = 0
    numeric_end = 0  # of the digits and their punctuation around the match: looked for once, not per number
    match = pattern.search(text)
    while match is not None:
        start = match.start()
        head = text[end:start]
        last = head[-1:]
        if last in " ,":
            head = _without_date_words(head)
        elif last in "+-−":
            if head[-2:-1] in _BEFORE_SIGN:
                head = head[:-1]
        elif last.isalpha():
            head = _without_id_letters(head, text, start)
        parts.append(head)
        if start >= numeric_end:
            numeric = _NUMERIC.match(text, start)
            numeric_end = start if numeric is None else numeric.end()
        end = _number_end(text, start, numeric_end)
        match = pattern.search(text, end)
    parts.append(text[end:])
    return "<n>".join(parts)


def _number_end(text: str, start: int, numeric_end: int) -> int:
    """Where the number that begins at `start` ends; up to `numeric_end` there are digits and punctuation."""
    runs = _RUNS.match(text, start) if _goes_on(text, numeric_end) else None
    end = numeric_end if runs is None else runs.end()
    if runs is None:
        while text[end - 1] in _AFTER_NUMBERS:
            end -= 1
    following = text[end : end + 2]
    if following[:1] in " -" and following[1:] in "oJFMASOND":
        month = _MONTH_AFTER.match(text, end)
        end = end if month is None else month.end()
    elif following[-1:] in "AaPp":
        noon = _NOON_AFTER.match(text, end)
        end = end if noon is None else noon.end()
    return end


def _goes_on(text: str, numeric_end: int) -> bool:
    """Whether letters, or digits of another script, follow: then it is more than a number (`3rd`, `8f3a`)."""
    following = text[numeric_end : numeric_end + 1]
    return following.isdecimal() or (following.isascii() and following.isalpha())


def _without_date_words(head: str) -> str:
    """Cut `Tuesday, March ` from the end of what stands before a number."""
    for _ in range(_DATE_WORDS_AT_MOST):
        stripped = head.rstrip(" ,")
        rest = stripped.rstrip(ascii_letters)
        if stripped[len(rest) :] not in _DATE_WORDS:
            break
        head = rest
    return head


def _without_id_letters(head: str, text: str, start: int) -> str:
    """Cut the letters that an id begins with: `a3f9`, `xK93jd`. The INV of INV2041 and the v of v2 stay."""
    rest = head.rstrip(ascii_letters)
    run = _RUN.match(text, start)
    is_id = run is None or not run[0].isdigit() or not head[len(rest) :].strip(_HEX_LETTERS)
    return rest if is_id else head
