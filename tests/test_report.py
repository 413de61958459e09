"""Reports: one page that is whole, true to the log, harmless, and makes do with what there is."""

import base64
import fcntl
import io
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastssl import checkpoint, report
from fastssl.reporting import probes as report_probes
from fastssl.reporting.charts import Series, chart, thin, ticks
from fastssl.reporting.markup import element, join
from fastssl.reporting.pictures import LARGEST
from fastssl.reporting.run import read_all

VOID = {"meta", "img", "br"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Reads a page, and refuses one whose tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # the element that holds it
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    @property
    def text(self) -> str:
        """What is to be read, in order."""
        shown = [text for tag, text in self.texts if tag not in ("script", "style")]
        return " ".join(" ".join(shown).split())

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """The values of each chart, by its title."""
        data = [json.loads(text) for tag, text in self.texts if tag == "script" and text[0] == "{"]
        titles = [e["aria-label"].split(". ")[0] for tag, e in self.elements if "tabindex" in e
                  and tag == "svg"]  # fmt: skip
        return dict(zip(titles, data, strict=True))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def training(steps: list[int], **others: Any) -> list[dict[str, Any]]:
    """Lines as train.py writes them."""
    rng = random.Random(len(steps))
    return [
        {
            "step": step,
            "epoch": step // 40,
            "loss": 2 / (1 + step) + rng.random(),
            "lr": 0.1 / step,
            "images_per_second": 100 + 50 * rng.random(),
            "patches_per_second": 0.0,
            "data_wait": rng.random() / 4,
            "accuracy": rng.random(),
            "chance": 0.25,
            **others,
        }
        for step in steps
    ]


def make_run(
    folder: Path,
    lines: list[dict[str, Any]],
    *,
    done: bool = True,
    recipe: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """A run folder as train.py leaves it, but for weights."""
    folder.mkdir(parents=True)
    values: dict[str, dict[str, Any]] = {
        "data": {"use": "pipelines.readers.folder", "root": "/nowhere/train"},
        "pipeline": {"use": "pipelines.rotation", "image_size": 48},
        "backbone": {"use": "fastssl.backbones.resnet", "name": "resnet10", "width": 32},
        "objective": {"use": "fastssl.objectives.rotation"},
        "train": {"epochs": 4, "steps": None, "batch": 64, "resume": "auto", "out": str(folder)},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe or values))
    start = {
        "time": "2026-11-21T13:08:30Z",
        "command": ["fastssl/train.py", "recipes/rotation.yaml"],
        "resumed": None,
        "host": "vm",
        "platform": "Linux",
        "device": "NVIDIA H200",
        "processes": 1,
        "python": "3.11.7",
        "versions": {"torch": "2.15.0", "numpy": None},
        "commit": "465ec2e02b9b8eb05857c6fa2bd81f4d9e1d5687",
        "diff": "--- a/x\n+++ b/x\n+<b>new</b>\n",
    }
    (folder / "environment.json").write_text(json.dumps([start]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / ".lock").write_text("process 1 on vm")
    if done:
        (folder / "backbone.json").write_text("{}")
    return folder


def make_page(tmp_path: Path, *runs: Path, preview: bool = False) -> Page:
    out = tmp_path / "report.html"
    options = [] if preview else ["--no-preview"]
    assert report.main([*map(str, runs), "--out", str(out), *options]) == 0
    return Page(out)


LINES = [
    {"step": 0, "probe": "knn", "accuracy": 0.3120000064, "neighbours": 20, "accuracy_k200": 0.31},
    *training([20, 40, 60, 80], std=0.5),
    {"step": 80, "probe": "knn", "accuracy": 0.4339999854, "neighbours": 20, "accuracy_k200": 0.39},
]


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "rotation", LINES)


def test_every_number_of_the_log_is_on_the_page_as_it_was_logged(tmp_path, run):
    page = make_page(tmp_path, run)
    train = [line for line in LINES if "probe" not in line]
    by_key = {
        "loss": "Loss",
        "lr": "Learning rate",
        "accuracy": "Pretext accuracy (dotted: chance)",
        "std": "Std of embeddings (0: collapsed)",
        "images_per_second": "Throughput, images/s",
        "data_wait": "Waiting for images, % of the time",
    }

    for key, title in by_key.items():
        series = page.charts[title]["series"]
        assert series[0]["name"] == "rotation"
        assert series[0]["points"] == [[line["step"], line[key]] for line in train]
    chance = page.charts[by_key["accuracy"]]["series"][1]
    assert chance["points"] == [[line["step"], 0.25] for line in train]
    knn = page.charts["knn: accuracy"]["series"][0]["points"]
    assert knn == [[0, 0.3120000064], [80, 0.4339999854]]
    logged = {cell["title"] for cell in page.all("td") if "title" in cell}
    assert {json.dumps(line[key]) for line in train for key in line if key != "step"} <= logged
    assert {json.dumps(0.39), json.dumps(0.4339999854)} <= logged
    assert f"{train[-1]['accuracy']:.1%}".replace("%", " %") in page.text


def test_a_line_of_the_drawing_goes_through_its_values(tmp_path, run):
    page = make_page(tmp_path, run)
    data = page.charts["Loss"]
    (low, high, left, right), (least, greatest, bottom, top) = data["x"], data["y"]
    paths = [each["d"] for each in page.all("path") if each.get("class") == "line c0"]
    drawn = [tuple(map(float, place.split())) for place in paths[0][1:].split("L")]

    expected = [
        (
            left + (step - low) / (high - low) * (right - left),
            bottom + (value - least) / (greatest - least) * (top - bottom),
        )
        for step, value in data["series"][0]["points"]
    ]
    assert np.allclose(drawn, expected, atol=0.051)  # written with one decimal
    assert low <= 20 < 80 <= high
    assert least <= min(value for _, value in data["series"][0]["points"])


def test_the_page_asks_for_nothing_and_runs_one_script_of_its_own(tmp_path, run):
    page = make_page(tmp_path, run)

    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert attributes.get(key, "#").startswith(("#", "data:"))
        assert not [key for key in attributes if key.startswith("on")]
    assert not page.all("link")
    assert not re.search(r"url\(|@import|https?://", page.source)
    scripts = page.all("script")
    assert [each.get("type") for each in scripts].count(None) == 1
    assert {each.get("type") for each in scripts} == {None, "application/json"}
    policy = next(each for each in page.all("meta") if "http-equiv" in each)
    assert policy["content"].startswith("default-src 'none'")
    targets = {each["href"][1:] for each in page.all("a")}
    assert targets
    assert targets == {each["id"] for each in page.all("section")}


def test_nothing_from_a_file_becomes_markup(tmp_path):
    evil = {
        "data": {"use": EVIL, "root": EVIL},
        EVIL: {EVIL: EVIL, "list": [EVIL]},
        "train": {"batch": EVIL, "epochs": EVIL, "resume": EVIL},
    }
    lines = [
        *training([1, 2], **{EVIL: 1.5}),
        {"step": 1, "probe": EVIL, "stage": EVIL, "accuracy": 0.1, EVIL: EVIL},
        {"step": 2, "probe": EVIL, "stage": "b", "accuracy": 0.2, EVIL: [EVIL] * 20},
        {"step": 2, "probe": [EVIL], "stage": {EVIL: EVIL}, "what": EVIL},
    ]
    name = EVIL.replace("/", "")
    folder = make_run(tmp_path / name, lines, recipe=evil)
    start = {key: EVIL for key in ("time", "host", "platform", "device", "python", "commit")}
    start |= {"command": [EVIL], "versions": {EVIL: EVIL}, "diff": EVIL, "resumed": EVIL}
    (folder / "environment.json").write_text(json.dumps([start, start]))
    (folder / "evaluations").mkdir()
    text = PngInfo()
    text.add_text("Title", EVIL)
    text.add_text("Description", EVIL)
    Image.new("RGB", (8, 8)).save(folder / "evaluations" / f"{name}.png", pnginfo=text)
    page = make_page(tmp_path, folder, make_run(tmp_path / "plain", LINES))
    once = make_page(tmp_path, make_run(tmp_path / "harmless", LINES))

    assert [each.get("type") for each in page.all("script")].count(None) == 1
    assert len(page.all("img")) == 1
    assert page.all("img")[0]["src"].startswith("data:image/png;base64,")
    assert not [key for _, each in page.elements for key in each if key.startswith("on")]
    assert not page.all("b") or all(tag != "b" for tag, t in page.texts if "alert(2)>x" in t)
    assert "<img src=x" not in page.source
    assert "<script>alert" not in page.source
    assert page.text.count("alert(1)") > 10  # told all the same
    # The same kinds of elements as on a page without: nothing of the text became one.
    extra = {"img", "figcaption", "h3", "figure"}
    assert {tag for tag, _ in page.elements} - extra == {tag for tag, _ in once.elements} - extra


def test_several_runs_share_charts_and_what_differs_is_marked(tmp_path):
    first = make_run(tmp_path / "a" / "run", LINES)
    second = make_run(tmp_path / "b" / "run", [*LINES[:3], *training([100, 120])])
    recipe = yaml.safe_load((second / "recipe.yaml").read_text())
    recipe["backbone"]["width"] = 64
    recipe["optim"] = {"lr": 0.3}
    (second / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = make_page(tmp_path, first, second)
    names = ["a/run", "b/run"]  # alike but for the parent

    loss = page.charts["Loss"]["series"]
    assert [each["name"] for each in loss] == names
    assert [each["class"] for each in loss] == ["c0", "c1"]
    assert [p[0] for p in loss[1]["points"]] == [20, 40, 100, 120]
    assert "What differs: 3 of 14 keys" in page.text
    marked = page.source.split('class="differs"')[1:]
    assert len(marked) == 2 * 3  # a cell a run: backbone.width, optim.lr and train.out
    assert "<code>64</code>" in "".join(marked)
    assert "<code>48</code>" not in "".join(each.split("</td>")[0] for each in marked)
    assert f"data.root {'/nowhere/train'} {'/nowhere/train'}" in page.text


def test_a_run_that_learns_classes_has_no_pretext_accuracy_and_tells_that_on_val(tmp_path):
    val = [
        {"step": s, "probe": "val", "accuracy": a, "top5": 1.0} for s, a in ((0, 0.1), (80, 0.6))
    ]
    page = make_page(tmp_path, make_run(tmp_path / "finetune", [*LINES, *val]))

    assert "Accuracy in training (dotted: chance)" in page.charts
    assert "pretext" not in page.text.lower()
    assert "run loss accuracy in training chance std val, last kNN, first kNN, last" in page.text
    assert "25.0 % 0.5 60.0 % step 80 31.2 % step 0 43.4 % step 80" in page.text


def test_a_page_of_one_run_has_no_comparison(tmp_path, run):
    text = make_page(tmp_path, run).text

    assert "What differs" not in text
    assert "All 13 keys" in text
    assert "465ec2e02b with changes" in text
    assert "<b>new</b>" in text  # of the diff, as text


def test_an_unfinished_run_says_where_it_is(tmp_path, capsys):
    stopped = make_run(tmp_path / "stopped", LINES, done=False)
    state = {
        "step": 80,
        "fingerprint": {"usable images": 2500, "processes": 2, "train.batch": 64},
    }
    checkpoint.save(stopped / "checkpoints", 80, state, keep=1)
    assert "stopped at step 80 of 160 (epoch 3 of 4)" in make_page(tmp_path, stopped).text
    assert "2,500 images, /nowhere/train" in make_page(tmp_path, stopped).text

    with (stopped / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "running at step 80 of 160" in make_page(tmp_path, stopped).text

    (stopped / "checkpoints" / "step-00000080.pt").write_bytes(b"PK torn")
    torn = make_page(tmp_path, stopped).text
    assert "stopped at step 80 (epoch 3 of 4)" in torn
    assert "checkpoints/step-00000080.pt can't be read" in torn
    assert "stopped: stopped at step 80 (epoch 3 of 4)\n" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [[], ["recipe.yaml"], ["recipe.yaml", "environment.json"]])
def test_a_folder_with_nothing_yet_says_so(tmp_path, run, kept):
    for path in run.iterdir():
        if path.name not in (*kept, ".lock"):
            path.unlink()
    page = make_page(tmp_path, run, preview=True)

    assert "nothing yet: no step is logged" in page.text
    assert "No line of training is logged yet." in page.text
    assert "No probe is logged yet." in page.text
    assert "No preview of the input" in page.text
    for name in {"recipe.yaml", "environment.json"} - {*kept}:
        assert f"{name} is not there" in page.text


def test_torn_lines_and_numbers_that_are_none_are_survived_and_told(tmp_path, run, capsys):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[2:2] = [b'{"step": 30, "lo', b"[1]", b'{"step": "x"}', b"\xff\xfe", b'{"step": -1}']
    lines[2:2] = [b'{"step": 25, "loss": NaN, "lr": Infinity, "accuracy": true, "std": "x"}']
    lines[2:2] = [b'{"step": 26, "loss": 1' + b"0" * 400 + b"}"]
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 90, "loss"')
    page = make_page(tmp_path, run)

    told = "metrics.jsonl: 6 of 14 lines are torn or damaged and left out (line 5, 6, 7, 8, 9 ...)"
    assert told in page.text
    assert told in capsys.readouterr().err
    assert [p[0] for p in page.charts["Loss"]["series"][0]["points"]] == [20, 40, 60, 80]
    assert page.text.count("1 value is not finite: a gap.") == 2  # loss and lr
    drawn = next(each["d"] for each in page.all("path") if each.get("class") == "line c0")
    assert drawn.count("M") == 2  # the line is broken where the value is missing
    assert "NaN" not in "".join(text for tag, text in page.texts if tag == "script" and "x" in text)


def test_a_damaged_recipe_and_environment_are_told(tmp_path, run):
    (run / "recipe.yaml").write_text("a: [")
    (run / "environment.json").write_text("{")
    text = make_page(tmp_path, run, preview=True).text

    assert "recipe.yaml is damaged: nothing is known of the recipe" in text
    assert "environment.json is damaged" in text
    assert "No recipe can be read." in text
    assert "No preview of the input: " in text


def test_a_log_of_a_hundred_thousand_lines_is_thinned_and_says_how(tmp_path):
    losses = np.random.default_rng(0).random(100_000)
    losses[54_321] = 77.0
    lines = [{"step": 10 * (n + 1), "loss": loss} for n, loss in enumerate(losses.tolist())]
    page = make_page(tmp_path, make_run(tmp_path / "long", lines))
    points = page.charts["Loss"]["series"][0]["points"]

    assert len(page.source) < 500_000
    assert len(points) == 1191
    assert "long: 100,000 lines in 1,191 bins of up to 84" in page.text
    assert "the line is their mean, the band their least and greatest" in page.text
    assert max(p[4] for p in points) == 77.0  # a spike is not smoothed away
    for number in (0, 600, 1190):
        part = losses[84 * number : 84 * (number + 1)]
        first, last, low, mean, high = points[number]
        assert (first, last) == (840 * number + 10, 840 * number + 10 * len(part))
        assert (low, high) == (part.min(), part.max())
        assert mean == pytest.approx(part.mean(), rel=1e-5)
    assert "long: 200 of 100,000 lines of training" in page.text


def test_many_runs_with_every_metric_stay_a_small_page(tmp_path):
    lines = training(list(range(1, 500)), std=0.4, agreement=0.3)
    runs = [make_run(tmp_path / f"run{n}", lines) for n in range(12)]
    page = make_page(tmp_path, *runs)

    assert len(page.source) < 2_000_000
    assert len(page.charts["Loss"]["series"]) == 12
    kinds = [each["class"] for each in page.charts["Loss"]["series"]]
    assert len(set(kinds)) == 12  # colours, then dashes


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 100])
def test_bins_hold_every_value_once(count):
    points = [(float(x), float((x * 7) % 13)) for x in range(count)]
    bins = [each for each in thin(points, 8) if each is not None]

    assert len(bins) <= 8
    assert sum(each.count for each in bins) == count
    total = sum(each.mean * each.count for each in bins)
    assert total == pytest.approx(sum(value for _, value in points))
    assert (bins[0].first, bins[-1].last) == (0, count - 1)
    assert all(a.last < b.first for a, b in pairwise(bins))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0, 0), (5, 5), (-3, 1e-4), (1, 1 + 1e-15), (0, 5e-324), (1e300, 1e308),
     (-1.7e308, 1.7e308), (0.3, 0.30001)],
)  # fmt: skip
def test_ticks_are_few_and_hold_every_value(low, high):
    found = ticks(low, high)

    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))
    slack = 1e-8 * max(abs(low), abs(high), 1e-290)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert "nan" not in chart("any", [Series("run", 0, [(0, low), (1, high)])])


