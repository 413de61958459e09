"""What one image file is: format, colours, damage, digests. Run by the worker processes of `check`.

JPEGs are decoded by libjpeg-turbo in its strict mode (simplejpeg): DALI, like Pillow, fills what is
missing inside a JPEG with gray and says nothing. What that cannot judge, and all other formats, are
decoded twice, by Pillow and by DALI: of 1,600 damaged files a PNG and a TIFF were refused by DALI
alone, and 277 by all but DALI.
"""

import functools
import hashlib
import importlib
import importlib.util
import io
import os
import stat
import sys
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("unknown", "JPEG", "PNG", "WEBP", "BMP", "TIFF")
MODES = (
    *("unknown", "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
    *("I", "F", "I;16", "I;16B", "I;16L"),
)
# States. DECODED: by Pillow alone; STRICTLY: as strictly as can be; SAME: not looked at, because it
# is as it was when it was last looked at.
UNSEEN, SEEN, DECODED, STRICTLY, BAD, SAME = range(6)
RECORD = np.dtype(
    [
        ("key", "<u8"),  # of the name: `key_of`
        ("size", "<i8"),  # bytes
        ("modified", "<i8"),  # ns
        ("ends", "<u8"),  # digest of the size, and of the first and the last 4 KiB
        ("digest", "<u8", 2),  # of all bytes; 0, 0: not yet
        ("state", "u1"),
        ("format", "u1"),  # place in FORMATS
        ("mode", "u1"),  # place in MODES
        ("orientation", "u1"),  # Exif's, 1 to 8
        ("progressive", "u1"),  # a JPEG in several scans
        ("unused", "u1", 3),
        ("check", "<u8"),  # of all before: `fastssl.check_progress`
    ]
)
_ENDS = 4096  # bytes at either end
_ORIENTATION = 0x0112  # Exif's tag
_READ = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # the formats that Pillow may try: what DALI reads
# How libjpeg's warnings begin that mean lost pixels. Others, such as an odd version number in a
# header, harm nothing.
_DAMAGE = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression")


@dataclass(frozen=True)
class Piece:
    """Some files of a folder, for a worker."""

    folder: bytes
    prefix: bytes  # of the folder, before the names that are kept: another for each folder
    names: tuple[bytes, ...]  # relative to the folder
    known: np.ndarray  # RECORD [n]: what they were when last looked at; state UNSEEN: not yet
    decode: bool
    digest: bool  # of the whole content; done anyway where it is decoded
    most_pixels: int


@dataclass(frozen=True)
class Looked:
    """What a worker found."""

    records: np.ndarray  # RECORD [n]
    bad: dict[int, str]  # places in the piece, with the reason


def look_at_all(piece: Piece) -> Looked:
    """In a worker process, whose standard error it closes: libraries of C complain there."""
    _hush()
    return look(piece)


def look(piece: Piece) -> Looked:
    """Looks at files; none of them raises anything."""
    Image.MAX_IMAGE_PIXELS = None  # told in our own words: piece.most_pixels
    records = np.zeros(len(piece.names), RECORD)
    bad: dict[int, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on metadata that nobody needs
        for place, name in enumerate(piece.names):
            record = records[place : place + 1]
            record["key"] = key_of(piece.prefix + name)
            try:
                _look(os.path.join(piece.folder, name), piece, piece.known[place], record)
            except ValueError as error:
                record["state"] = BAD
                bad[place] = " ".join(str(error).split())
    return Looked(records, bad)


def key_of(name: bytes) -> int:
    """What a name is kept under: 64 bits, so that 13 million names share one in 200,000 cases."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=1)
def is_strict() -> bool:
    """Whether damage inside JPEGs is found that Pillow passes over: simplejpeg is installed."""
    return importlib.util.find_spec("simplejpeg") is not None


def _look(path: bytes, piece: Piece, known: np.void, record: np.ndarray) -> None:
    """Fills the record, of one file.

    Raises:
        ValueError: the file is bad; the message is the reason.
    """
    try:
        # Not blocking: a pipe that has taken the file's place would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        record["size"], record["modified"] = status.st_size, status.st_mtime_ns
        same = known["size"] == status.st_size and known["modified"] == status.st_mtime_ns
        digested = not piece.digest or bool(known["digest"].any())
        if same and digested and _wanted(piece) <= known["state"] <= STRICTLY:
            record["state"] = SAME
            return
        # Uncompressed, with alpha and 16 bits, and room for what else an image file may carry.
        if status.st_size > 8 * piece.most_pixels + 2**26:
            raise ValueError(
                f"{status.st_size:,} bytes, more than an image of data.max_pixels="
                f"{piece.most_pixels:,} can need"
            )
        try:
            _judge(file, status.st_size, piece, record)
        except OSError as error:
            if error.errno is None:  # Pillow's own
                raise ValueError(f"cannot be decoded: {error}") from None
            raise ValueError(f"cannot be read: {error.strerror}") from None


def _judge(file: io.BufferedReader, size: int, piece: Piece, record: np.ndarray) -> None:
    content = file.read() if piece.decode or piece.digest else b""
    if content:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        record["digest"] = np.frombuffer(digest, "<u8")
    first, last = content[:_ENDS], content[max(len(content) - _ENDS, 0) :]
    if not content:
        first = os.pread(file.fileno(), _ENDS, 0)
        last = os.pread(file.fileno(), _ENDS, max(size - _ENDS, 0))
    record["ends"] = key_of(size.to_bytes(8, "little") + first + last)
    source = io.BytesIO(content) if content else file
    try:
        with Image.open(source, formats=_READ) as image:
            record["format"] = _place(FORMATS, "JPEG" if image.format == "MPO" else image.format)
            record["mode"] = _place(MODES, image.mode)
            record["orientation"] = _orientation(image)
            record["progressive"] = image.format in ("JPEG", "MPO") and "progressive" in image.info
            pixels = image.width * image.height
            if pixels > piece.most_pixels:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels, over data.max_pixels")
            if piece.decode and not (image.format in ("JPEG", "MPO") and _is_whole_jpeg(content)):
                image.load()
                importlib.import_module("fastssl.check_dali").decode(content)  # heavy, seldom used
    except UnidentifiedImageError:  # whose own words hold an address in memory
        raise ValueError("not an image that Pillow can read") from None
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a damaged file makes a decoder raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot be decoded: {reason}") from None
    record["state"] = _wanted(piece)


def _wanted(piece: Piece) -> int:
    if not piece.decode:
        return SEEN
    return STRICTLY if is_strict() else DECODED


def _is_whole_jpeg(content: bytes) -> bool:
    """Whether libjpeg-turbo decodes all of it; False: it can't say, as of CMYK.

    At an eighth of the size and without colours: every coded bit is read all the same.

    Raises:
        ValueError: it is damaged.
    """
    if not is_strict():
        return False
    decode = importlib.import_module("simplejpeg").decode_jpeg
    try:
        decode(content, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        if str(error).startswith(_DAMAGE):
            raise ValueError(f"damaged inside: {error}") from None
        return False
    return True


def _orientation(image: Image.Image) -> int:
    """Exif's, 1 to 8; 1, upright, where it is missing or damaged, as DALI takes it."""
    content = image.info.get("exif")
    try:
        exif = Image.Exif()
        if isinstance(content, bytes):
            exif.load(content)
        elif image.format == "TIFF":
            exif = image.getexif()
        turned = int(exif.get(_ORIENTATION, 1))
    except Exception:  # whatever a damaged directory makes Pillow raise
        return 1
    return turned if 1 <= turned <= 8 else 1


def _place(known: tuple[str, ...], name: str | None) -> int:
    return known.index(name) if name in known else 0


@functools.lru_cache(maxsize=1)
def _hush() -> None:
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
