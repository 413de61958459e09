"""Pictures inside a report: what evaluations drew, and a batch of the recipe; all of bounded size.

A picture becomes a data URI. One that takes more than LARGEST is written anew as a smaller JPEG.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from fastssl import config, page, pictures, preview
from fastssl.reporting.run import Run

LARGEST = 600_000  # bytes of one picture
MOST = 24  # pictures of one run
SIDE = 1600  # pixels, of a picture that is written anew
IMAGES = 4  # rows of a preview


@dataclass(frozen=True)
class Picture:
    """An image to be shown."""

    title: str
    caption: str
    uri: str  # data:image/...
    width: int  # pixels
    height: int


def drawn(run: Run) -> tuple[list[Picture], list[str]]:
    """The PNGs in the run folder's evaluations/, and what could not be shown."""
    found, notes = [], []
    paths = sorted((run.folder / "evaluations").rglob("*.png"))
    for path in paths[:MOST]:
        name = str(path.relative_to(run.folder))
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                image.load()
                texts = {str(k): str(v) for k, v in image.info.items() if isinstance(v, str)}
                uri = _uri(image, data)
                found.append(
                    Picture(
                        texts.get("Title") or path.stem.replace("_", " "),
                        texts.get("Description") or name,
                        uri,
                        image.width,
                        image.height,
                    )
                )
        # Pillow's for a damaged PNG: OSError, SyntaxError; ValueError for a chunk, and a bomb.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            notes.append(f"{name} can't be shown: {error}")
    if len(paths) > MOST:
        rest = ", ".join(str(path.relative_to(run.folder)) for path in paths[MOST : MOST + 10])
        notes.append(f"{len(paths) - MOST} more pictures are in the folder: {rest} ...")
    return found, notes


def batch(run: Run, say: Callable[[str], None]) -> Picture:
    """One batch of the run's recipe, as `python -m fastssl.preview` draws it.

    Raises:
        ValueError: it can't be made: the images are gone, or a part of the recipe; says why.
    """
    path = run.folder / "recipe.yaml"
    if not path.exists():
        raise ValueError("the run folder has no recipe.yaml")
    recipe = config.load(path)
    # On one thread: a report must not slow a run that is at work here.
    recipe = replace(recipe, loader=replace(recipe.loader, threads=1))
    shown = page.page(
        run.name, preview.gather(recipe, images=IMAGES, seed=recipe.train.seed, say=say)
    )
    image = pictures.draw(shown)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    columns = "; ".join(
        f"{each.name} ({each.note})" if each.note else each.name for each in shown.columns
    )
    title = f"a batch of its recipe, a row for each image; columns: {columns}"
    return Picture(title, " ".join(shown.lines), _uri(image, file.getvalue()), *image.size)


def _uri(image: Image.Image, png: bytes) -> str:
    """The PNG as it is, or a JPEG in its place."""
    kind, data = "png", png
    quality, side = 88, SIDE
    while len(data) > LARGEST:
        smaller = Image.new("RGB", image.size, "white")
        opaque = image.convert("RGBA")
        smaller.paste(opaque, mask=opaque.getchannel("A"))
        smaller.thumbnail((side, side))
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=quality, optimize=True)
        kind, data = "jpeg", file.getvalue()
        quality, side = 80, side * 3 // 4
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
