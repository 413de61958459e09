"""Each kernel gives the pixels of the DALI operator that a GPU runs in its place."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, math
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIInterpType

from pipelines import cpu_kernels, ops

FLOAT, INT = DALIDataType.FLOAT, DALIDataType.INT32
rng = np.random.default_rng(0)


def run(graph: Any, *batches: list[np.ndarray], threads: int = 2) -> list[np.ndarray]:
    """What `graph` makes of one batch: as many arrays as it gives nodes, [images, ...]."""
    pipeline = Pipeline(batch_size=len(batches[0]), num_threads=threads, device_id=None, seed=0)
    with pipeline:
        made = graph(*[source(batch) for batch in batches])
        pipeline.set_outputs(*made)
    return [np.asarray(each.as_tensor()).astype(int) for each in pipeline.run()]


def source(batch: list[np.ndarray]) -> Any:
    layouts = {3: "HWC", 4: "FHWC"} if batch[0].dtype == np.uint8 else {}
    ndim = batch[0].ndim
    return fn.external_source(lambda: batch, ndim=ndim, layout=layouts.get(ndim))


def noise(*shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def same_but_for_rounding(one: np.ndarray, other: np.ndarray) -> None:
    apart = np.abs(one - other)

    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.005


SHAPES = [(375, 500), (500, 333), (64, 64), (1, 300), (300, 1), (3, 4), (2000, 150), (97, 31)]


def regions_of(height: int, width: int) -> np.ndarray:
    ends = []
    for length in (height, width):
        low, high = sorted(rng.random(2) * length)
        ends.append((low, max(high, low + 0.3)))
    (top, bottom), (left, right) = ends
    return np.array([top, left, bottom, right], np.float32)


@pytest.mark.parametrize("size", [8, 50, 224])
def test_a_part_is_resized_as_dali_does_it(size):
    images = [noise(*shape, 3) for shape in SHAPES] * 4
    whole = [np.array([0, 0, *image.shape[:2]], np.float32) for image in images[: len(SHAPES)]]
    regions = whole + [regions_of(*image.shape[:2]) for image in images[len(SHAPES) :]]
    mirrors = [np.array([k % 2], np.float32) for k in range(len(images))]

    def both(image: Any, region: Any, mirror: Any) -> Any:
        one: Any = fn.reshape(fn.cat(region, mirror), shape=[1, 5])
        oracle: Any = fn.resize(
            image,
            size=[size, size],
            roi_start=region[0:2],
            roi_end=region[2:4],
            interp_type=DALIInterpType.INTERP_LINEAR,
            antialias=True,
        )
        flipped = fn.flip(oracle, horizontal=fn.cast(mirror[0], dtype=INT))
        return cpu_kernels.resize(image, size, one), flipped

    kernel, dali = run(both, images, regions, mirrors)
    assert kernel.shape == (len(images), 1, size, size, 3)

    same_but_for_rounding(kernel[:, 0], dali)


def test_several_parts_of_an_image_come_in_their_order():
    image = noise(40, 60, 3)
    regions = np.array([[0, 0, 16, 16, 0], [10, 30, 26, 46, 0], [10, 30, 26, 46, 1]], np.float32)
    (parts,) = run(lambda x, r: [cpu_kernels.resize(x, 16, r)], [image], [regions])

    np.testing.assert_array_equal(parts[0, 0], image[:16, :16])
    np.testing.assert_array_equal(parts[0, 1], image[10:26, 30:46])
    np.testing.assert_array_equal(parts[0, 2], image[10:26, 30:46][:, ::-1])


CHANGES = {
    "all": [(0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-180.0, 180.0)],
    "brightness": [(0.0, 2.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0)],
    "contrast": [(1.0, 1.0), (0.0, 2.0), (1.0, 1.0), (0.0, 0.0)],
    "saturation": [(1.0, 1.0), (1.0, 1.0), (0.0, 2.0), (0.0, 0.0)],
    "hue": [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (-180.0, 180.0)],
    "nothing": [(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_colors_change_as_dali_twists_them(change):
    images, patches = [noise(33, 47, 3) for _ in range(16)], [noise(9, 17, 17, 3)] * 16
    drawn = [
        np.stack([rng.uniform(*ends, 9) for ends in CHANGES[change]] + [np.zeros(9)], axis=1)
        for _ in images
    ]
    changes = [each.astype(np.float32) for each in drawn]

    def both(image, patch, change):
        def twist(pixels, by):
            return fn.color_twist(
                pixels, brightness=by(0), contrast=by(1), saturation=by(2), hue=by(3)
            )

        return (
            cpu_kernels.change_colors(image, change[0:1], "HWC"),
            twist(image, lambda k: change[0, k]),
            cpu_kernels.change_colors(patch, change, "FHWC"),
            twist(patch, lambda k: fn.per_frame(change[:, k])),
        )

    image, image_oracle, patch, patch_oracle = run(both, images, patches, changes)

    same_but_for_rounding(image, image_oracle)
    same_but_for_rounding(patch, patch_oracle)


def test_gray_is_the_luma_in_all_three_colors():
    patches = noise(6, 12, 12, 3)
    changes = np.array([[1, 1, 1, 0, k % 2] for k in range(6)], np.float32)
    (made,) = run(lambda x, c: [cpu_kernels.change_colors(x, c, "FHWC")], [patches], [changes])
    luma = np.rint(patches[1::2] @ np.array([0.299, 0.587, 0.114])).astype(int)

    np.testing.assert_array_equal(made[0, ::2], patches[::2])
    assert (made[0, 1::2] == made[0, 1::2, :, :, :1]).all()
    assert np.abs(made[0, 1::2, :, :, 0] - luma).max() <= 1


def test_saturation_and_value_change_as_the_graph_of_a_gpu_changes_them():
    views = [np.concatenate([noise(6, 20, 20, 3), np.zeros((1, 20, 20, 3), np.uint8)])] * 8
    changes = [
        np.stack(
            [rng.uniform(low, high, 7) for low, high in [(0.25, 4.0), (0.7, 1.4), (-0.1, 0.1)] * 2],
            axis=1,
        ).astype(np.float32)
        for _ in views
    ]

    def both(view, change):
        by = change[:, 0:3], change[:, 3:6]
        kernel = ops.change_saturation_and_value(view, *by, 7, "cpu")
        with pytest.MonkeyPatch.context() as patch:  # a GPU's arithmetic, on the CPU
            patch.setattr(ops, "on", lambda node, device: node)
            return kernel, ops.change_saturation_and_value(view, *by, 7, "gpu")

    same_but_for_rounding(*run(both, views, changes))


@pytest.mark.parametrize("shape", [(40, 50), (5, 7), (2, 30)])
def test_blur_is_as_wide_as_dali_s(shape):
    images = [noise(*shape, 3) for _ in range(12)]
    sigmas = [np.array([sigma], np.float32) for sigma in np.linspace(0.1, 2.5, 12)]

    def both(image, sigma):
        window = 2 * fn.cast(math.ceil(3 * sigma[0]), dtype=INT) + 1
        oracle = fn.gaussian_blur(image, sigma=sigma, window_size=window)
        return cpu_kernels.blur(image, sigma), oracle

    same_but_for_rounding(*run(both, images, sigmas))


def test_a_blur_of_no_width_changes_nothing():
    image = noise(20, 30, 3)
    (made,) = run(lambda x, s: [cpu_kernels.blur(x, s)], [image], [np.zeros(1, np.float32)])

    np.testing.assert_array_equal(made[0], image)


@pytest.mark.parametrize("side", [1, 5, 16, 35])
def test_turns_are_exact(side):
    image, turns = noise(side, side, 3), np.array([3, 1, 0, 2, 1], np.float32)
    (made,) = run(lambda x, t: [cpu_kernels.quarter_turns(x, t)], [image], [turns])

    for frame, turn in zip(made[0], turns, strict=True):
        np.testing.assert_array_equal(frame, np.rot90(image, int(turn)))


def test_squares_are_cut_where_their_corners_are():
    image = noise(30, 40, 3)
    corners = np.array([[[0, 0]], [[20, 30]], [[7, 13]]], np.float32)
    apart = np.array([[[0, 0], [2, 1], [1, 2]], [[20, 30], [19, 28], [18, 29]]], np.float32)
    graph: Any = lambda x, c, a: [cpu_kernels.cut(x, 10, c), cpu_kernels.cut(x, 10, a)]  # noqa: E731
    squares, by_color = run(graph, [image], [corners], [apart])

    for square, ((top, left),) in zip(squares[0], corners.astype(int), strict=True):
        np.testing.assert_array_equal(square, image[top : top + 10, left : left + 10])
    for square, places in zip(by_color[0], apart.astype(int), strict=True):
        for color, (top, left) in enumerate(places):
            oracle = image[top : top + 10, left : left + 10, color]
            np.testing.assert_array_equal(square[:, :, color], oracle)


def test_the_number_of_threads_changes_nothing():
    images = [noise(90, 70, 3) for _ in range(16)]
    regions = [np.append(regions_of(90, 70), 1).astype(np.float32)[None] for _ in images]

    def graph(image, region):
        return [cpu_kernels.resize(image, 32, region)]

    (one,), (four,) = run(graph, images, regions, threads=1), run(graph, images, regions, threads=4)

    np.testing.assert_array_equal(one, four)


# The smallest of the kernels: it copies two shapes of three numbers.
COPY = """
import numpy as np
from pipelines import cpu_kernels

given, found = np.arange(6).reshape(2, 3), np.zeros((2, 3), np.int64)
tables = [np.array([row.ctypes.data for row in shapes], np.uint64) for shapes in (found, given)]
dimensions = np.array([3], np.int32)
to, source, of_each = (each.ctypes.data for each in (*tables, dimensions))
cpu_kernels._SAME().ctypes(to, 0, 1, source, of_each, 1, 2)
print(found.tolist())
"""


def test_a_cache_that_can_not_be_read_costs_time_and_no_more(tmp_path, checkout, environ):
    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", COPY],
            cwd=checkout,
            env=environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    assert start().stdout == "[[0, 1, 2], [3, 4, 5]]\n"
    indexes = list(tmp_path.rglob("*.nbi"))
    assert indexes
    for index in indexes:
        index.write_bytes(b"")
    again = start()

    assert again.stdout == "[[0, 1, 2], [3, 4, 5]]\n", again.stderr
