import random
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fastssl import config, demo
from fastssl.config import RecipeError

CHECKOUT = Path(__file__).parents[1]
RECIPES = [
    path
    for path in sorted(CHECKOUT.glob("recipes/**/*.yaml"))
    if CHECKOUT / "recipes" / "cluster" not in path.parents
]

OPTIONS = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class Options:
"""
OFFERS = """
    largest_crop = property(lambda self: 64)
    classes = property(lambda self: 0)
"""
LAB = {  # plug-ins as small as they come
    "reader": OPTIONS
    + "    root: str\n"
    + "    bad: Literal['skip', 'error'] = 'skip'\n"
    + "def list_samples(): ...\n"
    + "def source(): ...\n",
    "jigsaw": OPTIONS
    + "    grid: int = 3\n"
    + "    size: float = 64.0\n"
    + "    area: tuple[float, float] = (0.08, 1.0)\n"
    + "    turns: tuple[int, ...] = (0, 90)\n"
    + "    gray: bool = False\n"
    + "    colors: Literal['on', 'off'] = 'on'\n"
    + "    level: Literal[1, 2] | None = None\n"
    + "    note: str | None = None\n"
    + "    def __post_init__(self):\n"
    + "        if self.size > 100 / self.grid:\n"
    + "            raise ValueError(f'size ({self.size}) must fit in a cell')\n"
    + OFFERS
    + "def graph(): ...\n",
    "rotation": OPTIONS + "    angles: int = 4\n" + OFFERS + "def graph(): ...\n",
    "strips": OPTIONS
    + "    size: float = 30.0\n"
    + "    def __post_init__(self):\n"
    + "        if self.size > 40:\n"
    + "            raise ValueError(f'size ({self.size}) must be at most 40')\n"
    + OFFERS
    + "def graph(): ...\n",
    "silent": OPTIONS + "    classes: int = 4\n    size: float = 1.0\n" + "def graph(): ...\n",
    "network": OPTIONS + "    name: str = 'resnet50'\n" + "def backbone(): ...\n",
    "loss": OPTIONS
    + "    negatives: int = 10\n"
    + "class Objective:\n"
    + "    def forward(self, image, patches, index): ...\n",
    "two_graphs": OPTIONS
    + "    weight: float = 1.0\n"
    + "def takes(options):\n"
    + "    return {'patches'} if options.weight else set()\n"
    + "class Objective:\n"
    + "    def forward(self, image, patches=None): ...\n",
    "helpers": "def graph(): ...\n",
    "needs": "import lab_of_tests.reader\nimport no_such_package\n",
    "raises": "nothing = 1 / 0\n",
    "unfinished": "numbers = (\n",
    "shapeless": "class Options: ...\ndef graph(): ...\n",
    "misspelt_type": OPTIONS + "    grid: itn = 3\n" + "def graph(): ...\n",
}
RECIPE = """# a recipe as small as they come
data: {use: lab_of_tests.reader, root: null}
pipeline:
  use: lab_of_tests.jigsaw
  grid: 2
  size: 40
evaluation: {use: lab_of_tests.rotation}
backbone: {use: lab_of_tests.network}
objective: {use: lab_of_tests.loss}
optim: {lr: 0.1}
train: {epochs: 800, batch: 1024}
demo:
  pipeline: {size: 20.5}
  train: {epochs: 4}
"""


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package lab_of_tests, importable."""
    root = tmp_path_factory.mktemp("lab")
    (root / "lab_of_tests").mkdir()
    (root / "lab_of_tests" / "__init__.py").write_text("")
    for name, text in LAB.items():
        (root / "lab_of_tests" / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(root))
        yield
    for name in [name for name in sys.modules if name.startswith("lab_of_tests")]:
        del sys.modules[name]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good recipe in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    return Path("small.yaml")


def wrong(path: Path, old: str, new: str, *overrides: str) -> str:
    """The message for the recipe with `old` replaced."""
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        config.load(path, overrides)
    return str(caught.value)


# What a good recipe gives.


