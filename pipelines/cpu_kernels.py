"""Resize, colours and blur for the CPU backend, compiled by Numba: 5 to 30 times DALI's speed.

The same pixels as DALI's own operators (`fn.resize` with antialiasing, `fn.color_twist`,
`fn.gaussian_blur`), up to one level of 255 where a value lies between two: tests hold each kernel
to its operator, which is what runs on a GPU. DALI calls a kernel from its worker threads, for one
image at a time and without Python, through the operator that its Numba plugin is made of.

Images are uint8, RGB interleaved. A kernel is compiled when a graph first needs it, which takes
seconds, and then comes from Numba's cache beside this file, or in the user's cache folder.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core.caching import NullCache
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin import numba as plugin
from nvidia.dali.types import Constant, DALIDataType

F = np.float32
_pointer = plugin.address_as_void_pointer  # pyright: ignore[reportAttributeAccessIssue]  no stub
# As DALI's color_twist has them, in its precision.
TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]], np.float32
)
FROM_YIQ = np.linalg.inv(TO_YIQ)
U = np.uint64  # an index that can't be negative: a signed one is checked for that at every access


def resize(image: DataNode, size: int, regions: DataNode) -> DataNode:
    """Parts of an image as `size` x `size`: bilinear, antialiased where they shrink; FHWC.

    Args:
        image: uint8 HWC.
        size: pixels a side of the results.
        regions: float32 [F, 5]: top, left, bottom, right in pixels of the image, and 1 to mirror
            left and right or 0. Pixels around a region count where the filter reaches; beyond the
            image its border goes on.
    """
    return _operator(_RESIZE, _SQUARES, (image, regions, _carrier(size)), (3, 2, 1), "FHWC")


def cut(image: DataNode, size: int, corners: DataNode) -> DataNode:
    """Squares of `size` pixels a side, copied; FHWC.

    Args:
        image: uint8 HWC.
        size: pixels a side.
        corners: float32 [F, C, 2], whole numbers: row and column where a square begins that lies in
            the image; C is 1, or 3 where each colour has a place of its own.
    """
    return _operator(_CUT, _SQUARES, (image, corners, _carrier(size)), (3, 3, 1), "FHWC")


def quarter_turns(image: DataNode, turns: DataNode) -> DataNode:
    """A square image turned counter-clockwise by quarters, as torch.rot90 does; FHWC.

    Args:
        image: uint8 HWC, square.
        turns: float32 [F]: 0, 1, 2 or 3 each.
    """
    return _operator(_TURN, _TURNS, (image, turns), (3, 1), "FHWC")


def change_colors(pixels: DataNode, changes: DataNode, layout: str) -> DataNode:
    """Brightness, contrast, saturation and hue as `fn.color_twist`, then gray where it says so.

    Args:
        pixels: uint8 HWC or FHWC.
        changes: float32 [F, 5], for each frame (1 for HWC): the factors brightness, contrast and
            saturation, hue in degrees, and 1 for gray (BT.601 luma, R = G = B exactly) or 0.
        layout: of `pixels`.
    """
    return _operator(_COLORS, _SAME, (pixels, changes), (len(layout), 2), layout)


def change_saturation_and_value(views: DataNode, changes: DataNode) -> DataNode:
    """S and V of HSV each to a power, times a factor, plus an offset, as `pipelines.ops` tells.

    Args:
        views: uint8 FHWC.
        changes: float32 [F, 6]: power, factor and offset of S, then of V.
    """
    return _operator(_SATURATION, _SAME, (views, changes), (4, 2), "FHWC")


def blur(image: DataNode, sigma: DataNode) -> DataNode:
    """Gaussian blur, cut off at `ceil(3 * sigma)` pixels; the border is mirrored, as DALI's.

    Args:
        image: uint8 HWC.
        sigma: float32 [1], pixels; 0 changes nothing.
    """
    return _operator(_BLUR, _SAME, (image, sigma), (3, 1), "HWC")


class _Kernel(plugin.NumbaFunction):
    """DALI's operator around functions that are compiled already: their addresses."""

    def _get_run_fn_cpu(self, run_fn: int, *_: Any) -> int:
        return run_fn

    def _get_setup_fn_cpu(self, setup_fn: int) -> int:
        return setup_fn


