"""The command: tables, journal lines, mistakes in one line, and two processes that count alike."""

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fastssl import backbone_file, config, evaluate, journal, trained
from fastssl.evaluation_task import Table
from fastssl.loader import DataError
from fastssl.reporting import probes
from tests import few_images

VGG = "fastssl.backbones.vgg"
SMALL = ["evaluation.resize=36", "evaluation.crop=32", "loader.threads=1", "features.batch=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, demo_images) -> Path:
    return few_images.copy(demo_images, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe) -> Path:
    """A run folder with a line in its metrics.jsonl."""
    folder = saved(recipe, tmp_path_factory.mktemp("runs") / "tiny-0")
    (folder / "metrics.jsonl").write_text('{"step": 15, "loss": 1.0}\n')
    return folder


def saved(recipe: Path, folder: Path, *, bias: float = 0.0) -> Path:
    made = config.load(recipe, ["data.root=/images", *SMALL[:3]])
    folder.mkdir()
    torch.manual_seed(0)
    backbone = made.backbone.module.backbone(made.backbone.options)
    backbone.state_dict()["second.bias"].add_(bias)
    backbone_file.save_backbone(folder, backbone, made, step=15)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "tiny-0")


def command(data: Path, tmp_path: Path, *more: str) -> list[str]:
    kept = [f"data.root={data}", f"features.cache={tmp_path / 'cache'}", *SMALL]
    return ["knn", *kept, "knn.neighbours=[5,1]", *more]


def test_a_run_gives_a_table_and_a_line_in_its_journal(data, run, tmp_path, capsys):
    assert evaluate.main(command(data, tmp_path, str(run))) == 0
    printed = capsys.readouterr().out
    first, line = journal.read(run)

    assert first == {"step": 15, "loss": 1.0}
    assert (line["step"], line["probe"], line["stage"]) == (15, "knn", "pool")
    assert (line["neighbours"], line["val_images"], line["train_images"]) == (5, 9, 21)
    assert 9 * line["accuracy"] == pytest.approx(round(9 * line["accuracy"]))
    conditions = {
        "data": str(data),
        "graph": "pipelines.evaluation",
        **{"graph_resize": 36, "graph_crop": 32, "graph_interpolation": "bilinear"},
        **{"seed": 0, "computed_in": "fp32"},
        "weights": trained.load(str(run)).weights[:12],
    }
    assert conditions == {key: line[key] for key in conditions}
    row = next(text for text in printed.splitlines() if "tiny-0 " in text)
    assert f"{100 * line['accuracy']:.1f}" in row
    assert "pool" in row


def test_the_same_again_adds_a_line_and_reads_no_image(data, run, tmp_path, capsys):
    for _ in range(2):
        assert evaluate.main(command(data, tmp_path, str(run))) == 0
    _, first, second = journal.read(run)

    assert first == second
    assert "tiny-0 from" in capsys.readouterr().out


def test_the_report_tells_probes_apart_by_what_they_were_measured_on(data, run, tmp_path):
    for graph in ("evaluation.crop=32", "evaluation.crop=24", "evaluation.crop=32"):
        assert evaluate.main([*command(data, tmp_path, str(run)), graph]) == 0
    lines = journal.read(run)[1:]
    (probe,) = probes.measured([lines])

    assert probes.separating("knn", [lines]) == {"graph_crop"}
    assert {row.settings for row in probe.rows} == {"graph_crop 32", "graph_crop 24"}
    assert "computed_in fp32" in probe.shared
    assert not {"graph", "data", "computed_in", "weights"} & {*probe.results}


def test_lines_say_which_images_were_learnt_from_and_the_report_tells_them_apart(
    data, run, tmp_path
):
    line = tmp_path / "quarantine.jsonl"
    line.write_text('{"name": "none", "reason": "grey"}')
    for more in (["data.per_class=2"], ["data.limit=9"], [f"data.quarantine={line}"], []):
        assert evaluate.main([*command(data, tmp_path, str(run)), *more]) == 0
    lines = journal.read(run)[1:]
    (probe,) = probes.measured([lines])

    subsets = [{k: v for k, v in line.items() if k.startswith("data_")} for line in lines]
    assert subsets == [{"data_per_class": 2}, {"data_limit": 9}, {"data_quarantine": str(line)}, {}]
    assert [line["train_images"] for line in lines] == [6, 9, 21, 21]
    assert {line["val_images"] for line in lines} == {9}
    assert len(probe.rows) == 4
    assert "data_per_class 2" in probe.rows[0].settings


