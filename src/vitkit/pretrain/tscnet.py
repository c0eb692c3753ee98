"""Learning from labels without learning the background: two stages for long-tailed classes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy.host import host
from vitkit.errors import BadInput
from vitkit.models.counterfactual import (
    Counterfactual,
    attention_block,
    background_logits,
    both_logits,
    foreground,
    run,
    watch,
)
from vitkit.models.graph import kmeans
from vitkit.models.labels import known_labels
from vitkit.models.layout import TokenLayout
from vitkit.models.normalized import to_model_space
from vitkit.models.vit import ViT, collect_aux
from vitkit.tasks.classify import Classify
from vitkit.tasks.long_tail import group_accuracy
from vitkit.train.supervised import Supervised

# B batch · N patches · P prefix tokens · D width · K classes · M confounders · n draws

NAME = "tscnet"
GAMMA_MAX = 10.0


class TSCNet(Supervised):
    """Supervised training in two stages that intervenes on backgrounds, then recalibrates; it replaces plain training.

    **Stage 1** learns the representation, ``CE(z) + λ_p L_patch + λ_f L_feat``:

    - The foreground of an image are the fewest patches that get ``mass`` of the last attention of the class token
      (without one: of all patches), seen by a moving average of the model.
    - L_patch: between embedding and first block, background tokens are replaced by those that an image of *another*
      class has at the same places (where both are background), in n draws: ``mean CE + λ_c KL`` between the draws.
    - L_feat: ``CE(U [f; Σ_k P(k) softmax_k(fᵀ W d_k) d_k])`` with f the mean of the foreground's last tokens and d_k,
      P(k) the centres and shares of k-means on mean background tokens, found anew after every epoch.
    - The first ``warmup`` epochs have plain CE. An image without background, or without a partner, has no
      intervention.

    **Stage 2**, the last ``recalibration`` of the epochs, trains the read-out (final norm and head) by
    ``CE(z + τ log π̂)`` on a frozen or slowed backbone; the head's biases are lowered by τ log π̂ at its start, so that
    the loss goes on where stage 1 ended. π̂ starts as the class shares and moves after every epoch by
    ``π̂_c ∝ π̂_c^{1−η} p̄_c^η``, p̄ being the mean prediction on a class-balanced hold-out. There γ ≥ 0 is fitted too, by
    likelihood, for every validation and for the final weights: the trained model answers ``z − γ z_cf``, z_cf being
    its logits for the background alone.

    In a study ``tscnet`` takes the place of the supervised training, with the same epochs, settings and validation.
    From Python::

        objective = TSCNet(model)
        history = fit(objective, objective.hold_out(loader), val_loader, settings=…)
        model = objective.encoder()

    Args:
        model: a ViT or a wrapper around one, trained in place.
        task: single-label classification; None: plain cross-entropy over the model's outputs.
        recalibration: share of the epochs for stage 2, in [0, 1); at least one epoch if there are two.
        warmup: epochs without intervention, at most a third of stage 1.
        mass: of the attention that makes the foreground, in (0, 1]; 1: there is no background.
        draws: n.
        patch: λ_p, weight of L_patch; 0 leaves it out.
        consistency: λ_c, weight of the KL between draws.
        feature: λ_f, weight of L_feat; 0 leaves it out.
        confounders: M centres.
        tau: τ.
        eta: η in [0, 1]; 0 keeps the class shares.
        gamma: γ; None fits it, 0 does without a second pass.
        backbone_lr: factor of the backbone's learning rate in stage 2; 0 freezes it, 0.1 slows it.
        holdout: share of every class that :meth:`hold_out` takes, of classes with 4 images or more; at most 50 images.
        ema: decay of the moving average.
        seed: of the hold-out.

    Shape: batch ``{"images": (B, C, H, W) in [0, 1], "labels": (B,)}`` → ``{"loss", "output": z (B, K), "logs"}``.
    Raises: TypeError when the model holds no ViT; BadInput for arguments outside their range, another task, a host
        without attention weights, merged or dropped tokens before the first block.

    Mixup is not applied: an image of two has no background. ``early_stop`` counts the epochs of both stages, and may
    end the training before the second. Without :meth:`hold_out` the class shares are counted in the first epoch, π̂
    stays, and γ is 0 unless given.

    Paper: Empowering Vision Transformers with Multi-Scale Causal Intervention for Long-Tailed Image Classification,
        arXiv:2505.08173.
    Departs from the paper: known by its abstract. Source of the mask, rule of the swap, dictionary, adaptive prior, the
        biases that stage 2 starts from, and all weights are ours. At test time the mask comes from the model itself,
        not from its moving average.
    """

    #: a study runs it in place of the training from labels
    supervised = True
    #: see above
    soft_labels = None  # type: ignore[assignment]
    log_prior: Tensor
    counts: Tensor
    recalibrated: Tensor
    dictionary: Tensor
    shares: Tensor
    bank: Tensor
    seen: Tensor
    steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        task: Any = None,
        recalibration: float = 0.3,
        warmup: int = 5,
        mass: float = 0.6,
        draws: int = 2,
        patch: float = 1.0,
        consistency: float = 1.0,
        feature: float = 1.0,
        confounders: int = 64,
        tau: float = 1.0,
        eta: float = 0.1,
        gamma: float | None = None,
        backbone_lr: float = 0.0,
        holdout: float = 0.1,
        ema: float = 0.999,
        seed: int = 0,
    ) -> None:
        vit = host(model)
        num_classes = vit.num_classes
        if task is None and num_classes > 1:
            task = Classify([str(c) for c in range(num_classes)])
        if not getattr(task, "classes", ()) or getattr(task, "multilabel", False):
            raise BadInput("TSCNet is about classes of which an image has one; train for other tasks without it.")
        super().__init__(model, task)
        for name, value, holds, allowed in (
            ("recalibration", recalibration, 0 <= recalibration < 1, "in [0, 1)"),
            ("warmup", warmup, warmup >= 0, "0 or more"),
            ("mass", mass, 0 < mass <= 1, "in (0, 1]"),
            ("draws", draws, draws >= 1, "at least 1"),
            ("confounders", confounders, confounders >= 1, "at least 1"),
            ("eta", eta, 0 <= eta <= 1, "in [0, 1]"),
            ("gamma", gamma, gamma is None or gamma >= 0, "0 or more, or None"),
            ("backbone_lr", backbone_lr, 0 <= backbone_lr <= 1, "in [0, 1]"),
            ("holdout", holdout, 0 < holdout < 1, "in (0, 1)"),
            ("ema", ema, 0 <= ema < 1, "in [0, 1)"),
        ):
            if not holds:
                raise BadInput(f"{name}={value} must be {allowed}.")
        attention_block(vit)
        self.recalibration, self.warmup, self.mass, self.draws = recalibration, warmup, mass, draws
        self.patch, self.consistency, self.feature = patch, consistency, feature
        self.tau, self.eta, self.backbone_lr = tau, eta, backbone_lr
        self.fixed_gamma, self.holdout, self.ema, self.seed = gamma, holdout, ema, seed
        dim, like = vit.embed_dim, next(vit.parameters())
        self.teacher = copy.deepcopy(vit).eval().requires_grad_(False)
        self.relate = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.relate.weight, std=dim**-0.5)
        self.causal_head = nn.Linear(2 * dim, task.num_outputs)
        nn.init.trunc_normal_(self.causal_head.weight, std=0.02)
        nn.init.zeros_(self.causal_head.bias)
        num_classes = task.num_outputs
        self.register_buffer("log_prior", torch.full((num_classes,), -math.log(num_classes)))
        self.register_buffer("counts", torch.zeros(num_classes))
        # travels with the weights: the best epoch may be one of stage 1
        self.register_buffer("recalibrated", torch.zeros((), dtype=torch.long))
        self.register_buffer("dictionary", torch.zeros(confounders, dim))
        # all zero: there is no dictionary yet
        self.register_buffer("shares", torch.zeros(confounders))
        self.register_buffer("bank", torch.zeros(max(1024, 4 * confounders), dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.to(like.device)
        for module in (self.relate, self.causal_head):
            module.to(like.dtype)
        self.epoch: int | None = None
        self.epochs: int | None = None
        self.held: _Held | None = None
        self.before_step: list[Tensor] | None = None
        self._gamma = 0.0

    # -- schedule ------------------------------------------------------------------------------------------------

    @property
    def first_epochs(self) -> int:
        """Epochs of stage 1."""
        total = self.epochs or 1
        if not self.recalibration or total < 2:
            return total
        return total - min(total - 1, max(1, round(self.recalibration * total)))

    @property
    def stage(self) -> int:
        """1 or 2."""
        return 2 if self.epoch is not None and self.epoch >= self.first_epochs else 1

    @property
    def warm_epochs(self) -> int:
        """Epochs without intervention."""
        return min(self.warmup, self.first_epochs // 3)

    def on_epoch(self, epoch: int, total: int) -> None:
        """Called by the training loop before every epoch."""
        self.epoch, self.epochs, self.before_step = epoch, total, None
        self.recalibrated.fill_(self.stage == 2)
        if epoch == self.first_epochs and total > epoch:
            self.log_prior.copy_(class_shares(self.counts).log())
            bias = getattr(host(self.model).head, "bias", None)
            if bias is not None and host(self.model).read_out is None:
                # the loss goes on where stage 1 ended; from the old biases a few epochs would not get there
                with torch.no_grad():
                    bias -= self.tau * self.log_prior

    def train(self, mode: bool = True) -> TSCNet:
        super().train(mode)
        # it is looked through, never trained
        self.teacher.eval()
        return self

    # -- the two losses ------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._recalibrate(batch) if self.stage == 2 else self._represent(batch)

    def _represent(self, batch: dict[str, Any]) -> dict[str, Any]:
        vit, labels = host(self.model), batch["labels"]
        if labels.ndim != 1:
            raise BadInput(f"Labels of shape {tuple(labels.shape)} are not one class number an image; leave mixup out.")
        if self.training and self.epoch in (None, 0) and self.held is None:
            self.counts += torch.bincount(labels, minlength=len(self.counts))
        images = to_model_space(self.model, batch["images"])
        with collect_aux(self.model) as aux, known_labels(self.model, labels):
            x, layout = vit.embed(images)
            self._require_grid(x, layout)
            logits, tokens, after = run(vit, x, layout)
        terms = [self._loss(logits, batch), *(value.float().sum() for value in aux.values())]
        logs = {"task_loss": terms[0].detach()}
        intervene = self.epoch is None or self.epoch >= self.warm_epochs
        # the last epoch of the warm-up fills the dictionary
        if intervene or self.epoch == self.warm_epochs - 1:
            fg = self.masks(images)
            if self.training:
                self._remember(self._pool(tokens, after, ~fg)[(~fg).any(1)])
            if intervene:
                zero = logits.new_zeros((), dtype=torch.float32)
                patch, alike = self._patch_loss(vit, x, layout, fg, batch) or (zero, zero)
                found = self._feature_loss(self._pool(tokens, after, fg), fg, batch)
                feature = zero if found is None else found
                terms += [self.patch * (patch + self.consistency * alike), self.feature * feature]
                logs |= {"patch_loss": patch.detach(), "consistency": alike.detach(), "feature_loss": feature.detach()}
        return {"loss": torch.stack(terms).sum(), "output": logits, "logs": logs}

    def _recalibrate(self, batch: dict[str, Any]) -> dict[str, Any]:
        vit, labels = host(self.model), batch["labels"]
        learns = self.backbone_lr > 0
        if self.training and learns and self.backbone_lr < 1 and self.before_step is None:
            self.before_step = [p.detach().clone() for p in self._backbone()]
        images = to_model_space(self.model, batch["images"])
        with collect_aux(self.model) as aux, known_labels(self.model, labels):
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
                x, layout = vit.embed(images)
                wants = vit.read_out is not None and getattr(vit.read_out, "wants_states", False)
                states: list[tuple[Tensor, TokenLayout]] | None = [] if wants else None
                tokens, after = vit.run(x, layout, states)
            logits = vit.readout(tokens, after, states)
        loss = self._loss(logits.float() + self.tau * self.log_prior, batch)
        terms = [loss, *(value.float().sum() for value in aux.values())]
        logs = {"task_loss": loss.detach()}
        return {"loss": torch.stack(terms).sum(), "output": logits, "logs": logs}

    def _loss(self, logits: Tensor, batch: dict[str, Any]) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return self.task.loss(logits.float(), batch)

    def _weighted(self, logits: Tensor, batch: dict[str, Any], weight: Tensor, times: int = 1) -> Tensor:
        """Loss of ``times`` answers (times·B, K) to a batch, images weighted by ``weight`` (B,) on top of their own."""
        own = batch.get("weights")
        weight = weight if own is None else weight * own.to(weight)
        return self._loss(logits, {"labels": batch["labels"].repeat(times), "weights": weight.repeat(times)})

    @torch.no_grad()
    def masks(self, images: Tensor) -> Tensor:
        """Normalised images → foreground (B, N) bool, as the moving average sees it."""
        x, layout = self.teacher.embed(images)
        return foreground(watch(self.teacher, x, layout).share, self.mass)

    def _patch_loss(
        self, vit: ViT, x: Tensor, layout: TokenLayout, fg: Tensor, batch: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """CE of the draws, and the KL between them, over images that a draw has changed; None without such images."""
        if not self.patch:
            return None
        labels, n = batch["labels"], self.draws
        partners = donors(labels, n)
        swapped, changed = swap_background(x, fg, partners, layout.num_prefix)
        active = changed.any(0).float()
        if not bool(active.any()):
            return None
        with known_labels(self.model, labels.repeat(n)):
            logits = run(vit, swapped.flatten(0, 1), _repeat(layout, n).replace(aux={}))[0]
        loss = self._weighted(logits, batch, active, n)
        apart = disagreement(logits.float().unflatten(0, (n, -1)))
        return loss, (apart * active).sum() / active.sum()

    def _feature_loss(self, f: Tensor, fg: Tensor, batch: dict[str, Any]) -> Tensor | None:
        if not self.feature or not bool(self.shares.any()):
            return None
        active = (~fg).any(1).float()
        if not bool(active.any()):
            return None
        logits = self.causal_head(torch.cat([f, self.context(f)], 1))
        return self._weighted(logits, batch, active)

    def context(self, f: Tensor) -> Tensor:
        """Foreground features (B, D) → ``Σ_k P(k) softmax_k(fᵀ W d_k) d_k`` (B, D), over the entries there are."""
        d, share = self.dictionary.to(f.dtype), self.shares.to(f.dtype)
        scores = (self.relate(f) @ d.T).masked_fill(share == 0, torch.finfo(torch.bfloat16).min)
        return (scores.softmax(1) * share) @ d

    def _pool(self, tokens: Tensor, layout: TokenLayout, mask: Tensor) -> Tensor:
        """Mean of normalised last tokens over the patches of ``mask`` (B, N) → (B, D)."""
        patches = layout.unmerge(tokens[:, layout.num_prefix :])
        patches = F.layer_norm(patches, patches.shape[-1:])
        weight = mask.to(patches.dtype).unsqueeze(-1)
        return (patches * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _require_grid(self, x: Tensor, layout: TokenLayout) -> None:
        layout.require_full_grid("TSCNet")
        if x.shape[1] - layout.num_prefix != layout.num_original:
            raise BadInput(
                f"TSCNet swaps patches by their places, and the tokenizer gives {x.shape[1] - layout.num_prefix} "
                f"tokens for a grid of {layout.num_original}; use one token per patch."
            )

    # -- confounders ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _remember(self, rows: Tensor) -> None:
        rows = rows[: len(self.bank)].float()
        at = (self.seen + torch.arange(len(rows), device=rows.device)) % len(self.bank)
        self.bank[at] = rows
        self.seen += len(rows)

    @torch.no_grad()
    def refresh(self) -> None:
        """New dictionary from the backgrounds seen since the last one: centres in the unit ball, and their shares."""
        rows = self.bank[: int(self.seen)]
        if len(rows) < 2:
            return
        k = min(len(self.dictionary), len(rows))
        again = bool(self.shares.all()) and k == len(self.dictionary)
        labels, centres = kmeans(rows[None], k, initial=self.dictionary[None, None] if again else None)
        self.dictionary.zero_()[:k] = centres[0]
        self.shares.zero_()[:k] = torch.bincount(labels[0], minlength=k) / len(rows)
        self.seen.zero_()

    # -- recalibration -------------------------------------------------------------------------------------------

    def hold_out(self, loader: Any) -> Any:
        """Set a class-balanced part of the training images aside, and return a loader of the others.

        Args:
            loader: of :func:`vitkit.data.make_loader`, or a list of batches.

        Raises: BadInput if a background alone cannot be answered and ``gamma`` is not 0.
        """
        own = hasattr(loader, "subset")
        labels = loader.labels if own else torch.cat([batch["labels"] for batch in loader])
        numbers = labels.cpu().numpy().astype(np.int64)
        self.counts.copy_(torch.bincount(torch.from_numpy(numbers), minlength=len(self.counts)))
        rows = held_rows(numbers, self.holdout, self.seed)
        rest = np.setdiff1d(np.arange(len(numbers)), rows)
        self.held = _Held([])
        if not len(rows):
            return loader
        if own:
            self.held, kept = _Held(loader.subset(rows, train=False)), loader.subset(rest)
        else:
            size = len(loader[0]["labels"])
            self.held, kept = _Held(_rebatch(loader, rows, size)), _rebatch(loader, rest, size)
        if self.fixed_gamma != 0:
            self._try_counterfactual(next(iter(self.held.batches)))
        return kept

    def _try_counterfactual(self, batch: dict[str, Any]) -> None:
        """A host that cannot answer a background alone should say so before the training, not at its end."""
        vit = host(self.model)
        with torch.no_grad():
            x, layout = vit.embed(to_model_space(self.model, batch["images"][:1].to(self.log_prior.device)))
            try:
                fg = torch.zeros(1, layout.num_original, dtype=torch.bool, device=x.device)
                fg[:, 0] = layout.num_original > 1
                background_logits(vit, x, layout, fg)
            except ValueError as error:
                raise BadInput(f"TSCNet's counterfactual: {error} Or use gamma=0, which does without.") from error

    def after_step(self, step: int, total: int) -> None:
        """Called by the training loop after every step."""
        if self.stage == 1:
            self._follow()
        elif self.before_step is not None:
            with torch.no_grad():
                # AdamW's and SGD's steps are proportional to the learning rate
                for p, old in zip(self._backbone(), self.before_step):
                    p.copy_(torch.lerp(old, p, self.backbone_lr))
            self.before_step = None
        if self.epochs and (step + 1) % max(1, total // self.epochs) == 0:
            self._end_epoch()

    @torch.no_grad()
    def _follow(self) -> None:
        self.steps += 1
        step = int(self.steps)
        decay = min(self.ema, (1 + step) / (10 + step))
        own = host(self.model).state_dict()
        for name, value in self.teacher.state_dict().items():
            if value.is_floating_point():
                value.lerp_(own[name].to(value.dtype), 1 - decay)
            else:
                value.copy_(own[name])

    def _end_epoch(self) -> None:
        if self.stage == 1:
            self.refresh()
        elif self.eta and self.held is not None and len(self.held.batches):
            logits, _, labels = self._answers(twice=False)
            weights = balanced(labels, len(self.counts))
            self.log_prior.copy_(adapted_prior(self.log_prior, logits, weights, self.eta))

    @torch.no_grad()
    def _answers(self, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
        """z, z_cf (N, K) and labels (N,) of the hold-out, in eval mode; z_cf is 0 unless asked for."""
        assert self.held is not None
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        vit, found = host(self.model), []
        try:
            for batch in self.held.batches:
                images = to_model_space(self.model, batch["images"].to(self.log_prior.device))
                x, layout = vit.embed(images)
                z, z_cf = both_logits(vit, x, layout, self.mass) if twice else (run(vit, x, layout)[0], None)
                found.append((z.float(), torch.zeros_like(z) if z_cf is None else z_cf, batch["labels"].to(z.device)))
        finally:
            for module, mode in modes:
                module.training = mode
        z, z_cf, labels = (torch.cat(part) for part in zip(*found))
        return z, z_cf.float(), labels

    def gamma(self) -> float:
        """γ for the weights as they are now; 0 before stage 2."""
        if not bool(self.recalibrated):
            return 0.0
        if self.fixed_gamma is not None:
            return float(self.fixed_gamma)
        if self.held is None or not len(self.held.batches):
            return 0.0
        logits, background, labels = self._answers(twice=True)
        return fit_gamma(logits, background, labels, balanced(labels, len(self.counts)))

    def _backbone(self) -> list[nn.Parameter]:
        """What stage 2 slows down: all of the host but its read-out."""
        readout = ("norm.", "fc_norm.", "head.", "read_out.", "attn_pool.")
        return [p for name, p in host(self.model).named_parameters() if not name.startswith(readout)]

    # -- the result ----------------------------------------------------------------------------------------------

    def evaluate(self, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Loss and scores of ``z − γ z_cf``, the scores by frequency of the classes, and γ."""
        gamma = self.gamma()
        self._gamma = gamma
        return super().evaluate(loader) | {"gamma": gamma}

    def predict(self, images: Tensor) -> Tensor:
        """Images in [0, 1] → ``z − γ z_cf`` (B, K), γ being that of :meth:`evaluate`."""
        if not self._gamma:
            return self.model(images)
        vit = host(self.model)
        x, layout = vit.embed(to_model_space(self.model, images))
        z, z_cf = both_logits(vit, x, layout, self.mass)
        return z - self._gamma * z_cf

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """The task's scores, and the accuracy by how many training images a class had."""
        found = super().score(outputs, labels)
        if labels.ndim == 1 and bool(self.counts.any()):
            found |= group_accuracy(outputs, labels, self.counts.cpu())
        return found

    def encoder(self) -> nn.Module:
        """The trained model, which subtracts γ z_cf in eval mode if γ > 0; a bare ViT comes back in a wrapper then."""
        gamma = self.gamma()
        return _install(self.model, gamma, self.mass) if gamma else self.model


