"""Variable tokens: the sum of kernels in another order, attention over variables, subsets."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.parts.tokenizers.variable_tokens import VariableTokens
from vitkit.models.swap import swap
from vitkit.testing import check_part
from vitkit.testing.worlds import tiny_vit


def make(chans: int = 4, seed: int = 0) -> VariableTokens:
    torch.manual_seed(seed)
    tokens = VariableTokens(16, 2, (2, 3), (6, 12), chans)
    torch.nn.init.normal_(tokens.query)
    torch.nn.init.normal_(tokens.variable_embed)
    return tokens


def test_conforms():
    assert "preserves" in check_part(VariableTokens).passed


def test_equals_a_loop_with_cross_attention():
    tokens = make()
    images = torch.randn(2, 4, 6, 12)
    found, layout = tokens(images)
    assert layout.grid == (3, 4)
    for b in range(2):
        for row in range(3):
            for col in range(4):
                embedded = torch.stack(
                    [
                        images[b, v, 2 * row : 2 * row + 2, 3 * col : 3 * col + 3].flatten() @ tokens.kernel[v]
                        + tokens.variable_embed[v]
                        for v in range(4)
                    ]
                )
                expected = tokens.attention(tokens.query, embedded[None])[0, 0]
                torch.testing.assert_close(found[b, row * 4 + col], expected, atol=1e-5, rtol=1e-5)


def test_a_subset_is_a_tokenizer_of_these_alone_and_their_order_is_free():
    tokens, alone = make(), make(2)
    images = torch.randn(2, 4, 6, 12)
    alone.load_state_dict(tokens.state_dict() | {k: getattr(tokens, k)[[3, 1]] for k in ("kernel", "variable_embed")})
    torch.testing.assert_close(tokens(images[:, [3, 1]], [3, 1])[0], alone(images[:, [3, 1]])[0])
    torch.testing.assert_close(tokens(images[:, [1, 3]], [1, 3])[0], alone(images[:, [3, 1]])[0])
    torch.testing.assert_close(tokens(images[:, [2, 0, 1, 3]], [2, 0, 1, 3])[0], tokens(images)[0])


def test_query_and_its_projection_learn_where_there_is_a_choice():
    model = tiny_vit(8, 4, in_chans=3)
    torch.nn.init.normal_(model.head.weight)
    swap(model, "tokenizer", VariableTokens)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 8, 8)) * torch.randn(2, 10)).sum().backward()
        optimizer.step()
    assert bool((model.patch_embed.query.grad != 0).any())
    assert bool((model.patch_embed.attention.q.weight.grad != 0).any())


def test_refusals():
    tokens = make()
    with pytest.raises(BadInput, match="3 channels, but 4 variables"):
        tokens(torch.zeros(1, 3, 6, 12))
    with pytest.raises(BadInput, match="6×12"):
        tokens(torch.zeros(1, 4, 7, 12))
    model = tiny_vit(8, 4, in_chans=3)
    swap(model, "tokenizer", "conv-stem")
    with pytest.raises(BadInput, match="put variable-tokens in first"):
        swap(model, "tokenizer", VariableTokens)