def test_text_is_escaped_by_construction():
    assert element("p", {"title": '"<&'}, "<b>&", element("b", {}, "x")) == (
        '<p title="&quot;&lt;&amp;">&lt;b&gt;&amp;<b>x</b></p>'
    )
    assert join(["<", element("br", {})], " ") == "&lt; <br/>"


# Probes.


def linear(**settings: Any) -> list[dict[str, Any]]:
    return [
        {"step": 9, "probe": "linear", "stage": f"layer{n}", "accuracy": n / 10, "l2": 0.1**n}
        | settings
        for n in (1, 2, 3)
    ]


def test_a_probe_by_depth_is_drawn_for_each_setting_that_was_asked_for(tmp_path):
    lines = [*linear(solver="lbfgs", epochs=28), *linear(solver="sgd", epochs=28)]
    page = make_page(tmp_path, make_run(tmp_path / "run", lines))
    drawn = report_probes.by_depth([lines], ["run"])

    assert [each.note for each in drawn] == ["solver lbfgs; epochs 28", "solver sgd; epochs 28"]
    assert all(each.labels == ["layer1", "layer2", "layer3"] for each in drawn)
    assert drawn[0].series[0].points == [(0, 0.1), (1, 0.2), (2, 0.3)]
    data = page.charts["linear: accuracy by depth"]
    assert data["labels"] == ["layer1", "layer2", "layer3"]
    assert data["series"][0]["points"] == [[0, 0.1], [1, 0.2], [2, 0.3]]
    # Each stage's own strength is no setting, but is told.
    assert report_probes.separating("linear", [lines]) == {"solver"}
    assert "linear: l2 (epochs 28)" in page.text