def _operator(
    run: Callable[[], Any],
    setup: Callable[[], Any],
    inputs: Sequence[DataNode],
    dimensions: Sequence[int],
    layout: str,
) -> DataNode:
    operator = _Kernel(
        run_fn=run().address,
        setup_fn=setup().address,
        in_types=[DALIDataType.UINT8, DALIDataType.FLOAT, DALIDataType.UINT8][: len(inputs)],
        out_types=[DALIDataType.UINT8],
        ins_ndim=list(dimensions),
        outs_ndim=[len(layout)],
        device="cpu",
    )
    made = operator(*inputs)
    assert isinstance(made, DataNode)  # one output
    return fn.reshape(made, layout=layout)


def _carrier(size: int) -> DataNode:
    """Tells a size by its shape: what a kernel's result looks like may not depend on numbers."""
    node = Constant(np.zeros(size, np.uint8), device="cpu")
    assert isinstance(node, DataNode)  # a scalar would stay a constant
    return node


_kernels: list[Any] = []  # all that were compiled


def _compiled(function: Callable) -> Any:
    """`function` as machine code; kept on disk where there is a place for it."""
    try:
        kernel = njit(fastmath=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        kernel = njit(fastmath=True, error_model="numpy")(function)
    _kernels.append(kernel)
    return kernel


def _called(*arguments: Any) -> Callable[[Callable], Callable[[], Any]]:
    """A C function of these arguments, compiled when it is first asked for; see `_compiled`.

    Not before: on a GPU none is needed.
    """

    def make(function: Callable) -> Callable[[], Any]:
        @lru_cache(maxsize=1)
        def compiled() -> Any:
            try:
                return cfunc(types.void(*arguments), cache=True)(function)
            except Exception:  # a cached file was cut off or is somebody's, or the disk is full
                for kernel in _kernels:
                    kernel._cache = NullCache()
                return cfunc(types.void(*arguments))(function)

        return compiled

    return make


# What DALI hands over (its include/dali/operators: RunFn, SetupFn): addresses of tables of
# addresses. Of data and shapes of outputs and inputs for one image; of shapes for all images.
_A, _I = types.uint64, types.int32
_run = _called(_A, _A, _A, _I, _A, _A, _A, _I)
_setup = _called(_A, _A, _I, _A, _A, _I, _I)


@_compiled
def _addresses(table: int, count: int) -> np.ndarray:
    return carray(_pointer(table), count, np.uint64)


@_compiled
def _shape(table: int, place: int, dimensions: int) -> np.ndarray:
    return carray(_pointer(_addresses(table, place + 1)[place]), dimensions, np.int64)


@_compiled
def _bytes(table: int, place: int, count: int) -> np.ndarray:
    return carray(_pointer(_addresses(table, place + 1)[place]), count, np.uint8)


@_compiled
def _floats(table: int, place: int, count: int) -> np.ndarray:
    return carray(_pointer(_addresses(table, place + 1)[place]), count, np.float32)


@_compiled
def _resize(out, image, region):
    """Rows first, all their pixels at a time; then along each of them.

    out uint8 [size, size * 3], image uint8 [height, width * 3], region as in `resize`.
    """
    size = out.shape[0]
    height, width = image.shape[0], image.shape[1] // 3
    first_y, count_y, weights_y = _taps(region[0], region[2], height, size)
    first_x, count_x, weights_x = _taps(region[1], region[3], width, size)
    left = first_x[0]
    values = 3 * (first_x[size - 1] + count_x[size - 1] - left)
    most = count_x.max()
    place = (3 * (first_x - left)).astype(np.uint64)
    if region[4] != 0:
        place, weights_x = place[::-1].copy(), weights_x[::-1].copy()
    # Along a row, four values are read and written at a time, in one register: R, G, B and one
    # that the next pixel overwrites. All pixels have `most` weights, 0 where they need fewer.
    row = np.zeros(values + 3 * weights_x.shape[1] + 4, F)
    wide = np.empty(3 * size + 1, F)
    for y in range(size):
        _mix_rows(row, image, first_y[y], count_y[y], weights_y[y], 3 * left, values)
        _mix_along(wide, row, place, weights_x, most, size)
        target = out[y]
        for k in range(3 * size):
            target[k] = np.uint8(np.int32(wide[k] + F(0.5)))


@_compiled
def _taps(start, end, length, size):
    """Which of `length` pixels make up each of `size`, and by which weights (a triangle's).

    The triangle is as wide as two pixels of the coarser grid. What lies outside is the border's.
    """
    step = (end - start) / F(size)
    reach = max(F(1), step)
    first, count = np.empty(size, np.int64), np.empty(size, np.int64)
    weights = np.zeros((size, max(6, int(2 * reach) + 3)), F)
    for i in range(size):
        center = start + (F(i) + F(0.5)) * step
        low, high = int(np.floor(center - reach + F(0.5))), int(np.floor(center + reach + F(0.5)))
        kept = min(max(low, 0), length - 1)
        last = max(min(high, length), kept + 1) - 1
        total = F(0)
        for k in range(low, high):
            weight = max(F(0), F(1) - abs(F(k) + F(0.5) - center) / reach)
            weights[i, min(max(k, kept), last) - kept] += weight
            total += weight
        first[i], count[i] = kept, last + 1 - kept
        for k in range(last + 1 - kept):
            weights[i, k] /= total
    return first, count, weights


@_compiled
def _mix_rows(row, image, first, count, weights, left, values):
    """The weighted sum of `count` rows of the image, from value `left` on, to float32."""
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    row_a = image[first, left : left + values]
    if count == 1:
        for k in range(values):
            row[k] = a * F(row_a[k])
        return
    row_b = image[first + 1, left : left + values]
    if count == 2:
        for k in range(values):
            row[k] = a * F(row_a[k]) + b * F(row_b[k])
        return
    row_c = image[first + 2, left : left + values]
    if count == 3:
        for k in range(values):
            row[k] = a * F(row_a[k]) + b * F(row_b[k]) + c * F(row_c[k])
        return
    row_d = image[first + 3, left : left + values]
    for k in range(values):
        row[k] = a * F(row_a[k]) + b * F(row_b[k]) + c * F(row_c[k]) + d * F(row_d[k])
    for tap in range(4, count):
        weight, more = weights[tap], image[first + tap, left : left + values]
        for k in range(values):
            row[k] += weight * F(more[k])


@_compiled
def _mix_along(wide, row, place, weights, most, size):
    """Each of `size` pixels as the weighted sum of `most` neighbours of the row."""
    if most <= 2:
        for x in range(size):
            p, a, b = place[x], weights[x, 0], weights[x, 1]
            _put(wide, x, *_two(row, p, a, b))
    elif most == 3:
        for x in range(size):
            p, a, b, c = place[x], weights[x, 0], weights[x, 1], weights[x, 2]
            r0, r1, r2, r3 = _two(row, p, a, b)
            s0, s1, s2, s3 = _one(row, p + U(6), c)
            _put(wide, x, r0 + s0, r1 + s1, r2 + s2, r3 + s3)
    else:
        for x in range(size):
            p = place[x]
            r0, r1, r2, r3 = _two(row, p, weights[x, 0], weights[x, 1])
            tap = 2
            while tap < most:  # two more; the last may weigh nothing
                p += U(6)
                s0, s1, s2, s3 = _two(row, p, weights[x, tap], weights[x, tap + 1])
                r0, r1, r2, r3 = r0 + s0, r1 + s1, r2 + s2, r3 + s3
                tap += 2
            _put(wide, x, r0, r1, r2, r3)


@_compiled
def _one(row, p, a):
    return a * row[p], a * row[p + U(1)], a * row[p + U(2)], a * row[p + U(3)]


@_compiled
def _two(row, p, a, b):
    return (
        a * row[p] + b * row[p + U(3)],
        a * row[p + U(1)] + b * row[p + U(4)],
        a * row[p + U(2)] + b * row[p + U(5)],
        a * row[p + U(3)] + b * row[p + U(6)],
    )


@_compiled
def _put(wide, x, r, g, b, rest):
    q = U(3) * U(x)
    wide[q] = r
    wide[q + U(1)] = g
    wide[q + U(2)] = b
    wide[q + U(3)] = rest


@_compiled
def _cut(out, image, corners):
    """One square, see `cut`: out uint8 [size, size * 3], image uint8 [height, width * 3]."""
    size = out.shape[0]
    if corners.shape[0] == 1:
        top, left = int(corners[0, 0]), 3 * int(corners[0, 1])
        for y in range(size):
            out[y] = image[top + y, left : left + 3 * size]
        return
    for color in range(3):
        top, left = int(corners[color, 0]), 3 * int(corners[color, 1]) + color
        for y in range(size):
            source, target = image[top + y, left:], out[y]
            for x in range(size):
                target[3 * x + color] = source[3 * x]


@_compiled
def _turn(out, image, turns):
    """One square image turned, see `quarter_turns`; both uint8 [side, side * 3]."""
    side = image.shape[0]
    if turns == 0:
        out[:] = image
    elif turns == 2:
        for y in range(side):
            source, target = image[side - 1 - y], out[y]
            for x in range(side):
                p, q = 3 * x, 3 * (side - 1 - x)
                target[p], target[p + 1], target[p + 2] = source[q], source[q + 1], source[q + 2]
    else:
        tile = 16  # pixels a side: rows of both stay in the cache
        for top in range(0, side, tile):
            for left in range(0, side, tile):
                for y in range(top, min(top + tile, side)):
                    target = out[y]
                    for x in range(left, min(left + tile, side)):
                        row, column = (x, side - 1 - y) if turns == 1 else (side - 1 - x, y)
                        p, q = 3 * x, 3 * column
                        target[p] = image[row, q]
                        target[p + 1] = image[row, q + 1]
                        target[p + 2] = image[row, q + 2]


@_compiled
def _change(out, pixels, change):
    """Colours of one frame, see `change_colors`; uint8 [values] to the same."""
    m = _color_matrix(change[0], change[1], change[2], change[3])
    twisted = change[0] != 1 or change[1] != 1 or change[2] != 1 or change[3] != 0
    gray = change[4] != 0
    # Blocks of planes in the cache: interleaved values can't be computed many at a time.
    block = 512
    r, g, b = np.empty(block, F), np.empty(block, F), np.empty(block, F)
    u, v, w = np.empty(block, np.uint8), np.empty(block, np.uint8), np.empty(block, np.uint8)
    half, top, zero = F(0.5), F(255), F(0)
    count = pixels.size // 3
    for start in range(0, count, block):
        n = min(block, count - start)
        source, target = pixels[3 * start : 3 * (start + n)], out[3 * start : 3 * (start + n)]
        if not twisted and not gray:
            target[:] = source
            continue
        for k in range(n):
            r[k], g[k], b[k] = source[3 * k], source[3 * k + 1], source[3 * k + 2]
        if twisted:
            _plane(u, r, g, b, m[0], n)
            _plane(v, r, g, b, m[1], n)
            _plane(w, r, g, b, m[2], n)
        else:
            for k in range(n):
                u[k], v[k], w[k] = np.uint8(r[k]), np.uint8(g[k]), np.uint8(b[k])
        if gray:
            for k in range(n):
                luma = F(0.299) * F(u[k]) + F(0.587) * F(v[k]) + F(0.114) * F(w[k]) + half
                u[k] = np.uint8(np.int32(min(max(luma, zero), top)))
            for k in range(n):
                target[3 * k] = target[3 * k + 1] = target[3 * k + 2] = u[k]
        else:
            for k in range(n):
                target[3 * k], target[3 * k + 1], target[3 * k + 2] = u[k], v[k], w[k]


@_compiled
def _plane(out, r, g, b, m, n):
    a0, a1, a2, a3 = m[0], m[1], m[2], m[3] + F(0.5)
    for k in range(n):
        value = a0 * r[k] + a1 * g[k] + a2 * b[k] + a3
        out[k] = np.uint8(np.int32(min(max(value, F(0)), F(255))))


@_compiled
def _color_matrix(brightness, contrast, saturation, hue):
    """float32 [3, 4]: RGB and 1 to RGB, as DALI's color_twist: hue turns in the YIQ plane.

    The pivot of contrast is 128.
    """
    angle = hue * F(-np.pi / 180)  # clockwise from I to Q
    cos, sin = saturation * np.cos(angle), saturation * np.sin(angle)
    matrix = np.empty((3, 4), F)
    scale = brightness * contrast
    for row in range(3):
        for column in range(3):
            # YIQ_TO_RGB @ diag(1, turn * saturation) @ RGB_TO_YIQ
            i = cos * TO_YIQ[1, column] - sin * TO_YIQ[2, column]
            q = sin * TO_YIQ[1, column] + cos * TO_YIQ[2, column]
            value = (
                FROM_YIQ[row, 0] * TO_YIQ[0, column] + FROM_YIQ[row, 1] * i + FROM_YIQ[row, 2] * q
            )
            matrix[row, column] = scale * value
        matrix[row, 3] = brightness * F(128) * (F(1) - contrast)
    return matrix


@_compiled
def _change_saturation(out, pixels, change):
    """One view, see `change_saturation_and_value`; uint8 [values] to the same."""
    values = np.empty(256, F)  # V takes no others
    for k in range(256):
        new = (F(k) / F(255)) ** change[3] * change[4] + change[5]
        values[k] = F(255) * min(max(new, F(0)), F(1))
    for k in range(0, pixels.size, 3):
        r, g, b = pixels[k], pixels[k + 1], pixels[k + 2]
        greatest = max(r, g, b)
        chroma = F(greatest) - F(min(r, g, b))
        new = (chroma / max(F(greatest), F(1))) ** change[0] * change[1] + change[2]
        value = values[greatest]
        gain = value * min(max(new, F(0)), F(1)) / max(chroma, F(1))
        rest = value - gain * F(greatest) + F(0.5)
        for c in range(3):
            made = gain * F(pixels[k + c]) + rest
            out[k + c] = np.uint8(np.int32(min(max(made, F(0)), F(255))))


@_compiled
def _blur(out, image, sigma):
    """Down the columns, all values of a row at a time, then along the rows."""
    height, values = image.shape
    reach = int(np.ceil(F(3) * sigma))
    if reach == 0:
        out[:] = image
        return
    weights = np.empty(2 * reach + 1, F)
    for k in range(2 * reach + 1):
        weights[k] = np.exp(F(-0.5) * (F(k - reach) / sigma) ** 2)
    weights /= weights.sum()
    width = values // 3
    row = np.empty(values + 6 * reach, F)
    wide = np.empty(values, F)
    for y in range(height):
        middle = row[3 * reach : 3 * reach + values]
        middle[:] = F(0)
        for tap in range(2 * reach + 1):
            weight, source = weights[tap], image[_mirrored(y + tap - reach, height)]
            for k in range(values):
                middle[k] += weight * F(source[k])
        for x in range(reach):
            before, after = _mirrored(-1 - x, width), _mirrored(width + x, width)
            for c in range(3):
                row[3 * (reach - 1 - x) + c] = middle[3 * before + c]
                row[3 * (reach + width + x) + c] = middle[3 * after + c]
        wide[:] = F(0.5)
        for tap in range(2 * reach + 1):
            weight, source = weights[tap], row[3 * tap : 3 * tap + values]
            for k in range(values):
                wide[k] += weight * source[k]
        target = out[y]
        for k in range(values):
            target[k] = np.uint8(np.int32(wide[k]))


@_compiled
def _mirrored(place, length):
    """`place` reflected into 0 ... length - 1; the border pixel is not repeated."""
    if length == 1:
        return 0
    while place < 0 or place >= length:
        place = -place if place < 0 else 2 * (length - 1) - place
    return place


@_setup
def _SQUARES(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, images):
    for image in range(images):
        frames = _shape(in_shapes, images + image, 1)[0]
        side = _shape(in_shapes, 2 * images + image, 1)[0]
        shape = _shape(out_shapes, image, 4)
        shape[0], shape[1], shape[2], shape[3] = frames, side, side, 3


@_setup
def _TURNS(out_shapes, _out_dims, _outs, in_shapes, _in_dims, _ins, images):
    for image in range(images):
        frames, side = _shape(in_shapes, images + image, 1)[0], _shape(in_shapes, image, 1)[0]
        shape = _shape(out_shapes, image, 4)
        shape[0], shape[1], shape[2], shape[3] = frames, side, side, 3


@_setup
def _SAME(out_shapes, _out_dims, _outs, in_shapes, in_dims, _ins, images):
    dimensions = carray(_pointer(in_dims), 1, np.int32)[0]
    for image in range(images):
        shape, same = _shape(out_shapes, image, dimensions), _shape(in_shapes, image, dimensions)
        for k in range(dimensions):
            shape[k] = same[k]


@_run
def _RESIZE(out_data, out_shapes, _out_dims, _outs, in_data, in_shapes, _in_dims, _ins):
    height, width, _ = _shape(in_shapes, 0, 3)
    frames, size, _, _ = _shape(out_shapes, 0, 4)
    image = _bytes(in_data, 0, height * width * 3).reshape((height, width * 3))
    regions = _floats(in_data, 1, frames * 5).reshape((frames, 5))
    out = _bytes(out_data, 0, frames * size * size * 3).reshape((frames, size, size * 3))
    for frame in range(frames):
        _resize(out[frame], image, regions[frame])


@_run
def _CUT(out_data, out_shapes, _out_dims, _outs, in_data, in_shapes, _in_dims, _ins):
    height, width, _ = _shape(in_shapes, 0, 3)
    frames, size, _, _ = _shape(out_shapes, 0, 4)
    places = _shape(in_shapes, 1, 3)[1]
    image = _bytes(in_data, 0, height * width * 3).reshape((height, width * 3))
    corners = _floats(in_data, 1, frames * places * 2).reshape((frames, places, 2))
    out = _bytes(out_data, 0, frames * size * size * 3).reshape((frames, size, size * 3))
    for frame in range(frames):
        _cut(out[frame], image, corners[frame])


@_run
def _TURN(out_data, out_shapes, _out_dims, _outs, in_data, _in_shapes, _in_dims, _ins):
    frames, side, _, _ = _shape(out_shapes, 0, 4)
    image = _bytes(in_data, 0, side * side * 3).reshape((side, side * 3))
    turns = _floats(in_data, 1, frames)
    out = _bytes(out_data, 0, frames * side * side * 3).reshape((frames, side, side * 3))
    for frame in range(frames):
        _turn(out[frame], image, int(turns[frame]))


@_run
def _COLORS(out_data, _out_shapes, _out_dims, _outs, in_data, in_shapes, in_dims, _ins):
    dimensions = carray(_pointer(in_dims), 1, np.int32)[0]
    shape = _shape(in_shapes, 0, dimensions)
    values = 1
    for k in range(dimensions):
        values *= shape[k]
    frames = _shape(in_shapes, 1, 2)[0]
    each = values // frames
    pixels, out = _bytes(in_data, 0, values), _bytes(out_data, 0, values)
    changes = _floats(in_data, 1, 5 * frames)
    for frame in range(frames):
        first = frame * each
        _change(
            out[first : first + each],
            pixels[first : first + each],
            changes[5 * frame : 5 * frame + 5],
        )


@_run
def _SATURATION(out_data, out_shapes, _out_dims, _outs, in_data, _in_shapes, _in_dims, _ins):
    frames, height, width, _ = _shape(out_shapes, 0, 4)
    each = height * width * 3
    pixels, out = _bytes(in_data, 0, frames * each), _bytes(out_data, 0, frames * each)
    changes = _floats(in_data, 1, 6 * frames)
    for frame in range(frames):
        first = frame * each
        _change_saturation(
            out[first : first + each],
            pixels[first : first + each],
            changes[6 * frame : 6 * frame + 6],
        )


@_run
def _BLUR(out_data, _out_shapes, _out_dims, _outs, in_data, in_shapes, _in_dims, _ins):
    height, width, _ = _shape(in_shapes, 0, 3)
    image = _bytes(in_data, 0, height * width * 3).reshape((height, width * 3))
    out = _bytes(out_data, 0, height * width * 3).reshape((height, width * 3))
    _blur(out, image, _floats(in_data, 1, 1)[0])
