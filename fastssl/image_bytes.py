"""An image file's bytes: which format they are, and their dimensions, without decoding."""

import importlib

MAX_PIXELS = 178_956_970  # as the folder reader's: twice Pillow's MAX_IMAGE_PIXELS
HEADERS = "pipelines.readers.headers"
# What Pillow may try: what DALI reads. Left alone it tries all it knows: EPS runs Ghostscript.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
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
    height, width = headers.dimensions_of(memoryview(content))
    check_pixels(height, width, max_pixels)
    return height, width


def check_size(size: int, most: int) -> None:
    """Refuses a file of more bytes than an image of so many pixels can need, before it is read.

    Raises:
        ValueError: the message is the reason, to be put behind a name.
    """
    # Uncompressed, with alpha and 16 bits, and room for what else an image file may carry.
    if size > 8 * most + 2**26:
        raise ValueError(f"{size:,} bytes, more than an image of data.max_pixels={most:,} can need")


def check_pixels(height: int, width: int, most: int) -> None:
    """Refuses what would take gigabytes to decode.

    Raises:
        ValueError: the message is the reason, to be put behind a name.
    """
    if height * width > most:
        raise ValueError(f"{width:,} x {height:,} pixels, over data.max_pixels={most:,}")
