"""How far a transform moves an image: l2 distance of f(v_I) and g(v_It) as unit vectors.

PIRL's figure 5 (Misra & van der Maaten 2020, section 4.1): a histogram over many images I and
many transforms t, PIRL against a network trained to tell the transform (Jigsaw), which has the
larger mean and variance. The paper does not say which f and g such a network has. Here:

    heads      PIRL's own two heads, f of the image and g of its patches or of its turned copy.
    backbone   the same for every network: f is the backbone's features of the image, g the mean of
               its features over the patches, or its features of the turned copy. A network trained
               on standardised patches gets the image standardised the same way, so that what is
               measured is the transform and not another normalisation.

Networks with batch norm were trained on batches of images and batches of copies apart, each
normalised by its own statistics, while the stored ones are a mixture of both, which fits neither:
on a small PIRL run (agreement of f and g 0.33 in training, which is a distance of 1.16) it gave
1.45, and the statistics of the batch gave 1.16. `statistics` chooses.

Unit vectors lie near each other where all do: beside each distance stands that of an image to
another one's transformed copy. Equal vectors have distance 0, orthogonal ones sqrt(2), opposite
ones 2.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.analysis import drawing
from fastssl.patch_network import Standardization, features_of, standardize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tensors = dict[str, Tensor]
# f(v_I) [B, D] and g(v_It) [B, F, D] of a batch, for F transforms of each image
Embed = Callable[[Tensors], tuple[Tensor, Tensor]]
BINS = np.linspace(0, 2, 101)


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Of one pair of functions.

    Attributes:
        same: [n], between an image and its transformed copy.
        other: [n], between an image and another one's transformed copy.
        images: how many there were; n / images transforms of each.
    """

    same: np.ndarray
    other: np.ndarray
    images: int

    def numbers(self) -> dict[str, float | int]:
        """Mean and variance of both, the ratio of the means, and n."""
        return {
            "mean": float(self.same.mean()),
            "variance": float(self.same.var()),
            "other_mean": float(self.other.mean()),
            "other_variance": float(self.other.var()),
            "mean_over_other_mean": float(self.same.mean() / (self.other.mean() or 1.0)),
            "n": len(self.same),
            "images": self.images,
        }


def with_heads(objective: Any) -> Embed:
    """PIRL's f and g.

    Args:
        objective: fastssl.objectives.pirl's, in eval mode, with a head for what is transformed.
    """

    def embed(tensors: Tensors) -> tuple[Tensor, Tensor]:
        image_BD = objective.image_head(objective.backbone(tensors["image"]))
        if objective.patch_head is not None:
            patches = tensors["patches"].flatten(0, 1)
            view_BD = objective.patch_head(objective.backbone(patches))
        else:
            view_BD = objective.turned_head(objective.backbone(tensors["turned"]))
        return image_BD, view_BD[:, None]

    return embed


def of_backbone(backbone: nn.Module, how: Standardization) -> Embed:
    """Features of the image; the mean of those of the patches, or those of each turned copy.

    Args:
        backbone: in eval mode.
        how: patches were standardised in its training.
    """

    def embed(tensors: Tensors) -> tuple[Tensor, Tensor]:
        dtype = next(backbone.parameters()).dtype

        def features(images: Tensor) -> Tensor:
            pixels = standardize(images, how)
            return backbone(pixels.to(dtype) if pixels.is_floating_point() else pixels)

        image_BD = features(tensors["image"])
        if "patches" in tensors:
            return image_BD, features_of(backbone, tensors["patches"], how).mean(1)[:, None]
        turned = tensors["turned"]
        if turned.ndim == 4:
            return image_BD, features(turned)[:, None]
        return image_BD, features(turned.flatten(0, 1)).unflatten(0, turned.shape[:2])

    return embed


@contextlib.contextmanager
def statistics(module: nn.Module, of: Literal["batch", "stored"]) -> Iterator[None]:
    """Which ones `module`'s batch norms use inside; neither weights nor buffers change."""
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    if of == "batch":
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracking) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracking


@torch.no_grad()
def measure(embed: Embed, passes: Iterable[Iterable[Tensors]], *, seed: int) -> Distances:
    """The distances of all images, over all passes; of one pass the embeddings are in memory.

    Args:
        embed: f and g.
        passes: for each, batches of the same images, transformed anew.
        seed: of who is compared with which other image.

    Raises:
        ValueError: fewer than two images, or an embedding of length 0, which has no direction.
    """
    generator = np.random.default_rng(seed)
    same, other, images = [], [], 0
    for batches in passes:
        embedded = [embed(tensors) for tensors in batches]
        image_ND = _unit(torch.cat([image for image, _ in embedded]))
        view_NFD = _unit(torch.cat([view for _, view in embedded]))
        images = len(image_ND)
        if images < 2:
            raise ValueError(f"distances to other images need at least 2 images, there is {images}")
        # Each with the next on a random round through all: never with itself, and seldom with the
        # next in the listing, which is of the same class.
        round_N = torch.from_numpy(generator.permutation(images))
        same.append((image_ND[:, None] - view_NFD).norm(dim=-1))
        other.append((image_ND[round_N, None] - view_NFD[round_N.roll(1)]).norm(dim=-1))
    return Distances(
        same=torch.cat([each.flatten() for each in same]).numpy(),
        other=torch.cat([each.flatten() for each in other]).numpy(),
        images=images,
    )


def draw(panels: dict[str, dict[str, Distances]], caption: str) -> "Figure":
    """Histograms of each panel, by title and then by run; the reference is dashed."""
    runs = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure = drawing.figure(2.4 * len(panels) + 0.9 + 0.12 * len(runs))
    stacked = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (title, panel) in zip(stacked, panels.items(), strict=True):
        for name, distances in panel.items():
            number = runs.index(name)
            color = drawing.LINES[number % len(drawing.LINES)]
            heights, edges = np.histogram(distances.same, BINS, density=True)
            # drawn as filled steps: two that overlap both stay visible
            axes.stairs(heights, edges, color=color, fill=True, alpha=0.25)
            axes.stairs(heights, edges, color=color, linewidth=1.4)
            heights, edges = np.histogram(distances.other, BINS, density=True)
            axes.stairs(heights, edges, color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_title(title, fontsize=10, color=drawing.INK, loc="left")
        axes.set(ylabel="density", xlim=(0, 2))
        drawing.clean(axes)
    stacked[-1].set_xlabel("l2 distance of unit vectors (0 equal, 1.41 orthogonal, 2 opposite)")
    handles: list[Any] = []
    for number, name in enumerate(runs):
        color = drawing.LINES[number % len(drawing.LINES)]
        handles += stacked[0].plot([], [], color=color, linewidth=3, label=name)
    handles += stacked[0].plot(
        [], [], "--", color=drawing.INK, label="to another image's copy (reference)"
    )
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    drawing.caption(figure, caption)
    return figure


def _unit(embedding: Tensor) -> Tensor:
    embedding = embedding.double().cpu()
    if not torch.isfinite(embedding).all():
        raise ValueError("an embedding is not finite: the network has diverged")
    if (embedding.norm(dim=-1) == 0).any():
        raise ValueError("an embedding is all zeros, which has no direction: the network is dead")
    return F.normalize(embedding, dim=-1)
