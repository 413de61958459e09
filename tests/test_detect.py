"""Detection, from a VOC folder to AP: the detector is the backbone, the scores are the metrics."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastssl import evaluate, loader
from fastssl.backbones import alexnet, resnet, resnet_v2, revnet, vgg
from fastssl.detection import data as detection_data
from fastssl.detection import detector as detection
from fastssl.detection import score
from fastssl.detection.boxes import Truth, truth
from fastssl.detection.detector import Design, Detector
from fastssl.detection.score import Boxes
from fastssl.evaluations import detect
from fastssl.voc import Object
from pipelines import detection as graph
from pipelines.readers import folder
from tests import toy_voc

DESIGNS = {
    "c4": Design(network="c4", anchors=(16, 32), regions=16),
    "fpn": Design(network="fpn", anchors=(8, 16, 32, 64, 128), regions=16, pyramid=8, hidden=16),
}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """VOC2007 with 10 images to train on and 7 to test on."""
    root = tmp_path_factory.mktemp("VOCdevkit")
    toy_voc.make(root, "2007", {"trainval": 10, "test": 7}, side=64)
    return root


@pytest.fixture
def backbone() -> nn.Module:
    """A network whose batch norm does something, unlike a new one's."""
    torch.manual_seed(0)
    network = resnet.backbone(resnet.Options(name="resnet10", width=16))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def made(backbone: nn.Module, design: Design, classes: int = 2) -> Detector:
    torch.manual_seed(1)
    return Detector(detection.body(backbone, design), design, classes)


