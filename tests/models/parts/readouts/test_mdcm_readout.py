from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.parts.readouts.mdcm import MDCMReadout, chosen_depths
from vitkit.models.vit import collect_aux
from vitkit.tasks import Classify, Regress
from vitkit.testing.checks import check_part
from vitkit.testing.worlds import tiny_vit
from vitkit.train import Supervised


def make(**options):
    made = tiny_vit(28, 4, 1, readout=("mdcm", options), reg_tokens=2, weight_init="jax")
    return made.eval()


def images(batch=3):
    return torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_reads_the_patches_of_the_chosen_blocks():
    vit = make(stages=[0, 2], keep=0.5)
    states = []
    x, layout = vit.embed(images())
    vit.run(x, layout, states)
    found = vit.read_out.cue_head([states[d][0][:, 3:] for d in (0, 2)], [(7, 7), (7, 7)])
    torch.testing.assert_close(vit(images()), found)
    # class token and registers are not read
    changed = [(torch.cat([torch.randn_like(s[:, :3]), s[:, 3:]], 1), at) for s, at in states]
    assert torch.equal(vit.read_out(states, layout), vit.read_out(changed, layout))


def test_losses_reach_the_training_and_the_stages_learn_from_labels():
    vit = make().train()
    with collect_aux(vit) as aux:
        vit(images())
    assert set(aux) == {("mdcm_diversity", 0), ("mdcm_background", 0)}
    with collect_aux(vit) as aux:
        vit(images(), target=torch.tensor([0, 1, 2]))
    assert ("mdcm_stages", 0) in aux
    objective = Supervised(vit, Classify([str(i) for i in range(10)]))
    batch = {"images": images(), "labels": torch.tensor([0, 1, 2])}
    torch.manual_seed(0)
    out = objective(batch)
    torch.testing.assert_close(out["logs"]["aux_loss"], sum(v.detach() for v in aux.values()))
    assert vit.read_out.cue_head.labels is None


def test_numbers_to_predict_are_no_classes():
    vit = make().train()
    out = Supervised(vit, Regress(10))({"images": images(), "labels": torch.rand(3, 10)})
    with collect_aux(vit) as aux:
        vit(images())
    torch.testing.assert_close(out["logs"]["aux_loss"], sum(v.detach() for v in aux.values()))


def test_merged_tokens_are_refused_and_grids_may_change():
    vit = vitkit.build("vit_femto", img_size=28, in_chans=1, num_classes=5, readout="mdcm", dynamic_img_size=True)
    assert vit.eval()(torch.rand(2, 1, 20, 36)).shape == (2, 5)
    from vitkit.compress.merge.tome import tome

    merged, _ = tome(vit, r=2)
    with pytest.raises(ValueError, match="MDCM needs every cell"):
        merged(torch.rand(2, 1, 28, 28))


def test_which_blocks():
    assert chosen_depths(3, 4) == (0, 1, 3)
    assert chosen_depths(3, 2) == (0, 1)
    assert chosen_depths(1, 12) == (11,)
    for wrong in (0, [4], [1, 1], []):
        with pytest.raises(BadInput, match="stages="):
            chosen_depths(wrong, 4)
    vit = make(stages=[3])
    vit.blocks = vit.blocks[:3]
    with pytest.raises(BadInput, match="reads the blocks"):
        vit(images())


def test_options_conform():
    report = check_part(MDCMReadout, stages=1, keep=1.0, score="entropy", dynamo=False)
    assert "gradients" in report.passed
