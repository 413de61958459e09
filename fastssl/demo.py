"""The built-in images: ten kinds of little scenes, drawn once into the user's cache.

They let every recipe run without a data set. A class is carried by the shape of things and by the
scene around them; season, hour, palette, exposure, size and place vary in the same way in every
class, so that mean colour tells nothing and raw pixels little. Pictures have an upright
orientation (light comes from above, things stand on the ground) and a layout, and hues go with
materials, so that rotation, jigsaw, relative patch, exemplar and colorization have something to
learn. `python -m fastssl.demo` draws them and prints where they are.
"""

import colorsys
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIZES = (  # pixels: 1:1, 4:3, 3:4, 3:2, 2:3, 16:9
    (96, 96), (128, 128), (144, 144), (128, 96), (160, 120), (96, 128), (120, 160),
    (144, 96), (156, 104), (96, 144), (104, 156), (160, 90),
)  # fmt: skip
SUPERSAMPLING = 3  # drawn at three times the size a side: Pillow's own edges are not smooth


def cache() -> Path:
    """The folder for what fastssl keeps between runs: FASTSSL_CACHE, or the user's cache folder."""
    if own := os.environ.get("FASTSSL_CACHE"):
        return Path(own).expanduser()
    if users := os.environ.get("XDG_CACHE_HOME"):
        return Path(users).expanduser() / "fastssl"
    return Path("~/.cache/fastssl").expanduser()


def folder() -> Path:
    """Where the built-in images are, or will be once drawn."""
    return cache() / "images-v1"


def render(
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    *,
    train: int = 250,
    val: int = 50,
) -> Path:
    """Draw `train/<class>/00000.jpg` ... and `val/...` unless they are there already.

    Any number of processes may call this at once: one draws, the others wait for it. The folder
    appears under its name only when it is complete.

    Args:
        folder: where to; `folder()` unless given.
        say: told when drawing starts; nothing is said when the images are there.
        train: images a class.
        val: images a class.

    Returns:
        The folder that holds `train` and `val`.

    Raises:
        ValueError: the folder cannot be written, or holds files that are not ours.
    """
    target = cache() / "images-v1" if folder is None else folder
    counts = {"train": train, "val": val}
    try:
        if _is_complete(target, counts):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
            if not _is_complete(target, counts):
                _draw_all(target, counts, say)
    except OSError as error:
        raise ValueError(
            f"{target}: cannot keep the built-in images here ({error}); set FASTSSL_CACHE to a "
            "folder that can be written and has 40 MB to spare"
        ) from error
    return target


def picture(split: str, name: str, number: int) -> Image.Image:
    """Draw image `number` of class `name`; nothing but these three decides what it shows."""
    rng = np.random.default_rng([*split.encode(), 0, *name.encode(), 0, number])
    scene = _Scene(rng, SIZES[rng.integers(len(SIZES))])
    _SCENES[name](scene)
    image = scene.developed()
    return image.convert("L") if rng.random() < 0.03 else image  # a few are black and white


def draw(folder: Path, counts: dict[str, int], share: int, shares: int) -> None:
    """Draw every `shares`-th image into `folder`, starting with number `share`."""
    work = [(split, name, i) for split, n in counts.items() for name in CLASSES for i in range(n)]
    for split, name, number in work[share::shares]:
        style = np.random.default_rng([number, len(name)])
        picture(split, name, number).save(
            folder / split / name / f"{number:05d}.jpg",
            quality=int(style.integers(75, 96)),
            subsampling=int(style.integers(3)),  # 4:4:4, 4:2:2, 4:2:0
        )


