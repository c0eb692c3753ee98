from __future__ import annotations

import pytest

from vitkit.deploy.server.limits import Refused
from vitkit.deploy.server.uploads import Held


def test_bytes_are_given_back_also_after_a_refusal():
    held = Held(10)
    with held.meter() as first:
        first.add(6)
        with pytest.raises(Refused) as refused, held.meter() as second:
            second.add(4)
            second.add(1)
        assert refused.value.status == 429 and held.now == 6
        with held.meter() as third:
            third.add(4)
    assert held.now == 0
