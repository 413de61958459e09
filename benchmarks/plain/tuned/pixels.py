"""What the tuned tasks are made of: decoding, crops, resizing, colours and blur on uint8 tensors.

An image is uint8 [3, H, W] over HWC memory as it comes from the decoder: torch's fast resize of
bytes reads and writes that layout (224 x 224 out: 0.21 ms instead of 0.30). Colours work on planes.
Times are of one core of a Xeon at 2.8 GHz with AVX-512, of photographs of about 390 x 470 pixels.
"""

import io
import math
import random
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from pipelines.ops import Colors

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
ORIENTATION = 0x0112  # EXIF tag

TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
FROM_YIQ = np.linalg.inv(TO_YIQ)
# A colour jitter is one matrix: gain * (GRAY + saturation * (cos(hue) IQ + sin(hue) TURNED)).
GRAY, IQ, TURNED = (
    FROM_YIQ @ np.array(middle) @ TO_YIQ
    for middle in (
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, -1], [0, 1, 0]],
    )
)


def decode(path: str) -> Tensor:
    """RGB uint8 [3, H, W] over HWC memory, upright; JPEGs by libjpeg-turbo, others by Pillow.

    Raises:
        OSError: the file cannot be read, or is no image.
    """
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"\xff\xd8") and _is_upright(data):
        try:
            return _tensor(simplejpeg.decode_jpeg(data))
        except ValueError:  # CMYK, or damaged: Pillow converts the one and names the other
            pass
    # torchvision.io.decode_image is deprecated since 0.29
    with Image.open(io.BytesIO(data)) as image:
        return _tensor(np.array(ImageOps.exif_transpose(image).convert("RGB")))


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing, as the graphs do; the result lies in HWC memory as well."""
    # image[None] would have a stride that torch takes for that of planes, at half the speed
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def random_resized_crop(
    image: Tensor, size: int, area: Sequence[float], aspect: Sequence[float] = (3 / 4, 4 / 3)
) -> Tensor:
    """A random part of `area` (fractions) and `aspect` (width / height), `size` pixels a side."""
    height, width = image.shape[1:]
    top, left, rows, columns = _random_part(height, width, area, aspect)
    return resized(image[:, top : top + rows, left : left + columns], size, size)


def resized_crop(image: Tensor, resize: int, crop: int, *, keep_aspect: bool) -> Tensor:
    """A random square of the resized image, of which nothing else is resampled.

    What is resampled begins and ends at whole pixels of `image`, where the graphs begin between
    them: a shift by half a pixel of the image at most, and as little of its scale.
    """
    height, width = image.shape[1:]
    short = min(height, width)
    part = []
    for side in (height, width):
        whole = side * resize // short if keep_aspect else resize
        start = random.randint(0, whole - crop) * side / whole
        part.append(slice(round(start), max(round(start) + 1, round(start + crop * side / whole))))
    return resized(image[:, part[0], part[1]], crop, crop)


def padded_crop(image: Tensor, size: int, pad: int) -> Tensor:
    """`size` x `size` at a random place of the image with `pad` black pixels around it.

    The image itself is `size` a side, or the middle of it is made so.
    """
    height, width = image.shape[1:]
    if (height, width) != (size, size):
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        image = resized(image[:, top : top + short, left : left + short], size, size)
    padded = functional.pad(image, [pad] * 4)
    top, left = random.randint(0, 2 * pad), random.randint(0, 2 * pad)
    return padded[:, top : top + size, left : left + size]


def random_flip(image: Tensor, probability: float) -> Tensor:
    """Mirrored left and right with `probability`."""
    return image.flip(-1) if random.random() < probability else image


def random_colors(images: Tensor, colors: Colors, gray: float) -> Tensor:
    """Jitter, then gray with that probability, of each of uint8 [N, 3, H, W] on its own.

    Brightness, contrast about 128, saturation and hue in the YIQ plane are one matrix.
    """
    if not any((colors.brightness, colors.contrast, colors.saturation, colors.hue)):
        return random_gray(images, gray)
    matrices, offsets = jitter(len(images), colors)
    return recolored(images, matrices, offsets, _coins(len(images), gray))


def random_gray(images: Tensor, probability: float) -> Tensor:
    """Each of uint8 [N, 3, H, W] on its own with three equal planes, by chance."""
    return grayed(images, _coins(len(images), probability))


def jitter(count: int, colors: Colors) -> tuple[np.ndarray, np.ndarray]:
    """Draws matrices [count, 3, 3] and offsets [count, 3]."""

    def factors(spread: float) -> np.ndarray:
        return np.array([random.uniform(max(0, 1 - spread), 1 + spread) for _ in range(count)])

    brightness, contrast = factors(colors.brightness), factors(colors.contrast)
    saturation = factors(colors.saturation)
    angle = np.array([random.uniform(-1, 1) * colors.hue * math.tau for _ in range(count)])
    along, across = saturation * np.cos(angle), saturation * np.sin(angle)
    matrices = GRAY + along[:, None, None] * IQ + across[:, None, None] * TURNED
    matrices *= (brightness * contrast)[:, None, None]
    offsets = brightness * (1 - contrast) * 128
    return matrices, np.repeat(offsets[:, None], 3, axis=1)


def recolored(
    images: Tensor, matrices: np.ndarray, offsets: np.ndarray, gray: Sequence[int] = ()
) -> Tensor:
    """Uint8 [N, 3, H, W] times a matrix plus an offset each, those listed in `gray` then gray.

    The result lies in planes.
    """
    count, _, height, width = images.shape
    if len(gray) == count == 1:  # one plane is enough
        row = torch.from_numpy((LUMA @ matrices[0]).astype(np.float32)[None])
        plane = (row @ _planes(images)[0]).add_(float(LUMA @ offsets[0]) + 0.5)
        return as_bytes(plane).view(1, 1, height, width).expand(1, 3, height, width)
    changed = torch.baddbmm(
        torch.from_numpy((offsets[..., None] + 0.5).astype(np.float32)),
        torch.from_numpy(matrices.astype(np.float32)),
        _planes(images),
    )
    return grayed(as_bytes(changed).view(images.shape), gray)


def grayed(images: Tensor, which: Sequence[int]) -> Tensor:
    """Uint8 [N, 3, H, W], the listed ones with three equal planes; may change `images`."""
    if not which:
        return images
    luma = as_bytes((torch.from_numpy(LUMA) @ _planes(images)).add_(0.5))
    luma = luma.view(-1, 1, *images.shape[2:])
    if len(which) == len(images):
        return luma.expand(images.shape)
    for n in which:
        images[n] = luma[n]
    return images


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of uint8 [3, H, W], cut off at three sigma, the border mirrored.

    As sums of shifted images: 0.4 ms at a sigma of 1, where convolutions take 1.4 and
    torchvision's gaussian_blur 2.1.
    """
    radius = math.ceil(3 * sigma)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    # the three planes of a gray image are one
    is_gray = image.stride(0) == 0
    planes = (image[:1] if is_gray else image).to(
        torch.float32, memory_format=torch.contiguous_format
    )
    planes = functional.pad(planes[None], [radius] * 4, mode="reflect")[0]
    for axis in (1, 2):
        length = planes.shape[axis] - 2 * radius
        mixed = planes.narrow(axis, radius, length) * (weights[0] / total)
        for k in range(1, radius + 1):
            mixed.add_(planes.narrow(axis, radius - k, length), alpha=weights[k] / total)
            mixed.add_(planes.narrow(axis, radius + k, length), alpha=weights[k] / total)
        planes = mixed
    done = as_bytes(planes.add_(0.5))
    return done.expand(3, -1, -1) if is_gray else done


