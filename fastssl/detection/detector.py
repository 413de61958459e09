"""Faster R-CNN (Ren et al. 2015) around a backbone: with a feature pyramid, or as ResNet-C4.

The parts are torchvision's; what joins them is here, because torchvision's own model resizes and
normalises images a second time, decodes boxes in the precision of the features (in bfloat16 a
coordinate of 1,000 pixels is rounded to a multiple of 4), and has no C4.

Against Detectron2, which published tables were made with: boxes are regressed with a smooth L1 loss
of width 1/9 where Detectron2's is L1 (beta 0), and batch norm's averages are not computed anew
after training (PRECISE_BN).
"""

import copy
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

LEVELS = 4  # stages that a pyramid is built on
CROP = 14  # pixels a side of what C4's last stage sees of a region
PROBE = 128  # pixels a side of the image that shows what a backbone's stages put out


@dataclass(frozen=True, kw_only=True)
class Design:
    """The detector's shape."""

    network: Literal["c4", "fpn"] = "c4"  # c4: regions are proposed on the last but one stage, and
    # the last one is applied to each; fpn: a pyramid over the last four stages (Lin et al. 2017)
    norm: Literal["frozen", "trained", "sync"] = "frozen"  # the backbone's batch norm; frozen:
    # averages and weights stay as loaded; sync: trained over all GPUs' images. With other than
    # frozen, C4's last stage ends with one more (MoCo's Res5ROIHeadsExtraNorm)
    freeze: int = 0  # first stages that are not trained; 2: stem and layer1, Detectron2's default
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)  # pixels a side; fpn: one for each level
    regions: int = 512  # of an image that the head learns from; C4's cost goes with it
    proposals: int = 1000  # of an image that the head judges at test
    pyramid: int = 256  # channels of the pyramid
    hidden: int = 1024  # units of the pyramid's box head

    def __post_init__(self) -> None:
        """Refuses what can't be.

        Raises:
            ValueError: says which value.
        """
        if self.freeze < 0:
            raise ValueError(f"freeze ({self.freeze}) must be at least 0")
        if not self.anchors or min(self.anchors) < 1:
            raise ValueError(f"anchors ({list(self.anchors)}) must be sizes in pixels, as [32, 64]")
        for name in ("regions", "proposals", "pyramid", "hidden"):
            if asdict(self)[name] < 1:
                raise ValueError(f"{name} ({asdict(self)[name]}) must be at least 1")


@dataclass(frozen=True)
class Body:
    """The backbone taken apart: what makes features of an image, and what looks at a region."""

    trunk: nn.Module  # normalised images -> features by level, "0" first
    head: nn.Module | None  # C4's last stage; None: the pyramid's head is made anew
    channels: int  # of the features
    width: int  # of what the last stage puts out; the pyramid: of the features
    stride: int  # pixels of the image to one of level "0"
    levels: int
    normalization: tuple[tuple[float, ...], tuple[float, ...]]