def test_every_key_gets_its_value_and_where_it_came_from(path: Path):
    recipe = config.load(path, ["data.root=/images", "train.seed=7", "train.seed=8"])

    assert (recipe.path, recipe.name, recipe.demo) == ("small.yaml", "small", False)
    assert recipe.pipeline.use == "lab_of_tests.jigsaw"
    assert recipe.pipeline.options == recipe.pipeline.module.Options(grid=2, size=40.0)
    assert recipe.train == config.TrainOptions(epochs=800, batch=1024, seed=8)
    assert list(recipe.values) == list(config.SECTIONS)
    assert recipe.values["pipeline"]["area"] == [0.08, 1.0]
    assert set(recipe.sources) == {
        f"{section}.{key}" for section, keys in recipe.values.items() for key in keys
    }
    assert recipe.sources["data.root"] == recipe.sources["train.seed"] == "command line"
    assert recipe.sources["pipeline.use"] == recipe.sources["train.epochs"] == "recipe"
    assert recipe.sources["pipeline.area"] == recipe.sources["probe.root"] == "default"


def test_without_images_the_demo_section_holds_and_the_command_line_still_wins(path: Path):
    recipe = config.load(path, ["train.batch=8"])

    assert recipe.demo
    assert recipe.data.options.root == str(demo.folder() / "train")
    assert recipe.probe.root == str(demo.folder())
    assert (recipe.train.epochs, recipe.train.batch) == (4, 8)
    assert recipe.pipeline.options.size == 20.5
    assert "demo" not in recipe.values
    assert recipe.sources["data.root"] == recipe.sources["probe.root"] == "demo"
    assert recipe.sources["train.epochs"] == "demo"
    assert recipe.sources["train.batch"] == "command line"


def test_null_on_the_command_line_takes_the_images_of_the_recipe_away(path: Path):
    path.write_text(RECIPE.replace("root: null", "root: /images"))

    assert not config.load(path).demo
    assert config.load(path, ["data.root=null"]).demo


def test_a_root_given_to_the_probe_stays_in_a_demo(path: Path):
    assert config.load(path, ["probe.root=/labelled"]).probe.root == "/labelled"


def test_an_int_becomes_a_float_and_a_list_a_tuple(path: Path):
    options = config.load(path, ["pipeline.area=[0, 1]", "data.root=/images"]).pipeline.options

    assert repr((options.size, options.area)) == "(40.0, (0.0, 1.0))"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=1_000", 1000),
        ("train.steps=null", None),
        ("train.clip=1.0e-4", 1e-4),
        ("train.trackers=[wandb, tensorboard]", ("wandb", "tensorboard")),
        ("train.out='a: b'", "a: b"),
        ("train.out=runs/a=b", "runs/a=b"),
        ("train.compile=yes", True),
    ],
)
def test_an_override_is_read_as_yaml(path: Path, override: str, value: object):
    train = config.load(path, [override]).train

    assert getattr(train, override.split("=")[0].removeprefix("train.")) == value


@pytest.mark.parametrize(
    "overrides", [[], ["data.root=/images"], ['train.out="a\\n b: #c \\u00e9"']]
)
def test_the_recipe_as_run_loads_as_the_same_recipe(path: Path, overrides: list[str]):
    recipe = config.load(path, [*overrides, "pipeline.note='1e-4'", "train.clip=1.0e-7"])
    path.write_text(config.dump(recipe), encoding="utf-8")
    again = config.load(path)

    assert yaml.safe_load(config.dump(recipe)) == recipe.values
    assert again == replace(recipe, demo=False, sources=again.sources)
    assert config.dump(again) == config.dump(recipe)


def test_differences_name_the_key_and_both_values():
    there = {"optim": {"lr": 0.1, "name": "sgd"}, "train": {"out": "a", "keep": None}}
    here = {"optim": {"lr": 0.2, "name": "sgd"}, "train": {"out": "b", "seed": 1, "keep": 2}}

    assert config.differences(there, there) == []
    assert config.differences(there, here, config.FREE_ON_RESUME) == [
        "optim.lr: 0.1 there, 0.2 here",
        "train.seed: missing there, 1 here",
    ]
    assert "train.keep: null there, 2 here" in config.differences(there, here)


def test_a_key_that_the_saved_recipe_is_too_old_for_stood_at_its_default(path: Path):
    here = config.load(path, ["optim.head_lr=2.0"]).values
    there = {section: dict(keys) for section, keys in here.items()}
    del there["optim"]["layer_decay"], there["train"]["weights"], there["optim"]["betas"]
    del there["pipeline"]["grid"]  # of a module; 2 here, and by default 3
    unsaid = config.defaults(here)

    assert config.differences(there, here, unsaid=unsaid) == ["pipeline.grid: 3 there, 2 here"]
    del there["optim"]["head_lr"]
    del there["optim"]["lr"]  # which has no default
    assert config.differences(there, here, unsaid=unsaid)[1:] == [
        "optim.head_lr: 1.0 there, 2.0 here",
        "optim.lr: missing there, 0.1 here",
    ]
    there["optim"]["gone"] = 1
    assert "optim.gone: 1 there, missing here" in config.differences(there, here, unsaid=unsaid)
    assert "optim.betas: missing there, [0.9, 0.999] here" in config.differences(there, here)


