"""A folder laid out as PASCAL VOC's, with two kinds of drawn objects, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Four steps of a network of 0.3 million weights on images of 64 pixels.
SMALL = [
    *("random:resnet10", "backbone.width=16", "detect.protocol=voc07", "detect.steps=4"),
    *("detect.batch=4", "detect.short_side=[48,64]", "detect.test_short_side=64"),
    *(
        "detect.anchors=[16,32]",
        "detect.regions=8",
        "detect.proposals=50",
        "detect.log_steps=1",
        "detect.lr=0.01",
    ),
]

COLORS = {"ball": (60, 90, 250), "crate": (240, 60, 40)}
OBJECT = """
  <object>
    <name>{name}</name>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
  </object>"""


def make(root: Path, year: str, splits: dict[str, int], *, seed: int = 0, side: int = 100) -> None:
    """Writes VOC<year> into `root`: so many images a split, one to three objects in each.

    The second image of a split has an object that is marked difficult. Names go on through all
    splits. Objects do not overlap; a class's file in ImageSets says which images show it.
    """
    generator = np.random.default_rng(seed)
    folder = root / f"VOC{year}"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    stem = 0
    for split, count in splits.items():
        shown: dict[str, list[str]] = {name: [] for name in COLORS}
        stems = []
        for number in range(count):
            stem += 1
            stems.append(f"{stem:06d}")
            names = _image(folder, stems[-1], generator, side, difficult=number == 1)
            for name in COLORS:
                shown[name].append(f"{stems[-1]} {1 if name in names else -1}")
        main = folder / "ImageSets" / "Main"
        (main / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for name, lines in shown.items():
            (main / f"{name}_{split}.txt").write_text("\n".join(lines) + "\n")


def _image(
    folder: Path, stem: str, generator: np.random.Generator, side: int, *, difficult: bool
) -> list[str]:
    width, height = generator.integers(side, side * 5 // 4, 2).tolist()
    noise = generator.normal(128, 12, (height, width, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    objects, names = "", []
    # One object in each of some quarters of the image.
    for quarter in generator.permutation(4)[: generator.integers(1, 4)]:
        name = str(generator.choice(list(COLORS)))
        wide, high = generator.integers(side // 4, side // 2 - 4, 2).tolist()
        left = int(quarter % 2) * (width // 2) + int(generator.integers(0, width // 2 - wide))
        top = int(quarter // 2) * (height // 2) + int(generator.integers(0, height // 2 - high))
        shape = (left, top, left + wide - 1, top + high - 1)  # PIL draws the last pixel, too
        (draw.ellipse if name == "ball" else draw.rectangle)(shape, fill=COLORS[name])
        # VOC counts from 1
        corners = (left + 1, top + 1, left + wide, top + high)
        objects += OBJECT.format(*corners, name=name, difficult=int(difficult and not names))
        names.append(name)
    image.save(folder / "JPEGImages" / f"{stem}.jpg", quality=95)
    text = f"<annotation><filename>{stem}.jpg</filename>{objects}\n</annotation>\n"
    (folder / "Annotations" / f"{stem}.xml").write_text(text)
    return names
