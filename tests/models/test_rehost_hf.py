from __future__ import annotations

import pytest
import torch
import transformers

from vitkit import rehost
from vitkit.errors import BadInput

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
MODELS = ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIPVision", "SiglipVision"]


def make(name, head="Model", **options):
    torch.manual_seed(0)
    settings = dict(SMALL, **options)
    if "Dinov2" in name:
        settings["mlp_ratio"] = 2
        settings.pop("intermediate_size")
    model = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**settings)).eval()
    for p in model.parameters():  # zero-initialised tokens and positions would hide mistakes
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_agree(name):
    model = make(name)
    vit = rehost(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model(images).last_hidden_state
        x, layout = vit.embed(images)
        x, _ = vit.run(x, layout)
        ours = x if name == "CLIPVision" else vit.norm(x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    shared = {p.data_ptr() for p in model.parameters()}
    assert vit.blocks[0].mlp.fc1.weight.data_ptr() in shared


def test_classifier_on_the_class_token_comes_along():
    model = make("ViT", "ForImageClassification", num_labels=5)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(rehost(model)(images), model(images).logits, atol=1e-4, rtol=1e-4)


def test_what_the_host_lacks_is_refused_by_name():
    with pytest.raises(BadInput, match="re-host the base model"):
        rehost(make("Dinov2", "ForImageClassification"))
    with pytest.raises(BadInput, match="weights_in|swiglu|mlp"):
        rehost(make("Dinov2", use_swiglu_ffn=True))
    with pytest.raises(BadInput, match="no place for"):
        rehost(transformers.BeitModel(transformers.BeitConfig(**SMALL)))


@pytest.mark.parametrize(
    "options",
    [
        {"num_register_tokens": 3},
        {"use_gated_mlp": True, "hidden_act": "silu", "image_size": [32, 48]},
        {"key_bias": True, "proj_bias": False, "mlp_bias": False, "value_bias": False, "hidden_act": "gelu_new"},
    ],
)
def test_dinov3_shares_every_tensor(options):
    model = make("DINOv3ViT", **options)
    vit = rehost(model)
    used = {id(p) for n, p in model.named_parameters() if "mask_token" not in n and p.numel()}
    assert {id(p) for p in vit.parameters()} == used
    for images in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 24, 40)):
        with torch.no_grad():
            torch.testing.assert_close(
                vit.forward_features(images), model(images).last_hidden_state, atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(vit(images), model(images).pooler_output, atol=1e-4, rtol=1e-4)


def test_dinov3_augments_its_positions_in_training_as_the_original():
    model = make("DINOv3ViT", pos_embed_shift=0.2, pos_embed_jitter=1.5).train()
    vit, images = rehost(model), torch.randn(2, 3, 32, 32)
    outputs = []
    for net in (model, vit.forward_features):
        torch.manual_seed(2)
        outputs.append(net(images))
    torch.testing.assert_close(outputs[1], outputs[0].last_hidden_state, atol=1e-4, rtol=1e-4)
    model.eval()
    assert (outputs[1] - vit.eval().forward_features(images)).abs().max() > 1e-3


def test_a_method_runs_on_it():
    from vitkit import swap

    vit = rehost(make("Dinov2WithRegisters"))
    swap(vit, "normalizer", "sinkhorn")
    assert torch.isfinite(vit.forward_features(torch.randn(1, 3, 32, 32))).all()
