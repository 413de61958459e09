"""The decode limit of this machine's CPU: libjpeg-turbo on all its threads, and nothing else.

Whole images from memory to RGB, with the exact transform and the smooth chroma that DALI's CPU
decoder has (the pixels are the same, bit by bit). Threads, since both packages release the GIL
while they decode. A mark to measure by, no law: another decoder may pass it by a few percent (DALI
at times does), a coarser transform too, and a GPU or who decodes only a part of each image by much.
"""

import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.method import Contender

REMEDY = "pip install simplejpeg (or PyTurboJPEG)"
CHUNK = 4  # images a thread is given at once: 1.6 ms each, handing them over takes 0.03 ms
QUEUE = 2  # batches handed to the threads ahead of the one that is waited for

Decode = Callable[[bytes], object]


@dataclass(frozen=True)
class Jpeg:
    """What a JPEG's frame header says."""

    progressive: bool
    subsampling: str  # of the colours, 4:2:0 and the like; "gray", or "other"


def decoder() -> tuple[str, Decode] | None:
    """An installed package that calls libjpeg-turbo, and its way to RGB; None without one."""
    if importlib.util.find_spec("simplejpeg") is not None:
        import simplejpeg  # noqa: PLC0415  # optional: only this row needs it

        # Not strict: bytes that are too many are no reason to refuse an image that DALI takes.
        return "simplejpeg", lambda content: simplejpeg.decode_jpeg(content, "RGB", strict=False)
    if importlib.util.find_spec("turbojpeg") is not None:
        import turbojpeg  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  # optional, too

        try:
            library = turbojpeg.TurboJPEG()
        except RuntimeError:  # the package without libturbojpeg
            return None
        return "PyTurboJPEG", lambda content: library.decode(content, turbojpeg.TJPF_RGB)
    return None


def decodable(contents: Sequence[bytes], decode: Decode, threads: int) -> list[bytes]:
    """The JPEGs among `contents` that `decode` takes, in their order; CMYK it does not."""

    def works(content: bytes) -> bool:
        if jpeg(content) is None:
            return False
        try:
            decode(content)
        except (ValueError, OSError):
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        return list(itertools.compress(contents, pool.map(works, contents)))


def contender(contents: Sequence[bytes], decode: Decode, *, batch: int, threads: int) -> Contender:
    """Decodes `contents` over and over.

    Args:
        contents: JPEGs that `decode` takes, at least one.
        decode: from `decoder`.
        batch: images of a run, at least; more where that many would leave threads idle.
        threads: that decode.
    """
    pool = ThreadPoolExecutor(threads)
    chunks = itertools.cycle(
        [contents[first : first + CHUNK] for first in range(0, len(contents), CHUNK)]
    )
    waited_for = max(-(-batch // CHUNK), threads)
    ahead: deque[Future[int]] = deque()

    def all_of(chunk: Sequence[bytes]) -> int:
        for content in chunk:
            decode(content)
        return len(chunk)

    def run() -> int:
        while len(ahead) < (QUEUE + 1) * waited_for:
            ahead.append(pool.submit(all_of, next(chunks)))
        return sum(ahead.popleft().result() for _ in range(waited_for))

    def close() -> None:
        pool.shutdown(cancel_futures=True)

    return Contender("decode_limit", run, close, queue=QUEUE)


def jpeg(content: bytes) -> Jpeg | None:
    """From the bytes of an image file; None if it is no JPEG (ITU-T T.81, annex B)."""
    if not content.startswith(b"\xff\xd8"):
        return None
    position = 2
    while position + 4 <= len(content):
        marker = content[position + 1]
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        if content[position] != 0xFF or marker == 0xDA:  # damaged, or pixels before a frame
            return None
        if marker == 0xFF:  # markers may be padded with these
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = content[position + 4 : position + 2 + length]
            return Jpeg(marker in (0xC2, 0xC6, 0xCA, 0xCE), _subsampling(frame))
        position += 2 + length
    return None


def _subsampling(frame: bytes) -> str:
    """From a frame header: precision, height, width, components, then 3 bytes for each of them."""
    count = frame[5]
    if count == 1:
        return "gray"
    factors = [divmod(factor, 16) for factor in frame[7 : 6 + 3 * count : 3]]
    names = {(1, 1): "4:4:4", (2, 1): "4:2:2", (2, 2): "4:2:0", (1, 2): "4:4:0", (4, 1): "4:1:1"}
    if count != 3 or factors[1] != factors[2]:
        return "other"
    (wide, high), (wide_color, high_color) = factors[:2]
    if wide % wide_color or high % high_color:
        return "other"
    return names.get((wide // wide_color, high // high_color), "other")
