"""Previews: a picture of every recipe, with every output named and shown as it is."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastssl import config, page, pictures, preview

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def silent(text: str) -> None:
    del text


def column(shown: pictures.Page, name: str) -> pictures.Column:
    (found,) = [each for each in shown.columns if each.name == name]
    return found


def frames(column: pictures.Column) -> np.ndarray:
    """The pixels of all its cells: [B, F, h, w, 3]."""
    return np.stack([each.frames for each in column.cells if each.frames is not None])


def cells(column: pictures.Column) -> list[str]:
    return [" / ".join(cell.lines) for cell in column.cells]


@pytest.fixture(scope="module")
def odd(tmp_path_factory, checkout) -> Path:
    """A recipe of the task in odd_task.py."""
    recipe = yaml.safe_load((checkout / "recipes" / "pirl_jigsaw.yaml").read_text())
    for section in ("pipeline", "objective"):
        recipe[section] = {"use": "tests.odd_task"}
        del recipe["demo"][section]
    path = tmp_path_factory.mktemp("recipe") / "odd.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def odd_page(odd, demo_images) -> tuple[page.Batch, pictures.Page]:
    batch = preview.gather(config.load(odd), images=4, seed=0, say=silent)
    return batch, page.page("odd", batch)


def test_there_are_recipes_to_look_at():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_picture_that_names_every_output(path, demo_images):
    batch = preview.gather(config.load(path), images=3, seed=0, say=silent)
    shown = page.page(path.stem, batch)
    drawn = pictures.draw(shown)
    texts = shown.texts()

    assert batch.outputs.keys() > {"index"}
    for name in batch.outputs:
        assert any(name == text or text.startswith(f"{name} ") for text in texts), name
    assert {len(each.cells) for each in shown.columns} == {3}
    assert [f"index {row}" in texts for row in batch.outputs["index"]] == [True] * 3
    assert batch.inputs  # the backbone was given something
    assert 300 < drawn.width <= 1600
    assert 300 < drawn.height < 1200
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 500  # pixels, not text alone
    assert any("chance" in line for line in shown.lines)


def test_the_command_writes_a_png_and_says_how_large_it_is(odd, demo_images, tmp_path, capsys):
    out = tmp_path / "odd.PNG"
    code = preview.main([str(odd), "--out", str(out), "data.limit=30", "--images", "2"])

    assert code == 0
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", out.read_bytes()[16:24])
    assert f"{out}: {width} x {height} pixels" in capsys.readouterr().out


def test_one_seed_shows_the_same_batch_and_another_one_another(odd, demo_images):
    recipe = config.load(odd)
    first, again, other = (
        preview.gather(recipe, images=2, seed=seed, say=silent) for seed in (1, 1, 2)
    )

    for name, values in first.outputs.items():
        np.testing.assert_array_equal(values, again.outputs[name])
    assert first.metrics == again.metrics
    assert first.outputs["index"].tolist() != other.outputs["index"].tolist()


def test_outputs_of_a_task_never_seen_before_are_shown_by_name_and_value(odd_page):
    batch, shown = odd_page
    strip = frames(column(shown, "strip"))

    np.testing.assert_array_equal(strip, np.moveaxis(batch.outputs["strip"], 2, -1))
    tilts = ("tilt 7", "tilt 21", "tilt 35", "tilt 49", "tilt 63")
    assert [cell.captions for cell in column(shown, "strip").cells] == [tilts] * 4
    mask = frames(column(shown, "mask"))  # one channel, shown gray
    assert mask.shape == (4, 1, 24, 24, 3)
    np.testing.assert_array_equal(mask[:, 0, ..., 0], batch.outputs["mask"][:, 0])
    assert cells(column(shown, "weight")) == [f"{row / 2:.4g}" for row in batch.outputs["index"]]
    first, *_, last = column(shown, "boxes").cells[0].lines
    assert (first, last) == ("100 101 102 103", "... 2 more")
    assert cells(column(shown, "field")) == ["-1 ... 2"] * 4


def test_what_the_backbone_is_given_is_shown_where_the_graph_does_not_put_it_out(odd_page):
    _, shown = odd_page
    inputs = [each for each in shown.columns if each.name.startswith("backbone input")]

    assert any("given strip, as shown and what the last columns show" in x for x in shown.lines)
    assert len(inputs) == 3  # of five calls, two with pixels of the strip
    # 51, normalised colour by colour, comes back by one mean and deviation
    assert (frames(inputs[0]) == (43, 49, 62)).all()
    assert frames(inputs[1]).max() == 255  # clamped; given to a copy of the backbone
    assert inputs[2].cells[0].lines == ("3 x 24 x 24 pixels for 4 images",)


def test_a_solved_jigsaw_is_the_patches_before_they_were_shuffled():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 256, (5, 9, 4, 4, 3), dtype=np.uint8)
    permutation = np.stack([rng.permutation(9) for _ in range(5)])
    shuffled = np.stack([each[order] for each, order in zip(right, permutation, strict=True)])
    patches, table, solved = page.columns({"patches": shuffled}, {"permutation": permutation})

    np.testing.assert_array_equal(frames(patches), shuffled)
    np.testing.assert_array_equal(table.cells[2].numbers, permutation[2].reshape(3, 3))
    assert (table.name, solved.name) == ("permutation", "solved")
    np.testing.assert_array_equal(frames(solved), right)
    assert {cell.across for cell in (*patches.cells, *solved.cells)} == {3}


def test_patches_that_the_head_shuffles_are_shown_in_the_first_order_too():
    patches = np.arange(2 * 9, dtype=np.uint8).reshape(2, 9, 1, 1, 1).repeat(3, axis=-1)
    order = np.stack([np.roll(np.arange(9), shift) for shift in range(1, 7)]).reshape(2, 3, 9)
    label = np.arange(6).reshape(2, 3)
    in_place = np.tile(np.arange(9), (2, 1))
    shown = page.columns(
        {"patches": patches}, {"permutation": in_place, "order": order, "label": label}
    )

    assert [each.name for each in shown] == ["patches", "permutation", "shuffled", "order", "label"]
    assert frames(shown[2])[0, :, 0, 0, 0].tolist() == [8, 0, 1, 2, 3, 4, 5, 6, 7]
    assert cells(shown[4]) == ["0 1 2", "3 4 5"]
    # the order to be told, beside the puzzle: read row by row, and under its number
    assert cells(shown[2]) == ["label 0", "label 3"]
    np.testing.assert_array_equal(shown[2].cells[0].numbers, [[8, 0, 1], [2, 3, 4], [5, 6, 7]])
    np.testing.assert_array_equal(shown[2].cells[1].numbers, order[1, 0].reshape(3, 3))
    np.testing.assert_array_equal(frames(shown[2])[1, :, 0, 0, 0], patches[1, order[1, 0], 0, 0, 0])


def test_the_first_order_of_patches_is_shown_where_there_is_no_label_either():
    in_place = np.arange(9)[None]
    shown = page.columns(
        {"patches": np.zeros((1, 9, 4, 4, 3), np.uint8)},
        {"permutation": in_place, "order": in_place[:, None, ::-1]},
    )

    assert shown[2].cells[0].lines == ()
    assert shown[2].cells[0].numbers is not None


def test_gray_patches_that_were_standardised_each_on_their_own_stay_gray(demo_images, checkout):
    path = checkout / "recipes" / "jigsaw.yaml"
    recipe = config.load(path, ["pipeline.grayscale=1", "data.limit=30"])
    batch = preview.gather(recipe, images=2, seed=0, say=silent)
    shown = column(page.page("jigsaw", batch), "backbone input")
    pixels = frames(shown)

    assert (pixels == pixels[..., :1]).all()
    assert (pixels.std(axis=(2, 3, 4)) > 20).all()  # pictures all the same
    assert shown.note.endswith("floats denormalised by one mean and std for all three colours")


def test_a_pair_is_shown_with_the_direction_in_words_and_laid_out_around_its_centre():
    patches = np.arange(9, dtype=np.uint8).reshape(1, 9, 1, 1, 1).repeat(3, axis=-1) + 10
    around = [0, 1, 2, 3, 5, 6, 7, 8]  # cells row by row without the centre
    pair = np.array([[[cell, 4] for cell in around]])
    patches_column, pairs, solved = page.columns(
        {"patches": patches}, {"pair": pair, "label": np.arange(8)[None]}
    )

    assert patches_column.name == "patches"
    assert pairs.cells[0].captions[0] == "label 0\nabove left"
    assert pairs.cells[0].captions[4] == "label 4\nright"
    assert pairs.cells[0].captions[6] == "label 6\nbelow"
    assert frames(pairs)[0, 4, 0, :, 0].tolist() == [15, 255, 255, 14]  # patch, space, centre
    np.testing.assert_array_equal(frames(solved), patches)


def test_one_pair_of_an_image_is_laid_out_alone():
    patches = np.array([30, 40], np.uint8).reshape(1, 2, 1, 1, 1).repeat(3, axis=-1)
    _, pairs, solved = page.columns(
        {"patches": patches}, {"pair": np.array([[[0, 1]]]), "label": np.array([3])}
    )

    assert pairs.cells[0].captions == ("label 3\nleft",)
    assert frames(solved)[0, 3:5, 0, 0, 0].tolist() == [30, 40]


def test_an_angle_is_written_under_the_picture_that_was_turned():
    one = np.zeros((2, 1, 4, 4, 3), np.uint8)
    image, turned = page.columns({"image": one, "turned": one}, {"angle": np.array([0, 270])})
    four = np.zeros((1, 4, 4, 4, 3), np.uint8)
    turns = {"angle": np.array([[0, 90, 180, 270]]), "label": np.array([[0, 1, 2, 3]])}
    (copies,) = page.columns({"turned": four}, turns)
    (_, alone) = page.columns({"image": one}, {"angle": np.array([0, 90])})

    assert image.cells[1].captions == ()
    assert turned.cells[1].captions == ("angle 270\N{DEGREE SIGN}",)
    assert copies.cells[0].captions[1] == "angle 90\N{DEGREE SIGN}\nlabel 1"
    assert cells(alone) == ["0\N{DEGREE SIGN}", "90\N{DEGREE SIGN}"]


def test_of_many_frames_and_long_lists_the_first_are_shown_and_the_rest_counted():
    many = np.zeros((1, 40, 4, 4, 3), np.uint8)
    views, label = page.columns({"views": many}, {"label": np.arange(100)[None]})

    assert frames(views).shape[1] == 16
    assert views.note.startswith("16 of 40 x 4 x 4")
    assert cells(label) == ["0 1 2 3 4 5 6 7 8 9 ... 90 more"]


def test_small_pictures_are_enlarged_by_whole_numbers_and_pixels_stay_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    shown = pictures.Column("noise", "", (pictures.Cell(frames=pixels),))
    drawn = np.asarray(pictures.draw(pictures.Page("title", (), (shown,))))
    # the enlarged pixels stand somewhere on the page, each a block of 12 x 12
    side = 16 * 12
    wanted = pixels[0].repeat(12, axis=0).repeat(12, axis=1)
    starts = np.argwhere((drawn[: 1 - side, : 1 - side] == wanted[0, 0]).all(axis=-1))

    assert any((drawn[y : y + side, x : x + side] == wanted).all() for y, x in starts)


def test_a_table_stands_beside_its_pictures_so_that_rows_stay_as_high():
    pixels = np.zeros((9, 24, 24, 3), np.uint8)
    numbers = np.arange(9).reshape(3, 3)
    plain, table = (
        pictures.draw(pictures.Page("title", (), (pictures.Column("patches", "", (cell,)),)))
        for cell in (
            pictures.Cell(frames=pixels, across=3),
            pictures.Cell(frames=pixels, across=3, numbers=numbers, lines=("label 4",)),
        )
    )

    assert table.height == plain.height
    assert table.width > plain.width + 40


def test_a_page_of_many_or_large_pictures_stays_within_its_width():
    pixels = np.zeros((9, 255, 255, 3), np.uint8)
    shown = [
        pictures.Column(f"column {n}", "", (pictures.Cell(frames=pixels, across=3),))
        for n in range(9)
    ]
    drawn = pictures.draw(pictures.Page("title", (), tuple(shown)))

    assert drawn.width <= pictures.WIDTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.jpg"], "--out (x.jpg) must end in .png"),
        (["--out", "no/such/x.png"], "there is no folder"),
        (["--out", "folder.png"], "--out (folder.png) can't be written: name another file"),
        (["--out", "x.png", "--images", "1"], "--images (1) must be in 2 ... 64"),
        (["--out", "x.png", "--images", "65"], "--images (65) must be in 2 ... 64"),
        (["--out", "x.png", "--seed", "-1"], "--seed (-1) must be in 0 ... 2147483647"),
        (["--out", "x.png", "pipeline.sise=3"], "pipeline.sise: unknown key; did you mean 'size'?"),
        (["--out", "x.png", "pipeline.use=pipelines.evaluation"], "does not put out"),
        (
            ["--out", "x.png", "data.limit=5"],
            "5 usable images are fewer than --images (8): give at most 5, or more images",
        ),
    ],
)
def test_mistakes_are_named_with_the_remedy_and_nothing_is_written(
    arguments, message, odd, demo_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    code = preview.main([str(odd), *arguments])

    assert code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_an_unknown_recipe_is_named(tmp_path, capsys):
    code = preview.main([str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "x.png")])

    assert code == 2
    assert "recipe.yaml: No such file" in capsys.readouterr().err


def test_a_picture_that_a_full_disk_cuts_off_is_an_error(odd, demo_images, tmp_path, capsys):
    out = tmp_path / "x.png"
    out.symlink_to("/dev/full")
    code = preview.main([str(odd), "--out", str(out), "data.limit=8", "--images", "2"])

    assert code == 1
    assert f"--out ({out}) can't be written: " in capsys.readouterr().err


def test_help_tells_what_it_is_for(capsys):
    with pytest.raises(SystemExit) as end:
        preview.main(["--help"])
    text = capsys.readouterr().out

    assert end.value.code == 0
    assert "python -m fastssl.preview recipes/" in text
    assert "--images N" in text


def test_the_pictures_in_the_readme_are_there_and_of_recipes():
    folder = RECIPES[0].parent
    readme = (folder.parent / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"recipes/previews/(\w+)\.png", readme))

    assert len(shown) >= 5
    assert shown <= {recipe.stem for recipe in RECIPES}
    assert all((folder / "previews" / f"{name}.png").is_file() for name in shown)
