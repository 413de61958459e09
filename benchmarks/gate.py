"""Whether a contender does the task that it is measured at: what its pixels show, against labels.

Each contender is given images whose colours say where in which image a pixel lies: red counts
columns, green counts rows, blue tells the image. From a frame of its output follows the part of the
image that it shows, mirrored or not, turned by how much. That is held against the labels, and over
a batch against the ranges and probabilities of the options. Colours are off for that; a second
batch tells the share of gray frames, and a third, made as the recipe says, whether colours change.
Where a graph blurs, waves in the place of blue show in another batch how far each frame is blurred.
"""

import dataclasses
import functools
import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks import promises
from benchmarks.promises import Frames, Resized, Task, Warp

# The batch of all images of `paths`, as fastssl.loader.Loader gives it: [B, ...]; `index` is the
# position in `paths`, each once, in any order.
Make = Callable[[Sequence[str], Any], Mapping[str, Tensor]]

IMAGES = 64  # enough to miss a flip or a gray of 0.2 once in a million times
ALARM = 1e-5  # a share that is so improbable is called wrong
SIZES = ((240, 320), (320, 240))  # height and width of the images, by turns
LOW, SPAN = 20, 215  # of red and green: the border of a picture, and what its width adds
BLUES = tuple(range(40, 216, 25))  # of the images, over and over; a black border has none
WAVES = 90  # how far blue goes up and down where it shows blur
# Pixels of an image and a side of frame that a wave is long: of the frame, then, 5 to 14 pixels.
WAVE = 1700
SEEN = 0.5  # pixels: of less wide a blur a resize that is not quite as expected could be taken for
OFF: dict[str, Any] = {
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grayscale"), 0.0),
    **dict.fromkeys(("components", "powers", "factors"), (1.0, 1.0)),
    **dict.fromkeys(("offsets", "channel_drop"), 0.0),
}


class UnfitError(ValueError):
    """A contender does not do its task; the message says what did not fit."""


def check(contender: str, graph: str, options: Any, make: Make, *, images: int = IMAGES) -> None:
    """Makes up to four batches and looks at them.

    Args:
        contender: who is checked; named in the message.
        graph: the module of the task, "pipelines.pirl_jigsaw".
        options: its Options, as the recipe sets them.
        make: the contender.
        images: in a batch; fewer notice less.

    Raises:
        UnfitError: says of which contender and graph what did not fit.
        ValueError: there is nothing to check such a graph by, or `make` refuses it.
    """
    try:
        task = promises.of(graph, options)
        with tempfile.TemporaryDirectory() as folder:
            paths = _write_images(Path(folder), images)
            known = {field.name for field in dataclasses.fields(options)}
            off = {name: value for name, value in OFF.items() if name in known}
            still = dataclasses.replace(options, **off)
            batch = _arrays(make(paths, still), task, images)
            _check_geometry(batch, task)
            if "grayscale" in known and options.grayscale:
                gray = dataclasses.replace(still, grayscale=options.grayscale)
                batch = _arrays(make(paths, gray), task, images)
            _check_gray(batch, task)
            if any(frames.colors for frames in task.frames):
                batch = _arrays(make(paths, options), task, images)
            _check_colors(batch, task)
            for frames in task.frames:
                if frames.blur is not None:
                    waves = Path(folder) / frames.name
                    waves.mkdir()
                    length = WAVE / frames.side
                    batch = _arrays(make(_write_images(waves, images, length), still), task, images)
                    _check_blur(batch[frames.name], frames, length)
    except UnfitError as unfit:
        raise UnfitError(f"{contender} does not do the task of {graph}: {unfit}") from None


def _write_images(folder: Path, count: int, wave: float | None = None) -> list[str]:
    """JPEGs whose colours are places, nearly without loss; their names in the order of rows.

    With `wave`, blue goes up and down from left to right, once in so many pixels.
    """
    paths = []
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        path.write_bytes(_image(*_size(number), BLUES[number % len(BLUES)], wave))
        paths.append(str(path))
    return paths


