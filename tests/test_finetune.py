"""Fine-tuning: from a run's weights, all of the network or its last stages, on labels."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastssl import backbone_file, checkpoint, classifier, config, finetune, journal, train
from fastssl.backbones import resnet, resnet_v2, revnet, vgg
from fastssl.objectives import finetune as objectives
from pipelines.readers import folder
from tests import tiny_backbone

SMALL = [
    "pipeline.image_size=32",
    "evaluation.resize=36",
    "evaluation.crop=32",
    "optim.lr=0.05",
    "optim.lr_batch=null",
    "optim.milestones=[2]",
    "train.batch=8",
    "train.epochs=3",
    "train.log_steps=1",
    "train.checkpoint_steps=4",
    "probe.batch=3",  # 13 images of val are no multiple of it
    "probe.neighbours=[5]",
]
STEPS = 15


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    """train/ with 40 and val/ with 13 of the built-in images, in 5 classes."""
    root = tmp_path_factory.mktemp("data")
    for number, source in enumerate(sorted((demo_images / "train").iterdir())[:5]):
        for split, each in (("train", 8), ("val", 2 + (number < 3))):
            (root / split / source.name).mkdir(parents=True)
            for file in sorted((demo_images / split / source.name).iterdir())[:each]:
                shutil.copy(file, root / split / source.name)
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, checkout) -> Path:
    """recipes/finetune.yaml without its demo section and with another backbone."""
    text = (checkout / "recipes" / "finetune.yaml").read_text()
    text = text[: text.index("\ndemo:")]
    network = "use: fastssl.backbones.resnet\n  name: resnet50\n"
    assert network in text
    path = tmp_path_factory.mktemp("recipe") / "finetune.yaml"
    path.write_text(text.replace(network, "use: tests.tiny_backbone\n"))
    return path


@pytest.fixture(scope="module")
def pretrained(recipe, data, tmp_path_factory) -> Path:
    """A finished run to start from: of the same backbone, whose weights have moved."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    given = [f"data.root={data / 'train'}", *SMALL, "train.epochs=1", "train.seed=7"]
    assert train.main([str(recipe), *given, "optim.milestones=[0.5]", f"train.out={out}"]) == 0
    return out


@pytest.fixture
def command(recipe, data, pretrained, tmp_path):
    def line(*overrides: str, out: str = "run", weights: Path | str = pretrained) -> list[str]:
        given = [f"data.root={data / 'train'}", *SMALL, f"train.out={tmp_path / out}"]
        return [str(recipe), *given, f"train.weights={weights}", *overrides]

    return line


def heads(out: Path) -> list[dict]:
    return [line for line in journal.read(out) if line.get("probe") == "val"]


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in journal.read(out) if "loss" in line}


def fails(arguments: list[str], capsys) -> str:
    assert finetune.main(arguments) == 2
    return capsys.readouterr().err


def build(backbone: nn.Module | None = None, classes: int = 3, **options) -> objectives.Objective:
    torch.manual_seed(0)
    backbone = backbone or tiny_backbone.backbone(tiny_backbone.Options())
    made = objectives.Options(**options)
    labels = torch.arange(24) % classes
    return objectives.Objective(backbone, made, images=24, classes=0, labels=labels, seed=0)


def batch(images: int = 6, side: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, side, side), generator=generator)
    return {"image": pixels.to(torch.uint8), "index": torch.arange(images)}


# ---- What is frozen ----------------------------------------------------------------------------


def test_a_linear_probe_leaves_the_backbone_bit_for_bit_and_learns(command, pretrained, tmp_path):
    assert finetune.main(command("objective.train_stages=0", "objective.head_norm=true")) == 0
    before, after = (
        load_file(each / "backbone.safetensors") for each in (pretrained, tmp_path / "run")
    )

    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(set(losses(tmp_path / "run").values())) == STEPS


