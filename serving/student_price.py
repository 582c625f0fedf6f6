"""What a student's answer cost: the time that what it runs on was at it, or the tokens that a provider bills."""

from __future__ import annotations

from serving.exchange import StudentAnswer
from serving.pricing import PriceList
from serving.student_choice import StudentChoice
from serving.student_settings import StudentSettings


class StudentPrices:
    """Prices of students in USD, as the configuration says today: a release keeps none."""

    def __init__(self, settings: StudentSettings) -> None:
        self._core_usd_per_hour = settings.usd_per_hour
        vllm = settings.vllm.usd_per_hour if settings.vllm is not None else None
        self._vllm_usd_per_hour = settings.usd_per_hour if vllm is None else vllm

    def usd(self, answer: StudentAnswer, kind: str, choice: StudentChoice) -> float:
        """USD of one answer by a student of `kind`, of a task that is configured to have `choice`.

        What `choice` says of prices is about its own kind: until the next release another may answer.
        """
        if choice.kind == kind and choice.price is not None:
            if not answer.choices:
                return 0.0  # refused, mostly; what was cut off before its first token is let go with it
            usd, _ = PriceList(choice.price).cost(answer.model, answer.billed or answer.usage)
            return usd or 0.0
        return answer.took_s * self.usd_per_hour(kind, choice) / 3600

    def usd_per_hour(self, kind: str, choice: StudentChoice) -> float:
        """Price of what such a student runs on."""
        if choice.kind != kind:
            return self._core_usd_per_hour
        if choice.usd_per_hour is not None:
            return choice.usd_per_hour
        on_vllm = choice.served and choice.base_url is None
        return self._vllm_usd_per_hour if on_vllm else self._core_usd_per_hour
