"""Object detection: Faster R-CNN trained on PASCAL VOC from the backbone on; AP on its test set.

The protocols are those of PIRL (Misra & van der Maaten 2020, tables 1 and 6) and of MoCo (He et
al. 2020, table 5), both with Detectron2 and R50-C4. Compare `VOC AP`, `VOC AP50` and `VOC AP75`
with their tables: fastssl.detection.score says why, and fastssl.detection.detector what differs
from Detectron2. `AP`, `AP50` and `AP75` are COCO's.
"""

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed

from fastssl import checkpoint, distributed, starting
from fastssl.detection import boxes as detection_boxes
from fastssl.detection import data as detection_data
from fastssl.detection import detector as detection
from fastssl.detection import score as detection_score
from fastssl.detection import training as detection_training
from fastssl.detection.detector import Design, Detector
from fastssl.detection.score import Boxes
from fastssl.detection.training import Schedule
from fastssl.evaluation_task import Table, Task

HELP = "Faster R-CNN (C4 or FPN) on a VOC folder with the backbone: AP, AP50, AP75"


class _Protocol(NamedTuple):
    train: tuple[str, ...]
    steps: int
    decay_steps: tuple[int, ...]
    warmup_steps: int
    lr: float
    norm: Literal["frozen", "trained", "sync"]
    freeze: int


_BOTH = ("2007/trainval", "2012/trainval")
PROTOCOLS = {
    # PIRL's appendix: lr 0.003, warm-up 1000. VISSL's file for PIRL has 0.002; for its supervised
    # and jigsaw networks 0.02 with a warm-up of 100. Frozen stages: Detectron2's default there.
    "voc0712": _Protocol(_BOTH, 25_000, (17_000,), 1000, 0.003, "frozen", 2),
    "voc07": _Protocol(("2007/trainval",), 12_500, (9_500,), 1000, 0.003, "frozen", 2),
    # MoCo's detection/configs: warm-up 100 (VISSL's copy: 1000).
    "moco": _Protocol(_BOTH, 24_000, (18_000, 22_000), 100, 0.02, "sync", 0),
}