@functools.lru_cache(maxsize=64)  # there are 16, and as many with waves of a length
def _image(height: int, width: int, blue: int, wave: float | None) -> bytes:
    columns = np.arange(width) + 0.5
    pixels = np.empty((height, width, 3))
    pixels[..., 0] = LOW + SPAN * columns / width
    pixels[..., 1] = (LOW + SPAN * (np.arange(height) + 0.5) / height)[:, None]
    pixels[..., 2] = blue if wave is None else 128 + WAVES * np.sin(2 * np.pi * columns / wave)
    file = io.BytesIO()
    image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    image.save(file, "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def _size(number: int) -> tuple[int, int]:
    return SIZES[number // len(BLUES) % len(SIZES)]


def _arrays(batch: Mapping[str, Tensor], task: Task, images: int) -> dict[str, np.ndarray]:
    """The batch in the order of `index`, frames as [B, F, 3, S, S].

    Refuses other names, shapes and types than the task's.
    """
    _require(
        batch.keys() == task.shapes.keys(),
        f"it puts out {sorted(batch)}, not {sorted(task.shapes)}",
    )
    frames = {each.name for each in task.frames}
    for name, shape in task.shapes.items():
        type_ = "torch.uint8" if name in frames else "torch.int64"
        _require(
            tuple(batch[name].shape) == (images, *shape) and str(batch[name].dtype) == type_,
            f"{name} is {batch[name].dtype} {list(batch[name].shape)}, not {type_} "
            f"{[images, *shape]}",
        )
    order = batch["index"].numpy().argsort()
    arrays = {name: tensor.numpy()[order] for name, tensor in batch.items()}
    _require(
        (arrays["index"] == np.arange(images)).all(), "index does not hold every row exactly once"
    )
    for name in frames:
        if arrays[name].ndim == 4:
            arrays[name] = arrays[name][:, None]
    return arrays


# -- where frames lie ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What the pixels of an output say, from place q in a frame to place p in the image.

    p = stretch * (turn @ q) + center, mirrored left and right where `mirrored` says so: before
    turning, or after it where frames are mirrored on their own.
    """

    stretch: np.ndarray  # [B, F, 2] pixels of the image, across and down, for one of a frame
    angle: np.ndarray  # [B, F] degrees counter-clockwise
    mirrored: np.ndarray  # [B, F]
    center: np.ndarray  # [B, F, 2] pixels of the image from its upper left corner
    upright: np.ndarray  # [B, F, 2, 2] from a frame's pixels to the image's, its own mirror undone
    sizes: np.ndarray  # [B, 2] width and height of the images


def _check_geometry(batch: dict[str, np.ndarray], task: Task) -> None:
    seen = {}
    for frames in task.frames:
        _check_identity(batch[frames.name], frames)
        seen[frames.name] = _look(batch[frames.name], frames)
        _check_flips(seen[frames.name], frames)
        _check_turns(seen[frames.name], frames, batch)
        _check_crop(seen[frames.name], frames)
    if len(task.frames) == 2:
        one, other = (seen[frames.name].stretch[:, 0].prod(axis=-1) for frames in task.frames)
        both = " and ".join(frames.name for frames in task.frames)
        _require((one / other).std() > 0.02, f"{both} are of the same part of an image")
    for labels in task.labels:
        labels_found = _LABELS[labels.kind]
        labels_found(batch, seen[labels.frames], labels)


def _check_identity(frames: np.ndarray, promised: Frames) -> None:
    """That row n shows image n."""
    blue = _middle(frames)[..., 2]
    expected = np.array([BLUES[row % len(BLUES)] for row in range(len(blue))])
    wrong = abs(blue - expected[:, None]) > 8
    rows = np.flatnonzero(wrong.any(axis=1))
    _require(
        len(rows) == 0,
        f"{promised.name} of {len(rows)} of {len(blue)} rows shows another image than index says"
        + (f", first that of row {rows[0]}" if len(rows) else ""),
    )


def _middle(frames: np.ndarray) -> np.ndarray:
    """The mean colour [B, F, 3] of the middle of frames [B, F, 3, S, S]: no border reaches it."""
    quarter = frames.shape[-1] // 4
    return frames[..., quarter:-quarter, quarter:-quarter].mean(axis=(-2, -1), dtype=float)


def _look(frames: np.ndarray, promised: Frames) -> _Seen:
    """Fits where frames [B, F, 3, S, S] were cut."""
    images, count, _, side, _ = frames.shape
    chosen = np.unique(np.linspace(0, side - 1, min(side, 16)).round().astype(int))
    values = frames[..., chosen[:, None], chosen].reshape(images * count, 3, -1).astype(float)
    down, across = (each.ravel() for each in np.meshgrid(chosen, chosen, indexing="ij"))
    places = np.stack([across + 0.5 - side / 2, down + 0.5 - side / 2, np.ones(len(down))], axis=1)
    inside = (values[:, 2] > BLUES[0] / 2).astype(float)  # not on a border that was put around
    sizes = np.array([_size(number)[::-1] for number in range(images)], float)
    pixels = (values[:, :2] - LOW) / SPAN * np.repeat(sizes, count, axis=0)[..., None]
    squares = (places[:, :, None] * places[:, None]).reshape(-1, 9)
    left = (inside @ squares).reshape(-1, 3, 3)
    right = (pixels * inside[:, None] @ places).transpose(0, 2, 1)
    _require(
        bool((inside.mean(axis=1) > 0.2).all()), f"{promised.name} shows mostly what is no image"
    )
    fit = np.linalg.solve(left, right)  # [N, 3, 2]
    off = ((places @ fit).transpose(0, 2, 1) - pixels) * inside[:, None]
    blurred = math.sqrt((off**2).mean()) / max(SIZES[0])
    _require(
        blurred < 0.02, f"{promised.name} is no part of an image: off by {blurred:.0%} of a side"
    )
    matrix = fit[:, :2].transpose(0, 2, 1).reshape(images, count, 2, 2)
    mirrored = np.linalg.det(matrix) < 0
    mirror = np.where(mirrored[..., None], (-1.0, 1.0), (1.0, 1.0))  # [B, F, 2]
    # to undo a mirror after turning, a column changes its sign; before turning, a row
    own = promised.flip_each
    straight = matrix * (mirror[..., None, :] if own else mirror[..., None])
    stretch = np.linalg.norm(matrix, axis=-1)
    turn = straight / stretch[..., None]
    sine = turn[..., 1, 0] - turn[..., 0, 1]
    cosine = turn[..., 0, 0] + turn[..., 1, 1]
    return _Seen(
        stretch=stretch,
        angle=np.degrees(np.arctan2(sine, cosine)),
        mirrored=mirrored,
        center=fit[:, 2].reshape(images, count, 2),
        upright=straight if own else matrix,
        sizes=sizes,
    )


def _check_flips(seen: _Seen, promised: Frames) -> None:
    mirrored = seen.mirrored
    if not promised.flip_each:
        _require(
            bool((mirrored == mirrored[:, :1]).all()),
            f"some {promised.name} of an image are mirrored and some are not",
        )
        mirrored = mirrored[:, :1]
    _require_share(mirrored, promised.flip, f"{promised.name} is mirrored", "flip")


def _check_turns(seen: _Seen, promised: Frames, batch: dict[str, np.ndarray]) -> None:
    """That each frame is turned as `angle` says, or not at all."""
    if isinstance(promised.crop, Warp):
        return
    angles = np.zeros_like(seen.angle)
    if promised.angle is not None:
        angles = np.broadcast_to(batch[promised.angle].reshape(len(angles), -1), angles.shape)
    off = abs((seen.angle - angles + 180) % 360 - 180)
    wrong = off > 15
    if promised.angle is None:
        _require(not wrong.any(), f"{promised.name} is turned in {wrong.mean():.0%} of its frames")
    else:
        _require(
            not wrong.any(),
            f"{promised.angle} is not how {promised.name} is turned in {wrong.mean():.0%} of its "
            "frames",
        )
        many = len(np.unique(batch[promised.angle]))
        _require(many >= promised.turns / 2, f"{promised.angle} takes {many} values only")


def _check_crop(seen: _Seen, promised: Frames) -> None:
    crop = promised.crop
    if isinstance(crop, Warp):
        _check_warps(seen, crop, promised)
        return
    extent = seen.stretch * promised.side  # [B, F, 2] width and height in pixels of the image
    if not promised.crop_each:  # one square that all frames are cut from
        _require(
            float(abs(extent / extent.mean(axis=1, keepdims=True) - 1).max()) < 0.15,
            f"the {promised.name} of an image are not of one scale",
        )
        extent = extent.mean(axis=1, keepdims=True)
    whole = seen.sizes[:, None]
    if isinstance(crop, Resized):
        expected = np.array([crop.extent(*size) for size in seen.sizes])[:, None]
        _require(
            float(abs(extent / expected - 1).max()) < 0.08,
            f"{promised.name} shows up to {abs(extent / expected - 1).max():.0%} more or less of "
            "an image than its sizes say",
        )
        if crop.moves and not promised.patches:  # their places are not that of the square
            place = (seen.center - whole / 2) / extent * promised.side
            moved = place.reshape(-1, 2).std(axis=0).max()
            _require(bool(moved > 1), f"{promised.name} is always the same part of an image")
        return
    area = (extent / whole).prod(axis=-1).ravel()
    aspect = (extent[..., 0] / extent[..., 1]).ravel()
    low, high = crop.area
    _require(
        bool(area.min() > 0.93 * low - 0.01 and area.max() < 1.05 * high + 0.01),
        f"{promised.name} shows {area.min():.3f} ... {area.max():.3f} of an image, not "
        f"{low} ... {high}",
    )
    narrow, wide = crop.aspect
    _require(
        bool(aspect.min() > 0.93 * narrow and aspect.max() < 1.07 * wide),
        f"{promised.name} shows parts of an aspect of {aspect.min():.2f} ... {aspect.max():.2f}, "
        f"not {narrow:.2f} ... {wide:.2f}",
    )
    known = crop.reference()
    doubt = 5 * known.std() / math.sqrt(len(area)) + 0.02
    _require(
        abs(area.mean() - known.mean()) < doubt,
        f"{promised.name} shows {area.mean():.2f} of an image on average, not {known.mean():.2f}",
    )
    _require(
        area.std() > 0.5 * known.std(),
        f"{promised.name} always shows about {area.mean():.2f} of an image, not {low} ... {high}",
    )
    if not promised.patches:
        spare = (whole - extent).reshape(-1, 2)
        center = seen.center if promised.crop_each else seen.center.mean(axis=1, keepdims=True)
        moved = (center - whole / 2).reshape(-1, 2)
        free = spare > 0.1 * extent.reshape(-1, 2)
        _require(
            not free.any() or float(abs(moved[free] / spare[free]).mean()) > 0.1,
            f"{promised.name} is always cut out of the middle",
        )


def _check_warps(seen: _Seen, crop: Warp, promised: Frames) -> None:
    """Scale, angle and translation of warps, in seeds and degrees."""
    seed = seen.sizes.min(axis=1)[:, None] * crop.seed  # pixels of the image
    scale = np.sqrt(seen.stretch.prod(axis=-1)) * promised.side / seed
    moved = (seen.center - seen.sizes[:, None] / 2) / seed[..., None]
    for name, values, (low, high) in (
        ("scale", np.log(scale), np.log(crop.scale)),
        ("rotation", seen.angle, (-crop.rotation, crop.rotation)),
        ("translation", moved, (-crop.translation, crop.translation)),
    ):
        room = 0.05 * (high - low) + 0.02
        least, most = float(values.min()), float(values.max())
        inside = low - room <= least and most <= high + room
        full = most - least >= 0.7 * (high - low)
        _require(
            inside and full,
            f"{name} of {promised.name} is {least:.2f} ... {most:.2f}, not "
            f"{low:.2f} ... {high:.2f}" + (" (logarithms)" if name == "scale" else ""),
        )


# -- labels -------------------------------------------------------------------------------------


def _check_permutation(batch: dict[str, np.ndarray], seen: _Seen, labels: promises.Labels) -> None:
    """That patch k was cut from cell `permutation[k]`."""
    cells = _cells(seen, labels.grid)
    wrong = (cells != batch["permutation"]).any(axis=1)
    _require(
        not wrong.any(),
        f"permutation is not the order of the patches in {wrong.mean():.0%} of rows",
    )
    if labels.shuffled:
        orders = {tuple(row) for row in cells.tolist()}
        _require(len(orders) > 1, "permutation is always the same")
        _require(
            labels.orders is None or orders <= {tuple(row) for row in labels.orders.tolist()},
            "permutation is not of the set of orders",
        )


def _check_jigsaw(batch: dict[str, np.ndarray], seen: _Seen, labels: promises.Labels) -> None:
    """That patches joined in `order[n]` come as row `label[n]` of the set says."""
    _check_permutation(batch, seen, labels)
    assert labels.orders is not None
    cells = _cells(seen, labels.grid)
    label = batch["label"].reshape(len(cells), -1)
    joined = np.take_along_axis(cells[:, None], batch["order"], axis=2)
    _require_labels(label, len(labels.orders))
    wrong = (joined != labels.orders[label]).any(axis=(1, 2))
    _require(
        not wrong.any(), f"label is not the order of the patches in {wrong.mean():.0%} of rows"
    )
    _require(
        all(len(set(row)) == len(row) for row in label.tolist()), "labels of an image are equal"
    )
    _require(len(np.unique(label)) > 1, "label is always the same")


def _check_pairs(batch: dict[str, np.ndarray], seen: _Seen, labels: promises.Labels) -> None:
    """That patch `pair[n, 0]` lies where `label[n]` says, seen from patch `pair[n, 1]`."""
    count = seen.center.shape[1]
    pair = batch["pair"]
    label = batch["label"].reshape(len(pair), -1)
    _require_labels(label, 8)
    _require(bool((pair >= 0).all() and (pair < count).all()), "pair is not of the patches")
    rows = np.arange(len(pair))[:, None]
    apart = seen.center[rows, pair[..., 0]] - seen.center[rows, pair[..., 1]]
    matrix = seen.upright.mean(axis=1)[:, None]
    steps = np.rint(np.linalg.solve(matrix, apart[..., None])[..., 0] / labels.cell)  # cells
    directions = np.array([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y])
    wrong = (steps != directions[label]).any(axis=(1, 2))
    _require(not wrong.any(), f"label is not where the patch lies in {wrong.mean():.0%} of rows")
    if count == 9:
        wrong = (_cells(seen, 3) != np.arange(9)).any(axis=1)
        _require(not wrong.any(), f"patches are not in order in {wrong.mean():.0%} of rows")
    _require(len(np.unique(label)) >= 4, f"label takes {len(np.unique(label))} values only")


def _check_label_of_turn(
    batch: dict[str, np.ndarray], seen: _Seen, labels: promises.Labels
) -> None:
    """That `label` is the place of `angle`, which was seen in the pixels, among the turns."""
    turns = np.array(labels.turns)
    _require_labels(batch["label"], len(turns))
    wrong = turns[batch["label"]] != batch["angle"]
    _require(not wrong.any(), f"label is not that of angle in {wrong.mean():.0%} of the frames")
    if seen.angle.shape[1] > 1:
        _require(
            bool((batch["angle"] == turns).all()), f"the angles are not {turns.tolist()}, in order"
        )


_LABELS: dict[str, Callable[[dict[str, np.ndarray], _Seen, promises.Labels], None]] = {
    "permutation": _check_permutation,
    "jigsaw": _check_jigsaw,
    "pairs": _check_pairs,
    "turns": _check_label_of_turn,
}


def _cells(seen: _Seen, grid: int) -> np.ndarray:
    """The cell of each patch, [B, F]: of the patches of a row, the leftmost are the first column.

    Counted in the square that patches were cut from, which may be mirrored and turned.
    """
    matrix = seen.upright.mean(axis=1)
    place = np.linalg.solve(
        matrix[:, None], (seen.center - seen.center.mean(axis=1, keepdims=True))[..., None]
    )[..., 0]
    column, row = np.moveaxis(place.argsort(axis=1).argsort(axis=1) // grid, -1, 0)
    return row * grid + column


# -- colours ------------------------------------------------------------------------------------


def _check_gray(batch: dict[str, np.ndarray], task: Task) -> None:
    for promised in task.frames:
        gray = _is_gray(batch[promised.name])
        if not promised.gray_each:
            _require(
                bool((gray == gray[:, :1]).all()),
                f"some {promised.name} of an image are gray and some are not",
            )
            gray = gray[:, :1]
        _require_share(gray, promised.gray, f"{promised.name} is gray", "grayscale")


def _check_colors(batch: dict[str, np.ndarray], task: Task) -> None:
    for promised in task.frames:
        frames = batch[promised.name]
        known = np.array([BLUES[row % len(BLUES)] for row in range(len(frames))])
        change = abs(_middle(frames)[..., 2] - known[:, None])[~_is_gray(frames)]
        if change.size == 0:  # grayscale is 1
            continue
        if promised.colors > 0.05:
            _require(change.mean() > 2, f"the colours of {promised.name} do not change")
        elif promised.colors == 0:
            _require(
                change.max() < 8,
                f"the colours of {promised.name} change, by {change.max():.0f} of 255",
            )


def _is_gray(frames: np.ndarray) -> np.ndarray:
    """Of frames [B, F, 3, S, S], which have no colour: [B, F]."""
    return np.ptp(frames, axis=2).max(axis=(-2, -1)) <= 1


# -- blur ---------------------------------------------------------------------------------------


def _check_blur(frames: np.ndarray, promised: Frames, wave: float) -> None:
    """That as many frames [B, F, 3, S, S] are blurred as the option says, by widths that vary."""
    assert promised.blur is not None, "asked for graphs that blur only"
    widths = _blur_widths(frames, promised, wave).ravel()
    low, high = promised.blur_sigma
    visible = float(high >= SEEN) if high == low else (high - max(low, SEEN)) / (high - low)
    visible = min(1.0, max(0.0, visible))  # of the blurred frames
    blurred = widths > SEEN
    what = f"{promised.name} is blurred by {SEEN} pixels or more"
    _require_share(blurred, promised.blur * visible, what, "blur times what blur_sigma gives")
    _require(
        bool(widths.max() < 1.15 * high + 0.2) or not blurred.any(),
        f"{promised.name} is blurred by up to {widths.max():.1f} pixels, not {low:g} ... {high:g}",
    )
    if blurred.sum() >= 8:  # of fewer, the spread says little
        spread = (high - max(low, SEEN)) / math.sqrt(12)  # of what is drawn uniformly
        _require(
            float(widths[blurred].std()) > 0.5 * spread,
            f"{promised.name} is always blurred by about {widths[blurred].mean():.1f} pixels, not "
            f"{low:g} ... {high:g}",
        )


def _blur_widths(frames: np.ndarray, promised: Frames, wave: float) -> np.ndarray:
    """The standard deviation [B, F] of each frame's blur, in its pixels, from how low waves are.

    A Gaussian of width s leaves exp(-2 (pi s f)^2) of a wave of frequency f, and a bilinear resize
    sinc(f)^2, with f counted in the wider of both images' pixels.
    """
    seen = _look(frames, promised)
    images, count, _, side, _ = frames.shape
    edge = min(6, side // 6)  # nearer to it blur sees the frame mirrored
    inner = slice(edge, side - edge)
    across = np.arange(side)[inner] + 0.5 - side / 2
    blue = frames[..., 2, inner, inner].mean(axis=-2)  # [B, F, pixels]: waves go across
    stretch = seen.stretch[..., 0]
    heights = np.empty((images, count))
    for row, frame in np.ndindex(images, count):
        angle = 2 * np.pi * stretch[row, frame] * across / wave
        parts = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], axis=1)
        _, cosine, sine = np.linalg.lstsq(parts, blue[row, frame], rcond=None)[0]
        heights[row, frame] = math.hypot(cosine, sine)
    resized = np.sinc(np.maximum(stretch, 1) / wave) ** 2
    left = np.clip(heights / (WAVES * resized), 1e-6, 1)
    return np.sqrt(-np.log(left) / 2) / (np.pi * stretch / wave)


# -- shared -------------------------------------------------------------------------------------


def _require(fits: bool | np.bool_, message: str) -> None:
    if not fits:
        raise UnfitError(message)


def _require_labels(label: np.ndarray, classes: int) -> None:
    _require(
        bool((label >= 0).all() and (label < classes).all()),
        f"label is {label.min()} ... {label.max()}, not 0 ... {classes - 1}",
    )


def _require_share(drawn: np.ndarray, probability: float, what: str, option: str) -> None:
    """Refuses a number of successes in `drawn` that `probability` gives once in 1 / ALARM times."""
    count, hits = drawn.size, int(drawn.sum())
    chance = [
        math.comb(count, k) * probability**k * (1 - probability) ** (count - k)
        for k in range(count + 1)
    ]
    tail = min(sum(chance[: hits + 1]), sum(chance[hits:]))
    _require(
        tail > ALARM,
        f"{what} in {hits} of {count} cases, where {option} is {probability:.3g}",
    )
