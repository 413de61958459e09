"""What a task would cost if every operator but decoding and resizing were free.

For each graph, one of the same decoding and the same resizes, at the same sizes, of crops drawn
from the same ranges: nothing is mirrored, turned, cut or coloured. Its rate is the bound of the
graph with these two operators; what is missing to it is the other operators' cost.
"""

from collections.abc import Callable
from typing import Any

from nvidia.dali.data_node import DataNode

from pipelines import (
    colorization,
    exemplar,
    jigsaw,
    ops,
    pirl_jigsaw,
    pirl_rotation,
    relative_patch,
    rotation,
    single_view,
    two_views,
)
from pipelines.images import Device, Image

Resizes = Callable[[Image, Any, Device], list[DataNode]]


def resizes(graph: str) -> Resizes:
    """The resized parts of an image that the outputs of `graph` are made of.

    Raises:
        ValueError: nothing is written down here for that graph.
    """
    if graph not in _RESIZES:
        raise ValueError(
            f"{graph}: its resizes are not written down; add it to benchmarks/bounds.py"
        )
    return _RESIZES[graph]


def _single_view(image: Image, o: single_view.Options, device: Device) -> list[DataNode]:
    return [ops.decoded_crop(image, o.image_size, o.image_area, o.image_aspect, device)]


def _two_views(image: Image, o: two_views.Options, device: Device) -> list[DataNode]:
    decoded = ops.decode(image, device)
    return [
        ops.random_resized_crop(decoded, o.image_size, o.image_area, o.image_aspect)
        for _ in range(2)
    ]


def _pirl_rotation(image: Image, o: pirl_rotation.Options, device: Device) -> list[DataNode]:
    decoded = ops.decode(image, device)
    return [ops.random_resized_crop(decoded, o.image_size, o.image_area) for _ in range(2)]


def _pirl_jigsaw(image: Image, o: pirl_jigsaw.Options, device: Device) -> list[DataNode]:
    decoded = ops.decode(image, device)
    return [
        ops.random_resized_crop(decoded, o.image_size, o.image_area),
        ops.random_resized_crop(decoded, o.patches_crop, o.patches_area),
    ]


def _colorization(image: Image, o: colorization.Options, device: Device) -> list[DataNode]:
    if o.crop == "inception":
        return [ops.decoded_crop(image, o.image_size, o.image_area, (3 / 4, 4 / 3), device)]
    return [ops.resized_crop(image, device, resize=o.resize, crop=o.image_size, keep_aspect=True)]


def _rotation(image: Image, o: rotation.Options, device: Device) -> list[DataNode]:
    side = o.largest_crop
    if o.crop == "pad":
        return [ops.center_crop(ops.decode(image, device), resize=side, crop=side)]
    return [ops.decoded_crop(image, side, o.image_area, o.aspect, device)]


def _square(
    image: Image, o: jigsaw.Options | relative_patch.Options, device: Device
) -> list[DataNode]:
    return [
        ops.resized_crop(image, device, resize=o.resize, crop=o.crop, keep_aspect=o.keep_aspect)
    ]


def _exemplar(image: Image, o: exemplar.Options, device: Device) -> list[DataNode]:
    decoded = ops.decode(image, device)
    if o.geometry == "crop":
        return [ops.random_resized_crops(decoded, o.views, o.size, o.area, o.aspect)]
    # warps are no resizes: they read a square that is resized once
    side = round(o.size * o.region / o.seed_patch)
    return [ops.center_crop(decoded, resize=round(side / o.region), crop=side)]


_RESIZES: dict[str, Resizes] = {
    "pipelines.colorization": _colorization,
    "pipelines.exemplar": _exemplar,
    "pipelines.jigsaw": _square,
    "pipelines.pirl_jigsaw": _pirl_jigsaw,
    "pipelines.pirl_jigsaw_rotation": _pirl_jigsaw,
    "pipelines.pirl_rotation": _pirl_rotation,
    "pipelines.relative_patch": _square,
    "pipelines.rotation": _rotation,
    "pipelines.single_view": _single_view,
    "pipelines.two_views": _two_views,
}
