"""Self-attention on the low-frequency DCT coefficients of every token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.constant import Constant
from vitkit.models.dct import dct_matrix, dct_rows
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention

# C width of a token · C' = h·d' kept coefficients · h heads of d = C/h, here d'


class DCTAttention(Attention):
    """Attention with smaller projections: each token is cut to its first C' DCT coefficients along the channels.

    ``x̂ = (x D_Cᵀ)[…, :C']`` with the orthonormal DCT matrix D_C and ``C' = h·round(τ·C/h)``; then ordinary
    attention with ``qkv: C' → 3C'`` and ``proj: C' → C``. No inverse transform: proj absorbs it. Per token the
    projections cost (2τ + 3τ²)C² instead of 4C² multiplications (0.80 of it at τ = 0.75), the attention products τ
    of theirs; the mixer has 3C'² + 3C' + C'C + C parameters, the DCT is a fixed buffer.

    Args:
        dim: C, width of a token.
        num_heads: h, divides ``dim``.
        tau: τ in (0, 1], share of the coefficients that is kept; the paper uses 0.75 and 0.5.
        scale: "full" multiplies scores by (C/h)^−½ as the official code does, "head" by (C'/h)^−½.
        qkv_bias, proj_bias, attn_drop, proj_drop: as in timm's ``Attention``.

    Shape: (B, P+N, C), layout → (B, P+N, C). Windows go in as batch entries, their position bias as a layout edit.
    Raises: BadInput if ``tau`` or ``scale`` is none of these, ``num_heads`` does not divide ``dim``, or a warm start
        meets q/k norms, an output norm or a gate, which do not survive the change of width.
    Paper: Discrete Cosine Transform Based Decorrelated Attention for Vision Transformers, arXiv:2405.13901.
    Departs from the paper: proj is stored as C' → C instead of padding its input with zeros (the same function);
    the warm start from trained weights is ours.
    """

    slot = "mixer"
    preserves = "approx"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        tau: float = 0.75,
        scale: str = "full",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        depth: int | None = None,
    ) -> None:
        if dim % num_heads:
            raise BadInput(
                f"num_heads={num_heads} does not divide dim={dim}; pick one of "
                f"{[h for h in range(1, dim + 1) if dim % h == 0]}."
            )
        if not 0 < tau <= 1:
            raise BadInput(f"tau={tau} of DCTAttention must lie in (0, 1]; the paper uses 0.75 and 0.5.")
        if scale not in ("full", "head"):
            raise BadInput(f"scale={scale!r} of DCTAttention is unknown; use 'full' (the official code) or 'head'.")
        head_dim = kept_per_head(dim, num_heads, tau)
        super().__init__(
            dim,
            num_heads,
            attn_head_dim=head_dim,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            depth=depth,
        )
        self.dim, self.tau, self.score_scale = dim, tau, scale
        self.qkv = nn.Linear(self.attn_dim, 3 * self.attn_dim, bias=qkv_bias)
        # fused attention divides by √d'; what is left to reach √d goes into q
        self.q_factor = math.sqrt(head_dim * num_heads / dim) if scale == "full" else 1.0
        self.dct = Constant(dct_rows, dim, self.attn_dim)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, tau: float = 0.75, scale: str = "full"
    ) -> DCTAttention:
        """The best approximation of ``old`` when it is standard attention and ``warm``; else a fresh start.

        Position parts and normalizer of the old attention move along. At τ = 1 the function stays the same; below,
        each head's d rows shrink to d' by the truncated SVD of its products: of the bias-augmented ``W_qᵀ W_k`` (which
        makes the scores) and of ``W_proj W_v`` (which makes the output). The bias of v goes into the bias of proj,
        exact because attention rows sum to 1.
        """
        if not isinstance(old, Attention):
            return cls(spec.dim, spec.num_heads, tau, scale)
        new = cls(
            spec.dim,
            old.num_heads,
            tau,
            scale,
            qkv_bias=warm or old.qkv.bias is not None,
            proj_bias=warm or old.proj.bias is not None,
            attn_drop=old.attn_drop.p,
            proj_drop=old.proj_drop.p,
            depth=old.depth_index,
        )
        new.fused_attn, new.normalizer = old.fused_attn, old.normalizer
        # a list of its own: a part added later must not reach the old module that undo() puts back
        new.position = nn.ModuleList(old.position)
        if warm:
            new._take_over(old)
        return new

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(F.linear(x, self.dct.value))
        return q * self.q_factor, k, v

    def _take_over(self, old: Attention) -> None:
        if any(hasattr(part, "rotate") for part in old.position):
            raise BadInput(
                "This attention turns queries and keys by their positions, so its heads cannot be written in another "
                "basis. Start the mixer fresh with warm=False, and tau=1.0 to keep the width of the heads."
            )
        if not all(isinstance(m, nn.Identity) for m in (old.q_norm, old.k_norm, old.norm)) or old.gate is not None:
            raise BadInput(
                "This attention has q/k norms, an output norm or a gate, so its weights have no counterpart at another "
                "width. Start the mixer fresh with warm=False."
            )
        if isinstance(old, DCTAttention) or old.qkv.in_features != self.dim or old.attn_dim != self.dim:
            raise BadInput("A warm start of DCTAttention needs standard attention of full width; pass warm=False.")
        compress_projections(old.qkv, old.proj, self.qkv, self.proj, self.num_heads, self.q_factor)

    @torch.no_grad()
    def fold(self) -> Attention:
        """The same function as standard attention of width C': the DCT multiplied into qkv, for export.

        The result shares the position parts and the normalizer; it has more parameters, but one product less.
        """
        folded = Attention(
            self.dim,
            self.num_heads,
            attn_head_dim=self.head_dim,
            qkv_bias=self.qkv.bias is not None,
            proj_bias=self.proj.bias is not None,
            attn_drop=self.attn_drop.p,
            proj_drop=self.proj_drop.p,
            depth=self.depth_index,
        ).to(self.qkv.weight)
        factor = torch.ones_like(self.qkv.weight[:, :1])
        factor[: self.attn_dim] = self.q_factor
        dct = dct_rows(self.dim, self.attn_dim).to(factor.device)
        folded.qkv.weight.copy_(factor * (self.qkv.weight.double() @ dct))
        if self.qkv.bias is not None:
            folded.qkv.bias.copy_(factor[:, 0] * self.qkv.bias)
        folded.proj.load_state_dict(self.proj.state_dict())
        folded.fused_attn, folded.normalizer = self.fused_attn, self.normalizer
        folded.position = nn.ModuleList(self.position)
        return folded.train(self.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kept={self.attn_dim}, heads={self.num_heads}, scale={self.score_scale!r}"


@torch.no_grad()
def compress_projections(
    old_qkv: nn.Linear, old_proj: nn.Linear, qkv: nn.Linear, proj: nn.Linear, num_heads: int, q_factor: float = 1.0
) -> None:
    """Write into ``qkv`` (C' → 3C') and ``proj`` (C' → C) what best replaces trained layers on DCT coefficients.

    Per projection ``W' = (W D_Cᵀ)[:, :C']``; then the d rows of a head shrink to d' as described at
    :meth:`DCTAttention.from_standard`.

    Args:
        old_qkv, old_proj: the trained layers C → 3C and C → C.
        qkv, proj: the layers written to; both have a bias.
        num_heads: h.
        q_factor: what the new layer multiplies q by after the projection.
    """
    width, kept = old_qkv.in_features, qkv.in_features
    head_dim, new_head_dim = width // num_heads, kept // num_heads
    weight = old_qkv.weight.double().unflatten(0, (3, num_heads, head_dim))
    bias = old_qkv.weight.new_zeros(3 * width) if old_qkv.bias is None else old_qkv.bias
    bias = bias.double().unflatten(0, (3, num_heads, head_dim))
    # the columns now meet coefficients instead of channels
    weight = weight @ dct_matrix(width, torch.float64, weight.device)[:kept].T
    query, key = (torch.cat([weight[i], bias[i, :, :, None]], -1) for i in (0, 1))
    query_t, key = shrink_product(query.mT, key, new_head_dim)
    # trained scores were divided by √d, the new ones are by √d' and multiplied by q_factor
    query = query_t.mT * (math.sqrt(new_head_dim / head_dim) / q_factor)
    out = old_proj.weight.double().unflatten(1, (num_heads, head_dim)).transpose(0, 1)  # (h, C, d)
    constant = (out @ bias[2, :, :, None]).sum(0).squeeze(-1)
    out, value = shrink_product(out, weight[2], new_head_dim)
    qkv.weight.copy_(torch.stack([query[..., :-1], key[..., :-1], value]).flatten(0, 2))
    qkv.bias.copy_(torch.stack([query[..., -1], key[..., -1], torch.zeros_like(key[..., -1])]).flatten())
    proj.weight.copy_(out.transpose(0, 1).flatten(1))
    proj.bias.copy_(constant if old_proj.bias is None else constant + old_proj.bias.double())


def kept_per_head(dim: int, num_heads: int, tau: float) -> int:
    """d' = round(τ·C/h), halves upwards, at least 1."""
    return max(1, math.floor(tau * dim / num_heads + 0.5))


def shrink_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair (…, m, rank), (…, rank, n) whose product is nearest to ``left @ right`` (…, m, d)·(…, d, n).

    By the SVD of the product, its singular values shared equally between both factors.
    """
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    root = s[..., :rank].sqrt()
    # a product of lower rank than asked for (narrow tokens) is padded with zeros
    missing = rank - root.shape[-1]
    new_left = F.pad(u[..., :rank] * root.unsqueeze(-2), (0, max(0, missing)))
    new_right = F.pad(root.unsqueeze(-1) * vh[..., :rank, :], (0, 0, 0, max(0, missing)))
    return new_left, new_right


def energy_kept(x: Tensor, num_kept: int) -> Tensor:
    """Share of the energy of tokens in their first DCT coefficients: ``Σ_{k<C'} x̂_k² / Σ_k x̂_k²``, in [0, 1].

    >>> energy_kept(torch.ones(2, 5, 8), 1)     # a constant has one coefficient
    tensor(1.)

    Args:
        x: (…, C) tokens as the projections see them (after the norm).
        num_kept: C', 1 to C.

    Raises: BadInput if ``num_kept`` is not in that range.
    """
    width = x.shape[-1]
    if not 1 <= num_kept <= width:
        raise BadInput(f"num_kept={num_kept} must be 1 to {width}, the width of the tokens.")
    power = (x.double() @ dct_matrix(width, torch.float64, x.device).T).square()
    return (power[..., :num_kept].sum() / power.sum().clamp(min=torch.finfo(power.dtype).tiny)).to(x.dtype)


@torch.no_grad()
def report_energy(model: nn.Module, images: Tensor, tau: float = 0.75) -> dict[str, float]:
    """Share of the token energy that DCT attention with ratio τ would keep, per block, on real images.

    Args:
        model: a host (or a wrapper around one) with standard attention, before the swap.
        images: (B, C, H, W).
        tau: share of the coefficients.

    Returns: ``{"blocks.0.attn": 0.91, …}``; what is missing to 1 is lost. The model is left as found.
    """
    from vitkit.anatomy import host, linear_inputs, untouched

    vit = host(model)
    attns = {
        f"blocks.{i}.attn": block.attn
        for i, block in enumerate(vit.blocks)
        if isinstance(block.attn, Attention) and not isinstance(block.attn, DCTAttention)
    }
    shares: dict[str, float] = {}

    def record(name: str, x: Tensor) -> None:
        owner = name.rpartition(".")[0]
        heads = attns[owner].num_heads
        shares[owner] = float(energy_kept(x, heads * kept_per_head(x.shape[-1], heads, tau)))

    if not attns:
        raise BadInput("report_energy needs blocks with standard attention; call it before the swap.")
    # separate projections (q_proj, k_proj, v_proj) all see the same tokens
    layers = [f"{name}.{'q_proj' if attn.qkv is None else 'qkv'}" for name, attn in attns.items()]
    with untouched(model), linear_inputs(vit, layers, record):
        model(images)
    return shares


def mixer_flops(dim: int, num_heads: int, num_tokens: int, tau: float | None = None) -> int:
    """Multiplications of one attention layer for one image, counted; ``tau=None`` is standard attention.

    Per token the projections take 4C², or τ-dependent ``CC' + 3C'² + C'C`` with the DCT; the two products 2·n²·width.
    """
    width = dim if tau is None else num_heads * kept_per_head(dim, num_heads, tau)
    transform = 0 if tau is None else dim * width
    return num_tokens * (transform + 3 * width**2 + width * dim) + 2 * num_tokens**2 * width
