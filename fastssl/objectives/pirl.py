"""PIRL: an image and a transformed copy should embed alike (Misra & van der Maaten 2020).

Equation numbers are those of arXiv:1912.01991.

An image's memory m_I has to be recognised, among the memories of N other images D_N, from its
shuffled patches or its turned copy, g(v_It), and from the image itself, f(v_I):

    s(a, b) = cosine(a, b)
    h(a, b) = exp(s(a, b) / tau) / (exp(s(a, b) / tau) + sum_{I' in D_N} exp(s(b, m_I') / tau))  (4)
    L_NCE(m_I, b) = -log h(m_I, b) - sum_{I' in D_N} log(1 - h(b, m_I'))                         (5)
    L = lambda L_NCE(m_I, g(v_It)) + (1 - lambda) L_NCE(m_I, f(v_I))                             (6)

The code calls g or f a view. lambda 0 is NPID (Wu et al. 2018) or, trained longer with more
negatives, NPID++: the image alone. D_N never holds the image itself.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.distributed import gather
from fastssl.memory import Memory

NO_SCORE = -1e30  # of a row that is no negative: exp gives 0, and sums with it stay finite


@dataclass(frozen=True, kw_only=True)
class Options:
    """The paper's settings.

    Attributes:
        patch_weight: lambda of eq. 6, 0 ... 1, the weight of the patches or of the turned copy. At
            0 they are not looked at and g does not exist: NPID. At 1, f only feeds the memory: it
            stays the random projection it began as, and the backbone learns from g alone.
        transform: what g looks at. jigsaw: patches, in the drawn order (also of a turned image);
            rotation: the turned copy, through a linear layer of its own (section 3.2).
        temperature: tau of eq. 4.
        momentum: of the memory: how much of the old row stays.
        negatives: N. A bank of no more images is used whole, which is one negative less than rows.
        dimension: of the embeddings and the memory.
        patches: how many the pipeline cuts from an image; read by transform jigsaw.
        loss: nce is eq. 5; infonce only its first term, -log h(m_I, b), which is cross-entropy
            over the image and its negatives, as most code trained since does (PyContrast), and,
            with as many negatives as images, NPID's full non-parametric softmax.
            nce_constant_z is NPID's own (Wu et al. 2018, section 3.2), which VISSL's code trains
            for PIRL, too (vissl/losses/nce_loss.py): P = exp(s / tau) / Z, where
            Z = n mean(exp(s / tau)) over the first batch's first view, its memory and its
            negatives, constant from then on; h = P / (P + N / n), where n counts the images and
            1 / n is the noise; and the image itself stays among its negatives, where noise may
            draw it. The scale of such a loss hangs on the first weights: it wants a lower
            learning rate when images are few.
        negatives_for: batch draws one D_N a step for all images and processes (one matrix product);
            image draws one for each image as the paper says, which gathers
            4 * batch * negatives * dimension bytes: 1 GB for 64 images with the defaults.
        normalizer: over whose scores the denominator of h(b, m_I') in eq. 5 sums. view: the
            view's, exp(s(b, m_I') / tau) + sum_{I''} exp(s(b, m_I'') / tau), in which I' counts
            twice since it is in D_N, and which the first term shares. memory: eq. 4 read by
            position, where m_I' is the second argument, so that the sum is over s(m_I', m_I'');
            carries no gradient, costs a product of N x N at every call, and needs shared negatives.
            The other losses have no such term.
        bank_dtype: of the memory's rows. bfloat16 takes half of the bytes; scores are in float32
            all the same. A row's error is then 0.3 % of its length, a score's 0.004 at the paper's
            temperature (standard deviations).
        shard_bank_gb: a memory of more gigabytes in all is shared out, each process holding its
            part of the rows; loss and gradients stay the same, and every step sends the rows asked
            for: of shared negatives negatives x dimension numbers, of one set for each image batch
            times as many. 2 GB are 3.9 million rows of 128 in float32.
    """

    patch_weight: float = 0.5
    transform: Literal["jigsaw", "rotation"] = "jigsaw"
    temperature: float = 0.07
    momentum: float = 0.5
    negatives: int = 32000
    dimension: int = 128
    patches: int = 9
    loss: Literal["nce", "infonce", "nce_constant_z"] = "nce"
    negatives_for: Literal["batch", "image"] = "batch"
    normalizer: Literal["view", "memory"] = "view"
    bank_dtype: Literal["float32", "bfloat16"] = "float32"
    shard_bank_gb: float = 2.0

    def __post_init__(self):
        if not 0 <= self.patch_weight <= 1:
            raise ValueError(f"patch_weight ({self.patch_weight}) must lie in 0 ... 1")
        if not self.temperature >= 1e-4:  # scores of less are no numbers in float32
            raise ValueError(f"temperature ({self.temperature}) must be above 0, 0.0001 at least")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum ({self.momentum}) must be at least 0 and below 1")
        for name in ("negatives", "patches"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} ({vars(self)[name]}) must be at least 1")
        if self.dimension < 2:
            raise ValueError(
                f"dimension ({self.dimension}) must be at least 2: unit vectors of one number are"
                " 1 or -1"
            )
        if not self.shard_bank_gb >= 0:
            raise ValueError(
                f"shard_bank_gb ({self.shard_bank_gb}) must be at least 0: 0 shares out every bank,"
                " .inf none"
            )
        if self.normalizer == "memory" and self.negatives_for == "image":
            raise ValueError(
                "normalizer ('memory') must be 'view' with negatives_for 'image': every image would"
                " need its own product of negatives x negatives; or set negatives_for: batch"
            )


def takes(options: Options) -> set[str]:
    """The outputs of a graph without which `options` can't be trained."""
    if options.patch_weight == 0:
        return {"image", "index"}
    return {"image", "index", "turned" if options.transform == "rotation" else "patches"}


