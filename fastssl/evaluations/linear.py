"""Logistic regression on frozen features, at every depth of the backbone at once.

By the papers' protocols, which fastssl.linear.protocols lists: L-BFGS or SGD, linear or with a
hidden layer. The accuracy is that of the last step, over the images that val has: nothing is chosen
by val, and the depth that is named best is a remark on the table.
"""

import importlib
import time
from dataclasses import asdict, replace
from statistics import mean, stdev
from typing import Any, Literal

from fastssl.config import Part
from fastssl.evaluation_task import Cell, Table, Task
from fastssl.features import Features
from fastssl.labelled import Split
from fastssl.linear import logistic, logistic_augmented, logistic_sgd
from fastssl.linear.head import Head
from fastssl.linear.logistic import Predictions, Rows
from fastssl.linear.protocols import POOLING, Options, Sgd

__all__ = ["HELP", "Options", "evaluate"]

HELP = "logistic regression on frozen features, or an MLP, at every depth; by the papers' protocols"


def evaluate(task: Task, options: Options) -> Table:
    """A column a depth; a line of the journal each.

    Raises:
        ValueError: L-BFGS or a batch needs more than there is, labels or features that can't be
            learnt from, or training diverges.
    """
    train, val, classes = task.splits()
    pool, size = _pooling(task, options)
    task = replace(task, features=replace(task.features, pool=pool, size=size))
    sgd = options.sgd()
    if sgd is not None:
        logistic_sgd.check_batch(sgd.batch, len(train.rows))
    graph = augmenting(task, sgd)
    _say_what(task, options, sgd, train)
    asked = task.extract(val)
    if sgd is None:
        for stage, values in asked.stages.items():
            _check_memory(options, stage, len(classes), values.shape[1])
    known = task.extract(train) if graph is None else None
    predictions: dict[str, list[Predictions]] = {stage: [] for stage in asked.stages}
    notes: dict[str, dict[str, Any]] = {stage: {} for stage in asked.stages}
    if sgd is None:
        assert known is not None
        for stage in asked.stages:
            found, notes[stage] = _by_lbfgs(task, options, known, asked, stage, len(classes))
            predictions[stage].append(found)
    for seed in options.seeds if sgd is not None else ():
        assert sgd is not None
        if known is not None:
            heads = _by_sgd(task, options, sgd, known, len(classes), seed)
        else:
            assert graph is not None
            heads = _on_augmented(task, options, sgd, train, asked, graph, len(classes), seed)
        for stage, head in heads.items():
            rows = _rows(task, options, asked, stage)
            predictions[stage].append(logistic.predict(rows, head))
    images = {
        "classes": len(classes),
        "train_images": len(train.rows if known is None else known.labels),
        "val_images": len(asked.labels),
    }
    accuracies = {}
    for stage, found in predictions.items():
        top1 = [float((each.classes == asked.labels).mean()) for each in found]
        top5 = mean(float(each.in_five.mean()) for each in found)
        accuracies[stage] = top1
        spread = {"accuracies": top1, "spread": stdev(top1)} if len(top1) > 1 else {}
        task.log(
            "linear",
            {
                "stage": stage,
                "accuracy": mean(top1),
                "top5": top5,
                **spread,
                **settings(task, options),
                **images,
                **notes[stage],
            },
        )
    return _table(options, accuracies, images)


def settings(task: Task, options: Options) -> dict[str, Any]:
    """How the accuracies of `evaluate` are measured, as each line of the journal says it.

    L-BFGS's penalty comes on top, `l2`, which by default is another at each stage.
    """
    sgd = options.sgd()
    pool, size = _pooling(task, options)
    return {
        "protocol": options.protocol,
        "solver": "lbfgs" if sgd is None else "sgd",
        **_settings(options, sgd),
        "features_pool": pool,
        "features_size": size,
    }