class _Held:
    """Batches that copies of the objective share: a moving average of the weights needs no second copy of the data."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


# -- the steps, one by one -----------------------------------------------------------------------------------------


def donors(labels: Tensor, draws: int) -> Tensor:
    """For every image one of another class in the batch, or itself where there is none.

    Args:
        labels: (B,). draws: n.

    Returns: (n, B) rows of the batch.
    """
    other = labels.unsqueeze(0) != labels.unsqueeze(1)
    chance = torch.rand(draws, *other.shape, device=labels.device).masked_fill(~other, -1.0)
    own = torch.arange(len(labels), device=labels.device)
    return torch.where(other.any(1), chance.argmax(2), own)


def swap_background(x: Tensor, fg: Tensor, partners: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Background tokens of every image become those of its partner at the same places, where both are background.

    Args:
        x: (B, P+N, D). fg: (B, N) bool. partners: (n, B) rows of the batch. num_prefix: P.

    Returns: (n, B, P+N, D), and (n, B) bool: which were changed.
    """
    both = ~fg & ~fg[partners] & (partners != torch.arange(len(x), device=x.device)).unsqueeze(-1)
    rows = F.pad(both, (num_prefix, 0)).unsqueeze(-1)
    return torch.where(rows, x[partners], x), both.any(2)


