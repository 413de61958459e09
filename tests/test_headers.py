"""The header scan: what passes is decoded, with the dimensions it says; the rest has a reason."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from pipelines.readers import headers

HEIGHT, WIDTH = 45, 67


def image(mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    return smooth.convert(mode)


def encoded(form: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    image(mode).save(file, form, **options)  # pyright: ignore[reportArgumentType]  as listed below
    return file.getvalue()


def exif(orientation: int, order: str = "<", padding: int = 0) -> bytes:
    """An Exif block with nothing but an orientation, `padding` bytes behind its beginning."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    entry = struct.pack(order + "HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)
    return mark + struct.pack(order + "I", 8 + padding) + bytes(padding) + entry


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def big_endian_tiff() -> bytes:
    pixels = image().tobytes()
    fields = [
        *((256, 3, WIDTH), (257, 3, HEIGHT), (258, 3, 8), (259, 3, 1), (262, 3, 2)),
        *((273, 4, 8), (277, 3, 3), (278, 3, HEIGHT), (279, 4, len(pixels))),
    ]
    directory = struct.pack(">H", len(fields))
    for tag, kind, value in fields:
        directory += struct.pack(">HHI", tag, kind, 1)
        directory += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
    return struct.pack(">2sHI", b"MM", 42, 8 + len(pixels)) + pixels + directory + bytes(4)


JPEG, PNG, WEBP, BMP, TIFF = (encoded(form) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"))
SCAN = JPEG.index(b"\xff\xda")  # where the coded pixels begin
FRAME = JPEG.index(b"\xff\xc0")
LYING = segment(0xE1, b"Exif\0\0" + exif(6))

GOOD = {
    "jpeg": JPEG,
    "jpeg, progressive": encoded("JPEG", progressive=True),
    "jpeg, gray": encoded("JPEG", "L"),
    "jpeg, cmyk": encoded("JPEG", "CMYK"),
    "jpeg, restart markers": encoded("JPEG", restart_marker_blocks=1),
    **{f"jpeg, exif {k}": encoded("JPEG", exif=b"Exif\0\0" + exif(k)) for k in range(10)},
    "jpeg, exif big-endian": with_segments(segment(0xE1, b"Exif\0\0" + exif(6, ">"))),
    "jpeg, exif far inside": with_segments(segment(0xE1, b"Exif\0\0" + exif(6, padding=9000))),
    "jpeg, exif cut off": with_segments(segment(0xE1, b"Exif\0\0" + exif(6)[:12])),
    "jpeg, the last exif counts": with_segments(LYING, segment(0xE1, b"Exif\0\0" + exif(1))),
    "jpeg, long profile first": with_segments(*[segment(0xE2, bytes(65533))] * 5, LYING),
    "jpeg, thumbnail in a segment": with_segments(segment(0xE1, JPEG)),
    "jpeg, padded markers": JPEG[:2] + b"\xff\xff" + JPEG[2:],
    "jpeg, zeros behind": JPEG + bytes(5000),
    "jpeg, junk behind": JPEG + b"appended by some editor",
    "jpeg, a second one behind": JPEG + JPEG + b"\0",
    **{
        f"png, {mode}": encoded("PNG", mode)
        for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")
    },
    "png, exif": encoded("PNG", exif=exif(6)),
    "png, animated": encoded("PNG", save_all=True, append_images=[image("L").convert("RGB")]),
    "png, junk behind": PNG + b"junk",
    "webp, lossy": WEBP,
    "webp, lossless": encoded("WEBP", lossless=True),
    "webp, alpha": encoded("WEBP", "RGBA"),
    "webp, lossless alpha": encoded("WEBP", "RGBA", lossless=True),
    "webp, exif": encoded("WEBP", exif=exif(6)),
    "webp, exif with the prefix of JPEG": encoded("WEBP", exif=b"Exif\0\0" + exif(8)),
    "webp, animated": encoded("WEBP", save_all=True, append_images=[image("L").convert("RGB")]),
    "webp, junk behind": WEBP + b"junk",
    **{f"bmp, {mode}": encoded("BMP", mode) for mode in ("RGB", "RGBA", "P", "L", "1")},
    "bmp, upper row first": BMP[:22] + struct.pack("<i", -HEIGHT) + BMP[26:],
    "bmp, old header": b"BM"
    + struct.pack("<IHHI", 26 + 96, 0, 0, 26)
    + struct.pack("<IHHHH", 12, 8, 4, 1, 24)
    + bytes(range(96)),
    **{
        f"tiff, {mode}": encoded("TIFF", mode) for mode in ("RGB", "RGBA", "P", "L", "CMYK", "I;16")
    },
    **{
        f"tiff, {compression}": encoded("TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
    },
    "tiff, two pages": encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (5, 9))]),
    "tiff, big-endian": big_endian_tiff(),
    "tiff, big": encoded("TIFF", big_tiff=True),
    "tiff, exif": encoded("TIFF", tiffinfo={274: 6}),
}

