from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from vitkit.deploy.chart import draw
from vitkit.deploy.faithful import Fidelity
from vitkit.deploy.tuner import Row


def row(engine, speed, drop, status="ok", pareto=False):
    fidelity = Fidelity(
        drop=drop, low=drop - 1, high=drop + 1, agreement=0.9, max_logit_diff=0.1, divergence=0.1,
        calibration_change=None, quality=None, labelled=True, images=50,
    )  # fmt: skip
    return Row(engine, "f32", status=status, images_per_s=speed, fidelity=fidelity, pareto=pareto)


def test_every_measured_row_has_its_line():
    rows = [
        row("one", 10, 0.1, pareto=True),
        row("two", 20, 3.0, "too much lost"),
        Row("three", "f32", status="failed"),
    ]
    text = draw(rows, rows[0], 1.0)
    ET.fromstring(text)
    # matplotlib notes each text in a comment beside its outlines
    said = re.findall(r"<!-- (.*?) -->", text)
    assert "one f32 ★" in said and "two f32" in said and "three f32" not in said
    assert said.index("two f32") > said.index("one f32 ★")


def test_nothing_measured_is_an_empty_chart():
    failed = Row("one", "f32", status="failed")
    ET.fromstring(draw([failed], failed, 1.0))
