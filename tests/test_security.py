"""What a recipe from a stranger can and cannot do: `use:` imports a module, nothing else runs."""

import sys
from pathlib import Path

import pytest
import yaml

from fastssl import config
from fastssl.config import RecipeError

NAME = "a_trap_for_recipes"


@pytest.fixture
def sprung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that importing the module NAME, which can be imported, leaves behind."""
    path = tmp_path / "sprung"
    (tmp_path / f"{NAME}.py").write_text(f"open({str(path)!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return path


@pytest.fixture
def recipe(checkout: Path) -> dict[str, dict]:
    """A whole recipe, every key of it, on built-in images."""
    return config.load(checkout / "recipes" / "moco_v2.yaml").values


def load(recipe: object, folder: Path) -> None:
    path = folder / "stranger.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config.load(path)


def test_no_key_but_use_imports_what_it_names(
    recipe: dict[str, dict], sprung: Path, tmp_path: Path
):
    keys = [(section, key) for section in recipe for key in recipe[section] if key != "use"]
    refused = 0
    for section, key in keys:
        changed = {**recipe, section: {**recipe[section], key: NAME}}
        try:
            load(changed, tmp_path)
        except RecipeError:
            refused += 1

    assert not sprung.exists()
    assert len(keys) > 60
    assert refused > len(keys) / 2

    with pytest.raises(RecipeError, match=f"{NAME} has no Options"):
        load({**recipe, "data": {**recipe["data"], "use": NAME}}, tmp_path)
    assert sprung.exists()  # the trap works


def test_only_the_sections_that_name_a_module_take_use(
    recipe: dict[str, dict], sprung: Path, tmp_path: Path
):
    path = tmp_path / "stranger.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for override in (f"{NAME}.use={NAME}", f"train.use={NAME}", f"probe.use={NAME}"):
        with pytest.raises(RecipeError, match="unknown"):
            config.load(path, [override])

    assert not sprung.exists()


@pytest.mark.parametrize(
    "written",
    [
        f"!!python/module:{NAME}",
        f"!!python/name:{NAME}.__name__",
        f"!!python/object/apply:importlib.import_module [{NAME}]",
        f"!!python/object/new:importlib.import_module [{NAME}]",
    ],
)
def test_python_s_tags_in_yaml_are_refused_and_run_nothing(
    written: str, recipe: dict[str, dict], sprung: Path, tmp_path: Path
):
    path = tmp_path / "stranger.yaml"
    text = yaml.safe_dump(recipe)
    path.write_text(text.replace("name: resnet10", f"name: {written}"), encoding="utf-8")

    with pytest.raises(RecipeError, match=r"stranger\.yaml: backbone\.name: "):
        config.load(path)
    assert written in path.read_text(encoding="utf-8")
    assert not sprung.exists()

    yaml.load(written, yaml.UnsafeLoader)
    assert sprung.exists()  # the trap works


def test_a_recipe_that_grows_when_read_is_refused(tmp_path: Path):
    path = tmp_path / "stranger.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    path.write_text("\n".join(lines), encoding="utf-8")

    with pytest.raises(RecipeError, match=r"line 2: \*a0: write the value itself"):
        config.load(path)