def as_bytes(values: Tensor) -> Tensor:
    """Uint8 of floats 0 ... 255, which are changed; cut off, not rounded: add 0.5 before."""
    return values.clamp_(0, 255).to(torch.uint8)


def _coins(count: int, probability: float) -> list[int]:
    return [n for n in range(count) if random.random() < probability]


def _is_upright(jpeg: bytes) -> bool:
    """Whether EXIF does not ask for a turn; a walk over a handful of segments, mostly without."""
    place = 2
    while (marker := jpeg[place : place + 2])[:1] == b"\xff" and marker != b"\xff\xda":  # pixels
        if marker == b"\xff\xe1" and jpeg[place + 4 : place + 8] == b"Exif":
            with Image.open(io.BytesIO(jpeg)) as image:
                return image.getexif().get(ORIENTATION, 1) == 1
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return True


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _random_part(
    height: int, width: int, area: Sequence[float], aspect: Sequence[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width, drawn as torchvision's RandomResizedCrop does."""
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        pixels = random.uniform(*area) * height * width
        ratio = math.exp(random.uniform(low, high))
        columns, rows = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            top, left = random.randint(0, height - rows), random.randint(0, width - columns)
            return top, left, rows, columns
    columns = min(width, max(1, round(height * aspect[1])))
    rows = min(height, max(1, round(width / aspect[0])))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _planes(images: Tensor) -> Tensor:
    """Float32 [N, 3, pixels]; made contiguous as bytes, which is faster than as floats."""
    return images.contiguous().view(len(images), 3, -1).float()
