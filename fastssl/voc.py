"""PASCAL VOC's layout on disk: which images a split has, what is in them, and where.

    VOC2007/ImageSets/Main/trainval.txt            stems of the split's images, one a line
    VOC2007/ImageSets/Main/<class>_trainval.txt    stem and 1, 0 or -1: there, difficult, not there
    VOC2007/Annotations/<stem>.xml                 boxes
    VOC2007/JPEGImages/<stem>.jpg

Everingham et al. 2010, The PASCAL Visual Object Classes Challenge. The classes are those that have
a file; the official sets have twenty. Anything laid out like this is read, whoever made it.
"""

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

POSITIVE, DIFFICULT, NEGATIVE = 1, 0, -1  # of an image for a class, as the files have them


class Object(NamedTuple):
    """An annotated object; pixels are counted from 1 and both corners lie inside the box."""

    name: str  # of its class
    xmin: float  # a few files of VOC2012 have fractions
    ymin: float
    xmax: float
    ymax: float
    difficult: bool


def folder(root: Path, year: str) -> Path:
    """The folder VOC<year> in `root`, which may be VOCdevkit, the folder above, or VOC<year>.

    A folder that is called neither and holds ImageSets itself is taken for any year.

    Raises:
        ValueError: it is in none of these places, which are named.
    """
    if not re.fullmatch(r"\d{4}", year):
        raise ValueError(f"year ({year!r}) must have four digits, such as '2007'")
    root = root.expanduser().absolute()
    name = f"VOC{year}"
    places = [root / name, root / "VOCdevkit" / name]
    if re.fullmatch(r"VOC\d{4}", root.name):
        places.append(root.parent / name)
    else:
        places.append(root)
    for place in places:
        if (place / "ImageSets" / "Main").is_dir():
            return place
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; {name} was to be found there")
    looked = ", ".join(str(place / "ImageSets" / "Main") for place in places)
    raise ValueError(
        f"{root} does not hold {name}: looked for {looked}; give the folder VOCdevkit that the "
        "archives of PASCAL VOC unpack to"
    )


def names(root: Path, year: str, split: str) -> list[str]:
    """The stems of a split's images ("000005"), as ImageSets/Main/<split>.txt lists them.

    Raises:
        ValueError: there is no such split, or it lists nothing, or an image twice.
    """
    main = folder(root, year) / "ImageSets" / "Main"
    path = main / f"{split}.txt"
    if not path.is_file():
        others = sorted(each.stem for each in main.glob("*.txt") if "_" not in each.stem)
        found = f"; there are {', '.join(others)}" if others else ""
        hint = " (VOC2007's test images are an archive of their own)" if split == "test" else ""
        raise ValueError(f"there is no split {split}: looked for {path}{found}{hint}")
    # The first word: class files, and the lists of some derived sets, have a label behind it.
    stems = [line.split()[0] for line in _lines(path) if line.strip()]
    if not stems:
        raise ValueError(f"{path} lists no image")
    if len(set(stems)) < len(stems):
        twice = next(stem for i, stem in enumerate(stems) if stem in stems[:i])
        raise ValueError(f"{path} lists {twice} twice")
    for stem in stems:
        _check_stem(stem, path)
    return stems


def classes(root: Path, year: str, split: str) -> tuple[str, ...]:
    """The classes that the split has files for, in the order of the alphabet.

    Raises:
        ValueError: there is none.
    """
    main = folder(root, year) / "ImageSets" / "Main"
    end = f"_{split}.txt"
    found = sorted(each.name.removesuffix(end) for each in main.glob(f"*{end}"))
    if not found:
        raise ValueError(f"no class is labelled for {split}: looked for {main}/<class>{end}")
    return tuple(found)


def classification(
    root: Path, year: str, split: str
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Which classes the images of a split show.

    Returns:
        names: stems of the N images.
        labels: int8 [N, C]: 1 there, 0 there but difficult to see, -1 not there.
        classes: the C classes, in the order of the alphabet.

    Raises:
        ValueError: a file is missing, or lacks an image, or has another label.
    """
    stems, found = names(root, year, split), classes(root, year, split)
    main = folder(root, year) / "ImageSets" / "Main"
    labels = np.empty((len(stems), len(found)), np.int8)
    for column, name in enumerate(found):
        path = main / f"{name}_{split}.txt"
        label_of = _labels(path)
        missing = [stem for stem in stems if stem not in label_of]
        if missing:
            raise ValueError(
                f"{path} has no label for {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}, "
                f"which {split}.txt lists"
            )
        labels[:, column] = [label_of[stem] for stem in stems]
    return stems, labels, found


def image_path(root: Path, year: str, stem: str) -> Path:
    """The image's file; whether it is there is not looked at."""
    return folder(root, year) / "JPEGImages" / f"{stem}.jpg"


def objects(root: Path, year: str, stem: str) -> list[Object]:
    """The boxes of an image, in the file's order, difficult ones among them.

    Raises:
        ValueError: the annotation is missing or broken, or it declares entities, which could
            blow up to gigabytes: VOC's never do.
    """
    path = folder(root, year) / "Annotations" / f"{stem}.xml"
    _check_stem(stem, path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no annotation {path}") from None
    _refuse_declarations(content, path)
    found = []
    for number, each in enumerate(ElementTree.fromstring(content).iterfind("object"), start=1):
        name = (each.findtext("name") or "").strip()
        # Directly below: the parts of a person (head, hand) have boxes of their own.
        corners = [each.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            xmin, ymin, xmax, ymax = (float(text or "") for text in corners)
        except ValueError:
            raise ValueError(
                f"{path}: object {number} ({name}) has no whole box: {corners}"
            ) from None
        if not name or not (xmin <= xmax and ymin <= ymax):
            raise ValueError(
                f"{path}: object {number} ({name or 'without a name'}) can't be: x {xmin:g} to "
                f"{xmax:g}, y {ymin:g} to {ymax:g}"
            )
        difficult = (each.findtext("difficult") or "0").strip() == "1"
        found.append(Object(name, xmin, ymin, xmax, ymax, difficult))
    return found


def _labels(path: Path) -> dict[str, int]:
    """The label of each stem in a class's file."""
    label_of = {}
    for number, line in enumerate(_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in ("1", "0", "-1"):
            raise ValueError(
                f"{path}, line {number}: expected an image and 1, 0 or -1, got {line.strip()!r}"
            )
        label_of[words[0]] = int(words[1])
    return label_of


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _check_stem(stem: str, path: Path) -> None:
    if "/" in stem or stem.startswith("."):  # it would lead out of the folder
        raise ValueError(f"{path}: {stem!r} is no name of an image")


def _refuse_declarations(content: bytes, path: Path) -> None:
    """Reads it with expat, which stops at <!DOCTYPE before any entity is expanded."""

    def refuse(*_: object) -> None:
        raise ValueError(f"{path} declares a document type, which annotations don't: not read")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"{path} is no whole XML: {error}") from None
