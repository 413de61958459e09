"""What one image file is: format, colours, damage, digests. Run by the worker processes of `check`.

JPEGs are decoded by libjpeg-turbo in its strict mode (simplejpeg): DALI, like Pillow, fills what is
missing inside a JPEG with gray and says nothing. What that cannot judge, and all other formats, are
decoded twice, by Pillow and by DALI: of 1,600 damaged files a PNG and a TIFF were refused by DALI
alone, and 277 by all but DALI.
"""

import contextlib
import errno
import functools
import hashlib
import importlib
import importlib.util
import io
import os
import stat
import sys
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastssl import image_bytes

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
        ("judged", "u1"),  # of a bad one: the state that it would have if it were good
        ("unused", "u1", 2),
        ("check", "<u8"),  # of all before: `fastssl.check_progress`
    ]
)
_ENDS = 4096  # bytes at either end
_ORIENTATION = 0x0112  # Exif's tag
# Why a file cannot be opened that are its own faults; all others, such as EIO and ESTALE, are a
# disk's or a network's, and may have passed the next time.
_OWN_FAULTS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP),
    *(errno.ENXIO, errno.ENODEV),  # a socket, or a device that is none
)
CANNOT_BE_READ = "cannot be read: {}"  # also what the folder reader says
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
    decode: bool  # also done without where a file was found bad so, and has not changed
    digest: bool  # of the whole content; done anyway where it is decoded
    most_pixels: int


@dataclass(frozen=True)
class Looked:
    """What a worker found."""

    records: np.ndarray  # RECORD [n]
    bad: dict[int, str]  # places in the piece, with the reason
    unread: dict[int, str]  # neither good nor bad: the disk, or the memory, was at fault


def look_at_all(piece: Piece) -> Looked:
    """In a worker process, whose standard error it closes: libraries of C complain there."""
    _hush()
    return look(piece)


def look(piece: Piece) -> Looked:
    """Looks at files; none of them raises anything."""
    Image.MAX_IMAGE_PIXELS = None  # told in our own words: piece.most_pixels
    records = np.zeros(len(piece.names), RECORD)
    bad: dict[int, str] = {}
    unread: dict[int, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on metadata that nobody needs
        for place, name in enumerate(piece.names):
            record, known = records[place : place + 1], piece.known[place]
            path = os.path.join(piece.folder, name)
            try:
                try:
                    _look(path, piece, known, record)
                except OSError:
                    _look(path, piece, known, record)  # what was in the way may have passed
            except ValueError as error:
                bad[place] = " ".join(str(error).split())
            except (OSError, MemoryError) as error:
                record[:] = 0
                reason = CANNOT_BE_READ.format(_words(error))
                if known["state"] == BAD:
                    bad[place] = f"found bad before; now it {reason}"
                else:
                    unread[place] = reason
            record["key"] = key_of(piece.prefix + name)
            if place in bad:
                record["state"] = BAD
    return Looked(records, bad, unread)


def ended_its_worker(piece: Piece) -> Looked:
    """What is kept of a piece's only file, whose worker died of it."""
    record = np.zeros(1, RECORD)
    record["key"], record["state"] = key_of(piece.prefix + piece.names[0]), BAD
    record["judged"] = max(_wanted(decode=piece.decode), int(piece.known["judged"][0]))
    with contextlib.suppress(OSError):
        status = os.stat(os.path.join(piece.folder, piece.names[0]))
        record["size"], record["modified"] = status.st_size, status.st_mtime_ns
    return Looked(record, {0: "ended the process that decoded it: a crash, or memory"}, {})


def is_passing(reason: str) -> bool:
    """Whether the reader's reason is a fault of the disk or the network, and none of the file's."""
    lasting = {CANNOT_BE_READ.format(os.strerror(each)) for each in _OWN_FAULTS}
    return reason.startswith(CANNOT_BE_READ.format("")) and reason not in lasting


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
        OSError: it cannot be read now, which says nothing of the file.
    """
    try:
        # Not blocking: a pipe that has taken the file's place would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _OWN_FAULTS:
            raise
        raise ValueError(CANNOT_BE_READ.format(error.strerror)) from None
    try:
        _look_at(descriptor, piece, known, record)
    finally:
        os.close(descriptor)


def _look_at(descriptor: int, piece: Piece, known: np.void, record: np.ndarray) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        record["size"], record["modified"] = status.st_size, status.st_mtime_ns
        same = known["size"] == status.st_size and known["modified"] == status.st_mtime_ns
        digested = not piece.digest or bool(known["digest"].any())
        if same and digested and _wanted(decode=piece.decode) <= known["state"] <= STRICTLY:
            record["state"] = SAME
            return
        # What was found bad by a stricter look is looked at so again, for the same reason.
        judged = int(known["judged"]) if same and known["state"] == BAD else UNSEEN
        piece = replace(piece, decode=piece.decode or judged > SEEN)
        record["judged"] = max(_wanted(decode=piece.decode), judged)
        image_bytes.check_size(status.st_size, piece.most_pixels)
        try:
            _judge(file, status.st_size, piece, record)
        except OSError as error:
            if error.errno is None:  # Pillow's own
                raise ValueError(f"cannot be decoded: {error}") from None
            raise
        if record["state"] < judged:
            record["judged"] = judged
            raise ValueError("damaged inside, as simplejpeg found, which is not installed now")


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
        with Image.open(source, formats=image_bytes.PILLOW_FORMATS) as image:
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
    except (ValueError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # whatever a damaged file makes a decoder raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot be decoded: {reason}") from None
    record["state"], record["judged"] = _wanted(decode=piece.decode), 0


def _words(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    return error.strerror or str(error)


def _wanted(*, decode: bool) -> int:
    if not decode:
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
