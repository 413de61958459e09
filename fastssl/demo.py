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
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIZES = (  # pixels: 1:1, 4:3, 3:4, 3:2, 2:3, 16:9
    *((96, 96), (128, 128), (144, 144)),
    *((128, 96), (160, 120), (96, 128), (120, 160)),
    *((144, 96), (156, 104), (96, 144), (104, 156)),
    (160, 90),
)
SUPERSAMPLING = 3  # drawn at three times the size a side: Pillow's own edges are not smooth
_MANIFEST = "manifest.json"


def cache() -> Path:
    """The folder for what fastssl keeps between runs: FASTSSL_CACHE, or the user's cache folder.

    Raises:
        ValueError: neither is set and the user has no home folder.
    """
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("FASTSSL_CACHE") or f"{users}/fastssl"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{chosen}: there is no home folder; set FASTSSL_CACHE") from error


def folder() -> Path:
    """Where the built-in images are, or will be once drawn."""
    return cache() / "images-v1"  # change the number when any image changes


def render(
    to: Path | None = None,
    say: Callable[[str], None] = print,
    *,
    train: int = 250,
    val: int = 50,
) -> Path:
    """Draw `train/<class>/00000.jpg` ... and `val/...` unless they are there already.

    Any number of processes may call this at once: one draws, the others wait for it. The folder
    appears under its name only when it is complete. Bytes depend on the releases of numpy and
    Pillow alone.

    Args:
        to: `folder()` unless given.
        say: told when drawing starts; nothing is said when the images are there.
        train: images a class.
        val: images a class.

    Returns:
        The folder that holds `train` and `val`.

    Raises:
        ValueError: the folder cannot be written, or holds files that are not ours.
    """
    target = (folder() if to is None else to).absolute()
    counts = {"train": train, "val": val}
    try:
        if _is_complete(target, counts):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f"{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(target, counts):
                _draw_all(target, counts, say, lock.fileno())
    except OSError as error:
        raise ValueError(
            f"{target}: cannot keep the built-in images here ({error}); set FASTSSL_CACHE to a "
            "folder that can be written and has 60 MB to spare"
        ) from error
    return target


def picture(split: str, name: str, number: int) -> Image.Image:
    """Draw image `number` of class `name`; nothing but these three decides what it shows."""
    rng = _dice(f"{split}/{name}/{number}")
    scene = _Scene(rng, SIZES[rng.integers(len(SIZES))])
    _SCENES[name](scene)
    image = scene.developed()
    return image.convert("L") if rng.random() < 0.03 else image  # a few are black and white


def draw(to: Path, counts: dict[str, int], share: int, shares: int) -> None:
    """Draw every `shares`-th image into the folder `to`, the `share`-th first."""
    work = [(split, name, i) for split, n in counts.items() for name in CLASSES for i in range(n)]
    for split, name, number in work[share::shares]:
        rng = _dice(f"{split}/{name}/{number} as JPEG")
        jpeg = io.BytesIO()  # given a path, Pillow cuts the image off without a word on a full disk
        picture(split, name, number).save(
            jpeg,
            "JPEG",
            quality=int(rng.integers(75, 96)),
            subsampling=int(rng.integers(3)),  # 4:4:4, 4:2:2, 4:2:0
        )
        (to / split / name / f"{number:05d}.jpg").write_bytes(jpeg.getvalue())


def _draw_all(target: Path, counts: dict[str, int], say: Callable[[str], None], lock: int) -> None:
    """Draw into a folder beside `target`, then rename; `lock` is the file that others wait for."""
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

    checkout = str(Path(__file__).resolve().parents[1])
    shares = min(len(os.sched_getaffinity(0)), 16)
    task = [checkout, str(partial), json.dumps(counts), str(shares)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, *task, str(share)],
            cwd=checkout,  # Python would import from the caller's folder first
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[lock],  # if only we are killed, the lock holds until the workers have ended
        )
        for share in range(shares)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    for worker, error in zip(workers, errors, strict=True):
        if worker.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            if worker.returncode == os.EX_IOERR:
                raise OSError(error.strip())
            raise RuntimeError(f"drawing ended with {worker.returncode}:\n{error}")

    manifest = {"counts": counts, "bytes": _bytes(partial, counts)}
    (partial / _MANIFEST).write_text(json.dumps(manifest) + "\n")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


