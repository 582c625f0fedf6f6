"""schemathesis against the running gateway: what the schema allows is served, what it forbids is refused as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import CheckFunction, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection

Start = Callable[..., Any]
SCHEMA = schemathesis.openapi.from_path(Path(__file__).with_name("openapi.yaml"))
CHAT = ("/v1/chat/completions", "POST")


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        (CHAT, GenerationMode.POSITIVE),
        (CHAT, GenerationMode.NEGATIVE),
        (("/v1/embeddings", "POST"), GenerationMode.POSITIVE),
        (("/v1/models/{model}", "GET"), GenerationMode.POSITIVE),
    ],
)
def test_the_gateway_keeps_to_its_schema(
    operation: tuple[str, str], mode: GenerationMode, stand_in: Start, gateway: Start
) -> None:
    running = gateway(stand_in({}, default="x").url, log={"durability": "relaxed"})
    path, method = operation
    statuses: Counter[int] = Counter()
    # What the gateway doesn't read goes on as it is: whether it is wrong is the teacher's to say.
    unjudged: list[CheckFunction] = [negative_data_rejection] if mode is GenerationMode.NEGATIVE else []
    with requests.Session() as session:

        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def holds(data: st.DataObject) -> None:
            case = data.draw(SCHEMA[path][method].as_strategy(generation_mode=mode))
            response = case.call(base_url=running.url, session=session, timeout=5)
            statuses[response.status_code] += 1
            assert response.status_code < 500
            case.validate_response(response, excluded_checks=unjudged)

        holds()
    if operation == CHAT:
        # Of what is wrong somewhere, chance may leave nothing that can be answered all the same.
        assert statuses[200 if mode is GenerationMode.POSITIVE else 400] > 0