# The worker is a new interpreter told in one line what to do, not a multiprocessing pool: a pool
# would import the caller's script again, and fork is not safe beside CUDA and DALI threads.
_WORKER = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from fastssl.demo import draw
try:
    draw(pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(74)
"""


def _draw_all(target: Path, counts: dict[str, int], say: Callable[[str], None]) -> None:
    """Draw into a folder beside `target`, then rename. The caller holds the lock."""
    if target.exists() and any(target.iterdir()) and not (target / _MANIFEST).exists():
        raise ValueError(
            f"{target}: holds files that are not the built-in images; move them away, or set "
            "FASTSSL_CACHE to another folder"
        )
    total = sum(counts.values()) * len(CLASSES)
    say(f"drawing {total:,} built-in images into {target} (once, less than a minute)")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():  # left by a process that was killed
        shutil.rmtree(partial)
    for split in counts:
        for name in CLASSES:
            (partial / split / name).mkdir(parents=True)
    shares = min(len(os.sched_getaffinity(0)), 16)
    fixed = [str(Path(__file__).resolve().parents[1]), str(partial), json.dumps(counts)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, *fixed, str(share), str(shares)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in range(shares)
    ]
    ends = [(worker.communicate()[1], worker.returncode) for worker in workers]
    for message, code in ends:
        if code == 74:  # sysexits.h: an error of input or output
            raise OSError(message.strip())
        if code:
            raise RuntimeError(f"drawing the built-in images failed with {code}:\n{message}")
    manifest = {"counts": counts, "bytes": _bytes(partial, counts)}
    (partial / _MANIFEST).write_text(json.dumps(manifest) + "\n")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


_MANIFEST = "manifest.json"


def _is_complete(target: Path, counts: dict[str, int]) -> bool:
    """Whether `target` holds as many images and bytes as its manifest says."""
    try:
        manifest = json.loads((target / _MANIFEST).read_text())
        return manifest == {"counts": counts, "bytes": _bytes(target, counts)}
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def _bytes(target: Path, counts: dict[str, int]) -> int:
    """Bytes of all images together; FileNotFoundError when one is missing."""
    return sum(
        (target / split / name / f"{number:05d}.jpg").stat().st_size
        for split, count in counts.items()
        for name in CLASSES
        for number in range(count)
    )


class _Scene:
    """A canvas with its palette and its dice. The short side measures 1; y runs down."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.size = size
        self.unit = min(size) * SUPERSAMPLING  # canvas pixels in a length of 1
        self.wide, self.high = size[0] / min(size), size[1] / min(size)
        self.image = Image.new("RGB", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
        self.pen = ImageDraw.Draw(self.image)
        self._choose_palette()

    def _choose_palette(self) -> None:
        hour = self.rng.choice(["day", "evening", "overcast", "night", "dawn"])
        hue, top, low = {
            "day": ((0.54, 0.63), (0.60, 0.85), (0.25, 0.97)),
            "evening": ((0.62, 0.80), (0.40, 0.60), (0.55, 0.97)),
            "overcast": ((0.50, 0.70), (0.08, 0.62), (0.05, 0.85)),
            "night": ((0.58, 0.72), (0.60, 0.20), (0.45, 0.42)),
            "dawn": ((0.45, 0.55), (0.35, 0.75), (0.35, 0.97)),
        }[hour]
        at = self.between(*hue)
        glow = {"evening": self.between(0.02, 0.12), "dawn": self.between(0.88, 1.12)}.get(hour, at)
        self.sky = _hsv(at, *top)
        self.haze = _hsv(glow, *low)
        self.light = {"night": 0.6, "overcast": 0.85}.get(hour, 1.0)
        season = self.rng.choice(["green", "dry", "snow", "heath", "earth"])
        hues, saturation, value = {
            "green": ((0.22, 0.40), 0.50, 0.50),
            "dry": ((0.09, 0.15), 0.50, 0.70),
            "snow": ((0.52, 0.66), 0.08, 0.95),
            "heath": ((0.78, 0.95), 0.30, 0.52),
            "earth": ((0.02, 0.08), 0.50, 0.45),
        }[season]
        value *= self.light * self.between(0.85, 1.15)
        self.ground = _hsv(self.between(*hues), saturation * self.between(0.7, 1.3), value)
        self.leaf = _hsv(self.between(*hues) if season != "snow" else self.between(0.25, 0.45),
                         0.5 * self.between(0.7, 1.3), 0.55 * self.light)  # fmt: skip

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def some(self, low: int, high: int) -> range:
        """As many turns as a die with faces `low` to `high` shows."""
        return range(int(self.rng.integers(low, high + 1)))

    def paint(self) -> Colour:
        """The colour of a made thing, in the light of the hour."""
        if self.rng.random() < 0.25:
            return _hsv(self.rng.random(), self.between(0, 0.15), self.between(0.2, 1) * self.light)
        return _hsv(self.rng.random(), self.between(0.4, 0.8), self.between(0.4, 0.95) * self.light)

    def spread(self, count: int, margin: float = 0.15) -> list[float]:
        """Places from left to right, one in each of `count` equal columns, in random order."""
        column = (self.wide + 2 * margin) / count
        places = [-margin + (i + self.between(0.2, 0.8)) * column for i in range(count)]
        return [places[i] for i in self.rng.permutation(count)]

    def flat(self, points: list[Point], colour: Colour) -> None:
        self.pen.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=colour)

    def line(self, points: list[Point], colour: Colour, width: float) -> None:
        thick = max(1, round(width * self.unit))
        self.pen.line([(x * self.unit, y * self.unit) for x, y in points], colour, thick, "curve")

    def lit(self, points: list[Point], colour: Colour, contrast: float = 0.3) -> None:
        """A shape that is lighter at its upper end than at its lower one."""
        xs, ys = [x * self.unit for x, _ in points], [y * self.unit for _, y in points]
        left, top = math.floor(min(xs)), math.floor(min(ys))
        wide, high = math.ceil(max(xs)) - left + 1, math.ceil(max(ys)) - top + 1
        mask = Image.new("L", (wide, high))
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in zip(xs, ys, strict=True)],
                                     fill=255)  # fmt: skip
        ramp = np.linspace(1 + contrast / 2, 1 - contrast, high)[:, None, None] * np.array(colour)
        shades = Image.fromarray(np.clip(ramp, 0, 255).astype(np.uint8))
        self.image.paste(shades.resize((wide, high), Image.Resampling.NEAREST), (left, top), mask)

    def veil(self, points: list[Point], colour: Colour, opacity: float) -> None:
        """A shape that lets what lies behind it shine through: shadows, clouds, rays."""
        xs, ys = [x * self.unit for x, _ in points], [y * self.unit for _, y in points]
        left, top = math.floor(min(xs)), math.floor(min(ys))
        size = (math.ceil(max(xs)) - left + 1, math.ceil(max(ys)) - top + 1)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in zip(xs, ys, strict=True)],
                                     fill=round(255 * opacity))  # fmt: skip
        self.image.paste(colour, (left, top), mask)

    def shadow(self, x: float, y: float, radius: float) -> None:
        self.veil(_oval(x, y, radius, radius * 0.22), (10, 10, 30), 0.35)

    def gradient(self, top: float, bottom: float, above: Colour, below: Colour) -> None:
        """The full width from `top` to `bottom`, from one colour to another."""
        first, last = round(top * self.unit), round(bottom * self.unit)
        share = np.linspace(0, 1, max(last - first, 1))[:, None, None]
        rows = np.array(above) * (1 - share) + np.array(below) * share
        strip = Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8))
        self.image.paste(strip.resize((self.image.width, strip.height)), (0, first))

    def heaven(self, horizon: float) -> None:
        """Sky, sun or moon, clouds and hills down to `horizon`."""
        self.gradient(0, horizon, self.sky, self.haze)
        if self.rng.random() < 0.4:
            radius = self.between(0.04, 0.09)
            glow = _mix(self.haze, (255, 250, 220), 0.7)
            x, y = self.between(0, self.wide), self.between(0.05, horizon * 0.8)
            self.flat(_oval(x, y, radius, radius), glow)
        for _ in self.some(0, 4):
            x, y = self.between(0, self.wide), self.between(0.03, max(horizon * 0.8, 0.1))
            size = self.between(0.05, 0.12)
            for _ in range(5):
                puff = self.between(0.5, 1) * size
                at = (x + self.between(-1.6, 1.6) * size, y + self.between(-0.3, 0.3) * size)
                self.veil(_oval(*at, puff * 1.3, puff * 0.6), _mix(self.haze, (255,) * 3, 0.5), 0.6)
        for depth in self.some(0, 2):
            colour = _mix(self.haze, self.ground, 0.35 + 0.25 * depth)
            peak = self.between(0.05, 0.2) / (depth + 1)
            phase, pace = self.between(0, 6.3), self.between(2, 6)
            ridge = [
                (x, horizon - peak * (0.6 + 0.4 * math.sin(phase + pace * x)))
                for x in np.linspace(0, self.wide, 30)
            ]
            self.flat([(0, horizon + 0.01), *ridge, (self.wide, horizon + 0.01)], colour)

    def land(self, horizon: float) -> None:
        """Sky above, ground with tufts and pebbles below."""
        self.heaven(horizon)
        self.gradient(horizon, self.high, _mix(self.ground, self.haze, 0.3), _dim(self.ground, 0.8))
        for _ in range(130):
            near = self.between(0, 1)
            x, y = self.between(0, self.wide), horizon + near * (self.high - horizon)
            tip = (x + self.between(-0.02, 0.02), y - (0.01 + 0.05 * near))
            self.line([(x, y), tip], _dim(self.ground, self.between(0.6, 1.3)), 0.006 + 0.006 * near)

    def sea(self, horizon: float) -> None:
        """Sky above, water with waves below."""
        self.heaven(horizon)
        deep = _dim(_mix(self.sky, self.ground, 0.15), 0.75)
        self.gradient(horizon, self.high, _mix(deep, self.haze, 0.5), deep)
        for _ in range(90):
            near = self.between(0, 1)
            x, y = self.between(0, self.wide), horizon + near * (self.high - horizon)
            long, rise = 0.03 + 0.08 * near, 0.004 + 0.014 * near
            crest = [(x - long, y), (x - long / 2, y - rise), (x, y), (x + long / 2, y - rise),
                     (x + long, y)]  # fmt: skip
            tint = _mix(deep, self.haze, self.between(0.3, 0.9))
            self.line(crest, _dim(tint, self.between(0.8, 1.1)), 0.006 + 0.004 * near)

    def developed(self) -> Image.Image:
        """The finished picture, at its size: soft blotches, grain, exposure and white balance.

        Exposure, contrast and tint are drawn, not inherited from what the picture shows: without
        this, mean colour would tell the class (a face is warm, water is dark).
        """
        pixels = np.asarray(self.image.reduce(SUPERSAMPLING), dtype=np.float32)
        for cells in (3, 8, 20):
            noise = self.rng.normal(size=(cells, cells)).astype(np.float32)
            blotches = Image.fromarray(noise).resize(self.size, Image.Resampling.BICUBIC)
            pixels = pixels * (1 + 0.03 * np.asarray(blotches)[..., None])
        pixels = pixels + self.rng.normal(scale=3, size=pixels.shape[:2])[..., None]
        mean = pixels.mean((0, 1))
        tint = 1 + 0.4 * (mean / mean.mean() - 1) + self.rng.normal(scale=0.06, size=3)
        contrast = min(self.between(40, 62) / max(float(pixels.mean(2).std()), 8), 1.6)
        balanced = (pixels - mean) * contrast + self.between(85, 165) * tint
        return Image.fromarray(np.clip(balanced, 0, 255).astype(np.uint8))


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round(a * (1 - share) + b * share) for a, b in zip(one, other, strict=True))
    return r, g, b


