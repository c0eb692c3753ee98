from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.tasks import Classify, Regress
from vitkit.train import Supervised


class _Net(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(4, outputs)

    def forward(self, images):
        return self.fc(images.flatten(1))


def _batch(n: int = 6):
    return {"images": torch.rand(n, 1, 2, 2), "labels": torch.arange(n) % 3}


def test_loss_output_and_logs():
    objective = Supervised(_Net(), Classify("abc"))
    out = objective(_batch())
    assert out["loss"].ndim == 0 and out["output"].shape == (6, 3)
    torch.testing.assert_close(out["logs"]["task_loss"], out["loss"].detach())


def test_auxiliary_losses_are_added():
    net = _Net()
    batch = _batch()
    plain = Supervised(net, Classify("abc"))(batch)["loss"]
    extra = Supervised(net, Classify("abc"), aux_loss_fn=lambda m: m.fc.weight.square().sum())(batch)
    torch.testing.assert_close(extra["loss"], plain + net.fc.weight.square().sum())
    assert float(extra["logs"]["aux_loss"]) > 0


def test_parts_of_the_host_add_theirs():
    from vitkit.testing.worlds import tiny_vit

    class Penalised(nn.Module):
        takes_layout = True

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, layout):
            layout.aux["penalty", 0] = torch.tensor(2.0)
            return self.inner(x, layout)

    model = tiny_vit(8, 2, 1, 3, depth=1)
    batch = {"images": torch.rand(4, 1, 8, 8), "labels": torch.arange(4) % 3}
    plain = Supervised(model, Classify("abc"))(batch)["loss"]
    model.blocks[0].mlp = Penalised(model.blocks[0].mlp)
    torch.testing.assert_close(Supervised(model, Classify("abc"))(batch)["loss"], plain + 2.0)


def test_loss_is_float32_under_autocast():
    objective = Supervised(_Net(), Classify("abc"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = objective(_batch())
    assert out["output"].dtype == torch.bfloat16 and out["loss"].dtype == torch.float32


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (5, 1)])
def test_evaluate_does_not_depend_on_the_batches(sizes):
    objective = Supervised(_Net(), Classify("abc")).train()
    whole = _batch()
    parts, start = [], 0
    for n in sizes:
        parts.append({k: v[start : start + n] for k, v in whole.items()})
        start += n
    scores, expected = objective.evaluate(parts), objective.evaluate([whole])
    assert scores == pytest.approx(expected)
    assert objective.training


def test_regression_evaluates_r2():
    objective = Supervised(_Net(2), Regress(2))
    batch = {"images": torch.rand(6, 1, 2, 2), "labels": torch.rand(6, 2)}
    assert {"loss", "r2", "mae", "rmse"} <= set(objective.evaluate([batch]))


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        Supervised(_Net(), Classify("abc")).evaluate([])


def test_batch_weight_is_the_tasks_or_the_number_of_images():
    class Plain:
        def loss(self, outputs, batch):
            return outputs.mean()

    batch = {"images": torch.rand(3, 1, 2, 2), "labels": torch.tensor([0, 1, 1]), "weights": torch.tensor([1, 0.5, 2])}
    assert Supervised(nn.Linear(1, 1), Classify("ab")).batch_weight(batch) == 3.5
    assert Supervised(nn.Linear(1, 1), Plain()).batch_weight(batch) == 3