def test_keys_that_are_free_on_resume_exist(checkout: Path):
    sources = config.load(checkout / "recipes" / "pirl_jigsaw.yaml").sources

    free = config.FREE_ON_RESUME
    assert set(sources) > free > {"probe.every_epochs", "train.out"}
    assert {"loader.threads", "loader.prefetch", "loader.hw_decoder_load"} < free
    assert not free & {"loader.decoder", "loader.region"}


def test_the_listing_shows_value_and_source_of_every_key(path: Path, capsys):
    assert config.main([str(path), "optim.lr=0.5"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(config.load(path).sources)
    assert len({line.index(" = ") for line in lines}) == 1
    assert any(re.fullmatch(r"optim\.lr +=  ?0\.5 +# command line", line) for line in lines)
    assert any(
        re.fullmatch(r"pipeline\.area += \[0\.08, 1\.0\] +# default", line) for line in lines
    )


def test_the_command_without_a_recipe_says_how_it_is_called(capsys):
    assert config.main([]) == 2
    assert "usage: python -m fastssl.config" in capsys.readouterr().err
    assert config.main(["--help"]) == 0
    assert "usage: python -m fastssl.config" in capsys.readouterr().out


def test_the_command_ends_with_2_and_the_message_alone(path: Path, monkeypatch, capsys):
    path.write_text("optim: {lrr: 1.0}\n")
    monkeypatch.setattr(sys, "argv", ["fastssl/config.py", str(path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(config.__file__), run_name="__main__")
    said = capsys.readouterr()

    assert (ended.value.code, said.out) == (2, "")
    assert "optim.lrr: unknown key; did you mean 'lr'?" in said.err


# What a wrong one says.


def test_misspelt_key_names_the_right_one(path: Path):
    said = wrong(path, "grid: 2", "gird: 2")

    assert said == "small.yaml: pipeline.gird: unknown key; did you mean 'grid'?"


def test_a_key_like_no_other_lists_the_known_ones(path: Path):
    said = wrong(path, "grid: 2", "zoom: 2")

    assert said.startswith(
        "small.yaml: pipeline.zoom: unknown key; known: grid, size, area, turns,"
    )


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1e-4", "expected float, got '1e-4' (YAML reads 1e-4 as text: write 1.0e-4)"),
        ("2.5E6", "expected float, got '2.5E6' (YAML reads 2.5E6 as text: write 2.5e+6)"),
        ("'40'", "expected float, got '40' (in quotes it is text: write 40.0)"),
        ("wide", "expected float, got 'wide'"),
        ("on", "expected float, got on (YAML reads on as true)"),
        ("true", "expected float, got true"),
        ("", "expected float, got nothing (null)"),
        (".nan", "expected float, got .nan (must be finite)"),
        ("-.inf", "expected float, got -.inf (must be finite)"),
        ("1e999", "expected float, got '1e999'"),
        ("[40]", "expected float, got [40]"),
        ("{a: 1}", "expected a value, got keys of its own"),
        ("1:30", "YAML reads 1:30 in base 60: write 90, or '1:30' in quotes"),
        ("012", "YAML reads 012 as octal: write 12, or 10"),
        ("!!int x", "YAML cannot read it; write 'x' in quotes"),
    ],
)
def test_a_wrong_number_says_what_to_write(path: Path, written: str, said: str):
    assert wrong(path, "size: 40", f"size: {written}") == f"small.yaml: pipeline.size: {said}"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("grid: 2.0", "grid: expected int, got 2.0 (write 2)"),
        ("grid: 2.5", "grid: expected int, got 2.5"),
        ("grid: 1e3", "grid: expected int, got '1e3' (YAML reads 1e3 as text: write 1000)"),
        ("grid: 08", "grid: expected int, got '08' (YAML reads 08 as text: write 8)"),
        ("grid: yes", "grid: expected int, got yes (YAML reads yes as true)"),
        ("gray: 1", "gray: expected bool, got 1 (write true or false)"),
        ("gray: 'no'", "gray: expected bool, got 'no' (write true or false)"),
        ("colors: ofs", "colors: expected one of 'on', 'off', got 'ofs'; did you mean 'off'?"),
        (
            "colors: off",
            "colors: expected one of 'on', 'off', got off"
            " (YAML reads off as false: write 'off' in quotes)",
        ),
        ("level: 3", "level: expected one of 1, 2 or null, got 3"),
        ("level: true", "level: expected one of 1, 2 or null, got true"),
        ("level: 1.0", "level: expected one of 1, 2 or null, got 1.0"),
        (
            "note: 1_0",
            "note: expected str or null, got 1_0 (YAML reads 1_0 as int: write '1_0' in quotes)",
        ),
        (
            "note: 2024-01-31",
            "note: expected str or null, got 2024-01-31"
            " (YAML reads 2024-01-31 as date: write '2024-01-31' in quotes)",
        ),
        ("note: 2024-13-01", "note: YAML cannot read it; write '2024-13-01' in quotes"),
        ("area: 0.5", "area: expected [float, float], got 0.5"),
        ("area: [0.5]", "area: expected [float, float], got [0.5]"),
        (
            "area: [0.5, 1e0]",
            "area: expected [float, float], got [0.5, '1e0']"
            " (YAML reads 1e0 as text: write 1.0e+0)",
        ),
        ("turns: 90", "turns: expected a list of int, got 90 (write [90])"),
        ("turns: [[90]]", "turns: expected a list of int, got [[90]]"),
    ],
)
def test_a_wrong_type_says_what_to_write(path: Path, written: str, said: str):
    assert wrong(path, "grid: 2\n  size: 40", written) == f"small.yaml: pipeline.{said}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr: 0.1", "", "optim.lr: missing; write for example 'lr: 0.1'"),
        ("epochs: 800, ", "", "train.epochs: missing; write for example 'epochs: 100'"),
        (
            "use: lab_of_tests.loss",
            "",
            "objective.use: missing; write for example 'use: fastssl.objectives.pirl'",
        ),
        (
            "optim: {lr: 0.1}",
            "optim: {lr: 0.1, lr: 0.2}",
            "optim.lr: given a second time in line 10;",
        ),
        ("demo:", "optim: {lr: 0.2}\ndemo:", "optim: given a second time in line 12; keep one"),
        ("grid: 2", "on: 2", "pipeline: line 5: expected a word as key, got on"),
        ("{lr: 0.1}", "{lr:0.1}", "optim: line 10: expected 'key: value', got 'lr:0.1' for a key"),
        ("{lr: 0.1}", "0.1", "optim: expected keys (as in 'key: value'), got 0.1"),
        ("demo:", "probes: {}\ndemo:", "probes: unknown section; did you mean 'probe'?"),
        ("demo:", "looks: {}\ndemo:", "looks: unknown section; known: data, pipeline, evaluation,"),
        ("size: 40", "size: 80", "pipeline: size (80.0) must fit in a cell"),
        ("grid: 2", "grid: 0", "pipeline: division by zero"),
        (
            "demo:",
            "loader: {threads: 0}\ndemo:",
            "loader: threads (0) must be in 1 ... 1024, or null for a share of the cores",
        ),
        ("demo:", "loader: {prefetch: 0}\ndemo:", "loader: prefetch (0) must be in 1 ... 1024"),
        (
            "demo:",
            "loader: {hw_decoder_load: 1.5}\ndemo:",
            "loader: hw_decoder_load (1.5) must be in 0 ... 1",
        ),
        (
            "demo:",
            "loader: {decoder: gpu}\ndemo:",
            "loader.decoder: expected one of 'auto', 'cpu', got 'gpu'",
        ),
        (
            "batch: 1024",
            "batch: 1024, threads: 4",
            "train.threads: unknown key; did you mean 'loader.threads'?",
        ),
        (
            "train: {epochs: 4}",
            "train: {prefetch: 4}",
            "demo.train.prefetch: unknown key; did you mean 'loader.prefetch'?",
        ),
        ("batch: 1024", "batch: 0", "train: batch (0) must be at least 1"),
        ("batch: 1024", "batch: 1, out: ''", "train: out ('') must name a folder, or be null"),
        ("batch: 1024", "batch: 1, out: '  '", "train.out: '  ' is blank: write a name, or leave"),
        ("batch: 1024", 'batch: 1, out: "a\\0b"', "train.out: 'a\\x00b' has a NUL character"),
        (
            "batch: 1024",
            'batch: 1, trackers: ["a\\0"]',
            "train.trackers: 'a\\x00' has a NUL character, as no file and no name may: take it out",
        ),
        ("batch: 1024", "batch: 1, clip: 0", "train: clip (0.0) must be above 0, or null for none"),
        ("batch: 1024", "batch: 1, seed: -1", "train: seed (-1) must be in 0 ... 2147483647"),
        (
            "batch: 1024",
            "batch: 1, resume: ''",
            "train: resume ('') must be auto, never or the path",
        ),
        ("{lr: 0.1}", "&a {lr: *a}", "line 10: *a: write the value itself"),
        ("{lr: 0.1}", "{lr: 0.1", "line 11, column 6: not YAML: while parsing a flow mapping,"),
        ("grid: 2", "grid: '\0'", "not YAML: unacceptable character #x0000"),
        ("grid: 2", 'grid: "\\UFFFFFFFF"', "not YAML:"),
        ("grid: 2", f"grid: {'[' * 999}{']' * 999}", "not YAML for a recipe: nested too deeply"),
        (RECIPE, "", "expected sections such as 'data:', got an empty file"),
        (RECIPE, "- data", "expected sections such as 'data:', got ['data']"),
    ],
)
def test_a_wrong_recipe_says_where_and_what_to_write(path: Path, old: str, new: str, said: str):
    assert f"small.yaml: {said}" in wrong(path, old, new, "data.root=/images").splitlines()[0]