def _dim(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, round(c * factor)) for c in colour)
    return r, g, b


def _oval(x: float, y: float, rx: float, ry: float, turn: float = 0) -> list[Point]:
    cos, sin = math.cos(turn), math.sin(turn)
    angles = [2 * math.pi * i / 36 for i in range(36)]
    ring = [(rx * math.cos(a), ry * math.sin(a)) for a in angles]
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in ring]


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _depths(scene: _Scene, count: int) -> Iterator[tuple[float, float]]:
    """Places for `count` things, the far ones first: x, and nearness from 0 to 1."""
    nearness = sorted(scene.between(0, 1) for _ in range(count))
    return zip(scene.spread(count), nearness, strict=True)


def _balloon(scene: _Scene) -> None:
    """Hot-air balloons, their baskets below them."""
    scene.land(scene.high * scene.between(0.75, 0.95))
    for x, near in _depths(scene, int(scene.rng.integers(4, 8))):
        radius = 0.12 + 0.18 * near * scene.between(0.6, 1)
        y = scene.between(0.1, scene.high * 0.75 - radius)
        one, other = scene.paint(), scene.paint()
        neck = y + radius * 1.45
        basket = _box(x - radius * 0.2, neck + radius * 0.35, x + radius * 0.2, neck + radius * 0.7)
        for side in (-1, 1):
            rope = [(x + side * radius * 0.5, y + radius * 0.8),
                    (x + side * radius * 0.18, neck + radius * 0.4)]  # fmt: skip
            scene.line(rope, (50, 40, 40), 0.007)
        gores = 4
        for gore in range(gores, 0, -1):  # from the widest to the narrowest, each on top
            share = gore / gores
            skin = [
                (x + radius * share * math.sin(a), y - radius * math.cos(a))
                for a in np.linspace(-2.2, 2.2, 30)
            ]
            skin += [(x + radius * 0.22 * share, neck), (x - radius * 0.22 * share, neck)]
            scene.lit(skin, one if gore % 2 else other, 0.45)
        scene.lit(basket, _dim((150, 105, 60), scene.light))


