import dataclasses
import io
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from fastssl.objectives import pirl


class Tiny(nn.Module):
    """A backbone without batch norm, so that a half batch gives half of the joined one's result."""

    def __init__(self):
        super().__init__()
        self.dim = 6
        self.normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.layer = nn.Linear(12, 6)
        self.calls: list[Tensor] = []

    def forward(self, x):
        self.calls.append(x)
        x = x.to(self.layer.weight.dtype) / 255 if x.dtype == torch.uint8 else x
        return torch.tanh(self.layer(4 * adaptive_avg_pool2d(x - 0.5, 2).flatten(1)))


def build(images=12, seed=0, **options):
    torch.manual_seed(1)
    options = {"dimension": 5, "negatives": 7, "temperature": 0.2, **options}
    return pirl.Objective(
        Tiny(), pirl.Options(**options), images=images, classes=0, labels=None, seed=seed
    )


def batch(index=(3, 8, 0, 5), seed=0, dtype=torch.float32):
    """What the loader hands over for the images of `index`, as floats."""
    generator = torch.Generator().manual_seed(seed)
    count = len(index)
    return {
        "image": torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
        "patches": torch.rand(count, 9, 3, 4, 4, generator=generator, dtype=torch.float64).to(
            dtype
        ),
        "permutation": torch.arange(9).expand(count, 9),
        "index": torch.tensor(index),
    }


