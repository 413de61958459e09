import dataclasses
import io
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import adaptive_avg_pool2d, normalize
from torch.nn.parallel import DistributedDataParallel

from fastssl import optim
from fastssl.objectives import moco


class Tiny(nn.Module):
    """Features of a half batch are those within the joined one, unless batch norm is asked for."""

    def __init__(self, norm=False):
        super().__init__()
        self.dim = 6
        self.layer = nn.Linear(12, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()

    def forward(self, x):
        x = x.to(self.layer.weight.dtype) / 255 if x.dtype == torch.uint8 else x
        return torch.tanh(self.norm(self.layer(4 * adaptive_avg_pool2d(x - 0.5, 2).flatten(1))))


def build(norm=False, seed=0, **options):
    torch.manual_seed(1)
    options = {"dimension": 5, "hidden": 8, "queue": 10, "momentum": 0.9, **options}
    return moco.Objective(
        Tiny(norm), moco.Options(**options), images=12, classes=0, labels=None, seed=seed
    )


def batch(index=(3, 8, 0, 5), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.rand(2, len(index), 3, 4, 4, generator=generator, dtype=torch.float64)
    return {"query": query.to(dtype), "key": key.to(dtype), "index": torch.tensor(index)}


def embed(objective, query, key) -> tuple[Tensor, Tensor]:
    q = normalize(objective.head(objective.backbone(query)), dim=1)
    with torch.no_grad():
        k = normalize(objective.key_head(objective.key_backbone(key)), dim=1)
    return q, k


def tiny(backbone) -> Tiny:
    assert isinstance(backbone, Tiny)
    return backbone


def last_layer(head) -> nn.Linear:
    assert isinstance(head, nn.Sequential)
    last = head[-1]
    assert isinstance(last, nn.Linear)
    return last


def trainable(objective) -> dict[str, Tensor]:
    return {name: each for name, each in objective.named_parameters() if each.requires_grad}


def step(objective, optimizer, inputs) -> float:
    loss, _ = objective(**inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    objective.finish_step()
    return loss.item()


# -- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude_own", [False, True])
def test_loss_and_gradients_are_those_of_equation_1(exclude_own):
    objective = build(exclude_own=exclude_own).double()
    optimizer = torch.optim.SGD(trainable(objective).values(), lr=0.1)
    step(objective, optimizer, batch(index=(3, 8, 0, 3), seed=1, dtype=torch.float64))
    inputs = batch(index=(3, 7, 3), dtype=torch.float64)  # 3 is in the queue twice, 7 is not
    parameters = list(trainable(objective).values())
    q, k = embed(objective, inputs["query"], inputs["key"])
    slow = torch.zeros((), dtype=torch.float64)
    for n, image in enumerate(inputs["index"].tolist()):
        match = (q[n] @ k[n] / 0.2).exp()
        total = match
        for row, owner in zip(objective.queue, objective.queue_images.tolist(), strict=True):
            if not (exclude_own and owner == image):
                total = total + (q[n] @ row / 0.2).exp()
        slow = slow - (match / total).log() / 3
    slow_gradients = torch.autograd.grad(slow, parameters)
    fast, _ = objective(**inputs)
    gradients = torch.autograd.grad(fast, parameters)

    assert objective.queue_images.tolist().count(3) == 2
    torch.testing.assert_close(fast, slow)
    for gradient, slow_gradient in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow_gradient)


def test_keys_all_alike_give_the_log_of_the_candidates():
    objective = build()
    row = normalize(torch.ones(5), dim=0)
    objective.queue.copy_(row)
    objective.queue_images.fill_(99)
    nn.init.zeros_(last_layer(objective.key_head).weight)
    last_layer(objective.key_head).bias.data.copy_(row)
    loss, metrics = objective(**batch())

    assert loss.item() == pytest.approx(math.log(1 + 10), rel=1e-5)
    assert metrics["chance"].item() == pytest.approx(1 / 11)


def test_accuracy_counts_the_queries_nearest_to_their_own_key():
    objective = build()
    inputs = batch()
    objective.key_backbone.load_state_dict(objective.backbone.state_dict())
    inputs["key"] = inputs["query"]  # the same network and pixels: the same embedding
    _, metrics = objective(**inputs)
    assert metrics["accuracy"].item() == 1
    assert metrics["agreement"].item() == pytest.approx(1)

    q, _ = embed(objective, inputs["query"], inputs["key"])
    objective.queue[0] = normalize(q[0].detach() + 1e-4, dim=0)
    objective.queue[1] = q[1].detach() * 2  # nearer than near: one query of four is wrong for sure
    _, metrics = objective(**inputs)
    assert metrics["accuracy"].item() == 1  # random directions, as the queue begins, do not count
    assert metrics["chance"].item() == 1
    objective.queue_images[:2] = 99
    _, metrics = objective(**inputs)
    assert metrics["accuracy"].item() <= 0.75


def test_spread_is_zero_when_collapsed_and_metrics_are_detached_scalars():
    objective = build()
    inputs = batch()
    inputs["query"] = inputs["query"][:1].expand(4, 3, 4, 4)
    _, metrics = objective(**inputs)

    assert metrics["std"].item() == pytest.approx(0, abs=1e-6)
    assert set(metrics) == {"accuracy", "chance", "std", "agreement"}
    assert all(each.shape == () and not each.requires_grad for each in metrics.values())


def test_one_image_has_no_spread_that_could_look_collapsed():
    inputs = {name: tensor[:1] for name, tensor in batch().items()}

    assert set(build()(**inputs)[1]) == {"accuracy", "chance", "agreement"}


def test_bf16_autocast_stays_close_to_float32_and_scores_in_float32():
    objective = build(queue=500)
    whole, _ = objective(**batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = objective(**batch())

    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.02)


# -- the two networks ---------------------------------------------------------------------------


def test_key_network_begins_as_a_copy_and_is_neither_trained_nor_in_the_optimizer():
    objective = build()
    for learns, follows in (("backbone", "key_backbone"), ("head", "key_head")):
        one = getattr(objective, learns).state_dict()
        other = getattr(objective, follows).state_dict()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        assert all(value.data_ptr() != other[name].data_ptr() for name, value in one.items())
    optimizer = optim.optimizer(optim.Options(lr=0.1), objective)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}

    assert held == {id(each) for each in trainable(objective).values()}
    assert not any(name.startswith("key_") for name in trainable(objective))


def test_gradient_reaches_every_parameter_of_the_query_network():
    objective = build()
    objective(**batch())[0].backward()
    moved = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()}

    assert moved == set(trainable(objective))