def _boat(scene: _Scene) -> None:
    """Sailing boats on the water, with their reflections."""
    horizon = scene.high * scene.between(0.25, 0.5)
    scene.sea(horizon)
    for x, near in _depths(scene, int(scene.rng.integers(4, 8))):
        size = 0.13 + 0.15 * near
        y = horizon + 0.03 + (scene.high - horizon - 0.1) * near
        way = scene.rng.choice([-1, 1])
        hull, sail = scene.paint(), scene.paint()
        mirror = [(x - size * 0.8, y), (x + size * 0.8, y), (x + size * 0.1 * way, y + size)]
        scene.veil(mirror, _dim(sail, 0.6), 0.3)
        mast = x + size * 0.1 * way
        scene.line([(mast, y), (mast, y - size * 2)], (60, 45, 35), 0.05 * size)
        main = [(mast - 0.05 * size * way, y - size * 1.9), (mast - 0.05 * size * way, y - size * 0.4),
                (mast - size * 0.9 * way, y - size * 0.4)]  # fmt: skip
        jib = [(mast + 0.07 * size * way, y - size * 1.7), (mast + 0.07 * size * way, y - size * 0.45),
               (mast + size * 0.65 * way, y - size * 0.4)]  # fmt: skip
        scene.lit(main, sail)
        scene.lit(jib, _mix(sail, scene.paint(), 0.5))
        scene.lit([(x - size, y - size * 0.3), (x + size, y - size * 0.3),
                   (x + size * 0.7, y + size * 0.08), (x - size * 0.7, y + size * 0.08)],
                  hull, 0.5)  # fmt: skip