def _by_lbfgs(
    task: Task, options: Options, known: Features, asked: Features, stage: str, classes: int
) -> tuple[Predictions, dict[str, Any]]:
    began = time.monotonic()
    rows = _rows(task, options, known, stage, classes)
    l2 = 100 / (rows.length * classes) if options.l2 is None else options.l2
    task.say(
        f"linear: {stage}: {rows.count:,} x {rows.length:,}: {rows.bytes / 1e9:.3g} GB a pass"
        f"{', read once' if rows.kept else ''}; l2 {l2:g}"
    )
    standard = logistic.standard_of(rows) if options.standardize else None
    found = logistic.fit(
        rows,
        classes=classes,
        l2=l2,
        updates=options.updates,
        tolerance=options.tolerance,
        standard=standard,
    )
    end = "ended" if found.updates < options.updates else "stopped by linear.updates"
    task.say(
        f"linear: {stage}: {end} after {found.updates} updates, {found.passes} passes and "
        f"{time.monotonic() - began:.1f} s: objective {found.objective:.4g}, greatest gradient "
        f"{found.gradient:.1g}"
    )
    val = _rows(task, options, asked, stage)
    notes = {
        "l2": l2,
        "objective": found.objective,
        "gradient": found.gradient,
        "updates_done": found.updates,
        "passes": found.passes,
    }
    return logistic.predict(val, logistic.scores_of(found, standard)), notes


def _by_sgd(
    task: Task, options: Options, sgd: Sgd, known: Features, classes: int, seed: int
) -> dict[str, Head]:
    heads = {}
    for stage, values in known.stages.items():
        standard = None
        if options.standardize:
            standard = logistic.standard_of(_rows(task, options, known, stage, classes))
        began, losses = time.monotonic(), []
        heads[stage] = _head(sgd, values.shape[1], classes, seed, task, standard)
        logistic_sgd.train(
            heads[stage],
            values,
            known.labels,
            sgd,
            seed=seed,
            device=task.accelerator.device,
            memory=options.memory_gb * 1e9,
            told=lambda epoch, loss, losses=losses: losses.append(loss),
        )
        task.say(
            f"linear: {stage}, seed {seed}: loss {losses[-1]:.4g} in the last epoch, "
            f"{time.monotonic() - began:.1f} s"
        )
    return heads


def _on_augmented(
    task: Task,
    options: Options,
    sgd: Sgd,
    train: Split,
    asked: Features,
    graph: Part,
    classes: int,
    seed: int,
) -> dict[str, Head]:
    heads = {
        stage: _head(sgd, values.shape[1], classes, seed, task, None)
        for stage, values in asked.stages.items()
    }
    began = time.monotonic()
    logistic_augmented.train(
        heads,
        task,
        train,
        graph,
        sgd,
        seed=seed,
        told=lambda epoch, loss: task.say(
            f"linear: seed {seed}, epoch {epoch}/{sgd.epochs}: mean loss of the stages {loss:.4g}, "
            f"{time.monotonic() - began:.1f} s"
        ),
    )
    return heads


def _head(
    sgd: Sgd,
    length: int,
    classes: int,
    seed: int,
    task: Task,
    standard: logistic.Standard | None,
) -> Head:
    head = Head(
        length,
        classes,
        batchnorm=sgd.batchnorm,
        hidden=sgd.hidden,
        dropout=sgd.dropout,
        seed=seed,
        standard=standard,
    )
    return head.to(task.accelerator.device)


def _rows(
    task: Task, options: Options, features: Features, stage: str, classes: int | None = None
) -> Rows:
    """This process's; kept in memory where `classes` says that L-BFGS will read them often."""
    length = features.stages[stage].shape[1]
    memory = 0.0
    if classes is not None:
        memory = options.memory_gb * 1e9 - _bytes(options, classes, length)
    return Rows(
        features.stages[stage],
        features.labels,
        stage=stage,
        block=options.block,
        device=task.accelerator.device,
        memory=memory,
    )


def _bytes(options: Options, classes: int, length: int) -> int:
    return logistic.bytes_needed(classes, length, block=options.block)


def _check_memory(options: Options, stage: str, classes: int, length: int) -> None:
    needed = _bytes(options, classes, length) / 1e9
    if needed > options.memory_gb:
        raise ValueError(
            f"linear: L-BFGS on {stage} ({length:,} features, {classes:,} classes, blocks of "
            f"{options.block:,} rows) needs {needed:.3g} GB on each process, and linear.memory_gb "
            f"is {options.memory_gb:g}: give linear.memory_gb={needed + 0.1:.1f} if the device has "
            "it, a smaller linear.block or features.size, fewer features.stages, or train by SGD "
            "(linear.protocol=goyal)"
        )


