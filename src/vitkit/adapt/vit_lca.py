"""ViT-LCA: a frozen ViT whose classifier is a competition among training features."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy import host
from vitkit.compress.change import Change
from vitkit.compress.cost import count_params
from vitkit.errors import BadInput
from vitkit.models.lca import THRESHOLDS, Codes, check_eta, lca, optimality_gap, stable_eta, update_dictionary

# B images · d width of the features · M atoms · K classes

READS = ("max", "sum", "nn")
#: share of all activation that stands for none, so that a class without active atoms has a finite logit
_NONE = 1e-3


class LCAHead(nn.Module):
    """Features → sparse codes over M atoms that each have a label → logits.

    With v_k the activation of class k, the largest of its atoms ("max") or their sum ("sum"), the logits are
    ``log((v_k + ε)/Σ_j (v_j + ε))``, so that softmax gives the shares of the activation. "nn" is a network
    ``a/max(a) → 1000 ReLU → K``.

    Args:
        dim: d. atoms: M. num_classes: K. read: "max", "sum" or "nn".
        lam, lam_rel, kind, eta, steps, max_steps, tol: see :func:`vit_lca`.
        hidden: width of the network of "nn".

    Shape: (B, d) → (B, K).
    Attributes: dictionary (M, d), rows of length 1, and atom_labels (M,), buffers that :func:`vit_lca` fills.
    """

    dictionary: Tensor
    atom_labels: Tensor

    def __init__(
        self,
        dim: int,
        atoms: int,
        num_classes: int,
        read: str = "max",
        lam: float | None = None,
        lam_rel: float = 0.1,
        kind: str = "positive",
        eta: float | None = None,
        steps: int | None = None,
        max_steps: int = 5000,
        tol: float = 1e-6,
        hidden: int = 1000,
    ) -> None:
        super().__init__()
        self.num_classes, self.read, self.lam, self.lam_rel, self.kind = num_classes, read, lam, lam_rel, kind
        self.eta, self.steps, self.max_steps, self.tol = eta, steps, max_steps, tol
        self.register_buffer("dictionary", torch.zeros(atoms, dim))
        self.register_buffer("atom_labels", torch.zeros(atoms, dtype=torch.long))
        self.net: nn.Module | None = None
        if read == "nn":
            self.net = nn.Sequential(nn.Linear(atoms, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def encode(self, features: Tensor) -> Codes:
        """The codes of features (B, d), see :func:`vitkit.models.lca.lca`."""
        # the competition needs more digits than bfloat16 has
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        atoms = F.normalize(self.dictionary.to(wide.dtype), dim=1)
        lam = self.threshold_of(wide, atoms)
        return lca(wide, atoms, lam, self.kind, self.eta, self.steps, self.max_steps, self.tol, check=False)

    def threshold_of(self, features: Tensor, atoms: Tensor) -> float | Tensor:
        """λ, one for all or (B,)."""
        return self.lam if self.lam is not None else self.lam_rel * (features @ atoms.T).abs().amax(1)

    def gap(self, features: Tensor, codes: Tensor) -> Tensor:
        """(B,) how far the codes of features are from rest, see :func:`vitkit.models.lca.optimality_gap`."""
        atoms = F.normalize(self.dictionary.to(codes.dtype), dim=1)
        features = features.to(codes.dtype)
        return optimality_gap(features, atoms, codes, self.threshold_of(features, atoms), self.kind)

    def read_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, M) → logits (B, K)."""
        if self.net is not None:
            weight = self.net[0].weight  # type: ignore[union-attr]
            peak = codes.abs().amax(1, keepdim=True).clamp(min=torch.finfo(codes.dtype).tiny)
            return self.net((codes / peak).to(weight.dtype)).to(codes.dtype)
        values = codes.clamp(min=0).new_zeros(len(codes), self.num_classes)
        owner = self.atom_labels.expand(len(codes), -1)
        # a two-sided code speaks for its class by its positive part
        values = values.scatter_reduce(1, owner, codes.clamp(min=0), "amax" if self.read == "max" else "sum")
        none = _NONE * values.sum(1, keepdim=True).detach() / self.num_classes
        values = values + none.clamp(min=torch.finfo(values.dtype).tiny)
        return (values / values.sum(1, keepdim=True)).log()

    def forward(self, features: Tensor) -> Tensor:
        return self.read_codes(self.encode(features).codes).to(features.dtype)

    def extra_repr(self) -> str:
        lam = f"lam={self.lam}" if self.lam is not None else f"lam_rel={self.lam_rel}"
        return f"atoms={len(self.dictionary)}, read={self.read!r}, {lam}, kind={self.kind!r}"