BAD = {
    "empty": (b"", "empty file"),
    "zeros": (bytes(9000), "only zero bytes"),
    "html": (b"\n<!DOCTYPE html><html>404", "HTML page, not an image: a download that failed?"),
    "text": (b"Photos of 2019", "text, not an image"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "Git LFS pointer, not the image itself",
    ),
    "noise": (b"\x01\x02\x03\xff\xfe", "not an image: it begins with the bytes 01 02 03 ff fe"),
    "wave": (b"RIFF\x24\0\0\0WAVEfmt ", "not an image: it begins with the bytes 52 49 46 46"),
    "BM as text": (b"BMW is the name of a make", "text, not an image"),
    "zip": (b"PK\x03\x04", "archive, not an image: unpack it"),
    "tar": (bytes(257) + b"ustar", "archive, not an image: unpack it"),
    "gif": (encoded("GIF"), "GIF file, which is not read: convert it to PNG or JPEG"),
    "avif": (b"\0\0\0\x20ftypavif", "AVIF file, which is not read: convert it"),
    "heic": (b"\0\0\0\x20ftypmif1", "HEIC or video file, which is not read: convert it"),
    "jpeg 2000": (encoded("JPEG2000"), "JPEG 2000 file, which is not read: convert it"),
    "pnm": (encoded("PPM"), "PNM file, which is not read: convert it"),
    "jpeg without pixels": (JPEG[:SCAN] + b"\xff\xd9", "damaged JPEG: it has no pixels"),
    "jpeg without frame": (JPEG[:FRAME] + JPEG[SCAN:], "damaged JPEG: it has no frame header"),
    "jpeg with holes": (JPEG[:20] + b"?" + JPEG[20:], "there is no marker where one should be"),
    "jpeg with a short segment": (with_segments(b"\xff\xe1\0\1"), "a segment is shorter than"),
    "jpeg without height": (
        JPEG[: FRAME + 5] + bytes(2) + JPEG[FRAME + 7 :],
        f"JPEG of {WIDTH} x 0 pixels",
    ),
    "jpeg, lossless": (JPEG[:FRAME] + b"\xff\xc3" + JPEG[FRAME + 2 :], "lossless or hierarchical"),
    "jpeg, 12 bits": (JPEG[: FRAME + 4] + b"\x0c" + JPEG[FRAME + 5 :], "JPEG of 12 bits"),
    "jpeg without its end": (JPEG[:-2], "truncated JPEG: it ends at byte"),
    "png without pixels": (PNG[:33] + PNG[-12:], "damaged PNG: it has no pixels"),
    "png without header": (PNG[:8] + PNG[33:], "damaged PNG: it does not begin with its header"),
    "webp without pixels": (
        b"RIFF\x10\0\0\0WEBPEXIF\x04\0\0\0\0\0\0\0",
        "damaged WebP: it has no pixels",
    ),
    "webp, no key frame": (
        WEBP.replace(b"\x9d\x01\x2a", b"\0\0\0", 1),
        "damaged WebP: it does not begin with a whole image",
    ),
    "tiff, lzma": (encoded("TIFF", compression="lzma"), "TIFF with LZMA compression"),
    "tiff, 1 bit": (encoded("TIFF", "1"), "TIFF without BitsPerSample"),
    "tiff without width": (TIFF.replace(b"\0\x01\x04\0", b"\0\x02\x04\0", 1), "its dimensions"),
    "tiff without strips": (TIFF.replace(b"\x11\x01\x04\0", b"\x12\x02\x04\0", 1), "no pixels"),
}


