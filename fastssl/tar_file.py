"""Tars as WebDataset and DALI read them: the blocks of a member, members listed, DALI's index.

What we write is plain USTAR (POSIX.1-1988): regular files, no owner, no time, so that the same
images give the same bytes. What others wrote is read by Python's tarfile, and refused where it
holds what could lead out of it.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512  # bytes: headers are one, contents are filled up to a multiple
END = bytes(2 * BLOCK)
LARGEST = 8**11 - 1  # bytes: eleven octal digits
_LONGEST = 1 << 20  # bytes of a name, or of all else that is told of a member before it
_TELLING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_TELLING += (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Member(NamedTuple):
    """A file in a tar."""

    name: str  # as in the tar
    offset: int  # of its first byte
    size: int  # bytes


def header(name: str, size: int) -> bytes:
    """The block before a member's content.

    Args:
        name: ASCII, at most 99 characters.
        size: bytes, at most `LARGEST`.
    """
    assert len(name) < 100
    assert size <= LARGEST
    head = b"%s0000644\0000000000\0000000000\0%011o\00000000000000\0" % (
        name.encode("ascii").ljust(100, b"\0"),
        size,
    )
    tail = b"0".ljust(101, b"\0") + b"ustar\00000"
    checksum = sum(head) + 8 * ord(" ") + sum(tail)
    return (head + b"%06o\0 " % checksum + tail).ljust(BLOCK, b"\0")


def padding(size: int) -> bytes:
    """What fills a content of `size` bytes up to whole blocks."""
    return bytes(-size % BLOCK)


def members(path: Path) -> Iterator[Member]:
    """The files in a tar, as they lie in it; folders are passed over.

    Raises:
        ValueError: it is damaged or no tar, or holds a link, a device or the like; the message is
            the reason, to be put behind a name.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    try:
        # "r:" takes no compressed tar, in which nothing has an offset
        with tarfile.open(path, "r:", tarinfo=_Info, errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # a kB each
                name = member.name
                if member.isdir():
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    kind = _KINDS.get(member.type, f"a member of type {member.type!r}")
                    raise _RefusedError(f"{shown(name)} in it is {kind}, which is not read")
                if member.size < 0 or member.offset_data + member.size > size:
                    raise _RefusedError(f"{shown(name)} in it ends behind the tar's end: cut off")
                yield Member(name, member.offset_data, member.size)
            # tarfile takes a damaged header for the end
            if not _is_end(path, tar.offset, size):
                raise _RefusedError(f"damaged at byte {tar.offset:,}: no header of a member")
    except (_RefusedError, OSError):
        raise
    except Exception as error:  # whatever a damaged header makes tarfile raise
        reason = shown(" ".join(str(error).split()))
        raise ValueError(f"no tar that can be read: {reason}") from None


def read(file: int, offset: int, size: int) -> bytes:
    """Bytes of an open file, however many: at a time the kernel gives 2 GiB at most.

    Raises:
        ValueError: the file ends before; the message is the reason, to be put behind a name.
    """
    content = os.pread(file, size, offset)
    if len(content) == size:
        return content
    pieces, left = [content], size - len(content)
    while left:
        piece = os.pread(file, left, offset + size - left)
        if not piece:
            raise ValueError(f"is cut off: {size - left:,} of its {size:,} bytes are there")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def plain(name: str) -> str:
    """A member's name without what means nothing: `./a//b.jpg` is `a/b.jpg`."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def split(name: str) -> tuple[str, str]:
    """A sample's key and what the member is of it: WebDataset cuts at the first dot of the file."""
    dot = name.find(".", name.rfind("/") + 1)
    return name[:dot], name[dot + 1 :]


def kind_of(block: bytes) -> str | None:
    """What a header is of that is no file's, in words; None: a file's, or no header."""
    if len(block) < BLOCK or block[257:262] != b"ustar":
        return None
    return _KINDS.get(block[156:157])


def index_text(listed: Iterable[Member]) -> bytes:
    """DALI's index of a tar (`wds2idx` writes the same): a line a sample."""
    samples: list[list[str]] = []
    last = None
    for name, offset, size in listed:
        key, extension = split(name)
        if not key or key.endswith("/"):  # hidden
            continue
        if key != last:
            samples.append([])
            last = key
        samples[-1].append(f"{extension} {offset} {size} {name}")
    text = "\n".join([f"v1.2 {len(samples)}", *map(" ".join, samples), ""])
    return text.encode(errors="surrogateescape")


def tars(count: int) -> str:
    """So many, in words."""
    return f"{count:,} tar" if count == 1 else f"{count:,} tars"


def shown(name: str) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


class _RefusedError(ValueError):
    """In our own words."""


class _Info(tarfile.TarInfo):  # tarfile's own way to be told how headers are to be read
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:  # older tarfile goes round in circles (CVE-2025-8194)
            raise tarfile.HeaderError("negative size")
        if info.type in _TELLING and info.size > _LONGEST:  # read into memory at once
            raise tarfile.HeaderError(f"a name or header of {info.size:,} bytes")
        return info


def _is_end(path: Path, offset: int, size: int) -> bool:
    """Whether nothing but zeros is behind the last member: a block, or the file's end."""
    with path.open("rb") as file:
        file.seek(offset)
        return offset >= size or not file.read(BLOCK).strip(b"\0")
