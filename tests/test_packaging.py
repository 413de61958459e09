"""The wheel holds fastssl and nothing else, and the checkout runs without being installed."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BESIDE_THE_SOURCES = shutil.ignore_patterns(
    ".*", "runs", "build", "dist", "shared", "*.egg-info", "__pycache__"
)
WHERE = """
import runpy, sys
runpy.run_path(sys.argv[1])  # as a script, but for the last lines, which ask for __main__
print(sys.modules["fastssl.config"].__file__)
"""


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves build/ behind, and packs what it finds in an old one."""
    copy, out = tmp_path_factory.mktemp("build") / "fastssl", tmp_path_factory.mktemp("wheel")
    shutil.copytree(checkout, copy, ignore=BESIDE_THE_SOURCES)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", out, copy], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site_packages(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel's contents, as an installation lays them out."""
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_ships_the_library_and_its_licence_and_no_other_top_level_name(wheel, checkout):
    names = zipfile.ZipFile(wheel).namelist()
    information = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    modules = {str(path.relative_to(checkout)) for path in checkout.glob("fastssl/**/*.py")}

    assert {name.split("/")[0] for name in names} == {"fastssl", information}
    assert {name for name in names if name.endswith(".py")} == modules
    assert f"{information}/licenses/LICENSE" in names


def test_the_wheel_says_what_it_needs_and_that_it_is_not_for_upload(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    needs = {line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist", [])}
    names = {need.split(">")[0].split("<")[0].split("~")[0] for need in needs}

    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Private :: Do Not Upload" in metadata.get_all("Classifier", [])
    assert {"torch", "torchvision", "accelerate", "numpy", "pyyaml", "pydantic"} <= names
    assert {"nvidia-dali-cuda120", "pillow", "rich", "safetensors"} <= names


def test_an_installed_wheel_imports_from_another_folder(site_packages, environ, tmp_path):
    command = [sys.executable, "-c", "import fastssl; print(fastssl.__file__)"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environ | {"PYTHONPATH": str(site_packages)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )

    assert Path(done.stdout.strip()) == site_packages / "fastssl" / "__init__.py"


@pytest.mark.parametrize("installed", ["nothing", "wheel"])
def test_the_script_runs_the_code_beside_it_from_any_folder_whatever_is_installed(
    installed, site_packages, checkout, environ, tmp_path
):
    path = {"PYTHONPATH": str(site_packages)} if installed == "wheel" else {}
    script = checkout / "fastssl" / "train.py"
    done = subprocess.run(
        [sys.executable, "-c", WHERE, str(script)],
        cwd=tmp_path,
        env=environ | path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )

    assert Path(done.stdout.strip()) == checkout / "fastssl" / "config.py"
