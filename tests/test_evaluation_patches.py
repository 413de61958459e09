"""K19's patches at evaluation: the cells of the middle, pixel by pixel, in the order of rows."""

import numpy as np
import pytest

from fastssl import config
from pipelines import evaluation, evaluation_patches
from tests.test_gpu_graphs import CHECKOUT


@pytest.mark.parametrize(("resize", "crop", "grid"), [(224, 192, 3), (84, 72, 3), (60, 40, 2)])
def test_patches_tile_the_middle_that_the_plain_evaluation_sees(
    run_graph, demo_images, resize, crop, grid
):
    encoded = [path.read_bytes() for path in sorted((demo_images / "val").glob("*/00003.jpg"))[:4]]
    options = evaluation_patches.Options(resize=resize, crop=crop, grid=grid)
    outputs = run_graph(evaluation_patches, options, encoded)
    plain = run_graph(evaluation, evaluation.Options(resize=resize, crop=crop), encoded)
    side = crop // grid
    expected = [
        plain["image"][:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(grid)
        for column in range(grid)
    ]

    assert outputs["patches"].dtype == np.uint8
    np.testing.assert_array_equal(outputs["patches"], np.stack(expected, axis=1))
    np.testing.assert_array_equal(outputs["image"], plain["image"])
    np.testing.assert_array_equal(outputs["index"][:, 0], np.arange(4))


def test_defaults_are_the_paper_s():
    options = evaluation_patches.Options()

    assert (options.resize, options.crop, options.grid) == (224, 192, 3)
    assert (options.classes, options.largest_crop) == (0, 224)


@pytest.mark.parametrize("name", ["jigsaw", "relative_patch"])
@pytest.mark.parametrize("overrides", [(), ("data.root=/somewhere",)], ids=["demo", "paper"])
def test_recipes_on_patches_evaluate_patches_of_the_size_that_they_train_on(name, overrides):
    recipe = config.load(CHECKOUT / "recipes" / f"{name}.yaml", overrides)
    evaluated = recipe.evaluation.options

    assert recipe.evaluation.use == "pipelines.evaluation_patches"
    assert evaluated.crop // evaluated.grid == recipe.pipeline.options.patch
    assert evaluated.grid == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 100}, r"crop \(100\) must be a multiple of grid \(3\): 99 or 102"),
        ({"crop": 225}, r"crop \(225\) must fit in resize \(224\)"),
        ({"crop": 21}, r"crop \(21\) must be at least 8 x grid \(24\)"),
        ({"grid": 0}, r"grid \(0\) must be at least 1"),
    ],
)
def test_cells_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluation_patches.Options(**options)
