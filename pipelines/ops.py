"""What graphs share: nodes in, nodes out. The only file that tells the CPU backend from the GPU.

An image is uint8 HWC, patches are uint8 FHWC (F patches of one size). Random parameters are drawn
on the CPU whatever the device, because named arguments of DALI operators live there.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from nvidia.dali import fn, math
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

Device = Literal["cpu", "gpu"]


def decode(encoded: DataNode, device: Device) -> DataNode:
    """RGB uint8 HWC, turned upright by EXIF; on the GPU by the hybrid or hardware decoder."""
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=DALIImageType.RGB,
    )


def on(parameter: DataNode, device: Device) -> DataNode:
    """A drawn parameter brought to where the pixels are, to do arithmetic with them."""
    return parameter.gpu() if device == "gpu" else parameter


def random_resized_crop(
    image: DataNode, size: int, area: Sequence[float], aspect: Sequence[float] = (3 / 4, 4 / 3)
) -> DataNode:
    """A random part of `area` (fractions of the image) and `aspect` (width / height), resized.

    Bilinear with antialiasing, as torchvision's RandomResizedCrop on PIL images.

    Args:
        image: uint8 HWC.
        size: pixels a side of the result.
        area: least and greatest fraction of the image's area.
        aspect: least and greatest width / height; log-uniform between.
    """
    return fn.random_resized_crop(
        image,
        size=[size, size],
        random_area=list(area),
        random_aspect_ratio=list(aspect),
        interp_type=DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )


def decoded_crop(
    encoded: DataNode,
    size: int,
    area: Sequence[float],
    aspect: Sequence[float],
    device: Device,
) -> DataNode:
    """As `random_resized_crop` of the decoded image, but nothing else of it is decoded.

    For graphs with one crop an image; two such cost more than decoding it whole once.
    """
    part = fn.decoders.image_random_crop(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=DALIImageType.RGB,
        random_area=list(area),
        random_aspect_ratio=list(aspect),
    )
    resized = fn.resize(
        part, size=[size, size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )
    assert isinstance(resized, DataNode)  # one image in, one out
    return resized


def center_crop(image: DataNode, encoded: DataNode, resize: int, crop: int) -> DataNode:
    """The middle `crop` x `crop` of the image resized to a short side of `resize`.

    Bilinear with antialiasing, on the very grid of torchvision's Resize + CenterCrop: the long side
    rounded down, the crop's place rounded half to even. Only the pixels of the crop are resampled.

    Args:
        image: uint8 HWC, decoded from `encoded`.
        encoded: its bytes, whose header tells the size on the CPU.
        resize: pixels of the short side.
        crop: pixels a side, at most `resize`.
    """
    size = fn.peek_image_shape(encoded, dtype=DALIDataType.INT32)[0:2]  # upright, as decoded
    resized = size * resize // fn.reductions.min(size, axes=[0])
    spare = resized - crop
    half = spare // 2
    odd = spare - 2 * half
    start = half + odd * (half - 2 * (half // 2))
    return _resize_region(image, size, resized, start, crop)


def resized_crop(
    image: DataNode,
    encoded: DataNode,
    *,
    resize: int,
    crop: int,
    keep_aspect: bool = False,
) -> DataNode:
    """A random square cut at whole pixels out of the resized image; bilinear with antialiasing.

    Only the pixels of the crop are resampled. Its place is uniform over all that fit.

    Args:
        image: uint8 HWC, decoded from `encoded`.
        encoded: its bytes, whose header tells the size on the CPU.
        resize: pixels a side of the resized image; with `keep_aspect` of its short side.
        crop: pixels a side, at most `resize`.
        keep_aspect: False: squeezed to a square, as K19's code does with 292.
    """
    size = fn.peek_image_shape(encoded, dtype=DALIDataType.INT32)[0:2]  # upright, as decoded
    if keep_aspect:
        resized = size * resize // fn.reductions.min(size, axes=[0])
    else:
        resized = size * 0 + resize
    spare = resized - crop
    drawn = fn.random.uniform(range=[0.0, 1.0], shape=[2])  # below 1, so that spare is the last
    start = fn.cast(
        math.floor(drawn * fn.cast(spare + 1, dtype=DALIDataType.FLOAT)),
        dtype=DALIDataType.INT32,
    )
    start = math.min(start, spare)  # float32: 0.99999994 * 38 rounds up to 38
    return _resize_region(image, size, resized, start, crop)


def _resize_region(
    image: DataNode, size: DataNode, resized: DataNode, start: DataNode, crop: int
) -> DataNode:
    """The `crop` x `crop` at `start` of the image as if it had been `resized` whole."""
    per_pixel = fn.cast(size, dtype=DALIDataType.FLOAT) / fn.cast(resized, dtype=DALIDataType.FLOAT)
    region = fn.resize(
        image,
        size=[crop, crop],
        roi_start=start * per_pixel,
        roi_end=(start + crop) * per_pixel,
        interp_type=DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )
    assert isinstance(region, DataNode)  # one image in, one out
    return region


def padded_crop(image: DataNode, encoded: DataNode, *, size: int, pad: int) -> DataNode:
    """`size` x `size` at a random place of the image with `pad` black pixels around it.

    The image itself is `size` x `size`, as CIFAR's are for 32 (then not a pixel changes), or made
    so: short side resized to `size`, the middle cut out.
    """
    square = center_crop(image, encoded, resize=size, crop=size)
    return fn.slice(
        square,
        start=integers(2 * pad + 1, shape=[2]) - pad,
        shape=[size, size],
        axes=[0, 1],
        out_of_bounds_policy="pad",
        fill_values=[0.0],
    )


def random_flip(
    image: DataNode,
    probability: float = 0.5,
    device: Device = "cpu",
    patches: int | None = None,
) -> DataNode:
    """Mirrors left and right with `probability`: an image, or with `patches` each on its own.

    `device` is read with `patches` only.
    """
    if probability == 0:
        return image
    if patches is None:
        return fn.flip(image, horizontal=fn.random.coin_flip(probability=probability))
    mirrored = fn.flip(image, horizontal=1)  # takes no argument for each patch
    return _some(image, mirrored, probability, device, patches)


def quarter_turns(image: DataNode) -> DataNode:
    """A square image turned by 0, 90, 180 and 270 degrees counter-clockwise: [4, S, S, 3].

    Transposes and flips: exact, on either backend, and a third of what `fn.rotate` costs on the
    CPU. The direction is that of torch.rot90.
    """
    across = fn.transpose(image, perm=[1, 0, 2], output_layout="HWC")
    turned = [
        image,
        fn.flip(across, horizontal=0, vertical=1),
        fn.flip(image, horizontal=1, vertical=1),
        fn.flip(across, horizontal=1, vertical=0),
    ]
    return fn.stack(*turned, axis=0, axis_name="F")


def quarter_turn(image: DataNode, turns: DataNode) -> DataNode:
    """A square image turned by 90 degrees counter-clockwise `turns` times (int32, 0 ... 3)."""
    across = fn.transpose(image, perm=[1, 0, 2], output_layout="HWC")
    both = fn.stack(image, across, axis=0, axis_name="F")
    base = fn.reshape(both[turns % 2], layout="HWC")
    vertical = (turns == 1) | (turns == 2)
    return fn.flip(
        base,
        horizontal=fn.cast(turns >= 2, dtype=DALIDataType.INT32),
        vertical=fn.cast(vertical, dtype=DALIDataType.INT32),
    )


def color_jitter(
    pixels: DataNode,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    patches: int | None = None,
) -> DataNode:
    """Random brightness, contrast, saturation and hue, as torchvision's ColorJitter counts them.

    Contrast pivots on mid-grey (128), where torchvision pivots on the image's mean grey; hue turns
    in the YIQ plane, where torchvision turns in HSV. Without saturation and hue the cheaper
    operator is used (224 x 224 on the CPU: 0.1 ms of CPU instead of 1.5).

    Args:
        pixels: uint8 HWC, or FHWC with `patches`.
        brightness: factor uniform in [1 - brightness, 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: part of a full turn, uniform in [-hue, hue].
        patches: F of FHWC: each patch draws its own; None: one image.
    """
    if brightness == contrast == saturation == hue == 0:
        return pixels

    def draw(low: float, high: float) -> DataNode | float:
        if low == high:  # DALI refuses to draw from an empty range
            return high
        if patches is None:
            return fn.random.uniform(range=[low, high])
        return fn.per_frame(fn.random.uniform(range=[low, high], shape=[patches]))

    brightness_by = draw(max(0.0, 1 - brightness), 1 + brightness)
    contrast_by = draw(max(0.0, 1 - contrast), 1 + contrast)
    if saturation == hue == 0:
        return fn.brightness_contrast(pixels, brightness=brightness_by, contrast=contrast_by)
    return fn.color_twist(
        pixels,
        brightness=brightness_by,
        contrast=contrast_by,
        saturation=draw(max(0.0, 1 - saturation), 1 + saturation),
        hue=draw(-360 * hue, 360 * hue),
    )


def random_grayscale(
    pixels: DataNode, probability: float, device: Device, patches: int | None = None
) -> DataNode:
    """Makes R = G = B exactly (BT.601 luma) with `probability`, for each patch on its own.

    In integers all the way: `fn.hsv(saturation=0)` leaves the channels up to 1.2 apart, a colour
    leak that a network can read.
    """
    if probability == 0:
        return pixels
    gray = fn.color_space_conversion(
        pixels, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY
    )
    return _some(pixels, gray, probability, device, patches)


def _some(
    pixels: DataNode, changed: DataNode, probability: float, device: Device, patches: int | None
) -> DataNode:
    """`changed` in place of `pixels` with `probability`, in integers: exact, and cheap."""
    shape = [1, 1, 1] if patches is None else [patches, 1, 1, 1]
    coin = fn.random.coin_flip(
        probability=probability, shape=[patches or 1], dtype=DALIDataType.UINT8
    )
    here = on(fn.reshape(coin, shape=shape), device)
    return pixels * (Constant(1).uint8() - here) + changed * here


class Colors(Protocol):
    """The strengths that `color_jitter` and `random_grayscale` take, as a graph's Options do."""

    @property
    def brightness(self) -> float: ...
    @property
    def contrast(self) -> float: ...
    @property
    def saturation(self) -> float: ...
    @property
    def hue(self) -> float: ...
    @property
    def grayscale(self) -> float: ...


def random_colors(
    pixels: DataNode, colors: Colors, device: Device, patches: int | None = None
) -> DataNode:
    """Colour jitter, then grayscale: of an image, or with `patches` of each patch on its own."""
    pixels = color_jitter(
        pixels,
        brightness=colors.brightness,
        contrast=colors.contrast,
        saturation=colors.saturation,
        hue=colors.hue,
        patches=patches,
    )
    return random_grayscale(pixels, colors.grayscale, device, patches)


def table(values: np.ndarray) -> DataNode:
    """The same array for every image, on the CPU."""
    node = Constant(values, device="cpu")
    assert isinstance(node, DataNode)  # a scalar would stay a constant
    return node


def integers(below: int, shape: Sequence[int] = ()) -> DataNode:
    """Uniform integers in 0 ... below - 1, int32; a scalar, or of `shape`."""
    values = [float(value) for value in range(below)]
    if shape:
        return fn.random.uniform(values=values, shape=list(shape), dtype=DALIDataType.INT32)
    return fn.random.uniform(values=values, dtype=DALIDataType.INT32)
