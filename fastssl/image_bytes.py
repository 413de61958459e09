"""An image file's bytes: which format they are, and their dimensions, without decoding."""

import importlib
import os

MAX_PIXELS = 178_956_970  # as the folder reader's: twice Pillow's MAX_IMAGE_PIXELS
HEADERS = "pipelines.readers.headers"
_FORMATS = (
    *((b"\xff\xd8", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp"), (b"BM", "bmp")),
    *((magic, "tif") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)


def extension(content: bytes) -> str | None:
    """jpg, png, webp, bmp or tif, as the content begins; None: none of these."""
    return next((name for magic, name in _FORMATS if content.startswith(magic)), None)


def dimensions(content: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width in pixels, turned upright, by the same rules as the folder reader's.

    Raises:
        ValueError: it cannot be decoded, or has too many pixels; the message is the reason, to be
            put behind a name.
    """
    headers = importlib.import_module(HEADERS)  # pipelines/ is beside us, not beneath
    # Its rules are for files: this is one in memory: 0.1 ms for one of 100 kB.
    file = os.memfd_create("image")
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file, rest) :]
        height, width = headers.dimensions(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    check_pixels(height, width, max_pixels)
    return height, width


def check_pixels(height: int, width: int, most: int) -> None:
    """Refuses what would take gigabytes to decode.

    Raises:
        ValueError: the message is the reason, to be put behind a name.
    """
    if height * width > most:
        raise ValueError(f"{width:,} x {height:,} pixels, over data.max_pixels={most:,}")