class Objective(nn.Module):
    """The loss of eq. 6 with the two heads and the memory bank."""

    log_z: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        options: Options,
        *,
        images: int,
        classes: int,
        labels: Tensor | None,
        seed: int,
    ):
        """Heads for `backbone` and a bank of `images` rows drawn from `seed`."""
        del classes, labels  # no label is looked at
        super().__init__()
        features = backbone.dim
        assert isinstance(features, int), "a backbone must offer dim, the length of its features"
        self.options = options
        self.backbone = backbone
        self.image_head = nn.Linear(features, options.dimension)  # f
        # without a gradient of its own f must not ask for one: DDP would wait for it
        self.image_head.requires_grad_(options.patch_weight < 1)
        self.patch_head: PatchHead | None = None  # g of patches
        self.turned_head: nn.Linear | None = None  # g of a turned image
        if options.patch_weight > 0 and options.transform == "jigsaw":
            self.patch_head = PatchHead(features, options)
        elif options.patch_weight > 0:
            self.turned_head = nn.Linear(features, options.dimension)
        self.memory = Memory(
            images,
            options.dimension,
            momentum=options.momentum,
            seed=seed,
            dtype=torch.bfloat16 if options.bank_dtype == "bfloat16" else torch.float32,
            shard_gb=options.shard_bank_gb,
        )
        constant = options.loss == "nce_constant_z"
        self.register_buffer("log_z", torch.zeros(()) if constant else None)  # of the first batch

    def forward(
        self,
        image: Tensor,
        index: Tensor,
        patches: Tensor | None = None,
        permutation: Tensor | None = None,
        turned: Tensor | None = None,
        angle: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score a batch against the memory; which of the inputs are needed, `takes` says.

        Args:
            image: [B, 3, S, S], as the backbone takes it.
            index: [B], int64: which images; one may occur twice.
            patches: [B, T, 3, p, p] in the drawn order.
            permutation: [B, T], int64: that order; the pipeline's tests check it.
            turned: [B, 3, S, S], another crop of the image, turned.
            angle: [B], int64: by how much; the pipeline's tests check it.

        Returns:
            The mean loss of the batch, and: `accuracy`, the part of the views (of g if it counts,
            else of f) nearer to their own memory than to every negative; `chance`, what accuracy
            would be by luck; `std`, the spread of f over the batch, about 1 when in all directions
            and 0 when collapsed (a batch of one image has none); `agreement`, the mean cosine of f
            and g.

        Raises:
            ValueError: the pipeline puts out another number of patches than the options say.
        """
        del permutation, angle  # the pixels are already changed: here they tell nothing more
        options = self.options
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.patch_weight < 1):
            image_BD = self._unit(self.image_head(self.backbone(image)))
        views = [image_BD] if options.patch_weight < 1 else []
        if self.patch_head is not None:
            assert patches is not None, "see takes"
            if patches.shape[1] != options.patches:
                raise ValueError(
                    f"objective.patches ({options.patches}) must be as many as the pipeline puts"
                    f" out: {patches.shape[1]}"
                )
            # all patches of the batch in one call; a view, as flatten keeps channels-last memory
            features = self.backbone(patches.flatten(0, 1))
            views.append(self._unit(self.patch_head(features)))
        elif self.turned_head is not None:
            assert turned is not None, "see takes"
            views.append(self._unit(self.turned_head(self.backbone(turned))))

        with torch.autocast(image.device.type, enabled=False):
            # V = views, f and g as they count; B = images; K = negatives; D = dimension
            views_VBD = torch.stack(views)
            memory_BD = self.memory.read(index)
            per_image = len(index) if options.negatives_for == "image" else None
            # [K] or [B, K], and their rows
            drawn, negatives = self.memory.negatives(options.negatives, batch=per_image)
            own_BK = drawn == index[:, None]  # an image is no negative of itself
            log_z = self._constant(views_VBD[0], memory_BD, negatives)
            losses_V, right_VB = contrast(
                views_VBD, memory_BD, negatives, own_BK, options, log_z, self.memory.images
            )
            # eq. 6; with a weight of 0 or 1 there is one view, first and last
            loss = options.patch_weight * losses_V[-1] + (1 - options.patch_weight) * losses_V[0]

        if self.training and torch.is_grad_enabled():  # not while only looking
            self.memory.see(index, image_BD)
        with torch.no_grad():
            others = min(options.negatives, self.memory.images - 1)
            metrics = {
                "accuracy": right_VB[-1].float().mean(),
                "chance": torch.full((), 1 / (1 + others), device=index.device),
            }
            if len(image_BD) > 1:
                spread_D = image_BD.std(0, correction=0)
                metrics["std"] = options.dimension**0.5 * spread_D.mean().float()
            if options.patch_weight > 0:
                metrics["agreement"] = (image_BD * views[-1]).sum(1).mean().float()
        return loss, metrics

    def finish_step(self) -> None:
        """Write f(v_I) of the step's batches into the memory, after all were scored."""
        self.memory.finish_step()

    def _constant(self, view_BD: Tensor, memory_BD: Tensor, negatives: Tensor) -> Tensor | None:
        """Log Z: estimated from the joined first batch of all processes, then as it was."""
        if self.log_z is None or self.memory.steps > 0 or self.memory.seen:
            return self.log_z
        match_VB, scores_VBK = _scores(view_BD.detach()[None], memory_BD, negatives, self.options)
        scores = torch.cat([match_VB.flatten(), scores_VBK.flatten()])
        sums = gather(scores.logsumexp(0, keepdim=True))  # of every process
        mean = sums.logsumexp(0) - math.log(len(sums) * len(scores))
        log_z = mean + math.log(self.memory.images)
        if self.training and torch.is_grad_enabled():  # not while only looking
            self.log_z.copy_(log_z)
        return log_z

    def _unit(self, embedding: Tensor) -> Tensor:
        # in the bank's precision, also when the heads ran in half
        return functional.normalize(embedding.to(self.memory.precision), dim=-1)


class PatchHead(nn.Module):
    """g: each patch's features through one shared layer, joined in their order, to one embedding.

    Both layers are linear, with nothing between them, as in the paper.
    """

    def __init__(self, features: int, options: Options):
        """Two layers for backbone features of length `features`."""
        super().__init__()
        self.patches = options.patches
        self.each = nn.Linear(features, options.dimension)
        self.joined = nn.Linear(options.patches * options.dimension, options.dimension)

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings [B, dimension] from `features` [B * T, dim], an image's patches together."""
        return self.joined(self.each(features).unflatten(0, (-1, self.patches)).flatten(1))


def contrast(
    views_VBD: Tensor,
    memory_BD: Tensor,
    negatives: Tensor,
    own_BK: Tensor,
    options: Options,
    log_z: Tensor | None = None,
    images: int = 0,
) -> tuple[Tensor, Tensor]:
    """The mean loss of each kind of view [V], and which views found their memory [V, B], bool.

    Without any negative the loss is 0 (h is 1) and every view has found its memory.

    Args:
        views_VBD: unit vectors b of V kinds for each of B images.
        memory_BD: m_I, unit vectors.
        negatives: the rows m_I' of D_N, [K, D] for all images or [B, K, D] for each.
        own_BK: bool, where a negative is the image itself and does not count.
        options: temperature, loss and normalizer are used.
        log_z: for loss nce_constant_z: the log of Z.
        images: for loss nce_constant_z: n.
    """
    match_VB, scores_VBK = _scores(views_VBD, memory_BD, negatives, options)
    all_VBK, scores_VBK = scores_VBK, scores_VBK.masked_fill(own_BK, NO_SCORE)
    right_VB = match_VB > scores_VBK.detach().amax(-1)
    if options.loss == "nce_constant_z":
        assert log_z is not None
        # h = P / (P + N / n) is the sigmoid of how far a score lies above log(Z N / n)
        even = log_z + math.log(own_BK.shape[1] / images)
        loss_VB = functional.softplus(even - match_VB)
        loss_VB = loss_VB + functional.softplus(all_VBK - even).sum(-1)
        return loss_VB.mean(1), right_VB
    others_VB = scores_VBK.logsumexp(-1)
    # softplus(x) = log(1 + exp(x)). With a the positive score and S the log of the sum,
    # -log h = -log(exp(a) / (exp(a) + exp(S))) = softplus(S - a)
    loss_VB = functional.softplus(others_VB - match_VB)
    if options.loss == "nce":
        # and -log(1 - h) = -log(exp(S) / (exp(a) + exp(S))) = softplus(a - S)
        if options.normalizer == "view":
            sums = others_VB[..., None]
        else:
            sums = _log_sums(negatives, memory_BD, own_BK, options.temperature)
        each_VBK = functional.softplus(scores_VBK - sums)
        loss_VB = loss_VB + each_VBK.masked_fill(own_BK, 0).sum(-1)
    return loss_VB.mean(1), right_VB


def _scores(
    views_VBD: Tensor, memory_BD: Tensor, negatives: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Scores s / tau of every view with its memory [V, B] and with its negatives [V, B, K]."""
    match_VB = (views_VBD * memory_BD).sum(-1) / options.temperature
    if negatives.dim() == 2:
        return match_VB, views_VBD @ negatives.T / options.temperature
    return match_VB, torch.einsum("vbd,bkd->vbk", views_VBD / options.temperature, negatives)


@torch.no_grad()
def _log_sums(negatives_KD: Tensor, memory_BD: Tensor, own_BK: Tensor, temperature: float):
    """Log of sum_{I''} exp(s(m_I', m_I'') / tau) [B, K] for every I' of every image's own D_N."""
    sums_K = torch.cat(
        [
            (rows @ negatives_KD.T / temperature).logsumexp(1)
            for rows in negatives_KD.split(1024)  # the whole is 4 GB for 32000
        ]
    )
    # D_N is shared, less the image itself: take the terms of its own row out again
    copies_B1 = own_BK.sum(1, keepdim=True)
    share_BK = copies_B1 * (memory_BD @ negatives_KD.T / temperature - sums_K).exp()
    return sums_K + torch.log1p(-share_BK.masked_fill(own_BK, 0))