def _car(scene: _Scene) -> None:
    """Cars on a road, seen from the side."""
    horizon = scene.high * scene.between(0.3, 0.5)
    scene.land(horizon)
    asphalt = _mix(_dim((95, 95, 100), scene.light), scene.ground, 0.2)
    top, bottom = horizon + 0.1, scene.high - 0.05
    scene.gradient(top, bottom, _dim(asphalt, 1.15), asphalt)
    middle = (top + bottom) / 2
    for x in np.arange(scene.between(-0.2, 0), scene.wide, 0.24):
        dash = _box(x, middle - 0.012, x + 0.13, middle + 0.012)
        scene.flat(dash, _dim((235, 230, 210), scene.light))
    for lane, low in ((0, middle - 0.03), (1, bottom - 0.04)):
        size = (0.5, 0.7)[lane] * scene.between(0.75, 1)
        x = scene.between(-0.3, 0.1)
        while x < scene.wide:
            _one_car(scene, x, low, size)
            x += size * scene.between(1.1, 1.7)


def _one_car(scene: _Scene, x: float, low: float, size: float) -> None:
    """A car whose wheels stand at `low`, from `x` on, `size` long."""
    way = scene.rng.choice([-1, 1])
    body = scene.paint()

    def at(along: float, up: float) -> Point:
        return (x + size * (along if way > 0 else 1 - along), low - size * up)

    roof = scene.between(0.40, 0.48)
    scene.shadow(x + size / 2, low, size * 0.55)
    scene.lit([at(0.16, 0.26), at(0.28, roof), at(0.62, roof), at(0.78, 0.26)], _dim(body, 0.9))
    glass = _mix(scene.haze, (60, 80, 100), 0.5)
    scene.lit([at(0.22, 0.27), at(0.31, roof - 0.03), at(0.43, roof - 0.03), at(0.43, 0.27)], glass)
    scene.lit([at(0.47, 0.27), at(0.47, roof - 0.03), at(0.6, roof - 0.03), at(0.71, 0.27)], glass)
    scene.lit([at(0, 0.24), at(0.05, 0.28), at(0.8, 0.27), at(0.97, 0.22), at(1, 0.1), at(0.99, 0.06),
               at(0.01, 0.06)], body, 0.5)  # fmt: skip
    scene.flat(_oval(*at(0.96, 0.19), size * 0.025, size * 0.025), (255, 245, 190))
    for wheel in (0.2, 0.79):
        scene.flat(_oval(*at(wheel, 0.08), size * 0.1, size * 0.1), (25, 25, 28))
        scene.flat(_oval(*at(wheel, 0.08), size * 0.05, size * 0.05), (175, 175, 180))


def _city(scene: _Scene) -> None:
    """Towers with rows of windows, layer behind layer."""
    horizon = scene.high * scene.between(0.8, 0.95)
    scene.land(horizon)
    for layer in range(3):
        x = scene.between(-0.15, 0)
        while x < scene.wide:
            wide = scene.between(0.13, 0.26)
            tall = scene.high * scene.between(0.3, 0.8) * (1 - 0.2 * layer)
            wall = _mix(_mix(scene.paint(), scene.ground, 0.4), scene.haze, 0.5 - 0.2 * layer)
            base = horizon + 0.03 * layer
            scene.lit(_box(x, base - tall, x + wide, base), wall, 0.25)
            scene.flat(_box(x + wide * 0.8, base - tall, x + wide, base), _dim(wall, 0.7))
            lamp = _mix(wall, (255, 235, 160) if scene.light < 0.8 else (40, 50, 70), 0.65)
            step = wide / 4
            for row in range(1, int(tall / step)):
                for column in range(3):
                    if scene.rng.random() < 0.85:
                        left, top = x + step * (0.3 + column), base - tall + step * (row - 0.4)
                        scene.flat(_box(left, top, left + step * 0.5, top + step * 0.55), lamp)
            x += wide * scene.between(1, 1.5)