def test_another_reader_than_the_folder_s_is_said_in_the_line(data, run, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        files = sorted((data / split).rglob("*.jpg"))
        text = "".join(f"{file}\t{file.parent.name}\n" for file in files)
        (lists / f"{split}.txt").write_text(text)
    given = [f"data.root={lists}", "data.use=pipelines.readers.list"]
    assert evaluate.main([*command(data, tmp_path, str(run))[:1], *given, *SMALL, str(run)]) == 0
    line = journal.read(run)[-1]

    assert (line["data"], line["data_use"]) == (str(lists), "pipelines.readers.list")


@pytest.fixture(scope="module")
def alike(recipe, tmp_path_factory) -> Path:
    """A folder with a/rot and b/rot, runs of different weights."""
    home = tmp_path_factory.mktemp("alike")
    for name in ("a", "b"):
        (home / name).mkdir()
        saved(recipe, home / name / "rot", bias=0.1 if name == "a" else 0.2)
    return home


FILE = "rot/backbone.safetensors"


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (["a/rot", "b/rot"], ["a/rot", "b/rot"]),
        (["a/rot", "random:a/rot", "random:b/rot"], ["rot", "random:a/rot", "random:b/rot"]),
        ([f"a/{FILE}", f"b/{FILE}"], ["a/rot", "b/rot"]),
        (["a/rot", f"a/{FILE}"], ["a/rot", f"a/{FILE}"]),  # one network: as it is written
        ([f"a/{FILE}"], ["rot"]),
        (["a/rot/backbone.json", "torchvision:x"], ["rot", "torchvision:x"]),
        (["x", "torchvision:x"], ["x", "torchvision:x"]),
    ],
)
def test_runs_of_one_name_are_told_apart_by_the_folders_they_lie_in(alike, monkeypatch, runs, told):
    monkeypatch.chdir(alike)
    published = dataclasses.replace(few_images.tiny(), name="torchvision:x")
    monkeypatch.setattr(trained, "_named", lambda _: published)
    monkeypatch.setattr(trained, "_published", lambda _: published)
    found = evaluate._told_apart(runs, [trained.load(each) for each in runs])

    assert [each.name for each in found] == told


def test_files_of_one_name_are_rows_and_journals_of_their_own(
    data, alike, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    files = [str(alike / name / FILE) for name in ("a", "b")]
    assert evaluate.main(command(data, tmp_path, *files)) == 0
    table = capsys.readouterr().out.split("kNN accuracy")[1]
    rows = [text.split()[1] for text in table.splitlines() if text.startswith("\u2502")]

    assert rows == ["a/rot", "b/rot"]
    for name, file in zip(("a-rot", "b-rot"), files, strict=True):
        (line,) = journal.read(Path("evaluations") / name)
        assert line["weights"] == trained.load(file).weights[:12]


def test_no_more_neighbours_are_asked_than_there_are_images(data, run, tmp_path, capsys):
    neighbours = "knn.neighbours=[200,5,30]"
    assert evaluate.main([*command(data, tmp_path, str(run)), neighbours]) == 0
    line = journal.read(run)[-1]
    printed = capsys.readouterr().out

    assert line["neighbours"] == 21
    assert {k for k, *_ in line["sweep_accuracies"]} == {21, 5}
    assert "knn: k 200, 30 -> 21: there are 21 training images" in printed
    assert "top-5 at k=21" in printed


@pytest.mark.parametrize("key", ["knn.stages", "features.stages"])
def test_stages_are_those_given_and_a_wrong_one_is_blamed_on_its_key(
    data, run, tmp_path, capsys, key
):
    asked = command(data, tmp_path, str(run))
    assert evaluate.main([*asked, f"{key}=[first]"]) == 0
    assert journal.read(run)[-1]["stage"] == "first"
    capsys.readouterr()
    assert evaluate.main([*asked, f"{key}=[layer9]"]) == 2
    assert f"error: {key}: the backbone has no layer9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "key", "stage"),
    [
        ("svm", "svm.stages", "[layer9]"),
        ("fewlabels", "fewlabels.stage", "layer9"),
        ("linear", "features.stages", "[layer9]"),
    ],
)
def test_other_commands_blame_a_wrong_stage_on_its_key_too(
    data, run, tmp_path, capsys, what, key, stage
):
    common = [each for each in command(data, tmp_path, str(run)) if "knn" not in each]
    assert evaluate.main([what, *common, f"{key}={stage}"]) == 2
    assert f"error: {key}: the backbone has no layer9" in capsys.readouterr().err


