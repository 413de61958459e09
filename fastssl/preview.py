"""One batch of a recipe as the network sees it, in one picture: every output named, labels beside.

    python -m fastssl.preview recipes/rotation.yaml [section.key=value ...] --out rotation.png

Data, graph and objective are those of the recipe and run as in training, on the CPU; nothing is
trained. fastssl/page.py says what is shown, fastssl/pictures.py draws it.
"""

import argparse
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl import config, demo, order, pictures, trained
from fastssl.config import Part, Recipe
from fastssl.loader import Loader, output_names
from fastssl.page import Batch, page

MOST_IMAGES = 64


def main(arguments: Sequence[str]) -> int:
    """Writes the picture; returns the exit code."""
    given = _parser().parse_intermixed_args(arguments)
    out = Path(given.out)
    try:
        _check_given(out, given.images, given.seed)
        recipe = config.load(given.recipe, given.overrides)
        seed = recipe.train.seed if given.seed is None else given.seed
        batch = gather(recipe, images=given.images, seed=seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawn = pictures.draw(page(recipe.name, batch, given.overrides))
    png = io.BytesIO()  # given a path, Pillow cuts the image off without a word on a full disk
    drawn.save(png, "PNG", optimize=True)
    try:
        out.write_bytes(png.getvalue())
    except OSError as error:
        print(f"error: --out ({out}) can't be written: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {drawn.width} x {drawn.height} pixels, {len(png.getvalue()) / 1000:.0f} kB")
    return 0


def gather(recipe: Recipe, *, images: int, seed: int, say: Callable[[str], None] = print) -> Batch:
    """The first `images` of a run with this `seed`, augmented by draws of their own.

    Raises:
        ValueError: the images or the recipe's parts do not do; says what to change.
    """
    if recipe.demo:
        demo.render(say=say)
    reader = recipe.data.module
    samples = reader.list_samples(recipe.data.options, cache=demo.cache(), say=say)
    if len(samples.usable) < images:
        raise ValueError(
            f"{samples.root}: {len(samples.usable)} usable images are fewer than --images "
            f"({images}): give at most {len(samples.usable)}, or more images"
        )
    names = output_names(reader, samples, recipe.pipeline.module, recipe.pipeline.options)
    config.check_outputs(recipe.objective, names, recipe.pipeline)
    rows = samples.usable[order.shuffled(len(samples.usable), seed, 0, 0, 1, images)[0]]

    outputs = _run_graph(recipe.pipeline, recipe, samples, rows, seed, say)
    originals = _run_graph(recipe.evaluation, recipe, samples, rows, seed, say)["image"]
    inputs, metrics = _run_objective(recipe, samples, outputs, seed)
    shown = outputs["index"].tolist()  # a file that can't be decoded gives its place to another
    kinds = f", {len(samples.classes)} classes" if samples.classes else ""
    where = "built-in, with the recipe's demo section" if recipe.demo else samples.root
    parts = (recipe.pipeline.use, recipe.objective.use, recipe.backbone.use)
    return Batch(
        outputs={name: tensor.numpy() for name, tensor in outputs.items()},
        originals=originals.movedim(1, -1).numpy(),
        inputs=inputs,
        classes=[samples.classes[samples.labels[row]] for row in shown] if kinds else None,
        metrics=metrics,
        parts="graph {}, objective {}, backbone {}".format(*parts),
        data=f"{len(samples.usable):,} images{kinds} ({where})",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.preview",
        description=inspect.cleandoc(__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="such as recipes/rotation.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for training")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rows (default: 8)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: the recipe's train.seed")
    return parser


def _check_given(out: Path, images: int, seed: int | None) -> None:
    """Refuses what can't be written or drawn, before any work."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out ({out}) must end in .png")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out ({out}): there is no folder {folder}: make it, or name another")
    if out.is_dir() or not os.access(out if out.exists() else folder, os.W_OK):
        raise ValueError(f"--out ({out}) can't be written: name another file")
    if not 2 <= images <= MOST_IMAGES:  # batch norm has no spread over one
        raise ValueError(f"--images ({images}) must be in 2 ... {MOST_IMAGES}")
    if seed is not None and not 0 <= seed < 2**31:
        raise ValueError(f"--seed ({seed}) must be in 0 ... {2**31 - 1}")


def _run_graph(
    part: Part,
    recipe: Recipe,
    samples: Any,
    rows: np.ndarray,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """The outputs of a recipe's graph for the listing's `rows`."""
    loader = Loader(
        recipe.data.module,
        samples,
        part.module,
        part.options,
        lambda _: rows,
        batch=len(rows),
        seed=seed,
        device=torch.device("cpu"),
        loading=replace(recipe.loader, prefetch=1),
        say=say,
    )
    return {name: tensor.clone() for name, tensor in next(loader).items()}


# What the backbone is given.


class Recorder(nn.Module):
    """A backbone that shows what it is given to `keep`."""

    def __init__(self, backbone: nn.Module, keep: Callable[[Tensor], None]):
        """Looks like `backbone` from outside.

        Args:
            backbone: what answers.
            keep: a function, so that the copies which an objective makes (a momentum encoder) call
                the same one.
        """
        super().__init__()
        self.backbone = backbone
        self.dim = backbone.dim
        self.normalization = backbone.normalization
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        self.keep(x)
        return self.backbone(x)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        self.keep(x)
        return self.backbone.stages(x)  # pyright: ignore[reportCallIssue]  a backbone has it


def _run_objective(
    recipe: Recipe, samples: Any, outputs: dict[str, Tensor], seed: int
) -> tuple[list[np.ndarray], dict[str, float]]:
    """The pixels that the backbone is given, call by call, and the objective's metrics."""
    inputs: list[np.ndarray] = []
    torch.manual_seed(seed)
    backbone = trained.fresh(recipe.backbone.module, recipe.backbone.options)
    objective = recipe.objective.module.Objective(
        Recorder(backbone, lambda x: inputs.append(_denormalized(x, backbone.normalization))),
        recipe.objective.options,
        images=len(samples),
        classes=recipe.pipeline.options.classes,
        labels=None if samples.labels is None else torch.from_numpy(samples.labels),
        seed=seed,
    )
    inputs.clear()  # an objective may have tried its backbone to learn the sizes of maps
    objective.train()  # as in training; batch norm's averages change, the weights do not
    with torch.no_grad():
        loss, metrics = objective(**outputs)
    return inputs, {"loss": float(loss)} | {name: float(each) for name, each in metrics.items()}


def _denormalized(x: Tensor, normalization: Any) -> np.ndarray:
    """A backbone's input as pixels: uint8 [N, h, w, 3].

    Floats are patches standardised each on their own: one mean and one deviation, the averages of
    the backbone's over colours, bring them back to a range that can be shown and leave gray gray.
    """
    if x.dtype != torch.uint8:
        mean, std = (float(np.mean(each)) for each in normalization)
        x = ((x.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return x.movedim(1, -1).numpy().copy()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