def batch() -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Two noisy pictures, 64 x 96 and 64 x 70, an object in each."""
    size = torch.tensor([[64, 96], [64, 70]])
    image = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    image[1, :, :, 70:] = 0
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    return image, size, [target, target]


# -- the detector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("network", DESIGNS)
def test_the_detector_holds_exactly_the_backbone_s_weights(backbone, network):
    detector = made(backbone, DESIGNS[network])
    inside = {f"{k}": v for k, v in detector.trunk.backbone.state_dict().items()}  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    if network == "c4":
        head = detector.roi_heads.box_head.stage.stage.state_dict()  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
        inside |= {f"layer4.{key}": value for key, value in head.items()}
    wanted = backbone.state_dict()

    assert inside.keys() == wanted.keys()
    assert all(torch.equal(inside[name], wanted[name]) for name in wanted)


def test_the_backbone_itself_is_left_as_it_was(backbone):
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    image = torch.rand(1, 3, 64, 64)
    output = backbone.eval()(image)
    made(backbone, DESIGNS["c4"])

    assert all(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert torch.equal(backbone(image), output)


def test_c4_s_two_halves_are_the_backbone(backbone):
    parts = detection.body(backbone, DESIGNS["c4"])
    image = torch.rand(2, 3, 64, 96)
    assert parts.head is not None
    joined = parts.head(parts.trunk(image)["0"])

    torch.testing.assert_close(joined, backbone.eval().stages(image)["layer4"])  # pyright: ignore[reportCallIssue]
    assert (parts.stride, parts.channels, parts.width) == (16, 64, 128)


@pytest.mark.parametrize("network", DESIGNS)
def test_pictures_are_normalised_once_and_not_resized_again(backbone, network):
    """Against torchvision's own model around the same parts, whose transform does both."""
    detector = made(backbone, DESIGNS[network]).eval()
    mean, std = backbone.normalization  # pyright: ignore[reportGeneralTypeIssues]
    transform = GeneralizedRCNNTransform(64, 1333, list(mean), list(std))
    reference = GeneralizedRCNN(detector.trunk, detector.rpn, detector.roi_heads, transform).eval()
    image, size, _ = batch()
    pictures = [each[:, :h, :w] / 255 for each, (h, w) in zip(image, size.tolist(), strict=True)]
    with torch.no_grad():
        found, wanted = detector(image, size), reference(pictures)

    for here, there in zip(found, wanted, strict=True):
        assert len(here["boxes"]) > 10
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(here[name], there[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("network", DESIGNS)
def test_frozen_batch_norm_and_frozen_stages_stay_and_the_rest_learns(backbone, network):
    detector = made(backbone, replace(DESIGNS[network], freeze=2)).train()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    torch.stack([*detector(*batch()).values()]).sum().backward()
    unreached = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    changed = {n for n, v in detector.state_dict().items() if not torch.equal(v, before[n])}

    assert unreached == []  # DDP takes them for a mistake
    assert not [name for name in changed if "bn" in name or "downsample.1" in name]
    assert not [name for name in changed if "backbone.conv1" in name or "backbone.layer1" in name]
    assert {"trunk.backbone.layer2.0.conv1.weight"} <= changed
    assert any("layer4" in name or "box_head.stage" in name for name in changed)


def test_trained_batch_norm_takes_in_what_it_sees(backbone):
    detector = made(backbone, replace(DESIGNS["fpn"], norm="trained", freeze=2)).train()
    detector(*batch())
    norms = detector.trunk.backbone  # pyright: ignore[reportAttributeAccessIssue]

    assert torch.equal(norms.bn1.running_mean, backbone.bn1.running_mean)  # pyright: ignore
    assert not torch.equal(
        norms.layer2[0].bn1.running_mean,  # pyright: ignore
        backbone.layer2[0].bn1.running_mean,  # pyright: ignore
    )


@pytest.mark.parametrize("network", DESIGNS)
def test_boxes_are_not_rounded_to_the_precision_of_the_features(backbone, network):
    """bfloat16 has 8 bits: multiples of 4 from 512 on."""
    detector = made(backbone, DESIGNS[network]).eval()
    image = torch.randint(0, 256, (1, 3, 64, 1024), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        boxes = detector(image, torch.tensor([[64, 1024]]))[0]["boxes"]
    far = boxes[boxes > 512]

    assert boxes.dtype == torch.float32
    assert len(far) > 10
    assert (far != far.bfloat16().float()).float().mean() > 0.5


class Sums(nn.Module):
    """A backbone whose last stage is more than the module of its name."""

    normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    dim = 4

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.second = nn.Conv2d(4, 4, 3, 2, 1)

    def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.first(x)
        return {"first": first, "second": self.second(first) + 1}


def test_c4_refuses_a_backbone_whose_last_stage_can_t_be_taken_off():
    with pytest.raises(ValueError, match=r"detect.network \(c4\).*second.*detect.network=fpn"):
        detection.body(Sums(), DESIGNS["c4"])


@pytest.mark.parametrize("network", DESIGNS)
@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: vgg.backbone(vgg.Options(widening=1, image_size=32)), 32),
        (lambda: vgg.backbone(vgg.Options(widening=1, image_size=128)), 128),  # the probe's own
        (lambda: alexnet.backbone(alexnet.Options(image_size=63)), 63),
    ],
)
def test_networks_for_one_size_are_refused_in_one_line(build, size, network):
    said = rf"^detect needs .* takes {size} x {size} pixels only: give a ResNet or another .*$"
    with pytest.raises(ValueError, match=said):
        detection.body(build(), DESIGNS[network])


@pytest.mark.parametrize(
    ("build", "first", "last"),
    [
        (
            lambda: resnet_v2.backbone(resnet_v2.Options(widening=1)),
            "network.stages.0.",
            "network.stages.3.",
        ),
        (
            lambda: revnet.backbone(revnet.Options(widening=1, units=(1, 1, 1, 1))),
            "layer1.",
            "layer4.",
        ),
    ],
    ids=["resnet_v2", "revnet"],
)
def test_k19_s_networks_carry_a_pyramid_and_c4_is_refused_in_one_line(build, first, last):
    detector = made(build(), replace(DESIGNS["fpn"], freeze=2)).train()
    torch.stack([*detector(*batch()).values()]).sum().backward()
    unreached = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    taught = [n for n, p in detector.named_parameters() if p.grad is not None]

    assert unreached == []  # DDP takes them for a mistake
    assert any(name.startswith(f"trunk.backbone.{last}") for name in taught)
    assert not any(name.startswith(f"trunk.backbone.{first}") for name in taught)
    with pytest.raises(ValueError, match=r"^detect.network \(c4\).*layer4.*detect.network=fpn.*$"):
        detection.body(build(), DESIGNS["c4"])