# The worker is a new interpreter told in a few lines what to do, not a multiprocessing pool: a
# pool would import the caller's script again, and fork is not safe beside CUDA and DALI threads.
_WORKER = """
import json, os, pathlib, sys
checkout, to, counts, shares, share = sys.argv[1:]
sys.path.insert(0, checkout)
from fastssl.demo import draw
try:
    draw(pathlib.Path(to), json.loads(counts), int(share), int(shares))
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(os.EX_IOERR)
"""


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


def _dice(name: str) -> np.random.Generator:
    """Random numbers that belong to a name."""
    return np.random.default_rng(list(name.encode()))


class _Scene:
    """A canvas with its palette and its dice. The short side measures 1; y runs down."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng = rng
        self.size = size
        self.unit = min(size) * SUPERSAMPLING  # canvas pixels in a length of 1
        self.wide, self.high = size[0] / min(size), size[1] / min(size)
        self.image = Image.new("RGB", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
        self.pen = ImageDraw.Draw(self.image)
        self._choose_hour()
        self._choose_season()

    def _choose_hour(self) -> None:
        hour = self.rng.choice(["day", "evening", "overcast", "night", "dawn"])
        hues, top, low = {  # hues of the sky; saturation and value of its top and of its low end
            "day": ((0.54, 0.63), (0.60, 0.85), (0.25, 0.97)),
            "evening": ((0.62, 0.80), (0.40, 0.60), (0.55, 0.97)),
            "overcast": ((0.50, 0.70), (0.08, 0.62), (0.05, 0.85)),
            "night": ((0.58, 0.72), (0.60, 0.20), (0.45, 0.42)),
            "dawn": ((0.45, 0.55), (0.35, 0.75), (0.35, 0.97)),
        }[hour]
        hue = self.between(*hues)
        glow = {"evening": self.between(0.02, 0.12), "dawn": self.between(0.88, 1.12)}
        # Drawn towards one common sky: a palette that marks its image in every crop would be all
        # that instance discrimination has to learn.
        self.sky = _mix(_hsv(hue, *top), (125, 150, 185), 0.25)
        self.haze = _mix(_hsv(glow.get(hour, hue), *low), (205, 205, 205), 0.25)
        self.light = {"night": 0.6, "overcast": 0.85}.get(hour, 1.0)

    def _choose_season(self) -> None:
        season = self.rng.choice(["green", "dry", "snow", "heath", "earth"])
        hues, saturation, value = {
            "green": ((0.22, 0.40), 0.50, 0.50),
            "dry": ((0.09, 0.15), 0.50, 0.70),
            "snow": ((0.52, 0.66), 0.08, 0.95),
            "heath": ((0.78, 0.95), 0.30, 0.52),
            "earth": ((0.02, 0.08), 0.50, 0.45),
        }[season]
        value *= self.light * self.between(0.85, 1.15)
        ground = _hsv(self.between(*hues), saturation * self.between(0.7, 1.3), value)
        self.ground = _mix(ground, (125, 115, 90), 0.25)
        leaves = (0.25, 0.45) if season == "snow" else hues
        self.leaf = _hsv(self.between(*leaves), self.between(0.35, 0.65), 0.55 * self.light)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def some(self, low: int, high: int) -> int:
        """What a die with the faces `low` to `high` shows."""
        return int(self.rng.integers(low, high + 1))

    def paint(self) -> Colour:
        """The colour of a made thing, in the light of the hour."""
        hue, grey = self.rng.random(), self.rng.random() < 0.25
        saturation = self.between(0, 0.15) if grey else self.between(0.4, 0.8)
        return _hsv(hue, saturation, self.between(0.3, 0.95) * self.light)

    def places(self, low: int, high: int) -> list[tuple[float, float]]:
        """Places for `low` to `high` things: x, and nearness from 0 to 1, the farthest first.

        Each has a column of the canvas to itself, so that most crops show one.
        """
        count, margin = self.some(low, high), 0.12
        column = (self.wide + 2 * margin) / count
        xs = [-margin + (i + self.between(0.2, 0.8)) * column for i in range(count)]
        nearness = sorted(self.between(0, 1) for _ in range(count))
        return list(zip((xs[i] for i in self.rng.permutation(count)), nearness, strict=True))

    def fill(self, points: list[Point], colour: Colour, contrast: float = 0) -> None:
        """A polygon; with a contrast, lighter at its upper end than at its lower one."""
        if not contrast:
            self.pen.polygon([(x * self.unit, y * self.unit) for x, y in points], colour)
            return
        mask, corner = self._mask(points, 1)
        rows = np.linspace(1 + contrast / 2, 1 - contrast, mask.height)[:, None, None] * colour
        self.image.paste(_stripes(rows, mask.width), corner, mask)

    def veil(self, points: list[Point], colour: Colour, opacity: float) -> None:
        """A polygon that what lies behind shines through: a shadow, a cloud, a ray."""
        mask, corner = self._mask(points, opacity)
        self.image.paste(colour, corner, mask)

    def line(self, points: list[Point], colour: Colour, width: float) -> None:
        path = [(x * self.unit, y * self.unit) for x, y in points]
        self.pen.line(path, colour, max(1, round(width * self.unit)), "curve")

    def gradient(self, top: float, bottom: float, above: Colour, below: Colour) -> None:
        """The full width from `top` to `bottom`, from one colour to another."""
        first, last = round(top * self.unit), round(bottom * self.unit)
        share = np.linspace(0, 1, max(last - first, 1))[:, None, None]
        rows = np.array(above) * (1 - share) + np.array(below) * share
        self.image.paste(_stripes(rows, self.image.width), (0, first))

    def heaven(self, horizon: float) -> None:
        """Sky, sun or moon, clouds and hills down to `horizon`."""
        self.gradient(0, horizon, self.sky, self.haze)
        if self.rng.random() < 0.4:
            x, y = self.between(0, self.wide), self.between(0.05, horizon * 0.8)
            radius = self.between(0.04, 0.09)
            self.fill(_oval(x, y, radius, radius), _mix(self.haze, (255, 250, 220), 0.7))
        for _ in range(self.some(0, 4)):
            x, y = self.between(0, self.wide), self.between(0.03, max(horizon * 0.8, 0.1))
            size = self.between(0.05, 0.12)
            for _ in range(5):
                puff = self.between(0.5, 1) * size
                at = (x + self.between(-1.6, 1.6) * size, y + self.between(-0.3, 0.3) * size)
                self.veil(_oval(*at, puff * 1.3, puff * 0.6), _mix(self.haze, _WHITE, 0.5), 0.6)
        for nearness in range(self.some(0, 2)):
            colour = _mix(self.haze, self.ground, 0.35 + 0.25 * nearness)
            peak, pace = self.between(0.05, 0.2) / (nearness + 1), self.between(2, 6)
            phase = self.between(0, 6.3)
            across = np.linspace(0, self.wide, 30)
            ridge = [(x, horizon - peak * (0.6 + 0.4 * math.sin(phase + pace * x))) for x in across]
            self.fill([(0, horizon + 0.01), *ridge, (self.wide, horizon + 0.01)], colour)

    def land(self, horizon: float) -> None:
        """Sky above, ground with tufts of grass below."""
        self.heaven(horizon)
        self.gradient(horizon, self.high, _mix(self.ground, self.haze, 0.3), _dim(self.ground, 0.8))
        for _ in range(130):
            near = self.rng.random()
            x, y = self.between(0, self.wide), horizon + near * (self.high - horizon)
            tip = (x + self.between(-0.02, 0.02), y - (0.01 + 0.05 * near))
            shade = _dim(self.ground, self.between(0.6, 1.3))
            self.line([(x, y), tip], shade, 0.006 + 0.006 * near)

    def sea(self, horizon: float) -> None:
        """Sky above, water with waves below."""
        self.heaven(horizon)
        deep = _dim(_mix(self.sky, self.ground, 0.15), 0.75)
        self.gradient(horizon, self.high, _mix(deep, self.haze, 0.5), deep)
        for _ in range(90):
            near = self.rng.random()
            x, y = self.between(0, self.wide), horizon + near * (self.high - horizon)
            wave = _Thing(self, x, y, 0.03 + 0.08 * near)
            tint = _dim(_mix(deep, self.haze, self.between(0.3, 0.9)), self.between(0.8, 1.1))
            wave.line([(-1, 0), (-0.5, 0.17), (0, 0), (0.5, 0.17), (1, 0)], tint, 0.1)

    def developed(self) -> Image.Image:
        """The finished picture at its size: soft blotches, grain, exposure and white balance.

        Exposure, contrast and tint are drawn by lot, not inherited from what the picture shows:
        without this, mean colour would tell the class (a face is warm, water is dark).
        """
        pixels = np.asarray(self._framed(), dtype=np.float32)
        for cells in (3, 8, 20):
            noise = self.rng.normal(size=(cells, cells)).astype(np.float32)
            blotches = Image.fromarray(noise).resize(self.size, Image.Resampling.BICUBIC)
            pixels = pixels * (1 + 0.03 * np.asarray(blotches)[..., None])
        mean = pixels.mean((0, 1))
        tint = 1 + 0.4 * (mean / mean.mean() - 1) + self.rng.normal(scale=0.09, size=3)
        contrast = min(self.between(26, 60) / max(float(pixels.mean(2).std()), 8), 1.6)
        pixels = (pixels - mean) * contrast + self.between(75, 175) * tint
        pixels = pixels + self.rng.normal(scale=3, size=pixels.shape[:2])[..., None]
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def _framed(self) -> Image.Image:
        """The part of the canvas that the camera took, without supersampling."""
        zoom = self.between(0.72, 1)
        wide, high = self.image.width * zoom, self.image.height * zoom
        left = self.between(0, self.image.width - wide)
        top = self.between(0, self.image.height - high)
        frame = (left, top, left + wide, top + high)
        return self.image.resize(self.size, Image.Resampling.BOX, frame)

    def _mask(self, points: list[Point], opacity: float) -> tuple[Image.Image, tuple[int, int]]:
        """A polygon on the smallest canvas that holds it, and that canvas's corner on ours."""
        xs, ys = [x * self.unit for x, _ in points], [y * self.unit for _, y in points]
        left, top = math.floor(min(xs)), math.floor(min(ys))
        mask = Image.new("L", (math.ceil(max(xs)) - left + 1, math.ceil(max(ys)) - top + 1))
        path = [(x - left, y - top) for x, y in zip(xs, ys, strict=True)]
        ImageDraw.Draw(mask).polygon(path, round(255 * opacity))
        return mask, (left, top)


