"""Training point networks on several domains: other domains' features are mixed in, clouds are scanned in pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.backbones.point_dg_mamba import PointDGMamba, PointState, PointTokens
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.normalized import to_model_space
from vitkit.models.vit import collect_aux

# B batch · C classes · M source domains · G tokens · D channels · P pairs


class PointDG(nn.Module):
    """PointDGMamba's training on labelled clouds of several domains: SCFA and DDS around the network.

    Loss: ``CE(single) + intra · CE(intra) + cross · CE(cross)`` and the network's own (its mask). ``single`` is what
    the network answers in evaluation. The other two are dual-level domain scanning (DDS) of pairs within the batch:

    - intra: two clouds of one domain, one sequence after the other,
    - cross: two clouds of one class from different domains, token by token in turn;

    the tokens that come back are averaged with those of the single scan, and both clouds are classified. What is
    scanned in pairs has gone through sequence-wise cross-domain feature aggregation (SCFA): per class and domain a
    prototype sequence P (G, D) is kept, a moving average of the tokens in canonical order; a token of class c and
    domain d attends to ``P[c, d′ ≠ d]`` at its own place, ``x ← x + γ · attention``, with a learned γ that starts at 0.

    Pairs are drawn anew in every call, each cloud in at most one of each kind. Clouds without a partner are in
    CE(single) only. In eval mode there is CE(single) alone, and ``domain`` is not needed. The network itself
    (:meth:`encoder`) has none of this, and needs neither labels nor domains.

    The paper's scale of training: AdamW, learning rate 5e-4, weight decay 0.05, 200 epochs, batches of 32, and
    :func:`~vitkit.data.point_domains.augment_points`. Draw batches that hold all domains.

    Args:
        model: a :class:`~vitkit.models.backbones.point_dg_mamba.PointDGMamba`, or a wrapper around one; trained in
            place.
        num_domains: M, domains of the training data; ``domain`` counts from 0.
        intra, cross: weights of the losses of the two scans; 0 leaves a scan out.
        aggregate: False leaves SCFA out.
        momentum: of the prototypes, in [0, 1).

    Shape: batch ``{"points": (B, n, 3) or "images": (B, C, H, W) in [0, 1], "target": (B,), "domain": (B,)}`` →
        ``{"loss", "output": (B, C) logits of the single scan, "logs"}``. ``labels`` is taken for ``target`` too.

    Raises: TypeError if the model holds no PointDGMamba. BadInput for a batch without what is needed, labels out of
        range, or clouds with fewer points than tokens (their prototypes would have no place).

    Paper: PointDGMamba: Domain Generalization of Point Cloud Classification via Generalized State Space Model,
        arXiv:2408.13574.
    Departs from the paper: known by its abstract. The form of prototypes and attention, the pairing and the weights are
        ours. The single scan gets tokens without SCFA, as in evaluation: what is mixed in is chosen by the label, and a
        network that always saw it would learn to read the label there.
    """

    prototypes: Tensor
    seen: Tensor

    def __init__(
        self,
        model: nn.Module,
        num_domains: int = 3,
        intra: float = 1.0,
        cross: float = 1.0,
        aggregate: bool = True,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        net = find_network(model)
        if num_domains < 1 or not 0 <= momentum < 1 or min(intra, cross) < 0:
            raise BadInput(
                f"PointDG needs at least one domain, momentum in [0, 1) and weights of at least 0: "
                f"num_domains={num_domains}, momentum={momentum}, intra={intra}, cross={cross}."
            )
        if net.num_classes < 2:
            raise BadInput(f"PointDG trains a classifier; the network has num_classes={net.num_classes}.")
        self.model, self.intra, self.cross, self.momentum = model, intra, cross, momentum
        like = next(net.parameters())
        self.attend: CrossAttention | None = None
        if aggregate:
            self.attend = CrossAttention(net.num_features, 1).to(like.device, like.dtype)
            self.gamma = nn.Parameter(torch.zeros((), device=like.device, dtype=like.dtype))
            shape = (net.num_classes, num_domains, net.groups)
            # float32: a moving average loses its small steps in half precision
            self.register_buffer("prototypes", torch.zeros(*shape, net.num_features, device=like.device))
            self.register_buffer("seen", torch.zeros(shape, dtype=torch.bool, device=like.device))
        self.num_domains = num_domains
        self._pending: tuple[Tensor, Tensor] | None = None

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        net, target = self.network, self._target(batch)
        with collect_aux(self.model) as aux:
            tokens = net.tokenise(self._inputs(batch))
            single = net.scan(net.serialise(tokens))
        output = net.forward_head(net.features(single))
        loss = F.cross_entropy(output.float(), target)
        logs = {"single": loss.detach()}
        if self.training:
            domain = self._domain(batch, len(target))
            mixed = tokens
            if self.attend is not None:
                mixed = tokens._replace(x=self.aggregate(tokens, target, domain))
                self._remember(tokens, target, domain)
                logs["gamma"] = self.gamma.detach()
            for name, weight, how in (("intra", self.intra, "sequential"), ("cross", self.cross, "interleave")):
                if weight:
                    pairs = same_domain_pairs(domain) if name == "intra" else same_class_pairs(target, domain)
                    value = self._pair_loss(net.serialise(mixed), single, target, pairs, how)
                    loss = loss + weight * value
                    logs[name] = value.detach()
        for (name, _), value in aux.items():
            loss = loss + value
            logs[name] = value.detach()
        return {"loss": loss, "output": output, "logs": logs}

    @property
    def network(self) -> PointDGMamba:
        return find_network(self.model)

    def encoder(self) -> nn.Module:
        """The trained model; it has no part in prototypes or pairs."""
        return self.model

    # -- SCFA ---------------------------------------------------------------------------------------------------

    def aggregate(self, tokens: PointTokens, target: Tensor, domain: Tensor) -> Tensor:
        """``x + γ · attention`` of every token to the prototypes of its class, at its place, from other domains.

        A token for which there are none yet stays as it is. Shape: (B, G, D).
        """
        if self.attend is None:
            raise BadInput("This PointDG was made with aggregate=False and has no prototypes.")
        x = tokens.x
        other = torch.arange(self.num_domains, device=x.device) != domain.unsqueeze(1)
        # (B, G, M)
        mask = (self.seen[target] & other.unsqueeze(2)).transpose(1, 2)
        values = self.prototypes[target].transpose(1, 2).to(x.dtype)
        found = self.attend(
            x.reshape(-1, 1, x.shape[2]), values.flatten(0, 1), mask=mask.reshape(-1, 1, 1, mask.shape[2])
        )
        return x + self.gamma * found.view(x.shape)

    @torch.no_grad()
    def _remember(self, tokens: PointTokens, target: Tensor, domain: Tensor) -> None:
        """Sums of the batch's tokens by class, domain and place, without masked ones, until the step is taken."""
        cell = target * self.num_domains + domain
        classes, domains, places, width = self.prototypes.shape
        keep = (torch.ones_like(tokens.x[..., 0]) if tokens.keep is None else tokens.keep).float()
        sums = torch.zeros(classes * domains, places, width, device=cell.device)
        sums = sums.index_add_(0, cell, tokens.x.float() * keep.unsqueeze(2))
        counts = torch.zeros(classes * domains, places, device=cell.device).index_add_(0, cell, keep)
        if self._pending is not None:
            sums, counts = sums + self._pending[0], counts + self._pending[1]
        self._pending = sums, counts

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Moves the prototypes by what the batches since the last step showed; called by the training loop.

        ``P ← momentum · P + (1 − momentum) · mean``, and the mean itself the first time, at each place of its own.
        """
        if self._pending is None:
            return
        sums, counts = self._pending[0].view_as(self.prototypes), self._pending[1].view_as(self.seen)
        self._pending = None
        mean = sums / counts.clamp(min=1).unsqueeze(3)
        rate = torch.where(self.seen, 1 - self.momentum, 1.0) * (counts > 0)
        self.prototypes.lerp_(mean, rate.unsqueeze(3))
        self.seen |= counts > 0

    # -- DDS ----------------------------------------------------------------------------------------------------

    def _pair_loss(
        self, mixed: PointState, single: PointState, target: Tensor, pairs: tuple[Tensor, Tensor], how: str
    ) -> Tensor:
        """Cross-entropy of both clouds of all pairs; 0 without a pair."""
        if not len(pairs[0]):
            return mixed.x.sum() * 0.0
        net = self.network
        together = net.scan_pair(mixed.take(pairs[0]), mixed.take(pairs[1]), how)
        losses = []
        for state, index in zip(together, pairs):
            averaged = state._replace(x=(state.x + single.x[index]) / 2)
            losses.append(F.cross_entropy(net.forward_head(net.features(averaged)).float(), target[index]))
        return (losses[0] + losses[1]) / 2

    # -- the batch ----------------------------------------------------------------------------------------------

    def _inputs(self, batch: dict[str, Any]) -> Tensor:
        if "points" in batch:
            inputs = batch["points"]
        elif "images" in batch:
            inputs = to_model_space(self.model, batch["images"])
        else:
            raise BadInput(f"PointDG needs points (B, n, 3) or images in the batch; it holds {', '.join(batch)}.")
        points = self.network.as_points(inputs)
        if points.ndim == 3 and points.shape[1] < self.network.groups and self.attend is not None:
            raise BadInput(
                f"Clouds of {points.shape[1]} points make fewer tokens than the {self.network.groups} of the "
                f"prototypes; create the network with groups={points.shape[1]} or fewer."
            )
        return points

    def _target(self, batch: dict[str, Any]) -> Tensor:
        target = batch.get("target", batch.get("labels"))
        if target is None:
            raise BadInput(f"PointDG needs target (B,) in the batch, class numbers; it holds {', '.join(batch)}.")
        return _numbers(target, self.network.num_classes, "target", "classes of the network")

    def _domain(self, batch: dict[str, Any], count: int) -> Tensor:
        if "domain" not in batch:
            raise BadInput(
                f"PointDG trains on domain (B,), numbers of the domains, and the batch holds {', '.join(batch)}; "
                "vitkit.data.point_domains gives them."
            )
        domain = _numbers(batch["domain"], self.num_domains, "domain", "num_domains of PointDG")
        if len(domain) != count:
            raise BadInput(f"The batch has {count} targets and {len(domain)} domains; give one of each per cloud.")
        return domain


def find_network(model: nn.Module) -> PointDGMamba:
    """The PointDGMamba in ``model``.

    Raises: TypeError if there is none.
    """
    for module in model.modules():
        if isinstance(module, PointDGMamba):
            return module
    raise TypeError(
        f"PointDG trains a PointDGMamba, and {type(model).__name__} holds none; make one with "
        'timm.create_model("point_dg_mamba_femto").'
    )


def same_domain_pairs(domain: Tensor) -> tuple[Tensor, Tensor]:
    """Random pairs of the batch within one domain: (P,) and (P,) indices, no sample twice, at most one a domain left.

    Args:
        domain: (B,).
    """
    order = torch.randperm(len(domain), device=domain.device)
    order = order[domain[order].argsort(stable=True)]
    sorted_ = domain[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_, sorted_)
    first = ((rank[:-1] % 2 == 0) & (sorted_[1:] == sorted_[:-1])).nonzero().squeeze(1)
    return order[first], order[first + 1]


def same_class_pairs(target: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
    """Random pairs of one class and different domains: (P,) and (P,) indices, no sample twice, as many as there can be.

    Within a class the samples stand by domain, and each of the first half goes with the one half the class further on,
    which is of its own domain only if that domain holds more than half of them. Which of the two is first is drawn.

    Args:
        target, domain: (B,).
    """
    order = torch.randperm(len(target), device=target.device)
    order = order[domain[order].argsort(stable=True)]
    order = order[target[order].argsort(stable=True)]
    sorted_ = target[order]
    start, end = torch.searchsorted(sorted_, sorted_), torch.searchsorted(sorted_, sorted_, right=True)
    size, place = end - start, torch.arange(len(order), device=order.device)
    at = (place - start < size // 2).nonzero().squeeze(1)
    first, second = order[at], order[at + (size[at] + 1) // 2]
    apart = domain[first] != domain[second]
    first, second = first[apart], second[apart]
    swap = torch.rand(len(first), device=order.device) < 0.5
    return torch.where(swap, second, first), torch.where(swap, first, second)


@torch.no_grad()
def accuracy_by_domain(
    model: nn.Module, points: Tensor, target: Tensor, domain: Tensor, domains: tuple[str, ...], batch: int = 64
) -> dict[str, float]:
    """The score of the protocols: accuracy on the clouds of each held-out domain, and the mean of these as "mean".

    Args:
        model: clouds (B, n, 3) → logits; its mode is restored. points: (N, n, 3). target: (N,).
        domain: (N,) positions in ``domains``, which names them; domains without a cloud are left out. batch: at a time.

    Raises: BadInput without clouds.
    """
    if not len(points):
        raise BadInput("There are no clouds to score; hold out a domain that has some.")
    was_training = model.training
    model.eval()
    try:
        right = torch.cat([model(part).argmax(-1) for part in points.split(batch)]) == target
    finally:
        model.train(was_training)
    found = {name: right[domain == i] for i, name in enumerate(domains)}
    scores = {name: float(hits.double().mean()) for name, hits in found.items() if len(hits)}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def _numbers(values: Tensor, count: int, name: str, of: str) -> Tensor:
    low, high = (int(v) for v in values.aminmax()) if len(values) else (0, 0)
    if values.ndim != 1 or values.is_floating_point() or low < 0 or high >= count:
        raise BadInput(
            f"{name} of shape {tuple(values.shape)} runs from {low} to {high}; it must be (B,) whole numbers from 0 to "
            f"{count - 1}, one of the {count} {of}."
        )
    return values