# Options that change nothing of the training: the command may be given again with others.
_ANY_TIME = ("log_steps", "checkpoint_steps", "test_batch", "test_short_side", "proposals")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is not given is the protocol's."""

    protocol: Literal["voc0712", "voc07", "moco"] = "voc0712"  # voc0712, voc07: PIRL's
    network: Literal["c4", "fpn"] = "c4"  # fpn: a feature pyramid, which no paper's table has
    train: tuple[str, ...] | None = None  # splits, year and name: [2007/trainval, 2012/trainval]
    test: str = "2007/test"
    difficult: bool = True  # learn from objects marked difficult, as Detectron2
    steps: int | None = None  # given alone, decays and warm-up move in proportion
    decay_steps: tuple[int, ...] | None = None  # a tenth of the learning rate after each
    warmup_steps: int | None = None
    lr: float | None = None  # at the batch used; supervised and jigsaw networks: 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch: int = 16  # images a step, over all processes
    short_side: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    test_short_side: int = 800
    long_side: int = 1333  # at most
    flip: float = 0.5  # probability
    norm: Literal["frozen", "trained", "sync"] | None = None  # the backbone's batch norm
    freeze: int | None = None  # first stages that stay as loaded; 2: stem and layer1
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)  # pixels a side; fpn: one a level
    regions: int = 512  # of an image that the head learns from; C4's cost goes with it
    proposals: int = 1000  # of an image that the head judges at test
    pyramid: int = 256  # fpn: channels
    hidden: int = 1024  # fpn: units of the box head
    test_batch: int = 1  # images of a process; a larger one is padded to its largest image
    log_steps: int = 20
    checkpoint_steps: int = 1000
    pipeline: str = "pipelines.detection"  # the DALI graph

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        for name in ("batch", "test_batch", "log_steps", "checkpoint_steps"):
            if asdict(self)[name] < 1:
                raise ValueError(f"{name} ({asdict(self)[name]}) must be at least 1")
        for split in (*(self.train or ()), self.test):
            year, slash, name = split.partition("/")
            if not (slash and year.isdigit() and name):
                raise ValueError(f"split {split!r} must be year/name, as 2007/trainval")
        if self.train == ():
            raise ValueError("train ([]) must name at least one split, as [2007/trainval]")
        schedule = self.schedule()
        if schedule.steps < 1 or schedule.warmup_steps < 0:
            raise ValueError(
                f"steps ({schedule.steps}) must be at least 1, warmup_steps "
                f"({schedule.warmup_steps}) at least 0"
            )
        if list(schedule.decay_steps) != sorted(set(schedule.decay_steps)):
            raise ValueError(f"decay_steps ({list(schedule.decay_steps)}) must ascend")
        if not schedule.lr > 0:
            raise ValueError(f"lr ({schedule.lr}) must be above 0")
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(
                f"momentum ({self.momentum}) must be in 0 ... 1, weight_decay "
                f"({self.weight_decay}) at least 0"
            )
        self.design()  # refuses for itself

    def schedule(self) -> Schedule:
        """The protocol's, changed by what is given."""
        usual = PROTOCOLS[self.protocol]
        steps = usual.steps if self.steps is None else self.steps
        decays = tuple(each * steps // usual.steps for each in usual.decay_steps)
        warmup = usual.warmup_steps * steps // usual.steps
        return Schedule(
            steps,
            decays if self.decay_steps is None else self.decay_steps,
            warmup if self.warmup_steps is None else self.warmup_steps,
            usual.lr if self.lr is None else self.lr,
            self.momentum,
            self.weight_decay,
        )

    def design(self) -> Design:
        """The detector's shape."""
        usual = PROTOCOLS[self.protocol]
        return Design(
            network=self.network,
            norm=usual.norm if self.norm is None else self.norm,
            freeze=usual.freeze if self.freeze is None else self.freeze,
            anchors=self.anchors,
            regions=self.regions,
            proposals=self.proposals,
            pyramid=self.pyramid,
            hidden=self.hidden,
        )


def evaluate(task: Task, options: Options) -> Table:
    """Trains a detector around a copy of the backbone and measures it.

    Everything is kept in a folder of the run's `evaluations`, named by the settings: the same
    command goes on after an interruption, and measures again after the end.

    Raises:
        ValueError: pycocotools is missing, the backbone can't be used, or the folder is not as it
            should be; all but the last before an image is read.
    """
    # ---- What can't be, before anything is read -------------------------------------------------
    detection_score.need_pycocotools()
    if task.demo:
        raise ValueError(
            "detect needs images with boxes, which the built-in ones are not: give "
            "data.root=VOCdevkit"
        )
    design, schedule = options.design(), options.schedule()
    rank, world = distributed.rank(), distributed.world()
    device: Any = task.accelerator.device  # NoReturn by Accelerate's own annotations
    if options.batch % world:
        raise ValueError(f"detect.batch ({options.batch}) must be a multiple of {world} processes")
    if design.norm == "sync" and device.type == "cpu":
        raise ValueError("detect.norm (sync) needs GPUs: give detect.norm=trained or frozen")
    graph = _graph(options.pipeline)
    sizes = {"long_side": options.long_side}
    at_training = graph.Options(short_side=options.short_side, flip=options.flip, **sizes)
    at_test = graph.Options(short_side=(options.test_short_side,), flip=0.0, **sizes)
    set_seed(task.seed)  # new heads: the same on every process
    parts = detection.body(task.trained.backbone, design)

    # ---- Data -----------------------------------------------------------------------------------
    with starting.one_at_a_time(task.cache):
        data = detection_data.read(
            task.reader.module,
            task.reader.options,
            train=PROTOCOLS[options.protocol].train if options.train is None else options.train,
            test=options.test,
            difficult=options.difficult,
            cache=task.cache,
            say=task.say,
        )
    if len(data.train) < options.batch:
        raise ValueError(
            f"detect.batch ({options.batch}) is more than the {len(data.train)} images with objects"
        )
    task.say(
        f"detect: {len(data.train):,} images to train on, {len(data.test):,} to test on, "
        f"{len(data.classes)} classes; {options.network}, batch norm {design.norm}, "
        f"{schedule.steps:,} steps"
    )
    detector = Detector(parts, design, len(data.classes))
    detector.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    # ---- Training -------------------------------------------------------------------------------
    settings = {
        **{key: value for key, value in asdict(options).items() if key not in _ANY_TIME},
        "weights": task.trained.weights,
        "seed": task.seed,
        "file list": data.samples.fingerprint,
        "annotations": detection_data.fingerprint(data),
    }
    settings = json.loads(json.dumps(settings))  # tuples as lists, as they come back
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = task.out / f"detect-{options.network}-{name}"
    precision = task.accelerator.mixed_precision
    loader = detection_data.to_train(
        data,
        graph,
        at_training,
        batch=options.batch // world,
        seed=task.seed,
        rank=rank,
        world=world,
        device=device,
        loading=task.loading,
        say=task.say,
    )
    detection_training.train(
        detector,
        loader,
        lambda tensors: detection_data.targets(data, tensors),
        schedule,
        accelerator=task.accelerator,
        folder=folder,
        settings=settings | {"processes": world, "device": device.type, "precision": precision},
        seed=task.seed,
        log_steps=options.log_steps,
        checkpoint_steps=options.checkpoint_steps,
        say=task.say,
    )
    loader.close()
    if design.norm != "frozen":
        distributed.copy_from_first(detector.buffers())  # batch norm saw other images on each

    # ---- Test -----------------------------------------------------------------------------------
    truth, found, images = _found(task, options, data, detector, graph, at_test)
    task.accelerator.free_memory()
    numbers = detection_score.coco(truth, found, images=images, classes=data.classes)
    official = detection_score.voc(truth, found, classes=data.classes)
    numbers |= {f"VOC {key}": value for key, value in official.items()}
    task.log(
        "detect",
        {
            "map": numbers["VOC AP50"],
            "network": options.network,
            "protocol": options.protocol,
            "steps": schedule.steps,
            "images": images,
            "folder": str(folder),
            **{key.lower().replace(" ", "_"): value for key, value in numbers.items()},
        },
    )
    if rank == 0:
        with checkpoint.whole_file(folder / "result.json") as file:
            file.write(
                json.dumps(
                    {**settings, **asdict(options), "images": images, **numbers}, indent=1
                ).encode()
            )
    return Table(
        f"detect: trained on {', '.join(_splits(options))}, tested on {options.test}",
        ["network", "steps", "images", *numbers],
        [[options.network, schedule.steps, images, *numbers.values()]],
    )


def _splits(options: Options) -> tuple[str, ...]:
    return PROTOCOLS[options.protocol].train if options.train is None else options.train


def _graph(dotted: str) -> ModuleType:
    try:
        module = importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"detect.pipeline: there is no module {dotted} ({error}): graphs lie in a checkout of "
            "fastssl, so start from there"
        ) from None
    if absent := {"Options", "graph"} - set(vars(module)):
        raise ValueError(f"detect.pipeline: {dotted} has no {', '.join(sorted(absent))}")
    return module