def _fish(scene: _Scene) -> None:
    """Fish in the water, weeds and sand below, bubbles and light from above."""
    surface = _mix(scene.sky, scene.haze, 0.7)
    scene.gradient(0, scene.high, surface, _dim(scene.sky, 0.55))
    for _ in scene.some(2, 5):
        x, slant = scene.between(0, scene.wide), scene.between(-0.3, 0.3)
        ray = [(x, 0), (x + 0.08, 0), (x + 0.2 + slant, scene.high), (x - 0.02 + slant, scene.high)]
        scene.veil(ray, (255, 255, 240), 0.12)
    floor = scene.high * scene.between(0.8, 0.95)
    sand = [(x, floor + 0.03 * math.sin(5 * x)) for x in np.linspace(0, scene.wide, 30)]
    bed = [(0, scene.high), *sand, (scene.wide, scene.high)]
    scene.lit(bed, _mix(scene.ground, scene.sky, 0.3))
    for x in scene.spread(int(scene.rng.integers(3, 9))):
        tall, phase = scene.between(0.15, 0.5), scene.between(0, 6)
        blade = [
            (x + 0.03 * math.sin(phase + 18 * up), floor + 0.06 - up)
            for up in np.linspace(0, tall, 14)
        ]
        scene.line(blade, _dim(scene.leaf, scene.between(0.6, 1.1)), scene.between(0.015, 0.03))
    for x, near in _depths(scene, int(scene.rng.integers(6, 11))):
        size = 0.1 + 0.13 * near
        _one_fish(scene, x, scene.between(0.08, floor - 0.08), size)
    for _ in scene.some(5, 14):
        radius = scene.between(0.008, 0.025)
        x, y = scene.between(0, scene.wide), scene.between(0, floor)
        scene.line([*_oval(x, y, radius, radius)], _mix(surface, (255,) * 3, 0.6), 0.006)


def _one_fish(scene: _Scene, x: float, y: float, size: float) -> None:
    way = float(scene.rng.choice([-1, 1]))
    skin, fin = scene.paint(), scene.paint()
    plump = scene.between(0.42, 0.65)

    def at(along: float, up: float) -> Point:
        return (x + size * along * way, y - size * up)

    scene.lit([at(-0.8, 0), at(-1.6, 0.5), at(-1.4, 0), at(-1.6, -0.5)], fin)
    scene.lit([at(-0.4, plump * 0.7), at(-0.5, plump + 0.4), at(0.3, plump * 0.9)], fin)
    scene.lit([at(0, -plump * 0.8), at(-0.4, -plump - 0.25), at(-0.4, -plump * 0.7)], fin)
    scene.lit(_oval(x, y, size, size * plump), skin, 0.6)
    for band in (-0.35, 0.0, 0.3):
        reach = plump * math.sqrt(1 - band**2) * 0.9
        scene.line([at(band, reach), at(band - 0.08, 0), at(band, -reach)], fin, size * 0.11)
    scene.flat(_oval(*at(0.65, 0.1), size * 0.14, size * 0.14), (245, 245, 240))
    scene.flat(_oval(*at(0.68, 0.1), size * 0.07, size * 0.07), (10, 10, 20))


def _flower(scene: _Scene) -> None:
    """A meadow of flowers on their stems."""
    horizon = scene.high * scene.between(0.15, 0.45)
    scene.land(horizon)
    for x, near in _depths(scene, int(scene.rng.integers(9, 17))):
        radius = 0.05 + 0.1 * near * scene.between(0.6, 1)
        foot = horizon + 0.15 + (scene.high - horizon) * near
        y = foot - 0.2 - radius - scene.between(0, 0.25) * (0.5 + near)
        green = _dim(scene.leaf, scene.between(0.7, 1.1))
        scene.line([(x, y), (x + scene.between(-0.04, 0.04), foot)], green, 0.2 * radius)
        for side in (-1, 1):
            leaf = _oval(x + side * radius * 0.6, y + radius * 2.4, radius * 0.7, radius * 0.2,
                         -0.6 * side)  # fmt: skip
            scene.lit(leaf, green)
        petals, turn, colour = int(scene.rng.integers(5, 10)), scene.between(0, 1), scene.paint()
        for petal in range(petals):
            a = turn + 2 * math.pi * petal / petals
            place = (x + radius * 0.6 * math.cos(a), y + radius * 0.6 * math.sin(a))
            tone = _dim(colour, 1 - 0.2 * math.sin(a))
            scene.flat(_oval(*place, radius * 0.45, radius * 0.24, a), tone)
        scene.lit(_oval(x, y, radius * 0.3, radius * 0.3), scene.paint(), 0.5)


