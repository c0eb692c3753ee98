from __future__ import annotations

import time

import numpy as np
import pytest

from vitkit.deploy.measure import take_turns


class Sleeper:
    def __init__(self, seconds, log, name):
        self.seconds, self.log, self.name = seconds, log, name

    def run(self, images):
        self.log.append((self.name, len(images)))
        time.sleep(self.seconds)
        return images

    def describe(self):
        return {}


def test_engines_take_turns_and_ratios_are_images_a_second():
    log: list = []
    calls = {
        "a": (Sleeper(0.02, log, "a"), np.zeros((2, 1))),
        "b": (Sleeper(0.02, log, "b"), np.zeros((8, 1))),
    }
    found = take_turns(calls, rounds=5, warmup=1)
    assert [name for name, _ in log] == ["a", "b"] * 6
    assert found["a"].ratio == 1 and found["b"].ratio == pytest.approx(4, rel=0.5)
    assert found["a"].rounds == 5 and found["b"].p95 >= found["b"].ms > 19


def test_time_limits_the_rounds_but_three_are_made():
    log: list = []
    assert take_turns({"a": (Sleeper(0.01, log, "a"), np.zeros((1, 1)))}, rounds=100, seconds=0)["a"].rounds == 3