def augmenting(task: Task, sgd: Sgd | None) -> Part | None:
    """The graph that images are augmented by, in the sizes of the evaluation graph; None: none.

    Raises:
        ValueError: the evaluation graph has no such sizes.
    """
    if sgd is None or sgd.augment == "none":
        return None
    if task.graph.use != "pipelines.evaluation":
        raise ValueError(
            f"linear.augment={sgd.augment} takes its sizes from pipelines.evaluation, and this "
            f"run is evaluated by {task.graph.use}: give linear.augment=none"
        )
    resize, crop = task.graph.options.resize, task.graph.options.crop
    if task.graph.options.interpolation != "bilinear":
        task.say(
            f"linear.augment={sgd.augment} resizes training images bilinear, those tested on are "
            f"{task.graph.options.interpolation}: linear.augment=none has both alike"
        )
    if sgd.augment == "random_crop":
        if crop == resize:
            task.say(
                f"warning: linear.augment=random_crop has no margin to crop at random, for images "
                f"are resized to {resize} and cropped to {crop}: square ones are not augmented at "
                f"all; K19 has 256 and 224, here evaluation.resize={round(crop * 256 / 224)}"
            )
        module = importlib.import_module("pipelines.random_crop")
        return Part(module.__name__, module, module.Options(resize=resize, crop=crop))
    module = importlib.import_module("pipelines.single_view")
    bare = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0}
    made = module.Options(image_size=crop, image_area=(0.08, 1.0), flip=0.5, **bare)
    return Part(module.__name__, module, made)


def _say_what(task: Task, options: Options, sgd: Sgd | None, train: Split) -> None:
    if sgd is None:
        task.say(
            f"linear: {options.protocol}: L-BFGS on {len(train.rows):,} images, at most "
            f"{options.updates} updates a stage of about 1.1 passes over its features each"
        )
        return
    many = len(options.seeds)
    drops = ", ".join(f"{each:g}" for each in sgd.milestones)
    passes = f"; {many * sgd.epochs} passes of the backbone over the images"
    task.say(
        f"linear: {options.protocol}: SGD, {sgd.epochs} epochs of {len(train.rows):,} images, "
        f"batch {sgd.batch}, lr {sgd.lr * sgd.batch / 256:g}"
        f"{f' (x {sgd.gamma:g} at {drops})' if drops else ''}, "
        f"{many} {'seed' if many == 1 else 'seeds'}{passes if sgd.augment != 'none' else ''}"
    )


def _pooling(task: Task, options: Options) -> tuple[Literal["max", "avg"], int]:
    """What the command line says of `features` has precedence over the protocol."""
    pool, size = POOLING[options.protocol]
    return task.features.pool or pool, task.features.size or size


def _settings(options: Options, sgd: Sgd | None) -> dict[str, Any]:
    if sgd is None:
        given = {} if options.l2 is None else {"l2_given": options.l2}
        own = {"updates": options.updates, "tolerance": options.tolerance, **given}
        return {**own, "standardize": options.standardize}
    return {**asdict(sgd), "standardize": options.standardize, "seeds": options.seeds}


def _table(options: Options, accuracies: dict[str, list[float]], images: dict[str, int]) -> Table:
    best = max(accuracies, key=lambda stage: mean(accuracies[stage]))
    many = len(next(iter(accuracies.values())))
    cells: list[Cell] = [
        mean(top1) if many == 1 else f"{100 * mean(top1):.1f} +- {100 * stdev(top1):.1f}"
        for top1 in accuracies.values()
    ]
    title = (
        f"linear accuracy in % by depth, protocol {options.protocol}"
        f"{f', {many} seeds' if many > 1 else ''} ({images['train_images']:,} training images, "
        f"{images['val_images']:,} to classify)"
    )
    return Table(title, [*accuracies, "best"], [[*cells, best]])
