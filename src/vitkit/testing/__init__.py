"""Public conformance checks and small seeded worlds."""

from vitkit.testing.checks import (
    PLACES,
    Conformance,
    NotConforming,
    Place,
    check_backbone,
    check_objective,
    check_part,
    check_probe,
    check_transform,
)

__all__ = [
    "PLACES",
    "Conformance",
    "NotConforming",
    "Place",
    "check_backbone",
    "check_objective",
    "check_part",
    "check_probe",
    "check_transform",
]