def turned_batch(index=(3, 8, 0, 5), seed=0, dtype=torch.float32):
    """The same for the rotation graph."""
    inputs = batch(index, seed, dtype)
    generator = torch.Generator().manual_seed(100 + seed)
    turned = torch.rand(len(index), 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    angle = torch.randint(4, (len(index),), generator=generator) * 90
    return {"image": inputs["image"], "index": inputs["index"], "turned": turned, "angle": angle}


def tiny(objective) -> Tiny:
    assert isinstance(objective.backbone, Tiny)
    return objective.backbone


def patch_head(objective) -> pirl.PatchHead:
    assert objective.patch_head is not None
    return objective.patch_head


def embed(objective, image, patches):
    """The unit f [B, D] and g [B, D]."""
    f = objective.image_head(objective.backbone(image))
    g = patch_head(objective)(objective.backbone(patches.flatten(0, 1)))
    return normalize(f, dim=1), normalize(g, dim=1)


def unit_rows(objective):
    """The same objective in float64, with a bank of unit rows to that precision."""
    objective = objective.double()
    objective.memory.rows.copy_(normalize(objective.memory.rows, dim=1))
    return objective


# -- against the equations ----------------------------------------------------------------------


def slow_loss(objective, inputs):
    """Equations 4 to 6 in loops over images, patches and negatives."""
    image, index = inputs["image"], inputs["index"]
    options, rows = objective.options, objective.memory.rows
    per_image = len(index) if options.negatives_for == "image" else None
    drawn = objective.memory.draw(options.negatives, batch=per_image)

    def cosine(a, b):
        return (a @ b) / (a.norm() * b.norm())

    def h(a, b, others):  # eq. 4
        match = (cosine(a, b) / options.temperature).exp()
        sums = sum((cosine(b, rows[k]) / options.temperature).exp() for k in others)
        return match / (match + sums)

    def noise_contrastive(i, b, others):  # eq. 5
        loss = -h(rows[i], b, others).log()
        if options.loss == "infonce":
            return loss
        for k in others:
            one = h(b, rows[k], others) if options.normalizer == "memory" else h(rows[k], b, others)
            loss = loss - (1 - one).log()
        return loss

    total = torch.zeros((), dtype=torch.float64)
    for n, i in enumerate(index.tolist()):
        drawn_here = drawn[n] if drawn.dim() == 2 else drawn
        others = [k for k in drawn_here.tolist() if k != i]
        if options.patch_weight < 1:
            f = objective.image_head(objective.backbone(image[n : n + 1]))[0]
            total = total + (1 - options.patch_weight) * noise_contrastive(i, f, others)
        if options.patch_weight > 0:
            if options.transform == "rotation":
                g = objective.turned_head(objective.backbone(inputs["turned"][n : n + 1]))[0]
            else:
                patches = inputs["patches"][n]
                parts = [objective.backbone(patches[t : t + 1])[0] for t in range(9)]
                joined = torch.cat([objective.patch_head.each(part) for part in parts])
                g = objective.patch_head.joined(joined)
            total = total + options.patch_weight * noise_contrastive(i, g, others)
    return total / len(index)


COMBINATIONS = [
    (loss, negatives_for, normalizer, weight, negatives)
    for loss, (negatives_for, normalizer), weight, negatives in itertools.product(
        ("nce", "infonce"),
        (("batch", "view"), ("batch", "memory"), ("image", "view")),
        (0.0, 0.3, 1.0),
        (7, 12),  # below and at the size of the bank
    )
]


@pytest.mark.parametrize(
    ("loss", "negatives_for", "normalizer", "weight", "negatives"), COMBINATIONS
)
def test_loss_and_gradients_are_those_of_the_equations(
    loss, negatives_for, normalizer, weight, negatives
):
    objective = unit_rows(
        build(
            loss=loss,
            negatives_for=negatives_for,
            normalizer=normalizer,
            patch_weight=weight,
            negatives=negatives,
        )
    )
    inputs = batch(dtype=torch.float64, index=(3, 8, 3))  # one image twice
    parameters = [each for each in objective.parameters() if each.requires_grad]
    slow = slow_loss(objective, inputs)
    slow_gradients = torch.autograd.grad(slow, parameters)
    fast, _ = objective(**inputs)
    gradients = torch.autograd.grad(fast, parameters)

    torch.testing.assert_close(fast, slow)
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", ["nce", "infonce"])
def test_loss_and_gradients_of_a_turned_image_are_those_of_the_equations(loss):
    objective = unit_rows(build(loss=loss, transform="rotation", patch_weight=0.3))
    inputs = turned_batch(dtype=torch.float64)
    parameters = [each for each in objective.parameters() if each.requires_grad]
    slow = slow_loss(objective, inputs)
    slow_gradients = torch.autograd.grad(slow, parameters)
    fast, _ = objective(**inputs)
    gradients = torch.autograd.grad(fast, parameters)

    torch.testing.assert_close(fast, slow)
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("negatives_for", ["batch", "image"])
def test_loss_with_a_constant_z_is_that_of_wu_2018(negatives_for):
    objective = unit_rows(build(loss="nce_constant_z", negatives_for=negatives_for))
    inputs = batch(dtype=torch.float64, index=(3, 8, 3))
    drawn = objective.memory.draw(7, batch=3 if negatives_for == "image" else None)
    negatives = drawn.expand(3, 7).tolist()
    rows, tau, images, count = objective.memory.rows, 0.2, 12, 7
    f, g = embed(objective, inputs["image"], inputs["patches"])
    value, _ = objective(**inputs)
    gradient = torch.autograd.grad(value, objective.image_head.weight)[0]

    scores = []  # of f, with its memory and every negative, the image itself among them or not
    for n, i in enumerate(inputs["index"].tolist()):
        scores += [(f[n] @ rows[k] / tau).exp() for k in [i, *negatives[n]]]
    z = images * torch.stack(scores).mean().detach()
    expected = torch.zeros((), dtype=torch.float64)
    for view in (f, g):
        for n, i in enumerate(inputs["index"].tolist()):
            model = (view[n] @ rows[i] / tau).exp() / z  # P(i | v)
            expected = expected - (model / (model + count / images)).log()
            for k in negatives[n]:
                model = (view[n] @ rows[k] / tau).exp() / z
                expected = expected - (1 - model / (model + count / images)).log()
    expected = expected / 2 / 3
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, objective.image_head.weight)[0]
    )
    assert objective.log_z is not None
    torch.testing.assert_close(objective.log_z.exp(), z)


