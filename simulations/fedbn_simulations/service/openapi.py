"""OpenAPI schema of the routes that FastAPI does not handle."""

from __future__ import annotations

from typing import Any

from fedbn_simulations.service.schema import BINARY

JSON_WINDOWS = {"application/json": {"schema": {"$ref": "#/components/schemas/Windows"}}}
RAW_WINDOWS = {
    BINARY: {"schema": {"type": "string", "format": "binary", "description": "windows as float32 little-endian"}}
}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


STRING, INTEGER, BOOLEAN, NUMBER = ({"type": name} for name in ("string", "integer", "boolean", "number"))
SCHEMAS: dict[str, Any] = {
    "Windows": _object(windows=_array({}) | {"description": "windows, each of the model's shape"})
    | {"required": ["windows"]},
    "Answers": _object(
        user=STRING,
        answers=_array(
            _object(
                **{"class": INTEGER, "name": STRING, "probabilities": _array(NUMBER)},
                outputs=_array({}) | {"description": "instead, if the task has no classes: values, or probabilities"},
            )
        ),
        drift=_object(distance=NUMBER | {"nullable": True}, alarm=BOOLEAN, alarms=INTEGER),
        advice=_object(
            action=STRING | {"enum": ["none", "check", "calibrate", "recalibrate"]}, classes=_array(STRING), text=STRING
        ),
        held=_array(STRING),
        alignment=_object(
            alignment=STRING,
            learned=NUMBER,
            unusable=NUMBER,
            evidence=NUMBER,
            certainty=NUMBER | {"description": "probability that the windows are aligned ones of the seen users"},
            degrees=NUMBER | {"description": "of a rotation"},
            axis=_array(NUMBER),
            used=BOOLEAN | {"description": "false if the source model answered (fallback)"},
        )
        | {"description": "only if the rule has an alignment"},
    ),
}


def add_window_routes(schema: dict[str, Any]) -> dict[str, Any]:
    """Add the routes ``observe`` and ``predict`` to FastAPI's schema."""
    schema["paths"] |= {f"/v1/users/{{user}}/{name}": {"post": _operation(name)} for name in ("observe", "predict")}
    schema.setdefault("components", {}).setdefault("schemas", {}).update(SCHEMAS)
    return schema


def _operation(name: str) -> dict[str, Any]:
    summary = {
        "observe": "Predict windows, then update the user's statistics.",
        "predict": "Predict windows without learning; with hold=true they are stored until labels arrive (commit).",
    }[name]
    parameters: list[dict[str, Any]] = [{"name": "user", "in": "path", "required": True, "schema": {"type": "string"}}]
    if name == "predict":
        parameters.append({"name": "hold", "in": "query", "schema": {"type": "boolean", "default": False}})
    answers = {"application/json": {"schema": {"$ref": "#/components/schemas/Answers"}}, **RAW_WINDOWS}
    return {
        "summary": summary,
        "operationId": name,
        "tags": ["windows"],
        "parameters": parameters,
        "requestBody": {"required": True, "content": JSON_WINDOWS | RAW_WINDOWS},
        "responses": {"200": {"description": "JSON, or with Accept: " + BINARY + " predictions", "content": answers}},
    }