@pytest.mark.parametrize("overrides", [[], ["data.root=/images"]])
@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("train: {epoch: 4}", "demo.train.epoch: unknown key; did you mean 'epochs'?"),
        ("train: {epochs: 4.0}", "demo.train.epochs: expected int, got 4.0 (write 4)"),
        ("trains: {epochs: 4}", "demo.trains: unknown section; did you mean 'train'?"),
        ("demo: {}", "demo.demo: unknown section; known: data, pipeline,"),
        ("data: {root: /a}", "demo.data.root: a demo has the built-in images; leave it out"),
        ("backbone: {use: lab_of_tests.network, nam: a}", "demo.backbone.nam: unknown key;"),
        (
            "backbone: {use: lab_of_tests.net}",
            "demo.backbone.use: there is no module lab_of_tests.net",
        ),
    ],
)
def test_the_demo_section_is_checked_whether_it_holds_or_not(
    path: Path, new: str, said: str, overrides: list[str]
):
    assert f"small.yaml: {said}" in wrong(path, "train: {epochs: 4}", new, *overrides)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (
            "lab_of_tests.jigsw",
            "there is no module lab_of_tests.jigsw; did you mean 'lab_of_tests.jigsaw'?",
        ),
        ("lab_of_tests.jigsaw.small", "there is no module lab_of_tests.jigsaw.small"),
        ("no_lab.jigsaw", "there is no module no_lab to import (the folders of a checkout are"),
        ("pipelinse.jigsaw", "there is no module pipelinse to import; did you mean 'pipelines'?"),
        (
            "lab_of_tests/jigsaw.py",
            "expected the dotted name of a module, as pipelines.pirl_jigsaw, got",
        ),
        ("3", "expected the dotted name of a module, as pipelines.pirl_jigsaw, got 3"),
        (
            "lab_of_tests.helpers",
            "lab_of_tests.helpers has no Options; pipeline needs Options, graph",
        ),
        (
            "lab_of_tests.shapeless",
            "lab_of_tests.shapeless.Options must be a dataclass of plain types:",
        ),
        (
            "lab_of_tests.misspelt_type",
            "must be a dataclass of plain types: name 'itn' is not defined",
        ),
    ],
)
def test_a_module_that_is_not_there_or_no_plug_in_is_named(path: Path, use: str, said: str):
    assert said in wrong(path, "use: lab_of_tests.jigsaw", f"use: {use}")