def test_z_stays_what_the_first_batch_made_it_and_looking_does_not_make_it():
    objective = build(loss="nce_constant_z")
    assert objective.log_z is not None
    with torch.no_grad():
        objective(**batch(seed=1))
    assert objective.log_z.item() == 0

    objective(**batch(seed=2))
    first = objective.log_z.clone()
    assert first.item() != 0
    objective(**batch(seed=3))  # of the same step
    objective.finish_step()
    objective(**batch(seed=4))
    assert torch.equal(objective.log_z, first)
    assert torch.equal(objective.state_dict()["log_z"], first)
    assert "log_z" not in build().state_dict()


def test_as_many_negatives_as_images_make_the_full_non_parametric_softmax():
    objective = build(loss="infonce", patch_weight=0.0, negatives=12)
    inputs = batch()
    value, metrics = objective(image=inputs["image"], index=inputs["index"])
    f = normalize(objective.image_head(objective.backbone(inputs["image"])), dim=1)
    scores = f @ objective.memory.rows.T / 0.2  # every image once, the own included

    torch.testing.assert_close(value, cross_entropy(scores, inputs["index"]))
    assert metrics["chance"].item() == pytest.approx(1 / 12)


@pytest.mark.parametrize("normalizer", ["view", "memory"])
@pytest.mark.parametrize("loss", ["nce", "infonce"])
def test_equal_similarities_give_the_known_loss(loss, normalizer):
    count = 50
    options = pirl.Options(loss=loss, normalizer=normalizer)
    row = normalize(torch.ones(4, dtype=torch.float64), dim=0)
    losses, right = pirl.contrast(
        row.expand(1, 3, 4),
        row.expand(3, 4),
        row.expand(count, 4),
        torch.zeros(3, count, dtype=torch.bool),
        options,
    )

    expected = math.log(1 + count)
    if loss == "nce":
        expected += count * math.log((1 + count) / count)
    assert losses.tolist() == pytest.approx([expected])
    assert not right.any()  # no nearer than the negatives


def test_equal_similarities_give_the_known_loss_with_a_constant_z():
    count, images = 50, 200
    row = normalize(torch.ones(4, dtype=torch.float64), dim=0)
    losses, _ = pirl.contrast(
        row.expand(1, 3, 4),
        row.expand(3, 4),
        row.expand(count, 4),
        torch.zeros(3, count, dtype=torch.bool),
        pirl.Options(loss="nce_constant_z"),
        torch.tensor(math.log(images) + 1 / 0.07, dtype=torch.float64),
        images,
    )

    # all alike, every image has P = 1 / images, as the noise has
    expected = math.log(1 + count) + count * math.log((1 + count) / count)
    assert losses.tolist() == pytest.approx([expected])


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("loss", ["nce", "infonce"])
@pytest.mark.parametrize("normalizer", ["view", "memory"])
def test_image_without_negatives_has_loss_zero(images, loss, normalizer):
    objective = build(images=images, loss=loss, normalizer=normalizer)
    inputs = batch(index=(0, 0))
    value, metrics = objective(**inputs)
    value.backward()

    if images == 1:
        assert value.item() == 0
        assert metrics["accuracy"].item() == metrics["chance"].item() == 1
    else:
        assert value.item() > 0
        assert metrics["chance"].item() == 0.5
    for parameter in objective.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("normalizer", ["view", "memory"])
