"""Log-probabilities of the teacher's tokens, asked for the log's sake: a client that didn't ask isn't shown them."""

from __future__ import annotations

from serving.errors import UpstreamRefused
from serving.exchange import Json

_FIELDS = ("logprobs", "top_logprobs")
_REFUSALS = frozenset({400, 403, 404, 422, 501})
_MODELS_AT_MOST = 1000


class LogprobsForTheLog:
    """Says with which requests to ask for them; remembers the models that have none to give."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._without: set[str] = set()

    def to_be_asked(self, request: Json, model: str) -> bool:
        """Say whether to ask `model` for them: if the operator wants them and the client left the matter open.

        A client that set `logprobs` (false too) or `top_logprobs` gets what it asked for, errors included.
        """
        return (
            self._wanted and model not in self._without and all(request.get(name) is None for name in _FIELDS)
        )

    def not_from(self, model: str) -> None:
        """Remember that this model answered only once it wasn't asked for them."""
        if len(self._without) < _MODELS_AT_MOST:
            self._without.add(model)


def may_be_about_logprobs(error: UpstreamRefused) -> bool:
    """Say whether the teacher may have refused because it was asked for log-probabilities."""
    return error.status in _REFUSALS and b"logprobs" in error.body.lower()


def alternatives_in(choices: list[Json]) -> int | None:
    """Return how many alternatives the first token of a chunk has; None for a chunk without log-probabilities."""
    for choice in choices:
        logprobs = choice.get("logprobs")
        entries = logprobs.get("content") if isinstance(logprobs, dict) else None
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            top = entries[0].get("top_logprobs")
            return len(top) if isinstance(top, list) else 0
    return None


def hide_logprobs(choices: list[Json]) -> bool:
    """Set `logprobs` of all choices to null in place, as OpenAI has it when nobody asked; say if any were there."""
    found = False
    for choice in choices:
        if choice.get("logprobs") is not None:
            choice["logprobs"] = None
            found = True
    return found


def without_logprobs(choices: list[Json]) -> list[Json]:
    """Return the choices with `logprobs` null where they had any; these are left as they are."""
    return [choice if choice.get("logprobs") is None else {**choice, "logprobs": None} for choice in choices]
