"""torch.fx traces these networks to the grain of their stages, with what timm's tests hand to its tracer."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torchvision.models.feature_extraction import get_graph_node_names

from vitkit.errors import BadInput
from vitkit.models import backbones

backbones.register()

#: name, and its error for images that do not fit (None: every size does)
TRACED = {
    "clustervig_femto": None,
    "dcformer_femto": None,
    "ecvit_femto": "built for images of 32×32",
    "hgformer_femto": None,
    "hsvt_femto": None,
    "iianet_femto": None,
    "lvit_femto": "built for images of 32×32",
    "mamba_unet_femto": "do not divide into patches",
    "vmamba_femto": "do not divide into patches",
}


def traced(name, train=False):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5).train(train)
    torch.nn.init.normal_(net.get_classifier().weight if hasattr(net.get_classifier(), "weight") else net.head.z)
    return net, create_feature_extractor(net, [_nodes(net)[train][-1]])


def _nodes(net):
    leaves = {
        "leaf_modules": timm.models.get_notrace_modules(),
        "autowrap_functions": timm.models.get_notrace_functions(),
    }
    training, evaluation = get_graph_node_names(net, tracer_kwargs=leaves, suppress_diff_warning=True)
    return evaluation, training


@pytest.mark.parametrize("name", TRACED)
def test_the_graph_answers_as_the_network(name):
    net, graph = traced(name)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = net(images)
        (found,) = graph(images).values()
    assert wanted.abs().max() > 0
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", TRACED)
def test_gradients_pass_through_the_graph(name):
    net, graph = traced(name, train=True)
    images = torch.randn(2, 3, 32, 32)
    (found,) = graph(images).values()
    found.square().sum().backward()
    missing = [n for n, p in net.named_parameters() if p.grad is None]
    assert not missing


@pytest.mark.parametrize("name", TRACED)
def test_the_graph_takes_other_sizes_or_says_why_not(name):
    net, graph = traced(name)
    images = torch.randn(1, 3, 41, 45)
    if TRACED[name] is None:
        with torch.no_grad():
            assert torch.equal(*graph(images).values(), net(images))
        return
    for model in (net, graph):
        with pytest.raises(BadInput, match=TRACED[name]):
            model(images)


def test_the_nodes_are_the_stem_and_whole_stages():
    net, _ = traced("vmamba_femto")
    nodes = _nodes(net)[0]
    assert [n for n in nodes if n.startswith("stages")] == ["stages.0", "stages.1", "stages.2"]
    maps = create_feature_extractor(net, {"stages.1": "found"})(torch.randn(1, 3, 32, 32))
    assert maps["found"].map.shape == (1, 96, 4, 4)