@pytest.mark.parametrize("temperature", [0.07, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_loss_and_gradients_stay_finite_at_extreme_similarities(sign, temperature, normalizer):
    row = normalize(torch.ones(4), dim=0)
    view = (sign * row).expand(1, 2, 4).clone().requires_grad_()
    negatives = torch.cat([-row.expand(3, 4), row.expand(3, 4)])
    own = torch.zeros(2, 6, dtype=torch.bool)
    own[1, 3:] = True  # for the second image only the far ones count
    options = pirl.Options(temperature=temperature, normalizer=normalizer)
    losses, _ = pirl.contrast(view, row.expand(2, 4), negatives, own, options)
    losses.sum().backward()

    assert losses.isfinite().all()
    assert view.grad is not None
    assert view.grad.isfinite().all()


def test_own_memory_among_the_negatives_changes_nothing():
    objective = build(loss="nce", negatives=12)  # every row is drawn, its own included
    inputs = batch(index=(3,))
    value, _ = objective(**inputs)
    own = torch.zeros(1, 11, dtype=torch.bool)
    others = objective.memory.rows[[k for k in range(12) if k != 3]]
    views = torch.stack(embed(objective, inputs["image"], inputs["patches"]))
    losses, _ = pirl.contrast(views, objective.memory.rows[[3]], others, own, objective.options)

    torch.testing.assert_close(value, losses.mean())


# -- heads and views ----------------------------------------------------------------------------


def test_all_patches_pass_the_backbone_in_one_call_without_a_copy():
    objective = build()
    inputs = batch()
    pixels = torch.randint(0, 256, (4, 9, 4, 4, 3), dtype=torch.uint8)
    inputs["patches"] = pixels.permute(0, 1, 4, 2, 3)  # as the loader hands them over
    objective(**inputs)
    image, patches = tiny(objective).calls

    assert image is inputs["image"]
    assert patches.shape == (36, 3, 4, 4)
    assert patches.data_ptr() == pixels.data_ptr()
    assert patches.is_contiguous(memory_format=torch.channels_last)


def test_embedding_of_patches_knows_their_order():
    head = patch_head(build())
    features = torch.randn(4 * 9, 6, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = features.unflatten(0, (4, 9))[:, order].flatten(0, 1)
    with torch.no_grad():
        before, after = head(features), head(shuffled)
        # the same permutation of the second layer's blocks undoes it
        blocks = head.joined.weight.unflatten(1, (9, 5))
        head.joined.weight.copy_(blocks[:, order].flatten(1))
        undone = head(shuffled)

    assert not torch.allclose(before, after)
    torch.testing.assert_close(undone, before)


def test_heads_have_the_shapes_of_the_paper():
    backbone = Tiny()
    backbone.dim = 2048
    options = {"images": 3, "classes": 0, "labels": None, "seed": 0}
    objective = pirl.Objective(backbone, pirl.Options(), **options)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in objective.named_parameters()
        if "head" in name and "weight" in name
    }

    assert shapes == {
        "image_head.weight": (128, 2048),
        "patch_head.each.weight": (128, 2048),
        "patch_head.joined.weight": (128, 1152),
    }
    turned = pirl.Objective(backbone, pirl.Options(transform="rotation"), **options)
    assert turned.patch_head is None
    assert turned.turned_head is not None
    assert turned.turned_head.weight.shape == (128, 2048)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_gradient_reaches_every_parameter_that_asks_for_one(weight):
    objective = build(patch_weight=weight)
    objective(**batch())[0].backward()
    wants = {name for name, each in objective.named_parameters() if each.requires_grad}
    moved = {
        name
        for name, each in objective.named_parameters()
        if each.grad is not None and each.grad.abs().sum() > 0
    }

    assert moved == wants
    assert ("image_head.weight" in wants) == (weight < 1)
    assert ("patch_head.each.weight" in wants) == (weight > 0)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_gradient_reaches_every_parameter_that_asks_for_one_with_a_turned_image(weight):
    objective = build(patch_weight=weight, transform="rotation")
    objective(**turned_batch())[0].backward()
    wants = {name for name, each in objective.named_parameters() if each.requires_grad}
    moved = {
        name
        for name, each in objective.named_parameters()
        if each.grad is not None and each.grad.abs().sum() > 0
    }

    assert moved == wants
    assert ("turned_head.weight" in wants) == (weight > 0)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"patch_weight": 0.0}, {"image", "index"}),
        ({"patch_weight": 0.0, "transform": "rotation"}, {"image", "index"}),
        ({"patch_weight": 0.5}, {"image", "index", "patches"}),
        ({"patch_weight": 1.0, "transform": "rotation"}, {"image", "index", "turned"}),
    ],
)
def test_what_the_options_need_is_enough_and_nothing_less(options, names):
    inputs = {**batch(), **turned_batch()}
    assert pirl.takes(pirl.Options(**options)) == names

    value, _ = build(**options)(**{name: inputs[name] for name in names})
    everything, _ = build(**options)(**inputs)
    assert value.item() == everything.item()


