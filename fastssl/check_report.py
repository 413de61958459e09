"""What `check` found in numbers: as JSON, as a table, and as what to write in a recipe."""

import math
import os
import re
import shlex
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastssl.check_duplicates import Counts
from fastssl.check_image import FORMATS, MODES
from fastssl.check_scan import Split

QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
CROPS = (32, 64, 96, 128, 192, 224, 256, 292, 384, 512)  # pixels; short sides below are counted
ASPECTS = (2, 3, 4)  # long side / short side
# Bytes a pixel of the largest image that nvJPEG wants to have set aside on the GPU and in pinned
# memory: what NVIDIA's recipe for ImageNet gives, 211,025,920 and 140,544,512 for 5,980 x 6,430.
DEVICE_BYTES, HOST_BYTES = 211_025_920 / (5980 * 6430), 140_544_512 / (5980 * 6430)
_SHARE = 0.999  # of the images need no more than the hints say: the largest of ten million may be a
# panorama, and what is set aside for it is set aside for every thread
_MIB = 2**20
_MOST_NAMED = 1000  # files that could not be read


def statistics(split: Split) -> dict[str, Any]:
    """The numbers of a listing; counts are of images that nothing is wrong with."""
    good = split.good
    records = split.records[good]
    height, width = (
        np.asarray(side)[good].astype(np.int64)
        for side in (split.samples.height, split.samples.width)
    )
    short, long = np.minimum(height, width), np.maximum(height, width)
    found: dict[str, Any] = {
        "root": split.samples.root,
        "files": len(good),
        "images": len(records),
        "bad": len(split.bad),
        "reasons": reasons(split.bad),
        "unread": len(split.unread),
        "unread_files": {
            os.fsdecode(split.samples.names[row]): reason
            for row, reason in islice(sorted(split.unread.items()), _MOST_NAMED)
        },
        "bytes": int(records["size"].sum()),
        "formats": _named(records["format"], FORMATS),
        "modes": _named(records["mode"], MODES),
        "progressive": int(np.count_nonzero(records["progressive"])),
        "turned_by_exif": int(np.count_nonzero(records["orientation"] > 1)),
    }
    if not len(records):
        return found
    aspect = long / np.maximum(short, 1)
    return found | {
        "quantiles": {
            "of": list(QUANTILES),
            "kilobytes": _quantiles(records["size"] / 1e3),
            "megapixels": _quantiles(height * width / 1e6),
            "short_side": _quantiles(short),
            "long_side": _quantiles(long),
            "aspect": _quantiles(aspect),
        },
        "short_side_below": {str(side): int(np.count_nonzero(short < side)) for side in CROPS},
        "aspect_above": {str(ratio): int(np.count_nonzero(aspect > ratio)) for ratio in ASPECTS},
        "classes": _classes(split),
    }


def reasons(bad: dict[int, str]) -> dict[str, int]:
    """How many images are bad for which reason, without the numbers in it; the most first."""
    counted = Counter(re.sub(r"\b(0x[0-9a-f]+|\d[\d,]*)\b", "N", why) for why in bad.values())
    return dict(counted.most_common())


def table(found: dict[str, Any], name: str) -> list[str]:
    """The numbers of a listing as lines for people."""
    images = found["images"]
    lines = [
        f"{shown(name)}: {images:,} images of {found['bytes'] / 1e9:,.2f} GB, {found['bad']:,} bad",
        *(f"  {count:>12,}  bad: {reason}" for reason, count in list(found["reasons"].items())[:8]),
    ]
    if len(found["reasons"]) > 8:
        lines.append(f"                and {len(found['reasons']) - 8:,} reasons more")
    if found["unread"]:
        first, reason = next(iter(found["unread_files"].items()))
        lines.append(
            f"  {found['unread']:>12,}  could not be read, such as {shown(first)} ({reason}): the"
            " same command looks at them again"
        )
    if not images:
        return lines
    lines += [
        _counts("format", found["formats"], images),
        _counts("colors", found["modes"], images),
        f"  progressive JPEGs {_share(found['progressive'], images)},"
        f" turned by Exif {_share(found['turned_by_exif'], images)}",
        "  " + " " * 12 + "".join(f"{_percent(each):>9}" for each in QUANTILES),
    ]
    for key in ("kilobytes", "megapixels", "short_side", "long_side", "aspect"):
        values = found["quantiles"][key]
        digits = 2 if key in ("megapixels", "aspect") else 0
        cells = "".join(f"{value:>9,.{digits}f}" for value in values)
        lines.append(f"  {key.replace('_', ' '):<12}{cells}")
    below = [(side, n) for side, n in found["short_side_below"].items() if n]
    lines.append(
        "  short side below "
        + (", ".join(f"{side}: {_share(n, images)}" for side, n in below) or "32 ... 512: none")
    )
    if any(found["aspect_above"].values()):
        wide = [f"{ratio}: {_share(n, images)}" for ratio, n in found["aspect_above"].items() if n]
        lines.append("  long side / short side above " + ", ".join(wide))
    classes = found["classes"]
    if classes["count"]:
        fewest, most = shown(classes["fewest_in"]), shown(classes["most_in"])
        lines.append(
            f"  {classes['count']:,} classes of {classes['fewest']:,} ({fewest}) to"
            f" {classes['most']:,} ({most}) images, median {classes['median']:,.0f}"
        )
    return lines