def body(backbone: nn.Module, design: Design) -> Body:
    """A copy of `backbone`, as loaded, in the parts that `design` needs. Looks at no data.

    Args:
        backbone: by the contract of fastssl.backbones.
        design: of the detector.

    Raises:
        ValueError: the backbone takes images of one size only, has too few stages, or for c4 a last
            one that is not a module which can be applied alone.
    """
    size = vars(backbone).get("image_size")  # of those whose layers cover the whole image
    if size is not None:
        raise ValueError(
            f"detect needs a backbone for pictures of every size, and {type(backbone).__module__} "
            f"takes {size} x {size} pixels only: give a ResNet or another convolutional network"
        )
    backbone = copy.deepcopy(backbone).eval().requires_grad_(True)
    with torch.no_grad():
        stages = {
            name: each for name, each in _stages(backbone, _probe()).items() if each.ndim == 4
        }
    strides = {name: PROBE // stage.shape[-1] for name, stage in stages.items()}
    if len(set(strides.values())) < 2:
        raise ValueError(
            f"detect needs a backbone with maps of several sizes: stages {list(strides) or 'none'} "
            f"have strides {list(strides.values())}; give a ResNet or another convolutional network"
        )
    if design.freeze >= len(stages):
        raise ValueError(
            f"detect.freeze ({design.freeze}) must be below the number of stages, {list(stages)}"
        )
    if design.norm == "sync":
        backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = backbone.normalization  # pyright: ignore[reportAssignmentType]
    if design.network == "fpn":
        last_of = {stride: name for name, stride in strides.items()}  # a stride's last stage
        names = list(last_of.values())[-LEVELS:]
        _leave_untrained(backbone, names, list(stages)[: design.freeze])
        wide = [stages[name].shape[1] for name in names]
        trunk = _Pyramid(backbone, names, wide, design.pyramid)
        levels = len(names) + 1
        if len(design.anchors) != levels:
            raise ValueError(
                f"detect.anchors ({list(design.anchors)}) must be {levels} sizes, one for each "
                f"level of the pyramid over {', '.join(names)} and one above"
            )
        stride = strides[names[0]]
        return Body(trunk, None, design.pyramid, design.pyramid, stride, levels, normalization)
    *_, before, last = stages
    head = _taken_off(backbone, before, last)
    _leave_untrained(backbone, [before], list(stages)[: design.freeze])
    width = stages[last].shape[1]
    norm = nn.Identity() if design.norm == "frozen" else nn.BatchNorm2d(width)
    if design.norm == "sync":
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    return Body(
        _Last(backbone, before),
        nn.Sequential(OrderedDict(stage=head, norm=norm)),
        stages[before].shape[1],
        width,
        strides[before],
        1,
        normalization,
    )


class Detector(nn.Module):
    """Images to boxes, or with targets to losses."""

    scale: Tensor
    shift: Tensor

    def __init__(self, parts: Body, design: Design, classes: int):
        """The parts, and new heads whose weights are drawn from torch's global generator.

        Args:
            parts: as `body` gave them.
            design: the same as there.
            classes: of objects; the background is not counted.
        """
        super().__init__()
        self.trunk = parts.trunk
        c4 = design.network == "c4"
        ratios = (0.5, 1.0, 2.0)
        sizes = (design.anchors,) if c4 else tuple((size,) for size in design.anchors)
        anchors = AnchorGenerator(sizes, (ratios,) * len(sizes))
        # Detectron2's numbers for C4, torchvision's for the pyramid (each level has its own top).
        before = {"training": 12000, "testing": 6000} if c4 else {"training": 2000, "testing": 1000}
        self.rpn = RegionProposalNetwork(
            anchors,
            _InFull(RPNHead(parts.channels, anchors.num_anchors_per_location()[0])),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=before,
            post_nms_top_n={"training": 2000, "testing": design.proposals},
            nms_thresh=0.7,
        )
        if c4:
            assert parts.head is not None
            pool: nn.Module = _Crops(1 / parts.stride)
            head: nn.Module = _Mean(parts.head)
            width = parts.width
        else:
            pool = MultiScaleRoIAlign([str(k) for k in range(parts.levels - 1)], 7, 2)
            head = TwoMLPHead(parts.channels * 7 * 7, design.hidden)
            width = design.hidden
        predictor = FastRCNNPredictor(width, classes + 1)
        for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)  # as Detectron2
            nn.init.zeros_(layer.bias)
        self.roi_heads = RoIHeads(
            pool,
            head,
            _InFull(predictor),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=design.regions,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in parts.normalization)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        loaded = [parts.trunk, *([] if parts.head is None else [parts.head.stage])]  # pyright: ignore[reportAttributeAccessIssue]
        norms = [m for part in loaded for m in part.modules() if isinstance(m, _BatchNorm)]
        if design.norm == "frozen":
            for norm in norms:
                norm.requires_grad_(False)
        self._frozen = [
            norm
            for norm in norms
            if design.norm == "frozen" or not any(p.requires_grad for p in norm.parameters())
        ]
        self.train(self.training)

    def train(self, mode: bool = True) -> "Detector":
        """As torch's, but frozen batch norm keeps its averages."""
        super().train(mode)
        for norm in self._frozen:
            norm.eval()
        return self

    def forward(
        self, image: Tensor, size: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """In training the four losses by name, else what was found in each image.

        Args:
            image: uint8 [B, 3, H, W], resized already; the pictures in the upper left corner.
            size: height and width of each picture, int64 [B, 2].
            targets: in training, for each image `boxes` [N, 4], float32, left, top, right, bottom
                in its pixels, and `labels` [N], int64, from 1 on (0 is the background).

        Returns:
            Losses; or for each image `boxes` [N, 4], `labels` [N] and `scores` [N], best first.
        """
        pixels = self.normalized(image, size)
        sizes = [(height, width) for height, width in size.tolist()]  # waits for the GPU, as NMS
        # Anchors take the features' type: in 16 bits they would be pixels off.
        features = {name: level.float() for name, level in self.trunk(pixels).items()}
        proposals, losses = self.rpn(ImageList(pixels, sizes), features, targets)
        found, of_regions = self.roi_heads(features, proposals, sizes, targets)
        return losses | of_regions if self.training else found

    def normalized(self, image: Tensor, size: Tensor) -> Tensor:
        """`image` in units of the backbone's mean and deviation, 0 outside the pictures.

        Floats pass through a backbone as they are, so that this is done once. Padding by 0, the
        mean colour, is torchvision's and Detectron2's; the graph's black would be an edge.
        """
        rows = torch.arange(image.shape[2], device=image.device)
        columns = torch.arange(image.shape[3], device=image.device)
        inside = (rows[:, None] < size[:, 0, None, None]) & (columns < size[:, 1, None, None])
        return (image * self.scale + self.shift) * inside[:, None]


def _stages(backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return backbone.stages(images)  # pyright: ignore[reportCallIssue]  # the backbones' contract


def _probe() -> Tensor:
    """The same image always, which leaves the random generators alone."""
    return torch.rand(1, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0))


def _leave_untrained(backbone: nn.Module, used: list[str], frozen: list[str]) -> None:
    """Freezes weights that no `used` stage depends on, and those of the `frozen` stages.

    The former would get no gradient, which DDP takes for a mistake.
    """
    parameters = [each for each in backbone.parameters() if each.requires_grad]
    stages = _stages(backbone, _probe())

    def reached(names: list[str]) -> list[bool]:
        if not names:
            return [False] * len(parameters)
        total = sum((stages[name].sum() for name in names), torch.zeros(()))
        found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
        return [each is not None for each in found]

    for parameter, needed, off in zip(parameters, reached(used), reached(frozen), strict=True):
        parameter.requires_grad_(needed and not off)


def _taken_off(backbone: nn.Module, before: str, last: str) -> nn.Module:
    """The module of the stage `last`, with nothing in its place in the backbone.

    Raises:
        ValueError: there is none of that name, or it is not all that lies between the two stages.
    """
    places = [name for name, _ in backbone.named_modules() if name.split(".")[-1] == last]
    probe = _probe()
    for place in places[:1]:
        head = backbone.get_submodule(place)
        with torch.no_grad():
            whole = _stages(backbone, probe)
            backbone.set_submodule(place, nn.Identity())
            try:
                cut = _stages(backbone, probe)
                if torch.equal(cut[before], whole[before]) and torch.equal(
                    head(whole[before]), whole[last]
                ):
                    return head
            except (RuntimeError, TypeError):  # what follows takes its output only, or its modules
                pass
    raise ValueError(
        f"detect.network (c4) applies the last stage, {last}, to every region, and "
        f"{type(backbone).__module__} has no module {last} that can be applied alone to {before}: "
        "give detect.network=fpn, or a ResNet (fastssl.backbones.resnet)"
    )


class _Pyramid(nn.Module):
    """Normalised images to the levels "0", "1", ... and, above, "pool"."""

    def __init__(self, backbone: nn.Module, names: list[str], wide: list[int], channels: int):
        super().__init__()
        self.backbone, self._names = backbone, names
        self.pyramid = FeaturePyramidNetwork(wide, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        stages = _stages(self.backbone, pixels)
        return self.pyramid({str(k): stages[name] for k, name in enumerate(self._names)})


class _Last(nn.Module):
    """Normalised images to the one level "0", the backbone's stage `name`."""

    def __init__(self, backbone: nn.Module, name: str):
        super().__init__()
        self.backbone, self._name = backbone, name

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"0": _stages(self.backbone, pixels)[self._name]}


class _Crops(nn.Module):
    """Each region of the features as CROP x CROP pixels: Detectron2's ROIAlignV2."""

    def __init__(self, scale: float):
        super().__init__()
        self._scale = scale

    def forward(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        return roi_align(features["0"], boxes, CROP, self._scale, sampling_ratio=-1, aligned=True)


class _Mean(nn.Module):
    """What `stage` makes of each crop [N, C, CROP, CROP], averaged: [N, D]."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, crops: Tensor) -> Tensor:
        return self.stage(crops).mean(dim=(2, 3))


class _InFull(nn.Module):
    """A head whose outputs are float32: boxes are decoded in the type of the offsets to them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, features: Tensor | list[Tensor]) -> tuple[list[Tensor] | Tensor, ...]:
        return tuple(
            each.float() if isinstance(each, Tensor) else [level.float() for level in each]
            for each in self.head(features)
        )