def test_fpn_says_how_many_anchors_it_needs(backbone):
    with pytest.raises(ValueError, match=r"must be 5 sizes.*layer1, layer2, layer3, layer4"):
        detection.body(backbone, replace(DESIGNS["fpn"], anchors=(32, 64)))


def test_freezing_every_stage_is_refused(backbone):
    with pytest.raises(ValueError, match=r"detect.freeze \(5\) must be below"):
        detection.body(backbone, replace(DESIGNS["c4"], freeze=5))


# -- scores ---------------------------------------------------------------------------------------


def boxes(*rows: tuple[int, int, tuple[float, ...], float, bool]) -> Boxes:
    image, label, box, scores, difficult = zip(*rows, strict=True)
    return Boxes(
        np.array(image),
        np.array(label),
        np.array(box, float),
        np.array(scores),
        np.array(difficult),
    )


HERE, THERE, NOWHERE = (0, 0, 20, 20), (40, 40, 60, 80), (90, 0, 99, 9)
TWO = boxes((0, 0, HERE, 1, False), (1, 0, THERE, 1, False))


def test_perfect_detections_have_an_average_precision_of_one():
    names = ("ball",)
    perfect = {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}

    assert score.coco(TWO, TWO, images=2, classes=names) == pytest.approx(perfect)
    assert score.voc(TWO, TWO, classes=names) == pytest.approx(perfect)


def test_a_known_mixture_has_the_average_precision_computed_by_hand():
    """Right, wrong, right: recall 1/2, 1/2, 1 at precision 1, 1/2, 2/3."""
    found = boxes((0, 0, HERE, 0.9, False), (0, 0, NOWHERE, 0.8, False), (1, 0, THERE, 0.7, False))
    # six of VOC's eleven levels of recall, and 51 of COCO's 101, are at most 1/2
    voc, coco = (6 + 5 * 2 / 3) / 11, (51 + 50 * 2 / 3) / 101

    assert score.voc(TWO, found, classes=("ball",))["AP50"] == pytest.approx(voc)
    assert score.coco(TWO, found, images=2, classes=("ball",))["AP50"] == pytest.approx(coco)


def test_an_overlap_of_six_tenths_counts_at_a_half_and_not_at_three_quarters():
    found = boxes((0, 0, (0, 0, 20, 12), 0.9, False), (1, 0, (40, 40, 60, 64), 0.9, False))
    names = ("ball",)
    # COCO counts an overlap of exactly 0.6, VOC more than that: 0.5, 0.55 (and 0.6) of ten
    assert score.coco(TWO, found, images=2, classes=names) == pytest.approx(
        {"AP": 0.3, "AP50": 1, "AP75": 0}
    )
    assert score.voc(TWO, found, classes=names) == pytest.approx({"AP": 0.2, "AP50": 1, "AP75": 0})


def test_difficult_objects_are_neither_to_be_found_nor_false_alarms():
    real = boxes((0, 0, HERE, 1, False), (0, 0, THERE, 1, True))
    both = boxes((0, 0, THERE, 0.9, False), (0, 0, THERE, 0.8, False), (0, 0, HERE, 0.7, False))
    one = boxes((0, 0, HERE, 0.9, False))
    for found in (both, one):
        assert score.voc(real, found, classes=("ball",))["AP50"] == pytest.approx(1)
        assert score.coco(real, found, images=1, classes=("ball",))["AP50"] == pytest.approx(1)
    hard = replace(real, difficult=np.array([True, True]))
    with pytest.raises(ValueError, match="no object that is not difficult"):
        score.voc(hard, one, classes=("ball",))