@pytest.mark.parametrize(
    ("use", "cause", "line"),
    [
        ("lab_of_tests.needs", "ModuleNotFoundError: No module named 'no_such_package'", 2),
        ("lab_of_tests.raises", "ZeroDivisionError: division by zero", 1),
        ("lab_of_tests.unfinished", "SyntaxError: '(' was never closed", 1),
    ],
)
def test_a_module_that_fails_inside_is_not_called_missing(
    path: Path, use: str, cause: str, line: int
):
    said = wrong(path, "use: lab_of_tests.jigsaw", f"use: {use}")

    assert f"{use} is there but failed inside: {cause}" in said
    assert f"{use.rpartition('.')[2]}.py, line {line})" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'lr'?"),
        (
            "optim.lr=1e-4",
            "optim.lr: expected float, got '1e-4' (YAML reads 1e-4 as text: write 1.0e-4)",
        ),
        ("optm.lr=1", "optm.lr: unknown section 'optm'; did you mean 'optim'?"),
        ("--train.epochs=1", "--train.epochs: unknown section '--train'; did you mean 'train'?"),
        ("epochs=1", "epochs: unknown section 'epochs'; known: data, pipeline,"),
        ("", "'': unknown section ''; known: data, pipeline,"),
        ("train.a.b=1", "train.a.b: unknown key; known: out, epochs,"),
        ("train.epochs", "train.epochs: has no '='; write train.epochs=value"),
        ("train.steps=", "train.steps: no value after '='; write train.steps=null for none"),
        ("train={epochs: 4}", "train: is a whole section; write train.key=value, key by key"),
        (
            "demo.train.epochs=1",
            "demo.train.epochs: only a file has a demo section; write for example",
        ),
        ("train.threads=4", "train.threads: unknown key; did you mean 'loader.threads'?"),
        ("loader.threads=0", "loader: threads (0) must be in 1 ... 1024, or null for a share"),
        ("train.epochs=0", "train: epochs (0) must be at least 1"),
        ('data.root="a\\0b"', "data.root: 'a\\x00b' has a NUL character"),
        ("data.root=''", "data.root: '' is blank: write a name, or leave the key out"),
        ("data.root=' '", "data.root: ' ' is blank: write a name, or leave the key out"),
        ("train.out=a #b", "train.out: of 'a #b' YAML reads 'a'; write 'a #b' in quotes"),
        ("train.out=#b", "train.out: of '#b' YAML reads nothing; write '#b' in quotes"),
        ("train.out=a: b", "train.out: expected a value, got keys of its own"),
        (
            "train.out=@a",
            "train.out: line 1, column 1: not YAML: while scanning for the next token,",
        ),
        (
            "train.out=1",
            "train.out: expected str or null, got 1 (YAML reads 1 as int: write '1' in quotes)"
            " (and once more in quotes, which the shell takes away)",
        ),
    ],
)
def test_a_wrong_override_is_blamed_on_the_command_line(path: Path, override: str, said: str):
    assert wrong(path, RECIPE, RECIPE, override).startswith(f"command line: {said}")


