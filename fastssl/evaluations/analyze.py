"""`analyze`: pictures of what one or several backbones have learnt, and the numbers in them.

    invariance  how far a transform moves an image (PIRL, section 4.1)         several runs in one
    depth       linear accuracy of every stage (PIRL, table 7)                 several runs in one
    pretext     pretext accuracy against downstream accuracy (K19, figure 4)   several runs in one
    spectrum    singular values and effective rank of the features             several runs in one
    attention   sums of activations over channels (RotNet, figure 3)           one for each run
    map         principal components and t-SNE, by class                       one for each run

Beside each NAME.png lies NAME.json, the numbers in it. What several runs share is drawn with the
last RUN, into its folder. Spectra are of the training split's features, all else of images of val.
All processes take part in features and probes; the rest is computed on each alike.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from fastssl import checkpoint, distributed, journal
from fastssl.analysis import (
    attention,
    depth,
    drawing,
    embedding_map,
    finished_run,
    invariance,
    spectrum,
    transforms,
)
from fastssl.analysis import pretext_against_downstream as pretext
from fastssl.config import Part
from fastssl.evaluation_task import Cell, Table, Task
from fastssl.evaluations import linear
from fastssl.labelled import Split
from fastssl.recipe_text import did_you_mean
from fastssl.trained import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELP = "pictures: invariance, accuracy by depth, spectrum, attention, 2-d map, pretext accuracy"
WHAT = ("invariance", "depth", "pretext", "spectrum", "attention", "map")
SHARED = ("invariance", "depth", "pretext", "spectrum")  # several runs in one picture


@dataclass(frozen=True, kw_only=True)
class Options:
    """The `analyze` command."""

    what: tuple[str, ...] = ()  # of invariance, depth, pretext, spectrum, attention, map; empty:
    # all that the runs allow
    images: int = 256  # invariance: of val, evenly spaced
    transforms: int = 8  # invariance: of each image
    batchnorm: Literal["batch", "stored"] = "batch"  # invariance: normalise by the statistics of
    # the images, or of the copies, that are looked at, as in training; or by the stored ones
    pictures: int = 3  # attention: of val, evenly spaced
    points: int = 1000  # map: images of val at most, as many of each class
    classes: int = 10  # map: at most, evenly spaced among all

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value, and what to give.
        """
        for name in self.what:
            if name not in WHAT:
                near = did_you_mean(name, WHAT) or f"; known: {', '.join(WHAT)}"
                raise ValueError(f"what ({name!r}) is no analysis{near}")
        if self.images < 2:
            raise ValueError(f"images ({self.images}) must be at least 2: one has no other")
        if min(self.transforms, self.pictures) < 1:
            raise ValueError(
                f"transforms ({self.transforms}) and pictures ({self.pictures}) must be at least 1"
            )
        if self.classes < 2:
            raise ValueError(f"classes ({self.classes}) must be at least 2")
        if self.points < 2 * self.classes:
            raise ValueError(
                f"points ({self.points}) must be at least 2 for each of classes ({self.classes})"
            )


class LeftOut(ValueError):
    """The runs don't allow an analysis; the message says why."""


def evaluate(task: Task, options: Options) -> Table:
    """What was asked for of one RUN, and with the last one what they share.

    Raises:
        ValueError: matplotlib is missing, the images can't be used, a checkpoint is damaged; or an
            analysis that was named in `what` can't be done.
    """
    drawing.require()
    if "map" in options.what:
        embedding_map.require()
    runs = task.runs or (task.trained,)
    rows: list[list[Cell]] = []
    for what in options.what or WHAT:
        try:
            if what == "spectrum":
                rows += _spectrum(task)
            elif what == "attention":
                rows += _attention(task, options)
            elif what == "map":
                rows += _map(task, options)
            elif what == "depth":
                rows += _depth(task)
            if what in SHARED and task.trained is runs[-1]:
                rows += _shared(what, task, runs, options)
        except LeftOut as reason:
            if options.what:
                raise ValueError(f"analyze.what ({what}): {reason}") from None
            task.say(f"{what} is left out: {reason}")
    return Table(
        title="analyze", columns=["run", "analysis", "number", "value"], rows=rows, plain=("value",)
    )


# -- of each run --------------------------------------------------------------------------------


