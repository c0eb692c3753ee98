"""The selective scan: all methods agree, limits have closed forms, states carry over."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vitkit.errors import BadInput, UnknownName
from vitkit.models import scan, scan_engine, scan_kernel
from vitkit.models.scan import lti_scan, selective_scan, ssd_scan

native = pytest.mark.skipif(bool(scan_kernel.reason()), reason=f"the compiled kernel: {scan_kernel.reason()}")
#: the kernel knows Euler's rule only
RULES = [(m, z) for m in ("sequential", "associative", "chunked") for z in ("euler", "zoh")]
RULES.append(pytest.param("native", "euler", marks=native))
FAST = ["associative", "chunked", pytest.param("native", marks=native)]


def inputs(length, channels, states=4, groups=1, dtype=torch.float64, batch=2, h0=True, seed=0):
    torch.manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    return {
        "u": draw(batch, length, channels),
        "delta": draw(batch, length, channels),
        "A": -3 * torch.rand(channels, states, dtype=dtype),
        "Bm": draw(batch, length, groups, states),
        "Cm": draw(batch, length, groups, states),
        "D": draw(channels),
        "z": draw(batch, length, channels),
        "delta_bias": draw(channels),
        "h0": draw(batch, channels, states) if h0 else None,
    }


def gap(a, b):
    """Relative to the largest value."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def by_hand(u, delta, A, Bm, Cm, D, z, delta_bias, h0, zoh):
    """The definition, one number at a time."""
    (batch, length, channels), states, groups = u.shape, A.shape[1], Bm.shape[2]
    y = torch.zeros_like(u)
    for i, e in itertools.product(range(batch), range(channels)):
        g = e // (channels // groups)
        h = [float(h0[i, e, s]) for s in range(states)]
        for t in range(length):
            step = F.softplus(delta[i, t, e] + delta_bias[e])
            total = D[e] * u[i, t, e]
            for s in range(states):
                decay = torch.exp(step * A[e, s])
                weight = (decay - 1) / A[e, s] if zoh else step
                h[s] = decay * h[s] + weight * u[i, t, e] * Bm[i, t, g, s]
                total = total + Cm[i, t, g, s] * h[s]
            y[i, t, e] = total * F.silu(z[i, t, e])
    return y


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_the_loop_is_the_definition(discretization):
    given = inputs(4, 6, states=3, groups=2)
    y = selective_scan(**given, discretization=discretization, method="sequential")
    assert gap(y, by_hand(**given, zoh=discretization == "zoh")) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 257])
@pytest.mark.parametrize("method", FAST)
def test_methods_agree_with_the_loop(method, length):
    for chunk, groups, width, zoh, h0, dtype in itertools.product(
        (1, 8, 64), (1, 2), (5, 7), ("euler", "zoh"), (False, True), (torch.float64, torch.float32)
    ):
        if method == "native" and (zoh == "zoh" or dtype == torch.float64):
            continue
        if method == "associative" and chunk != 8:
            continue  # it has no chunks
        given = inputs(length, groups * width, groups=groups, dtype=dtype, h0=h0)
        ref, ref_state = selective_scan(**given, discretization=zoh, method="sequential", return_state=True)
        y, state = selective_scan(**given, discretization=zoh, method=method, chunk=chunk, return_state=True)
        worst = max(gap(y, ref), gap(state, ref_state))
        assert y.dtype == dtype and worst < (1e-10 if dtype == torch.float64 else 1e-5), (chunk, groups, width, zoh, h0)


