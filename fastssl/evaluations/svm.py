"""Linear SVMs on frozen features: VOC07 classification as VISSL does it, its low-shot version.

data.root is VOCdevkit, or a folder with train/<class>/ and val/<class>/, on which the same SVMs are
fitted one against the rest. Features go through the evaluation graph once; x / (|x| + 1e-5) of them
is learnt from; C is chosen for every class by cross-validation; the mean over the classes of the
interpolated average precision is the result (`support_vectors` says what exactly).

Low-shot: k positive and (classes - 1) x k negative images of each class, drawn anew five times.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.utils import gather_object

from fastssl import distributed, starting, support_vectors, voc
from fastssl.evaluation_task import Cell, Table, Task
from fastssl.features import Features
from fastssl.labelled import Split
from fastssl.support_vectors import NEGATIVE, POSITIVE, Settings

HELP = "one-vs-rest linear SVMs: mAP on VOC07 (data.root=VOCdevkit) or class folders; low-shot"
LAST, ALL = "last", "all"
READER = "pipelines.readers.folder"
_SECONDS = 10  # between lines of progress


@dataclass(frozen=True, kw_only=True)
class Options:
    """VISSL's settings."""

    stages: tuple[str, ...] = (LAST,)  # of the backbone, by name; last: what forward returns; all
    year: int = 2007  # of VOC
    train: str = "trainval"  # of VOC: ImageSets/Main/<class>_<train>.txt
    test: str = "test"
    costs: Literal["vissl", "fair", "mm"] = "vissl"  # lists of C to choose from; `cost` ends it
    cost: tuple[float, ...] = ()  # a list of one's own; of one, nothing is chosen
    folds: int = 3
    max_iter: int = 2000
    shots: tuple[int, ...] = ()  # low-shot; VISSL: [1, 2, 4, 8, 16, 32, 64, 96]
    draws: int = 5  # for each number of shots
    shots_cost: float | None = None  # null: as VISSL, the C that is best on the test images, over
    # all classes and draws; a number needs no such look
    workers: int | None = None  # SVMs at once, each in a process; null: one a core, as memory goes

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        if not self.stages:
            raise ValueError("stages ([]) must name a stage, last or all")
        if {LAST, ALL} & {*self.stages} and len(self.stages) > 1:
            raise ValueError(f"stages ({list(self.stages)}): last and all stand alone")
        for name, least in (("folds", 2), ("max_iter", 1), ("draws", 1), ("workers", 1)):
            count = vars(self)[name]
            if count is not None and count < least:
                raise ValueError(f"{name} ({count}) must be at least {least}")
        if any(cost <= 0 for cost in (*self.cost, self.shots_cost or 1.0)):
            raise ValueError(f"cost ({list(self.cost)}) and shots_cost must be above 0")
        if self.cost and self.costs != "vissl":
            raise ValueError(
                f"costs ({self.costs}) is not read beside cost ({list(self.cost)}): give one"
            )
        few = (("draws", self.draws != 5), ("shots_cost", self.shots_cost is not None))
        for name, is_given in few if not self.shots else ():
            if is_given:
                raise ValueError(
                    f"{name} ({vars(self)[name]}) is for low-shot: leave it out, or give "
                    "svm.shots=[1,2,4,8,16,32,64,96]"
                )
        if any(shots < 1 for shots in self.shots):
            raise ValueError(f"shots ({list(self.shots)}) must be at least 1")


@dataclass(frozen=True)
class Data:
    """Images to learn from and to test on, with a label 1, 0 (ignored) or -1 for every class."""

    train: Split
    test: Split
    train_labels: np.ndarray  # int8 [N, C], of the splits' rows
    test_labels: np.ndarray  # int8 [M, C]
    classes: tuple[str, ...]
    is_voc: bool


