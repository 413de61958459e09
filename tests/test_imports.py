"""Which room may import which: pipelines know no torch, fastssl knows no pipeline."""

import ast
import re
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("fastssl", "pipelines", "benchmarks", "tests")
FILES = sorted(
    path.relative_to(CHECKOUT) for room in ROOMS for path in CHECKOUT.glob(f"{room}/**/*.py")
)
# Besides the standard library. `fastssl` stands for fastssl and everything in it.
MAY_IMPORT = {
    "pipelines": ("nvidia.dali", "numba", "numpy", "pipelines"),
    "fastssl/objectives": (
        *("torch", "fastssl.classification", "fastssl.depths", "fastssl.distributed"),
        *("fastssl.lab", "fastssl.memory", "fastssl.patch_network"),
    ),
    "fastssl/backbones": (
        *("torch", "torchvision", "safetensors", "fastssl.network_keys", "fastssl.pixels"),
        *("fastssl.recompute", "fastssl.trial_pass"),
    ),
}
ENTRY_POINTS = tuple(
    f"fastssl.{name}" for name in ("train", "finetune", "evaluate", "grid", "report")
)
TRAINS = Path("fastssl/finetune.py")  # it is train.py with another recipe
TAKEN = (  # by what is installed beside us, or by what everybody calls theirs
    *(
        "accelerate",
        "numba",
        "numpy",
        "nvidia",
        "PIL",
        "pydantic",
        "rich",
        "safetensors",
        "tensorboard",
    ),
    *("timm", "torch", "torchvision", "yaml"),
    *("dataset", "datasets", "helpers", "models", "util", "utils"),
)


def imports(source: str) -> set[str]:
    """The dotted names that `source` imports, wherever in it: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def files(room: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(room)]


def test_imports_are_found_wherever_and_however_they_are_written():
    source = (
        "import a.b as c\nfrom d import e, f\ndef g():\n    from . import h\n    from .i import j"
    )

    assert imports(source) == {"a.b", "d.e", "d.f", "..h", ".i.j"}


@pytest.mark.parametrize("room", [*ROOMS, *MAY_IMPORT])
def test_every_room_has_files_to_look_at(room):
    assert files(room)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_graphs_objectives_and_backbones_import_only_what_their_room_may(room):
    allowed = (*MAY_IMPORT[room], *sys.stdlib_module_names)
    strangers = {
        f"{path}: {name}"
        for path in files(room)
        for name in imports((CHECKOUT / path).read_text())
        if not inside(name, allowed)
    }

    assert not strangers


def test_the_library_imports_nothing_of_the_laboratory():
    strangers = {
        f"{path}: {name}"
        for path in files("fastssl")
        for name in imports((CHECKOUT / path).read_text())
        if inside(name, ("pipelines", "benchmarks", "tests"))
    }

    assert not strangers


def test_nothing_but_tests_and_benchmarks_imports_an_entry_point():
    strangers = {
        f"{path}: {name}"
        for path in [*files("fastssl"), *files("pipelines")]
        for name in imports((CHECKOUT / path).read_text())
        if inside(name, ENTRY_POINTS) and (path, name) != (TRAINS, "fastssl.train")
    }

    assert not strangers


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_import_line_is_the_path_from_the_checkout(path):
    assert not [name for name in imports((CHECKOUT / path).read_text()) if name.startswith(".")]


@pytest.mark.parametrize("path", [*files("fastssl"), *files("pipelines")], ids=str)
def test_no_file_is_named_like_a_module_that_it_would_hide_when_run_as_a_script(path):
    names = {part for part in path.with_suffix("").parts if part != "__init__"}

    assert not names & {*sys.stdlib_module_names, *TAKEN}


def test_the_map_in_the_readme_names_only_files_that_exist():
    readme = (CHECKOUT / "README.md").read_text()
    found = re.search(r"^## Map$.*?^```\w*$(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert found, "README.md has no fenced block under a heading '## Map'"
    paths = [line.split()[0] for line in found[1].splitlines() if line.strip() and line[0] != " "]

    assert len(paths) >= 5
    assert not [path for path in paths if not list(CHECKOUT.glob(path))]
