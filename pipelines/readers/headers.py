"""What an image file's first and last bytes say: its dimensions, or why it cannot be decoded.

Formats: JPEG (ITU-T T.81 annex B), PNG (W3C PNG, section 5), WebP (RFC 9649), BMP, TIFF 6.0.
Nothing is decoded, so an image that is damaged inside still passes. What is refused here was seen
refused by the decoder of DALI 2.4, or is decoded to rubbish by it (a BMP that is cut off).
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

HEAD = 4096  # bytes read at once: holds the dimensions of most files, and is one page

# Tags of TIFF 6.0, section 8; Exif uses the same structure and the same orientation.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _ORIENTATION = 256, 257, 258, 259, 274
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 324, 325
_LZMA = 34925
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF's type of a field: struct's letter


def dimensions(path: bytes | str) -> tuple[int, int]:
    """Height and width in pixels, as the decoder will give them: turned upright where Exif says.

    One exception: the Exif that a PNG may keep behind its pixels is not looked for.

    Raises:
        ValueError: the file cannot be decoded; the message is the reason, to be put behind a name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    try:
        size = os.fstat(descriptor).st_size
        data = _Window(partial(os.pread, descriptor), os.pread(descriptor, HEAD, 0), 0, size)
        return _dimensions(data)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def dimensions_of(content: memoryview) -> tuple[int, int]:
    """As `dimensions`, of a file's bytes, such as mapped ones: few of them are looked at.

    Raises:
        ValueError: as there.
    """

    def pread(count: int, offset: int) -> bytes:
        return bytes(content[offset : offset + count])

    return _dimensions(_Window(pread, pread(HEAD, 0), 0, len(content)))


@dataclass(frozen=True)
class _Window:
    """A part of an open file, of `size` bytes from byte `start` on."""

    pread: Callable[[int, int], bytes]  # of the file: so many bytes from an offset on
    head: bytes  # the file's first bytes, read already
    start: int
    size: int

    def read(self, offset: int, count: int) -> bytes:
        if offset + count > self.size:
            raise _TruncatedError
        begin = self.start + offset
        if begin + count <= len(self.head):
            return self.head[begin : begin + count]
        return self.pread(count, begin)

    def unpack(self, form: str, offset: int) -> tuple[int, ...]:
        content = self.read(offset, struct.calcsize(form))
        try:
            return struct.unpack(form, content)
        except struct.error:  # the file has become shorter since it was opened
            raise _TruncatedError from None

    def part(self, offset: int, size: int) -> "_Window":
        return _Window(self.pread, self.head, self.start + offset, size)


class _TruncatedError(Exception):
    """The file ends before something that it announces."""


def _dimensions(data: _Window) -> tuple[int, int]:
    if data.size == 0:
        raise ValueError("empty file")
    known = [form for form in _FORMATS if data.head.startswith(form[0])]
    if not known:
        raise ValueError(_what_it_is(data.head))
    _, name, read = known[0]
    try:
        height, width = read(data)
    except _TruncatedError:
        raise ValueError(f"truncated {name}: it ends at byte {data.size:,}") from None
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise ValueError(f"{name} of {width} x {height} pixels")
    return height, width


def _jpeg(data: _Window) -> tuple[int, int]:
    position, frame, orientation = 2, None, 1
    while True:
        prefix, marker = data.unpack(">BB", position)
        if prefix != 0xFF:
            raise ValueError("damaged JPEG: there is no marker where one should be")
        if marker == 0xFF:  # markers may be padded with these
            position += 1
            continue
        if marker == 0xD9 or marker == 0x01 or 0xD0 <= marker <= 0xD8:
            raise ValueError("damaged JPEG: it has no pixels")
        (length,) = data.unpack(">H", position + 2)
        if length < 2:
            raise ValueError("damaged JPEG: a segment is shorter than its own length")
        if marker == 0xDA:  # start of scan
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, height, width = data.unpack(">BHH", position + 4)
            if marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
                raise ValueError("lossless or hierarchical JPEG, which the decoder does not read")
            if precision != 8:
                raise ValueError(f"JPEG of {precision} bits, of which the decoder reads only 8")
            frame = height, width
        elif marker == 0xE1 and data.read(position + 4, min(6, length - 2)) == b"Exif\0\0":
            orientation = _orientation(data.part(position + 10, length - 8))
        position += 2 + length
    if frame is None:
        raise ValueError("damaged JPEG: it has no frame header")
    # Cameras and editors append to a JPEG, so its end may lie before the file's. Inside the
    # coded pixels 0xFF is never followed by 0xD9, so the first such pair is the end.
    if data.read(data.size - 2, 2) != b"\xff\xd9":
        position += 2 + length
        if b"\xff\xd9" not in data.read(position, max(data.size - position, 0)):
            raise _TruncatedError
    return _upright(frame, orientation)