def evaluate(task: Task, options: Options) -> Table:
    """One row a stage, and under it one for each number of shots.

    Raises:
        ValueError: scikit-learn or images are missing, or the data has no labels.
    """
    support_vectors.require()
    asked = task.features.stages
    if asked and options.stages not in ((ALL,), asked):
        raise ValueError(
            f"features.stages ({list(asked)}) is read where svm.stages is [all]: give "
            f"svm.stages=[{','.join(asked)}]"
        )
    data = _data(task, options)
    data = _only_usable_classes(data, options, task.say)
    is_all = options.stages == (ALL,)
    chosen = task.features if is_all else replace(task.features, stages=options.stages)
    key = "features.stages" if is_all else "svm.stages"
    train = task.extract(data.train, chosen, key=key)
    test = task.extract(data.test, chosen, key=key)
    train_labels = _labels_of(train, data.train, data.train_labels)
    test_labels = _labels_of(test, data.test, data.test_labels)
    counted = len(_tested(test_labels))
    title = f"SVM, {counted} classes of {_where(data, options)}, mean average precision"
    columns = ["stage", "features", "images", "mAP", "std", "mAP, not interpolated"]
    columns += [] if data.is_voc else ["accuracy"]
    rows: list[list[Cell]] = []
    for name in train.stages:
        problem = Problem(
            task,
            options,
            data.classes,
            name,
            _for_workers(train.stages[name]),
            train_labels,
            _for_workers(test.stages[name]),
            test_labels,
        )
        width = train.stages[name].shape[1]
        whole = _whole(problem, is_voc=data.is_voc)
        row: list[Cell] = [name, width, "all", whole["map"], None, whole["map_not_interpolated"]]
        rows.append(row + ([] if data.is_voc else [whole["accuracy"]]))
        task.log("svm", {"stage": name, **_what(data, options), **whole})
        for line in _few(problem):
            shots = f"{line['shots']} a class"
            row = [name, width, shots, line["map"], line.get("std"), None]
            rows.append(row + ([] if data.is_voc else [None]))
            task.log("svm_low_shot", {"stage": name, **_what(data, options), **line})
    return Table(title, columns, rows)


@dataclass(frozen=True)
class Problem:
    """A stage's features with the labels of all classes."""

    task: Task
    options: Options
    classes: tuple[str, ...]
    stage: str
    train: np.ndarray  # [N, D]
    train_labels: np.ndarray  # int8 [N, C]
    test: np.ndarray  # [M, D]
    test_labels: np.ndarray  # int8 [M, C]

    def settings(self, *, shuffle: bool) -> Settings:
        options = self.options
        costs = options.cost or support_vectors.COSTS[options.costs]
        return Settings(
            costs=costs,
            folds=options.folds,
            shuffle=shuffle,
            max_iter=options.max_iter,
            seed=self.task.seed,
        )

    def over_classes(
        self,
        function: Callable[..., Any],
        numbers: list[int],
        images: int,
        settings: Settings,
        draws: dict[int, list[np.ndarray]] | None = None,
    ) -> list[Any]:
        """What `function` makes of each class; all processes take a share.

        Args:
            function: fit_class or fit_few.
            numbers: the classes.
            images: that one SVM learns from.
            settings: of the SVM.
            draws: by class, for fit_few.
        """
        say, rank, world = self.task.say, distributed.rank(), distributed.world()
        here = numbers[rank::world]
        workers = support_vectors.workers_for(
            images,
            self.train.shape[1],
            asked=self.options.workers,
            processes_here=starting.environment("LOCAL_WORLD_SIZE", 1),
        )
        calls = [
            (
                *(self.train, self.train_labels[:, number]),
                *(self.test, self.test_labels[:, number]),
                settings,
                *([] if draws is None else [draws[number]]),
            )
            for number in here
        ]

        spoken = time.monotonic()

        def done(count: int) -> None:
            nonlocal spoken
            if time.monotonic() - spoken > _SECONDS and count < len(calls):
                spoken = time.monotonic()
                say(f"svm: {self.stage}: {count} of {len(calls)} classes")

        found = support_vectors.over_cores(function, calls, workers=workers, done=done)
        result_of = dict(gather_object(list(zip(here, found, strict=True))))
        return [result_of[number] for number in numbers]


def _whole(problem: Problem, *, is_voc: bool) -> dict[str, Any]:
    """From all images: the mean over the classes, what each gave, and how it came about."""
    numbers = list(range(len(problem.classes)))
    # VISSL cuts VOC's folds in the order of the list; class folders are listed class by class, and
    # a fold cut there would lack whole classes among its negatives.
    settings = problem.settings(shuffle=not is_voc)
    fitted = problem.over_classes(support_vectors.fit_class, numbers, len(problem.train), settings)
    tested = _tested(problem.test_labels)
    counted = [fitted[number] for number in tested]
    unfinished, fits = sum(each.unfinished for each in fitted), sum(each.fits for each in fitted)
    if unfinished:
        problem.task.say(
            f"svm: {problem.stage}: {unfinished} of {fits} fits stopped at svm.max_iter "
            f"({settings.max_iter}) before tolerance {settings.tolerance:g}; large C need more"
        )
    result = {
        "map": float(np.mean([each.interpolated for each in counted])),
        "map_not_interpolated": float(np.mean([each.average_precision for each in counted])),
    }
    if not is_voc:
        scores = np.stack([each.scores for each in fitted], axis=1)
        positive = problem.test_labels == POSITIVE
        right = scores.argmax(axis=1) == positive.argmax(axis=1)
        result["accuracy"] = float(right[positive.any(axis=1)].mean())  # of classes left out: none
    by_class = {problem.classes[number]: fitted[number].interpolated for number in tested}
    return {
        **result,
        "by_class": {name: round(area, 6) for name, area in by_class.items()},
        "chosen_costs": [each.cost for each in counted],
        "costs": list(settings.costs),
        "folds": settings.folds,
        "fits": fits,
        "unfinished": unfinished,
    }


