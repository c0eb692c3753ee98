"""The parts once more, each written straight from its equations: what ``parts_reference.py`` measures them against.

A function bears the name of its part and is called as ``f(part, x, layout)`` with the part's own weights; x is what the
slot gets: images, tokens, queries and keys, scores, or the states of all blocks. Plain layers (linear, convolution,
norms) are called as they are. Loops are those of the papers: steps of a scan, gates, iterations, layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkit.models.graph import scattered
from vitkit.models.layout import TokenLayout

# B batch · H heads · P prefix tokens · N = h·w patches · D width · E inner channels · S states

# -- what several of them need ---------------------------------------------------------------------------------------


def split_heads(x: Tensor, num: int) -> Tensor:
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def dot_product(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """(B, H, n, d) → (B, n, H·d)."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def self_attention(attn: Any, x: Tensor) -> Tensor:
    q, k, v = (split_heads(t, attn.num_heads) for t in attn.qkv(x).chunk(3, -1))
    return attn.proj(dot_product(q, k, v))


def cross(attn: Any, q_tokens: Tensor, kv_tokens: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    k, v = (split_heads(t, attn.num_heads) for t in attn.kv(kv_tokens).chunk(2, -1))
    return attn.proj(dot_product(split_heads(attn.q(q_tokens), attn.num_heads), k, v, bias))


def members_only(attn: Any, q_tokens: Tensor, kv_tokens: Tensor, bias: Tensor | float, open_to: Tensor) -> Tensor:
    """Attention within ``open_to`` (B, Q, K); 0 for a query that may see nothing."""
    logits = torch.zeros_like(open_to, dtype=q_tokens.dtype) + bias
    alive = open_to.any(-1, keepdim=True)
    logits = logits.masked_fill(~open_to & alive, -math.inf)
    return cross(attn, q_tokens, kv_tokens, logits.unsqueeze(1)) * alive


def seen_by_prefix(attn: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    return cross(attn, x[:, : layout.num_prefix], x)


def mlp(layers: Any, x: Tensor) -> Tensor:
    return layers.fc2(F.gelu(layers.fc1(x)))


def to_map(x: Tensor, layout: TokenLayout) -> Tensor:
    """Patches of (B, P+N, D) as (B, D, h, w)."""
    return x[:, layout.num_prefix :].transpose(1, 2).unflatten(2, layout.grid)


def to_rows(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def selective_ssm(ssm: Any, u: Tensor, path: int = 0) -> Tensor:
    """One path of a selective state-space layer, step by step: (B, L, E) → (B, L, E)."""
    r, b, c = (u @ ssm.x_proj[path].T).split(ssm.sizes, -1)
    delta = F.softplus(r @ ssm.dt_proj[path].T + ssm.dt_bias[path])
    rate, h, out = -ssm.A_log[path].exp(), 0.0, []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = (step * rate).exp() * h + step * u[:, t, :, None] * b[:, t, None]
        out.append((h * c[:, t, None]).sum(-1))
    return torch.stack(out, 1) + ssm.D[path] * u


def causal(conv: Any, u: Tensor, first: int, last: int) -> Tensor:
    """Channels ``first`` to ``last`` of a causal depthwise convolution of (B, L, E)."""
    kernel = conv.weight[:, first:last].T.flip(1).unsqueeze(1)
    padded = F.pad(u.transpose(1, 2), (kernel.shape[2] - 1, 0))
    return F.conv1d(padded, kernel, conv.bias[first:last], groups=last - first).transpose(1, 2)


def cross_scan(part: Any, x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """SS2D on patches alone: rows and columns, forwards and backwards."""
    u, z = part.in_proj(x).chunk(2, -1)
    maps = F.silu(part.dwconv(u.transpose(1, 2).unflatten(2, grid)))
    y = torch.zeros_like(u)
    for path in range(4):
        by_columns, backwards = path % 2 == 1, path > 1
        line = to_rows(maps.transpose(2, 3) if by_columns else maps)
        line = selective_ssm(part.ssm, line.flip(1) if backwards else line, path)
        line = line.flip(1) if backwards else line
        y = y + (to_rows(line.transpose(1, 2).unflatten(2, grid[::-1]).transpose(2, 3)) if by_columns else line)
    return part.out_proj(part.norm(y) * F.silu(z))


# -- tokenizers ------------------------------------------------------------------------------------------------------


def conv_stem(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    layers = list(part.stem)
    for conv, norm in zip(layers[::3], layers[1::3]):
        x = F.relu(norm(conv(x)))
    return to_rows(part.proj(x))


def charm(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    plan = part.plan(tuple(x.shape[-2:]))
    tokens = []
    # the draw of the cells is no equation
    for side, cells in zip(part.sides, part._choose(x[:1], plan)):
        size = [n * side // part.sides[-1] for n in plan.padded]
        shown = x if size == list(plan.padded) else F.interpolate(x, size, mode="bicubic", antialias=True)
        blocks = part.proj(shown).unflatten(3, (plan.cells[1], side)).unflatten(2, (plan.cells[0], side))
        blocks = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
        tokens.append(blocks[:, cells[0]].flatten(1, 2))
    return torch.cat(tokens, 1)


def sparse_pixels(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    net, (height, width) = part.selector, x.shape[-2:]
    scores = net.scorer.layers(x).flatten(1)
    places = scores.topk(part.num_patches).indices.sort().values
    coords = torch.stack([(places // width + 0.5) / height, (places % width + 0.5) / width], -1)
    angles = (coords.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(net.embedding.bands)).flatten(2)
    values = x.flatten(2).transpose(1, 2).gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[1]))
    gates = scores.gather(1, places).sigmoid().unsqueeze(-1)
    return gates * mlp(net.embedding, torch.cat([coords, angles.sin(), angles.cos(), values], -1))


def neurn(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    windows = F.pad(x, (part.k // 2,) * 4, mode="reflect").unfold(2, part.k, 1).unfold(3, part.k, 1)
    sigma = windows.std((-2, -1), correction=0)
    return part.tokenizer(sigma / sigma.amax((1, 2, 3), keepdim=True))


def variable_tokens(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    rows = [F.unfold(x[:, v : v + 1], part.patch_size, stride=part.patch_size).mT for v in range(x.shape[1])]
    seen = torch.stack([r @ part.kernel[v] + part.variable_embed[v] for v, r in enumerate(rows)], 2)
    query = part.query.expand(seen.shape[0] * seen.shape[1], -1, -1)
    return part.norm(cross(part.attention, query, seen.flatten(0, 1)).reshape(*seen.shape[:2], -1))


def token_graying(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    rows, cols = part.rows.value, part.cols.value
    y = rows @ F.unfold(x, part.patch_size, stride=part.patch_size).mT @ cols.T
    top = y.abs().amax((1, 2), keepdim=True)
    y = y * ((y.abs() + 1e-6 * top) / (top + 1e-6 * top)) ** (part.eps - 1)
    return F.linear(rows.T @ y @ cols, part.proj.weight.flatten(1), part.proj.bias)


def spectral_scan(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    steps = x.unflatten(1, (part.steps, -1)).unbind(1)
    seen = torch.stack([to_rows(part.embed(step)) for step in steps], 2) + part.band_embed
    rows = seen.flatten(0, 1)
    rows = rows + vim(part.scan, part.norm(rows), TokenLayout(grid=(1, part.steps)))
    return part.tokenizer(x) + part.proj(part.norm_out(rows.mean(1).unflatten(0, seen.shape[:2])))


def cube_tokens(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    groups = x.unflatten(1, (part.groups, -1)).unbind(1)
    return torch.cat([to_rows(part.proj(group)) + part.group_embed[t] for t, group in enumerate(groups)], 1)


def row_stripes(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    """The part is one convolution; so is this."""
    return to_rows(part.proj(x))


# -- positions -------------------------------------------------------------------------------------------------------


def sape2(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    q, k = (t[:, :, layout.num_prefix :] for t in x.unbind(0))
    (h, w), top = layout.grid, part.max_pos
    gates = (q @ k.mT * q.shape[-1] ** -0.5).sigmoid().unflatten(-1, (h, w))
    total = torch.zeros(*gates.shape[:3], h * w)
    own = torch.arange(h * w)
    for table, axis, place in ((part.table_x, -1, own % w), (part.table_y, -2, own // w)):
        counts = gates.cumsum(axis)
        # each query's own column, or row, of the counts
        start = torch.stack([counts[:, :, i].select(axis, int(p)).unsqueeze(axis) for i, p in enumerate(place)], 2)
        p = (counts - start).flatten(-2).clamp(-top, top)
        lower = p.floor().clamp(max=top - 1)
        logits, index = q @ table.T, (lower + top).long()
        share = p - lower
        total = total + (1 - share) * logits.gather(-1, index) + share * logits.gather(-1, index + 1)
    return F.pad(total, (layout.num_prefix, 0, layout.num_prefix, 0))


def rope2d(part: Any, x: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
    h, w = layout.grid
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    a, b = part.rope.freqs[:, 0]
    angle = column[:, None] * a[:, None] + row[:, None] * b[:, None]
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = []
    for rows in x.unbind(0):
        prefix, patches = rows[:, :, : layout.num_prefix], rows[:, :, layout.num_prefix :]
        patches = torch.view_as_real(torch.view_as_complex(patches.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        turned.append(torch.cat([prefix, patches], 2))
    return tuple(turned)


def cpe(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    cells = to_map(x, layout)
    return torch.cat([x[:, : layout.num_prefix], to_rows(cells + part.conv(cells))], 1)


def loope(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    images, net = layout.cond["images"], part.context
    height, width = images.shape[-2:]
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    cols = torch.linspace(0, 1, width).expand(height, width)
    planes = torch.stack([cols, rows]).expand(len(images), -1, -1, -1)
    shift = net.to_shift(net.norm(net.features(torch.cat([images, planes], 1))).flatten(1)).tanh()
    frequency = 10000.0 ** (-2 * torch.arange(part.dim // 2) / part.dim)
    angle = (part.visit + shift).unsqueeze(-1) * frequency
    code = torch.cat([angle.sin(), angle.cos()], -1)
    return x + torch.cat([part.prefix.expand(len(x), -1, -1), code], 1)


# -- normalizers -----------------------------------------------------------------------------------------------------


def softmax(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    return x.softmax(-1)


def normsoftmax(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    return (x / x.std((-2, -1), correction=0, keepdim=True)).softmax(-1)


def sinkhorn(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    z = x / part.tau
    for step in range(part.steps):
        z = z - z.logsumexp(-1 - step % 2, keepdim=True)
    return z.exp()


def qr(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    return torch.linalg.qr(x + part.ridge * torch.eye(x.shape[-1]))[0] ** 2


def qontot(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    s, q = (part.gain * x).flatten(-2).flatten(0, -2), part.num_qubits
    angles = (s[:, part.entry] * part.theta.flatten()).unflatten(1, (part.layers, q, 2)) / 2
    state = torch.eye(2**q, dtype=torch.complex64).expand(len(s), -1, -1).reshape(len(s), *[2] * q, 2**q)
    for layer in range(part.layers):
        for bit in range(q):
            y, z = (angles[:, layer, bit, i].reshape(-1, *[1] * q) for i in (0, 1))
            zero, one = state.unbind(1 + bit)
            zero, one = y.cos() * zero - y.sin() * one, y.sin() * zero + y.cos() * one
            state = torch.stack([zero * torch.exp(-1j * z), one * torch.exp(1j * z)], 1 + bit)
        for control in range(layer % 2, q - 1, 2):
            off, on = state.unbind(1 + control)
            state = torch.stack([off, on.flip(1 + control)], 1 + control)
    power = state.abs().square().reshape(-1, *(part.num_tokens, 2**part.ancillas) * 2)
    return (power.sum((2, 4)) / 2**part.ancillas).reshape(x.shape)


# -- mixers ----------------------------------------------------------------------------------------------------------


def additive_attention(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    q, k = part.q(x), part.k(x)
    alpha = (q @ part.w * q.shape[-1] ** -0.5).softmax(1)
    g = torch.einsum("bn,bnd->bd", alpha, q)
    return part.proj(part.mix(g[:, None] * k) + q)


def pooled_attention(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    pooled = part.norm(to_rows(part.reduce(to_map(x, layout))))
    return cross(part.attn, x, torch.cat([x[:, : layout.num_prefix], pooled], 1))


def global_filter(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    cells = x[:, layout.num_prefix :].unflatten(1, layout.grid)
    spectrum = torch.fft.rfft2(cells, dim=(1, 2), norm="ortho") * torch.view_as_complex(part.weight)
    patches = torch.fft.irfft2(spectrum, s=layout.grid, dim=(1, 2), norm="ortho").flatten(1, 2)
    return torch.cat([seen_by_prefix(part.attend, x, layout), patches], 1)


def ninformer(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    m = x + part.tokens(part.norm1(x).mT).mT
    return part.linear(x) * (m + part.channels(part.norm2(m)))


def ss2d(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    patches = cross_scan(part, x[:, layout.num_prefix :], layout.grid)
    return torch.cat([seen_by_prefix(part.attend, x, layout), patches], 1) if layout.num_prefix else patches


def vim(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    count, half = layout.num_prefix, math.prod(layout.grid) // 2
    u, z = part.in_proj(torch.cat([x[:, count : count + half], x[:, :count], x[:, count + half :]], 1)).chunk(2, -1)
    width = u.shape[-1]
    y = selective_ssm(part.ssm, F.silu(causal(part.conv, u, 0, width)), 0)
    back = F.silu(causal(part.conv, u.flip(1), width, 2 * width))
    out = part.out_proj((y + selective_ssm(part.ssm, back, 1).flip(1)) * F.silu(z))
    return torch.cat([out[:, half : half + count], out[:, :half], out[:, half + count :]], 1)


def mamba(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    count = layout.num_prefix
    u, z = part.in_proj(torch.cat([x[:, count:], x[:, :count]], 1)).chunk(2, -1)
    y = selective_ssm(part.ssm, F.silu(causal(part.conv, u, 0, u.shape[-1])))
    out = part.out_proj(y * F.silu(z))
    return torch.cat([out[:, -count:], out[:, :-count]], 1)


def mamba2(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    """In the paper's dual form: a masked attention without softmax over the whole path."""
    count, inner = layout.num_prefix, part.sizes[0]
    z, mixed, step = part.in_proj(torch.cat([x[:, count:], x[:, :count]], 1)).split(part.sizes, -1)
    mixed = F.silu(causal(part.conv, mixed, 0, mixed.shape[-1]))
    states = (mixed.shape[-1] - inner) // 2
    u, b, c = mixed.split((inner, states, states), -1)
    u, delta = u.unflatten(-1, (part.heads, -1)), F.softplus(step + part.dt_bias[0])
    decay = (delta * -part.A_log[0].exp()).cumsum(1).transpose(1, 2)
    mask = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool).tril()
    weights = (decay[..., :, None] - decay[..., None, :]).masked_fill(~mask, -math.inf).exp() * (c @ b.mT).unsqueeze(1)
    y = torch.einsum("bhts,bshp->bthp", weights, delta.unsqueeze(-1) * u) + part.D[0][:, None] * u
    gated = y.flatten(2) * F.silu(z)
    gated = gated * (gated.square().mean(-1, keepdim=True) + part.norm.eps).rsqrt() * part.norm.weight
    out = part.out_proj(gated)
    return torch.cat([out[:, -count:], out[:, :-count]], 1)


def s4d(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    count, ssm = layout.num_prefix, part.ssm
    u = torch.cat([x[:, count:], x[:, :count]], 1)
    length, step = u.shape[1], ssm.log_step.exp()
    rate = torch.complex(-ssm.A_log.exp(), ssm.A_imag)
    exponent = rate * step[:, None]
    weight = torch.view_as_complex(ssm.C) * (exponent.exp() - 1) / rate
    kernel = 2 * torch.einsum("ds,dsl->dl", weight, (exponent[..., None] * torch.arange(length)).exp()).real
    spectrum = torch.fft.rfft(u.mT, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT + part.D * u
    out = F.glu(part.out_proj(F.gelu(y)))
    return torch.cat([out[:, -count:], out[:, :-count]], 1)


def conv_ssm(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    near, far = x.chunk(2, -1)
    cells = to_rows(part.conv(to_map(near, layout)))
    near = part.point(F.gelu(torch.cat([near[:, : layout.num_prefix], cells], 1)))
    return part.proj(torch.cat([near, ss2d(part.scan, far, layout)], -1))


def wavelet_ssm(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    cells = to_map(x, layout)
    a, b, c, d = cells[..., ::2, ::2], cells[..., ::2, 1::2], cells[..., 1::2, ::2], cells[..., 1::2, 1::2]
    low, high = (a + b + c + d) / 2, torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2
    low = cross_scan(part.low, to_rows(low), low.shape[2:]).mT.unflatten(2, low.shape[2:])
    p, q, r = part.high(high).chunk(3, 1)
    back = torch.empty_like(cells)
    back[..., ::2, ::2], back[..., ::2, 1::2] = (low + p + q + r) / 2, (low - p + q - r) / 2
    back[..., 1::2, ::2], back[..., 1::2, 1::2] = (low + p - q - r) / 2, (low - p - q + r) / 2
    return torch.cat([seen_by_prefix(part.attend, x, layout), part.proj(to_rows(back))], 1)


def decomposed_conv(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    patches = to_rows(along_axes(part.conv, to_map(x, layout)))
    return torch.cat([seen_by_prefix(part.prefix, x, layout), patches], 1)


def along_axes(conv: Any, cells: Tensor) -> Tensor:
    total = torch.zeros_like(cells)
    for line, norm in conv.branches:
        padding = (line.kernel_size[0] // 2, line.kernel_size[1] // 2)
        total = total + norm(F.conv2d(cells, line.weight, padding=padding, groups=cells.shape[1]))
    return total


def dct_attention(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    # scores are divided by √(D/H), as with full heads
    kept = (x @ part.dct.value.T) @ part.qkv.weight.T + part.qkv.bias
    q, k, v = (split_heads(t, part.num_heads) for t in kept.chunk(3, -1))
    weights = (q @ k.mT * (part.dim / part.num_heads) ** -0.5).softmax(-1)
    return part.proj((weights @ v).transpose(1, 2).flatten(2))


def dct_init(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    return self_attention(part, x)


def degc(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    patches = x[:, layout.num_prefix :]
    h = part.norm1(part.fc1(patches))
    features, image = unit(h), torch.arange(len(h))
    # the first centres are no equation
    first = features[:, scattered(part.clusters, h.shape[1], h.device, rows=2)[0]]
    labels = k_means(features, first)
    similarity = (features @ features.mT).masked_fill(labels[:, :, None] != labels[:, None], -math.inf)
    best, near = similarity.topk(part.k)
    # a node of a small cluster has itself in the remaining places
    near = torch.where(best > -math.inf, near, torch.arange(h.shape[1])[:, None])
    around = (h[image[:, None, None], near] - h.unsqueeze(2)).amax(2)
    hot = F.one_hot(labels, part.clusters).to(h.dtype)
    centroids = hot.mT @ h / hot.sum(1).clamp(min=1).unsqueeze(-1)
    source, target = part.between.source(centroids), part.between.target(centroids)
    logits = part.between.score(F.leaky_relu(target.unsqueeze(2) + source.unsqueeze(1), 0.2)).squeeze(-1)
    logits = logits.masked_fill((hot.sum(1) == 0).unsqueeze(1), -math.inf)
    heard = (logits.softmax(-1) @ source)[image[:, None], labels]
    # channels of a node and of its neighbours alternate
    u = F.gelu(part.vertex_norm(part.vertex(torch.cat([torch.stack([h, around], -1).flatten(2), heard], -1))))
    return torch.cat([seen_by_prefix(part.prefix, x, layout), part.norm2(part.fc2(u))], 1)


def k_means(x: Tensor, centres: Tensor, steps: int = 25, tol: float = 1e-3) -> Tensor:
    """Labels (B, N) of the better of the starts (B, R, c, D)."""
    going = torch.ones(*centres.shape[:2], 1, 1, dtype=torch.bool)
    for _ in range(steps):
        labels = torch.cdist(x.unsqueeze(1), centres).argmin(-1)
        hot = F.one_hot(labels, centres.shape[2]).to(x.dtype)
        counts = hot.sum(2).unsqueeze(-1)
        means = torch.where(going & (counts > 0), hot.mT @ x.unsqueeze(1) / counts.clamp(min=1), centres)
        going = going & ((means - centres).square().sum(-1, keepdim=True).mean(2, keepdim=True) > tol)
        centres = means
        if not going.any():
            break
    distance, labels = torch.cdist(x.unsqueeze(1), centres).min(-1)
    return labels[torch.arange(len(x)), distance.square().sum(-1).argmin(1)]


def partitioned_attention(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    count, (rows, cols), (h, w) = layout.num_prefix, part.cut, layout.grid
    cells = x[:, count:].reshape(len(x), rows, h // rows, cols, w // cols, -1).transpose(2, 3)
    prefix, out = [], torch.empty_like(cells)
    for i in range(rows):
        for j in range(cols):
            found = self_attention(part, torch.cat([x[:, :count], cells[:, i, j].flatten(1, 2)], 1))
            prefix.append(found[:, :count])
            out[:, i, j] = found[:, count:].reshape(cells[:, i, j].shape)
    return torch.cat([torch.stack(prefix).mean(0), out.transpose(2, 3).reshape(len(x), h * w, -1)], 1)


def one_kernel_for_all(layer: Any, x: Tensor) -> Tensor:
    maps = x.reshape(-1, layer.maps, layer.side, layer.side)
    return F.conv2d(maps, layer.weight, layer.bias).reshape(*x.shape[:2], -1)


def conv_share(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    q, k, v = (split_heads(one_kernel_for_all(layer, x), part.num_heads) for layer in part.qkv.children())
    return one_kernel_for_all(part.proj, dot_product(q, k, v))


def hyper_pool(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    patches, edges = x[:, layout.num_prefix :], part.edges.expand(len(x), -1, -1)
    queries = part.norm1(edges)
    cosine = unit(part.adjacency.vertex(patches)) @ unit(part.adjacency.edge(queries)).mT
    log_a, hard = (4 * cosine).sigmoid().log(), cosine > 0
    edges = edges + members_only(part.aggregate, queries, patches, log_a.mT, hard.mT)
    update = members_only(part.distribute, patches, part.norm2(edges), log_a, hard)
    return torch.cat([seen_by_prefix(part.prefix, x, layout), update], 1)


def hypergraph(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    patches, image = x[:, layout.num_prefix :], torch.arange(len(x))[:, None]
    centers = torch.einsum("bd,bnd->bn", x[:, 0], patches).topk(int(part.centers)).indices
    similarity = patches[image, centers] @ patches.mT
    similarity[image, torch.arange(centers.shape[1]), centers] = math.inf
    h = torch.zeros_like(similarity).scatter(2, similarity.topk(part.k).indices, 1.0).mT
    edges = h.mT @ patches / h.sum(1).unsqueeze(-1)
    normed = h / (h.sum(2, keepdim=True).clamp(min=1) * h.sum(1, keepdim=True)).sqrt()
    guide = F.pad(normed, (0, 0, layout.num_prefix, 0)).unsqueeze(1)
    edges = edges + cross(part.to_edges, edges, x, part.edge_bias[:, None, None] * guide.mT)
    return cross(part.to_nodes, x, part.norm(edges), part.node_bias[:, None, None] * guide)


def stga(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    count, dates = layout.num_prefix, layout.grid[0]
    q, k, v = (split_heads(t, part.num_heads) for t in part.qkv(x).chunk(3, -1))
    prefix_k, prefix_v = k[:, :, :count], v[:, :, :count]
    seen = dot_product(q[:, :, :count], k, v)
    q, k, v = (t[:, :, count:].unflatten(2, (dates, -1)) for t in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    places = torch.einsum("bhtnd,bhtmd->bhtnm", q, k)
    times = torch.einsum("bhtnd,bhsnd->bhtns", q, k)
    times = times.masked_fill(torch.eye(dates, dtype=torch.bool)[:, None], -math.inf)
    firsts = torch.einsum("bhtnd,bhpd->bhtnp", q, prefix_k)
    weights = torch.cat([places, times, firsts], -1).softmax(-1)
    places, times, firsts = weights.split((places.shape[-1], dates, count), -1)
    z = torch.einsum("bhtnm,bhtmd->bhtnd", places, v) + torch.einsum("bhtns,bhsnd->bhtnd", times, v)
    z = z + torch.einsum("bhtnp,bhpd->bhtnd", firsts, prefix_v)
    return part.proj(torch.cat([seen, z.flatten(2, 3).transpose(1, 2).flatten(2)], 1))


# -- MLPs ------------------------------------------------------------------------------------------------------------


def kan(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    for layer in part.layers:
        t, at = layer.knots, x.unsqueeze(-1)
        bases = ((at >= t[:, :-1]) & (at < t[:, 1:])).to(x.dtype)
        for k in range(1, 4):
            left = (at - t[:, : -(k + 1)]) / (t[:, k:-1] - t[:, : -(k + 1)]) * bases[..., :-1]
            bases = left + (t[:, k + 1 :] - at) / (t[:, k + 1 :] - t[:, 1:-k]) * bases[..., 1:]
        weight = layer.spline_weight * layer.spline_scale.unsqueeze(-1)
        x = F.linear(F.silu(x), layer.base_weight) + torch.einsum("bnik,oik->bno", bases, weight)
    return x


def interactive_ffn(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    u = part.norm1(F.gelu(part.fc1(x)).mT).mT
    cells = to_map(u, layout)
    cells = part.norm2(F.gelu(cells + part.dwconv(cells)))
    return part.fc2(torch.cat([u[:, : layout.num_prefix], to_rows(cells)], 1))


def conv_share_mlp(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    return one_kernel_for_all(part.fc2, F.gelu(one_kernel_for_all(part.fc1, x)))


# -- blocks ----------------------------------------------------------------------------------------------------------


def skip_policy(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    x = x * part.skip_attn + self_attention(part.attn, part.norm1(x))
    return x * part.skip_mlp + mlp(part.mlp, part.norm2(x))


def attention_reuse(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    """Two blocks: the second takes the weights of the first."""
    first, second = part
    q, k, v = (split_heads(t, first.attn.num_heads) for t in first.attn.qkv(first.norm1(x)).chunk(3, -1))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    x = x + first.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    x = x + mlp(first.mlp, first.norm2(x))
    v = split_heads(second.attn.v(second.norm1(x)), second.attn.num_heads)
    x = x + second.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + mlp(second.mlp, second.norm2(x))


def renewed(prefix: Any, x: Tensor, patches: Tensor, layout: TokenLayout) -> Tensor:
    joined = torch.cat([x[:, : layout.num_prefix], patches], 1)
    read = joined[:, : layout.num_prefix] + seen_by_prefix(prefix.attn, prefix.norm(joined), layout)
    return torch.cat([read, patches], 1)


def dcformer_block(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    cells = to_map(x, layout)
    patches = to_rows(cells) + part.body.gamma * mlp(part.body, to_rows(along_axes(part.body.conv, cells)))
    return renewed(part.prefix, x, patches, layout)


def iia(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    shares = to_map(x, layout).split(part.iia.widths, 1)
    dilated, bottleneck, attending = part.iia.branches
    attention, point = attending.body
    q, k, v = (split_heads(to_rows(t), attention.num_heads) for t in attention.qkv(shares[2]).chunk(3, 1))
    k = k + (attention.rel_h + attention.rel_w).flatten(2).mT
    k_reg, v_reg = attention.register_kv.unsqueeze(1).expand(-1, len(x), -1, -1, -1)
    found = dot_product(q, torch.cat([k, k_reg], 2), torch.cat([v, v_reg], 2))
    attended = point(shares[2] + found.mT.unflatten(2, layout.grid))
    bodies = (dilated.body(shares[0]), bottleneck.body(shares[1]), attended)
    branches = zip(part.iia.branches, bodies, shares)
    patches = torch.cat([F.relu(body + branch.shortcut(share)) for branch, body, share in branches], 1)
    return renewed(part.prefix, x, to_rows(patches), layout)


def hgvt_block(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    """The first of its kind, which brings virtual vertices and hyperedges with it."""
    count, (virtual, primary, _) = layout.num_prefix, part.counts.values()
    states = part.states.expand(len(x), -1, -1)
    v, e = torch.cat([x[:, :count], states[:, :virtual], x[:, count:]], 1), states[:, virtual:]
    normed, queries = part.vertex_norms[0](v), part.edge_norms[0](e)
    cosine = unit(part.adjacency.vertex(normed)) @ unit(part.adjacency.edge(queries)).mT
    allowed = torch.zeros(v.shape[1], e.shape[1], dtype=torch.bool)
    allowed[:, :primary], allowed[count : count + virtual] = True, True
    hard, log_a = (cosine > 0) & allowed, (4 * cosine).sigmoid().log()
    shared = (hard.float() @ hard.float().mT > 0) | torch.eye(v.shape[1], dtype=torch.bool)
    v = v + members_only(part.between, normed, normed, 0.0, shared)
    normed = part.vertex_norms[1](v)
    e = e + members_only(part.aggregate, queries, normed, log_a.mT, hard.mT)
    v = v + members_only(part.distribute, normed, part.edge_norms[1](e), log_a, hard)
    v = v + mlp(part.vertex_mlp, part.vertex_norms[2](v))
    e = e + mlp(part.edge_mlp, part.edge_norms[2](e))
    return torch.cat([v[:, : count + virtual], e, v[:, count + virtual :]], 1)


# -- read-outs -------------------------------------------------------------------------------------------------------


def early_exit(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    found = [fc(norm(x[block - 1][:, 0])) for fc, norm, block in zip(part.heads, part.norms, part.blocks)]
    answer = found[-1]
    for logits in found[-2::-1]:
        answer = torch.where(logits.softmax(-1).amax(-1, keepdim=True) > part.threshold, logits, answer)
    return answer


def mdcm(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    head, vectors, answers = part.cue_head, [], []
    for s, depth in enumerate(part.depths):
        stage, classify = head.stages[s], head.classifiers[s]
        t = stage.norm_tokens(stage.proj(stage.norm_in(x[depth][:, layout.num_prefix :])))
        kept = classify(t).amax(-1).topk(math.ceil(head.keep[s] * t.shape[1])).indices
        t = t.gather(1, kept.unsqueeze(-1).expand(-1, -1, t.shape[-1]))
        state = stage.cls_token.expand(len(t), -1, -1)
        query = stage.norm1(state)
        state = state + cross(stage.attn, query, torch.cat([query, t], 1))
        vectors.append(stage.norm3(state + mlp(stage.mlp, stage.norm2(state)))[:, 0])
        answers.append(classify(vectors[-1]))
    weights = head.gate(torch.cat(vectors, 1)).softmax(-1)
    return torch.einsum("bs,sbk->bk", weights, torch.stack(answers))


def expert_pool(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    rows = part.ln(x[-1])[:, layout.num_prefix :]
    best, index = part.confidence(rows).squeeze(-1).topk(part.experts)
    experts = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    voted = torch.einsum("bm,bmd->bd", best.softmax(-1), experts)
    return part.fc(torch.cat([voted, rows.mean(1)], 1))


def edit(part: Any, x: Tensor, layout: TokenLayout) -> Tensor:
    state = part.state.expand(x.shape[1], -1, -1)
    for layer, tokens in zip(part.layers, x):
        state = state + cross(layer.attn, layer.norm1(state), layer.norm1(tokens))
        state = state + mlp(layer.mlp, layer.norm2(state))
    return part.fc(part.norm(state[:, 0]))
