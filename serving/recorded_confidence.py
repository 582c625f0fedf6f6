"""From the recorded confidence in an answer to log-probabilities of its tokens: what a student would have sent.

Made up, but the same in every run: the geometric mean of the tokens' probabilities is the confidence, and how they
scatter around it is drawn by the answer's text.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence

from serving.exchange import Json


def token_logprobs(tokens: Sequence[str], confidence: float, *, top: int = 0) -> list[Json]:
    """Return OpenAI's `logprobs.content` for these tokens: an entry each, with `top` alternatives.

    `confidence` is in (0, 1]. The token itself stands first among its alternatives, as when nothing is drawn by chance.
    """
    drawn = random.Random(zlib.crc32("".join(tokens).encode()))
    weights = [drawn.gammavariate(2.0, 1.0) for _ in tokens]
    total = len(tokens) * math.log(confidence)
    return [
        _entry(token, total * weight / sum(weights), top)
        for token, weight in zip(tokens, weights, strict=True)
    ]


def _entry(token: str, logprob: float, top: int) -> Json:
    alternatives = [(token, logprob)]
    probability = math.exp(logprob)
    rest = 1.0 - probability
    for number in range(1, top):
        # Each takes half of what is left, but none is likelier than the token that was chosen.
        share = min(rest / 2, 0.9 * probability)
        if share <= 0.0:
            break
        alternatives.append((f"{token}~{number}", math.log(share)))
        rest -= share
    entry = _named(token, logprob)
    entry["top_logprobs"] = [_named(*alternative) for alternative in alternatives[:top]]
    return entry


def _named(token: str, logprob: float) -> Json:
    # No token is less likely than that, as OpenAI has it.
    return {"token": token, "logprob": max(logprob, -9999.0), "bytes": list(token.encode())}