def test_what_earlier_runs_gave_is_shown_when_a_later_one_fails(
    data, run, recipe, tmp_path, capsys
):
    overflows = saved(recipe, tmp_path / "large-0", bias=1e6)
    asked = command(data, tmp_path, str(run), str(overflows), "features.dtype=float16")
    code = evaluate.main(asked)
    said = capsys.readouterr()

    assert code == 2
    assert "tiny-0" in said.out.split("kNN accuracy")[1]
    assert said.err.startswith("error: the features of stage pool are NaN or infinite")


def test_sizes_that_nothing_says_are_told(data, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(next(run.glob("*.safetensors")), alone)
    network = "backbone.use=tests.tiny_backbone"
    plain = [each for each in command(data, tmp_path, str(alone), network)]
    assert evaluate.main([each for each in plain if "evaluation." not in each]) == 0
    assert (
        "resize 256, crop 224, interpolation bilinear assumed; else give evaluation.resize="
        in capsys.readouterr().out
    )
    assert evaluate.main(command(data, tmp_path, str(run))) == 0
    assert evaluate.main([*plain, "evaluation.interpolation=bilinear"]) == 0
    assert "assumed" not in capsys.readouterr().out


def test_out_may_begin_with_the_home_folder(data, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    alone = ["evaluate.out=~/there", f"random:{run}"]
    assert evaluate.main([*command(data, tmp_path), *alone]) == 0

    assert len(journal.read(tmp_path / "there")) == 1


@pytest.mark.parametrize(
    ("rank", "local", "told"),
    [("0", "0", "error: "), ("8", "0", "error (rank 8 on "), ("9", "1", "")],
)
def test_a_mistake_is_told_once_a_machine(monkeypatch, capsys, rank, local, told):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert evaluate.main(["knn"]) == 2
    said = capsys.readouterr().err

    assert said.startswith(told)
    assert said.count("\n") == (1 if told else 0)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("no image"), 2, "error (rank 1 on HOST): no image\n"),
        (OSError("no disk"), 1, "error (rank 1 on HOST): no disk\n"),
        (ValueError("no such stage"), 2, ""),  # all know: features tells it to all of them
    ],
)
def test_what_one_process_alone_meets_is_told_by_it(
    monkeypatch, capsys, tmp_path, error, code, told
):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    evaluate.failed(error)
    assert capsys.readouterr().err == ""  # before there are others: they meet it too
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert evaluate.failed(error) == code
    finally:
        dist.destroy_process_group()

    assert capsys.readouterr().err == told.replace("HOST", platform.node())


def test_half_a_line_of_a_killed_run_is_not_glued_to(data, run, tmp_path, capsys):
    (run / "metrics.jsonl").write_text('{"step": 15, "los')
    assert evaluate.main(command(data, tmp_path, str(run))) == 0

    assert "ends in half a line" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == '{"step": 15, "los'


def test_a_journal_that_can_t_be_written_costs_a_warning_and_not_the_table(
    data, run, tmp_path, capsys
):
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert evaluate.main(command(data, tmp_path, str(run))) == 0
    printed = capsys.readouterr().out

    assert f"warning: {run / 'metrics.jsonl'} can't be written: Is a directory" in printed
    assert any("tiny-0 " in text and "pool" in text for text in printed.splitlines())


def test_a_folder_that_can_t_be_made_costs_a_warning_and_not_the_table(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = f"evaluate.out={tmp_path / 'file' / 'out'}"
    assert evaluate.main(command(data, tmp_path, "random:resnet10", "backbone.width=4", out)) == 0
    printed = capsys.readouterr().out

    assert "can't be written: Not a directory" in printed
    assert any("random:resnet10 " in text for text in printed.splitlines())


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("random:vgg", ["backbone.image_size=32", "backbone.widening=1"]),
        ("random:vgg", ["backbone.image_size=32", "backbone.widening=1", f"backbone.use={VGG}"]),
        ("random:revnet", ["backbone.last_relu=false", "backbone.widening=1"]),
        ("random:nin", ["backbone.blocks=3"]),
        ("random:timm:vit_tiny_patch16_224", ["backbone.image_size=32"]),
    ],
)
def test_options_of_a_fresh_network_are_those_of_its_own_file(
    data, tmp_path, capsys, monkeypatch, network, options
):
    monkeypatch.chdir(tmp_path)
    code = evaluate.main(command(data, tmp_path, network, *options))
    said = capsys.readouterr()

    assert (code, said.err) == (0, "")
    assert any(f"\u2502 {network} " in text for text in said.out.splitlines())


