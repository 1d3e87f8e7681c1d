"""OpenAPI schema of the routes that FastAPI does not handle."""

from __future__ import annotations

from typing import Any

from simulations.service.schema import BINARY

JSON_WINDOWS = {"application/json": {"schema": {"$ref": "#/components/schemas/Windows"}}}
RAW_WINDOWS = {
    BINARY: {"schema": {"type": "string", "format": "binary", "description": "windows as float32 little-endian"}}
}
SCHEMAS = {
    "Windows": {
        "type": "object",
        "required": ["windows"],
        "properties": {"windows": {"type": "array", "items": {}, "description": "windows, each of the model's shape"}},
    },
    "Answers": {
        "type": "object",
        "properties": {
            "user": {"type": "string"},
            "answers": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "class": {"type": "integer"},
                        "name": {"type": "string"},
                        "probabilities": {"type": "array", "items": {"type": "number"}},
                    },
                },
            },
            "drift": {
                "type": "object",
                "properties": {
                    "distance": {"type": "number", "nullable": True},
                    "alarm": {"type": "boolean"},
                    "alarms": {"type": "integer"},
                },
            },
            "advice": {
                "type": "object",
                "properties": {
                    "action": {"type": "string", "enum": ["none", "calibrate", "recalibrate"]},
                    "classes": {"type": "array", "items": {"type": "string"}},
                    "text": {"type": "string"},
                },
            },
            "held": {"type": "array", "items": {"type": "string"}},
        },
    },
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
        "responses": {"200": {"description": "JSON, or with Accept: " + BINARY + " probabilities", "content": answers}},
    }