def _house(scene: _Scene) -> None:
    """Houses with pitched roofs, doors and windows, on the ground."""
    horizon = scene.high * scene.between(0.35, 0.55)
    scene.land(horizon)
    for x, near in _depths(scene, int(scene.rng.integers(3, 6))):
        size = 0.34 + 0.24 * near
        foot = horizon + 0.06 + (scene.high - horizon - 0.12) * near
        wall, roof, frame = scene.paint(), scene.paint(), scene.paint()
        left, right, eaves = x - size / 2, x + size / 2, foot - size * 0.6
        ridge = eaves - size * scene.between(0.35, 0.55)
        scene.shadow(x, foot, size * 0.7)
        scene.lit(_box(x + size * 0.2, ridge - size * 0.02, x + size * 0.32, eaves), _dim(roof, 0.7))
        scene.lit(_box(left, eaves, right, foot), wall, 0.25)
        for course in np.arange(eaves, foot, 0.03):
            scene.line([(left, course), (right, course)], _dim(wall, 0.85), 0.004)
        gable = [(left - size * 0.1, eaves + 0.02), (x, ridge), (right + size * 0.1, eaves + 0.02)]
        scene.lit(gable, roof, 0.4)
        for step in (0.35, 0.6, 0.85):
            half = size * 0.6 * step
            row = ridge + (eaves - ridge) * step
            scene.line([(x - half, row), (x + half, row)], _dim(roof, 0.7), 0.008)
        glass = (255, 225, 130) if scene.light < 0.8 else _mix(scene.haze, (50, 60, 90), 0.6)
        for along in (-0.3, 0.3):
            mid, top, half = x + size * along, foot - size * 0.42, size * 0.1
            scene.flat(_box(mid - half * 1.2, top - half * 0.2, mid + half * 1.2, top + half * 2.2),
                       frame)  # fmt: skip
            scene.flat(_box(mid - half, top, mid + half, top + half * 2), glass)
            scene.line([(mid, top), (mid, top + half * 2)], frame, 0.012 * size / 0.4)
            scene.line([(mid - half, top + half), (mid + half, top + half)], frame, 0.012)
        scene.lit(_box(x - size * 0.09, foot - size * 0.38, x + size * 0.09, foot), _dim(frame, 0.8))


def _mushroom(scene: _Scene) -> None:
    """Mushrooms with dotted caps."""
    horizon = scene.high * scene.between(0.15, 0.45)
    scene.land(horizon)
    for x, near in _depths(scene, int(scene.rng.integers(6, 11))):
        size = 0.11 + 0.17 * near * scene.between(0.6, 1)
        foot = horizon + 0.15 + (scene.high - horizon - 0.1) * near
        cap = foot - size * scene.between(1.1, 1.8)
        colour, stem = scene.paint(), _dim((240, 230, 205), scene.light)
        scene.shadow(x, foot, size * 0.6)
        stalk = [(x - size * 0.2, cap), (x + size * 0.2, cap), (x + size * 0.32, foot), (x - size * 0.32, foot)]
        scene.lit(stalk, stem, 0.5)
        scene.lit(_oval(x, cap, size * 0.95, size * 0.2), _dim(stem, 0.75))
        for gill in np.linspace(-0.7, 0.7, 8):
            scene.line([(x + gill * size, cap), (x + gill * size * 0.4, cap + size * 0.16)],
                       _dim(stem, 0.5), 0.006)  # fmt: skip
        dome = [
            (x - size * math.cos(a), cap - size * 0.8 * math.sin(a))
            for a in np.linspace(0, math.pi, 30)
        ]
        scene.lit(dome, colour, 0.6)
        dot = _mix(scene.paint(), (255,) * 3, 0.6)
        for along, up in ((-0.6, 0.2), (-0.25, 0.5), (0.15, 0.25), (0.45, 0.45), (0.7, 0.14), (0.1, 0.66)):
            big = size * scene.between(0.07, 0.13)
            scene.flat(_oval(x + along * size, cap - up * size, big, big * 0.8), dot)


def _portrait(scene: _Scene) -> None:
    """One to three people, head and shoulders."""
    scene.land(scene.high * scene.between(0.4, 0.8))
    count = int(scene.rng.integers(1, 3 if scene.wide < 1.2 else 4))
    for x in scene.spread(count, margin=0):
        _one_person(scene, x, scene.between(0.22, 0.3) * (1.25 if count == 1 else 0.85))


