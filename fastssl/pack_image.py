"""One image file made ready for a tar store: as it is, or decoded, upright, RGB, shrunk, encoded.

By Pillow, which fastssl needs anyway, decodes every format that training does, and brings the same
libjpeg-turbo as everybody else: JPEGs decode to the very pixels that DALI gives. Imported by the
worker processes of fastssl/pack.py, so that it must stay light.
"""

import errno
import io
import os
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl import image_bytes, tar_file

# Shrinking twice, here and to the crop, blurs twice. Over 40 images of ImageNet at 292 (256), crops
# of 20-100 % resized to 224 differ from those of the original by 1.1 (1.5) gray levels with
# Lanczos, 1.2 (1.6) with bicubic, 1.7 (2.1) with bilinear, and keep 98 (96), 95 (92), 87 (84) % of
# their gradients.
FILTER = Image.Resampling.LANCZOS
SUBSAMPLING = "4:2:0"  # as nearly all of ImageNet has it; 4:4:4 decodes slower, and adds nothing
# to what was 4:2:0 before
_STRIP = 64  # rows
_ORIENTATION = 0x0112  # Exif's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """What images are made into."""

    # original: the file's own bytes; raw: uint8 pixels, nothing to be decoded
    form: Literal["original", "jpeg", "raw"] = "jpeg"
    short_side: int | None = 292  # pixels; images that are smaller stay as they are. None: all do
    quality: int = 90  # of JPEGs, 1 ... 100
    square: int | None = None  # pixels a side: the middle of every image at that size, raw only

    def __post_init__(self) -> None:
        """Refuses what does not go together.

        Raises:
            ValueError: says which values.
        """
        if self.form not in ("original", "jpeg", "raw"):
            raise ValueError(f"--form ({self.form}) must be original, jpeg or raw")
        if self.form == "original" and self.short_side is not None:
            raise ValueError(
                f"--short-side ({self.short_side}) is for --form jpeg or raw: originals stay as"
                " they are"
            )
        if self.short_side is not None and self.short_side < 8:
            raise ValueError(f"--short-side ({self.short_side}) must be at least 8, or full")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality ({self.quality}) must be in 1 ... 100")
        if self.square is not None and self.square < 8:
            raise ValueError(f"--square ({self.square}) must be at least 8")
        if self.square is not None and self.form != "raw":
            raise ValueError(
                "--square is for --form raw: others have their own sizes, leave it out"
            )


class MachineFault(Exception):
    """The machine failed, or a file has gone: nothing is known about it, so it is not left out."""


@dataclass(frozen=True)
class Packed:
    """What is stored of an image."""

    content: bytes  # of the member: the image, behind a heading if it is raw
    heading: int  # bytes
    extension: str  # of the member's name
    height: int
    width: int
    checksum: int  # CRC-32 of the image


def pack(path: str, form: Form, max_pixels: int = image_bytes.MAX_PIXELS) -> Packed:
    """Reads and converts a file.

    Raises:
        ValueError: it cannot be decoded; the message is the reason, to be put behind a name.
        MachineFault: it could not be read, two times; says which file, and the remedy.
        MemoryError: there is not enough to decode it.
    """
    original = _read(path)
    if form.form == "original":
        kind = image_bytes.extension(original)
        height, width = image_bytes.dimensions(original, max_pixels)
        assert kind is not None  # what has dimensions has a format
        return Packed(original, 0, kind, height, width, zlib.crc32(original))
    try:
        content, height, width = _converted(original, form, max_pixels)
    except UnidentifiedImageError:  # whose own words hold an address in memory
        raise ValueError("not an image that Pillow can read") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes a decoder raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"cannot be decoded: {' '.join(str(reason).split())}") from None
    heading = npy_heading(height, width) if form.form == "raw" else b""
    kind = "npy" if form.form == "raw" else "jpg"
    return Packed(heading + content, len(heading), kind, height, width, zlib.crc32(content))


def pack_all(paths: list[str], form: Form, max_pixels: int) -> list[Packed | str]:
    """In a worker process: each file, or the reason why not.

    Raises:
        MachineFault: it is not the file's fault; says which.
    """
    Image.MAX_IMAGE_PIXELS = None  # ours is told by name
    results: list[Packed | str] = []
    for path in paths:
        try:
            results.append(pack(path, form, max_pixels))
        except ValueError as error:
            results.append(str(error))
        except MemoryError:
            raise MachineFault(
                f"{tar_file.shown(path)}: not enough memory to decode it: give fewer --workers, or"
                " name it in a data.quarantine"
            ) from None
    return results


