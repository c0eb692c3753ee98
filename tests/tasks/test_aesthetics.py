from __future__ import annotations

import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr, spearmanr, wasserstein_distance

from vitkit.errors import BadInput
from vitkit.models.parts.tokenizers.charm import Charm
from vitkit.models.swap import swap
from vitkit.tasks.aesthetics import Aesthetics, RatingReadout, aesthetics, emd, rating_metrics
from vitkit.testing.worlds import tiny_vit


def test_mean_scores_are_learned_on_the_unit_interval():
    task = Aesthetics(low=1, high=10)
    outputs = torch.tensor([[0.0], [100.0]])
    assert task.num_outputs == 1
    assert task.predict(outputs).tolist() == pytest.approx([5.5, 10.0])
    loss = task.loss(outputs, {"labels": torch.tensor([1.0, 10.0])})
    assert loss.item() == pytest.approx(0.125)


def test_emd_with_power_one_is_the_wasserstein_distance():
    torch.manual_seed(0)
    p, q = torch.rand(4, 6).softmax(-1), (3 * torch.rand(4, 6)).softmax(-1)
    for row, (a, b) in zip(emd(p, q, power=1) * 6, zip(p, q)):
        expected = wasserstein_distance(range(6), range(6), a.numpy(), b.numpy())
        assert row.item() == pytest.approx(expected, rel=1e-4)


def test_emd_is_small_with_a_finite_slope_where_both_agree():
    outputs = torch.zeros(2, 5, requires_grad=True)
    loss = Aesthetics(1, 5, levels=5).loss(outputs, {"labels": torch.ones(2, 5)})
    loss.backward()
    assert loss.item() < 1e-5
    assert outputs.grad.isfinite().all()


def test_histograms_may_be_counts_and_give_mean_scores():
    task = Aesthetics(1, 3, levels=3)
    counts = torch.tensor([[0.0, 0.0, 4.0], [2.0, 0.0, 2.0], [6.0, 0.0, 0.0]])
    outputs = (counts / counts.sum(1, keepdim=True) + 1e-6).log()
    assert task.predict(outputs).tolist() == pytest.approx([3, 2, 1], abs=1e-3)
    found = task.score(outputs, counts)
    assert found["srcc"] == pytest.approx(1)
    assert found["emd"] == pytest.approx(0, abs=1e-3)


def test_metrics_agree_with_scipy():
    torch.manual_seed(1)
    a, b = torch.rand(50), torch.rand(50)
    found = rating_metrics(a, b, 0.5)
    assert found["plcc"] == pytest.approx(pearsonr(a, b)[0], abs=1e-6)
    assert found["srcc"] == pytest.approx(spearmanr(a, b)[0], abs=1e-6)
    assert found["accuracy"] == pytest.approx(float(((a >= 0.5) == (b >= 0.5)).double().mean()))
    assert found["mae"] == pytest.approx(float((a - b).abs().mean()), rel=1e-5)
    assert found["mse"] == pytest.approx(float((a - b).square().mean()), rel=1e-5)
    constant = rating_metrics(torch.ones(5), torch.rand(5), 0.5)
    assert constant["srcc"] != constant["srcc"]


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="one score"):
        Aesthetics().loss(torch.zeros(2, 1), {"labels": torch.zeros(3)})
    with pytest.raises(BadInput, match="ratings"):
        Aesthetics(1, 3, levels=3).loss(torch.zeros(1, 3), {"labels": torch.zeros(1, 3)})
    with pytest.raises(BadInput):
        Aesthetics(2, 2)


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_readout_ignores_padding(options):
    model = tiny_vit((20, 28), 2, 3, 1, embed_dim=16, depth=1, num_heads=2, **options)
    swap(model, "tokenizer", Charm, budget=24)
    swap(model, "readout", RatingReadout)
    model.eval()
    images = [torch.rand(3, 6, 8), torch.rand(3, 20, 28)]
    alone = torch.cat([model(image[None]) for image in images])
    assert alone.shape == (2, 1)
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)


def test_readout_of_a_host_with_registers_only_needs_to_be_told():
    host = {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False, "global_pool": "avg", "reg_tokens": 4}
    model = tiny_vit((20, 28), 2, 3, 1, **host)
    record = swap(model, "readout", RatingReadout)
    with pytest.raises(BadInput, match="class_token=False"):
        model(torch.rand(2, 3, 20, 28))
    record.undo()
    swap(model, "readout", RatingReadout, class_token=False)
    assert model(torch.rand(2, 3, 20, 28)).shape == (2, 1)


@pytest.fixture
def folder(tmp_path):
    for index, size in enumerate([(8, 6), (5, 9), (7, 7)]):
        Image.new("RGB", size, (index * 100, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def test_reads_scores_and_images_in_their_own_size(folder):
    (folder / "t.csv").write_text("ImageName;MOS\n0;2.5\n1.png;4\n9;1\n2;3\n")
    rated = aesthetics(folder / "t.csv", folder)
    assert len(rated) == 3
    assert rated.absent == ("9",)
    assert rated.scores.tolist() == [2.5, 4, 3]
    assert (rated.task.low, rated.task.high) == (2.5, 4)
    image, label = rated[1]
    assert image.shape == (3, 9, 5)
    assert image[0, 0, 0] == pytest.approx(100 / 255)
    assert label == 4
    assert len(list(rated)) == 3


def test_reads_histograms(folder):
    (folder / "t.csv").write_text("image,vote2,vote1,vote3,tag\n0,0,1,1,a\n1,2,0,0,b\n")
    rated = aesthetics(folder / "t.csv", folder)
    assert rated.histograms.tolist() == [[0.5, 0, 0.5], [0, 1, 0]]
    assert rated.scores.tolist() == [2, 2]
    assert rated.task.levels == 3
    named = aesthetics(folder / "t.csv", folder, score="vote2", low=0, high=2)
    assert named.histograms is None
    assert named.scores.tolist() == [0, 2]


def test_bad_tables_are_named(folder):
    table = folder / "t.csv"
    table.write_text("image,other\n0,1\n")
    with pytest.raises(BadInput, match="score="):
        aesthetics(table, folder)
    table.write_text("image,score\n0,x\n")
    with pytest.raises(BadInput, match="line 2: score is 'x'"):
        aesthetics(table, folder)
    table.write_text("image,score\n77,1\n")
    with pytest.raises(BadInput, match="None of the 1 images"):
        aesthetics(table, folder)
    table.write_text("image,score\n")
    with pytest.raises(BadInput, match="no rows"):
        aesthetics(table, folder)