def vit_lca(
    model: nn.Module,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    atoms: int = 400,
    read: str = "max",
    lam: float | None = None,
    lam_rel: float = 0.1,
    kind: str = "positive",
    eta: float | None = None,
    steps: int | None = None,
    max_steps: int = 5000,
    tol: float = 1e-6,
    hidden: int = 1000,
    epochs: int = 50,
    learn: int = 0,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> tuple[nn.Module, Change]:
    """Replace a ViT's classifier by sparse coding of its features over features of training images.

    The atoms Φ (M × d) are features s of M training images, drawn evenly from the classes and brought to length 1. The
    Locally Competitive Algorithm codes a new image's features: leaky neurons u with ``b = Φs``, ``a = T_λ(u)``,
    ``u ← u + η [b − (ΦΦᵀ − I) a − u]``, until they rest. The class is read from the active atoms. Nothing in the ViT is
    trained. What this would cost on neuromorphic hardware: ``competition_energy`` in
    :mod:`vitkit.models.diagnostics.spike_energy`.

    Args:
        model: holds a plain ViT with a classifier; it is not changed.
        images: (N, C, H, W) training images in the model's own pixel range. labels: (N,) their classes.
        atoms: M; at most as many as there are images, for ``read="nn"`` half as many. A study gives
            ``protocol.calibration`` images.
        read: "max", the class of the strongest atom; "sum", the class with the largest total; "nn", a network on the
            codes, trained with Adam (1e-3) on the images that are no atoms.
        lam: λ in units of the features (the authors' code has 2, for ViT-B); None uses ``lam_rel``.
        lam_rel: λ as a share of the largest |b| of each image, in [0, 1). Default 0.1.
        kind: T_λ, "positive" max(u − λ, 0), "two-sided" or "hard".
        eta: η; None: ``min(0.1, 1/λ_max(ΦΦᵀ))``.
        steps: exactly so many; None until at rest. ``steps=50, eta=0.01, lam=2`` is the authors' code, which stops far
            from the rest.
        max_steps: at most.
        tol: of the stop rule ``‖Δu‖ ≤ tol·η·‖u‖``.
        hidden: width of the network of "nn".
        epochs: of its training.
        learn: passes of dictionary learning ``Φ ← Φ + μ a(s − Φᵀa)ᵀ`` over all images; 0 keeps the features.
        learning_rate: μ.
        seed: of the draw of atoms and the training of "nn".

    Returns: the new model, and the :class:`Change`; its details say which share of the atoms is active, which share of
        the images came to rest within ``max_steps``, and how far from it they are on average (``gap``).

    Raises:
        TypeError: there is no plain ViT in ``model``.
        BadInput: images or labels are missing or unfit, the ViT has a readout of its own, an option is out of range.

    Paper: ViT-LCA: A Neuromorphic Approach for Vision Transformers, arXiv:2411.00140.
    Departs from the paper: atoms are balanced over classes, where the authors' code takes the first M features; the
        dynamics run to their fixed point; λ relative to the drive, and logits as logarithms of shares, are ours.
    """
    _check(images, labels, atoms, read, lam, lam_rel, kind, learn, epochs, hidden)
    assert images is not None and labels is not None
    new = deepcopy(model)
    vit = host(new)
    if getattr(vit, "read_out", None) is not None:
        raise BadInput(f"vit-lca replaces the classifier, but this ViT reads out by {type(vit.read_out).__name__}.")
    if isinstance(vit.head, LCAHead):
        raise BadInput("This model already classifies by sparse coding; give vit-lca the model before that.")
    labels = labels.long()
    num_classes = vit.num_classes or int(labels.max()) + 1
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise BadInput(
            f"labels go from {int(labels.min())} to {int(labels.max())}; this model's classes are 0 to "
            f"{num_classes - 1}."
        )
    features = _features(new, vit, images)
    labels = labels.to(features.device)
    count = min(atoms, len(features) // 2 if read == "nn" else len(features))
    chosen = _balanced(labels.cpu(), count, seed).to(features.device)
    per_class = torch.bincount(labels[chosen], minlength=num_classes)
    if int(per_class.min()) < 3:
        warnings.warn(
            f"vit-lca: class {int(per_class.argmin())} has {int(per_class.min())} of {count} atoms; a few per class "
            "are needed. Give more atoms, and training images of every class.",
            stacklevel=2,
        )
    options: dict[str, Any] = {
        "dim": features.shape[1], "atoms": count, "num_classes": num_classes, "read": read, "lam": lam,
        "lam_rel": lam_rel, "kind": kind, "eta": eta, "steps": steps, "max_steps": max_steps, "tol": tol,
        "hidden": hidden,
    }  # fmt: skip
    before = count_params(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LCAHead(**options).to(features.device)
    with torch.no_grad():
        head.dictionary.copy_(F.normalize(features[chosen], dim=1))
        head.atom_labels.copy_(labels[chosen])
        _learn(head, features, learn, learning_rate, seed)
        if eta is None:
            # known from here on, so that no forward pass has to look for it
            head.eta = options["eta"] = stable_eta(head.dictionary)
        else:
            check_eta(head.dictionary, eta)
        found = _encode(head, features)
    if read == "nn":
        rest = torch.ones(len(features), dtype=torch.bool, device=features.device)
        rest[chosen] = False
        _train(head, found.codes[rest], labels[rest], epochs, seed)
    restore(new, options)
    vit.head.load_state_dict(head.state_dict())
    change = Change(
        what=f"classifies by sparse coding over {count} training features ({read})",
        params_before=before,
        params_after=count_params(new),
        touched=("head",),
        lost="the linear classifier; classes without atoms cannot be found"
        if read != "nn"
        else "the linear classifier",
        details={
            "atoms": count,
            "atoms_per_class": per_class.tolist(),
            "active": float((found.codes != 0).float().mean()),
            "converged": float(found.converged.float().mean()),
            "gap": float(head.gap(features, found.codes).mean()),
            "steps": float(found.steps.float().mean()),
            "eta": head.eta,
            "realised": "no",
        },
    )
    return new, change


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Put an empty :class:`LCAHead` in place of the classifier, in place; its buffers come with the weights."""
    vit = host(model)
    like = next(vit.parameters())
    head = LCAHead(**options).to(like.device).train(vit.training)
    vit.head = head  # type: ignore[assignment]
    vit.num_classes = head.num_classes
    vit.applied = [*getattr(vit, "applied", []), {"name": "vit-lca", "options": options}]  # type: ignore[assignment]
    return model


def _check(
    images: Tensor | None,
    labels: Tensor | None,
    atoms: int,
    read: str,
    lam: float | None,
    lam_rel: float,
    kind: str,
    learn: int,
    epochs: int,
    hidden: int,
) -> None:
    if images is None or labels is None:
        missing = " and ".join(n for n, v in (("images", images), ("labels", labels)) if v is None)
        raise BadInput(
            f"vit-lca makes its dictionary of labelled training features and got no {missing}; call "
            "vit_lca(model, images, labels) with training images (N, C, H, W) and their classes (N,)."
        )
    whole = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()
    if not whole or len(labels) != len(images) or len(images) < 2:
        raise BadInput(
            f"vit-lca needs one whole number per image as its class, for at least two images; it got labels of shape "
            f"{tuple(labels.shape)} ({labels.dtype}) for {len(images)} images. It classifies into exclusive classes; "
            "several labels per image, or numbers to predict, are not supported."
        )
    if read not in READS or kind not in THRESHOLDS:
        raise BadInput(f"vit-lca: read={read!r} must be one of {READS} and kind={kind!r} one of {THRESHOLDS}.")
    if atoms < 1 or (lam is not None and lam < 0) or not 0 <= lam_rel < 1 or learn < 0 or epochs < 1 or hidden < 1:
        raise BadInput(
            f"vit-lca: atoms={atoms}, epochs={epochs} and hidden={hidden} must be at least 1, lam={lam} and "
            f"learn={learn} at least 0, lam_rel={lam_rel} in [0, 1)."
        )


@torch.no_grad()
def _features(model: nn.Module, vit: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of ``vit`` gets, (N, d), in eval mode."""
    modes = [m.training for m in model.modules()]
    head, vit.head = vit.head, nn.Identity()
    like = next(vit.parameters())
    model.eval()
    try:
        return torch.cat([model(part.to(like.device, like.dtype)).float() for part in images.split(64)])
    finally:
        vit.head = head
        for module, mode in zip((m for m in model.modules()), modes):
            module.training = mode


def _balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` items, the same number of each class as far as there are any."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    # the how-manieth of its class each item is; taking by that goes round the classes in turn
    one_hot = F.one_hot(shuffled)
    turn = (one_hot.cumsum(0) * one_hot).sum(1)
    return order[turn.argsort(stable=True)[:count]].sort().values


def _encode(head: LCAHead, features: Tensor) -> Codes:
    parts = [head.encode(part) for part in features.split(256)]
    return Codes(*(torch.cat([getattr(p, name) for p in parts]) for name in Codes.__dataclass_fields__))


def _learn(head: LCAHead, features: Tensor, passes: int, mu: float, seed: int) -> None:
    """Dictionary learning on the features at length 1, so that μ means the same for every ViT."""
    order = torch.Generator().manual_seed(seed)
    for _ in range(passes):
        for at in torch.randperm(len(features), generator=order).split(64):
            batch = features[at.to(features.device)]
            length = batch.norm(dim=1, keepdim=True).clamp(min=1e-12)
            codes = head.encode(batch).codes
            head.dictionary.copy_(update_dictionary(head.dictionary, batch / length, codes / length, mu))


def _train(head: LCAHead, codes: Tensor, labels: Tensor, epochs: int, seed: int, batch: int = 64) -> None:
    """The network of "nn" on fixed codes."""
    assert head.net is not None
    optimizer = torch.optim.Adam(head.net.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(epochs):
            for at in torch.randperm(len(codes), generator=order).split(batch):
                here = at.to(codes.device)
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(head.read_codes(codes[here]), labels[here]).backward()
                optimizer.step()
    optimizer.zero_grad(set_to_none=True)


__all__ = ["LCAHead", "restore", "vit_lca"]