def test_options_of_a_fresh_network_of_a_run_are_those_of_its_file(data, run, tmp_path, capsys):
    out = f"evaluate.out={tmp_path / 'out'}"
    wider = command(data, tmp_path, f"random:{run}", "backbone.width=12", out)
    assert evaluate.main(wider) == 0
    assert evaluate.main([*wider, "backbone.stem=small"]) == 2
    assert "backbone.stem: unknown key" in capsys.readouterr().err


def test_several_runs_are_rows_of_one_table(data, run, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(command(data, tmp_path, str(run), f"random:{recipe}", "seed=1")) == 0
    rows = [text for text in capsys.readouterr().out.splitlines() if "pool" in text]

    assert len([row for row in rows if "tiny-0 " in row and "features" not in row]) == 1
    assert len([row for row in rows if "random:small " in row and "features" not in row]) == 1
    (line,) = journal.read(tmp_path / "evaluations" / "random-small")  # it has no run folder
    assert (line["step"], line["probe"]) == (0, "knn")


def test_the_run_s_own_preprocessing_holds_but_for_what_is_given(data, run, tmp_path):
    plain = [each for each in command(data, tmp_path, str(run)) if "evaluation." not in each]
    assert evaluate.main(plain) == 0
    assert evaluate.main([*plain, "evaluation.resize=40"]) == 0
    about = [
        json.loads(path.read_text())["about"]["graph"]
        for path in sorted(tmp_path.glob("cache/*/features.json"), key=lambda p: p.stat().st_ctime)
    ]

    assert about[0]["options"] == {"resize": 36, "crop": 32, "interpolation": "bilinear"}
    assert about[-1]["options"] == {"resize": 40, "crop": 32, "interpolation": "bilinear"}


def test_tables_of_different_networks_are_joined_by_column():
    def one(columns, row):
        return Table("t", columns, [row])

    run = few_images.tiny()
    table = evaluate.joined(None, one(["a", "c"], [0.5, 2]), run)
    table = evaluate.joined(table, one(["run", "a", "b", "c"], ["x", 0.25, 7, None]), run)

    assert table.columns == ["run", "a", "b", "c"]
    assert table.rows == [["tiny-0", 0.5, None, 2], ["x", 0.25, 7, None]]


def test_fractions_are_printed_in_per_cent_and_other_numbers_as_they_are(capsys):
    evaluate.show(
        Table(
            "t",
            ["run", "top-1", "C", "k"],
            [["x", 0.6346, 0.25, 3], ["y", None, 1e-4, 20]],
            plain=("C",),
        )
    )
    printed = capsys.readouterr().out

    assert [text.split() for text in printed.splitlines() if "x" in text] == [
        ["\u2502", "x", "\u2502", "63.5", "\u2502", "0.25", "\u2502", "3", "\u2502"]
    ]
    assert "\u2502     - \u2502 0.0001 \u2502 20 \u2502" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knm", "x"], r"knm: no such evaluation; did you mean 'knn'?"),
        (["knn"], "knn: no RUN"),
        (["knn", "runs/x", "runs/x/"], "knn: RUN runs/x/ is given twice: leave one out"),
        (["knn", "x", "knn.neighbors=[1]"], "knn.neighbors: unknown key; did you mean"),
        (["knn", "x", "knn.neighbours=1"], "a list of int, got 1 (write [1])"),
        (["knn", "x", "knn.neighbours=[0]"], "neighbours ([0]) must be positive"),
        (["knn", "x", "data.root=/nowhere"], "x: no such file, and no network of that name"),
        (["knn", "random:resnet10", "--data.root=A"], "--data.root=A: no RUN; write data.root=A"),
        (["knn", "random:resnet10", "--seed=1"], "--seed=1: no RUN; write seed=1"),
        (["knn", "random:resnet10", "data.root"], "data.root: no RUN; write data.root=..."),
        (["knn", "random:resnet10", "data.root=/nowhere"], "there is no folder"),
        (["knn", "random:resnet10", "evaluation.corp=1"], "evaluation.corp: unknown key; did you"),
        (["knn", "random:resnet10", "evaluation.crop=999"], "crop (999) must fit in resize (256)"),
        (["knn", "random:resnet10", "evaluation.use=nothing"], "there is no module nothing"),
        (["knn", "random:resnet10", "features.dtype=int8"], "one of 'float32', 'float16'"),
        (["knn", "random:resnet10", "optim.lr=3"], "unknown section 'optim'"),
        (["knn", "random:resnet10", "seed=-1"], "seed (-1) must be in"),
        (["knn", "random:resnet10", "evaluate.precision=fp16"], "precision (fp16) needs a GPU"),
        (["knn", "random:resnet10", "backbone.width=x"], "backbone.width: expected int"),
        (["knn", "random:resnet10", "data.use=json"], "json has no Options"),
        (["knn", "random:vgg", "backbone.stem=smal"], "expected one of 'standard', 'small'"),
        (["knn", "random:nin", "backbone.stem=small"], "backbone.stem: unknown key"),
        (["knn", "random:vgg", "random:nin", "backbone.widening=1"], "backbone.widening: unknown"),
        (
            ["knn", "random:revnt", "backbone.widening=1"],
            "no network; did you mean 'random:revnet'",
        ),
        (
            ["knn", "random:vgg", "backbone.widening=1000000000"],
            "does not fit the memory of this mach",
        ),
    ],
)
def test_a_mistake_is_one_line_and_2(arguments, message, capsys):
    code = evaluate.main(arguments)
    said = capsys.readouterr()

    assert code == 2
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("wrong", ["--data.root=A", "data.root", "nothing", "evaluation.crop=999"])
def test_the_built_in_images_are_not_drawn_before_a_mistake_is_told(monkeypatch, capsys, wrong):
    monkeypatch.setattr(evaluate.demo, "render", lambda **_: pytest.fail("takes minutes"))
    assert evaluate.main(["knn", "random:resnet10", "backbone.width=4", wrong]) == 2
    assert "built-in" not in capsys.readouterr().out


