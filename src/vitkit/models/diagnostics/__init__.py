"""Measurements of what a part does, apart from accuracy."""

from vitkit.models.diagnostics.dsm import (
    DSMError,
    attention_entropy,
    birkhoff_distance,
    dsm_error,
    expressivity,
    project_to_birkhoff,
)

__all__ = [
    "DSMError",
    "attention_entropy",
    "birkhoff_distance",
    "dsm_error",
    "expressivity",
    "project_to_birkhoff",
]
