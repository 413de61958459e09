"""`python -m fastssl.data`: commands, their options, and mistakes in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastssl import data
from tests.packing import files, folder_of_classes, pack, refused

RUN = [sys.executable, "-m", "fastssl.data"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_of_classes(tmp_path / "images")


# Mistakes


def test_a_store_that_is_there_is_left_alone(images, tmp_path, capsys):
    pack(images, tmp_path / "store")
    before = files(tmp_path / "store")
    capsys.readouterr()

    said = refused(capsys, "pack", images, tmp_path / "store")
    assert said == f"{tmp_path}/store is there already: remove it, or name another folder"
    assert files(tmp_path / "store") == before


def test_folders_that_do_not_do_are_named(images, tmp_path, capsys):
    assert refused(capsys, "pack", tmp_path / "none", tmp_path / "store") == (
        f"data.root: there is no folder {tmp_path}/none, only {tmp_path}"
    )
    assert refused(capsys, "pack", images, tmp_path / "a" / "b" / "store") == (
        f"{tmp_path}/a/b/store: there is no folder {tmp_path}/a/b: make it, or name another"
    )
    assert refused(capsys, "pack", images, images / "store") == (
        f"{images}/store lies in the source {images}: name a folder elsewhere"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quality", "101"], "--quality (101) must be in 1 ... 100"),
        (["--short-side", "4"], "--short-side (4) must be at least 8, or full"),
        (["--form", "jpeg", "--square", "40"], "--square is for --form raw"),
        (["--form", "original", "--quality", "90"], "--quality is not for --form original"),
        (["--form", "raw", "--quality", "90"], "--quality (90) is JPEG's: --form raw has none"),
        (["--short-side", "half"], "--short-side (half) must be a number of pixels, or full"),
        (["--workers", "0"], "--workers (0) must be at least 1"),
        (["--shard-mb", "0"], "--shard-mb (0) must be at least 1"),
        (["data.limits=3"], "data.limits: unknown key"),
        (["data.limit=0"], "limit (0) must be at least 1"),
        (["data.root=/a"], "data.root is SOURCE"),
        (["train.epochs=1"], "unknown section 'train'"),
    ],
)
def test_options_that_cannot_be_are_one_line(arguments, said, images, tmp_path, capsys):
    assert said in refused(capsys, "pack", images, tmp_path / "store", *arguments)
    assert not (tmp_path / "store").exists()


def test_a_folder_whose_name_yaml_would_read_otherwise_is_taken_as_it_is(images, tmp_path):
    odd = tmp_path / "it's: 1e4 #1"
    images.rename(odd)

    assert len(pack(odd, tmp_path / "store")) == 16


def test_object_stores_are_told_to_be_copied_first(images, tmp_path, capsys):
    for arguments in (
        ["pack", images, "s3://bucket/store"],
        ["pack", "s3://bucket/images", tmp_path / "store"],
        ["verify", "s3://bucket/store"],
        ["unpack", "s3://bucket/store", tmp_path / "folder"],
        ["index", "s3://bucket/tars"],
    ):
        said = refused(capsys, *arguments)
        assert said.startswith("s3://bucket/")
        assert "these commands work on folders" in said


@pytest.mark.parametrize("command", ["check", "pack", "verify", "unpack", "index"])
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        data.main([command, "--help"])

    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m fastssl.data {command} ")
    assert f"python -m fastssl.data {command} /" in said


def test_an_unknown_command_is_answered_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        data.main(["park"])

    assert ended.value.code == 2
    assert "'check', 'pack'" in capsys.readouterr().err


def test_packing_verifying_and_unpacking_are_as_the_help_says(images, tmp_path, checkout, environ):
    store, again = tmp_path / "store", tmp_path / "again"
    said = []
    for arguments in (
        ["pack", images, store, "--workers", "1"],
        ["verify", store],
        ["unpack", store, again],
    ):
        command = [*RUN, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=checkout, env=environ, check=True, capture_output=True, text=True
        )
        assert done.stderr == ""
        said.append(done.stdout)

    assert f"{store}: 16 images, as they were, " in said[0]
    assert said[0].endswith(f"read it with data.use=pipelines.readers.tar data.root={store}\n")
    assert said[1] == f"{store}: 16 images in 1 tar, all as they were packed\n"
    assert said[2] == f"{again}: 16 images, as {store} has them\n"
    assert files(again) == files(images)


def test_no_command_imports_torch_which_every_worker_would_load(checkout, environ):
    ask = "import sys, fastssl.data; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", ask], cwd=checkout, env=environ, check=True)