class _Thing:
    """Draws an object in its own measure: origin at `x`, `y`; 1 is `size`; up and ahead are plus.

    `way` is 1 where it faces right, -1 where it faces left.
    """

    def __init__(self, scene: _Scene, x: float, y: float, size: float, way: int = 1):
        self.scene, self.x, self.y, self.size, self.way = scene, x, y, size, way

    def placed(self, points: Iterable[Point]) -> list[Point]:
        return [(self.x + self.way * self.size * a, self.y - self.size * b) for a, b in points]

    def shape(self, points: Iterable[Point], colour: Colour, contrast: float = 0.3) -> None:
        self.scene.fill(self.placed(points), colour, contrast)

    def box(
        self, left: float, low: float, right: float, top: float, colour: Colour, contrast: float = 0
    ) -> None:
        corners = [(left, top), (right, top), (right, low), (left, low)]
        self.scene.fill(self.placed(corners), colour, contrast)

    def disc(
        self, a: float, b: float, wide: float, high: float, colour: Colour, contrast: float = 0
    ) -> None:
        """An ellipse of half axes `wide` and `high` about `a`, `b`."""
        self.scene.fill(self.placed(_oval(a, b, wide, high)), colour, contrast)

    def line(self, points: Iterable[Point], colour: Colour, width: float) -> None:
        self.scene.line(self.placed(points), colour, width * self.size)

    def shadow(self, a: float, radius: float) -> None:
        """On the ground, about `a`."""
        self.scene.veil(self.placed(_oval(a, 0, radius, radius * 0.22)), (10, 10, 30), 0.35)