def disagreement(logits: Tensor) -> Tensor:
    """Mean KL between the answers of all ordered pairs of different draws: (n, B, K) → (B,); 0 for one draw."""
    n = len(logits)
    if n < 2:
        return logits.new_zeros(logits.shape[1])
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    own, crossed = (p * log_p).sum((0, 2)), (p.sum(0) * log_p.sum(0)).sum(-1)
    # Σ_{a≠b} p_a (log p_a − log p_b); a = b adds nothing
    return (n * own - crossed) / (n * (n - 1))


def class_shares(counts: Tensor) -> Tensor:
    """(K,) counts → shares; a class that was never seen counts as one image."""
    counts = counts.clamp(min=1)
    return counts / counts.sum()


def balanced(labels: Tensor, num_classes: int) -> Tensor:
    """(N,) weights that sum to 1, every class that occurs having the same share."""
    counts = torch.bincount(labels, minlength=num_classes)
    return 1 / (counts[labels] * (counts > 0).sum())


def adapted_prior(log_prior: Tensor, logits: Tensor, weights: Tensor, eta: float) -> Tensor:
    """``log π̂`` of ``π̂_c ∝ π̂_c^{1−η} p̄_c^η`` with p̄ the weighted mean of softmax(logits).

    Args:
        log_prior: (K,). logits: (N, K). weights: (N,), sum 1. eta: η.
    """
    mean = (weights.unsqueeze(1) * logits.softmax(-1)).sum(0).clamp(min=1e-12)
    return ((1 - eta) * log_prior + eta * mean.log()).log_softmax(0)


