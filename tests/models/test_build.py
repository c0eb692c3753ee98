"""Names and sizes a model can be built from, and what is said of others."""

import pytest

from vitkit.errors import BadInput
from vitkit.models.build import build


def test_sizes_that_do_not_fit_are_named_with_ones_that_do():
    with pytest.raises(BadInput, match="30×30 of 'vit_pico' is not a whole number of 4×4 patches; use 28×28 or 32×32"):
        build("vit_pico", img_size=30, patch_size=4)
    build("vit_pico", img_size=30, patch_size=4, dynamic_img_pad=True)
    with pytest.raises(BadInput, match="num_heads=5 must divide embed_dim=96.*6, 8"):
        build("vit_pico", img_size=28, embed_dim=96, num_heads=5)
    with pytest.raises(BadInput, match="num_heads=5"):
        build("vit_pico", img_size=28, num_heads=5)
