"""The numbers behind `analyze`, in closed form, and the pictures that are made of them."""

import builtins
import importlib.util
import io
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn

from fastssl.analysis import attention, depth, drawing, embedding_map, invariance, spectrum
from fastssl.analysis import pretext_against_downstream as pretext
from tests import tiny_backbone


def ink(figure: Figure) -> float:
    """The part of a picture's pixels that is not white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50, facecolor="white")
    return float((np.asarray(Image.open(file).convert("L")) < 250).mean())


# -- spectrum


def test_k_equal_singular_values_have_effective_rank_k_and_one_alone_has_1():
    assert spectrum.effective_rank(np.array([3.0] * 7)) == pytest.approx(7)
    assert spectrum.effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert spectrum.effective_rank(np.zeros(3)) == 0
    assert spectrum.participation_ratio(np.array([2.0] * 5)) == pytest.approx(5)
    assert spectrum.participation_ratio(np.array([2.0, 0.0])) == pytest.approx(1)


def test_orthogonal_directions_of_equal_spread_count_each_whatever_the_mean_is():
    features = np.concatenate([np.eye(4), -np.eye(4)]) + 1000.0

    found = spectrum.spectrum(features)

    assert found.effective_rank == pytest.approx(4)
    assert found.participation_ratio == pytest.approx(4)
    assert found.dead == 0
    np.testing.assert_allclose(found.std, 0.5)  # sqrt(2 / 8)


def test_isotropic_noise_uses_nearly_all_directions():
    found = spectrum.spectrum(np.random.default_rng(0).normal(size=(4000, 16)))

    assert 15.9 < found.effective_rank <= 16
    assert 15.5 < found.participation_ratio <= 16


def test_blocks_of_a_file_give_what_svd_of_the_whole_gives(tmp_path):
    features = np.random.default_rng(1).normal(size=(103, 12)).astype(np.float32) ** 3
    np.save(tmp_path / "features.npy", features)
    wide = features.astype(np.float64)

    found = spectrum.spectrum(np.load(tmp_path / "features.npy", mmap_mode="r"), block=10)

    expected = np.linalg.svd(wide - wide.mean(0), compute_uv=False)
    np.testing.assert_allclose(found.singular_values, expected, rtol=1e-9)
    np.testing.assert_allclose(found.std, wide.std(0), rtol=1e-9)


def test_a_dimension_that_never_changes_is_dead_and_equal_features_have_rank_0():
    features = np.random.default_rng(2).normal(size=(50, 3))
    features[:, 1] = 7.0

    assert spectrum.spectrum(features).dead == 1
    assert spectrum.spectrum(np.ones((5, 3))).effective_rank == 0


def test_a_spectrum_of_one_image_or_of_nan_is_refused():
    with pytest.raises(ValueError, match="at least 2 images, there is 1"):
        spectrum.spectrum(np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 of 3 features are not finite"):
        spectrum.spectrum(np.array([[1.0, np.nan, 0.0], [1.0, 1.0, 1.0]]))


# -- invariance


def pairs(image: list[list[float]], view: list[list[float]]) -> invariance.Distances:
    """The distances of given embeddings."""
    given = {"image": torch.tensor(image), "view": torch.tensor(view)}
    return invariance.measure(
        lambda tensors: (tensors["image"], tensors["view"][:, None]), [[given]], seed=0
    )


def test_equal_orthogonal_and_opposite_embeddings_lie_0_root_2_and_2_apart():
    image = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    found = pairs(image, [[5.0, 0.0], [0.0, 0.1], [-7.0, 0.0]])

    np.testing.assert_allclose(found.same, [0, 2**0.5, 2], atol=1e-12)


def test_the_reference_compares_no_image_with_itself():
    corners = torch.eye(5).tolist()
    found = pairs(corners, corners)

    assert found.same.tolist() == [0.0] * 5
    np.testing.assert_allclose(found.other, 2**0.5)


def test_mean_variance_and_n_are_over_all_transforms_and_all_passes():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    views = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [-1.0, 0.0]]])
    given = {"image": image, "views": views}

    found = invariance.measure(lambda t: (t["image"], t["views"]), [[given]] * 3, seed=0)

    distances = np.array([0, 2**0.5, 0, 2])
    assert found.numbers()["n"] == 12
    assert found.numbers()["images"] == 2
    assert found.numbers()["mean"] == pytest.approx(distances.mean())
    assert found.numbers()["variance"] == pytest.approx(distances.var())


def test_one_image_dead_and_diverged_networks_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, there is 1"):
        pairs([[1.0, 0.0]], [[1.0, 0.0]])
    with pytest.raises(ValueError, match="all zeros"):
        pairs([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="not finite"):
        pairs([[1.0, 0.0], [float("nan"), 0.0]], [[1.0, 0.0], [1.0, 0.0]])


def test_statistics_of_the_batch_are_used_and_nothing_in_the_network_changes():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rows = torch.tensor([[1.0, 10.0], [3.0, 30.0]])

    with invariance.statistics(network, "batch"):
        by_batch = network(rows)
    with invariance.statistics(network, "stored"):
        stored = network(rows)

    torch.testing.assert_close(
        by_batch, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(stored, rows, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert not any(module.training for module in network.modules())


def test_patches_are_averaged_and_each_turned_copy_counts_for_itself():
    backbone = tiny_backbone.backbone(tiny_backbone.Options()).eval()
    pixels = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    image = pixels[:, 0]
    embed = invariance.of_backbone(backbone, "global")
    with torch.no_grad():
        each = torch.stack([backbone(pixels[:, number]) for number in range(4)], dim=1)

        _, patches = embed({"image": image, "patches": pixels})
        _, copies = embed({"image": image, "turned": pixels})
        _, one = embed({"image": image, "turned": image})

    torch.testing.assert_close(patches, each.mean(1, keepdim=True))
    torch.testing.assert_close(copies, each)
    torch.testing.assert_close(one, each[:, :1])


# -- attention


def test_attention_of_a_constant_map_is_flat_and_sums_powers_over_channels():
    activation = torch.full((1, 5, 3, 3), -2.0)

    for power in (1, 2, 4):
        found = attention.attention(activation, power)
        assert found.unique().tolist() == [5 * 2.0**power]


def test_maps_of_patches_lie_where_the_patches_were_cut():
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8, generator=draw)
    cells = [
        image[..., 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r in (0, 1, 2) for c in (0, 1, 2)
    ]
    backbone = tiny_backbone.backbone(tiny_backbone.Options()).eval()

    whole, maps = attention.maps(backbone, {"patches": torch.stack(cells, dim=1)}, "global")

    _, of_cell = attention.maps(backbone, {"image": cells[5]}, "global")
    assert (whole[0] == image[0].permute(1, 2, 0).numpy()).all()
    assert maps["first"].shape == (3, 1, 21, 21)
    for there, alone in zip(maps["first"][:, :, 7:14, 14:], of_cell["first"], strict=True):
        # nine at a time may be summed in another order; near 0 that is a larger share
        np.testing.assert_allclose(there, alone, rtol=1e-4, atol=1e-5 * alone.max())


def test_a_network_without_maps_is_refused():
    class Flat(nn.Module):
        def stages(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"pool": x.float().mean((2, 3))}

    with pytest.raises(attention.NoMaps, match="no stage with a height"):
        attention.maps(Flat(), {"image": torch.zeros(1, 3, 8, 8)}, "global")


# -- map


def test_a_subset_has_as_many_of_each_class_and_is_the_same_for_a_seed():
    labels = np.repeat(np.arange(5), [40, 10, 30, 20, 50])

    chosen = embedding_map.subset(labels, most=25, classes=10, seed=3)

    assert np.bincount(labels[chosen]).tolist() == [5] * 5
    assert (chosen == embedding_map.subset(labels, most=25, classes=10, seed=3)).all()
    assert np.unique(labels[embedding_map.subset(labels, most=6, classes=3, seed=0)]).tolist() == [
        0,
        2,
        4,
    ]


def test_one_class_and_too_few_images_are_refused():
    with pytest.raises(embedding_map.TooFew, match="at least 2 classes, there is 1"):
        embedding_map.subset(np.zeros(9, np.int64), most=4, classes=2, seed=0)
    with pytest.raises(embedding_map.TooFew, match="less than 2 of each"):
        embedding_map.subset(np.arange(9), most=9, classes=9, seed=0)
    with pytest.raises(embedding_map.TooFew, match="at least 4 images"):
        embedding_map.neighbours(np.ones((3, 2)), seed=0)


def test_principal_components_of_an_ellipse_are_its_axes():
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    ellipse = np.stack([3 * np.cos(angle), np.sin(angle), np.full(400, 5.0)], axis=1)

    points, parts = embedding_map.principal(ellipse[:, [1, 2, 0]])

    np.testing.assert_allclose(np.abs(points), np.abs(ellipse[:, :2]), atol=1e-9)
    np.testing.assert_allclose(parts, [0.9, 0.1])


def test_tsne_keeps_two_far_groups_apart():
    generator = np.random.default_rng(0)
    groups = np.concatenate([generator.normal(size=(20, 4)), generator.normal(size=(20, 4)) + 50])

    points = embedding_map.neighbours(groups, seed=0)

    nearest = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(40)
    assert ((nearest.argmin(1) < 20) == (np.arange(40) < 20)).all()
    assert (points == embedding_map.neighbours(groups, seed=0)).all()


# -- journals


def test_the_pretext_accuracy_is_the_mean_of_the_last_tenth_without_probes():
    lines = [{"step": step, "accuracy": step / 100} for step in range(10, 101, 2)]
    lines += [{"step": 100, "probe": "knn", "accuracy": 0.0, "neighbours": 20}]

    assert pretext.pretext_accuracy(lines) == pytest.approx(0.96)  # 92, 94, ..., 100
    assert pretext.pretext_accuracy([]) is None
    assert pretext.knn_accuracy(lines, 100) == (0.0, 20)
    assert pretext.knn_accuracy(lines, 90) is None


def test_depth_reads_the_newest_lines_of_these_very_settings_and_images():
    settings = {"step": 9, "protocol": "lbfgs", "data": "/a", "graph_sizes": (1, 2)}
    counts = {"train_images": 200, "val_images": 50}
    line = {"probe": "linear", **settings, "graph_sizes": [1, 2], "l2": 0.1, **counts}
    lines = [
        line | {"stage": "a", "accuracy": 0.1},
        line | {"stage": "b", "accuracy": 0.2},
        line | {"stage": "a", "accuracy": 0.3, "train_images": 199},  # one can't be decoded
        {key: value for key, value in line.items() if key != "data"} | {"stage": "b"},
    ]
    others = [("protocol", "mlp"), ("step", 8), ("data", "/b"), ("data_limit", 8), ("probe", "svm")]
    others += [("graph_sizes", [1, 3]), ("l2_given", 0.1), ("train_images", 197)]
    others += [("train_images", 201), ("val_images", 20)]
    lines += [line | {"stage": "b", "accuracy": 0.9, key: value} for key, value in others]

    assert depth.accuracies(lines, settings, **counts) == {"a": 0.3, "b": 0.2}


def points(*both: tuple[float, float]) -> list[pretext.Point]:
    return [
        pretext.Point(name=f"run{n}", task="t", pretext=a, downstream=b)
        for n, (a, b) in enumerate(both)
    ]


def test_rank_correlation_of_known_orders():
    assert pretext.rank_correlation(points((0.1, 0.2), (0.2, 0.9), (0.9, 0.91))) == pytest.approx(1)
    assert pretext.rank_correlation(points((0.1, 0.9), (0.2, 0.5), (0.9, 0.1))) == pytest.approx(-1)
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    four = points((0.1, 0.2), (0.2, 0.1), (0.3, 0.4), (0.4, 0.3))
    assert pretext.rank_correlation(four) == pytest.approx(0.6)
    assert pretext.rank_correlation(points((0.1, 0.2), (0.2, 0.3))) is None
    assert pretext.rank_correlation(points((0.1, 0.2), (0.1, 0.3), (0.1, 0.4))) is None


# -- pictures


def figure_of(name: str) -> Figure:
    generator = np.random.default_rng(0)
    text = "what was measured, on how much and on which images of which folder " * 3
    match name:
        case "invariance":
            one = invariance.Distances(
                same=generator.uniform(0, 1, 90), other=generator.uniform(1, 2, 90), images=30
            )
            return invariance.draw({"heads": {"a": one}, "features": {"a": one, "b": one}}, text)
        case "spectrum":
            noise = spectrum.spectrum(generator.normal(size=(40, 8)))
            return spectrum.draw({"run": noise, "one of a long name": noise}, text)
        case "attention":
            images = generator.integers(0, 255, (2, 9, 9, 3))
            return attention.draw(images, {"first": generator.uniform(size=(3, 2, 5, 5))}, text)
        case "map":
            flat = {"PCA": generator.normal(size=(30, 2))}
            return embedding_map.draw(flat, ["cat", "dog", "owl"] * 10, text)
        case "depth":
            runs = {"a": {"x": 0.2, "y": 0.4}, "b": {"x": 0.3, "z": 0.1}}
            return depth.draw(runs, 0.1, text)
        case _:
            three = points((0.1, 0.2), (0.3, 0.1), (0.2, 0.4))
            return pretext.draw(three, "linear accuracy, %", text)


@pytest.mark.parametrize("name", ["invariance", "spectrum", "attention", "map", "depth", "pretext"])
def test_a_picture_is_drawn_and_all_of_its_text_fits_in(name, tmp_path):
    figure = figure_of(name)

    path = drawing.save(figure, tmp_path / "new", name, {"numbers": [1.0]})

    assert ink(figure) > 0.01
    assert path.stat().st_size > 5000
    written = json.loads((tmp_path / "new" / f"{name}.json").read_text())
    assert written == {"numbers": [1.0]}
    figure.set_dpi(drawing.DPI)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()  # of all that is drawn, inches
    assert sum(bool(text.get_text()) for text in figure.findobj(Text)) > 3
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    one = drawing.save(figure_of("depth"), tmp_path / "1", "depth", {})
    two = drawing.save(figure_of("depth"), tmp_path / "2", "depth", {})

    assert one.read_bytes() == two.read_bytes()


def test_packages_that_are_missing_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    real = builtins.__import__

    def without_scipy(name, *arguments):
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_scipy)

    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'fastssl\[evaluate\]'"):
        drawing.require()
    with pytest.raises(ValueError, match=r"needs scikit-learn: pip install 'fastssl\[evaluate\]'"):
        embedding_map.require()
    with pytest.raises(ValueError, match=r"needs SciPy: pip install 'fastssl\[evaluate\]'"):
        pretext.rank_correlation(points((0.1, 0.2), (0.2, 0.9), (0.9, 0.91)))