def fit_gamma(logits: Tensor, background: Tensor, labels: Tensor, weights: Tensor) -> float:
    """γ in [0, 10] that minimises ``−Σ_i w_i log softmax(z_i − γ z_cf,i)_{y_i}``, which is convex in γ.

    Args:
        logits, background: z, z_cf (N, K). labels: (N,). weights: (N,).
    """
    z, b, w = logits.double(), background.double(), weights.double()
    right = b.gather(1, labels.unsqueeze(1)).squeeze(1)

    def slope(gamma: float) -> float:
        return float((w * (right - ((z - gamma * b).softmax(-1) * b).sum(-1))).sum())

    low, high = 0.0, GAMMA_MAX
    if slope(low) >= 0:
        return low
    if slope(high) <= 0:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def held_rows(labels: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Rows to hold out: ``share`` of every class of at least 4 images, at least 1 and at most 50; ascending."""
    rng = np.random.default_rng(seed)
    kept = [np.empty(0, np.int64)]
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        if len(rows) >= 4:
            kept.append(rows[: min(50, max(1, round(share * len(rows))))])
    return np.sort(np.concatenate(kept))


def _repeat(layout: TokenLayout, times: int) -> TokenLayout:
    """The layout of ``times`` copies of a batch, one after the other."""

    def copies(value: Tensor | None, ndim: int) -> Tensor | None:
        return value.repeat(times, *[1] * (value.ndim - 1)) if value is not None and value.ndim == ndim else value

    return layout.replace(scale_id=copies(layout.scale_id, 2))


def _rebatch(batches: list[dict[str, Any]], rows: np.ndarray, size: int) -> list[dict[str, Any]]:
    """Some rows of a list of batches, in batches of ``size``."""
    index = torch.from_numpy(rows)
    keys = [k for k, v in batches[0].items() if isinstance(v, Tensor)]
    whole = {k: torch.cat([batch[k] for batch in batches])[index] for k in keys}
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, len(rows), size)]


# -- in a saved model ----------------------------------------------------------------------------------------------


def _install(model: nn.Module, gamma: float, mass: float) -> nn.Module:
    """Put the host of ``model`` into :class:`Counterfactual` in place, and note it for :func:`restore`."""
    vit: Any = host(model)
    options = {"gamma": gamma, "mass": mass}
    wrapped = Counterfactual(vit, gamma, mass)
    vit.applied = [*getattr(vit, "applied", []), {"name": NAME, "options": options}]
    if vit is model:
        return wrapped
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child is vit and isinstance(parent, Counterfactual):
                parent.gamma, parent.mass = gamma, mass
                # the note before the last says the same with another γ
                vit.applied = [step for step in vit.applied if step["name"] != NAME] + vit.applied[-1:]
                return model
            if child is vit:
                setattr(parent, name, wrapped)
                return model
    raise BadInput(f"The host inside {type(model).__name__} is not among its modules; hand in a plain wrapper.")


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """What a saved model's loading calls: the structure again, without data."""
    return _install(model, float(options["gamma"]), float(options["mass"]))
