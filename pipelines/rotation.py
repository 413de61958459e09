"""An image turned by each of a set of angles (Gidaris et al. 2018; Kolesnikov et al. 2019, K19).

All turns are of the same augmented image. Those by 90, 180 and 270 degrees are exact transposes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIInterpType

from pipelines import limits, ops
from pipelines.images import Device, Image

# Turned by 45 degrees, an image has to be resampled, which blurs it by an amount that depends on
# where between the old pixels a new one falls. A network would tell by the blur alone, so that with
# slanted turns in the set the straight ones are resampled too, by the same operator. A shift by a
# random part of a pixel makes them alike on average only: one straight image then has one blur all
# over, where a slanted one has every blur, and a threshold on the sharpness of images of white
# noise is still right for 3 of 4. Reading at 1.2 to 1.5 pixels a step lets the place between pixels
# run through all values within each image, and no threshold does better than luck. What is left is
# the direction of the old grid, in JPEG's blocks and in the finest grain: no turn by 45 degrees can
# hide it but by blurring, and a network trained on white noise alone still finds it.
STEP = (1.2, 1.5)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels a side. The defaults are K19's: slim's Inception crop, all four turns."""

    image_size: int = 224
    crop: Literal["inception", "pad"] = "inception"  # pad: RotNet's CIFAR-10: a random crop of the
    # whole image with a black border
    image_area: tuple[float, float] = (0.05, 1.0)  # inception; RotNet's ImageNet: 0.08 ... 1
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # inception: width / height
    pad: int = 4  # pad: pixels on every side
    flip: float = 0.5  # probability, before turning: a mirrored 90 is a 270, so that VISSL, which
    # flips afterwards, asks for what cannot be told
    brightness: float = 0.0  # slim's, in K19: 0.125 and a saturation of 0.5; RotNet: none
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # of a full turn
    grayscale: float = 0.0  # probability
    turns: tuple[int, ...] = (0, 90, 180, 270)  # degrees counter-clockwise, multiples of 45. With
    # an odd multiple among them images are cut larger, for corners to turn in, and resampled: all
    # alike, but for the direction of the old pixels, which such an accuracy may rest on in part
    copies: Literal["all", "one"] = "all"  # one: a single random turn, as VISSL

    def __post_init__(self) -> None:
        """Refuses a geometry that does not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        limits.sides(image_size=self.image_size)
        limits.fractions(image_area=self.image_area)
        limits.factors(aspect=self.aspect)
        if not 0 <= self.pad < self.image_size:
            raise ValueError(
                f"pad ({self.pad}) must be at least 0 and below image_size ({self.image_size})"
            )
        limits.probabilities(flip=self.flip)
        limits.colors(self)
        known = set(range(0, 360, 45))
        if len(self.turns) < 2 or sorted(set(self.turns) & known) != list(self.turns):
            raise ValueError(
                f"turns ({list(self.turns)}) must be at least two ascending multiples of 45 in"
                " 0 ... 315"
            )
        if self.slanted and self.crop == "pad" and self.pad > 0:
            raise ValueError(
                f"crop ('pad') must be 'inception' with turns ({list(self.turns)}) between the"
                f" quarters, or pad ({self.pad}) 0: the border would show in those alone"
            )

    @property
    def slanted(self) -> bool:
        """Whether some turn is no multiple of 90 degrees."""
        return any(angle % 90 for angle in self.turns)

    @property
    def classes(self) -> int:
        """How many turns there are."""
        return len(self.turns)

    @property
    def largest_crop(self) -> int:
        """Pixels a side of what is turned; smaller images are enlarged."""
        if not self.slanted:
            return self.image_size
        # room for the corners, for half a pixel of shift and for the neighbours to interpolate
        return math.ceil(STEP[1] * math.sqrt(2) * self.image_size) + 2


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `turned` [F, S, S, 3], `angle` [F], `label` [F] and `index` [1].

    F is the number of turns, or 1. `angle` counts degrees counter-clockwise, `label` is its
    position among the turns.
    """
    image = _augmented(encoded, options, device)
    angles = np.array(options.turns, np.int32)
    if options.copies == "one":
        label = ops.integers(len(angles), shape=[1])
        angle = ops.table(angles)[label[0]]
        if options.slanted:
            image = _resampled(image, angle // 45 % 2, options)
        turned = ops.quarter_turn(image, angle // 90, device)
        turned = fn.expand_dims(turned, axes=[0], new_axis_names="F")
        angle = fn.reshape(angle, shape=[1])
    else:
        label, angle = ops.table(np.arange(len(angles), dtype=np.int32)), ops.table(angles)
        turned = _every_turn(image, options, device)
    return {
        "turned": turned,
        "angle": fn.cast(angle, dtype=DALIDataType.INT64),
        "label": fn.cast(label, dtype=DALIDataType.INT64),
        "index": index,
    }


def _augmented(encoded: Image, options: Options, device: Device) -> DataNode:
    """The square image that is turned, `options.largest_crop` pixels a side."""
    side = options.largest_crop
    if options.crop == "pad":
        image = ops.padded_crop(ops.decode(encoded, device), size=side, pad=options.pad)
        image = ops.random_flip(image, options.flip)
    else:
        image = ops.decoded_crop(
            encoded, side, options.image_area, options.aspect, device, options.flip
        )
    return ops.random_colors(image, options, device)


def _every_turn(image: DataNode, options: Options, device: Device) -> DataNode:
    """The copies of `image` in the order of the turns, [F, S, S, 3]."""
    if not options.slanted:
        straight = slanted = ops.quarter_turns(image, device)
    else:
        straight, slanted = (
            ops.quarter_turns(
                _resampled(image, ops.table(np.array([k], np.int32))[0], options), device
            )
            for k in (0, 1)
        )
    if options.turns == (0, 90, 180, 270):
        return straight
    copies = [
        (slanted if angle % 90 else straight)[angle // 90 : angle // 90 + 1]
        for angle in options.turns
    ]
    return fn.cat(*copies, axis=0)


def _resampled(image: DataNode, slanted: DataNode, options: Options) -> DataNode:
    """The middle of `image`, turned by 45 degrees where `slanted` is 1 and not where it is 0.

    Both are read the same way, at a random step and place: see STEP.
    """
    side = options.image_size
    step = fn.random.uniform(range=list(STEP))
    middle = options.largest_crop / 2 + fn.random.uniform(range=[-0.5, 0.5], shape=[2, 1])
    # Where in the image a pixel of the result lies, as [x, y, 1] -> [x, y]: about the middle.
    about = []
    for angle in (0.0, math.pi / 4):
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        about.append(np.hstack([turn, turn @ [[-side / 2], [-side / 2]]]))
    last_column = ops.table(np.array([[0, 0, 1]], np.float32))
    matrix = ops.table(np.array(about, np.float32))[slanted] * step + middle * last_column
    return fn.warp_affine(
        image,
        matrix=matrix,
        inverse_map=True,
        size=[side, side],
        fill_value=0.0,
        interp_type=DALIInterpType.INTERP_LINEAR,
    )
