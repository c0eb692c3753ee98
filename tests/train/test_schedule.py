from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.train.schedule import lr_scale


@given(total=st.integers(3, 500), share=st.floats(0, 0.9), ratio=st.floats(0, 1))
def test_rises_to_one_then_falls_to_the_floor(total, share, ratio):
    warmup = int(share * (total - 2))
    curve = [lr_scale(t, total, warmup, ratio) for t in range(total)]
    assert max(curve) == pytest.approx(1.0)
    assert curve[-1] == pytest.approx(ratio)
    assert all(a < b for a, b in pairwise(curve[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(curve[warmup:]))


def test_a_run_that_is_all_warm_up_never_divides_by_zero():
    assert [lr_scale(t, 2, 2, 0.1) for t in range(2)] == [0.5, 1.0]
    assert lr_scale(0, 1, 0, 0.1) == 1.0