def test_nothing_found_is_an_average_precision_of_zero():
    nothing = Boxes(*(each[:0] for each in vars(TWO).values()))

    assert score.coco(TWO, nothing, images=2, classes=("ball",))["AP"] == 0
    assert score.voc(TWO, nothing, classes=("ball",))["AP"] == 0


def random_boxes(seed: int, *, difficult: bool) -> tuple[Boxes, Boxes]:
    """Forty objects of two classes in eight images; 120 detections, most near one."""
    generator = np.random.default_rng(seed)
    corner, extent = generator.uniform(0, 200, (40, 2)), generator.uniform(20, 80, (40, 2))
    image, label = generator.integers(0, 8, 40), generator.integers(0, 2, 40)
    hard = generator.random(40) < 0.3 if difficult else np.zeros(40, bool)
    real = Boxes(image, label, np.hstack([corner, corner + extent]), np.ones(40), hard)
    whose = generator.integers(0, 40, 120)
    near = real.box[whose] + generator.normal(0, 5, (120, 4))
    found = Boxes(image[whose], label[whose], near, generator.random(120), np.zeros(120, bool))
    return real, found


def slow_precision(real: Boxes, found: Boxes, label: int, least: float, *, coco: bool) -> float:
    """Object by object and detection by detection, as the two challenges describe it."""
    taken, hits = set(), []
    for k in sorted(np.flatnonzero(found.label == label), key=lambda k: -found.score[k]):
        best, whose = 0.0, None
        for g in np.flatnonzero((real.label == label) & (real.image == found.image[k])):
            if coco and g in taken:  # COCO takes the best that is left, VOC the best of all
                continue
            (x, y, r, b), (left, top, right, bottom) = found.box[k], real.box[g]
            both = max(0, min(r, right) - max(x, left)) * max(0, min(b, bottom) - max(y, top))
            union = (r - x) * (b - y) + (right - left) * (bottom - top) - both
            if both / union > best:
                best, whose = both / union, g
        if whose is None or best <= least:
            hits.append(False)
        elif not real.difficult[whose]:
            hits.append(whose not in taken)
            taken.add(whose)
    objects = np.count_nonzero((real.label == label) & ~real.difficult)
    curve = [(sum(hits[:n]) / objects, sum(hits[:n]) / n) for n in range(1, len(hits) + 1)]
    levels = np.linspace(0, 1, 101) if coco else np.arange(0, 1.1, 0.1)
    return float(
        np.mean([max((p for recall, p in curve if recall >= level), default=0) for level in levels])
    )


@pytest.mark.parametrize("metric", ["coco", "voc"])
def test_scores_are_those_of_a_slow_count(metric):
    coco = metric == "coco"
    real, found = random_boxes(5, difficult=not coco)
    table = np.array(
        [
            [slow_precision(real, found, label, least, coco=coco) for least in score.OVERLAPS]
            for label in (0, 1)
        ]
    ).mean(axis=0)
    names = ("ball", "crate")
    scores = (
        score.coco(real, found, images=8, classes=names)
        if coco
        else score.voc(real, found, classes=names)
    )

    assert 0.2 < table[0] < 0.95
    assert scores == pytest.approx({"AP": table.mean(), "AP50": table[0], "AP75": table[5]})


def test_without_pycocotools_the_command_says_what_to_install(monkeypatch, devkit, capfd):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)

    assert evaluate.main(["detect", *toy_voc.SMALL, f"data.root={devkit}"]) == 2
    assert "pip install 'fastssl[evaluate]'" in capfd.readouterr().err


# -- data -----------------------------------------------------------------------------------------