def test_the_last_value_of_a_measurement_that_was_repeated_holds():
    again = [line | {"accuracy": 0.9, "accuracies": [0.9, 0.9]} for line in linear()]
    (probe,) = report_probes.measured([[*linear(), *again], []])

    assert [row.stage for row in probe.rows] == ["layer1", "layer2", "layer3"]
    assert all(row.values["accuracy"] == {0: (0.9, 9)} for row in probe.rows)
    assert probe.results[0] == "accuracy"


def test_a_probe_that_nobody_knows_is_shown_whole(tmp_path):
    line = {"step": 80, "probe": "astrology", "omens": 0.125, "signs": 12, "of": "moon",
            "houses": {"first": 0.5}, "list": list(range(30)), "flag": True}  # fmt: skip
    page = make_page(tmp_path, make_run(tmp_path / "run", [*LINES, line]))

    assert "astrology: omens (signs 12, of moon, flag true)" in page.text
    assert json.dumps(0.125) in {each.get("title") for each in page.all("td")}
    assert '{"first": 0.5}' in page.text
    assert json.dumps(list(range(30))) in page.text


def test_a_sweep_has_a_row_for_each_setting_and_a_column_for_each_run(tmp_path):
    def lines(shift: float) -> list[dict[str, Any]]:
        return [
            {"step": 80, "probe": "svm_low_shot", "stage": "pool", "shots": n, "map": n / 8 - shift}
            for n in (1, 2, 4)
        ]

    (probe,) = report_probes.measured([lines(0), lines(0.1)])
    runs = [make_run(tmp_path / name, lines(0)) for name in ("one", "two")]
    text = make_page(tmp_path, *runs).text

    assert [row.settings for row in probe.rows] == ["shots 1", "shots 2", "shots 4"]
    assert [row.values["map"][1][0] for row in probe.rows] == [
        1 / 8 - 0.1,
        2 / 8 - 0.1,
        4 / 8 - 0.1,
    ]
    assert probe.rows[0].unit("map") == "%"
    assert "pool shots 2 25.0 % step 80 25.0 % step 80 pool shots 4" in text