def test_key_weights_are_the_running_mean_of_the_query_weights():
    objective = build(momentum=0.75)
    optimizer = torch.optim.SGD(trainable(objective).values(), lr=1.0)
    expected = tiny(objective.key_backbone).layer.weight.clone()
    for number in range(3):
        step(objective, optimizer, batch(seed=number))
        expected = 0.75 * expected + 0.25 * tiny(objective.backbone).layer.weight.detach()

    torch.testing.assert_close(tiny(objective.key_backbone).layer.weight.data, expected)
    key, query = (last_layer(each).weight for each in (objective.key_head, objective.head))
    assert not torch.equal(key, query)


def test_batch_norm_of_the_key_network_uses_the_batch_and_keeps_its_own_statistics():
    objective = build(norm=True)
    objective(**batch())

    key, query = (tiny(each).norm for each in (objective.key_backbone, objective.backbone))
    assert objective.key_backbone.training
    assert key.state_dict()["num_batches_tracked"].item() == 1
    same = key.state_dict()["running_mean"] == query.state_dict()["running_mean"]
    assert not same.any()  # other pixels


# -- the queue ----------------------------------------------------------------------------------


def test_queue_begins_as_unit_directions_of_nobody_from_the_seed_alone():
    objective = build(queue=5000)
    torch.manual_seed(3)

    assert torch.equal(objective.queue, build(queue=5000).queue)
    assert not torch.equal(objective.queue, build(queue=5000, seed=1).queue)
    torch.testing.assert_close(objective.queue.norm(dim=1), torch.ones(5000))
    assert objective.queue.mean(0).abs().max() < 0.05
    assert set(objective.queue_images.tolist()) == {-1}


def test_queue_holds_the_last_keys_in_order_and_wraps_around():
    objective = build(queue=10, momentum=0.0)
    expected, owners = objective.queue.clone(), [-1] * 10
    for number in range(7):  # 28 keys through 10 places
        inputs = batch(index=range(4 * number, 4 * number + 4), seed=number)
        _, keys = embed(objective, inputs["query"], inputs["key"])
        objective(**inputs)
        assert torch.equal(objective.queue, expected)  # nothing is written while it is scored
        objective.finish_step()
        for part in range(4):
            expected[(4 * number + part) % 10] = keys[part]
            owners[(4 * number + part) % 10] = 4 * number + part
        torch.testing.assert_close(objective.queue, expected)

    assert objective.queue_images.tolist() == owners
    assert sorted(owners) == list(range(18, 28))


def test_batch_longer_than_the_queue_leaves_its_last_keys():
    objective = build(queue=3)
    objective(**batch(index=(0, 1, 2, 3, 4)))
    objective.finish_step()

    assert sorted(objective.queue_images.tolist()) == [2, 3, 4]


def test_batches_of_a_step_are_enqueued_together():
    whole, halves = build(), build()
    inputs = batch()
    loss, _ = whole(**inputs)
    whole.finish_step()
    parts = [{n: each[part] for n, each in inputs.items()} for part in (slice(2), slice(2, 4))]
    losses = [halves(**part)[0] for part in parts]
    halves.finish_step()

    torch.testing.assert_close(torch.stack(losses).mean(), loss)
    torch.testing.assert_close(halves.queue, whole.queue)
    assert torch.equal(halves.queue_images, whole.queue_images)
    assert halves.steps == whole.steps == 1