def _spectrum(task: Task) -> list[list[Cell]]:
    """Numbers of this run, kept for the picture that it may share."""
    train, _, _ = task.splits()
    stage, features, _ = _last(task, train)
    if len(features) < 2:
        raise LeftOut(f"{train.samples.root} has {len(features)} image, and one has no spectrum")
    found = spectrum.spectrum(features)
    numbers = {
        "effective_rank": found.effective_rank,
        "participation_ratio": found.participation_ratio,
        "dead_dimensions": found.dead,
        "dimensions": len(found.std),
        "mean_std": float(found.std.mean()),
        "images": found.count,
    }
    if distributed.rank() == 0:
        kept = {
            **numbers,
            "run": task.trained.name,
            "weights": task.trained.weights,
            "stage": stage,
            "root": str(train.samples.root),
            "std": found.std.tolist(),
            "singular_values": found.singular_values.tolist(),
        }
        with checkpoint.whole_file(_numbers_of(task, task.trained)) as file:
            file.write((json.dumps(kept, indent=1, allow_nan=False) + "\n").encode())
    task.log("spectrum", {"stage": stage, **numbers})
    return _rows(task.trained.name, "spectrum", numbers)


def _attention(task: Task, options: Options) -> list[list[Cell]]:
    """Maps of a few images; there are no numbers for the table."""
    _, val, _ = task.splits()
    rows = transforms.evenly(val.rows, options.pictures)
    [batches] = [
        list(each)
        for each in transforms.passes(
            val.reader,
            val.samples,
            [task.graph],
            rows,
            times=1,
            seed=task.seed,
            device=task.accelerator.device,
            loading=task.loading,
            say=task.say,
        )
    ]
    backbone = task.trained.backbone.to(task.accelerator.device).eval()
    try:
        found = [attention.maps(backbone, each, task.trained.standardize) for each in batches]
    except attention.NoMaps as reason:
        raise LeftOut(str(reason)) from None
    images = np.concatenate([image for image, _ in found])
    maps = {name: np.concatenate([each[name] for _, each in found], axis=1) for name in found[0][1]}
    caption = (
        f"Attention maps of {task.trained.name}: |activation|^p summed over the channels of each "
        f"stage (size under its name), p = 1, 2, 4; {len(images)} images of {val.samples.root}; "
        "each map from its own least (dark) to its own greatest value (bright)."
    )
    numbers = {
        "run": task.trained.name,
        "powers": attention.POWERS,
        "maps": {name: each.tolist() for name, each in maps.items()},
    }
    _save(task, attention.draw(images, maps, caption), _named("attention", task.trained), numbers)
    return []


def _map(task: Task, options: Options) -> list[list[Cell]]:
    """Both maps of a part of val."""
    try:
        embedding_map.require()
    except ValueError as reason:
        raise LeftOut(str(reason)) from None
    _, val, classes = task.splits()
    stage, features, labels = _last(task, val)
    try:
        chosen = embedding_map.subset(
            labels, most=options.points, classes=options.classes, seed=task.seed
        )
        taken = np.asarray(features[chosen], np.float32)
        near = embedding_map.neighbours(taken, seed=task.seed)
    except embedding_map.TooFew as reason:
        raise LeftOut(str(reason)) from None
    principal, parts = embedding_map.principal(taken)
    names = [classes[label] for label in labels[chosen]]
    maps = {f"principal components ({parts.sum():.0%} of the variance)": principal, "t-SNE": near}
    shown = len(set(names))
    caption = (
        f"Features ({stage}) of {task.trained.name} in two dimensions: {len(chosen)} images of "
        f"{val.samples.root}, {shown} of {len(classes)} classes, drawn with seed {task.seed}. In a "
        "t-SNE map neighbours count; sizes and distances of its groups mean nothing."
    )
    numbers = {
        "run": task.trained.name,
        "stage": stage,
        "labels": names,
        "principal_components": principal.tolist(),
        "tsne": near.tolist(),
        "explained": parts.tolist(),
    }
    _save(task, embedding_map.draw(maps, names, caption), _named("map", task.trained), numbers)
    return _rows(
        task.trained.name,
        "map",
        {"variance in 2 components, %": 100 * float(parts.sum()), "images": len(chosen)},
    )