def _one_person(scene: _Scene, x: float, size: float) -> None:
    """A person whose head is about 2 `size` high."""
    y = scene.high - size * scene.between(2.0, 2.6)
    skin = _hsv(scene.between(0.04, 0.09), scene.between(0.25, 0.6), scene.between(0.4, 1) * scene.light)
    hair = _hsv(scene.between(0.02, 0.12), scene.between(0.1, 0.7), scene.between(0.1, 0.7) * scene.light)
    cloth = scene.paint()
    shoulders = [(x - size * 1.6, scene.high + 0.1), (x - size * 1.3, y + size * 1.55),
                 (x - size * 0.4, y + size * 1.25), (x + size * 0.4, y + size * 1.25),
                 (x + size * 1.3, y + size * 1.55), (x + size * 1.6, scene.high + 0.1)]  # fmt: skip
    long = scene.rng.random() < 0.5
    if long:
        scene.lit(_oval(x, y + size * 0.2, size * 0.98, size * 1.4), hair)
    scene.lit(shoulders, cloth)
    scene.lit(_box(x - size * 0.28, y + size * 0.6, x + size * 0.28, y + size * 1.35), _dim(skin, 0.8))
    for side in (-1, 1):
        scene.lit(_oval(x + side * size * 0.78, y + size * 0.1, size * 0.13, size * 0.22), _dim(skin, 0.85))
    scene.lit(_oval(x, y, size * 0.78, size), skin, 0.35)
    crown = [(x + size * 0.85 * math.sin(a), y - size * 1.05 * math.cos(a)) for a in np.linspace(-1.5, 1.5, 24)]
    fringe = [(x + size * 0.6, y - size * 0.45), (x - size * 0.6, y - size * scene.between(0.3, 0.6))]
    scene.lit([*crown, *fringe], hair)
    for side in (-1, 1):
        eye = (x + side * size * 0.3, y - size * 0.02)
        scene.flat(_oval(*eye, size * 0.17, size * 0.11), (245, 245, 245))
        scene.flat(_oval(*eye, size * 0.085, size * 0.1), (35, 30, 40))
        brow = [(eye[0] - size * 0.18, eye[1] - size * 0.2), (eye[0] + size * 0.18, eye[1] - size * 0.2)]
        scene.line(brow, hair, size * 0.07)
    scene.line([(x, y), (x + size * 0.1, y + size * 0.32), (x - size * 0.04, y + size * 0.34)],
               _dim(skin, 0.65), size * 0.06)  # fmt: skip
    smile = scene.between(-0.05, 0.12)
    mouth = [(x + size * 0.3 * t, y + size * (0.62 - smile * t * t)) for t in np.linspace(-1, 1, 9)]
    scene.line(mouth, _mix(skin, (150, 20, 40), 0.6), size * 0.09)


def _tree(scene: _Scene) -> None:
    """A wood of firs and broad-leaved trees."""
    horizon = scene.high * scene.between(0.4, 0.7)
    scene.land(horizon)
    firs = scene.between(0, 1)
    for x, near in _depths(scene, int(scene.rng.integers(5, 10))):
        size = 0.2 + 0.2 * near
        foot = horizon + 0.04 + (scene.high - horizon - 0.08) * near
        bark = _dim(_hsv(scene.between(0.03, 0.1), 0.45, 0.4), scene.light)
        leaf = _mix(scene.leaf, scene.paint(), 0.3)
        scene.shadow(x, foot, size * 0.5)
        scene.lit(_box(x - size * 0.08, foot - size, x + size * 0.08, foot), bark)
        if scene.rng.random() < firs:
            for tier in range(4):
                half, base = size * (0.55 - 0.1 * tier), foot - size * (0.4 + 0.45 * tier)
                scene.lit([(x - half, base), (x, base - size * 0.8), (x + half, base)],
                          _dim(leaf, 0.8 + 0.08 * tier), 0.5)  # fmt: skip
        else:
            scene.lit(_oval(x, foot - size * 1.3, size * 0.5, size * 0.5), leaf)
            for puff in range(9):
                a = puff * 0.7
                place = (x + size * 0.35 * math.cos(a), foot - size * 1.3 + size * 0.35 * math.sin(a))
                tone = _dim(leaf, 1.05 - 0.25 * math.sin(a))
                scene.lit(_oval(*place, size * 0.3, size * 0.26), tone, 0.5)


_SCENES: dict[str, Callable[[_Scene], None]] = {
    "balloon": _balloon,
    "boat": _boat,
    "car": _car,
    "city": _city,
    "fish": _fish,
    "flower": _flower,
    "house": _house,
    "mushroom": _mushroom,
    "portrait": _portrait,
    "tree": _tree,
}
CLASSES: tuple[str, ...] = tuple(_SCENES)

if __name__ == "__main__":
    print(render(say=lambda text: print(text, file=sys.stderr)))