def test_help_lists_the_commands_and_the_keys_of_one(capsys):
    assert evaluate.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert evaluate.main(["knn", "--help"]) == 0
    keys = capsys.readouterr().out

    assert all(f"\n  {what} " in listed for what in evaluate.WHAT)
    assert "knn.neighbours=[20, 1, 5," in keys
    assert "features.size=null" in keys
    assert evaluate.main([]) == 2


def test_two_processes_give_what_one_gives_and_one_of_them_speaks(
    data, run, tmp_path, environ, checkout, capsys
):
    images = shutil.copytree(data, tmp_path / "images")
    few_images.damage(sorted((images / "train").rglob("*.jpg"))[5])
    launcher = [
        str(Path(sys.executable).with_name("accelerate")),
        *("launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        str(checkout / "fastssl" / "evaluate.py"),
    ]
    stages = "knn.stages=[first,pool]"
    assert evaluate.main(command(images, tmp_path / "1", str(run), stages)) == 0
    done = subprocess.run(
        [*launcher, *command(images, tmp_path / "2", str(run), stages)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, *found = journal.read(run)
    rows = [
        {(np.load(path).shape, path.name): np.load(path) for path in found_in.glob("*/*.npy")}
        for found_in in (tmp_path / "1" / "cache", tmp_path / "2" / "cache")
    ]

    assert "Warning" not in done.stderr
    for spoken in (capsys.readouterr().out, done.stdout):
        assert spoken.count("kNN accuracy") == 1
        assert spoken.count("1 of 21 images of train can't be decoded") == 1
    assert len(found) == 2 + 2  # two stages: written once each
    one_image = 1 / 9 + 1e-6  # between two classes it may fall to either side
    for alone, both in zip(found[:2], found[2:], strict=True):
        sweeps = [each.pop("sweep_accuracies") for each in (alone, both)]
        np.testing.assert_allclose(*sweeps, rtol=0, atol=one_image)
        for name in ("accuracy", "top5"):
            assert alone.pop(name) == pytest.approx(both.pop(name), abs=one_image)
        assert alone == both
    assert rows[0].keys() == rows[1].keys()
    assert {shape[0] for shape, _ in rows[0]} == {20, 9}
    for key, values in rows[0].items():
        np.testing.assert_allclose(rows[1][key], values, rtol=1e-5, atol=1e-6)


def test_a_mistake_that_two_processes_find_late_is_told_once(
    data, run, tmp_path, environ, checkout
):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(checkout / "fastssl" / "evaluate.py")]
    arguments = command(data, tmp_path, str(run), "knn.stages=[layer9]")
    done = subprocess.run(
        [*launcher, *script, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True
    )

    assert done.returncode == 1  # torchrun's
    assert done.stderr.count("has no layer9; it has first, pool") == 1
    assert "exitcode  : 2" in done.stderr
    assert "Error:" not in done.stderr.replace("ChildFailedError:", "")