def test_knn_of_training_and_of_evaluate_stay_apart(tmp_path):
    evaluated = {"step": 80, "probe": "knn", "stage": "pool", "accuracy": 0.77, "neighbours": 20,
                 "temperature": 0.07, "sweep": [[1, 0.07, 0.7]] * 9}  # fmt: skip
    page = make_page(tmp_path, make_run(tmp_path / "run", [*LINES, evaluated]))

    knn = page.charts["knn: accuracy"]["series"][0]["points"]
    assert knn == [[0, 0.3120000064], [80, 0.4339999854]]
    assert "31.2 % step 0 43.4 % step 80" in page.text
    assert "pool temperature 0.07 77.0 %" in page.text


# Throughput.


def test_mean_rate_is_images_over_time_without_the_warm_up(tmp_path):
    recipe = {"train": {"batch": 60, "resume": "auto"}}
    rates = {10: 1.0, 20: 100.0, 50: 300.0}  # steps 11 ... 20 take 6 s, 21 ... 50 take 6 s
    waits = {10: 1.0, 20: 0.5, 50: 0.1}
    lines = [
        {"step": step, "images_per_second": rate, "data_wait": waits[step]}
        for step, rate in rates.items()
    ]
    run = make_run(tmp_path / "run", lines, recipe=recipe)
    text = make_page(tmp_path, run).text

    assert "run 200 200 100 to 300 30.0 % 50.0 % 2 of 3" in text
    assert "30% of the time goes by in waiting for images" in text
    assert f"python -m benchmarks stages {run}/recipe.yaml" in text
    assert f"{(600 + 12) / 3600:.2g} h (10 min)" in text  # the warm-up was training, too


