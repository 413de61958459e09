"""Exemplar's objectives against slow versions, closed forms, and each other over two processes."""

import io
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from fastssl.objectives import exemplar, exemplar_classes


class Tiny(nn.Module):
    """A backbone without batch norm, so that a half batch gives half of the joined one's result."""

    def __init__(self):
        super().__init__()
        self.dim = 6
        self.normalization = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.layer = nn.Linear(48, 6)
        self.calls: list[Tensor] = []

    def forward(self, x):
        self.calls.append(x)
        x = x.to(self.layer.weight.dtype) / 255 if x.dtype == torch.uint8 else x
        return torch.tanh(self.layer(4 * (x - 0.5).flatten(1)))


def build(module=exemplar, images=12, seed=0, **options):
    torch.manual_seed(1)
    options = ({"dimension": 5} if module is exemplar else {"dropout": 0.0}) | options
    return module.Objective(
        Tiny(), module.Options(**options), images=images, classes=0, labels=None, seed=seed
    )


def batch(index=(3, 8, 0, 5), views=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(index), views, 3, 4, 4)
    pixels = torch.rand(shape, generator=generator, dtype=torch.float64)
    return {"views": pixels.to(dtype), "index": torch.tensor(index)}


# -- triplets -----------------------------------------------------------------------------------