def read(devkit: Path, **changed) -> detection_data.Data:
    given = {"train": ("2007/trainval",), "test": "2007/test", "difficult": True} | changed
    options = folder.Options(root=str(devkit))
    return detection_data.read(folder, options, cache=None, say=print, **given)


def test_pixels_of_voc_count_from_1_and_include_both_corners():
    objects = [Object("b", 1, 1, 1, 1, True), Object("a", 3, 4, 10, 20, False)]
    found = truth(objects, ("a", "b"), image=Path("a.jpg"), height=20, width=10)

    assert found.boxes.tolist() == [[0, 0, 1, 1], [2, 3, 10, 20]]
    assert found.labels.tolist() == [1, 0]
    assert found.difficult.tolist() == [True, False]


def test_a_box_that_leaves_its_image_by_a_pixel_is_cut_and_by_more_refused_with_its_file():
    size: dict[str, Any] = {"image": Path("some/1.jpg"), "height": 20, "width": 10}
    found = truth([Object("a", 0, 0.5, 11, 21, False)], ("a",), **size)

    assert found.boxes.tolist() == [[0, 0, 10, 20]]
    for corners in [(-1, 1, 5, 5), (1, -1, 5, 5), (1, 1, 12, 5), (1, 1, 5, 22), (11, 1, 11, 5)]:
        with pytest.raises(ValueError, match=r"some/1.jpg has 10 x 20 pixels, and its a is annot"):
            truth([Object("a", *corners, False)], ("a",), **size)


def test_a_box_outside_of_its_image_is_refused_when_the_folder_is_read(tmp_path):
    toy_voc.make(tmp_path, "2007", {"trainval": 2, "test": 2}, side=64)
    annotation = tmp_path / "VOC2007" / "Annotations" / "000002.xml"
    annotation.write_text(re.sub(r"<xmax>\d+", "<xmax>99", annotation.read_text()))
    with pytest.raises(ValueError, match=r"000002\.jpg has .* is annotated at x \d+ to 99, y "):
        read(tmp_path)


def test_boxes_enclose_what_the_pictures_show(devkit):
    """Through reader, graph, loader and look-up by index, with flips."""
    data = read(devkit)
    assert (len(data.train), len(data.test), data.classes) == (10, 7, ("ball", "crate"))
    batches = detection_data.to_train(
        data,
        graph,
        graph.Options(short_side=(64, 96)),
        batch=5,
        seed=3,
        rank=0,
        world=1,
        device=torch.device("cpu"),
        loading=loader.Options(threads=1),
        say=print,
    )
    checked, flips = 0, set()
    for _ in range(4):
        tensors = next(batches)
        flips |= set(tensors["flip"].tolist())
        targets = detection_data.targets(data, tensors)
        for image, target in zip(tensors["image"].int(), targets, strict=True):
            red, _, blue = image
            for box, label in zip(target["boxes"].tolist(), target["labels"], strict=True):
                colored = (blue - red if label == 1 else red - blue) > 60
                left, top, right, bottom = box
                inside = colored[round(top) : round(bottom), round(left) : round(right)]
                rows, columns = (torch.nonzero(inside.any(dim=d)).flatten() for d in (1, 0))
                # JPEG and the filter blur an edge
                assert max(rows[0], columns[0]) <= 2
                assert rows[-1] >= inside.shape[0] - 3
                assert columns[-1] >= inside.shape[1] - 3
                around = colored.clone()
                for b in target["boxes"][target["labels"] == label].round().int().tolist():
                    around[max(0, b[1] - 2) : b[3] + 2, max(0, b[0] - 2) : b[2] + 2] = False
                assert not around.any()
                checked += 1
    assert checked > 20
    assert flips == {0, 1}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_test_image_counts_once_whatever_the_processes(devkit, world):
    data = read(devkit)
    counted = []
    for rank in range(world):
        _, plan = detection_data.to_test(
            data,
            graph,
            graph.Options(),
            batch=2,
            rank=rank,
            world=world,
            device=torch.device("cpu"),
            loading=loader.Options(threads=1),
            say=print,
        )
        counted += plan[plan >= 0].tolist()

    assert sorted(counted) == sorted(data.test.tolist())


