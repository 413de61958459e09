"""benchmarks/plain/ffcv_worker.py without FFCV: the same protocol, the same task by Pillow."""

import json
import os
import sys

import numpy as np
from PIL import Image


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    if asked["batch"] == 13:
        print("some warning\nImportError: libopencv_core.so: no such file\n", file=sys.stderr)
        sys.exit(1)
    with open(asked["file"], "wb") as file:
        file.write(bytes(1000))
    random = np.random.default_rng(asked["seed"])
    print(json.dumps({"version": "1.0.2", "bytes": 1000}), flush=True)
    for line in sys.stdin:
        verb, _, path = line.rstrip("\n").partition(" ")
        if asked["batch"] == 17:
            os._exit(1)
        if verb == "sample":
            rows = random.permutation(len(asked["paths"]))[: asked["batch"]]
            images = [view(asked, asked["paths"][row], random) for row in rows]
            np.savez(path, image=np.stack(images), index=rows.astype(np.int64))
        print(asked["batch"], flush=True)


def view(asked: dict, path: str, random: np.random.Generator) -> np.ndarray:
    """A random resized crop, flipped by chance, and its turns."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    while True:
        area = random.uniform(*asked["area"]) * image.width * image.height
        aspect = np.exp(random.uniform(*np.log(asked["aspect"])))
        width, height = (round(float(np.sqrt(x))) for x in (area * aspect, area / aspect))
        if width <= image.width and height <= image.height:
            break
    left = random.integers(image.width - width + 1)
    top = random.integers(image.height - height + 1)
    box = (left, top, left + width, top + height)
    size = (asked["size"], asked["size"])
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))
    if random.random() < asked["flip"]:
        pixels = pixels[:, ::-1]
    if not asked["turns"]:
        return pixels
    return np.stack([np.rot90(pixels, turn) for turn in range(4)])


if __name__ == "__main__":
    main()