def test_a_gpu_that_does_not_wait_binds(tmp_path):
    lines = [line | {"data_wait": 0.01} for line in training([20, 40])]
    text = make_page(tmp_path, make_run(tmp_path / "run", lines)).text

    assert "run : 1% of the time goes by in waiting for images: the step on the device" in text


# Pictures.


def test_pictures_of_evaluations_are_in_the_page_and_bounded(tmp_path, run):
    folder = run / "evaluations" / "sweep"
    folder.mkdir(parents=True)
    title = PngInfo()
    title.add_text("Title", "Distances of an image to its copy")
    Image.new("RGB", (30, 20), "red").save(folder / "distances.png", pnginfo=title)
    noise = np.random.default_rng(0).integers(0, 256, (900, 1800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "evaluations" / "noise_map.png")
    (run / "evaluations" / "torn.png").write_bytes((folder / "distances.png").read_bytes()[:60])
    page = make_page(tmp_path, run)
    images = page.all("img")
    parts = [each["src"].removeprefix("data:").split(";base64,") for each in images]
    kinds, data = zip(*parts, strict=True)
    sizes = [Image.open(io.BytesIO(base64.b64decode(each))).size for each in data]

    assert kinds == ("image/jpeg", "image/png")
    assert sizes[1] == (30, 20)
    assert sizes[0][0] == 2 * sizes[0][1]
    assert len(base64.b64decode(data[0])) <= LARGEST
    assert "Distances of an image to its copy" in page.text
    assert "noise map" in page.text
    assert "evaluations/torn.png can't be shown" in page.text
    assert all(each["alt"] for each in images)


# The command.


def test_a_real_run_is_reported_without_touching_it(tmp_path, checkout, environ, demo_images):
    run = tmp_path / "real"
    train = [sys.executable, "fastssl/train.py", "recipes/rotation.yaml", f"train.out={run}"]
    train += ["data.limit=32", "train.batch=8", "train.epochs=1", "train.log_steps=1"]
    train += ["backbone.width=8", "pipeline.copies=one", "probe.root=null", "data.root="]
    train[-1] += str(demo_images / "train" / "boat")
    train += ["pipeline.image_size=32", "backbone.name=resnet10"]
    subprocess.run(train, cwd=checkout, env=environ, check=True, capture_output=True)
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    gone = make_run(tmp_path / "gone", LINES)
    recipe = (run / "recipe.yaml").read_text()
    (gone / "recipe.yaml").write_text(recipe.replace(str(demo_images), "/not/there"))
    page = make_page(tmp_path, run, gone, preview=True)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [[line["step"], line["loss"]] for line in lines if "loss" in line]
    (image,) = page.all("img")
    pixels = Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))

    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before
    assert len(losses) == 4
    assert page.charts["Loss"]["series"][0]["points"] == losses
    assert "done, 4 steps" in page.text
    assert "resnet10, width 8" in page.text
    assert "fastssl/train.py recipes/rotation.yaml" in page.text
    (read,) = read_all([str(run)])
    assert (read.planned, read.images, read.notes) == (4, 32, [])
    # What the network sees, from the recipe as it was run.
    assert pixels.size == (int(image["width"]), int(image["height"]))
    assert len(np.unique(np.asarray(pixels.convert("RGB")).reshape(-1, 3), axis=0)) > 500
    assert "turned" in image["alt"]
    assert "32 images" in image["alt"]
    assert "No preview of the input: data.root: there is no folder /not/there" in page.text


