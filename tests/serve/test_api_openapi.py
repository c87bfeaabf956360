from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running import Running

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


@pytest.fixture(scope="module")
def document(server: Running) -> dict:
    with server.http() as http:
        return http.get("/openapi.json").json()


def test_every_path_is_described(document: dict) -> None:
    assert set(document["paths"]) == {
        *GENERATING,
        *(
            "/tokenize",
            "/detokenize",
            "/v1/models",
            "/v1/models/{model_id}",
            "/health",
            "/version",
            "/metrics",
        ),
    }


@pytest.mark.parametrize("path", GENERATING)
def test_generating_paths_declare_streams_and_every_status_they_use(document: dict, path: str) -> None:
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "500", "503"}
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    for status in set(responses) - {"200"}:
        schema = responses[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_bounds_and_served_names_are_part_of_the_schema(document: dict) -> None:
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    number = next(option for option in fields["temperature"]["anyOf"] if option["type"] == "number")
    assert (number["minimum"], number["maximum"]) == (0, 2)
    assert fields["model"]["anyOf"] == [{"type": "string", "enum": ["fake", "other/name"]}, {"type": "null"}]
    assert "model" not in document["components"]["schemas"]["CompletionBody"]["required"]


def test_nothing_refers_to_a_schema_that_is_missing(document: dict) -> None:

    used = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert used <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in used
