"""Strictly above the threshold leaves; 1.0 is the whole network; block by block gives the same."""

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.labels import known_labels
from vitkit.models.parts.readouts.early_exit import EarlyExit, exit_early
from vitkit.models.vit import collect_aux

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def _vit(**options):
    torch.manual_seed(0)
    vit = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3, readout=("early-exit", options)).eval()
    for head in vit.read_out.heads:
        torch.nn.init.normal_(head.weight, std=0.3)
    return vit


def _states(vit):
    states = []
    vit.run(*vit.embed(IMAGES), states)
    return states


def test_threshold_1_is_the_last_exit():
    vit = _vit(threshold=1.0)
    with torch.no_grad():
        torch.testing.assert_close(vit(IMAGES), vit.read_out.exits(_states(vit))[-1])


@torch.no_grad()
def test_the_first_that_is_surer_than_the_threshold_answers():
    vit = _vit(head_at=[1, 3])
    assert vit.read_out.blocks == (1, 3, 4)
    exits = torch.stack(vit.read_out.exits(_states(vit)))
    confidence = exits.softmax(-1).amax(-1)
    vit.read_out.threshold = float(confidence[0].median())
    wanted = []
    for i in range(len(IMAGES)):
        number = next((e for e in range(2) if confidence[e, i] > vit.read_out.threshold), 2)
        wanted.append(exits[number, i])
    torch.testing.assert_close(vit(IMAGES), torch.stack(wanted))
    # equality is not enough
    assert int(vit.read_out.first_sure(exits)[confidence[0].argsort()[2]]) != 0
    logits, blocks = exit_early(vit, IMAGES)
    torch.testing.assert_close(logits, vit(IMAGES), atol=1e-5, rtol=1e-4)
    assert set(blocks.tolist()) <= {1, 3, 4} and 1 in blocks and len(set(blocks.tolist())) > 1


def test_early_exits_learn_from_the_last():
    vit = _vit().train()
    with collect_aux(vit) as aux:
        logits = vit(IMAGES)
    assert len(aux) == 2
    exits = vit.read_out.exits(_states(vit))
    torch.testing.assert_close(logits, exits[-1])
    block = vit.read_out.blocks[0] - 1
    wanted = torch.nn.functional.kl_div(
        exits[0].log_softmax(-1), exits[-1].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(aux["early-exit", block], wanted)
    aux["early-exit", block].backward()
    assert vit.read_out.heads[-1].weight.grad.abs().sum() == 0 and vit.read_out.heads[0].weight.grad.abs().sum() > 0


def test_early_exits_learn_from_the_labels_where_they_are_known():
    vit = _vit().train()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    with collect_aux(vit) as aux, known_labels(vit, labels):
        vit(IMAGES)
    exits = vit.read_out.exits(_states(vit))
    for number, block in enumerate(vit.read_out.blocks[:-1]):
        wanted = torch.nn.functional.cross_entropy(exits[number], labels)
        torch.testing.assert_close(aux["early-exit", block - 1], wanted)


def test_errors():
    for options, text in (
        ({"head_at": 4}, "before the last of 4"),
        ({"head_at": [0, 2]}, "blocks from 1 to 4"),
        ({"threshold": 0.0}, "above 0"),
    ):
        with pytest.raises(BadInput, match=text):
            EarlyExit(8, 3, 4, **options)
    with pytest.raises(BadInput, match="needs the read-out early-exit"):
        exit_early(vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3), IMAGES)
