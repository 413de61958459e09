"""Images with boxes: the short side at a random size, mirrored at times, padded to one batch.

Sizes are drawn for each image, as Detectron2 does (ResizeShortestEdge with INPUT.MIN_SIZE_TRAIN
and MAX_SIZE_TRAIN). Boxes do not pass through here: the graph puts out all that they are to be
moved by, `original`, `size` and `flip`.
"""

from dataclasses import dataclass

from nvidia.dali import fn, math
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIInterpType

from pipelines import limits, ops
from pipelines.images import Device, Image

ALIGN = 32  # pixels a side that batches are a multiple of: the coarsest stage's stride


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sizes in pixels. The defaults are Detectron2's for VOC with one side of 480 to 800."""

    short_side: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    long_side: int = 1333  # at most; the short side is then shorter
    flip: float = 0.5  # probability

    def __post_init__(self) -> None:
        """Refuses sizes that do not fit.

        Raises:
            ValueError: says which numbers clash.
        """
        if not self.short_side:
            raise ValueError("short_side ([]) must name at least one size, as [800]")
        limits.sides(**{"short_side": min(self.short_side)})
        if self.long_side < max(self.short_side):
            raise ValueError(
                f"long_side ({self.long_side}) must be at least short_side ({max(self.short_side)})"
            )
        limits.probabilities(flip=self.flip)

    @property
    def classes(self) -> int:
        """It puts out no label."""
        return 0

    @property
    def largest_crop(self) -> int:
        """Pixels of the short side that an image is resized to; smaller images are enlarged."""
        return max(self.short_side)


def graph(encoded: Image, index: DataNode, options: Options, device: Device) -> dict[str, DataNode]:
    """Puts out `image`, `size`, `original`, `flip` and `index` [1].

    `image` is [H, W, 3], black to the right of and below the picture, H and W those of the batch's
    largest, multiples of 32. `size` [2] is the height and width of the picture in it, `original`
    [2] that of the file's; `flip` [1] is 1 where left and right are exchanged (after the resize).
    """
    image = ops.decode(encoded, device)
    short = fn.random.uniform(values=[float(side) for side in options.short_side])
    pixels = fn.cast(image.size, dtype=DALIDataType.FLOAT)
    scale = math.min(
        short / fn.reductions.min(pixels, axes=[0]),
        float(options.long_side) / fn.reductions.max(pixels, axes=[0]),
    )
    # A strip of paper would round to no pixel at all.
    size = math.max(math.floor(pixels * scale + 0.5), 1.0)
    resized = fn.resize(
        image.pixels, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )
    assert isinstance(resized, DataNode)  # one image in, one out
    mirrored = fn.random.coin_flip(probability=options.flip, shape=[1], dtype=DALIDataType.INT32)
    turned = fn.flip(resized, horizontal=mirrored[0])
    return {
        "image": fn.pad(turned, axes=[0, 1], align=[ALIGN, ALIGN], fill_value=0),
        "size": fn.cast(size, dtype=DALIDataType.INT64),
        "original": fn.cast(image.size, dtype=DALIDataType.INT64),
        "flip": fn.cast(mirrored, dtype=DALIDataType.INT64),
        "index": index,
    }