OTHER = "pipeline.use=lab_of_tests.rotation"


@pytest.mark.parametrize("overrides", [[], ["data.root=/images"]])
def test_another_module_on_the_command_line_leaves_out_the_keys_it_does_not_have(
    path: Path, overrides: list[str]
):
    recipe = config.load(path, [OTHER, *overrides])

    assert recipe.values["pipeline"] == {"use": "lab_of_tests.rotation", "angles": 4}
    assert recipe.sources["pipeline.use"] == "command line"
    assert recipe.sources["pipeline.angles"] == "default"


def test_what_both_modules_know_holds_on_and_what_the_other_refuses_is_told(path: Path):
    both = "pipeline.use=lab_of_tests.strips"
    assert config.load(path, [both]).values["pipeline"] == {
        "use": "lab_of_tests.strips",
        "size": 20.5,
    }
    assert config.load(path, [both, "data.root=/images"]).values["pipeline"]["size"] == 40.0
    assert wrong(path, "size: 40", "size: 50", both, "data.root=/images") == (
        "small.yaml: pipeline: size (50.0) must be at most 40 (from the recipe: give"
        " pipeline.size=... for lab_of_tests.strips)"
    )


def test_the_command_line_s_own_keys_and_mistakes_in_a_recipe_are_refused_for_another_module(
    path: Path,
):
    assert wrong(path, RECIPE, RECIPE, OTHER, "pipeline.angle=3") == (
        "command line: pipeline.angle: unknown key; did you mean 'angles'?"
    )
    assert wrong(path, RECIPE, RECIPE, OTHER, "pipeline.grid=3") == (
        "command line: pipeline.grid: unknown key; known: angles"
    )
    assert "pipeline.gird: unknown key" in wrong(path, "grid: 2", "gird: 2", OTHER)
    assert "demo.pipeline.siz: unknown key" in wrong(path, "{size: 20.5}", "{siz: 20.5}", OTHER)
    assert "pipeline.grid: expected int" in wrong(path, "grid: 2", "grid: 2.5", OTHER)


