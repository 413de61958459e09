"""Few labels: how good the backbone is where only some images of each class have one.

linear    logistic regression by L-BFGS on the frozen features of those images
finetune  all of the network and a linear head, as VISSL's semi-supervised benchmark (70 epochs,
          batch 256, x 0.1 at 30, Nesterov, no weight decay; lr 0.01 as PIRL's, 0.05 in VISSL's
          yaml; random resized crop and flip), each a run of its own that goes on after a stop
Every seed takes other images, the same ones for every RUN. The head is tested on all of val.
A signal ends the command with 75, as it does training, once a checkpoint is written.
"""

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import yaml

from fastssl import config, distributed, journal, stopping
from fastssl.config import RecipeError
from fastssl.evaluation_task import Cell, Table, Task
from fastssl.labelled import Split
from fastssl.linear import logistic
from fastssl.sweeping import Runner

HELP = "1 % and 10 % of the labels, or K of each class: logistic regression and fine-tuning"
WHOLE_IMAGES = "pipelines.evaluation"  # the graph of fine-tuning's test on val
_FEW_STEPS = 500  # below which fine-tuning has hardly begun: a guess, not measured
# Keys that one method reads alone.
_OF_METHOD = {
    "linear": ("stage", "l2", "updates"),
    "finetune": (
        *("epochs", "lr", "head_lr", "milestones", "batch", "steps", "train_stages"),
        *("image_area", "layer_decay", "mixup"),
    ),
}
# Keys of `data` that take a subset themselves, and what to give instead.
_SUBSETS = {
    "limit": "a smaller data.root",
    "fraction": "fewlabels.fractions",
    "per_class": "fewlabels.per_class",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The `fewlabels` command."""

    fractions: tuple[float, ...] = (0.01, 0.1)  # of each class's images, at least one
    per_class: tuple[int, ...] = ()  # images of each class
    seeds: tuple[int, ...] = (0, 1, 2)  # which images; of fine-tuning also head, order and crops
    method: tuple[Literal["linear", "finetune"], ...] = ("linear", "finetune")
    # linear
    stage: str = "last"  # of the backbone; last: what forward returns
    l2: float | None = None  # of mean cross-entropy + l2/2 |W|^2; null: 100 / (features * classes)
    updates: int = 800  # of L-BFGS at most
    # finetune
    epochs: int = 70
    lr: float = 0.01  # for 256 images and not scaled down: smaller batches are those of few images
    head_lr: float = 1.0  # what the head's lr is multiplied by (mmselfsup tries 1, 10, 100)
    milestones: tuple[float, ...] = (30,)  # epochs
    batch: int = 256  # at most; never more than there are images
    steps: int = 0  # at least so many optimizer steps: more epochs, milestones in proportion
    train_stages: Literal["all"] | int = "all"
    image_area: tuple[float, float] = (0.08, 1.0)  # of the random resized crop
    layer_decay: float = 1.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        if not self.fractions and not self.per_class:
            raise ValueError("fractions and per_class are both empty: give [0.01] or [10]")
        if not all(0 < each <= 1 for each in self.fractions):
            raise ValueError(f"fractions ({list(self.fractions)}) must be above 0, at most 1")
        if not all(each >= 1 for each in self.per_class):
            raise ValueError(f"per_class ({list(self.per_class)}) must be at least 1")
        if not self.seeds or not all(0 <= each < 2**31 for each in self.seeds):
            raise ValueError(f"seeds ({list(self.seeds)}) must be one or more in 0 ... {2**31 - 1}")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds ({list(self.seeds)}) has a seed twice")
        if not self.method:
            raise ValueError("method is empty: give linear, finetune or both")
        if self.l2 is not None and self.l2 < 0:
            raise ValueError(f"l2 ({self.l2}) must be at least 0, or null")
        for name in ("epochs", "batch", "updates"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} ({vars(self)[name]}) must be at least 1")
        if self.steps < 0:
            raise ValueError(f"steps ({self.steps}) must be at least 0")
        defaults = {field.name: field.default for field in fields(self)}
        for method, names in _OF_METHOD.items():
            for name in names if method not in self.method else ():
                if vars(self)[name] != defaults[name]:
                    raise ValueError(
                        f"{name} ({vars(self)[name]}) is read by method {method}, and method is "
                        f"{list(self.method)}: leave {name} out, or add {method}"
                    )


@dataclass(frozen=True)
class _Subset:
    """The images of one seed."""

    options: Any  # of the reader
    rows: np.ndarray  # int64, in the listing of all
    key: str  # "fraction" or "per_class"
    value: float | int
    seed: int


def evaluate(task: Task, options: Options) -> Table:
    """One row for each amount of labels and method: mean and deviation over the seeds.

    Raises:
        ValueError: a class has fewer images than asked for, several processes were asked to
            fine-tune, `data` takes a subset itself, or a fine-tuning failed.
        SystemExit: 75, a signal ended a fine-tuning; its checkpoint is written.
    """
    if "finetune" in options.method and distributed.world() > 1:
        raise ValueError(
            f"fewlabels.method: finetune runs in one process, here are {distributed.world()}: give"
            " --num_processes 1, or fewlabels.method=[linear]"
        )
    _refuse_subset(task)
    train_split, _, classes = task.splits()
    amounts: list[tuple[str, float | int]] = [("fraction", each) for each in options.fractions]
    amounts += [("per_class", each) for each in options.per_class]
    # all of them before the first is trained: a class may have too few images
    listed = [
        (train_split.samples.path(row), classes[label])
        for row, label in zip(train_split.rows.tolist(), train_split.labels, strict=True)
    ]
    subsets = {
        amount: [_subset(task, *amount, seed, train_split, listed) for seed in options.seeds]
        for amount in amounts
    }
    if "finetune" in options.method:
        _say_of_finetuning(task, options, subsets)
    rows: list[list[Cell]] = []
    for (key, value), drawn in subsets.items():
        labels = f"{value:.3g} of each class" if key == "per_class" else f"{100 * value:.3g} %"
        for method in options.method:
            measure = _linear if method == "linear" else _finetune
            found = [measure(task, options, each, len(classes)) for each in drawn]
            top1, top5 = ([each[place] for each in found] for place in (0, 1))
            settings = {"labels": labels, "method": method, "images": len(drawn[0].rows)}
            spreads = {}
            if len(drawn) > 1:
                spreads = {"std": statistics.stdev(top1), "top5_std": statistics.stdev(top5)}
            task.log(
                "fewlabels",
                {
                    **settings,
                    key: value,
                    "stage": options.stage if method == "linear" else "last",
                    "graph": task.graph.use if method == "linear" else WHOLE_IMAGES,
                    "accuracy": statistics.fmean(top1),
                    "top5": statistics.fmean(top5),
                    **spreads,
                    "seeds": list(options.seeds),
                    "accuracies": top1,
                },
            )
            rows.append([*settings.values(), _spread(top1), _spread(top5)])
    draws = "1 draw" if len(options.seeds) == 1 else f"{len(options.seeds)} draws"
    return Table(
        title=f"Few labels, {draws}: accuracy on val, %",
        columns=["labels", "method", "images", "top-1", "top-5"],
        rows=rows,
    )


def _refuse_subset(task: Task) -> None:
    """The subsets are drawn here: one that `data` takes would be drawn from, or in its place.

    Raises:
        ValueError: names the key.
    """
    given = vars(task.reader.options)
    for key, instead in _SUBSETS.items():
        if given.get(key) is not None:
            raise ValueError(
                f"data.{key} ({given[key]}): fewlabels draws its images itself, from all of "
                f"train: leave it out, or give {instead}"
            )


def _say_of_finetuning(
    task: Task, options: Options, subsets: dict[tuple[str, float | int], list[_Subset]]
) -> None:
    """What its figures can't tell: other images than the linear ones, or hardly a step."""
    if task.graph.use != WHOLE_IMAGES:
        task.say(
            f"fewlabels: linear is on features of {task.graph.use}, which the run is evaluated by; "
            f"finetune learns and is tested on whole images ({WHOLE_IMAGES})"
        )
    for (key, value), drawn in subsets.items() if options.steps == 0 else ():
        images = len(drawn[0].rows)
        batch, epochs, _ = schedule(options, images=images)
        steps = epochs * -(-images // batch)
        if steps < _FEW_STEPS:
            task.say(
                f"fewlabels: {key} {value:g}: {epochs} epochs of {images} images are {steps} "
                "steps, which may be too few to learn from; fewlabels.steps=1000 goes through "
                "them more often"
            )


def _subset(
    task: Task,
    key: str,
    value: float | int,
    seed: int,
    split: Split,
    listed: list[tuple[str, str]],
) -> _Subset:
    """What the reader takes, as rows of the whole listing.

    A subset is in the order of the whole, so that an image that a list names twice is two rows.

    Args:
        task: with the reader's options.
        key: of `data`, and its `value`.
        value: how many images.
        seed: which.
        split: the whole.
        listed: path and class of each of its rows.
    """
    if key not in vars(task.reader.options):
        raise ValueError(f"data.use {task.reader.use} has no option {key}: it can't take a subset")
    plain = {"fraction": None, "per_class": None, "limit": None, "root": split.samples.root}
    given = replace(task.reader.options, **(plain | {key: value, "subset_seed": seed}))
    chosen = split.reader.list_samples(given, cache=task.cache, say=lambda _: None)
    every = zip(split.rows.tolist(), listed, strict=True)
    rows = []
    for row in chosen.usable.tolist():
        image = (chosen.path(row), chosen.classes[chosen.labels[row]])
        rows.append(next(at for at, its in every if its == image))
    return _Subset(given, np.array(rows, np.int64), key, value, seed)


def _spread(values: list[float]) -> str:
    """Mean and standard deviation of the sample (n - 1) over the draws, in per cent."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


# -- linear -------------------------------------------------------------------------------------


def _linear(task: Task, options: Options, subset: _Subset, classes: int) -> tuple[float, float]:
    """Top-1 and top-5 on val."""
    train_split, val_split, _ = task.splits()
    chosen = replace(task.features, stages=(options.stage,))
    train_features = task.extract(train_split, chosen, key="fewlabels.stage")
    val_features = task.extract(val_split, chosen, key="fewlabels.stage")
    ((stage, feature_ND),) = train_features.stages.items()
    wanted = np.isin(train_features.rows, subset.rows)
    known = _rows(task, stage, feature_ND[wanted], train_features.labels[wanted])
    asked = _rows(task, stage, val_features.stages[stage], val_features.labels)
    l2 = 100 / (known.length * classes) if options.l2 is None else options.l2
    found = logistic.fit(known, classes=classes, l2=l2, updates=options.updates, tolerance=1e-5)
    predictions = logistic.predict(asked, logistic.scores_of(found, None))
    right = predictions.classes == val_features.labels
    return float(right.mean()), float(predictions.in_five.mean())


def _rows(task: Task, stage: str, features: np.ndarray, labels: np.ndarray) -> logistic.Rows:
    device = task.accelerator.device
    return logistic.Rows(features, labels, stage=stage, block=8192, device=device, memory=8e9)


# -- finetune -----------------------------------------------------------------------------------


def _finetune(task: Task, options: Options, subset: _Subset, classes: int) -> tuple[float, float]:
    """Top-1 and top-5 on val of a run in a process of its own: Accelerate's state is the process's.

    A run that is there already and of the same settings is read, or gone on with.
    """
    del classes
    weights = _as_run(task)
    recipe = _recipe(task, options, subset, weights)
    name = f"{subset.key}-{subset.value:g}-seed-{subset.seed}-{_fingerprint(task, recipe)}"
    folder = (task.out / "fewlabels" / name).absolute()
    if (folder / "backbone.json").exists():
        task.say(f"fewlabels: already fine-tuned: {folder}")
    else:
        path = folder.with_name(f"{name}.yaml")
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        task.say(f"fewlabels: fine-tuning on {len(subset.rows)} images, {folder}")
        _run(task, path, folder)
    heads = [line for line in journal.read(folder) if line.get("probe") == "val"]
    if not heads:
        raise RecipeError(f"{folder} was never tested on val: delete it, and start again")
    return heads[-1]["accuracy"], heads[-1]["top5"]


def _fingerprint(task: Task, recipe: dict[str, Any]) -> str:
    """The same settings find their run again, others make one of their own.

    What a run may go on with anew changes nothing that is learnt, and makes no other run. Files of
    train or val that were added, removed, moved or written to make one.
    """
    train_split, val_split, _ = task.splits()
    files = [[each.samples.fingerprint, each.samples.written] for each in (train_split, val_split)]
    learnt = {
        f"{section}.{key}": value
        for section, keys in recipe.items()
        for key, value in keys.items()
        if f"{section}.{key}" not in config.FREE_ON_RESUME
    }
    written = json.dumps([learnt, task.trained.weights, files], sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()[:8]


def _as_run(task: Task) -> Path:
    """The backbone as a run folder, whatever named it."""
    trained = task.trained
    folder = (task.out / "fewlabels" / f"start-{trained.weights[:8]}").absolute()
    if (folder / "backbone.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in trained.backbone.state_dict().items()
    }
    data = safetensors.torch.save(tensors)
    (folder / "backbone.safetensors").write_bytes(data)
    card = {
        "backbone": {"use": trained.use, "options": trained.options},
        "weights": "backbone.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(),
        "step": trained.step,
    }
    (folder / "backbone.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
    return folder


def schedule(options: Options, *, images: int) -> tuple[int, int, list[float]]:
    """Batch, epochs and milestones for a subset of so many images."""
    batch = min(options.batch, images)
    stretch = max(1.0, options.steps / (options.epochs * -(-images // batch)))
    epochs = round(options.epochs * stretch)
    drops = [each * stretch for each in options.milestones]
    return batch, epochs, [each for each in drops if each < epochs]


def _recipe(task: Task, options: Options, subset: _Subset, weights: Path) -> dict[str, Any]:
    """Of recipes/finetune.yaml's kind."""
    batch, epochs, drops = schedule(options, images=len(subset.rows))
    falls = {"schedule": "multistep", "milestones": drops} if drops else {"schedule": "constant"}
    evaluation = {"use": WHOLE_IMAGES}
    sizes = asdict(task.graph.options)
    kept = ("resize", "crop", "interpolation")
    evaluation |= {key: sizes[key] for key in kept if key in sizes}
    crop = sizes.get("crop", 224)
    mixed = str(task.accelerator.mixed_precision)
    still = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grayscale"), 0)
    return {
        "data": {"use": task.reader.use, **asdict(subset.options)},
        "pipeline": {
            "use": "pipelines.single_view",
            "image_size": crop,
            "image_area": list(options.image_area),
            **still,
        },
        "evaluation": evaluation,
        "backbone": {"use": task.trained.use, **task.trained.options},
        "objective": {
            "use": "fastssl.objectives.finetune",
            "train_stages": options.train_stages,
            "mixup": options.mixup,
        },
        "loader": asdict(task.loading),
        "optim": {
            "name": "sgd",
            "lr": options.lr,
            "head_lr": options.head_lr,
            "layer_decay": options.layer_decay,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 0.0,
            **falls,
        },
        "train": {
            "epochs": epochs,
            "batch": batch,
            "seed": subset.seed,
            "weights": str(weights),
            "precision": "fp32" if mixed == "no" else mixed,
            "keep": 1,
        },
        "probe": {"root": task.reader.options.root},
    }


def _run(task: Task, path: Path, folder: Path) -> None:
    """train.py in a process of its own, which gets the signals that this one gets.

    Raises:
        RecipeError: it ended with an error; its last line is told, the rest is in a file.
        SystemExit: 75, it was stopped.
    """
    log = folder.with_name(f"{folder.name}.log")
    runner = Runner()
    with runner.listening():
        code, said = runner.run(
            "fastssl.train", [str(path), f"train.out={folder}"], processes=1, log=log
        )
    if code == stopping.STOPPED:
        task.say("fewlabels: stopped; the same command goes on from there")
        raise SystemExit(stopping.STOPPED)
    if code:
        raise RecipeError(
            f"fewlabels: fine-tuning ended with {code}: {said} (all of it: {log}); the same "
            "command goes on from there"
        )