def _png(data: _Window) -> tuple[int, int]:
    length, kind, width, height = data.unpack(">I4sII", 8)
    if kind != b"IHDR" or length != 13:
        raise ValueError("damaged PNG: it does not begin with its header")
    position, orientation = 33, 1
    while True:
        length, kind = data.unpack(">I4s", position)
        if kind == b"IDAT":
            break
        if kind == b"IEND":
            raise ValueError("damaged PNG: it has no pixels")
        if kind == b"eXIf":
            orientation = _orientation(data.part(position + 8, length))
        position += 12 + length
    end = b"\0\0\0\0IEND\xaeB`\x82"
    if data.read(data.size - 12, 12) != end:  # as in a JPEG, something may follow the end
        while kind != b"IEND":
            position += 12 + length
            length, kind = data.unpack(">I4s", position)
        data.read(position, 12)
    return _upright((height, width), orientation)


def _webp(data: _Window) -> tuple[int, int]:
    riff, form = data.unpack("<I4s", 4)
    if form != b"WEBP":
        raise ValueError(_what_it_is(data.head))
    if 8 + riff > data.size:
        raise _TruncatedError
    kind, orientation = data.read(12, 4), 1
    if kind == b"VP8 ":  # lossy
        start, width, height = data.unpack("<3sHH", 23)
        if start != b"\x9d\x01\x2a":
            raise ValueError("damaged WebP: it does not begin with a whole image")
        width, height = width & 0x3FFF, height & 0x3FFF  # the upper two bits ask for scaling
    elif kind == b"VP8L":  # lossless
        (bits,) = data.unpack("<I", 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":  # extended: alpha, animation, Exif
        (flags,) = data.unpack("B", 20)
        width = 1 + int.from_bytes(data.read(24, 3), "little")
        height = 1 + int.from_bytes(data.read(27, 3), "little")
        if flags & 0x08:
            orientation = _webp_orientation(data)
    else:
        raise ValueError("damaged WebP: it has no pixels")
    return _upright((height, width), orientation)


def _webp_orientation(data: _Window) -> int:
    position = 12
    while position + 8 <= data.size:
        kind, length = data.unpack("<4sI", position)
        if kind == b"EXIF":
            return _orientation(data.part(position + 8, length))
        position += 8 + length + length % 2
    return 1


def _bmp(data: _Window) -> tuple[int, int]:
    pixels, header = data.unpack("<II", 10)
    if header == 12:
        width, height, _, bits = data.unpack("<HHHH", 18)
        compression = 0
    elif header in (40, 52, 56, 64, 108, 124):
        width, height, _, bits, compression = data.unpack("<iiHHI", 18)
        height = abs(height)  # negative: the upper row comes first
    else:
        raise ValueError(_what_it_is(data.head))
    if compression in (0, 3, 6) and width > 0 and height > 0:  # as it is, or with colour masks
        row = (width * bits + 31) // 32 * 4
        if pixels + row * (height - 1) + (width * bits + 7) // 8 > data.size:
            raise _TruncatedError
    return height, width


def _tiff(data: _Window) -> tuple[int, int]:
    order = "<" if data.head[:2] == b"II" else ">"
    field = _first_directory(data, order, big=data.head[2:4] in (b"+\0", b"\0+"))
    if _WIDTH not in field or _HEIGHT not in field:
        raise ValueError("damaged TIFF: it does not say its dimensions")
    if _BITS not in field:
        raise ValueError("TIFF without BitsPerSample, which the decoder does not read")
    if field.get(_COMPRESSION) == (_LZMA,):
        raise ValueError("TIFF with LZMA compression, which the decoder does not read")
    starts = field.get(_STRIP_OFFSETS) or field.get(_TILE_OFFSETS) or ()
    sizes = field.get(_STRIP_BYTES) or field.get(_TILE_BYTES) or (1,) * len(starts)
    if not starts:
        raise ValueError("damaged TIFF: it has no pixels")
    if any(start + size > data.size for start, size in zip(starts, sizes, strict=False)):
        raise _TruncatedError
    shape = field[_HEIGHT][0], field[_WIDTH][0]
    return _upright(shape, field.get(_ORIENTATION, (1,))[0])


def _orientation(exif: _Window) -> int:
    """Exif's orientation, 1 to 8; 1, upright, where it is missing or damaged."""
    try:
        if exif.read(0, 6) == b"Exif\0\0":  # some writers of WebP put JPEG's prefix there
            exif = exif.part(6, exif.size - 6)
        order = {b"II": "<", b"MM": ">"}.get(exif.read(0, 2))
        if order is None:
            return 1
        return _first_directory(exif, order, big=False).get(_ORIENTATION, (1,))[0]
    except _TruncatedError:
        return 1


def _first_directory(data: _Window, order: str, *, big: bool) -> dict[int, tuple[int, ...]]:
    """The whole-number fields of TIFF's first directory, by tag; `big`: with offsets of 64 bits."""
    if big:
        (position,) = data.unpack(order + "Q", 8)
        (entries,) = data.unpack(order + "Q", position)
        position, form, pointer = position + 8, order + "HHQ8s", order + "Q"
    else:
        (position,) = data.unpack(order + "I", 4)
        (entries,) = data.unpack(order + "H", position)
        position, form, pointer = position + 2, order + "HHI4s", order + "I"
    table = data.read(position, entries * struct.calcsize(form))
    fields: dict[int, tuple[int, ...]] = {}
    for tag, kind, count, inline in struct.iter_unpack(form, table):
        if tag not in _TAGS or kind not in _NUMBERS or count == 0:
            continue
        if count > data.size:
            raise _TruncatedError
        values = f"{order}{count}{_NUMBERS[kind]}"
        if struct.calcsize(values) <= len(inline):
            fields[tag] = struct.unpack_from(values, inline)
        else:
            fields[tag] = data.unpack(values, struct.unpack(pointer, inline)[0])
    return fields


def _upright(shape: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width, swapped where Exif says that the image lies on its side."""
    height, width = shape
    return (width, height) if 5 <= orientation <= 8 else shape


def _what_it_is(head: bytes) -> str:
    """A reason for refusing a file that begins with `head` and is no image that DALI reads."""
    if head[4:8] == b"ftyp":
        kinds = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC"}
        kind = kinds.get(head[8:12], "HEIC or video")
        return f"{kind} file, which is not read: convert it to PNG or JPEG"
    for magic, kind in _OTHER_IMAGES:
        if head.startswith(magic):
            return f"{kind} file, which is not read: convert it to PNG or JPEG"
    if (
        head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        or head[257:262] == b"ustar"
    ):
        return "archive, not an image: unpack it"
    if head.startswith(b"version https://git-lfs"):
        return "Git LFS pointer, not the image itself: run `git lfs pull`"
    if not head.strip(b"\0"):
        return "only zero bytes"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML page, not an image: a download that failed?"
    if text.isascii() and b"\0" not in text:
        return "text, not an image"
    return f"not an image: it begins with the bytes {head[:8].hex(' ')}"


_TAGS = frozenset(
    (
        *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _ORIENTATION),
        *(_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES),
    )
)
_FORMATS: tuple[tuple[bytes, str, Callable[[_Window], tuple[int, int]]], ...] = (
    (b"\xff\xd8", "JPEG", _jpeg),
    (b"\x89PNG\r\n\x1a\n", "PNG", _png),
    (b"RIFF", "WebP", _webp),
    (b"BM", "BMP", _bmp),
    (b"II*\0", "TIFF", _tiff),
    (b"MM\0*", "TIFF", _tiff),
    (b"II+\0", "TIFF", _tiff),
    (b"MM\0+", "TIFF", _tiff),
)
_OTHER_IMAGES = (
    (b"GIF8", "GIF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\x01\0", "ICO"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"<svg", "SVG"),
    *((b"P%d%c" % (kind, space), "PNM") for kind in range(1, 8) for space in b" \n\t\r"),
)
