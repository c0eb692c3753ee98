from __future__ import annotations

import pytest

from vitkit.evidence import loope


def test_runs_at_toy_size_and_reports_every_arm(monkeypatch):
    monkeypatch.setattr(loope, "NUM_TRAIN", 60)
    monkeypatch.setattr(loope, "NUM_TEST", 30)
    monkeypatch.setattr(loope, "EPOCHS", 1)
    seen = []
    found = loope.run(seeds=(0, 1), progress=lambda what, done, total: seen.append((done, total)))
    assert [row["encoding"] for row in found.rows[1:]] == list(loope.ARMS)
    assert seen == [(i, 10) for i in range(10)]
    by_name = {row["encoding"]: row for row in found.rows}
    assert by_name["no positions"]["M_U"] is None
    assert by_name["LOOPE"]["M_U"] == by_name["sinusoid, Gilbert order"]["M_U"]


@pytest.mark.parametrize(
    "over_none, over_learned, shown",
    [
        ((0.2, 0.1, 0.3), (0.05, 0.01, 0.1), True),
        ((0.2, 0.1, 0.3), (0.05, -0.01, 0.1), None),
        ((0.2, 0.1, 0.3), (-0.05, -0.1, 0.1), False),
        ((-0.2, -0.3, 0.1), (0.05, 0.01, 0.1), False),
        # too uncertain is not contradicted
        ((0.2, -0.1, 0.3), (0.05, 0.01, 0.1), None),
    ],
)
def test_the_verdict_needs_both_halves_of_the_claim(over_none, over_learned, shown):
    assert loope._verdict([over_none, (0.3, 0.2, 0.4)], over_learned) is shown