def test_a_run_s_widening_is_told_before_the_width_that_is_the_default(tmp_path):
    backbone = {"use": "fastssl.backbones.resnet", "name": "resnet50", "width": 64, "widening": 8}
    given = {"backbone": backbone, "train": {"epochs": 4, "batch": 64}}
    (read,) = read_all([str(make_run(tmp_path / "wide", LINES, recipe=given))])

    assert read.backbone == "resnet50, widening 8"


def test_wrong_folders_and_files_are_refused_in_one_line(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file"
    file.touch()
    out = str(tmp_path / "new.html")
    wrong = {
        (str(tmp_path / "none"), "--out", out): "does not exist: name a run folder",
        (str(file), "--out", out): "is a file: name a run folder",
        (str(tmp_path / "empty"), "--out", out): "is no run folder (it has no recipe.yaml)",
        (str(tmp_path), "--out", out): "it holds run folders: name those (rotation)",
        (str(run), str(run) + "/", "--out", out): "is given twice",
        (str(run), "--out", str(tmp_path / "recipe.yaml")): "must end in .html",
        (str(run), "--out", str(tmp_path / "no" / "a.html")): "there is no folder",
    }

    for arguments, message in wrong.items():
        assert report.main([*arguments, "--no-preview"]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert said.out == ""
    assert not Path(out).exists()


def test_a_full_disk_is_an_error_of_one_line(small_disk, run, capsys):
    (small_disk / "filler").write_bytes(b"x" * (2**20 - 8192))
    code = report.main([str(run), "--out", str(small_disk / "a.html"), "--no-preview"])

    assert code == 1
    assert "No space left" in capsys.readouterr().err


def test_the_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])

    assert ended.value.code == 0
    assert "python -m fastssl.report RUN" in capsys.readouterr().out