def test_a_turned_image_passes_as_it_is_through_a_head_of_its_own():
    objective = build(transform="rotation")
    inputs = turned_batch()
    _, metrics = objective(**inputs)
    image, turned = tiny(objective).calls

    assert image is inputs["image"]
    assert turned is inputs["turned"]
    f = normalize(objective.image_head(objective.backbone(image)), dim=1)
    assert objective.turned_head is not None
    g = normalize(objective.turned_head(objective.backbone(turned)), dim=1)
    torch.testing.assert_close(metrics["agreement"], (f * g).sum(1).mean().detach())


def test_without_patch_weight_it_is_npid_and_never_looks_at_the_patches():
    objective = build(patch_weight=0.0)
    inputs = batch()
    value, metrics = objective(**inputs)
    other, _ = objective(**{**inputs, "patches": torch.full((4, 2, 3, 4, 4), float("nan"))})

    assert len(tiny(objective).calls) == 2  # one for each call of forward
    assert value.item() == other.item()
    assert not any(name.startswith("patch_head") for name in objective.state_dict())
    assert objective(image=inputs["image"], index=inputs["index"])[0].item() == value.item()
    assert set(metrics) == {"accuracy", "chance", "std"}


def test_with_full_patch_weight_f_only_feeds_the_memory():
    objective = build(patch_weight=1.0)
    inputs = batch()
    value, metrics = objective(**inputs)
    value.backward()
    before = objective.memory.rows.clone()
    objective.finish_step()
    changed = (objective.memory.rows != before).any(1).nonzero().flatten().tolist()

    assert sorted(inputs["index"].tolist()) == changed
    assert "agreement" in metrics