def _few(problem: Problem) -> list[dict[str, Any]]:
    """For each number of shots: mean and standard deviation (n - 1) over the draws."""
    options, task = problem.options, problem.task
    tested = _tested(problem.test_labels)
    settings = problem.settings(shuffle=False)
    if options.shots_cost is not None:
        settings = replace(settings, costs=(options.shots_cost,))
    lines = []
    for shots in options.shots:
        positives = (problem.train_labels == POSITIVE).sum(axis=0)
        numbers = [number for number in tested if positives[number] >= shots]
        short = [
            f"{problem.classes[number]} ({positives[number]})"
            for number in tested
            if positives[number] < shots
        ]
        if not numbers:
            task.say(f"svm: no class has {shots} images: shots {shots} are left out")
            continue
        if short:
            task.say(
                f"svm: {shots} shots: left out, for they have fewer positive images: "
                f"{', '.join(short)}; the mean is over the other {len(numbers)}"
            )
        negatives = (len(problem.classes) - 1) * shots
        fewest = int((problem.train_labels[:, numbers] == NEGATIVE).sum(axis=0).min())
        if fewest < negatives:
            task.say(f"svm: {shots} shots: {fewest} negatives, not {negatives}: there are no more")
        # The same images for every stage and every RUN; others for each class and draw.
        draws = {
            number: [
                support_vectors.draw(
                    problem.train_labels[:, number],
                    positives=shots,
                    negatives=negatives,
                    seed=(task.seed, shots, each, number),
                )
                for each in range(options.draws)
            ]
            for number in numbers
        }
        found = problem.over_classes(
            support_vectors.fit_few, numbers, shots + negatives, settings, draws
        )
        areas = np.stack([areas for areas, _ in found])  # [class, draw, cost]
        by_draw = areas.mean(axis=0)
        best = int(by_draw.mean(axis=0).argmax())
        spread = {"std": float(by_draw[:, best].std(ddof=1))} if options.draws > 1 else {}
        lines.append(
            {
                "shots": shots,
                "map": float(by_draw[:, best].mean()),
                **spread,
                "draws": options.draws,
                "negatives": negatives,
                "cost": settings.costs[best],
                "cost_chosen_on": "test" if len(settings.costs) > 1 else "given",
                "classes_counted": len(numbers),
                "unfinished": sum(late for _, late in found),
            }
        )
    return lines


# -- data ---------------------------------------------------------------------------------------


def _data(task: Task, options: Options) -> Data:
    root, year = Path(task.reader.options.root).expanduser(), str(options.year)
    try:
        folder = voc.folder(root, year)
    except ValueError as not_voc:
        if any((root / name).is_dir() for name in ("ImageSets", "VOCdevkit", "Annotations")):
            raise
        try:
            train, test, classes = task.splits()
        except ValueError as error:
            raise ValueError(f"{error}\n(as VOC: {not_voc})") from error
        _refuse_of_voc(options, not_voc)
        columns = np.arange(len(classes))
        labels = [
            np.where(split.labels[:, None] == columns, POSITIVE, NEGATIVE).astype(np.int8)
            for split in (train, test)
        ]
        return Data(train, test, labels[0], labels[1], classes, is_voc=False)
    _refuse_subset_of_voc(task)
    listed = [voc.classification(root, year, name) for name in (options.train, options.test)]
    (_, _, classes), (_, _, others) = listed
    if classes != others:
        odd = ", ".join(sorted({*classes} ^ {*others}))
        raise ValueError(
            f"{folder}: {options.train} and {options.test} are not labelled for the same classes: "
            f"only one of them for {odd}"
        )
    if task.reader.use != READER:
        raise ValueError(f"VOC's images are files: data.use ({task.reader.use}) must be {READER}")
    images = folder / "JPEGImages"
    with starting.one_at_a_time(task.cache):
        samples = task.reader.module.list_samples(
            replace(task.reader.options, root=str(images)),
            cache=task.cache,
            say=task.say,
        )
    parts = [
        _voc_split(task, samples, name, stems, labels, classes)
        for name, (stems, labels, _) in zip((options.train, options.test), listed, strict=True)
    ]
    (train, train_labels), (test, test_labels) = parts
    return Data(train, test, train_labels, test_labels, classes, is_voc=True)