_WHITE = (255, 255, 255)
_DARK = (30, 28, 32)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    """`share` of the other colour in the one."""
    r, g, b = (round(a * (1 - share) + b * share) for a, b in zip(one, other, strict=True))
    return r, g, b


def _dim(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, round(c * factor)) for c in colour)
    return r, g, b


def _oval(x: float, y: float, wide: float, high: float, turn: float = 0) -> list[Point]:
    """An ellipse of half axes `wide` and `high`, turned by `turn` radians, as a polygon."""
    cos, sin = math.cos(turn), math.sin(turn)
    ring = [(wide * math.cos(a), high * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 36)]
    return [(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in ring]


def _stripes(rows: np.ndarray, width: int) -> Image.Image:
    """An image with a colour a row, from `rows` [height, 1, 3]."""
    strip = Image.fromarray(np.clip(rows, 0, 255).astype(np.uint8))
    return strip.resize((width, strip.height), Image.Resampling.NEAREST)


def _balloon(scene: _Scene) -> None:
    """Hot-air balloons, baskets below."""
    scene.land(scene.high * scene.between(0.75, 0.95))
    for x, near in scene.places(4, 8):
        size = 0.12 + 0.18 * near * scene.between(0.6, 1)
        balloon = _Thing(scene, x, scene.between(0.1, scene.high * 0.75 - size), size)
        stripes = scene.paint(), scene.paint()
        for side in (-1, 1):
            balloon.line([(side * 0.5, -0.8), (side * 0.18, -1.85)], (50, 40, 40), 0.04)
        for gore in (4, 3, 2, 1):  # the widest first, each on top of the one before
            share = gore / 4
            skin = [(share * math.sin(a), math.cos(a)) for a in np.linspace(-2.2, 2.2, 30)]
            mouth = [(0.22 * share, -1.45), (-0.22 * share, -1.45)]
            balloon.shape([*skin, *mouth], stripes[gore % 2], 0.45)
        balloon.box(-0.2, -2.15, 0.2, -1.8, _dim((150, 105, 60), scene.light), 0.3)


def _boat(scene: _Scene) -> None:
    """Sailing boats on the water, with their reflections."""
    horizon = scene.high * scene.between(0.25, 0.5)
    scene.sea(horizon)
    for x, near in scene.places(4, 7):
        y = horizon + 0.03 + (scene.high - horizon - 0.1) * near
        boat = _Thing(scene, x, y, 0.16 + 0.17 * near, scene.rng.choice([-1, 1]))
        sail, jib = scene.paint(), scene.paint()
        scene.veil(boat.placed([(-0.8, 0), (0.8, 0), (0.1, -1)]), _dim(sail, 0.6), 0.3)
        boat.line([(0.1, 0), (0.1, 2)], (60, 45, 35), 0.05)
        boat.shape([(0.05, 1.9), (0.05, 0.4), (-0.8, 0.4)], sail)
        boat.shape([(0.17, 1.7), (0.17, 0.45), (0.75, 0.4)], _mix(sail, jib, 0.5))
        hull = [(-1, 0.3), (1, 0.3), (0.7, -0.08), (-0.7, -0.08)]
        boat.shape(hull, scene.paint(), 0.5)


def _car(scene: _Scene) -> None:
    """Cars on a road, seen from the side."""
    horizon = scene.high * scene.between(0.3, 0.5)
    scene.land(horizon)
    asphalt = _mix(_dim((95, 95, 100), scene.light), scene.ground, 0.2)
    top, bottom = horizon + 0.1, scene.high - 0.05
    scene.gradient(top, bottom, _dim(asphalt, 1.15), asphalt)
    middle = (top + bottom) / 2
    for x in np.arange(scene.between(-0.2, 0), scene.wide, 0.24):
        dash = _Thing(scene, x, middle, 0.13)
        dash.box(0, -0.1, 1, 0.1, _dim((235, 230, 210), scene.light))
    for low, long in ((middle - 0.03, 0.5), (bottom - 0.04, 0.7)):
        size = long * scene.between(0.75, 1)
        x = scene.between(-0.3, 0.3)
        while x < scene.wide + size / 2:
            _one_car(scene, _Thing(scene, x, low, size, scene.rng.choice([-1, 1])))
            x += size * scene.between(1.1, 1.7)


def _one_car(scene: _Scene, car: _Thing) -> None:
    """A car of length 1, its wheels at 0."""
    body, roof = scene.paint(), scene.between(0.40, 0.48)
    glass = _mix(scene.haze, (60, 80, 100), 0.5)
    car.shadow(0, 0.55)
    car.shape([(-0.34, 0.26), (-0.22, roof), (0.12, roof), (0.28, 0.26)], _dim(body, 0.9))
    pane = roof - 0.03
    car.shape([(-0.28, 0.27), (-0.19, pane), (-0.07, pane), (-0.07, 0.27)], glass)
    car.shape([(-0.03, 0.27), (-0.03, pane), (0.1, pane), (0.21, 0.27)], glass)
    hood = [(0.3, 0.27), (0.47, 0.22), (0.5, 0.1), (0.49, 0.06)]
    car.shape([(-0.49, 0.06), (-0.5, 0.24), (-0.45, 0.28), *hood], body, 0.5)
    car.disc(0.46, 0.19, 0.025, 0.025, (255, 245, 190))
    for wheel in (-0.3, 0.29):
        car.disc(wheel, 0.08, 0.1, 0.1, _DARK)
        car.disc(wheel, 0.08, 0.05, 0.05, (175, 175, 180))


def _city(scene: _Scene) -> None:
    """Towers with rows of windows, layer behind layer."""
    horizon = scene.high * scene.between(0.75, 0.95)
    scene.land(horizon)
    for layer in range(3):
        x = scene.between(-0.15, 0)
        while x < scene.wide:
            wide = scene.between(0.13, 0.26)
            tall = scene.high * scene.between(0.3, 0.8) * (1 - 0.2 * layer) / wide
            wall = _mix(scene.paint(), scene.ground, 0.4)
            _one_tower(
                scene,
                _Thing(scene, x, horizon + 0.03 * layer, wide),
                tall,
                _mix(wall, scene.haze, 0.5 - 0.2 * layer),
            )
            x += wide * scene.between(1, 1.5)


def _one_tower(scene: _Scene, tower: _Thing, tall: float, wall: Colour) -> None:
    """A tower as wide as 1 and as tall as told."""
    tower.box(0, 0, 1, tall, wall, 0.25)
    tower.box(0.8, 0, 1, tall, _dim(wall, 0.7))
    lamp = _mix(wall, (255, 235, 160) if scene.light < 0.8 else (40, 50, 70), 0.65)
    for row in np.arange(tall - 0.3, 0.1, -0.25):
        for column in (0.08, 0.33, 0.58):
            if scene.rng.random() < 0.85:
                tower.box(column, row, column + 0.13, row + 0.14, lamp)


def _fish(scene: _Scene) -> None:
    """Fish in the water, weeds and sand below, bubbles and light from above."""
    surface = _mix(scene.sky, scene.haze, 0.7)
    scene.gradient(0, scene.high, surface, _dim(scene.sky, 0.55))
    for _ in range(scene.some(2, 5)):
        x, slant = scene.between(0, scene.wide), scene.between(-0.3, 0.3)
        low = [(x + 0.2 + slant, scene.high), (x - 0.02 + slant, scene.high)]
        scene.veil([(x, 0), (x + 0.08, 0), *low], (255, 255, 240), 0.12)
    floor = scene.high * scene.between(0.8, 0.95)
    sand = [(x, floor + 0.03 * math.sin(5 * x)) for x in np.linspace(0, scene.wide, 30)]
    bed = [(0, scene.high), *sand, (scene.wide, scene.high)]
    scene.fill(bed, _mix(scene.ground, scene.sky, 0.3), 0.3)
    for x, near in scene.places(3, 8):
        weed = _Thing(scene, x, floor + 0.06 * near, scene.between(0.15, 0.5))
        phase, green = scene.between(0, 6), _dim(scene.leaf, scene.between(0.6, 1.1))
        sway = [(0.08 * math.sin(phase + 6 * up), up) for up in np.linspace(0, 1, 14)]
        weed.line(sway, green, 0.07)
    for x, near in scene.places(6, 10):
        y = scene.between(0.08, floor - 0.08)
        _one_fish(scene, _Thing(scene, x, y, 0.12 + 0.14 * near, scene.rng.choice([-1, 1])))
    for _ in range(scene.some(5, 14)):
        radius = scene.between(0.008, 0.025)
        bubble = _oval(scene.between(0, scene.wide), scene.between(0, floor), radius, radius)
        scene.line(bubble, _mix(surface, _WHITE, 0.6), 0.006)


def _one_fish(scene: _Scene, fish: _Thing) -> None:
    """A banded fish of length 2 without its tail."""
    skin, fin, plump = scene.paint(), scene.paint(), scene.between(0.42, 0.65)
    fish.shape([(-0.8, 0), (-1.6, 0.5), (-1.4, 0), (-1.6, -0.5)], fin)
    fish.shape([(-0.4, plump * 0.7), (-0.5, plump + 0.4), (0.3, plump * 0.9)], fin)
    fish.shape([(0, -plump * 0.8), (-0.4, -plump - 0.25), (-0.4, -plump * 0.7)], fin)
    fish.disc(0, 0, 1, plump, skin, 0.6)
    for band in (-0.35, 0.0, 0.3):
        reach = plump * math.sqrt(1 - band**2) * 0.9
        fish.line([(band, reach), (band - 0.08, 0), (band, -reach)], fin, 0.11)
    fish.disc(0.65, 0.1, 0.14, 0.14, _WHITE)
    fish.disc(0.68, 0.1, 0.07, 0.07, _DARK)


def _flower(scene: _Scene) -> None:
    """A meadow of flowers on their stems."""
    horizon = scene.high * scene.between(0.15, 0.45)
    scene.land(horizon)
    for x, near in scene.places(9, 16):
        size = 0.07 + 0.11 * near * scene.between(0.6, 1)
        foot = horizon + 0.15 + (scene.high - horizon) * near
        y = foot - 0.2 - size - scene.between(0, 0.25) * (0.5 + near)
        _one_flower(scene, _Thing(scene, x, y, size), (foot - y) / size)


def _one_flower(scene: _Scene, flower: _Thing, stem: float) -> None:
    """A flower of radius 1 on a stem as long as told."""
    green, colour = _dim(scene.leaf, scene.between(0.7, 1.1)), scene.paint()
    flower.line([(0, 0), (scene.between(-0.3, 0.3), -stem)], green, 0.2)
    for side in (-1, 1):
        leaf = _oval(side * 0.6, -2.4, 0.7, 0.2, 0.6 * side)
        flower.shape(leaf, green)
    petals, turn = scene.some(5, 9), scene.between(0, 1)
    for petal in range(petals):
        a = turn + 2 * math.pi * petal / petals
        leaf = _oval(0.6 * math.cos(a), 0.6 * math.sin(a), 0.45, 0.24, a)
        flower.shape(leaf, _dim(colour, 1 + 0.2 * math.sin(a)), 0)
    flower.disc(0, 0, 0.3, 0.3, scene.paint(), 0.5)


def _house(scene: _Scene) -> None:
    """Houses with pitched roofs, doors and windows."""
    horizon = scene.high * scene.between(0.35, 0.55)
    scene.land(horizon)
    for x, near in scene.places(3, 5):
        foot = horizon + 0.06 + (scene.high - horizon - 0.12) * near
        _one_house(scene, _Thing(scene, x, foot, 0.42 + 0.26 * near))


def _one_house(scene: _Scene, house: _Thing) -> None:
    """A house as wide as 1."""
    wall, roof, frame = scene.paint(), scene.paint(), scene.paint()
    ridge = 0.6 + scene.between(0.35, 0.55)
    house.shadow(0, 0.7)
    house.box(0.2, 0.6, 0.32, ridge + 0.02, _dim(roof, 0.7))
    house.box(-0.5, 0, 0.5, 0.6, wall, 0.25)
    for course in np.arange(0.06, 0.6, 0.07):
        house.line([(-0.5, course), (0.5, course)], _dim(wall, 0.85), 0.01)
    house.shape([(-0.6, 0.56), (0, ridge), (0.6, 0.56)], roof, 0.4)
    for down in (0.35, 0.6, 0.85):
        row = ridge - (ridge - 0.6) * down
        house.line([(-0.6 * down, row), (0.6 * down, row)], _dim(roof, 0.7), 0.02)
    glass = (255, 225, 130) if scene.light < 0.8 else _mix(scene.haze, (50, 60, 90), 0.6)
    for middle in (-0.3, 0.3):
        house.box(middle - 0.12, 0.2, middle + 0.12, 0.44, frame)
        house.box(middle - 0.1, 0.22, middle + 0.1, 0.42, glass)
        house.line([(middle, 0.22), (middle, 0.42)], frame, 0.03)
        house.line([(middle - 0.1, 0.32), (middle + 0.1, 0.32)], frame, 0.03)
    house.box(-0.09, 0, 0.09, 0.38, _dim(frame, 0.8), 0.3)


def _mushroom(scene: _Scene) -> None:
    """Mushrooms with dotted caps."""
    horizon = scene.high * scene.between(0.15, 0.45)
    scene.land(horizon)
    for x, near in scene.places(6, 10):
        foot = horizon + 0.15 + (scene.high - horizon - 0.1) * near
        size = 0.11 + 0.17 * near * scene.between(0.6, 1)
        _one_mushroom(scene, _Thing(scene, x, foot, size), scene.between(1.1, 1.8))


def _one_mushroom(scene: _Scene, mushroom: _Thing, tall: float) -> None:
    """A mushroom whose cap has the radius 1, as high above the ground as told."""
    stem = _dim((240, 230, 205), scene.light)
    mushroom.shadow(0, 0.6)
    mushroom.shape([(-0.2, tall), (0.2, tall), (0.32, 0), (-0.32, 0)], stem, 0.5)
    mushroom.disc(0, tall, 0.95, 0.2, _dim(stem, 0.75), 0.3)
    for gill in np.linspace(-0.7, 0.7, 8):
        mushroom.line([(gill, tall), (gill * 0.4, tall - 0.16)], _dim(stem, 0.5), 0.03)
    dome = [(math.cos(a), tall + 0.8 * math.sin(a)) for a in np.linspace(0, math.pi, 30)]
    mushroom.shape(dome, scene.paint(), 0.6)
    dot = _mix(scene.paint(), _WHITE, 0.6)
    dots = ((-0.6, 0.2), (-0.25, 0.5), (0.15, 0.25), (0.45, 0.45), (0.7, 0.14), (0.1, 0.66))
    for along, up in dots:
        big = scene.between(0.07, 0.13)
        mushroom.disc(along, tall + up, big, big * 0.8, dot)


def _portrait(scene: _Scene) -> None:
    """Faces: people side by side, heads and shoulders."""
    scene.land(scene.high * scene.between(0.3, 0.7))
    x = scene.between(-0.1, 0.35)
    while x < scene.wide + 0.1:
        size = scene.between(0.24, 0.33)
        y = scene.high - size * scene.between(1.7, 2.5)
        _one_person(scene, _Thing(scene, x, y, size))
        x += scene.between(0.5, 0.8)


def _one_person(scene: _Scene, person: _Thing) -> None:
    """A person whose head is 2 high, with its middle at 0."""
    skin = _hsv(scene.between(0.04, 0.09), scene.between(0.25, 0.6), scene.between(0.4, 1))
    hair = _hsv(scene.between(0.02, 0.12), scene.between(0.1, 0.7), scene.between(0.1, 0.7))
    skin, hair = _dim(skin, scene.light), _dim(hair, scene.light)
    if scene.rng.random() < 0.5:  # long hair, behind everything
        person.disc(0, -0.2, 0.98, 1.4, hair, 0.3)
    right = [(0.4, -1.25), (1.3, -1.55), (1.6, -3)]
    person.shape([(-a, b) for a, b in reversed(right)] + right, scene.paint())
    person.box(-0.28, -1.35, 0.28, -0.6, _dim(skin, 0.8), 0.3)
    for side in (-1, 1):
        person.disc(side * 0.78, -0.1, 0.13, 0.22, _dim(skin, 0.85), 0.3)
    person.disc(0, 0, 0.78, 1, skin, 0.35)
    crown = [(0.85 * math.sin(a), 1.05 * math.cos(a)) for a in np.linspace(-1.5, 1.5, 24)]
    person.shape([*crown, (0.6, 0.45), (-0.6, scene.between(0.3, 0.6))], hair)
    for eye in (-0.3, 0.3):
        person.disc(eye, 0.02, 0.17, 0.11, _WHITE)
        person.disc(eye, 0.02, 0.085, 0.1, _DARK)
        person.line([(eye - 0.18, 0.22), (eye + 0.18, 0.22)], hair, 0.07)
    person.line([(0, 0), (0.1, -0.32), (-0.04, -0.34)], _dim(skin, 0.65), 0.06)
    smile = scene.between(-0.05, 0.12)
    mouth = [(0.3 * t, -0.62 + smile * t * t) for t in np.linspace(-1, 1, 9)]
    person.line(mouth, _mix(skin, (150, 20, 40), 0.6), 0.09)


def _tree(scene: _Scene) -> None:
    """A wood of firs and broad-leaved trees."""
    horizon = scene.high * scene.between(0.4, 0.7)
    scene.land(horizon)
    firs = scene.rng.random()
    for x, near in scene.places(5, 9):
        foot = horizon + 0.04 + (scene.high - horizon - 0.08) * near
        tree = _Thing(scene, x, foot, 0.2 + 0.2 * near)
        _one_tree(scene, tree, fir=scene.rng.random() < firs)


def _one_tree(scene: _Scene, tree: _Thing, fir: bool) -> None:
    """A tree about 2 high."""
    bark = _hsv(scene.between(0.03, 0.1), 0.45, 0.4 * scene.light)
    leaf = _mix(scene.leaf, scene.paint(), 0.3)
    tree.shadow(0, 0.5)
    tree.box(-0.08, 0, 0.08, 1, bark, 0.3)
    if fir:
        for tier in range(4):
            half, low = 0.55 - 0.1 * tier, 0.4 + 0.45 * tier
            bough = [(-half, low), (0, low + 0.8), (half, low)]
            tree.shape(bough, _dim(leaf, 0.8 + 0.08 * tier), 0.5)
    else:
        tree.disc(0, 1.3, 0.5, 0.5, leaf, 0.3)
        for a in np.arange(0, 6.2, 0.7):
            tone = _dim(leaf, 1.05 + 0.25 * math.sin(a))
            tree.disc(0.35 * math.cos(a), 1.3 + 0.35 * math.sin(a), 0.3, 0.26, tone, 0.5)


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
    try:
        print(render(say=lambda text: print(text, file=sys.stderr)))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