@pytest.fixture(scope="module")
def decoded() -> dict[str, tuple[int, ...]]:
    """The shapes that DALI makes of the good ones."""
    pipeline = Pipeline(batch_size=len(GOOD), num_threads=1, device_id=None)  # pyright: ignore[reportArgumentType]  None: no GPU
    files = [np.frombuffer(content, np.uint8) for content in GOOD.values()]
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(lambda: files)))
    (images,) = pipeline.run()
    return {name: np.array(images.at(k)).shape for k, name in enumerate(GOOD)}


@pytest.mark.parametrize("name", GOOD)
def test_what_passes_is_decoded_with_the_same_dimensions(
    name: str, decoded: dict[str, tuple[int, ...]], tmp_path: Path
):
    path = tmp_path / "image"
    path.write_bytes(GOOD[name])

    assert (*headers.dimensions(str(path)), 3) == decoded[name]


def test_an_image_on_its_side_is_measured_upright(tmp_path: Path):
    path = tmp_path / "image"
    path.write_bytes(GOOD["jpeg, exif 6"])

    assert headers.dimensions(str(path)) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_has_a_reason(name: str, tmp_path: Path):
    content, reason = BAD[name]
    path = tmp_path / "image"
    path.write_bytes(content)

    with pytest.raises(ValueError, match="^.*" + reason.replace("?", r"\?")):
        headers.dimensions(str(path))


@pytest.mark.parametrize(
    "content",
    [JPEG, PNG, WEBP, GOOD["webp, lossless"], BMP, TIFF, GOOD["tiff, tiff_lzw"]],
    ids=["jpeg", "png", "webp", "webp, lossless", "bmp", "tiff", "tiff, lzw"],
)
def test_no_image_that_is_cut_off_passes_wherever_the_cut(content: bytes, tmp_path: Path):
    path = tmp_path / "image"
    padding = 4  # a BMP may lack the padding of its last row
    for length in [
        *range(0, 300, 3),
        *range(300, len(content) - padding, 97),
        len(content) - padding,
    ]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"."):
            headers.dimensions(str(path))


@pytest.mark.parametrize("name", GOOD)
def test_damage_gives_a_reason_or_passes_but_is_never_another_error(name: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    path = tmp_path / "image"
    outcomes = set()
    for _ in range(100):
        content = np.frombuffer(GOOD[name], np.uint8).copy()
        where = rng.integers(0, min(len(content), 600), 4)
        content[where] = rng.integers(0, 256, 4)
        path.write_bytes(content)
        try:
            headers.dimensions(str(path))
            outcomes.add("passed")
        except ValueError as error:
            outcomes.add(str(error))

    assert len(outcomes) > 1


def test_damage_that_no_header_shows_is_left_to_the_decoder(tmp_path: Path):
    path = tmp_path / "image"
    path.write_bytes(JPEG.replace(b"\xff\xdb", b"\xff\xfe"))  # quantisation tables into comments

    assert headers.dimensions(str(path)) == (HEIGHT, WIDTH)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^cannot be read: No such file or directory$"):
        headers.dimensions(str(tmp_path / "gone.jpg"))
    with pytest.raises(ValueError, match=r"^cannot be read: Is a directory$"):
        headers.dimensions(str(tmp_path))