@pytest.mark.parametrize("buffer", [1, 8 * 8 * 40 * 2, 2**18])
@pytest.mark.parametrize(("length", "chunk", "groups"), [(1, 1, 1), (65, 8, 2), (150, 8, 1), (70, 64, 2)])
@pytest.mark.parametrize("zoh", ["euler", "zoh"])
def test_gradients_agree_with_the_loop(zoh, length, chunk, groups, buffer, monkeypatch):
    # many segments of one chunk, segments of some chunks with a rest, one segment
    monkeypatch.setattr(scan_engine, "_CPU_BUFFER", buffer)
    given = {k: v.requires_grad_() for k, v in inputs(length, 5 * groups, groups=groups).items()}
    found = []
    for method in ("sequential", "associative", "chunked"):
        y, state = selective_scan(**given, discretization=zoh, method=method, chunk=chunk, return_state=True)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + state.square().sum()
        found.append(torch.autograd.grad(loss, list(given.values())))
    for name, ref, *others in zip(given, *found):
        assert all(gap(o, ref) < 1e-8 or float((o - ref).abs().max()) < 1e-12 for o in others), name


@native
@pytest.mark.parametrize(("length", "chunk", "groups", "states"), [(1, 32, 1, 16), (97, 8, 2, 16), (64, 32, 3, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_the_kernel(length, chunk, groups, states, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (1, 16, 21):
            given = inputs(length, width * groups, states, groups, torch.float32)
            given = {k: v.requires_grad_() for k, v in given.items()}
            found = []
            for method in ("sequential", "native"):
                y, state = selective_scan(**given, method=method, chunk=chunk, return_state=True)
                found.append(torch.autograd.grad(y.sum() + state.square().sum(), list(given.values())))
            for name, ref, ours in zip(given, *found):
                assert gap(ours, ref) < 1e-4, (name, width)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("zoh", ["euler", "zoh"])
def test_gradcheck(zoh):
    given = {k: v.requires_grad_() for k, v in inputs(5, 4, states=2, groups=2, batch=1).items()}

    def run(method, *values):
        return selective_scan(**dict(zip(given, values)), discretization=zoh, method=method, chunk=2, return_state=True)

    for method in ("chunked", "associative"):
        assert torch.autograd.gradcheck(partial(run, method), tuple(given.values()))


def test_zero_order_hold_is_exact_and_smooth_where_its_quotient_is_not():
    for size in (0.0, 1e-9, 1e-4, 0.99e-3, 1.01e-3, 0.09, 0.11, 3.0):
        z = torch.tensor([-size], dtype=torch.float64, requires_grad=True)
        value = scan_engine.ratio(z)
        exact = math.expm1(-size) / -size if size else 1.0
        assert value.item() == pytest.approx(exact, rel=1e-14)
        slope = torch.autograd.grad(value, z)[0]
        assert torch.allclose(scan_engine._slope(z.detach()), slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["sequential", *FAST])
def test_no_time_passes_when_delta_is_zero(method):
    given = inputs(20, 6, dtype=torch.float32)
    given |= {"delta": torch.zeros(2, 20, 6), "delta_bias": None}
    _, state = selective_scan(**given, delta_softplus=False, method=method, return_state=True)
    assert torch.equal(state, given["h0"])


@pytest.mark.parametrize(("method", "zoh"), RULES)
def test_without_decay_it_is_a_cumulative_sum(method, zoh):
    u, one = torch.randn(2, 70, 5), torch.ones(2, 70, 1, 1)
    y = selective_scan(
        u, torch.ones_like(u), torch.zeros(5, 1), one, one,
        delta_softplus=False, discretization=zoh, method=method,
    )  # fmt: skip
    assert torch.allclose(y, u.cumsum(1), atol=1e-5)


@pytest.mark.parametrize("zoh", ["euler", "zoh"])
def test_constant_steps_make_it_a_convolution(zoh):
    u, delta = torch.randn(2, 40, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    A = -torch.rand(3, 4, dtype=torch.float64)
    b, c, D = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.randn(3).double()
    y = selective_scan(
        u, delta.expand(2, 40, 3), A, b.expand(2, 40, 1, 4), c.expand(2, 40, 1, 4), D,
        delta_softplus=False, discretization=zoh,
    )  # fmt: skip
    a = (delta[:, None] * A).exp()
    weight = (a - 1) / A * b if zoh == "zoh" else delta[:, None] * b
    kernel = torch.stack([(c * a**k * weight).sum(1) for k in range(40)], 1)
    conv = F.conv1d(F.pad(u.mT, (39, 0)), kernel.flip(1).unsqueeze(1), groups=3).mT
    assert gap(y, conv + D * u) < 1e-12
    if zoh == "zoh":
        assert gap(lti_scan(u, delta, A, b.expand(3, 4), c.expand(3, 4), D), y) < 1e-12


@pytest.mark.parametrize("method", ["sequential", *FAST])
def test_halves_with_the_carried_state_are_the_whole(method):
    given = inputs(50, 6, dtype=torch.float32)
    whole, end = selective_scan(**given, method=method, return_state=True)

    def half(at, h0):
        cut = {k: v[:, at] if v.ndim > 2 and k != "h0" else v for k, v in given.items()}
        return selective_scan(**{**cut, "h0": h0}, method=method, chunk=8, return_state=True)

    first, middle = half(slice(0, 21), given["h0"])
    second, last = half(slice(21, None), middle)
    assert gap(torch.cat([first, second], 1), whole) < 1e-5 and gap(last, end) < 1e-5


@pytest.mark.parametrize("method", ["sequential", *FAST])
def test_reverse_is_flip_scan_flip(method):
    given = inputs(37, 6, groups=2, dtype=torch.float32)
    backwards, end = selective_scan(**given, reverse=True, method=method, return_state=True)
    flipped = {k: v.flip(1) if v.ndim > 2 and k != "h0" else v for k, v in given.items()}
    y, state = selective_scan(**flipped, method=method, return_state=True)
    assert torch.equal(backwards, y.flip(1)) and torch.equal(end, state)


@pytest.mark.parametrize(("method", "zoh"), RULES)
def test_instant_forgetting_leaves_no_mixing(method, zoh):
    given = inputs(30, 6, dtype=torch.float32, h0=False) | {"A": torch.full((6, 4), -1e5), "z": None}
    y = selective_scan(**given, discretization=zoh, method=method)
    step = F.softplus(given["delta"] + given["delta_bias"])
    own = (given["Bm"] * given["Cm"]).sum(-1) * step * given["u"]
    alone = given["D"] * given["u"]
    assert torch.allclose(y, alone if zoh == "zoh" else own + alone, atol=1e-3 if zoh == "zoh" else 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (64, 16), (37, 8), (65, 64)])
def test_one_decay_per_head_is_the_general_scan_with_repeated_decays(length, chunk, reverse):
    heads, width, states, groups = 4, 3, 5, 2
    given = inputs(length, heads * width, states, groups)
    A, step, D = -torch.rand(heads).double(), torch.rand(2, length, heads).double(), torch.randn(heads).double()
    u = given["u"].requires_grad_()
    step.requires_grad_()
    y, state = ssd_scan(
        u.unflatten(2, (heads, width)), step, A, given["Bm"], given["Cm"], D,
        given["h0"].unflatten(1, (heads, width)), reverse, chunk,
    )  # fmt: skip
    ref, ref_state = selective_scan(
        u, step.repeat_interleave(width, 2), A.repeat_interleave(width)[:, None].expand(-1, states), given["Bm"],
        given["Cm"], D.repeat_interleave(width), delta_softplus=False, h0=given["h0"], reverse=reverse,
        method="sequential", return_state=True,
    )  # fmt: skip
    assert gap(y.flatten(2), ref) < 1e-10 and gap(state.flatten(1, 2), ref_state) < 1e-10
    ours = torch.autograd.grad(y.sum() + state.sum(), (u, step))
    theirs = torch.autograd.grad(ref.sum() + ref_state.sum(), (u, step))
    assert all(gap(a, b) < 1e-8 for a, b in zip(ours, theirs))


def test_strong_decay_in_a_chunk_of_the_dual_form_gives_no_nan():
    u = torch.randn(1, 64, 1, 2, requires_grad=True)
    y, _ = ssd_scan(u, torch.full((1, 64, 1), 50.0), torch.tensor([-10.0]), *torch.randn(2, 1, 64, 1, 3))
    y.sum().backward()
    assert bool(y.isfinite().all()) and bool(u.grad.isfinite().all())


def test_half_precision_and_autocast_compute_in_float32():
    given = inputs(40, 8, dtype=torch.float32)
    ref = selective_scan(**given)
    with torch.autocast("cpu", torch.bfloat16):
        for method in ("chunked", "associative", "auto"):
            assert gap(selective_scan(**given, method=method), ref) < 1e-5
    low = selective_scan(**{k: v.to(torch.bfloat16) for k, v in given.items()})
    assert low.dtype == torch.bfloat16 and gap(low.float(), ref) < 0.1


@native
def test_the_kernel_keeps_nan_and_counts_fading_states_as_zero():
    given = inputs(40, 20, dtype=torch.float32, h0=False) | {"z": None}
    given["u"][0, 10, 3] = torch.nan
    y = selective_scan(**given, method="native")
    assert bool(y[0, 10:, 3].isnan().all()) and int(y.isnan().sum()) == 30
    silent = inputs(500, 20, dtype=torch.float32) | {"D": None, "z": None, "delta_softplus": False}
    silent |= {"u": torch.zeros(2, 500, 20), "delta": torch.ones(2, 500, 20), "A": -torch.ones(20, 4)}
    silent["delta_bias"] = None
    assert float(selective_scan(**silent, method="native")[:, -1].abs().max()) == 0.0


@native
def test_the_kernel_compiles_anew_and_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(scan_kernel, "_library", scan_kernel._library.__wrapped__)
    assert scan_kernel.reason.__wrapped__() == ""
    assert [p.suffix for p in (tmp_path / "kernels").iterdir()] == [".so"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in scan_kernel.reason.__wrapped__()
    monkeypatch.setenv("VITKIT_NATIVE", "0")
    assert "VITKIT_NATIVE" in scan_kernel.reason.__wrapped__()


def test_without_a_compiler_auto_is_the_plain_scan(monkeypatch):
    monkeypatch.setattr(scan_kernel, "_library", lambda: pytest.fail("the kernel was called"))
    monkeypatch.setattr(scan_kernel, "reason", lambda: "there is no C compiler")
    given = inputs(5, 6, dtype=torch.float32)
    assert gap(selective_scan(**given), selective_scan(**given, method="chunked")) == 0


@native
def test_auto_is_the_kernel_where_it_serves():
    given = inputs(50, 6, dtype=torch.float32)
    assert gap(selective_scan(**given), selective_scan(**given, method="native")) == 0
    wide = inputs(50, 6, dtype=torch.float64)
    assert gap(selective_scan(**wide), selective_scan(**wide, method="chunked")) == 0


@native
def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(scan_kernel, "_library", scan_kernel._library.__wrapped__)
    assert "false fails on scan_kernel.c" in scan_kernel.reason.__wrapped__()
    assert list((tmp_path / "kernels").iterdir()) == []


def test_the_packages_kernel_gets_its_own_layout(monkeypatch):
    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        """As mamba-ssm documents it: u, delta, z (B, E, L); B, C (B, G, S, L); a loop in place of the kernel."""
        assert u.is_contiguous() and B.is_contiguous() and return_last_state
        step = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta
        repeat = u.shape[1] // B.shape[1]
        B, C = B.repeat_interleave(repeat, 1), C.repeat_interleave(repeat, 1)
        h, out = torch.zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            h = torch.exp(step[:, :, t, None] * A) * h + (step * u)[:, :, t, None] * B[..., t]
            out.append((h * C[..., t]).sum(-1))
        return (torch.stack(out, 2) + D[:, None] * u) * F.silu(z), h

    monkeypatch.setattr(scan, "_mamba_ssm_kernel", lambda: selective_scan_fn)
    for reverse in (False, True):
        given = inputs(9, 6, groups=2, dtype=torch.float32, h0=False)
        y, state = selective_scan(**given, method="cuda", reverse=reverse, return_state=True)
        ref, ref_state = selective_scan(**given, method="sequential", reverse=reverse, return_state=True)
        assert gap(y, ref) < 1e-5 and gap(state, ref_state) < 1e-5


def test_the_operator_is_well_behaved():
    args = [torch.randn(2, 20, 6), torch.rand(2, 20, 6), -torch.rand(2, 4, 3), *torch.randn(2, 2, 20, 2, 4)]
    args = [t.requires_grad_() for t in (*args, torch.randn(2, 2, 4, 3))]
    for native_too in (False, True):
        if not native_too or not scan_kernel.reason():
            torch.library.opcheck(scan_engine._scan, (*args, False, 8, native_too, True))


class Layer(torch.nn.Module):
    def forward(self, u, delta, A, Bm, Cm):
        return selective_scan(u, delta, A, Bm, Cm)


def test_compiles_whole_and_exports_as_plain_operations():
    given = inputs(24, 6, dtype=torch.float32)
    args = tuple(given[k].requires_grad_() for k in ("u", "delta", "A", "Bm", "Cm"))
    ref = Layer()(*args)
    torch._dynamo.reset()
    y = torch.compile(Layer(), backend="aot_eager", fullgraph=True)(*args)
    assert gap(y, ref) < 1e-6
    grads = [torch.autograd.grad(v.square().sum(), args) for v in (y, ref)]
    assert all(gap(a, b) < 1e-5 for a, b in zip(*grads))
    exported = torch.export.export(Layer(), tuple(a.detach() for a in args))
    assert "vitkit" not in str(exported.graph)
    assert gap(exported.module()(*args), ref) < 1e-5


def test_second_derivatives_are_refused_rather_than_wrong():
    given = inputs(6, 2, states=2, batch=1)
    u = given["u"].requires_grad_()
    (first,) = torch.autograd.grad(selective_scan(**given, method="chunked").sum(), u, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), u)
    given["delta"].requires_grad_()
    (first,) = torch.autograd.grad(selective_scan(**given, method="associative").sum(), u, create_graph=True)
    assert torch.autograd.grad(first.sum(), given["delta"])[0].abs().max() > 0


def test_operations_are_counted_and_grow_linearly():
    counts = []
    for length in (256, 4096):
        given = inputs(length, 4, dtype=torch.float32, batch=1)
        with FlopCounterMode(display=False) as counter:
            selective_scan(**given, method="chunked")
        counts.append(counter.get_total_flops())
    assert counts == [7 * 256 * 4 * 4, 7 * 4096 * 4 * 4]


def test_errors_name_what_is_wrong():
    given = inputs(5, 6, groups=2)
    for name, value, said in (
        ("delta", torch.zeros(2, 5, 5), "delta must have the shape 2×5×6"),
        ("Cm", torch.zeros(2, 5, 1, 4), "Cm must have the shape 2×5×2×4"),
        ("A", torch.zeros(4), "A \\(E, S\\)"),
        ("Bm", torch.zeros(2, 5, 4, 4), "4 groups divide"),
        ("h0", torch.zeros(2, 6, 3), "h0"),
        ("chunk", 0, "chunk=0"),
        ("D", torch.zeros(6, device="meta"), "D must be on cpu"),
    ):
        with pytest.raises(BadInput, match=said):
            selective_scan(**{**given, name: value})
    with pytest.raises(UnknownName, match="associative"):
        selective_scan(**given, method="asociative")
    with pytest.raises(UnknownName, match="zoh"):
        selective_scan(**given, discretization="zo")
    with pytest.raises(BadInput, match="float64"):
        selective_scan(**given, method="native")
    with pytest.raises(BadInput, match="Euler"):
        selective_scan(**given, method="cuda")
    with pytest.raises(BadInput, match="Bm"):
        ssd_scan(torch.zeros(1, 4, 3, 2), torch.zeros(1, 4, 3), torch.zeros(3), *torch.zeros(2, 1, 4, 2, 5))
    with pytest.raises(BadInput, match="delta"):
        lti_scan(given["u"], torch.zeros(5), given["A"], given["A"], given["A"])
    with pytest.raises(BadInput, match="complex"):
        lti_scan(given["u"], given["A"][:, 0].exp(), given["A"], given["A"] + 1j, given["A"])