def test_looking_without_learning_leaves_no_trace():
    objective = build()
    before = {name: each.clone() for name, each in objective.state_dict().items()}
    with torch.no_grad():
        objective(**batch(seed=5))
    objective.eval()
    objective(**batch(seed=6))
    objective.finish_step()

    after = objective.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_restored_objective_goes_on_with_the_same_losses():
    def steps(objective, first, count):
        optimizer = torch.optim.SGD(trainable(objective).values(), lr=0.1)
        return [step(objective, optimizer, batch(seed=n)) for n in range(first, first + count)]

    unbroken = build(norm=True)
    losses = steps(unbroken, 0, 6)
    broken = build(norm=True)
    steps(broken, 0, 3)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    restored = build(norm=True)
    restored(**batch())  # of a step that was never finished
    restored.load_state_dict(torch.load(file, weights_only=True))

    assert steps(restored, 3, 3) == losses[3:]
    assert restored.enqueued == unbroken.enqueued == 24 % 10


# -- two processes ------------------------------------------------------------------------------

RUNS = [{"shuffle_batchnorm": True}, {"shuffle_batchnorm": False, "exclude_own": True}]
INDICES = [(3, 8, 0, 5), (1, 7, 7, 1), (3, 2, 11, 3)]


def train(objective, model, part):
    optimizer = torch.optim.SGD(trainable(objective).values(), lr=0.1)
    losses = []
    for number, index in enumerate(INDICES):
        inputs = batch(index=index, seed=number, dtype=torch.float64)
        loss, _ = model(**{name: each[part] for name, each in inputs.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.finish_step()
        losses.append(loss.detach())
    return torch.stack(losses), objective.state_dict()


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = []
    for options in RUNS:
        objective = build(**options).double()
        model = DistributedDataParallel(objective, broadcast_buffers=False)
        results.append(train(objective, model, slice(2 * rank, 2 * rank + 2)))
    # which pixels the batch norm of this process saw for its keys, in two steps
    objective = build(queue=64)
    saw = []

    def look(images):
        saw.append(images.clone())
        return images.flatten(1)[:, :6].float()

    objective.key_backbone.forward = look
    images = torch.arange(rank * 16, rank * 16 + 16, dtype=torch.uint8)
    images = images.reshape(16, 1, 1, 1).expand(16, 3, 4, 4).contiguous()
    images = images.contiguous(memory_format=torch.channels_last)
    index = torch.arange(rank * 16, rank * 16 + 16)
    for _ in range(2):
        objective(images, images, index)
        objective.finish_step()
    kept = all(each.is_contiguous(memory_format=torch.channels_last) for each in saw)
    saw = [each[:, 0, 0, 0] for each in saw]
    torch.save({"results": results, "saw": saw, "kept": kept}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    start_processes(one_of_two, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_two_processes_train_as_one_with_the_joined_batch_and_hold_the_same_queue(number, of_two):
    objective = build(**RUNS[number]).double()
    loss, state = train(objective, objective, slice(None))
    (loss_0, state_0), (loss_1, state_1) = (each["results"][number] for each in of_two)

    torch.testing.assert_close((loss_0 + loss_1) / 2, loss)
    for name, value in state.items():
        torch.testing.assert_close(state_0[name], value)
        assert torch.equal(state_0[name], state_1[name]), name


def test_keys_are_computed_from_images_of_all_processes_in_another_order_each_step(of_two):
    first, second = (each["saw"] for each in of_two)

    for step_0, step_1 in zip(first, second, strict=True):
        assert sorted([*step_0.tolist(), *step_1.tolist()]) == list(range(32))
        assert 0 < (step_0 < 16).sum() < 16  # its own and the other's
    assert not torch.equal(first[0], first[1])
    assert all(each["kept"] for each in of_two)  # channels-last, as the loader hands them over


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0.0\) must be above 0"),
        ({"temperature": 1e-300}, r"temperature \(1e-300\) must be above 0, 0.0001 at least"),
        ({"momentum": 1.0}, r"momentum \(1.0\) must be at least 0 and below 1"),
        ({"queue": 0}, r"queue \(0\) must be at least 1"),
        ({"dimension": 1}, r"dimension \(1\) must be at least 2: unit vectors of one number are"),
        ({"hidden": 0}, r"hidden \(0\) must be at least 1, or null for a linear head"),
    ],
)
def test_option_out_of_range_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        moco.Options(**options)


def test_defaults_are_the_papers():
    assert dataclasses.asdict(moco.Options()) == {
        "temperature": 0.2,
        "momentum": 0.999,
        "queue": 65536,
        "dimension": 128,
        "hidden": 2048,
        "exclude_own": False,
        "shuffle_batchnorm": True,
    }


@pytest.mark.parametrize(
    ("hidden", "shapes"), [(2048, [(2048, 6), (128, 2048)]), (None, [(128, 6)])]
)
def test_head_is_that_of_version_2_or_of_version_1(hidden, shapes):
    objective = build(hidden=hidden, dimension=128)
    weights = [tuple(each.shape) for each in objective.head.parameters() if each.ndim == 2]

    assert weights == shapes