def test_difficult_objects_can_be_left_out_of_the_training_and_never_of_the_test(devkit):
    some, every = read(devkit, difficult=False), read(devkit)

    def marked(data: detection_data.Data, rows: np.ndarray) -> int:
        kept: list[Truth] = [data.truths[row] for row in rows]
        return sum(int(each.difficult.sum()) for each in kept)

    assert (marked(every, every.train), marked(some, some.train)) == (1, 0)
    assert marked(every, every.test) == marked(some, some.test) == 1


def test_what_can_t_be_measured_is_refused(devkit, tmp_path):
    with pytest.raises(ValueError, match="images to test on must not be trained on"):
        read(devkit, test="2007/trainval")
    with pytest.raises(ValueError, match="name each image once"):
        read(devkit, train=("2007/trainval", "2007/trainval"))
    toy_voc.make(tmp_path, "2007", {"trainval": 2, "test": 2}, side=64)
    annotation = tmp_path / "VOC2007" / "Annotations" / "000003.xml"
    annotation.write_text(annotation.read_text().replace("ball", "cat").replace("crate", "cat"))
    with pytest.raises(ValueError, match="cat are in the test split and in no training"):
        read(tmp_path)
    annotation.write_text("<annotation></annotation>")
    other = annotation.with_name("000004.xml")  # difficult objects are the second's
    other.write_text(other.read_text().replace("<difficult>0", "<difficult>1"))
    with pytest.raises(ValueError, match="the 2 images of 2007/test have no object that is not"):
        read(tmp_path)
    images = tmp_path / "VOC2007" / "JPEGImages"
    for name in ("000003.jpg", "000004.jpg"):
        (images / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images of 2007/test can be decoded"):
        read(tmp_path)
    (tmp_path / "VOC2007" / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 images are annotated and not there: .*000002\.jpg"):
        read(tmp_path)


# -- the protocols and the command ----------------------------------------------------------------


def test_the_protocols_are_the_papers():
    pirl = detect.Options().schedule()
    assert [pirl.rate(step) for step in (0, 500, 1000, 16_999, 17_000, 24_999)] == pytest.approx(
        [3e-6, 0.003 * 0.5005, 0.003, 0.003, 0.0003, 0.0003]
    )
    assert pirl.steps == 25_000
    moco = detect.Options(protocol="moco")
    assert [moco.schedule().rate(step) for step in (100, 18_000, 22_000)] == pytest.approx(
        [0.02, 0.002, 0.0002]
    )
    assert (moco.design().norm, moco.design().freeze) == ("sync", 0)
    assert detect.Options(protocol="voc07").schedule().decay_steps == (9_500,)


def test_a_shorter_run_decays_and_warms_up_in_proportion():
    schedule = detect.Options(steps=250).schedule()

    assert (schedule.decay_steps, schedule.warmup_steps) == ((170,), 10)
    assert detect.Options(steps=250, decay_steps=(9,)).schedule().decay_steps == (9,)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"steps": 0}, "steps"),
        ({"test": "test"}, "year/name"),
        ({"train": ()}, "train"),
        ({"lr": 0.0}, "lr"),
        ({"decay_steps": (5, 3)}, "decay_steps"),
        ({"momentum": 1.0}, "momentum"),
        ({"regions": 0}, "regions"),
        ({"anchors": ()}, "anchors"),
        ({"freeze": -1}, "freeze"),
    ],
)
def test_options_refuse_what_can_t_be_and_name_it(wrong, named):
    with pytest.raises(ValueError, match=named):
        detect.Options(**wrong)