def _refuse_of_voc(options: Options, not_voc: ValueError) -> None:
    """Keys that only VOC's layout reads, for class folders.

    Raises:
        ValueError: names the key, and says why this is not VOC.
    """
    for field in fields(options):
        if field.name in ("year", "train", "test") and vars(options)[field.name] != field.default:
            raise ValueError(
                f"svm.{field.name} ({vars(options)[field.name]}) is for VOC, and data.root holds "
                f"class folders: leave it out (as VOC: {not_voc})"
            )


def _refuse_subset_of_voc(task: Task) -> None:
    """VOC's lists say which images.

    Raises:
        ValueError: names the key of `data`.
    """
    given = vars(task.reader.options)
    for key in ("limit", "fraction", "per_class"):
        if given.get(key) is not None:
            raise ValueError(
                f"data.{key} ({given[key]}) is for class folders, and data.root is VOC's: give "
                "lists of your own, svm.train=NAME for ImageSets/Main/<class>_NAME.txt"
            )


def _voc_split(
    task: Task,
    samples: Any,
    name: str,
    stems: list[str],
    labels: np.ndarray,
    classes: tuple[str, ...],
) -> tuple[Split, np.ndarray]:
    """The split's usable images in the order of its list, and their labels."""
    row_of = {samples.names[row]: row for row in range(len(samples))}
    files = [f"{stem}.jpg".encode() for stem in stems]
    missing = [file.decode() for file in files if file not in row_of]
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(files):,} images of {name} are not in {samples.root}: "
            f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)}"
        )
    rows = np.array([row_of[file] for file in files], np.int64)
    usable = np.isin(rows, samples.usable)
    if not usable.all():
        task.say(f"svm: {(~usable).sum()} of {len(rows):,} images of {name} cannot be decoded")
    rows, labels = rows[usable], labels[usable]
    nothing = np.zeros(len(rows), np.int64)  # an image may show several classes
    return Split(name, task.reader.module, samples, rows, nothing, classes), labels


def _only_usable_classes(data: Data, options: Options, say: Callable[[str], None]) -> Data:
    """Without classes that can't be cross-validated; says which, and which can't be tested.

    These stay on class folders: an image may be mistaken for one of them.

    Raises:
        ValueError: none is left to test.
    """
    kept, gone, untested = [], [], []
    for number, name in enumerate(data.classes):
        learnt = int((data.train_labels[:, number] == POSITIVE).sum())
        others = len(data.train_labels) - learnt
        tested = int((data.test_labels[:, number] == POSITIVE).sum())
        if min(learnt, others) < options.folds:
            gone.append(f"{name}: {learnt} positive and {others} other images to learn from")
        elif not tested:
            untested.append(number)
            gone.append(f"{name}: no positive image to test on")
        else:
            kept.append(number)
    if not kept:
        raise ValueError(
            f"svm: no class can be learnt in {options.folds} folds and tested: "
            f"{'; '.join(gone[:5])}"
        )
    if gone:
        say(f"warning: svm: the mean is over {len(kept)} classes, without {'; '.join(gone)}")
    kept = kept if data.is_voc else sorted([*kept, *untested])
    return replace(
        data,
        train_labels=data.train_labels[:, kept],
        test_labels=data.test_labels[:, kept],
        classes=tuple(data.classes[number] for number in kept),
    )


def _tested(test_labels: np.ndarray) -> list[int]:
    """Numbers of the classes with an image to test on; the means are over them."""
    return np.flatnonzero((test_labels == POSITIVE).any(axis=0)).tolist()


def _labels_of(features: Features, split: Split, labels: np.ndarray) -> np.ndarray:
    """The labels of the images that have features; a few may turn out not to be decodable."""
    place = {row: place for place, row in enumerate(split.rows.tolist())}
    return labels[[place[row] for row in features.rows.tolist()]]


def _for_workers(stage: np.ndarray) -> np.ndarray:
    """As processes can open it: a memory map by its name, which features.keep=false takes away."""
    if isinstance(stage, np.memmap) and not Path(str(stage.filename)).exists():
        return np.array(stage)
    return stage


def _where(data: Data, options: Options) -> str:
    if data.is_voc:
        return f"VOC{options.year}, {options.train} to {options.test}"
    return str(Path(data.train.samples.root).parent)


def _what(data: Data, options: Options) -> dict[str, Any]:
    """Of the journal's lines: what was measured on."""
    of_voc = {"year": options.year} if data.is_voc else {}
    return {
        "layout": "voc" if data.is_voc else "class folders",
        **of_voc,
        "train": data.train.name,
        "test": data.test.name,
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
    }