def test_another_module_in_place_of_one_that_is_not_there_does_without_its_keys(path: Path):
    path.write_text(RECIPE.replace("lab_of_tests.jigsaw", "elsewhere.jigsaw"))

    assert config.load(path, [OTHER]).values["pipeline"]["angles"] == 4


def test_the_same_module_on_the_command_line_changes_nothing(path: Path):
    said = wrong(path, "grid: 2", "gird: 2", "pipeline.use=lab_of_tests.jigsaw")

    assert "pipeline.gird: unknown key; did you mean 'grid'?" in said


BACKBONES = [
    ["backbone.use=fastssl.backbones.vgg", "backbone.image_size=224"],
    ["backbone.use=fastssl.backbones.alexnet", "backbone.image_size=224"],
    ["backbone.use=fastssl.backbones.named", "backbone.name=torchvision:vgg11_bn"],
    ["backbone.use=fastssl.backbones.revnet"],
]


@pytest.mark.parametrize("root", [[], ["data.root=/images"]], ids=["demo", "data"])
@pytest.mark.parametrize("network", BACKBONES, ids=lambda each: each[0].rpartition(".")[2])
def test_every_recipe_takes_another_network(tmp_path: Path, network: list[str], root: list[str]):
    told = {}  # one recipe of those that say the same of the backbone
    for path in RECIPES:
        read = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
        told[str((read["backbone"], read.get("demo", {}).get("backbone")))] = path
    for path in told.values():
        recipe = config.load(path, [*network, *root])
        (tmp_path / "recipe.yaml").write_text(config.dump(recipe), encoding="utf-8")
        again = config.load(tmp_path / "recipe.yaml")  # as a run that goes on reads it

        assert f"backbone.use={recipe.backbone.use}" == network[0]
        assert config.differences(recipe.values, again.values) == []


def test_all_mistakes_are_reported_together_ten_at_most(path: Path):
    assert len(wrong(path, "grid: 2\n  size: 40", "gird: 2\n  size: on").splitlines()) == 2

    said = wrong(path, "grid: 2", "\n  ".join(f"grid{n}: 2" for n in range(12))).splitlines()
    assert len(said) == 11
    assert said[-1] == "... and 2 more"


def test_a_recipe_that_is_not_there_names_the_nearest(path: Path):
    (path.parent / "recipes").mkdir()
    (path.parent / "recipes" / "large.yaml").write_text(RECIPE)
    for wanted, said in {
        "smal.yaml": "smal.yaml: No such file or directory; did you mean 'small.yaml'?",
        "elsewhere/x": "elsewhere/x: No such file or directory; known: recipes/large.yaml",
        ".": ".: Is a directory; known: recipes/large.yaml, small.yaml",
    }.items():
        with pytest.raises(RecipeError) as caught:
            config.load(wanted)

        assert str(caught.value) == said


def test_a_file_that_is_not_text_is_no_recipe(path: Path):
    path.write_bytes(b"data: \xff")

    with pytest.raises(RecipeError, match=r"small\.yaml: not UTF-8 text from byte 6 on"):
        config.load(path)


def test_a_graph_must_put_out_exactly_what_the_objective_takes(path: Path):
    recipe = config.load(path)
    config.check_outputs(recipe.objective, ["index", "image", "patches"], recipe.pipeline)

    with pytest.raises(RecipeError) as caught:
        config.check_outputs(recipe.objective, ["image", "turns"], recipe.pipeline)
    missing, spare, remedy = str(caught.value).splitlines()
    assert missing == (
        "lab_of_tests.loss wants ['index', 'patches'], which lab_of_tests.jigsaw does not put out"
        " (it puts out ['image', 'turns'])"
    )
    assert spare == (
        "lab_of_tests.jigsaw puts out ['turns'], which lab_of_tests.loss does not take"
        " (it takes ['image', 'index', 'patches'])"
    )
    assert "pipeline.use and an objective.use that belong together" in remedy


