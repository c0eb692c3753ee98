"""The quantum circuit normalizer against dense Kronecker gates and against what unitarity promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from vitkit.errors import BadInput
from vitkit.models.diagnostics import dsm_error
from vitkit.models.parts.normalizers.qontot import QontOT, circuit_unitary
from vitkit.models.parts.tokenizers.row_stripes import RowStripes
from vitkit.models.spec import NeedsFixedGrid
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


def dense_gate(gate: Tensor, qubit: int, qubits: int) -> Tensor:
    out = torch.eye(1, dtype=torch.complex128)
    for q in range(qubits):
        out = torch.kron(out, gate if q == qubit else torch.eye(2, dtype=torch.complex128))
    return out


def dense_cnot(control: int, target: int, qubits: int) -> Tensor:
    out = torch.zeros(2**qubits, 2**qubits, dtype=torch.complex128)
    for state in range(2**qubits):
        bits = [state >> (qubits - 1 - q) & 1 for q in range(qubits)]
        if bits[control]:
            bits[target] ^= 1
        out[sum(bit << (qubits - 1 - q) for q, bit in enumerate(bits)), state] = 1
    return out


def dense_circuit(theta: Tensor, scores: Tensor) -> Tensor:
    """One matrix, one gate after another, straight from the definition."""
    layers, qubits, _ = theta.shape
    values = scores.flatten()
    unitary = torch.eye(2**qubits, dtype=torch.complex128)
    for layer in range(layers):
        for q in range(qubits):
            g = (layer * qubits + q) * 2
            y = theta[layer, q, 0] * values[g % len(values)] / 2
            z = theta[layer, q, 1] * values[(g + 1) % len(values)] / 2
            ry = torch.tensor([[y.cos(), -y.sin()], [y.sin(), y.cos()]], dtype=torch.complex128)
            rz = torch.diag(torch.exp(torch.stack([-z, z]) * 1j))
            unitary = dense_gate(rz, q, qubits) @ dense_gate(ry, q, qubits) @ unitary
        for control in range(layer % 2, qubits - 1, 2):
            unitary = dense_cnot(control, control + 1, qubits) @ unitary
    return unitary


def dense_weights(theta: Tensor, scores: Tensor, num_tokens: int, ancillas: int) -> Tensor:
    power = dense_circuit(theta, scores).abs().square()
    size = 2**ancillas
    out = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    for i in range(num_tokens):
        for j in range(num_tokens):
            out[i, j] = power[i * size : (i + 1) * size, j * size : (j + 1) * size].sum() / size
    return out


@pytest.mark.parametrize(("num_tokens", "ancillas"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)])
def test_equals_dense_kronecker_gates(num_tokens: int, ancillas: int) -> None:
    torch.manual_seed(0)
    part = QontOT(num_tokens, ancillas, layers=13, gain=1.0) if num_tokens < 8 else QontOT(8, ancillas, gain=1.0)
    scores = torch.randn(1, 2, num_tokens, num_tokens, dtype=torch.float64)
    weights = part(scores)
    for head in range(2):
        expected = dense_weights(part.theta.double(), scores[0, head], num_tokens, ancillas)
        torch.testing.assert_close(weights[0, head], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("num_tokens", "ancillas"), [(2, 0), (8, 1), (16, 1), (8, 4)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_is_doubly_stochastic(num_tokens: int, ancillas: int, spread: float) -> None:
    scores = spread * torch.randn(2, 2, num_tokens, num_tokens, dtype=torch.float64)
    weights = QontOT(num_tokens, ancillas, gain=1.0)(scores)
    error = dsm_error(weights)
    assert error.rows.max() < 1e-6 and error.columns.max() < 1e-6 and weights.min() >= 0


@pytest.mark.parametrize("qubits", [1, 2, 3, 5, 8])
def test_is_unitary(qubits: int) -> None:
    unitary = circuit_unitary(torch.randn(3, 7, qubits, 2, dtype=torch.float64))
    eye = torch.eye(2**qubits, dtype=torch.complex128).expand_as(unitary)
    torch.testing.assert_close(unitary @ unitary.mH, eye, rtol=0, atol=1e-10)


def test_zero_scores_give_a_fixed_permutation() -> None:
    part = QontOT(8, ancillas=0)
    first = part(torch.zeros(2, 2, 8, 8))
    assert part.gain == 0  # a dry run on zeros must not choose the gain
    torch.testing.assert_close(first, first[:1, :1].expand(2, 2, 8, 8))
    assert set(first[0, 0].round(decimals=5).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(QontOT(8, ancillas=0, seed=5)(torch.zeros(1, 1, 8, 8)), first[:1, :1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ancillas", [0, 1])
def test_gradient(recompute: bool, ancillas: int) -> None:
    torch.manual_seed(0)
    part = QontOT(4, ancillas, layers=6, gain=0.5, recompute=recompute)
    scores = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(part, scores)


def test_recomputation_changes_nothing() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for recompute in (True, False):
        part = QontOT(8, mode="differentiable", gain=0.3, recompute=recompute)
        part(scores).square().sum().backward()
        grads.append((scores.grad.clone(), part.theta.grad.clone()))
        scores.grad = None
    torch.testing.assert_close(grads[0], grads[1])


def test_every_score_matters() -> None:
    part = QontOT(4, ancillas=1, gain=1.0)
    scores = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (part(scores) * torch.randn(4, 4, dtype=torch.float64)).sum().backward()
    assert (scores.grad != 0).all()


def test_too_few_layers_say_how_many_would_do() -> None:
    with pytest.raises(BadInput, match="layers=8 or more"):
        QontOT(8, ancillas=1, layers=7)
    assert QontOT(8, ancillas=1, layers=8).layers == 8
    assert QontOT(16, ancillas=1).layers == math.ceil(256 / 10)


def test_token_counts_that_are_no_power_of_two_are_named() -> None:
    model = ViT(img_size=(10, 14), patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(BadInput, match=r"1 prefix \+ 35 patch tokens = 36.*31 or 63 patch tokens"):
        swap(model, "normalizer", QontOT)
    with pytest.raises(BadInput, match="power of two"):
        QontOT(12)
    with pytest.raises(NeedsFixedGrid, match="8 tokens"):
        QontOT(8)(torch.randn(1, 1, 4, 4))


def test_refuses_a_mask_and_impossible_options() -> None:
    with pytest.raises(BadInput, match="mask"):
        QontOT(4)(torch.randn(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool))
    for options in ({"ancillas": -1}, {"mode": "frozen"}, {"gain": 0.0}, {"shots": 0}, {"steps": -1}):
        with pytest.raises(BadInput, match=next(iter(options))):
            QontOT(4, **options)


def test_gain_is_chosen_once_and_saved() -> None:
    torch.manual_seed(0)
    part = QontOT(8)
    scores = 5 * torch.randn(4, 2, 8, 8)
    part(scores)
    torch.testing.assert_close(part.gain, 0.3 / scores.std(correction=0))
    chosen = part.gain.clone()
    part(scores * 100)
    assert part.gain == chosen
    other = QontOT(8, seed=9)
    other.load_state_dict(part.state_dict())
    torch.testing.assert_close(other(scores), part(scores), rtol=0, atol=0)


def host_with_circuit(**options: object) -> ViT:
    torch.manual_seed(0)
    model = ViT(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    swap(model, "tokenizer", RowStripes, window=2, stride=1)
    swap(model, "normalizer", QontOT, layers=8, **options)
    return model


def test_static_circuit_trains_queries_and_keys() -> None:
    model = host_with_circuit()
    names = [name for name, _ in model.named_parameters()]
    assert not any("theta" in name for name in names)
    assert not torch.equal(model.blocks[0].attn.normalizer.theta, model.blocks[1].attn.normalizer.theta)
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    assert (model.blocks[0].attn.qkv.weight.grad[:64] != 0).any()


def test_differentiable_circuit_gets_gradients_except_the_last_phases() -> None:
    model = host_with_circuit(mode="differentiable")
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    grad = model.blocks[0].attn.normalizer.theta.grad
    assert (grad[:-1] != 0).all() and (grad[-1, :, 0] != 0).all()
    assert grad[-1, :, 1].abs().max() < 1e-6


def test_mixed_mode_changes_the_circuit_between_epochs_only() -> None:
    model = host_with_circuit(mode="mixed", steps=20).train()
    part = model.blocks[1].attn.normalizer
    before = part.theta.clone()
    part.on_epoch(0, 3)
    assert torch.equal(part.theta, before)  # no batch was seen yet
    model(torch.rand(8, 1, 8, 8)).logsumexp(-1).sum().backward()
    assert torch.equal(part.theta, before)
    scores, grad = part._held
    start = float((grad * part.weights(scores * part.gain, before)).sum())
    part.on_epoch(1, 3)
    assert float((grad * part.weights(scores * part.gain, part.theta)).sum()) < start
    copy.deepcopy(model)
    model.eval()(torch.rand(2, 1, 8, 8)).sum().backward()
    assert part._held is None  # nothing is kept in evaluation


def test_tune_lowers_a_loss_without_gradients() -> None:
    torch.manual_seed(0)
    part = QontOT(4, ancillas=0, layers=4, gain=1.0)
    scores = torch.randn(8, 1, 4, 4)
    target = torch.eye(4).expand(8, 1, 4, 4)
    start, end = part.tune(lambda: float((part(scores) - target).square().mean()), steps=200)
    assert end < 0.8 * start
    torch.testing.assert_close(torch.tensor(end), (part(scores) - target).square().mean())


def test_shots_estimate_the_matrix() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 8, 8, requires_grad=True)
    exact = QontOT(8, gain=0.3)(scores)
    noisy = QontOT(8, gain=0.3, shots=4000)(scores)
    torch.testing.assert_close(noisy.sum(-2), torch.ones(2, 2, 8))
    assert 0 < (noisy - exact).abs().max() < 0.06
    assert torch.equal((noisy * 4000).round(), (noisy * 4000).round(decimals=1).round())
    (first,) = torch.autograd.grad((exact * scores.detach()).sum(), scores)
    (second,) = torch.autograd.grad((noisy * scores.detach()).sum(), scores)
    torch.testing.assert_close(first, second)


def test_half_precision_and_host_checkpointing() -> None:
    model = host_with_circuit().eval()
    images = torch.rand(4, 1, 8, 8)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), exact, rtol=0, atol=0.05)
    scores = torch.randn(2, 2, 8, 8)
    part = model.blocks[0].attn.normalizer
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(part(scores), part(scores.double()).float(), rtol=0, atol=1e-5)
    model.train()
    model(images).square().sum().backward()
    plain = model.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(images).square().sum().backward()
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, plain)


def test_compiles_in_one_graph() -> None:
    model = host_with_circuit(gain=1.0).eval()
    images = torch.rand(2, 1, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forbidden", [-math.inf, torch.finfo(torch.float32).min])
def test_scores_that_forbid_a_key_are_refused(forbidden: float) -> None:
    scores = torch.randn(1, 2, 4, 4)
    scores[0, 1, 2, 3] = forbidden
    for shots in (None, 10):
        with pytest.raises(BadInput, match="-inf.*sinkhorn"):
            QontOT(4, shots=shots)(scores)
    with pytest.raises(BadInput, match="-inf"):
        host_with_circuit()(torch.rand(2, 1, 8, 8), is_causal=True)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_an_overflow_in_the_first_batch_does_not_choose_the_gain(broken: float) -> None:
    part = QontOT(4)
    scores = torch.randn(1, 2, 4, 4)
    scores[0, 0, 0, 0] = broken
    part(scores)
    assert part.gain == 0
    part(torch.randn(1, 2, 4, 4))
    assert 0 < part.gain < math.inf


def test_a_batch_without_images_passes() -> None:
    model = host_with_circuit().eval()
    assert model(torch.rand(0, 1, 8, 8)).shape == (0, 10)
    assert model.blocks[0].attn.normalizer.gain == 0
