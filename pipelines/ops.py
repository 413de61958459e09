"""What graphs share: nodes in, nodes out. The only file that tells the CPU backend from the GPU.

An image is uint8 HWC, patches are uint8 FHWC (F patches of one size). Random parameters are drawn
on the CPU whatever the device, because named arguments of DALI operators live there; so both
backends draw the same. On the CPU, `pipelines.cpu_kernels` does what DALI's operators do on a GPU,
to the same pixels within one level of 255.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from nvidia.dali import fn, math
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

from pipelines import cpu_kernels
from pipelines.images import Decoded, Device, Encoded, Image

Range = Sequence[float]  # least and greatest
Interpolation = Literal["bilinear", "bicubic"]
MIB = 2**20  # bytes


def decode(image: Image, device: Device) -> Decoded:
    """RGB, turned upright by EXIF; on the GPU by the hybrid or hardware decoder."""
    if not isinstance(image, Encoded):
        return Decoded(on(image.data, device), image.size, device)
    if device == "gpu" and image.decoding.decoder == "auto":
        pixels = fn.decoders.image(
            image.data,
            device="mixed",
            output_type=DALIImageType.RGB,
            hw_decoder_load=image.decoding.hw_decoder_load,
            preallocate_width_hint=image.decoding.decoder_width,
            preallocate_height_hint=image.decoding.decoder_height,
            device_memory_padding=image.decoding.decoder_device_mib * MIB,
            host_memory_padding=image.decoding.decoder_host_mib * MIB,
        )
    else:
        pixels = on(fn.decoders.image(image.data, output_type=DALIImageType.RGB), device)
    return Decoded(pixels, image.size, device)


def _decode_part(image: Encoded, start: DataNode, shape: DataNode, device: Device) -> Decoded:
    """As `decode`, of `shape` pixels from `start` on (int32 [2] each)."""
    if device == "gpu" and image.decoding.decoder == "auto":
        pixels = fn.decoders.image_slice(
            image.data,
            start=start,
            shape=shape,
            axes=[0, 1],
            device="mixed",
            output_type=DALIImageType.RGB,
            hw_decoder_load=image.decoding.hw_decoder_load,
            preallocate_width_hint=image.decoding.decoder_width,
            preallocate_height_hint=image.decoding.decoder_height,
            device_memory_padding=image.decoding.decoder_device_mib * MIB,
            host_memory_padding=image.decoding.decoder_host_mib * MIB,
        )
    else:
        pixels = fn.decoders.image_slice(
            image.data, start=start, shape=shape, axes=[0, 1], output_type=DALIImageType.RGB
        )
        pixels = on(pixels, device)
    return Decoded(pixels, shape, device)


def on(parameter: DataNode, device: Device) -> DataNode:
    """A drawn parameter brought to where the pixels are, to do arithmetic with them."""
    return parameter.gpu() if device == "gpu" else parameter


def random_resized_crop(
    image: Decoded, size: int, area: Range, aspect: Range = (3 / 4, 4 / 3), flip: float = 0.0
) -> DataNode:
    """A random part of `area` (fractions of the image) and `aspect` (width / height), resized.

    Bilinear with antialiasing, as torchvision's RandomResizedCrop on PIL images.

    Args:
        image: what is cut.
        size: pixels a side of the result.
        area: least and greatest fraction of the image's area.
        aspect: least and greatest width / height; log-uniform between.
        flip: probability of mirroring left and right.
    """
    return _only_frame(random_resized_crops(image, 1, size, area, aspect, flip))


def random_resized_crops(
    image: Decoded, count: int, size: int, area: Range, aspect: Range, flip: float = 0.0
) -> DataNode:
    """`count` such parts, each drawn on its own: FHWC."""
    regions = []
    for _ in range(count):
        start, shape = _random_window(image.size, area, aspect)
        start = _float(start)
        regions.append((start, start + _float(shape)))
    return _resize_regions(image, size, regions, flip)


def decoded_crop(
    image: Image, size: int, area: Range, aspect: Range, device: Device, flip: float = 0.0
) -> DataNode:
    """As `random_resized_crop` of the decoded image, but nothing else of it is decoded.

    For graphs with one crop an image; two such cost more than decoding it whole once.
    """
    if not isinstance(image, Encoded) or not image.decoding.region:
        return random_resized_crop(decode(image, device), size, area, aspect, flip)
    start, shape = _random_window(image.size, area, aspect)
    part = _decode_part(image, start, shape, device)
    end = _float(shape)
    return resize_region(part, size, end * 0.0, end, flip)


def _random_window(size: DataNode, area: Range, aspect: Range) -> tuple[DataNode, DataNode]:
    """Upper left corner and shape of a random part, int32 [2] each."""
    start, shape = fn.random_crop_generator(
        size, random_area=list(area), random_aspect_ratio=list(aspect)
    )
    return start, shape


def center_crop(
    image: Decoded, resize: int, crop: int, interpolation: Interpolation = "bilinear"
) -> DataNode:
    """The middle `crop` x `crop` of the image resized to a short side of `resize`.

    With antialiasing, on the very grid of torchvision's Resize + CenterCrop: the long side rounded
    down, the crop's place rounded half to even. Only the pixels of the crop are resampled.

    Args:
        image: what is cut.
        resize: pixels of the short side.
        crop: pixels a side, at most `resize`.
        interpolation: bicubic is Pillow's (a = -0.5), and on the CPU by DALI's own operator, which
            is slower than the kernel.
    """
    resized = image.size * resize // fn.reductions.min(image.size, axes=[0])
    spare = resized - crop
    half = spare // 2
    odd = spare - 2 * half
    start = half + odd * (half - 2 * (half // 2))
    per_pixel = _float(image.size) / _float(resized)
    region = (start * per_pixel, (start + crop) * per_pixel)
    return _only_frame(_resize_regions(image, crop, [region], 0.0, interpolation))


def resized_crop(
    image: Image,
    device: Device,
    *,
    resize: int,
    crop: int,
    keep_aspect: bool = False,
    flip: float = 0.0,
) -> DataNode:
    """A random square cut at whole pixels out of the resized image; bilinear with antialiasing.

    Only the pixels of the crop are decoded and resampled. Its place is uniform over all that fit.

    Args:
        image: what is cut.
        device: where the graph runs.
        resize: pixels a side of the resized image; with `keep_aspect` of its short side.
        crop: pixels a side, at most `resize`.
        keep_aspect: False: squeezed to a square, as K19's code does with 292.
        flip: probability of mirroring left and right.
    """
    size = image.size
    if keep_aspect:
        resized = size * resize // fn.reductions.min(size, axes=[0])
    else:
        resized = size * 0 + resize
    spare = resized - crop
    drawn = fn.random.uniform(range=[0.0, 1.0], shape=[2])  # below 1, so that spare is the last
    start = fn.cast(math.floor(drawn * _float(spare + 1)), dtype=DALIDataType.INT32)
    start = math.min(start, spare)  # float32: 0.99999994 * 38 rounds up to 38
    per_pixel = _float(size) / _float(resized)
    first, last = start * per_pixel, (start + crop) * per_pixel
    if not isinstance(image, Encoded) or not image.decoding.region:
        return resize_region(decode(image, device), crop, first, last, flip)
    # As far around as the filter reaches, and the decoder's own filter for colours.
    margin = math.max(per_pixel, 1.0) + 2.0
    low = fn.cast(math.floor(math.max(first - margin, 0.0)), dtype=DALIDataType.INT32)
    high = fn.cast(math.ceil(math.min(last + margin, _float(size))), dtype=DALIDataType.INT32)
    part = _decode_part(image, low, high - low, device)
    return resize_region(part, crop, first - low, last - low, flip)


def _float(node: DataNode) -> DataNode:
    return fn.cast(node, dtype=DALIDataType.FLOAT)


def resize_region(
    image: Decoded, size: int, start: DataNode, end: DataNode, flip: float = 0.0
) -> DataNode:
    """The part from `start` to `end` (float32 [2], pixels) as `size` x `size`, at times mirrored.

    Bilinear with antialiasing. Pixels around the part count where the filter reaches.
    """
    return _only_frame(_resize_regions(image, size, [(start, end)], flip))


def _resize_regions(
    image: Decoded,
    size: int,
    regions: Sequence[tuple[DataNode, DataNode]],
    flip: float,
    interpolation: Interpolation = "bilinear",
) -> DataNode:
    """FHWC, one frame a region."""
    count = len(regions)
    mirror = fn.random.coin_flip(probability=flip, shape=[count]) if flip else None
    if image.device == "cpu" and interpolation == "bilinear":  # the kernel knows no other
        mirrored = table(np.zeros(count, np.float32))
        if mirror is not None:
            mirrored = _float(mirror)
        each = [fn.cat(*ends, mirrored[k : k + 1]) for k, ends in enumerate(regions)]
        return cpu_kernels.resize(image.pixels, size, fn.stack(*each))
    is_linear = interpolation == "bilinear"
    frames = []
    for k, (start, end) in enumerate(regions):
        frame = fn.resize(
            image.pixels,
            size=[size, size],
            roi_start=start,
            roi_end=end,
            interp_type=DALIInterpType.INTERP_LINEAR if is_linear else DALIInterpType.INTERP_CUBIC,
            antialias=True,
        )
        assert isinstance(frame, DataNode)  # one image in, one out
        frames.append(frame if mirror is None else fn.flip(frame, horizontal=mirror[k]))
    stacked = fn.stack(*frames, axis=0, axis_name="F")
    assert isinstance(stacked, DataNode)
    return stacked


def _only_frame(frames: DataNode) -> DataNode:
    """HWC of [1, H, W, C]; nothing is copied."""
    return fn.squeeze(frames, axes=[0])  # fn.reshape(src_dims=...) fails behind fn.stack


def padded_crop(image: Decoded, *, size: int, pad: int) -> DataNode:
    """`size` x `size` at a random place of the image with `pad` black pixels around it.

    The image itself is `size` x `size`, as CIFAR's are for 32 (then not a pixel changes), or made
    so: short side resized to `size`, the middle cut out.
    """
    square = center_crop(image, resize=size, crop=size)
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
    coin = fn.random.coin_flip(probability=probability, shape=[patches], dtype=DALIDataType.UINT8)
    mirrored = fn.flip(image, horizontal=1)  # takes no argument for each patch
    return _some(image, mirrored, coin, device, patches)


def quarter_turns(image: DataNode, device: Device) -> DataNode:
    """A square image turned by 0, 90, 180 and 270 degrees counter-clockwise: [4, S, S, 3].

    Pixels move and keep their values, on either backend. The direction is that of torch.rot90.
    """
    if device == "cpu":
        return cpu_kernels.quarter_turns(image, table(np.arange(4, dtype=np.float32)))
    across = fn.transpose(image, perm=[1, 0, 2], output_layout="HWC")
    turned = [
        image,
        fn.flip(across, horizontal=0, vertical=1),
        fn.flip(image, horizontal=1, vertical=1),
        fn.flip(across, horizontal=1, vertical=0),
    ]
    return fn.stack(*turned, axis=0, axis_name="F")


def quarter_turn(image: DataNode, turns: DataNode, device: Device) -> DataNode:
    """A square image turned by 90 degrees counter-clockwise `turns` times (int32, 0 ... 3)."""
    if device == "cpu":
        by = fn.reshape(_float(turns), shape=[1])
        return _only_frame(cpu_kernels.quarter_turns(image, by))
    across = fn.transpose(image, perm=[1, 0, 2], output_layout="HWC")
    both = fn.stack(image, across, axis=0, axis_name="F")
    base = fn.reshape(both[turns % 2], layout="HWC")
    vertical = (turns == 1) | (turns == 2)
    return fn.flip(
        base,
        horizontal=fn.cast(turns >= 2, dtype=DALIDataType.INT32),
        vertical=fn.cast(vertical, dtype=DALIDataType.INT32),
    )


def cut(
    image: DataNode, size: int, corners: DataNode, count: int, colors: int, device: Device
) -> DataNode:
    """`count` squares of `size` pixels a side, copied out of the image: FHWC.

    Args:
        image: uint8 HWC.
        size: pixels a side.
        corners: row and column where each begins, int32 [count, colors, 2], on the CPU.
        count: of squares.
        colors: 1, or 3 where red, green and blue each have a place of their own.
        device: where the image is.
    """
    if device == "cpu":
        return cpu_kernels.cut(image, size, _float(corners))

    def square(source: DataNode, corner: DataNode) -> DataNode:
        return fn.slice(source, start=corner, shape=[size, size], axes=[0, 1])

    if colors == 1:
        squares = [square(image, corners[k, 0]) for k in range(count)]
    else:
        planes = [image[:, :, color : color + 1] for color in range(colors)]
        squares = [
            fn.cat(*[square(planes[c], corners[k, c]) for c in range(colors)], axis=2)
            for k in range(count)
        ]
    return fn.stack(*squares, axis=0, axis_name="F")


def color_jitter(
    pixels: DataNode,
    device: Device,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    grayscale: float = 0.0,
    probability: float = 1.0,
    patches: int | None = None,
) -> DataNode:
    """Random brightness, contrast, saturation and hue, as torchvision's ColorJitter counts them.

    Contrast pivots on mid-grey (128), where torchvision pivots on the image's mean grey; hue turns
    in the YIQ plane, where torchvision turns in HSV. Then gray with a probability: R = G = B
    exactly (BT.601 luma), since channels that are apart by a rounding are a colour that a network
    can read (`fn.hsv(saturation=0)` leaves up to 1.2).

    Args:
        pixels: uint8 HWC, or FHWC with `patches`.
        device: where they are.
        brightness: factor uniform in [1 - brightness, 1 + brightness].
        contrast: likewise.
        saturation: likewise.
        hue: part of a full turn, uniform in [-hue, hue].
        grayscale: probability of gray.
        probability: that the four change anything; the rest keeps its colours, or becomes gray.
        patches: F of FHWC: each patch draws its own; None: one image.
    """
    frames = patches or 1
    happens = None
    if probability < 1 and max(brightness, contrast, saturation, hue) > 0:
        happens = fn.random.coin_flip(
            probability=probability, shape=[frames], dtype=DALIDataType.INT32
        )

    def draw(low: float, high: float, unchanged: float) -> DataNode | None:
        if low == high:  # DALI refuses to draw from an empty range
            return None
        drawn = fn.random.uniform(range=[low, high], shape=[frames])
        return drawn if happens is None else happens * (drawn - unchanged) + unchanged

    def factor(spread: float) -> DataNode | None:
        return draw(max(0.0, 1 - spread), 1 + spread, 1.0)

    changes = (
        factor(brightness),
        factor(contrast),
        factor(saturation),
        draw(-360 * hue, 360 * hue, 0.0),
    )
    neutral = (1.0, 1.0, 1.0, 0.0)
    gray = None
    if grayscale > 0:
        gray = fn.random.coin_flip(probability=grayscale, shape=[frames], dtype=DALIDataType.UINT8)
    changed = any(change is not None for change in changes)
    if gray is None and not changed:
        return pixels
    if device == "cpu":
        columns = [
            table(np.full(frames, value, np.float32)) if change is None else change
            for change, value in zip(changes, neutral, strict=True)
        ]
        never = table(np.zeros(frames, np.float32))
        columns.append(never if gray is None else _float(gray))
        layout = "HWC" if patches is None else "FHWC"
        return cpu_kernels.change_colors(pixels, fn.stack(*columns, axis=1), layout)
    if changed:
        # Side by side as for the kernel: seeds go by the order in which nodes are met from the end
        # of the graph, and an operator's arguments are met in that of the alphabet.
        drawn = [change for change in changes if change is not None]
        columns = iter(range(len(drawn)))
        together = fn.stack(*drawn, axis=1)

        def argument(column: int) -> DataNode:
            return together[0, column] if patches is None else fn.per_frame(together[:, column])

        by = [
            value if change is None else argument(next(columns))
            for change, value in zip(changes, neutral, strict=True)
        ]
        pixels = fn.color_twist(
            pixels, brightness=by[0], contrast=by[1], saturation=by[2], hue=by[3]
        )
    if gray is not None:
        luma = fn.color_space_conversion(
            pixels, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY
        )
        pixels = _some(pixels, luma, gray, device, patches)
    return pixels


def _some(
    pixels: DataNode, changed: DataNode, coin: DataNode, device: Device, patches: int | None
) -> DataNode:
    """`changed` in place of `pixels` where `coin` (uint8 [F]) says so, in integers: exact."""
    shape = [1, 1, 1] if patches is None else [patches, 1, 1, 1]
    here = on(fn.reshape(coin, shape=shape), device)
    return pixels * (Constant(1).uint8() - here) + changed * here


def change_saturation_and_value(
    views: DataNode, saturation: DataNode, value: DataNode, count: int, device: Device
) -> DataNode:
    """S and V of HSV each to a power, times a factor, plus an offset, within 0 ... 1.

    With V the greatest channel, m the least and S = (V - m) / V, a channel is
    c = V (1 - S r), where r = (V - c) / (V - m) says the hue. A change of S and V leaves r alone,
    so that no hue is computed: c' = V' (1 - S' r) = V' - g (V - c) with g = V' S' / (V - m).

    Args:
        views: uint8 FHWC.
        saturation: float32 [count, 3]: power, factor and offset for each view, on the CPU.
        value: likewise.
        count: F.
        device: where the views are.
    """
    # Side by side on either backend: seeds go by the order in which nodes are met.
    changes = fn.cat(saturation, value, axis=1)
    if device == "cpu":
        return cpu_kernels.change_saturation_and_value(views, changes)

    def changed(plane: DataNode, first: int) -> DataNode:
        power, factor, offset = (
            on(fn.reshape(changes[:, first + k], shape=[count, 1, 1, 1]), device) for k in range(3)
        )
        return math.clamp(math.fpow(plane, power) * factor + offset, 0.0, 1.0)

    greatest = _float(fn.reductions.max(views, axes=[3], keep_dims=True))
    chroma = greatest - _float(fn.reductions.min(views, axes=[3], keep_dims=True))
    # Where V or the chroma is 0 every channel is V, whatever stands in the place of 0 / 0.
    new_value = changed(greatest / 255.0, 3) * 255.0
    new_saturation = changed(chroma / math.max(greatest, 1.0), 0)
    gain = new_value * new_saturation / math.max(chroma, 1.0)
    return fn.cast(views * gain + (new_value - gain * greatest), dtype=DALIDataType.UINT8)


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


def random_grayscale(
    pixels: DataNode, probability: float, device: Device, patches: int | None = None
) -> DataNode:
    """Gray, as in `color_jitter`, with `probability`: an image, or each patch on its own."""
    return color_jitter(pixels, device, grayscale=probability, patches=patches)


def random_colors(
    pixels: DataNode, colors: Colors, device: Device, patches: int | None = None
) -> DataNode:
    """Colour jitter, then grayscale: of an image, or with `patches` of each patch on its own."""
    return color_jitter(
        pixels,
        device,
        brightness=colors.brightness,
        contrast=colors.contrast,
        saturation=colors.saturation,
        hue=colors.hue,
        grayscale=colors.grayscale,
        patches=patches,
    )


def random_blur(
    image: DataNode, sigma: tuple[float, float], probability: float, device: Device
) -> DataNode:
    """Gaussian blur with `probability`, its width uniform in `sigma` (pixels), cut off at three.

    The part of the images that is left sharp is not paid for.
    """
    if probability == 0:
        return image
    low, high = sigma
    drawn = (
        fn.random.uniform(range=[low, high]) if low < high else table(np.array(high, np.float32))
    )
    sharp = fn.random.coin_flip(probability=1 - probability, dtype=DALIDataType.INT32)
    if device == "cpu":
        return cpu_kernels.blur(image, fn.reshape(drawn * (1 - sharp), shape=[1]))
    # a window of 1 pixel changes nothing, 0 is one as wide as sigma asks
    return fn.gaussian_blur(image, sigma=drawn, window_size=sharp)


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