def test_bf16_autocast_stays_close_to_float32_and_scores_in_float32():
    objective = build(images=500, negatives=300, temperature=0.07)
    inputs = batch()
    value, _ = objective(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, metrics = objective(**inputs)
    objective.finish_step()

    assert half.dtype == torch.float32
    assert all(metric.dtype == torch.float32 for metric in metrics.values())
    assert objective.memory.rows.dtype == torch.float32
    assert half.item() == pytest.approx(value.item(), rel=0.02)


def test_batch_may_be_larger_than_the_number_of_negatives():
    value, _ = build(negatives=2)(**batch(index=(0, 1, 2, 3, 4)))

    assert value.isfinite()


@pytest.mark.parametrize("loss", ["nce", "infonce", "nce_constant_z"])
@pytest.mark.parametrize("normalizer", ["view", "memory"])
def test_step_reads_no_value_back_from_the_device(loss, normalizer):
    # fake tensors have shapes and no values: .item(), nonzero() and masks as indices raise, each of
    # which would wait for a GPU
    with FakeTensorMode():
        objective = build(loss=loss, normalizer=normalizer)
        value, metrics = objective(**batch())
        value.backward()
        objective.finish_step()
        with pytest.raises(DataDependentOutputException):
            metrics["std"].item()


# -- metrics ------------------------------------------------------------------------------------


def test_metrics_are_detached_scalars_with_their_known_values():
    objective = build(images=100)
    inputs = batch()
    _, metrics = objective(**inputs)
    f, g = embed(objective, inputs["image"], inputs["patches"])

    assert set(metrics) == {"accuracy", "chance", "std", "agreement"}
    for metric in metrics.values():
        assert metric.shape == ()
        assert metric.dtype == torch.float32
        assert not metric.requires_grad
    assert metrics["chance"].item() == pytest.approx(1 / 8)
    torch.testing.assert_close(metrics["agreement"], (f * g).sum(1).mean().detach())


def test_accuracy_is_one_when_every_image_meets_its_own_memory():
    objective = build(images=12, negatives=12, patch_weight=0.0)
    inputs = batch()
    objective(**inputs)
    objective.memory.rows[inputs["index"]] = objective.memory.seen[0][1]
    right = objective(**inputs)[1]["accuracy"].item()
    objective.memory.rows[inputs["index"]] *= -1
    wrong = objective(**inputs)[1]["accuracy"].item()

    assert (right, wrong) == (1, 0)


def test_spread_is_one_for_random_directions_and_zero_when_collapsed():
    objective = build(patch_weight=0.0, dimension=6)
    with torch.no_grad():  # f is what the backbone says
        objective.image_head.weight.copy_(torch.eye(6))
        objective.image_head.bias.zero_()

    def spread(features):
        objective.backbone.forward = lambda image: features
        index = torch.arange(len(features)) % 12
        return objective(features, index)[1]["std"].item()

    directions = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    assert spread(directions) == pytest.approx(1, abs=0.05)
    assert spread(directions[:1].expand(50, 6)) == pytest.approx(0, abs=1e-6)

    objective.backbone.forward = lambda image: directions[:1]
    assert "std" not in objective(directions[:1], torch.zeros(1, dtype=torch.int64))[1]


# -- the memory over steps ----------------------------------------------------------------------


def test_memory_is_written_from_the_image_alone_once_a_step_after_scoring():
    objective = build()
    inputs = batch()
    before = objective.memory.rows.clone()
    f = embed(objective, inputs["image"], inputs["patches"])[0].detach()
    value, _ = objective(**inputs)
    value.backward()
    assert torch.equal(objective.memory.rows, before)

    objective.finish_step()
    expected = before.clone()
    expected[inputs["index"]] = normalize((before[inputs["index"]] + f) / 2, dim=1)
    torch.testing.assert_close(objective.memory.rows, expected)


def test_two_accumulated_batches_are_one_batch_for_loss_and_memory():
    whole, halves = build(), build()
    inputs = batch()
    value, _ = whole(**inputs)
    whole.finish_step()
    values = [
        halves(**{name: each[part] for name, each in inputs.items()})[0]
        for part in (slice(0, 2), slice(2, 4))
    ]
    halves.finish_step()

    torch.testing.assert_close(value, torch.stack(values).mean())
    torch.testing.assert_close(whole.memory.rows, halves.memory.rows)
    assert torch.equal(whole.memory.draw(7), halves.memory.draw(7))


def test_looking_without_learning_leaves_no_trace():
    objective = build()
    first = objective(**batch())[0].item()
    objective.memory.seen.clear()
    with torch.no_grad():
        objective(**batch(seed=5))
    objective.eval()
    objective(**batch(seed=6))
    before = objective.memory.rows.clone()
    objective.finish_step()
    objective.train()

    assert torch.equal(objective.memory.rows, before)
    assert objective(**batch())[0].item() == first


@pytest.mark.parametrize("loss", ["nce", "nce_constant_z"])
def test_restored_objective_continues_with_the_same_losses(loss):
    def steps(objective, count, first):
        losses = []
        for step in range(first, first + count):
            value, _ = objective(**batch(seed=step))
            objective.finish_step()
            losses.append(value.item())
        return losses

    unbroken = build(images=50, loss=loss)
    losses = steps(unbroken, 4, 0)
    broken = build(images=50, loss=loss)
    steps(broken, 2, 0)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    restored = build(images=50, loss=loss)
    restored.load_state_dict(torch.load(file, weights_only=True))

    assert steps(restored, 2, 2) == losses[2:]
    assert len(set(losses)) == 4


@pytest.mark.parametrize("loss", ["nce", "infonce", "nce_constant_z"])
def test_every_loss_teaches_to_tell_twelve_images_apart(loss):
    objective = build(
        loss=loss, patch_weight=0.0, negatives=12, dimension=16, temperature=0.1, images=12
    )
    inputs = batch(index=range(12))
    parameters = [each for each in objective.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)  # constant Z: 0.1 with momentum is too steep
    accuracies = []
    for _ in range(300):
        value, metrics = objective(image=inputs["image"], index=inputs["index"])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        objective.finish_step()
        accuracies.append(metrics["accuracy"].item())

    assert accuracies[0] < 0.5
    assert accuracies[-1] > 0.9


# -- two processes ------------------------------------------------------------------------------

RUNS = [
    {"patch_weight": 0.0},
    {"patch_weight": 0.5, "normalizer": "memory"},
    {"patch_weight": 1.0, "loss": "infonce"},
    {"patch_weight": 0.5, "transform": "rotation"},
    {"patch_weight": 0.5, "loss": "nce_constant_z"},
]
INDICES = [(3, 8, 0, 5), (1, 7, 7, 1), (3, 2, 11, 3)]  # images on both processes, and twice on one


def train(objective, model, part):
    """Three steps on `part` of every batch: losses and the bank, and the weights at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    make = turned_batch if objective.options.transform == "rotation" else batch
    for step, index in enumerate(INDICES):
        inputs = make(index=index, seed=step, dtype=torch.float64)
        value, _ = model(**{name: each[part] for name, each in inputs.items()})
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        objective.finish_step()
        losses.append(value.detach())
    return torch.stack(losses), objective.state_dict()


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for options in RUNS:
        objective = build(**options).double()
        model = DistributedDataParallel(objective, broadcast_buffers=False)
        results.append(train(objective, model, slice(2 * rank, 2 * rank + 2)))
    memory = build(images=1000).memory
    draws = memory.draw(50), memory.draw(50, batch=2)
    torch.save({"results": results, "draws": draws}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_joined_batch_and_hold_the_same_memory(tmp_path):
    start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))

    for options, (loss_0, state_0), (loss_1, state_1) in zip(
        RUNS, first["results"], second["results"], strict=True
    ):
        objective = build(**options).double()
        loss, state = train(objective, objective, slice(None))
        torch.testing.assert_close((loss_0 + loss_1) / 2, loss)
        assert torch.equal(state_0["memory.rows"], state_1["memory.rows"])
        for name, value in state.items():
            torch.testing.assert_close(state_0[name], value)
    shared, per_image = zip(first["draws"], second["draws"], strict=True)
    assert torch.equal(*shared)
    assert not torch.equal(*per_image)


# -- options and contract -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_weight": 1.1}, r"patch_weight \(1.1\) must lie in 0 ... 1"),
        ({"patch_weight": float("nan")}, r"patch_weight \(nan\) must"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be above 0"),
        ({"temperature": 1e-300}, r"temperature \(1e-300\) must be above 0, 0.0001 at least"),
        ({"momentum": 1.0}, r"momentum \(1.0\) must be at least 0 and below 1"),
        ({"momentum": -0.1}, r"momentum \(-0.1\) must be at least 0 and below 1"),
        ({"negatives": 0}, r"negatives \(0\) must be at least 1"),
        ({"dimension": 1}, r"dimension \(1\) must be at least 2: unit vectors of one number are"),
        ({"patches": 0}, r"patches \(0\) must be at least 1"),
        ({"shard_bank_gb": -1.0}, r"shard_bank_gb \(-1.0\) must be at least 0: 0 shares out every"),
        ({"shard_bank_gb": float("nan")}, r"shard_bank_gb \(nan\) must be at least 0"),
        (
            {"normalizer": "memory", "negatives_for": "image"},
            r"normalizer \('memory'\) must be 'view' .* or set negatives_for: batch",
        ),
    ],
)
def test_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        pirl.Options(**options)


def test_pipeline_with_another_number_of_patches_is_refused():
    with pytest.raises(ValueError, match=r"patches \(4\) must be as many as .* puts out: 9"):
        build(patches=4)(**batch())


def test_defaults_are_the_papers():
    assert dataclasses.asdict(pirl.Options()) == {
        "patch_weight": 0.5,
        "transform": "jigsaw",
        "temperature": 0.07,
        "momentum": 0.5,
        "negatives": 32000,
        "dimension": 128,
        "patches": 9,
        "loss": "nce",
        "negatives_for": "batch",
        "normalizer": "view",
        "bank_dtype": "float32",
        "shard_bank_gb": 2.0,
    }
