"""`[observe]`: access log and traces. Metrics are always there."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from serving.errors import ConfigError
from serving.section import Section

_OTLP_ENDPOINTS = {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"}


class ObserveSettings(Section):
    """What the gateway says of itself beside its metrics."""

    log_format: Literal["text", "json"] = "text"
    access_log_sample: float = Field(
        0.0, ge=0, le=1, description="share of requests that get a line in the log though nothing failed"
    )
    otel: bool | None = Field(
        None, description="whether to send traces; absent: if OTEL_EXPORTER_OTLP_ENDPOINT is set"
    )

    def traced(self) -> bool:
        """Say whether traces are wanted. OpenTelemetry's own switches go before ours.

        Raises ConfigError for a protocol that we don't speak.
        """
        environment = {name: value.strip().lower() for name, value in os.environ.items() if value.strip()}
        exporter = environment.get("OTEL_TRACES_EXPORTER", "otlp")
        if environment.get("OTEL_SDK_DISABLED") == "true" or exporter == "none" or self.otel is False:
            return False
        if self.otel is None and not _OTLP_ENDPOINTS & environment.keys():
            return False
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if environment.get(name, "http/protobuf") != "http/protobuf":
                raise ConfigError(
                    f"traces go out over http/protobuf only, and {name} says {environment[name]}: change it, or "
                    "set observe.otel = false"
                )
        return True