def slow_triplets(embeddings, image, views, margin, mining):
    """The definition, one triplet after the other; embeddings [N, D], image [N]."""
    losses = []
    distance = ((embeddings[:, None] - embeddings) ** 2).sum(-1)
    for a in range(len(embeddings)):
        positives = [p for p in range(len(embeddings)) if p // views == a // views and p != a]
        negatives = [n for n in range(len(embeddings)) if image[n] != image[a]]
        if mining == "batch_hard":
            far = max((distance[a, p] for p in positives), key=Tensor.detach)
            near = min((distance[a, n] for n in negatives), key=Tensor.detach)
            losses.append((margin + far - near).clamp_min(0))
            continue
        for p in positives:
            farther = [n for n in negatives if distance[a, n] > distance[a, p]]
            if farther:
                chosen = min((distance[a, n] for n in farther), key=Tensor.detach)
            else:
                chosen = max((distance[a, n] for n in negatives), key=Tensor.detach)
            losses.append((margin + distance[a, p] - chosen).clamp_min(0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("normalized", ["embedding", "batch"])
@pytest.mark.parametrize("mining", ["semi_hard", "batch_hard"])
@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("index", [(3, 8, 0, 5, 1), (3, 8, 3, 5, 8)])  # and images twice
def test_loss_and_gradients_are_those_of_the_definition(index, views, mining, normalized):
    objective = build(mining=mining, normalize=normalized, margin=0.3).double()
    inputs = batch(index, views, dtype=torch.float64)
    parameters = list(objective.parameters())
    outputs = objective.head(objective.backbone(inputs["views"].flatten(0, 1)))
    embeddings = normalize(outputs, dim=1 if normalized == "embedding" else 0)
    image = [i for i in index for _ in range(views)]
    slow = slow_triplets(embeddings, image, views, 0.3, mining)
    slow_gradients = torch.autograd.grad(slow, parameters)
    fast, _ = objective(**inputs)
    gradients = torch.autograd.grad(fast, parameters)

    assert fast > 0
    torch.testing.assert_close(fast, slow)
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-6, atol=1e-12)


def line(*places):
    """Embeddings on a line, in a second dimension too so that there is a matrix."""
    return torch.stack([torch.tensor(places), torch.zeros(len(places))], 1)


def test_negatives_mined_by_hand():
    # two images of two views at 0, 2 and 1, 5: squared distances can be done in the head
    image = torch.tensor([0, 0, 1, 1])
    anchors = torch.arange(4)
    semi = exemplar.Options(margin=10.0)
    losses, right = exemplar.triplets(line(0.0, 2.0, 1.0, 5.0), image, anchors, 2, semi)
    hard = exemplar.Options(margin=10.0, mining="batch_hard")
    hardest, _ = exemplar.triplets(line(0.0, 2.0, 1.0, 5.0), image, anchors, 2, hard)

    # 0: positive 4; negatives 1 and 25: 25 is farther. 2: positive 4; 1 and 9. 1: positive 16;
    # negatives 1 and 1: none is farther, the farthest is 1. 5: positive 16; 25 and 9: 25
    assert losses.flatten().tolist() == [0, 10 + 4 - 9, 10 + 16 - 1, 10 + 16 - 25]
    assert hardest.flatten().tolist() == [10 + 4 - 1, 10 + 4 - 1, 10 + 16 - 1, 10 + 16 - 9]
    assert right.tolist() == [False, False, False, False]


def test_negative_as_far_as_the_positive_is_not_semi_hard():
    # anchor 0: the positive at 1 and a negative at -1 are equally far, another negative at 3
    options = exemplar.Options(margin=20.0)
    losses, _ = exemplar.triplets(
        line(0.0, 1.0, -1.0, 3.0), torch.tensor([0, 0, 1, 1]), torch.tensor([0]), 2, options
    )

    assert losses.item() == 20 + 1 - 9


def test_anchors_in_blocks_give_what_all_at_once_give(monkeypatch):
    inputs = batch(range(11), 4, dtype=torch.float64)
    objective = build(images=11).double()
    parameters = list(objective.parameters())
    whole, _ = objective(**inputs)
    gradients = torch.autograd.grad(whole, parameters)
    monkeypatch.setattr(exemplar, "ANCHORS", 7)
    blocked, _ = objective(**inputs)

    torch.testing.assert_close(blocked, whole)
    for one, other in zip(torch.autograd.grad(blocked, parameters), gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mining", ["semi_hard", "batch_hard"])
def test_equal_embeddings_give_the_margin(mining):
    objective = build(mining=mining, margin=0.5)
    same = torch.rand(1, 1, 3, 4, 4).expand(4, 3, 3, 4, 4)
    loss, metrics = objective(same, torch.arange(4))

    assert loss.item() == pytest.approx(0.5, abs=1e-5)
    assert metrics["std"].item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("mining", ["semi_hard", "batch_hard"])
def test_images_far_apart_give_no_loss_and_are_all_found(mining):
    objective = build(mining=mining, dimension=6)
    corners = torch.eye(6).repeat_interleave(3, dim=0)
    objective.backbone.forward = lambda views: corners
    with torch.no_grad():
        objective.head.weight.copy_(torch.eye(6))
        objective.head.bias.zero_()
    loss, metrics = objective(torch.zeros(6, 3, 3, 4, 4), torch.arange(6))

    assert loss.item() == 0
    assert metrics["accuracy"].item() == 1
    assert metrics["chance"].item() == pytest.approx(2 / 17)


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(ValueError, match="one image has no negatives"):
        build()(**batch((4,)))


def test_batch_of_one_image_twice_has_no_loss_and_zero_gradients():
    objective = build()
    loss, metrics = objective(**batch((4, 4)))
    loss.backward()

    assert loss.item() == 0
    assert metrics["accuracy"].item() == 1
    for parameter in objective.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_accuracy_of_random_embeddings_is_near_chance():
    objective = build(images=200)
    noise = torch.randn(800, 6, generator=torch.Generator().manual_seed(0))
    objective.backbone.forward = lambda views: noise
    _, metrics = objective(torch.zeros(200, 4, 1, 1, 1), torch.arange(200))

    assert metrics["chance"].item() == pytest.approx(3 / 799)
    assert metrics["accuracy"].item() < 0.02
    assert metrics["std"].item() == pytest.approx(1, abs=0.15)


def test_every_pair_of_a_large_batch_is_scored():
    # 2048 views: a [N, N, N] tensor would take 34 GB
    objective = build(images=256)
    loss, metrics = objective(**batch(range(256), 8))
    loss.backward()

    assert loss.isfinite()
    assert metrics["chance"].item() == pytest.approx(7 / 2047)


def test_two_views_at_least():
    with pytest.raises(ValueError, match=r"views \(1\) must be at least 2: a positive"):
        build()(**batch(views=1))


# -- classes ------------------------------------------------------------------------------------


def test_full_softmax_is_cross_entropy_over_the_rows_of_the_listing():
    objective = build(exemplar_classes)
    inputs = batch()
    loss, metrics = objective(**inputs)
    logits = objective.head(objective.backbone(inputs["views"].flatten(0, 1)))
    own = torch.tensor([i for i in (3, 8, 0, 5) for _ in range(3)])

    assert logits.shape == (12, 12)
    torch.testing.assert_close(loss, cross_entropy(logits, own))
    assert metrics["chance"].item() == pytest.approx(1 / 12)
    assert metrics["accuracy"].item() == pytest.approx((logits.argmax(1) == own).float().mean())


@pytest.mark.parametrize("softmax_images", [100, 0])
def test_equal_logits_give_the_logarithm_of_the_number_of_images(softmax_images):
    objective = build(exemplar_classes, images=100, softmax_images=softmax_images, negatives=9)
    with torch.no_grad():
        objective.head.weight.zero_()
        objective.head.bias.fill_(0.7)
    loss, metrics = objective(**batch())

    assert loss.item() == pytest.approx(math.log(100))
    assert metrics["chance"].item() == pytest.approx(1 / (10 if softmax_images == 0 else 100))


def test_all_classes_sampled_is_the_full_softmax():
    full = build(exemplar_classes).double()
    sampled = build(exemplar_classes, softmax_images=0, negatives=12).double()
    inputs = batch(dtype=torch.float64)
    results = []
    for objective in (full, sampled):
        loss, metrics = objective(**inputs)
        gradients = torch.autograd.grad(loss, list(objective.parameters()))
        results.append((loss, metrics["accuracy"], metrics["chance"], gradients))

    torch.testing.assert_close(*results)


def test_sampled_sum_has_the_full_one_as_its_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    own, trials, count = 7, 20_000, 12
    drawn = torch.randint(50, (trials, count), generator=generator)
    loss, right = exemplar_classes.sampled_softmax(
        logits[own].expand(trials), logits[drawn], drawn == own, 50
    )
    full = cross_entropy(logits[None], torch.tensor([own]))

    assert loss.exp().mean().item() == pytest.approx(full.exp().item(), rel=0.01)
    assert full - 0.1 < loss.mean() < full  # the logarithm of an estimate is a little low
    expected = (logits[drawn].masked_fill(drawn == own, -9).amax(1) < logits[own]).double().mean()
    assert right.double().mean() == expected


def test_more_negatives_come_nearer_to_the_full_softmax():
    inputs = batch(range(40), dtype=torch.float64)
    full, _ = build(exemplar_classes, images=4000).double()(**inputs)

    def error(negatives):
        objective = build(
            exemplar_classes, images=4000, softmax_images=0, negatives=negatives
        ).double()
        with torch.no_grad():
            objective.head.weight.mul_(8)
        losses = []
        for _ in range(20):
            losses.append(objective(**inputs)[0].detach())
            objective.finish_step()
        return (torch.stack(losses) - whole).abs().mean()

    sharper = build(exemplar_classes, images=4000).double()
    with torch.no_grad():
        sharper.head.weight.mul_(8)
    whole = sharper(**inputs)[0].detach()

    assert whole > full  # what is told apart is worse at random when it is sharper
    assert error(1000) < error(10) / 3


def test_step_draws_the_same_classes_everywhere_and_another_step_others():
    first, second = (
        build(exemplar_classes, images=1000, softmax_images=0, negatives=50) for _ in range(2)
    )
    other = build(exemplar_classes, images=1000, seed=1, softmax_images=0, negatives=50)
    device = torch.device("cpu")
    before = first.draw(device)
    torch.manual_seed(5)  # a generator that somebody moved changes nothing

    assert torch.equal(before, second.draw(device))
    assert not torch.equal(before, other.draw(device))
    first.finish_step()
    assert not torch.equal(before, first.draw(device))


def test_drawn_classes_are_uniform():
    objective = build(exemplar_classes, images=40, softmax_images=0, negatives=30)
    counts = torch.zeros(40)
    for _ in range(400):
        counts += torch.bincount(objective.draw(torch.device("cpu")), minlength=40)
        objective.finish_step()

    expected = 400 * 30 / 40
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_restored_objective_draws_what_the_unbroken_one_draws():
    options = {"images": 500, "softmax_images": 0, "negatives": 20}
    unbroken = build(exemplar_classes, **options)
    losses = []
    file = io.BytesIO()
    for step in range(4):
        if step == 2:
            torch.save(unbroken.state_dict(), file)
        losses.append(unbroken(**batch(seed=step))[0].item())
        unbroken.finish_step()
    file.seek(0)
    restored = build(exemplar_classes, **options)
    restored.load_state_dict(torch.load(file, weights_only=True))
    again = []
    for step in (2, 3):
        again.append(restored(**batch(seed=step))[0].item())
        restored.finish_step()

    assert again == losses[2:]


def test_dropout_falls_on_the_features_in_training_only():
    objective = build(exemplar_classes, dropout=0.5)
    inputs = batch()
    drawn = {objective(**inputs)[0].item() for _ in range(3)}
    objective.eval()
    steady = {objective(**inputs)[0].item() for _ in range(3)}

    assert len(drawn) == 3
    assert len(steady) == 1


# -- both ---------------------------------------------------------------------------------------

KINDS = [
    (exemplar, {}),
    (exemplar, {"mining": "batch_hard"}),
    (exemplar, {"normalize": "batch"}),
    (exemplar_classes, {}),
    (exemplar_classes, {"softmax_images": 0, "negatives": 7}),
]


@pytest.mark.parametrize(("module", "options"), KINDS)
def test_gradient_reaches_every_parameter(module, options):
    objective = build(module, **options)
    loss, metrics = objective(**batch())
    loss.backward()

    for parameter in objective.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert {"accuracy", "chance"} <= set(metrics)
    for metric in metrics.values():
        assert metric.shape == ()
        assert metric.dtype == torch.float32
        assert not metric.requires_grad


@pytest.mark.parametrize(("module", "options"), KINDS)
def test_all_views_pass_the_backbone_in_one_call_without_a_copy(module, options):
    objective = build(module, **options)
    pixels = torch.randint(0, 256, (4, 3, 4, 4, 3), dtype=torch.uint8)
    objective(pixels.permute(0, 1, 4, 2, 3), torch.arange(4))  # as the loader hands them over
    (views,) = objective.backbone.calls

    assert views.shape == (12, 3, 4, 4)
    assert views.data_ptr() == pixels.data_ptr()
    assert views.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("module", "options"), KINDS)
def test_step_reads_no_value_back_from_the_device(module, options):
    # fake tensors have shapes and no values: .item(), nonzero() and masks as indices raise
    with FakeTensorMode():
        objective = build(module, **options)
        loss, _ = objective(**batch())
        loss.backward()
        objective.finish_step()


@pytest.mark.parametrize(("module", "options"), KINDS)
def test_bf16_autocast_stays_close_to_float32_and_scores_in_float32(module, options):
    objective = build(module, **options)
    loss, _ = objective(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, metrics = objective(**batch())

    assert half.dtype == torch.float32
    assert all(metric.dtype == torch.float32 for metric in metrics.values())
    assert half.item() == pytest.approx(loss.item(), rel=0.03)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (exemplar, {"margin": 0.0}, r"margin \(0.0\) must be above 0"),
        (exemplar, {"dimension": 1}, r"dimension \(1\) must be at least 2: unit vectors of"),
        (exemplar_classes, {"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
        (exemplar_classes, {"softmax_images": -1}, r"softmax_images \(-1\) must be at least 0"),
        (exemplar_classes, {"negatives": 0}, r"negatives \(0\) must be at least 1"),
    ],
)
def test_wrong_options_are_refused_with_the_number(module, options, message):
    with pytest.raises(ValueError, match=message):
        module.Options(**options)


TOGETHER = [KINDS[2], KINDS[4]]  # tests/test_objectives.py has the defaults
INDICES = [(3, 8, 0, 5), (1, 7, 7, 1), (3, 2, 11, 3)]  # images on both processes, and twice on one


def train(objective, model, part):
    """Three steps on `part` of every batch: losses, accuracies, and the weights at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    for step, index in enumerate(INDICES):
        inputs = batch(index, seed=step, dtype=torch.float64)
        loss, metrics = model(**{name: each[part] for name, each in inputs.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.finish_step()
        results.append(torch.stack([loss.detach(), metrics["accuracy"].double()]))
    return torch.stack(results), objective.state_dict()


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for module, options in TOGETHER:
        objective = build(module, **options).double()
        model = DistributedDataParallel(objective)
        results.append(train(objective, model, slice(2 * rank, 2 * rank + 2)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_joined_batch(tmp_path):
    start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))

    for (module, options), one, other in zip(TOGETHER, first, second, strict=True):
        objective = build(module, **options).double()
        results, state = train(objective, objective, slice(None))
        torch.testing.assert_close((one[0] + other[0]) / 2, results)
        for name, value in state.items():
            torch.testing.assert_close(one[1][name], value)
            torch.testing.assert_close(other[1][name], value)
