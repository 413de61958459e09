"""FFCV's side of the comparison: run by FFCV's interpreter, asked for batches line by line.

    python -I ffcv_worker.py      started by benchmarks/plain/ffcv.py, which says what it is told

It needs ffcv, torch and numpy, and nothing of fastssl. -I keeps this folder out of sys.path, where
the `ffcv.py` beside this file would be imported in place of FFCV. The protocol, on stdin and
stdout, is one line each way:

    asked                         answered
    {"paths": [...], ...}         {"version": ..., "bytes": ...}: written, compiled, one batch made
    run                           the number of images of the batch
    sample FILE.npz               the same, after the batch was saved as numpy arrays
    the end of stdin              nothing: it ends
"""

# FFCV is not where types are checked, and asks for an attribute on functions.
# pyright: reportMissingImports=false, reportFunctionMemberAccess=false

import importlib.metadata
import io
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.fields.rgb_image import IMAGE_MODES, encode_jpeg
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.transforms import (
    RandomBrightness,
    RandomContrast,
    RandomHorizontalFlip,
    RandomSaturation,
    Squeeze,
    ToTensor,
)
from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter
from PIL import Image, ImageOps

QUALITY = 90  # of files that FFCV can't take as they are; its own default
ROWS = 1_000_000  # images before the loader is started anew, which empties its queue
ORIENTATION = 0x0112  # EXIF


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what FFCV prints is not taken for an answer

    def answer(content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    asked = json.loads(sys.stdin.readline())
    _write(asked["paths"], asked["form"], asked["file"], asked["threads"])
    batches = _batches(asked)
    next(batches)
    answer({"version": importlib.metadata.version("ffcv"), "bytes": os.path.getsize(asked["file"])})
    for line in sys.stdin:
        verb, _, path = line.rstrip("\n").partition(" ")
        image, index = next(batches)
        if verb == "sample":
            np.savez(path, image=image.numpy(), index=index.numpy())
        answer(len(index))


class StoredImageField(RGBImageField):
    """Stores images as `_Images` gives them: FFCV's own field would encode every JPEG again.

    What lies in the file is what RGBImageField reads.
    """

    def encode(self, destination, image, malloc):
        """FFCV's interface for fields."""
        form, height, width, content = image
        destination["mode"] = IMAGE_MODES[form]
        destination["height"], destination["width"] = height, width
        destination["data_ptr"], storage = malloc(content.nbytes)
        storage[:] = content


class QuarterTurns(Operation):
    """Square images [B, S, S, 3] to [B, 4, S, S, 3]: by 0, 90, 180 and 270 degrees, as np.rot90.

    FFCV has no such operator; this is one by its own interface for users' operators, compiled and
    run in parallel as FFCV's are.
    """

    def generate_code(self):
        """FFCV's interface for operators."""
        my_range = Compiler.get_iterator()

        def turn(images, turned):
            last = images.shape[1] - 1
            for i in my_range(images.shape[0]):
                for row in range(last + 1):
                    for column in range(last + 1):
                        for channel in range(3):
                            value = images[i, row, column, channel]
                            turned[i, 0, row, column, channel] = value
                            turned[i, 1, last - column, row, channel] = value
                            turned[i, 2, last - row, last - column, channel] = value
                            turned[i, 3, column, last - row, channel] = value
            return turned

        turn.is_parallel = True
        return turn

    def declare_state_and_memory(self, previous_state):
        """FFCV's interface for operators."""
        shape = (4, *previous_state.shape)
        state = replace(previous_state, jit_mode=True, shape=shape)
        return state, AllocationQuery(shape, previous_state.dtype)


class _Images:
    """The files as they are to be stored: (mode, height, width, uint8 [bytes]) and the row."""

    def __init__(self, paths: list[str], form: str) -> None:
        self.paths, self.form = paths, form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[tuple[str, int, int, np.ndarray], int]:
        try:
            return self._stored(self.paths[row]), int(row)
        except Exception:  # of any kind: FFCV's writer waits for ever for a process that failed
            traceback.print_exc()
            sys.stderr.flush()
            os.kill(os.getppid(), signal.SIGTERM)
            raise

    def _stored(self, path: str) -> tuple[str, int, int, np.ndarray]:
        with open(path, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as image:
            if self.form == "jpg" and _as_it_is(image):
                return "jpg", image.height, image.width, np.frombuffer(content, np.uint8)
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        height, width = pixels.shape[:2]
        stored = pixels.reshape(-1) if self.form == "raw" else encode_jpeg(pixels, QUALITY)
        return self.form, height, width, stored


def _as_it_is(image: Image.Image) -> bool:
    """Whether FFCV decodes the file's bytes to the pixels that others do: upright, in RGB."""
    upright = image.getexif().get(ORIENTATION, 1) == 1
    return image.format == "JPEG" and image.mode in ("RGB", "L") and upright


def _write(paths: list[str], form: str, file: str, threads: int) -> None:
    """The .beton file, by `threads` processes."""
    multiprocessing.set_start_method("fork", force=True)  # FFCV's writer pickles nothing
    largest = 0
    for path in paths:
        with Image.open(path) as image:
            pixels = 3 * image.width * image.height
            plain = form == "jpg" and _as_it_is(image)
            largest = max(largest, os.path.getsize(path) if plain else pixels)
    page = 4 * MIN_PAGE_SIZE  # FFCV's default, which an image must fit in
    while page < largest:
        page *= 2
    fields = {"image": StoredImageField(), "index": IntField()}
    writer = DatasetWriter(file, fields, page_size=page, num_workers=threads)
    writer.from_indexed_dataset(_Images(paths, form), chunksize=max(1, len(paths) // threads // 4))


def _batches(asked: dict) -> Iterator[tuple]:
    """Endless (image, index) tensors, shuffled; each epoch without its last short batch."""
    batch, images = asked["batch"], len(asked["paths"])
    decoder = RandomResizedCropRGBImageDecoder(
        (asked["size"], asked["size"]), scale=tuple(asked["area"]), ratio=tuple(asked["aspect"])
    )
    operators = [decoder]
    if asked["flip"] > 0:
        operators.append(RandomHorizontalFlip(asked["flip"]))
    for name, operator in (
        ("brightness", RandomBrightness),
        ("contrast", RandomContrast),
        ("saturation", RandomSaturation),
    ):
        if asked[name] > 0:
            operators.append(operator(asked[name], p=1.0))
    if asked["turns"]:
        operators.append(QuarterTurns())
    # Many epochs as one: FFCV's queue runs dry at the end of each, which short lists would pay for.
    random = np.random.default_rng(asked["seed"])
    per_epoch = max(1, images // batch) * batch
    epochs = [
        np.resize(random.permutation(images), per_epoch)  # repeats where images are fewer than a
        for _ in range(-(-ROWS // per_epoch))  # batch
    ]
    loader = Loader(
        asked["file"],
        batch_size=batch,
        num_workers=asked["threads"],
        os_cache=True,  # the file is mapped, and lies in the page cache
        order=OrderOption.SEQUENTIAL,
        indices=np.concatenate(epochs).astype(np.uint64),
        pipelines={
            "image": [*operators, ToTensor()],
            "index": [IntDecoder(), ToTensor(), Squeeze(1)],
        },
        custom_fields={"image": RGBImageField},
        batches_ahead=asked["ahead"],
    )
    while True:
        yield from loader


if __name__ == "__main__":
    main()