def test_an_objective_for_several_graphs_names_what_its_options_need(path: Path):
    path.write_text(RECIPE.replace("lab_of_tests.loss", "lab_of_tests.two_graphs"))
    recipe = config.load(path)
    weightless = config.load(path, ["objective.weight=0.0"])
    config.check_outputs(recipe.objective, ["image", "patches"], recipe.pipeline)
    config.check_outputs(weightless.objective, ["image", "patches"], recipe.pipeline)
    config.check_outputs(weightless.objective, ["image"], recipe.pipeline)

    with pytest.raises(RecipeError, match=r"two_graphs wants \['patches'\], which"):
        config.check_outputs(recipe.objective, ["image"], recipe.pipeline)
    with pytest.raises(RecipeError, match=r"puts out \['turns'\], which"):
        config.check_outputs(weightless.objective, ["image", "turns"], recipe.pipeline)


def test_a_graph_whose_options_do_not_tell_its_sizes_is_refused(path: Path):
    message = wrong(path, "  use: lab_of_tests.jigsaw\n  grid: 2\n", "  use: lab_of_tests.silent\n")

    assert "lab_of_tests.silent.Options must offer ['largest_crop']" in message


def damaged(text: str, draw: random.Random) -> str:
    """The text with one to three characters or lines deleted, doubled, moved or replaced."""
    parts = list(text) if draw.random() < 0.7 else text.splitlines(keepends=True)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(parts))
        stranger = draw.choice(":{}[]&*!|>'\"%@#,-?\t\n\\0 \0\u00e9")
        kept = draw.choice(([], [parts[place]] * 2, [parts[place], draw.choice(parts)], [stranger]))
        parts[place : place + 1] = kept
    return "".join(parts)


def test_damage_to_a_recipe_ends_in_a_recipe_error_or_in_nothing(path: Path):
    draw = random.Random(0)
    said = []
    for _ in range(300):
        path.write_text(damaged(RECIPE, draw), encoding="utf-8")
        try:
            config.load(path)
        except RecipeError as error:
            said.append(str(error))

    assert 100 < len(said) < 300
    assert all(message.startswith("small.yaml: ") for message in said)


# The recipes of this checkout.


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("overrides", [[], ["data.root=/images/train"]], ids=["demo", "given"])
def test_every_recipe_loads_and_what_it_writes_loads_again(
    path: Path, overrides: list[str], tmp_path: Path
):
    recipe = config.load(path, overrides)
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe), encoding="utf-8")
    again = config.load(tmp_path / "recipe.yaml")

    assert recipe.demo == (not overrides)
    assert config.differences(recipe.values, again.values) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_of_every_recipe_says_how_it_is_run(path: Path):
    head = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))

    assert head is not None
    command = f"accelerate launch fastssl/train.py {path.relative_to(CHECKOUT)}"
    assert command in head.group()


def test_sections_that_came_with_weights_stand_in_place_of_the_recipe_s_and_the_demo_s():
    path = CHECKOUT / "recipes" / "supervised.yaml"
    given = {"use": "fastssl.backbones.resnet", "name": "resnet18", "width": 16}
    recipe = config.load(path, ["backbone.stem=small"], {"backbone": given})

    assert recipe.demo
    others = {"widening": None, "patch_mode": False, "zero_init_residual": False}
    others |= {"representation": None, "activation_checkpointing": False}
    assert recipe.values["backbone"] == {**given, "stem": "small", **others}
    assert recipe.sources["backbone.width"] == "weights"
    assert recipe.sources["backbone.stem"] == "command line"
    assert recipe.sources["backbone.zero_init_residual"] == "default"


def test_a_section_that_came_with_weights_is_checked_as_any_other():
    path = CHECKOUT / "recipes" / "supervised.yaml"
    given = {"use": "fastssl.backbones.resnet", "nam": "resnet18"}
    with pytest.raises(
        RecipeError, match=r"train.weights: backbone.nam: unknown key; did you mean"
    ):
        config.load(path, [], {"backbone": given})


def test_weights_may_be_at_another_path_when_a_run_goes_on_and_are_no_empty_word():
    assert "train.weights" in config.FREE_ON_RESUME  # a checkpoint knows their SHA-256
    with pytest.raises(RecipeError, match=r"weights \(''\) must name a RUN, or be null"):
        config.load(CHECKOUT / "recipes" / "supervised.yaml", ["train.weights=''"])
