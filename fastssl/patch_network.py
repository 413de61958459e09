"""Patches to classes: what the objectives of jigsaw and relative patch location share.

And exemplar, whose views are standardised as patches are.

Every patch goes through the backbone once; a head joins the features of some patches in an order
and classifies that (Kolesnikov, Zhai & Beyer 2019, arXiv:1901.09005, section 4; line numbers are
those of self_supervision/patch_utils.py in google/revisiting-self-supervised).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Standardization = Literal["joint", "channel", "global"]


def standardize(patches: Tensor, how: Standardization) -> Tensor:
    """`patches` as the backbone takes them: each less its mean, over its standard deviation.

    Args:
        patches: [N, 3, p, p], uint8.
        how: joint: one mean and deviation for the pixels of all three colours, the deviation at
            least 1 / sqrt(number of values), as tf.image.per_image_standardization for floats
            (Kolesnikov et al.); channel: for each colour (Noroozi & Favaro's tiles in bbrattoli's
            code); global: nothing, as backbones normalise bytes by the data set's mean and
            deviation (VISSL).

    Returns:
        Float32 in the memory format of `patches`, or with global `patches` themselves.
    """
    if how == "global":
        return patches
    over = (1, 2, 3) if how == "joint" else (2, 3)
    pixels = patches.to(torch.promote_types(patches.dtype, torch.float32))
    variance, mean = torch.var_mean(pixels, over, correction=0, keepdim=True)
    count = pixels[0].numel() if how == "joint" else pixels[0, 0].numel()
    return pixels.sub_(mean).div_(variance.sqrt().clamp(min=count**-0.5))


def features_of(backbone: nn.Module, patches: Tensor, how: Standardization) -> Tensor:
    """Features [B, F, dim] of `patches` [B, F, 3, p, p], uint8, in one call of the backbone."""
    pixels = standardize(patches.flatten(0, 1), how)
    if pixels.is_floating_point():
        pixels = pixels.to(next(backbone.parameters()).dtype)  # float64 stays float64
    features = backbone(pixels)
    return features.unflatten(0, patches.shape[:2])


def check_head(
    *, embedding: int | None, embedding_norm: bool, hidden: int | None, dropout: float
) -> None:
    """Refuses a head that cannot be; the arguments are those of `Head`.

    Raises:
        ValueError: names the wrong one.
    """
    for name, size in (("embedding", embedding), ("hidden", hidden)):
        if size is not None and size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1, or null for no such layer")
    if embedding is None and embedding_norm:
        raise ValueError(
            "embedding_norm (true) must be false without an embedding (embedding: null)"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout ({dropout}) must be at least 0 and below 1")
    if hidden is None and dropout:
        raise ValueError(f"dropout ({dropout}) must be 0 without a hidden layer (hidden: null)")


class Head(nn.Module):
    """Features of some patches, joined in an order, to logits.

    Joining is a gather of embeddings: a second order of the same patches costs the layers behind it
    and no other pass of the backbone.
    """

    def __init__(
        self,
        features: int,
        patches: int,
        classes: int,
        *,
        embedding: int | None = 1000,
        embedding_norm: bool = False,
        hidden: int | None = 4096,
        dropout: float = 0.5,
    ):
        """The layers; what is drawn comes from torch's global generator.

        Args:
            features: length of the backbone's.
            patches: how many are joined.
            classes: logits.
            embedding: length that each patch's features are brought to by one shared linear layer,
                the 1000 logits of K19's code (:71); None: joined as they are, K19's paper.
            embedding_norm: batch norm and ReLU behind that layer (VISSL).
            hidden: width of the layer behind the joined embeddings, with batch norm, ReLU and
                dropout (:178-209); None: they are classified linearly (VISSL).
            dropout: probability, behind the hidden layer.
        """
        super().__init__()
        each: list[nn.Module] = []
        if embedding is not None:
            each.append(nn.Linear(features, embedding))
        if embedding is not None and embedding_norm:
            each.extend([nn.BatchNorm1d(embedding), nn.ReLU()])
        self.each = nn.Sequential(*each)
        joined = patches * (features if embedding is None else embedding)
        if hidden is None:
            self.classify = nn.Sequential(nn.Linear(joined, classes))
            return
        wide, last = nn.Linear(joined, hidden), nn.Linear(hidden, classes)
        for layer, bias in ((wide, 0.1), (last, 0.0)):
            _truncated_normal_(layer.weight, 0.005)
            nn.init.constant_(layer.bias, bias)
        # momentum 0.997 and epsilon in TensorFlow's terms
        norm = nn.BatchNorm1d(hidden, eps=1e-5, momentum=0.003)
        self.classify = nn.Sequential(wide, norm, nn.ReLU(), nn.Dropout(dropout), last)

    def forward(self, features: Tensor, order: Tensor) -> Tensor:
        """Logits [B * N, classes].

        Args:
            features: [B, F, dim], of all patches of an image.
            order: [B, N, T], int64: positions in F of the T patches that are joined, for each of N.
        """
        embedded = self.each(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        images = torch.arange(len(order), device=order.device)[:, None, None]
        return self.classify(embedded[images, order].flatten(2).flatten(0, 1))


@torch.no_grad()
def _truncated_normal_(weight: Tensor, deviation: float) -> None:
    """As tf.truncated_normal: cut off at two deviations.

    By the inverse of the distribution function: nn.init.trunc_normal_ draws again and again until
    all values fit, and has to look at them for that.
    """
    within = math.erf(2**0.5)  # how much of a normal distribution lies within two deviations
    weight.uniform_(-within, within).erfinv_().mul_(deviation * 2**0.5).clamp_(
        -2 * deviation, 2 * deviation
    )