def test_the_last_stages_learn_and_those_before_stay_bit_for_bit():
    backbone = resnet.backbone(resnet.Options(name="resnet10", width=8))
    objective = build(backbone, train_stages=2)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in objective.parameters() if p.requires_grad), lr=0.1)
    objective.eval()  # a probe, and back
    objective.train()
    for _ in range(2):
        optimizer.zero_grad()
        objective(**batch(side=32))[0].backward()
        optimizer.step()
    moved = {
        name.split(".")[1]
        for name, value in objective.state_dict().items()
        if name.startswith("backbone.") and not torch.equal(value, before[name])
    }

    assert moved == {"layer3", "layer4"}
    assert not torch.equal(before["head.0.weight"], objective.get_parameter("head.0.weight"))


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (
            lambda: revnet.backbone(revnet.Options(widening=1, units=(1, 1, 1, 2))),
            ("layer4.", "norm."),
        ),
        (
            lambda: resnet_v2.backbone(resnet_v2.Options(widening=1)),
            ("network.stages.3.", "network.norm."),
        ),
        (
            lambda: resnet_v2.backbone(
                resnet_v2.Options(widening=1, activation_checkpointing=True)
            ),
            ("network.stages.3.", "network.norm."),
        ),
        (lambda: vgg.backbone(vgg.Options(widening=1, image_size=32)), ("fc7.",)),
    ],
    ids=["revnet", "resnet_v2", "resnet_v2 recomputed", "vgg"],
)
def test_of_k19_s_networks_the_last_stage_learns_and_the_rest_stays_bit_for_bit(make, last):
    objective = build(make(), train_stages=1)
    backbone = objective.backbone
    after = dict([*backbone.named_parameters(), *backbone.named_buffers()])
    before = {name: value.detach().clone() for name, value in after.items()}
    optimizer = torch.optim.SGD((p for p in objective.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        objective(**batch(side=32))[0].backward()
        optimizer.step()
    moved = {name for name in after if not torch.equal(after[name], before[name])}

    assert moved == {name for name in after if name.startswith(last)}  # statistics among them
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == name.startswith(last), name


def test_a_reversible_stage_of_which_a_part_is_frozen_has_the_gradients_of_a_plain_one():
    gradients = []
    for reversible in (True, False):
        torch.manual_seed(0)
        options = revnet.Options(widening=1, units=(1, 1, 2, 1), reversible=reversible)
        backbone = revnet.backbone(options).double().train()
        for name, parameter in backbone.named_parameters():
            frozen = name.startswith(("root", "layer2", "layer3.0", "layer4.0.norm"))
            parameter.requires_grad_(not frozen)
        image = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
        backbone(image).square().sum().backward()
        gradients.append({name: each.grad for name, each in backbone.named_parameters()})

    for name, plain in gradients[1].items():
        assert (gradients[0][name] is None) == (plain is None), name
        if plain is not None:
            torch.testing.assert_close(gradients[0][name], plain, rtol=1e-6, atol=1e-9)


def test_autograd_keeps_nothing_of_frozen_stages():
    backbone = resnet.backbone(resnet.Options(name="resnet10", width=8))
    build(backbone, train_stages=1)
    stages = backbone.stages(batch(side=32)["image"])  # pyright: ignore[reportCallIssue]

    assert not stages["layer3"].requires_grad
    assert stages["layer4"].requires_grad


def test_a_probe_in_between_leaves_what_is_frozen_in_evaluation(command, pretrained, tmp_path):
    given = ["objective.train_stages=0", "probe.every_epochs=1"]
    assert finetune.main(command(*given)) == 0
    before, after = (
        load_file(each / "backbone.safetensors") for each in (pretrained, tmp_path / "run")
    )

    assert [line["step"] for line in heads(tmp_path / "run")] == [0, 5, 10, 15]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_norms_stay_in_evaluation_when_sync_batchnorm_puts_others_in_their_place():
    for train_stages in (0, 2):
        backbone = resnet.backbone(resnet.Options(name="resnet10", width=8))
        objective = build(backbone, train_stages=train_stages)
        before = {name: each.training for name, each in objective.named_modules()}
        nn.SyncBatchNorm.convert_sync_batchnorm(objective).train()
        norms = [
            each for each in objective.backbone.modules() if isinstance(each, nn.SyncBatchNorm)
        ]

        assert {name: each.training for name, each in objective.named_modules()} == before
        assert len(norms) == 12
        assert sum(each.training for each in norms) == (0, 6)[train_stages // 2]


def test_more_stages_than_there_are_are_refused_with_their_names():
    backbone = resnet.backbone(resnet.Options(name="resnet10", width=8))
    with pytest.raises(
        ValueError, match=r"train_stages \(6\): the backbone has 5 stages with .*"
    ) as e:
        build(backbone, train_stages=6)

    assert "(stem, layer1, layer2, layer3, layer4)" in str(e.value)


def test_the_run_says_which_stages_learn_and_how_much_of_them(command, capsys):
    assert finetune.main(command("objective.train_stages=0", "train.steps=1", out="head")) == 0
    assert train.main(command("train.steps=1", out="all")) == 0
    printed = capsys.readouterr().out
    backbone = tiny_backbone.backbone(tiny_backbone.Options())
    count = sum(each.numel() for each in backbone.parameters())
    head = (16 + 1) * 5

    assert f"learning: 0 of the backbone's {count:,} parameters, {head} of heads" in printed
    assert f"learning: {count:,} of the backbone's {count:,} parameters, {head} of heads" in printed


# ---- The loss ----------------------------------------------------------------------------------


def test_mixup_is_the_loss_of_each_image_with_a_mixture_of_labels():
    objective = build(mixup=0.4).eval()  # batch norm by its own statistics
    inputs = batch()
    torch.manual_seed(3)
    loss, metrics = objective(**inputs)
    torch.manual_seed(3)
    alpha = torch.full((), 0.4)
    share = torch.distributions.Beta(alpha, alpha).sample()
    other = torch.randperm(6)
    slow, right = [], []
    for one in range(6):
        two = int(other[one])
        pixels = [inputs["image"][each].float() / 255 * 2 - 1 for each in (one, two)]
        pixels = [((each + 1) / 2 - 0.5) / 0.25 for each in pixels]
        scores = objective.scores((share * pixels[0] + (1 - share) * pixels[1])[None])[0]
        log_p = scores.log_softmax(0)
        labels = [int(objective.labels[each]) for each in (one, two)]
        slow.append(-share * log_p[labels[0]] - (1 - share) * log_p[labels[1]])
        hits = [float(scores.argmax() == label) for label in labels]
        right.append(share * hits[0] + (1 - share) * hits[1])

    torch.testing.assert_close(loss, torch.stack(slow).mean())
    torch.testing.assert_close(metrics["accuracy"], torch.stack(right).mean())
    assert 0 < share < 1


def test_without_mixup_bytes_go_to_the_backbone_as_they_are():
    objective = build().eval()
    inputs = batch()

    torch.testing.assert_close(
        objective.scores(inputs["image"]), objective.scores(objective._normalized(inputs["image"]))
    )


def test_the_heads_are_those_of_the_papers():
    linear = build(head_norm=True, train_stages=0).head
    mlp = build(head="mlp", hidden=7, dropout=0.25).head

    assert [type(each).__name__ for each in linear] == ["BatchNorm1d", "Linear"]
    assert [name for name, _ in linear.named_parameters()] == ["1.weight", "1.bias"]
    assert [type(each).__name__ for each in mlp] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert mlp[0].out_features == mlp[3].in_features == 7
    assert mlp[2].p == 0.25


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_stages": -1}, r"train_stages \(-1\) must be all, 0 \(the head alone\)"),
        ({"mixup": -0.1}, r"mixup \(-0.1\) must be above 0, or 0 for none"),
        ({"label_smoothing": 1.0}, r"label_smoothing \(1.0\) must be at least 0 and below 1"),
        ({"hidden": 0}, r"hidden \(0\) must be at least 1"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be at least 0 and below 1"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        objectives.Options(**wrong)


def test_one_class_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="needs at least 2 classes, and the listing has 1: "):
        build(classes=1)


# ---- Where it starts ---------------------------------------------------------------------------


def test_it_starts_from_the_very_features_of_the_run(command, pretrained, tmp_path):
    assert finetune.main(command("train.steps=1", "optim.lr=1.0e-30")) == 0
    before, after = (
        load_file(each / "backbone.safetensors") for each in (pretrained, tmp_path / "run")
    )
    parameters = dict(tiny_backbone.backbone(tiny_backbone.Options()).named_parameters())

    assert all(torch.equal(before[name], after[name]) for name in parameters)
    knn = [line for line in journal.read(pretrained) if line.get("probe") == "knn"][-1]
    begun = next(line for line in journal.read(tmp_path / "run") if line.get("probe") == "knn")
    assert begun["accuracy"] == knn["accuracy"]


def test_backbone_and_evaluation_are_those_of_the_run(data, tmp_path, checkout):
    # recipes/finetune.yaml says resnet50 at 224 pixels; the run is of another network and size.
    options = {"name": "resnet10", "width": 8, "stem": "small", "zero_init_residual": False}
    run = tmp_path / "small"
    run.mkdir()
    made = resnet.backbone(resnet.Options(**options))
    sections = ["backbone.name=resnet10", "backbone.width=8", "backbone.stem=small"]
    sizes = ["evaluation.resize=40", "evaluation.crop=32", f"data.root={data / 'train'}"]
    written = config.load(checkout / "recipes" / "supervised.yaml", [*sections, *sizes])
    backbone_file.save_backbone(run, made, written, step=3)
    given = [f"train.weights={run}", f"data.root={data / 'train'}"]
    path = str(checkout / "recipes" / "finetune.yaml")
    recipe = finetune.load(path, given)
    other = finetune.load(path, [*given, "evaluation.crop=24", "pipeline.image_size=48"])

    assert recipe.values["backbone"]["name"] == "resnet10"
    assert recipe.values["backbone"]["stem"] == "small"
    assert recipe.sources["backbone.width"] == "weights"
    prepared = {"resize": 40, "crop": 32, "interpolation": "bilinear"}
    assert recipe.values["evaluation"] == {"use": "pipelines.evaluation", **prepared}
    assert recipe.pipeline.options.image_size == 32
    assert other.values["evaluation"]["crop"] == 24
    assert other.pipeline.options.image_size == 48
    with pytest.raises(config.RecipeError, match=r"backbone.width: 16, but 8 in .*leave it out"):
        finetune.load(path, [*given, "backbone.width=16"])


@pytest.fixture
def lone(pretrained, tmp_path) -> Path:
    """The weights alone: nothing beside them says of which network."""
    return Path(shutil.copy(pretrained / "backbone.safetensors", tmp_path / "lone.safetensors"))


@pytest.mark.parametrize("start", [finetune, train])
def test_a_file_without_a_card_is_of_the_recipe_s_network(start, command, lone, tmp_path, capsys):
    given = ["train.steps=1", "optim.lr=1.0e-30"]
    assert start.main(command(*given, weights=lone)) == 0
    before, after = load_file(lone), load_file(tmp_path / "run" / "backbone.safetensors")
    parameters = dict(tiny_backbone.backbone(tiny_backbone.Options()).named_parameters())

    assert all(torch.equal(before[name], after[name]) for name in parameters)
    assert start.main(command("backbone.width=4", weights=lone, out="other")) == 2
    said = "the weights are of width 8, the backbone is of width 4: did you mean backbone.width=8?"
    assert said in capsys.readouterr().err


def test_where_nothing_says_how_images_were_prepared_the_recipe_does(recipe, data, tmp_path):
    # a card of old, which tells of no graph
    run = tmp_path / "old"
    given = [f"data.root={data / 'train'}", *SMALL]
    made = config.load(recipe, given)
    run.mkdir()
    backbone = tiny_backbone.backbone(tiny_backbone.Options())
    backbone_file.save_backbone(run, backbone, made, step=1)
    card = json.loads((run / "backbone.json").read_text())
    del card["preprocessing"]
    (run / "backbone.json").write_text(json.dumps(card))
    found = finetune.load(str(recipe), [given[0], f"train.weights={run}"])

    prepared = {"resize": 256, "crop": 224, "interpolation": "bilinear"}
    assert found.values["evaluation"] == {"use": "pipelines.evaluation", **prepared}
    assert found.sources["evaluation.resize"] == "recipe"


def test_a_run_that_was_moved_is_told_to_be_named_by_its_new_path(
    command, pretrained, tmp_path, capsys
):
    moved = shutil.copytree(pretrained, tmp_path / "moved")
    assert finetune.main(command("train.steps=6", weights=moved, out="half")) == 0
    moved.rename(tmp_path / "elsewhere")
    on = ["train.resume=" + str(tmp_path / "half")]
    message = fails(command(*on, weights=moved, out="rest"), capsys)

    assert f"{moved}: no such file" in message
    assert "If it was moved: train.weights=PATH gives its new place" in message
    assert len(message.splitlines()) == 1
    assert finetune.main(command(*on, weights=tmp_path / "elsewhere", out="rest")) == 0


def test_it_insists_on_a_run_to_start_from(recipe, data, capsys):
    message = fails([str(recipe), f"data.root={data / 'train'}"], capsys)

    assert "train.weights names the RUN to start from: a run folder" in message


def test_weights_of_another_width_are_refused_by_name(command, capsys, tmp_path):
    assert train.main(command("backbone.width=4")) == 2
    message = capsys.readouterr().err

    assert message.endswith(
        "do not fit this recipe's backbone: the weights are of width 8, the backbone is of width "
        "4: did you mean backbone.width=8?\n"
    )
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_there_or_cut_short_is_refused(command, pretrained, tmp_path, capsys):
    assert "nowhere" in fails(command(weights=tmp_path / "nowhere"), capsys)
    shutil.copytree(pretrained, tmp_path / "cut")
    path = tmp_path / "cut" / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    assert "is damaged, cut short" in fails(command(weights=tmp_path / "cut"), capsys)


# ---- Stopping and going on ---------------------------------------------------------------------


def test_it_goes_on_bit_for_bit_and_refuses_other_weights(command, pretrained, tmp_path, capsys):
    given = ["objective.mixup=0.3", "optim.layer_decay=0.5", "objective.head_norm=true"]
    assert finetune.main(command(*given, out="whole")) == 0
    assert finetune.main(command(*given, "train.steps=6", out="half")) == 0
    shutil.copytree(pretrained, tmp_path / "copy")
    goes_on = f"train.resume={tmp_path / 'half'}"
    code = finetune.main(command(*given, goes_on, out="rest", weights=tmp_path / "copy"))
    whole, rest = (tmp_path / each for each in ("whole", "rest"))
    states = [checkpoint.load(each / f"checkpoints/step-{STEPS:08d}.pt") for each in (whole, rest)]

    assert code == 0
    assert all(losses(rest)[step] == losses(whole)[step] for step in range(7, STEPS + 1))
    for name, value in states[0]["objective"].items():
        assert torch.equal(value, states[1]["objective"][name])
    assert heads(rest)[-1] == heads(whole)[-1]
    other = tmp_path / "whole"  # weights that have been fine-tuned
    message = fails(command(*given, goes_on, out="third", weights=other), capsys)
    assert "train.weights: " in message
    assert "there" in message


# ---- The head, tested and kept -----------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe, data, pretrained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    given = [f"data.root={data / 'train'}", *SMALL, f"train.weights={pretrained}"]
    assert finetune.main([str(recipe), *given, f"train.out={out}"]) == 0
    return out


def test_the_classifier_scores_val_as_the_journal_says(finished, data, run_graph):
    listing = folder.list_samples(folder.Options(root=str(data / "val")), cache=None, say=print)
    evaluation = config.load(finished / "recipe.yaml", [f"data.root={data / 'train'}"]).evaluation
    encoded = [Path(listing.path(row)).read_bytes() for row in range(len(listing))]
    pixels = run_graph(evaluation.module, evaluation.options, encoded)["image"]
    made = classifier.load(finished)
    with torch.no_grad():
        scores = made(torch.from_numpy(pixels).movedim(-1, 1))
    assert listing.labels is not None
    right = scores.argmax(1).numpy() == listing.labels
    line = heads(finished)[-1]

    assert len(listing) == 13
    assert made.classes == listing.classes
    assert line["accuracy"] == pytest.approx(right.mean())
    assert line["top5"] == 1.0  # of five classes


def test_a_run_without_labels_has_no_classifier(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "head.safetensors").unlink()
    with pytest.raises(config.RecipeError, match=r"has no head\.safetensors"):
        classifier.load(tmp_path / "run")


def test_a_head_cut_short_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "head.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(config.RecipeError, match=r"head.safetensors is cut short or damaged"):
        classifier.load(tmp_path / "run")


def test_classes_that_training_lacks_are_refused(command, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "more")
    for split in ("train", "val"):
        some = next((data / split).iterdir())
        shutil.copytree(some, tmp_path / "more" / split / "zebra")
    message = fails(command(f"probe.root={tmp_path / 'more'}"), capsys)

    assert "has classes that data.root lacks: zebra" in message


def test_two_processes_count_every_image_of_val_once(
    command, finished, checkout, environ, tmp_path
):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = checkout / "fastssl" / "finetune.py"
    given = ["objective.train_stages=0", "optim.lr=1.0e-30"]
    done = subprocess.run(
        [*launcher, script, *command(*given, "train.steps=1")],
        env=environ,
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone = finetune.main(command(*given, "train.steps=1", out="alone"))
    two, one = heads(tmp_path / "run"), heads(tmp_path / "alone")

    assert alone == 0
    assert [line["step"] for line in two] == [0, 1]
    assert [line["accuracy"] for line in two] == [line["accuracy"] for line in one]
    assert all(line["accuracy"] * 13 == pytest.approx(round(line["accuracy"] * 13)) for line in two)
    assert json.loads((tmp_path / "run" / "backbone.json").read_text())["step"] == 1
    assert np.isfinite(list(losses(tmp_path / "run").values())).all()
