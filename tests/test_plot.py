"""The pictures show what the results say, and are the same every time."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import plot, result
from benchmarks.__main__ import main
from benchmarks.result import Row

RATES = {"read": 9000, "decode": 300, "decode_limit": 320, "loader": 230, "end_to_end": 200}
LIMIT_LINE = (0xD5, 0x5E, 0x00)


def bars(rates: dict[str, int], group: str = "") -> list[Row]:
    return [
        Row(name=name, group=group, unit="images/s", values=[rate * 0.9, rate, rate * 1.1])
        for name, rate in rates.items()
    ]


def grown(name: str, unit: str, power: float) -> list[Row]:
    return [
        Row(name=name, group="images", unit=unit, values=[size**power], extra={"size": size})
        for size in (10, 1000, 100_000)
    ]


ROWS = {
    "stages": [*bars(RATES), Row(name="gpu memory", unit="MB", values=[3.0])],
    "tasks": [
        *bars({"fastssl": 300, "pil": 100, "tuned": 200, "ffcv": 250}, "jigsaw"),
        *bars({"decode_limit": 500, "bound": 400}, "jigsaw"),
        *bars({"fastssl": 200, "pil": 90, "mine": 3}, "rotation"),
    ],
    "scale": [*grown("listing", "s", 1.0), *grown("step", "ms", 0.0), *grown("list", "MB", 0.5)],
}


def drawn(tmp_path: Path, command: str, rows: list[Row]) -> Path:
    result.write(tmp_path / f"{command}.json", result.make(command, rows, {}))
    out = tmp_path / "pictures"

    assert main(["plot", str(tmp_path / f"{command}.json"), "--out", str(out)]) == 0
    return out / f"{command}.png"


@pytest.mark.parametrize("command", ROWS)
def test_a_picture_is_made_of_each_kind_of_result(command, tmp_path, capsys):
    picture = drawn(tmp_path, command, ROWS[command])
    first = picture.read_bytes()
    again = drawn(tmp_path, command, ROWS[command]).read_bytes()
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))

    assert capsys.readouterr().out == f"{picture}\n" * 2
    assert first == again
    assert pixels.shape[1] == 1600
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all()  # opaque white: legible on a dark page, too


def test_the_decode_limit_is_a_line_through_the_stages(tmp_path):
    def line_pixels(rates: dict[str, int]) -> int:
        with Image.open(drawn(tmp_path, "stages", bars(rates))) as image:
            return int((np.asarray(image.convert("RGB")) == LIMIT_LINE).all(axis=-1).sum())

    assert line_pixels(RATES) > 500
    assert line_pixels({"decode": 300, "loader": 230}) == 0


def test_each_stage_is_named_with_its_rate_and_an_endless_bar_is_cut():
    figure = plot.stages(Path("x"), ROWS["stages"])
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    texts = [text.get_text() for text in axes.texts]

    assert names == ["read", "decode", "loader", "end to end"]
    assert texts[:4] == ["9,000 (bar cut)", "300", "230", "200"]
    assert texts[4].strip() == "decode limit of this machine 320"
    assert axes.get_xlim()[1] < 1000


def test_each_task_has_a_bar_for_every_alternative_that_was_measured():
    figure = plot.tasks(Path("x"), ROWS["tasks"])
    (axes,) = figure.axes
    (legend,) = figure.legends

    assert [label.get_text() for label in axes.get_yticklabels()] == ["jigsaw", "rotation"]
    assert [text.get_text() for text in axes.texts] == [
        *("300", "250", "200", "100"),
        *("200", "90", "3"),
    ]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["fastssl", "ffcv", "tuned", "pil", "mine", "bound", "decode limit"]
    lines = [line for line in axes.lines if line.get_linestyle() in ("--", ":")]
    assert [np.unique(line.get_xdata()).tolist() for line in lines[:2]] == [[500], [400]]


def test_scaling_is_drawn_with_its_slope():
    figure = plot.scale(Path("x"), ROWS["scale"])
    seconds, memory = figure.axes
    legends = [legend for axes in figure.axes if (legend := axes.get_legend())]

    assert (seconds.get_xscale(), seconds.get_yscale()) == ("log", "log")
    assert (seconds.get_ylabel(), memory.get_ylabel()) == ("s", "MB")
    assert [text.get_text() for legend in legends for text in legend.get_texts()] == [
        *("listing: slope 1.00", "step: slope 0.00", "list: slope 0.50")
    ]


@pytest.mark.parametrize(
    ("command", "rows", "message"),
    [
        ("soak", bars(RATES), "no picture is drawn of soak, only of stages, tasks, scale"),
        ("scale", bars(RATES), "x.json: has no row that could be drawn"),
    ],
)
def test_what_has_no_picture_is_refused(command, rows, message, tmp_path, capsys):
    result.write(tmp_path / "x.json", result.make(command, rows, {}))

    assert main(["plot", str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_files_of_one_name_would_give_one_picture(tmp_path, capsys):
    same = [str(tmp_path / folder / "x.json") for folder in ("a", "b")]

    assert main(["plot", *same, "--out", str(tmp_path)]) == 2
    assert "two of the files have one name" in capsys.readouterr().err
