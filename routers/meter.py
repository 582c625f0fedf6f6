"""The signals of a language model's answer while it is made: what `serving.tally.Meter` asks for."""

from __future__ import annotations

from routers.signals import TokenSignals, answer_signals, request_signals, sample_signals
from serving.chat import last_user_text
from serving.exchange import Json


class TokenMeter:
    """Takes the tokens of one answer to `request`.

    What a prefix says is read from its tokens and from nothing else, so that it doesn't depend on how the server cut
    its stream into chunks.
    """

    def __init__(self, request: Json) -> None:
        self._request = request
        self._tokens = TokenSignals()
        self._said: list[str] = []

    def add(self, token: object, logprob: object, top_logprobs: object) -> None:
        """Take the next token, with OpenAI's fields as the server sent them, whatever they are. Never raises."""
        self._tokens.add(token, logprob, top_logprobs)
        if isinstance(token, str):
            self._said.append(token)

    def signals(self) -> dict[str, float]:
        """The signals of the tokens so far, and of the text they spell; none if they aren't to be trusted."""
        known = self._tokens.signals()
        return known and known | answer_signals({"content": "".join(self._said)}, None, self._request)

    def whole(self, choices: list[Json], tokens: int | None) -> dict[str, float]:
        """The signals of the whole answer. `tokens` is how many the server says there are, if it does."""
        known = self._tokens.signals(tokens)
        if not known or not choices:
            return {}
        return known | self._form(choices)

    def sampled(self, choices: list[Json], drawn: list[str]) -> dict[str, float]:
        """The signals of an answer by others `drawn` to the same request, in the form they are compared in."""
        if not choices:
            return {}
        asked = request_signals(last_user_text(self._request) or "")
        return asked | sample_signals(drawn) | self._form(choices)

    def _form(self, choices: list[Json]) -> dict[str, float]:
        return answer_signals(choices[0]["message"], choices[0]["finish_reason"], self._request)