def _depth(task: Task) -> list[list[Cell]]:
    """The linear probe of every stage, by L-BFGS where the journal has none of this very kind."""
    if len(_by_depth(task, task.trained)) < 2:
        task.say(
            f"depth: the journal of {task.trained.name} has no linear probe of its stages on these "
            "images with these settings: L-BFGS is run"
        )
        linear.evaluate(task, linear.Options())
    return []


# -- what runs share ----------------------------------------------------------------------------


def _shared(what: str, task: Task, runs: tuple[Trained, ...], options: Options) -> list[list[Cell]]:
    if what == "invariance":
        return _invariance(task, runs, options)
    if distributed.rank() != 0:
        return []  # the rest is read from files that only the first process writes
    if what == "depth":
        return _draw_depth(task, runs)
    if what == "pretext":
        return _draw_pretext(task, runs)
    return _draw_spectra(task, runs)


def _invariance(task: Task, runs: tuple[Trained, ...], options: Options) -> list[list[Cell]]:
    """Backbones on the same pixels, and PIRL's heads on those of their own graph."""
    _, val, _ = task.splits()
    rows = transforms.evenly(val.rows, options.images)
    if len(rows) < 2:
        raise LeftOut(f"{val.samples.root} has one image: there is no other to compare with")
    graphs = {trained.name: _transforming(task, trained, val) for trained in runs}
    # The graph of PIRL puts out both: an image and its transformed copy.
    shared = next((found for found in graphs.values() if found and len(found) == 1), None)
    shared = shared or next((found for found in graphs.values() if found), None)
    if shared is None:
        raise LeftOut("no run was trained on patches or turned copies of images")

    def measure(module: nn.Module, embed: invariance.Embed, on: list[Part]) -> invariance.Distances:
        same_images = transforms.passes(
            val.reader,
            val.samples,
            on,
            rows,
            times=options.transforms,
            seed=task.seed,
            device=task.accelerator.device,
            loading=task.loading,
            say=task.say,
        )
        with invariance.statistics(module, options.batchnorm):
            return invariance.measure(embed, same_images, seed=task.seed)

    as_trained: dict[str, invariance.Distances] = {}
    features: dict[str, invariance.Distances] = {}
    heads = []
    for trained in runs:
        backbone = trained.backbone.to(task.accelerator.device).eval()
        embed = invariance.of_backbone(backbone, trained.standardize)
        features[trained.name] = as_trained[trained.name] = measure(backbone, embed, shared)
        try:
            objective = finished_run.pirl_with_heads(trained)
        except finished_run.NoCheckpoint as reason:
            task.say(f"invariance: without the heads of {trained.name}: {reason}")
            continue
        own = graphs[trained.name]
        if objective is not None and own is not None:
            objective = objective.to(task.accelerator.device)
            as_trained[trained.name] = measure(objective, invariance.with_heads(objective), own)
            heads.append(trained.name)
    panels = {}
    if heads:
        others = " (other runs: backbone features)" if len(heads) < len(runs) else ""
        panels[f"f and g: PIRL's own heads{others}"] = as_trained
    panels["backbone features of the image, and their mean over the transformed copy"] = features
    first = features[runs[0].name]
    own_graph = " (PIRL's heads: by their run's own graph)" if heads else ""
    caption = (
        f"Distance of f(image) and g(transformed image) as unit vectors: {first.images} images of "
        f"{val.samples.root}, {len(first.same) // first.images} transforms of each by "
        f"{' and '.join(graph.use for graph in shared)}"
        f"{own_graph}. Dashed: to another image's "
        "transformed copy, the spread of the features: only against it is a small distance small. "
        f"Batch norm by {'their own' if options.batchnorm == 'batch' else 'stored'} statistics."
    )
    numbers: dict[str, Any] = {
        "root": str(val.samples.root),
        "graphs": [g.use for g in shared],
        "batchnorm": options.batchnorm,
    }
    table: list[list[Cell]] = []
    for kind, panel in (("heads", {n: as_trained[n] for n in heads}), ("backbone", features)):
        numbers[kind] = {}
        for name, each in panel.items():
            numbers[kind][name] = {
                **each.numbers(),
                "edges": invariance.BINS.tolist(),
                "same": np.histogram(each.same, invariance.BINS)[0].tolist(),
                "other": np.histogram(each.other, invariance.BINS)[0].tolist(),
            }
            table += _rows(name, f"invariance, {kind}", each.numbers())
    _save(task, invariance.draw(panels, caption), "invariance", numbers)
    for trained in runs:  # each into its own journal
        kind = "heads" if trained.name in heads else "backbone"
        found = as_trained[trained.name].numbers()
        _of_other(task, trained).log(
            "invariance", {"functions": kind, "batchnorm": options.batchnorm, **found}
        )
    return table