def _found(
    task: Task,
    options: Options,
    data: detection_data.Data,
    detector: Detector,
    graph: ModuleType,
    at_test: Any,
) -> tuple[Boxes, Boxes, int]:
    """What is in the test images, what the detector finds there, and how many images there are.

    On every process that of all; boxes in the pixels of the files. An image that can't be decoded
    is left out of all three.
    """
    world = distributed.world()
    loader, plan = detection_data.to_test(
        data,
        graph,
        at_test,
        batch=min(options.test_batch, -(-len(data.test) // world)),
        rank=distributed.rank(),
        world=world,
        device=task.accelerator.device,
        loading=task.loading,
        say=task.say,
    )
    detector.eval()
    mine: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    with torch.no_grad():
        for rows in plan:
            tensors = next(loader)
            with task.accelerator.autocast():
                boxes = detector(tensors["image"], tensors["size"])
            here = [tensors[name].cpu() for name in ("index", "original", "size")]
            for planned, row, original, size, each in zip(rows, *here, boxes, strict=True):
                # Filled up at the end; or another's image, where one can't be decoded.
                if int(row) == planned:
                    back = detection_boxes.moved_back(each["boxes"].float().cpu(), original, size)
                    mine.append(
                        (
                            int(row),
                            back.double().numpy(),
                            each["labels"].cpu().numpy() - 1,
                            each["scores"].double().cpu().numpy(),
                        )
                    )
    loader.close()
    everyone = sorted(gather_object(mine), key=lambda each: each[0])
    rows = [row for row, *_ in everyone]
    assert len(set(rows)) == len(rows), "an image was tested twice"
    if len(rows) < len(data.test):
        task.say(f"detect: {len(data.test) - len(rows)} images can't be decoded and are left out")
    truths = [data.truths[row] for row in rows]
    real = _joined(
        [each.boxes.astype(np.float64) for each in truths],
        [each.labels for each in truths],
        [np.ones(len(each.labels)) for each in truths],
        [each.difficult for each in truths],
    )
    found = _joined(
        [boxes for _, boxes, _, _ in everyone],
        [labels for *_, labels, _ in everyone],
        [scores for *_, scores in everyone],
        [np.zeros(len(scores), bool) for *_, scores in everyone],
    )
    return real, found, len(rows)


def _joined(
    boxes: list[np.ndarray],
    labels: list[np.ndarray],
    scores: list[np.ndarray],
    difficult: list[np.ndarray],
) -> Boxes:
    """One list for each image, as one of all."""
    image = np.repeat(np.arange(len(boxes)), [len(each) for each in boxes])
    return Boxes(
        image,
        np.concatenate(labels),
        np.concatenate(boxes).reshape(-1, 4),
        np.concatenate(scores),
        np.concatenate(difficult),
    )