def npy_heading(height: int, width: int) -> bytes:
    """What numpy writes before uint8 [H, W, 3] (format 1.0): 128 bytes, so that pixels align."""
    file = io.BytesIO()
    said = {"descr": "|u1", "fortran_order": False, "shape": (height, width, 3)}
    np.lib.format.write_array_header_1_0(file, said)
    return file.getvalue()


def upright_rgb(image: Image.Image) -> Image.Image:
    """As DALI decodes: turned as Exif says, without alpha, 16 bits cut to their upper 8."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    turned = image if turn is None else image.transpose(turn)
    if turned.mode == "RGB":
        return turned
    if turned.mode.startswith("I"):
        return _upper_bytes(turned).convert("RGB")
    turned.info.pop("transparency", None)  # else Pillow warns that it is lost
    return turned.convert("RGB")


def shrunk(image: Image.Image, form: Form) -> Image.Image:
    """At the form's size; the long side is rounded down, as torchvision's Resize does."""
    width, height = image.size
    short = min(width, height)
    if form.square is not None:
        left, upper = (width - short) / 2, (height - short) / 2
        box = left, upper, left + short, upper + short
        return image.resize((form.square, form.square), FILTER, box=box)
    if form.short_side is None or short <= form.short_side:
        return image
    size = (width * form.short_side // short, height * form.short_side // short)
    return image.resize(size, FILTER)


def _upper_bytes(image: Image.Image) -> Image.Image:
    """16-bit gray ("I;16", or "I") as 8 bits; in strips, as numpy has it several times over."""
    width, height = image.size
    gray = Image.new("L", image.size)
    for top in range(0, height, _STRIP):
        box = 0, top, width, min(top + _STRIP, height)
        upper = np.clip(np.asarray(image.crop(box)), 0, 65535) >> 8
        gray.paste(Image.fromarray(upper.astype(np.uint8)), box)
    return gray


def _orientation(image: Image.Image) -> int:
    """Exif's, 1 to 8; 1, upright, where it is missing or damaged, as DALI takes it.

    Not by ImageOps.exif_transpose, which fails on damaged Exif and believes XMP as well. (TIFFs
    have been turned by then: Pillow does that while loading.)
    """
    content = image.info.get("exif")
    if not isinstance(content, bytes):
        return 1
    exif = Image.Exif()
    try:
        exif.load(content)
        return int(exif.get(_ORIENTATION, 1))
    except Exception:  # whatever a damaged directory makes Pillow raise
        return 1


def _read(path: str) -> bytes:
    """The file; once more where that fails, as it may on a file server (EIO, ESTALE, ETIMEDOUT)."""
    try:
        return _read_once(path)
    except OSError:
        pass
    try:
        return _read_once(path)
    except OSError as error:
        # Whatever the listing could not open is not packed: this could be opened then.
        remedy = "if that stays so, name it in a data.quarantine and begin anew with --restart"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            remedy = (
                "it has gone since the source was listed: put it back, or mount its disk; if it is"
                " deleted for good, begin anew with --restart"
            )
        reason = f"cannot be read: {error.strerror}: {remedy}"
        raise MachineFault(f"{tar_file.shown(path)} {reason}") from None


def _read_once(path: str) -> bytes:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > tar_file.LARGEST // 2:  # room for a heading
            raise ValueError("too large for a tar: 4 GB or more")
        return file.read()


def _converted(original: bytes, form: Form, max_pixels: int) -> tuple[bytes, int, int]:
    with Image.open(io.BytesIO(original), formats=image_bytes.PILLOW_FORMATS) as opened:
        image_bytes.check_pixels(opened.height, opened.width, max_pixels)  # before any is decoded
        image = shrunk(upright_rgb(opened), form)
        if form.form == "raw":
            return image.tobytes(), image.height, image.width
        buffer = io.BytesIO()
        # optimize: Huffman tables for this image, the same pixels in 2-6 % fewer bytes
        image.save(buffer, "JPEG", quality=form.quality, subsampling=SUBSAMPLING, optimize=True)
        encoded = buffer.getvalue()
        # What would gain nothing from being encoded again stays bit for bit.
        same = opened.format == "JPEG" and opened.mode == "RGB" and image.size == opened.size
        if same and _orientation(opened) == 1 and "progressive" not in opened.info:
            encoded = min(original, encoded, key=len)
        return encoded, image.height, image.width