def _transforming(task: Task, trained: Trained, val: Split) -> list[Part] | None:
    """The graphs that give an image and its transformed copy; None where the run has no such.

    They are the run's own, and where that gives no image, the evaluation graph too.
    """
    own = finished_run.part(trained, "pipeline")
    if own is None:
        return None
    names = transforms.outputs(val.reader, val.samples, own)
    if not names & set(transforms.VIEWS):
        return None
    if "image" in names:
        return [own]
    if "image" in transforms.outputs(val.reader, val.samples, task.graph):
        return [own, task.graph]
    task.say(
        f"invariance: {own.use} and {task.graph.use} put out no whole image: to see it, give "
        "evaluation.use=pipelines.evaluation"
    )
    return None


def _draw_depth(task: Task, runs: tuple[Trained, ...]) -> list[list[Cell]]:
    found = {trained.name: _by_depth(task, trained) for trained in runs}
    if lacking := [name for name, each in found.items() if not each]:
        raise LeftOut(f"metrics.jsonl of {', '.join(lacking)} has no accuracy by depth")
    _, val, classes = task.splits()
    caption = (
        "Accuracy of multinomial logistic regression (L-BFGS) on frozen features of each stage, on "
        f"{len(val.rows)} images of {val.samples.root}, {len(classes)} classes."
    )
    figure = depth.draw(found, 1 / len(classes), caption)
    _save(task, figure, "depth", {"accuracy": found, "chance": 1 / len(classes)})
    table: list[list[Cell]] = []
    for name, each in found.items():
        table += _rows(name, "linear by depth, %", {s: 100 * value for s, value in each.items()})
    return table


def _draw_pretext(task: Task, runs: tuple[Trained, ...]) -> list[list[Cell]]:
    reached = {each.name: pretext.pretext_accuracy(_journal(task, each)) for each in runs}
    asked = [each for each in runs if reached[each.name] is not None]
    if len(asked) < 2:
        found = "one" if asked else "none"
        raise LeftOut(f"a relation needs two runs with a pretext accuracy, there is {found}")
    probe, downstream = _downstream(task, asked)
    points = [
        pretext.Point(
            name=each.name,
            task=_task_of(each),
            pretext=reached[each.name] or 0.0,
            downstream=downstream[each.name],
        )
        for each in asked
    ]
    overall = pretext.rank_correlation(points)
    caption = (
        "Pretext accuracy: mean of the last tenth of training, on augmented training images. Over "
        f"all {len(points)} runs the rank correlation (Spearman) is "
        f"{'not defined' if overall is None else f'{overall:.2f}'}; between tasks it says little, "
        "as each has its own chance level."
    )
    numbers: dict[str, Any] = {
        "downstream": probe,
        "runs": [vars(point) for point in points],
        "spearman": overall,
        "n": len(points),
        "spearman_by_task": {
            name: pretext.rank_correlation([each for each in points if each.task == name])
            for name in sorted({each.task for each in points})
        },
    }
    _save(task, pretext.draw(points, probe, caption), "pretext", numbers)
    table: list[list[Cell]] = []
    for point in points:
        both = {"pretext accuracy, %": 100 * point.pretext, probe: 100 * point.downstream}
        table += _rows(point.name, "pretext", both)
    table.append([f"all {len(points)}", "pretext", "rank correlation", overall])
    return table


