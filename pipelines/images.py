"""An image as a reader gives it to a graph, and as it is once decoded.

A graph passes the first on to `pipelines.ops` and need not know how images are stored.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

Device = Literal["cpu", "gpu"]


class Decoding(Protocol):
    """How files are decoded: the recipe's section `loader`."""

    @property
    def decoder(self) -> Literal["auto", "cpu"]: ...  # auto: on a GPU, where the graph runs there
    @property
    def hw_decoder_load(self) -> float: ...  # part of a batch for the GPU's JPEG engines, if any
    @property
    def region(self) -> bool: ...  # decode only the part that a graph's one crop needs
    @property
    def decoder_width(self) -> int: ...  # pixels of the largest image, for the engines; 0: unknown
    @property
    def decoder_height(self) -> int: ...
    @property
    def decoder_device_mib(self) -> int: ...  # MiB a thread that a GPU's decoder sets aside
    @property
    def decoder_host_mib(self) -> int: ...  # MiB of pinned memory, likewise


@dataclass(frozen=True)
class Encoded:
    """An image as in its file: uint8 bytes, on the CPU."""

    data: DataNode
    decoding: Decoding

    @property
    def size(self) -> DataNode:
        """Height and width, upright, as decoded: int32 [2], on the CPU."""
        return fn.peek_image_shape(self.data, dtype=DALIDataType.INT32)[0:2]


@dataclass(frozen=True)
class Pixels:
    """An image that is stored as pixels: uint8 HWC, RGB, upright, on the CPU."""

    data: DataNode

    @property
    def size(self) -> DataNode:
        """Height and width: int32 [2], on the CPU."""
        return self.data.shape(dtype=DALIDataType.INT32)[0:2]


Image = Encoded | Pixels


@dataclass(frozen=True)
class Decoded:
    """An image where the graph runs: uint8 HWC, RGB, upright."""

    pixels: DataNode
    size: DataNode  # height and width, int32 [2], on the CPU
    device: Device
