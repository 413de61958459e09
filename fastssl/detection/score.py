"""Average precision of detections: COCO's, by pycocotools, and PASCAL VOC 2007's.

Published VOC tables (PIRL tables 1 and 6, MoCo table 5) come from Detectron2's evaluator of VOC:
for VOC 2007 the mean over classes of the 11-point average precision, AP50 and AP75 at an overlap of
0.5 and 0.75, AP its mean over 0.5, 0.55, ..., 0.95. `voc` computes that and is what to compare with
them. `coco` takes the same detections to COCOeval: precision at 101 points of recall, at most 100
detections an image. The numbers are not the same, so the two are never put in one column.

Objects marked difficult: `voc` counts neither them nor what overlaps them most. COCOeval knows
`iscrowd`, which is given to them: not counted, and neither is what lies in one, but the overlap
with a crowd is that of the detection's own area, which is a little kinder to false alarms.
"""

import contextlib
import io
from dataclasses import dataclass

import numpy as np

OVERLAPS = np.arange(50, 100, 5) / 100  # of AP


@dataclass(frozen=True)
class Boxes:
    """Boxes of many images: of the truth, or found."""

    image: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N], from 0
    box: np.ndarray  # float64 [N, 4]: left, top, right, bottom, the latter two outside
    score: np.ndarray  # float64 [N]; of the truth: all 1
    difficult: np.ndarray  # bool [N]; of what was found: all False


def need_pycocotools() -> None:
    """Refuses to begin what could not be measured.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pycocotools.cocoeval  # noqa: F401, PLC0415  # an extra
    except ImportError:
        raise ValueError(
            "detect needs pycocotools to measure AP: pip install 'fastssl[evaluate]'"
        ) from None


def coco(truth: Boxes, found: Boxes, *, images: int, classes: tuple[str, ...]) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 of boxes, 0 ... 1.

    Args:
        truth: all objects.
        found: all detections; of an image the 100 with the highest scores count.
        images: how many there are; 0 ... images - 1.
        classes: their names. Those without an object that counts are left out of the mean.

    Raises:
        ValueError: there is no object that counts.
    """
    from pycocotools.coco import COCO  # noqa: PLC0415  # an extra
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

    _need_objects(truth)
    if not len(found.box):
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    # Numbers begin at 1 throughout: COCOeval takes a match with object 0 for no match.
    wide_N4 = _with_extent(truth.box)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        real = COCO()
        real.dataset = {  # pyright: ignore[reportAttributeAccessIssue]  # as COCO's files
            "info": {},
            "images": [{"id": k + 1} for k in range(images)],
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
            "annotations": [
                {
                    "id": k + 1,
                    "image_id": int(truth.image[k]) + 1,
                    "category_id": int(truth.label[k]) + 1,
                    "bbox": wide_N4[k].tolist(),
                    "area": float(wide_N4[k, 2] * wide_N4[k, 3]),
                    "iscrowd": int(truth.difficult[k]),
                }
                for k in range(len(wide_N4))
            ],
        }
        real.createIndex()
        columns = (found.image + 1, _with_extent(found.box), found.score, found.label + 1)
        table = np.column_stack([np.asarray(each, np.float64) for each in columns])
        judge = COCOeval(real, real.loadRes(table), "bbox")  # pyright: ignore[reportArgumentType]  # arrays, too
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: float(judge.stats[k]) for k, name in enumerate(("AP", "AP50", "AP75"))}


def voc(truth: Boxes, found: Boxes, *, classes: tuple[str, ...]) -> dict[str, float]:
    """VOC 2007's AP50 and AP75, and AP as Detectron2 averages it over OVERLAPS, 0 ... 1.

    Raises:
        ValueError: there is no object that counts.
    """
    _need_objects(truth)
    table = np.array(
        [
            voc_precisions(truth, found, label=label)
            for label in range(len(classes))
            if (~truth.difficult[truth.label == label]).any()
        ]
    )
    means = table.mean(axis=0)  # over classes
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def voc_precisions(truth: Boxes, found: Boxes, *, label: int) -> np.ndarray:
    """A class's 11-point average precision (Everingham et al. 2010, section 4.2) by OVERLAPS.

    A detection belongs to the object that it overlaps most. Of those that do by more than the
    least overlap, an object's best-scored one is right, the others are false alarms.
    """
    real, hits = _only(truth, truth.label == label), _only(found, found.label == label)
    hits = _only(hits, np.argsort(-hits.score, kind="stable"))
    most, whose = _best_overlaps(real, hits)
    return np.array([_precision(real.difficult, most > least, whose) for least in OVERLAPS])


def _precision(difficult: np.ndarray, near: np.ndarray, whose: np.ndarray) -> float:
    """The precision of detections, best first, of which some are `near` the object `whose`."""
    ignored = near & difficult[whose]
    (candidates,) = np.nonzero(near & ~ignored)
    _, first = np.unique(whose[candidates], return_index=True)
    right = np.zeros(len(near), bool)
    right[candidates[first]] = True
    counted = right[~ignored]
    recall = np.cumsum(counted) / (~difficult).sum()
    precision = np.cumsum(counted) / np.arange(1, len(counted) + 1)
    # The steps of numpy's arange, as in Detectron2: 0.3 is a little above 3 / 10 there.
    reached = [precision[recall >= step] for step in np.arange(0.0, 1.1, 0.1)]
    return sum(each.max() if len(each) else 0.0 for each in reached) / 11


def _best_overlaps(real: Boxes, hits: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Of each hit the greatest overlap with an object of its image, and which: 0, -1 for none."""
    most, whose = np.zeros(len(hits.box)), np.full(len(hits.box), -1)
    objects, order = _by_image(real.image), _by_image(hits.image)
    for image, rows in order.items():
        here = objects.get(image)
        if here is not None:
            overlaps = overlap(hits.box[rows], real.box[here])
            most[rows], whose[rows] = overlaps.max(axis=1), here[overlaps.argmax(axis=1)]
    return most, whose


def _by_image(image: np.ndarray) -> dict[int, np.ndarray]:
    """The places of each image's boxes."""
    order = np.argsort(image, kind="stable")
    images, begin = np.unique(image[order], return_index=True)
    return dict(zip(images.tolist(), np.split(order, begin[1:]), strict=True)) if len(order) else {}


def overlap(some_N4: np.ndarray, others_M4: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair, [N, M]."""
    corner = np.maximum(some_N4[:, None, :2], others_M4[None, :, :2])
    extent = np.minimum(some_N4[:, None, 2:], others_M4[None, :, 2:]) - corner
    both = np.prod(np.maximum(extent, 0), axis=2)
    areas = [np.prod(each[:, 2:] - each[:, :2], axis=1) for each in (some_N4, others_M4)]
    return both / (areas[0][:, None] + areas[1][None] - both)


def _only(boxes: Boxes, which: np.ndarray) -> Boxes:
    return Boxes(
        boxes.image[which],
        boxes.label[which],
        boxes.box[which],
        boxes.score[which],
        boxes.difficult[which],
    )


def _with_extent(box_N4: np.ndarray) -> np.ndarray:
    """Left, top, width, height."""
    return np.concatenate([box_N4[:, :2], box_N4[:, 2:] - box_N4[:, :2]], axis=1)


def _need_objects(truth: Boxes) -> None:
    if truth.difficult.all():
        raise ValueError("the test split has no object that is not difficult: nothing to find")