def _downstream(task: Task, runs: list[Trained]) -> tuple[str, dict[str, float]]:
    """One measure for all, as accuracies of different ones have no order: its name, and each."""
    linear_of = {each.name: list(_by_depth(task, each).values()) for each in runs}
    if all(linear_of.values()):
        last = {name: values[-1] for name, values in linear_of.items()}
        return "linear accuracy of the last stage, %", last
    knn = {each.name: pretext.knn_accuracy(_journal(task, each), each.step) for each in runs}
    lacking = [name for name, found in knn.items() if found is None]
    if lacking:
        names = ", ".join(lacking)
        raise LeftOut(f"{names} has no accuracy on these images: run `linear` on it first")
    counts = {found[1] for found in knn.values() if found}
    recipes = {each.name: finished_run.recipe(each) for each in runs}
    if unknown := [name for name, recipe in recipes.items() if "probe" not in recipe]:
        raise LeftOut(
            f"the card of {', '.join(unknown)} has no recipe, which alone says on which images its "
            "kNN was measured: run `linear` on all of them first"
        )
    roots = {str(recipe["probe"]["root"]) for recipe in recipes.values()}
    if len(counts) > 1 or len(roots) > 1:
        raise LeftOut(
            f"kNN was measured with k {', '.join(map(str, sorted(counts)))} on "
            f"{', '.join(sorted(roots))}, which have no order: run `linear` on all of them first"
        )
    label = f"kNN accuracy (k = {counts.pop()}), %"
    return label, {name: found[0] for name, found in knn.items() if found}


def _draw_spectra(task: Task, runs: tuple[Trained, ...]) -> list[list[Cell]]:
    spectra = {}
    for trained in runs:
        found = json.loads(_numbers_of(task, trained).read_text(encoding="utf-8"))
        spectra[trained.name] = spectrum.Spectrum(
            count=found["images"],
            std=np.array(found["std"]),
            singular_values=np.array(found["singular_values"]),
            effective_rank=found["effective_rank"],
            participation_ratio=found["participation_ratio"],
            dead=found["dead_dimensions"],
        )
    train, _, _ = task.splits()
    caption = (
        f"Features of {len(train.rows)} images of {train.samples.root}, centred. Effective rank: "
        "exp of the entropy of the singular values (Roy & Vetterli 2007)."
    )
    _save(
        task,
        spectrum.draw(spectra, caption),
        "spectrum",
        {
            name: {"singular_values": each.singular_values.tolist()}
            for name, each in spectra.items()
        },
    )
    return []


# -- small things -------------------------------------------------------------------------------


def _last(task: Task, split: Split) -> tuple[str, np.ndarray, np.ndarray]:
    """The name and the features [N, D] of the backbone's last stage, and labels [N]."""
    found = task.extract(split, replace(task.features, stages=("last",)))
    [(name, values)] = found.stages.items()
    return name, values, found.labels


def _rows(run: str, analysis: str, numbers: dict[str, Any]) -> list[list[Cell]]:
    return [[run, analysis, name.replace("_", " "), value] for name, value in numbers.items()]


def _save(task: Task, figure: "Figure", name: str, numbers: dict[str, Any]) -> None:
    if distributed.rank() == 0:
        task.say(f"{drawing.save(figure, task.out, name, numbers)}")


def _named(what: str, trained: Trained) -> str:
    """A file's name for each run: runs may share a folder, and random:resnet10 is none."""
    return f"{what}-{re.sub(r'[^A-Za-z0-9._-]+', '-', trained.name)}"


def _numbers_of(task: Task, trained: Trained) -> Path:
    return _out(task, trained) / f"{_named('spectrum', trained)}.json"


def _by_depth(task: Task, trained: Trained) -> dict[str, float]:
    train, val, classes = task.splits()
    its = _of_other(task, trained)
    settings = {
        "step": trained.step,
        **its.conditions(),
        **linear.settings(its, linear.Options()),
        "classes": len(classes),
    }
    return depth.accuracies(
        _journal(task, trained),
        settings,
        train_images=len(train.rows),
        val_images=len(val.rows),
    )


def _journal(task: Task, trained: Trained) -> list[dict[str, Any]]:
    return journal.read(trained.folder or _out(task, trained))


def _of_other(task: Task, trained: Trained) -> Task:
    """The task of another run of this command, or of the same."""
    if trained is task.trained:
        return task
    graph = next(graph for run, graph in zip(task.runs, task.graphs, strict=True) if run is trained)
    return replace(task, trained=trained, out=_out(task, trained), graph=graph)


def _out(task: Task, trained: Trained) -> Path:
    """The folder of another run of this command."""
    return next(out for run, out in zip(task.runs, task.outs, strict=True) if run is trained)


def _task_of(trained: Trained) -> str:
    objective = finished_run.recipe(trained).get("objective")
    return "none" if objective is None else str(objective["use"]).rpartition(".")[2]
