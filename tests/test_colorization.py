"""Colorization: crops read off position-coded pixels; the loss against loops; no colour leaks."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl import lab
from fastssl.backbones import resnet
from fastssl.objectives import colorization
from pipelines import colorization as pipeline

SIDE = 96


def ramp() -> np.ndarray:
    """Red counts columns, green counts rows."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([columns * 2, rows * 2, np.full_like(rows, 7)], axis=-1).astype(np.uint8)


# -- the graph ----------------------------------------------------------------------------------


def images(run_graph, png, runs=1, batch=64, seed=0, **options):
    options = pipeline.Options(**options)
    return run_graph(pipeline, options, [png] * batch, runs=runs, seed=seed)["image"]


def test_the_crop_lies_anywhere_in_the_image_and_holds_its_pixels(run_graph, png_of):
    out = images(run_graph, png_of(ramp()), runs=8, image_size=88, resize=SIDE, flip=0.0)
    column, row = (out[:, 0, 0, channel].astype(int) // 2 for channel in (0, 1))

    assert set(column) == set(row) == set(range(SIDE - 88 + 1))
    for number in range(16):
        across = slice(column[number], column[number] + 88)
        expected = ramp()[row[number] : row[number] + 88, across]
        np.testing.assert_array_equal(out[number], expected)


def test_flip_mirrors_with_its_probability(run_graph, png_of):
    out = images(run_graph, png_of(ramp()), runs=4, image_size=SIDE, resize=SIDE, flip=0.25)
    mirrored = out[:, 0, 0, 0] > out[:, 0, -1, 0]

    assert 0.15 < mirrored.mean() < 0.36
    np.testing.assert_array_equal(out[mirrored][0], ramp()[:, ::-1])


def test_an_inception_crop_has_its_share_of_the_area(run_graph, png_of):
    options = {"crop": "inception", "image_size": SIDE, "image_area": (0.25, 1.0), "flip": 0.0}
    out = images(run_graph, png_of(ramp()), runs=8, **options).astype(float)
    width = (out[:, 40, -1, 0] - out[:, 40, 0, 0]) / 2 + 1
    height = (out[:, -1, 40, 1] - out[:, 0, 40, 1]) / 2 + 1
    share = width * height / SIDE**2

    assert 0.22 < share.min() < 0.4
    assert 0.85 < share.max() <= 1.03


def test_the_aspect_is_kept(run_graph, png_of):
    wide = np.concatenate([ramp(), ramp()], axis=1)
    out = images(run_graph, png_of(wide), batch=8, image_size=48, resize=48, flip=0.0)

    assert out.shape == (8, 48, 48, 3)
    steps = np.diff(out[:, 24, :20, 1].astype(int))  # rows do not change along a row
    assert abs(steps).max() <= 1


@pytest.mark.parametrize("crop", ["whole", "inception"])
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_sizes_are_as_asked_and_threads_change_nothing(run_graph, png_of, size, crop):
    options = pipeline.Options(image_size=size, resize=size + 8, crop=crop)
    one = run_graph(pipeline, options, [png_of(ramp())] * 4, runs=2, threads=1, prefetch=1)
    two = run_graph(pipeline, options, [png_of(ramp())] * 4, runs=2, threads=2)
    other = run_graph(pipeline, options, [png_of(ramp())] * 4, runs=2, seed=1)

    assert one["image"].shape == (8, size, size, 3)
    np.testing.assert_array_equal(one["image"], two["image"])
    assert (one["image"] != other["image"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, r"image_size \(4\) must be at least 8"),
        ({"image_size": 300}, r"image_size \(300\) must fit in resize \(256\)"),
        ({"image_area": (0.5, 0.2)}, r"image_area \(\[0.5, 0.2\]\) must be two ascending"),
        ({"flip": 1.5}, r"flip \(1.5\) must be a probability"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Options(**options)


def test_the_size_that_images_are_resized_to():
    assert pipeline.Options().largest_crop == 256
    assert pipeline.Options(crop="inception").largest_crop == 176
    assert pipeline.Options().classes == 0


# -- the objective ------------------------------------------------------------------------------


class Spy(nn.Module):
    """A backbone that keeps what it was given."""

    normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __init__(self):
        super().__init__()
        self.dim = 6
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=4, padding=1)
        self.given: list[Tensor] = []

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        self.given.append(x)
        first = torch.tanh(self.first(x.to(self.first.weight.dtype) / 255))
        second = torch.tanh(self.second(first))
        return {"first": first, "second": second, "pool": second.mean((2, 3))}

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)["pool"]


def build(backbone: nn.Module | None = None, **options) -> colorization.Objective:
    torch.manual_seed(0)
    options = colorization.Options(**{"channels": 8, **options})
    backbone = backbone or Spy()
    return colorization.Objective(backbone, options, images=9, classes=0, labels=None, seed=0)


def batch(count=4, side=16, seed=0) -> Tensor:
    """Patches of colour, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return small.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3)


def given(objective: colorization.Objective) -> list[Tensor]:
    assert isinstance(objective.backbone, Spy)
    return objective.backbone.given


def rows(image: Tensor) -> Tensor:
    return torch.arange(len(image))


def gray(count=4) -> Tensor:
    return batch(count)[:, :1].expand(-1, 3, -1, -1).contiguous()


def silent(objective: colorization.Objective) -> colorization.Objective:
    """The head says nothing: all logits are 0."""
    assert isinstance(objective.head, colorization.Hypercolumn)
    for parameter in objective.head.bins.parameters():
        nn.init.zeros_(parameter)
    return objective


def test_equal_logits_give_the_logarithm_of_the_number_of_bins():
    for encoding in ("soft", "hard"):
        loss, _ = silent(build(rebalance=False, encoding=encoding))(batch(), rows(batch()))
        assert loss.item() == pytest.approx(math.log(313), rel=1e-5)


@pytest.mark.parametrize("encoding", ["soft", "hard"])
def test_the_loss_is_that_of_loops_over_pixels(encoding):
    objective = build(encoding=encoding)
    image = batch()
    image[2] = gray()[2]
    objective.counts += torch.arange(313)
    loss, metrics = objective(image, rows(image))
    logits = objective._logits(image)
    centers, weights = objective.bins.centers, objective.weights()
    ab = lab.rgb_to_lab(image)[:, 1:, ::4, ::4]
    losses, right, nearest_of_all = [], [], []
    for b in (0, 1, 3):
        for y in range(4):
            for x in range(4):
                squares = (centers - ab[b, :, y, x]).square().sum(1)
                near = squares.argsort()[: 5 if encoding == "soft" else 1]
                share = torch.exp(-squares[near] / 50)
                target = torch.zeros(313)
                target[near] = share / share.sum()
                entropy = -(target * logits[b, :, y, x].log_softmax(0)).sum()
                losses.append(weights[near[0]] * entropy)
                right.append((logits[b, :, y, x] - weights.log()).argmax() == near[0])
                nearest_of_all.append(int(near[0]))
    most = max(nearest_of_all.count(each) for each in nearest_of_all)

    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["chance"] == pytest.approx(most / len(nearest_of_all))
    assert metrics["gray"] == pytest.approx(0.25)


def test_weights_are_those_of_the_closed_form():
    objective = build()
    before = objective.weights()  # nothing is seen: as good as even
    assert 0.9 < before.min() <= 1 <= before.max() < 1.5

    objective.counts[150] = 10**9  # one colour only: p is the Gaussian around it
    squares = (objective.bins.centers - objective.bins.centers[150]).square().sum(1)
    p = torch.exp(-squares / 50).double()
    p = p / p.sum()
    expected = 1 / (0.5 * p + 0.5 / 313)
    expected = expected / (p * expected).sum()
    torch.testing.assert_close(objective.weights(), expected.float(), rtol=1e-3, atol=0)
    assert objective.weights()[0] > 50 * objective.weights()[150]
    assert torch.equal(build(rebalance=False).weights(), torch.ones(313))


def test_the_mean_weight_of_a_prior_from_a_file_is_one(tmp_path):
    prior = np.random.default_rng(0).random(313) ** 4
    np.save(tmp_path / "prior.npy", prior / prior.sum())
    objective = build(prior=str(tmp_path / "prior.npy"))
    before = objective.weights()
    objective(batch(), rows(batch()))
    objective.finish_step()

    mean = (torch.tensor(prior / prior.sum()) * before).sum()
    assert mean.item() == pytest.approx(1, rel=1e-5)
    assert torch.equal(objective.weights(), before)
    assert before.argmin() == prior.argmax()


def test_counts_are_of_the_finished_steps_and_of_coloured_images_alone():
    objective = build()
    image = batch()
    image[2] = gray()[2]
    first, _ = objective(image, rows(image))
    again, _ = objective(image, rows(image))
    assert first.item() == again.item()
    assert objective.counts.sum() == 0

    objective.finish_step()
    ab = lab.rgb_to_lab(image)[[0, 1, 3], 1:, ::4, ::4].movedim(1, -1).reshape(-1, 2)
    nearest = torch.cdist(ab, objective.bins.centers).argmin(1)
    assert torch.equal(objective.counts, 2 * torch.bincount(nearest, minlength=313))
    with torch.no_grad():
        objective(image, rows(image))
    objective.finish_step()
    assert objective.counts.sum() == 2 * 3 * 16


def test_a_batch_of_gray_images_has_loss_zero_and_gradients():
    objective = build()
    loss, metrics = objective(gray(), rows(gray()))
    loss.backward()

    assert loss.item() == 0
    assert metrics["gray"] == 1
    assert all(each.grad is not None and not each.grad.any() for each in objective.parameters())


def test_a_gray_image_beside_others_changes_nothing_but_by_batch_norm():
    objective = build().eval()
    image = batch(3)
    alone, _ = objective(image, rows(image))
    joined, _ = objective(torch.cat([image, gray(2)]), torch.arange(5))

    torch.testing.assert_close(joined, alone)


def test_the_backbone_sees_gray_of_the_same_lightness():
    objective = build()
    image = batch()
    objective(image, rows(image))
    seen = given(objective)[-1]
    lightness = lab.rgb_to_lab(seen)[:, 0]

    assert seen.dtype == torch.uint8
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert torch.equal(seen[:, 0], seen[:, 2])
    assert (lightness - lab.rgb_to_lab(image)[:, 0]).abs().max() < 0.25


def test_no_colour_leaks_images_of_equal_lightness_look_alike():
    # all colours of a coarse cube by their gray value: two of each, as unlike as can be
    level = torch.arange(0, 256, 5, dtype=torch.uint8)
    cube = torch.cartesian_prod(level, level, level)
    value = lab.gray_of_equal_lightness(cube.T[None, :, :, None]).flatten()
    order = value.argsort(stable=True)
    cube, value = cube[order], value[order]
    half = [(value == each).nonzero().flatten() for each in range(60, 220, 10)]
    one = torch.stack([cube[each[0]] for each in half]).T.reshape(1, 3, 4, 4)
    other = torch.stack([cube[each[-1]] for each in half]).T.reshape(1, 3, 4, 4)
    one, other = (each.repeat_interleave(4, 2).repeat_interleave(4, 3) for each in (one, other))
    objective = build()
    losses = [objective(each, torch.zeros(1, dtype=torch.int64))[0] for each in (one, other)]

    distance = (lab.rgb_to_lab(one) - lab.rgb_to_lab(other))[:, 1:].abs().amax(1)
    assert distance.min() > 10
    assert torch.equal(given(objective)[-2], given(objective)[-1])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("head", ["hypercolumn", "deepest"])
def test_the_gradient_reaches_every_weight_of_a_resnet_in_whatever_stem(head):
    for stem in ("standard", "small"):
        network = resnet.backbone(resnet.Options(name="resnet10", width=32, stem=stem))
        objective = build(network, head=head)
        image = batch(side=32)
        loss, _ = objective(image, rows(image))
        loss.backward()
        without = [k for k, p in objective.named_parameters() if p.grad is None or not p.grad.any()]

        assert without == []
        assert objective._logits(image).shape == (4, 313, 8, 8)


def test_the_dry_run_leaves_backbone_and_generator_as_they_were():
    network = resnet.backbone(resnet.Options(name="resnet10", width=4))
    network.layer1.eval()  # frozen by its owner
    before = {name: each.clone() for name, each in network.state_dict().items()}
    modes = [each.training for each in network.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    maps = colorization._maps(network)

    assert torch.equal(torch.rand(1), expected)
    assert [each.training for each in network.modules()] == modes
    assert all(torch.equal(before[name], each) for name, each in network.state_dict().items())
    assert maps == [(4, 4), (4, 4), (8, 8), (16, 16), (32, 32), (32, 0)]  # channels, stride


def test_projecting_first_is_resizing_first():
    depths = [colorization.Map(3, 16), colorization.Map(5, 0)]
    head = colorization.Hypercolumn(depths, 4).eval()
    maps = [torch.randn(2, 3, 2, 2), torch.randn(2, 5)]
    large = colorization._at(maps[0], 16, (8, 8))
    total = head.projections[0](large) + head.projections[1](maps[1][:, :, None, None])

    torch.testing.assert_close(head(maps, (8, 8)), head.bins(head.norm(total).relu()))


def test_a_map_is_read_where_its_places_lie():
    # place i of a map of stride 8 is at pixel 8 i, target j at pixel 4 j; what lies beyond the last
    # place takes its value
    ramp = (torch.arange(3.0) * 8).expand(1, 1, 3, 3)
    read = colorization._at(ramp, 8, (6, 6))

    assert read[0, 0, 0].tolist() == [0, 4, 8, 12, 16, 16]
    assert colorization._at(ramp.mT, 8, (6, 6))[0, 0, :, 0].tolist() == [0, 4, 8, 12, 16, 16]


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
def test_the_prediction_of_a_pixel_looks_at_that_pixel(stage):
    stride = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}[stage]
    target = 32  # pixel 128, in the middle of the image
    weight = torch.zeros(256, 256)
    for _ in range(8):  # filters are random, and pull the centre about
        network = resnet.backbone(resnet.Options(name="resnet10", width=8)).eval()
        pixels = torch.rand(1, 3, 256, 256, requires_grad=True)
        maps = network.stages(pixels)[stage].square().sum(1, keepdim=True)
        colorization._at(maps, stride, (64, 64))[0, 0, target, target].backward()
        assert pixels.grad is not None
        of_one = pixels.grad.square().sum((0, 1))
        weight += of_one / of_one.sum() / 8
    place = torch.arange(256.0)
    row, column = (weight.sum(1) * place).sum(), (weight.sum(0) * place).sum()

    allowed = 0.5 + stride / 8  # half a stride off would be 14 pixels at layer4
    assert abs(row - 4 * target) < allowed
    assert abs(column - 4 * target) < allowed


def test_it_learns_a_colour_that_lightness_tells():
    # dark is red and bright is blue
    objective = build()
    color = torch.tensor([[120, 20, 20], [150, 170, 250]], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, 2, (8, 4, 4), generator=generator)
    image = color[choice].movedim(-1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    metrics = {}
    for _ in range(60):
        loss, metrics = objective(image, rows(image))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.finish_step()
    shown = objective.eval().colorize(image)

    assert metrics["accuracy"] > 0.95 > 0.7 > metrics["chance"]
    assert shown.dtype == torch.uint8
    assert shown.shape == image.shape
    dark = choice == 0
    difference = (shown[:, 0].int() - shown[:, 2].int())[:, 2::4, 2::4]
    assert difference[dark].float().mean() > 0 > difference[~dark].float().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, r"channels \(0\) must be at least 1"),
        ({"neighbours": 11}, r"neighbours \(11\) must be in 1 ... 10"),
        ({"sigma": 0.0}, r"sigma \(0.0\) must be above 0"),
        ({"uniform": 0.0}, r"uniform \(0.0\) must be above 0"),
        ({"prior": "/nowhere.npy"}, r"prior \(/nowhere.npy\) must be a .npy file of 313 numbers: "),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        colorization.Options(**options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(300), r"must hold floats \[313\], it holds float64 \[300\]"),
        (np.ones(313, np.int64), r"must hold floats \[313\], it holds int64 \[313\]"),
        (-np.ones(313), r"must hold shares, 0 or more, not all 0"),
    ],
)
def test_a_prior_of_another_form_is_refused(values, message, tmp_path):
    np.save(tmp_path / "prior.npy", values)

    with pytest.raises(ValueError, match=message):
        colorization.Options(prior=str(tmp_path / "prior.npy"))