def shown(name: str) -> str:
    """A file's name on a single line, whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)


def duplicates_line(counts: Counts, splits: list[str]) -> str:
    """What was found of equal files, for people; `splits`: their names."""
    if not counts.groups:
        return "duplicates: none"
    line = (
        f"duplicates: {counts.superfluous:,} files of {counts.bytes / 1e6:,.1f} MB are copies of"
        f" {counts.groups:,} others"
    )
    if len(splits) == 2:
        line += f"; {counts.across:,} images are both in {splits[0]} and in {splits[1]}"
    elif len(splits) > 2:
        line += f"; {counts.across:,} images are in more than one of {', '.join(splits)}"
    if counts.classes:
        line += f"; {counts.classes:,} lie in different classes"
    return line


def hints(split: Split) -> dict[str, int]:
    """The keys of a recipe's section `loader` that set a GPU decoder's memory aside.

    They are for 999 of 1,000 JPEGs; the rest makes the decoder ask for more while it works.
    """
    jpeg = split.good & (split.records["format"] == FORMATS.index("JPEG"))
    if not jpeg.any():
        return {}
    # Upright, while the decoder works on what is coded: both sides of what lies on its side.
    lying = split.records["orientation"][jpeg] >= 5
    height, width = (
        np.asarray(side)[jpeg].astype(np.int64)
        for side in (split.samples.height, split.samples.width)
    )
    height, width = np.where(lying, width, height), np.where(lying, height, width)
    pixels = _upper(height * width)
    return {
        "decoder_width": min(_upper(width), 65_535),
        "decoder_height": min(_upper(height), 65_535),
        "decoder_device_mib": min(max(16, math.ceil(pixels * DEVICE_BYTES / _MIB)), 2047),
        "decoder_host_mib": min(max(8, math.ceil(pixels * HOST_BYTES / _MIB)), 2047),
    }


def recipe(split: Split, quarantine: Path, command: str) -> str:
    """Keys of a recipe, in YAML, and the same in a comment as overrides."""
    data = {"root": split.samples.root, "quarantine": str(quarantine)}
    sections: dict[str, dict[str, Any]] = {"data": data}
    loading = hints(split)
    if loading:
        sections["loader"] = loading
    overrides = [
        shlex.quote(f"{section}.{key}={value}")
        for section, values in sections.items()
        for key, value in values.items()
    ]
    return (
        f"# Written by {command}\n"
        "# To be copied into a recipe; or, behind any command that takes one:\n"
        f"# {' '.join(map(shown, overrides))}\n"
        "# loader.decoder_*: what a GPU's decoder sets aside; without meaning on a CPU.\n"
        + yaml.safe_dump(sections, sort_keys=False, allow_unicode=False)
    )


def _upper(values: np.ndarray) -> int:
    return int(np.quantile(values, _SHARE, method="inverted_cdf"))


def _named(places: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    counted = np.bincount(places, minlength=len(names)).tolist()
    return {
        name: n
        for n, name in sorted(zip(counted, names, strict=True), key=lambda both: -both[0])
        if n
    }


def _quantiles(values: np.ndarray) -> list[float]:
    """Values that are there, so that the first is the least and the last the greatest."""
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return [round(float(value), 4) for value in found]


def _classes(split: Split) -> dict[str, Any]:
    names, labels = split.samples.classes, split.samples.labels
    if labels is None or not names:
        return {"count": 0}
    counts = np.bincount(labels[split.good], minlength=len(names))
    fewest, most = int(counts.argmin()), int(counts.argmax())
    return {
        "count": len(names),
        "fewest": int(counts[fewest]),
        "fewest_in": names[fewest],
        "most": int(counts[most]),
        "most_in": names[most],
        "median": float(np.median(counts)),
        "images": dict(zip(names, counts.tolist(), strict=True)),
    }


def _counts(what: str, counted: dict[str, int], images: int) -> str:
    parts = [f"{name} {_share(n, images)}" for name, n in counted.items()]
    return f"  {what}: " + ", ".join(parts)


def _share(count: int, of: int) -> str:
    return f"{count:,} ({100 * count / of:.1f} %)"


def _percent(quantile: float) -> str:
    names = {0: "least", 0.5: "median", 1: "greatest"}
    return names.get(quantile, f"{100 * quantile:.0f} %")
