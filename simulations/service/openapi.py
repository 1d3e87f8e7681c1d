"""What the schema says of the routes that do not go through FastAPI."""

from __future__ import annotations

from typing import Any

from simulations.service.schema import BINARY

HEAR = {"application/json": {"schema": {"$ref": "#/components/schemas/Windows"}}}
RAW = {BINARY: {"schema": {"type": "string", "format": "binary", "description": "windows as float32 little-endian"}}}
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


def with_windows(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's schema, with the routes of windows in it."""
    schema["paths"] |= {f"/v1/users/{{user}}/{name}": {"post": _described(name)} for name in ("observe", "predict")}
    schema.setdefault("components", {}).setdefault("schemas", {}).update(SCHEMAS)
    return schema


def _described(name: str) -> dict[str, Any]:
    what = {
        "observe": "Answer windows, then let the user's statistics follow them.",
        "predict": "Answer windows and learn nothing; with hold=true they wait for labels (commit).",
    }[name]
    parameters: list[dict[str, Any]] = [{"name": "user", "in": "path", "required": True, "schema": {"type": "string"}}]
    if name == "predict":
        parameters.append({"name": "hold", "in": "query", "schema": {"type": "boolean", "default": False}})
    answers = {"application/json": {"schema": {"$ref": "#/components/schemas/Answers"}}, **RAW}
    return {
        "summary": what,
        "operationId": name,
        "tags": ["windows"],
        "parameters": parameters,
        "requestBody": {"required": True, "content": HEAR | RAW},
        "responses": {"200": {"description": "JSON, or with Accept: " + BINARY + " probabilities", "content": answers}},
    }
