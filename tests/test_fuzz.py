"""A thousand damaged images and a thousand recipes: a named error, a skipped image, or none.

The images go through the reader and the loader in a process of their own, so that a decoder that
crashes or hangs fails the test and not the test run; so do recipes that training starts with.
"""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastssl import config

IMAGES, RECIPES, STARTS = 1000, 1000, 40
GOOD = 48
HANGS = 300  # seconds a process: each takes a tenth

# Runs an epoch of a real graph over a folder; says which images came and which were left out.
EPOCH = """
import json, sys
import numpy as np, torch
from fastssl.loader import Loader, Options
from pipelines import rotation
from pipelines.readers import folder

samples = folder.list_samples(folder.Options(root=sys.argv[1]), cache=None, say=lambda line: None)
batch = 16
steps = -(-len(samples.usable) // batch)
rows = np.resize(samples.usable, (steps, batch))
options = rotation.Options(image_size=32)
loader = Loader(folder, samples, rotation, options, lambda step: rows[step % steps], batch=batch,
    seed=0, device=torch.device("cpu"), loading=Options(threads=2), say=lambda line: None)
came = set()
for _ in range(steps):
    tensors = next(loader)
    assert tensors["index"].shape == (batch,)
    came |= set(tensors["index"].tolist())
names = [samples.names[row].decode() for row in range(len(samples))]
print(json.dumps({
    "came": [names[row] for row in sorted(came)],
    "listing": {names[row]: reason for row, reason in samples.bad.items()},
    "loader": {names[row]: reason for row, reason in loader.skipped.items()},
}))
"""


def encoded() -> list[bytes]:
    """One real image in every format, with and without Exif, progressive, with a palette."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    forms: list[tuple[Image.Image, str, dict]] = [
        (image, "JPEG", {"quality": 85}),
        (image, "JPEG", {"quality": 60, "progressive": True}),
        (image, "JPEG", {"quality": 85, "exif": turned.tobytes()}),
        (image.convert("L"), "JPEG", {}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {}),
        (image.convert("P"), "PNG", {}),
        (image.convert("RGBA"), "PNG", {}),
        (image, "WEBP", {"quality": 80}),
        (image, "WEBP", {"lossless": True}),
        (image, "BMP", {}),
        (image, "TIFF", {}),
        (image, "TIFF", {"compression": "tiff_lzw"}),
    ]
    files = []
    for picture, form, keys in forms:
        file = io.BytesIO()
        picture.save(file, form, **keys)
        files.append(file.getvalue())
    return files


def mutated(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """One to three things that disks, networks and programs do to a file."""
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        if not damaged:
            break
        # headers are a small part of a file and hold all that leads astray
        reach = min(len(damaged), draw.choice((32, 200, 700, len(damaged))))
        at = draw.randrange(reach)
        length = draw.choice((1, 2, 4, 16, 256))
        match draw.randrange(8):
            case 0:
                damaged[at] ^= 1 << draw.randrange(8)
            case 1:
                del damaged[draw.randrange(len(damaged)) :]
            case 2:
                damaged[at : at + length] = bytes(min(length, len(damaged) - at))
            case 3:
                damaged[at : at + length] = draw.randbytes(min(length, len(damaged) - at))
            case 4:
                damaged[at:at] = draw.randbytes(length)
            case 5:
                del damaged[at : at + length]
            case 6:  # sizes and lengths at their ends
                extreme = draw.choice((0, 1, 0x7FFF, 0x8000, 0xFFFF)).to_bytes(2, "big")
                damaged[at : at + 2] = extreme
            case _:
                other = draw.choice(others)
                damaged[at:] = other[draw.randrange(len(other)) :]
    return bytes(damaged)


def python(
    program: str, folder: str, *, checkout: Path, environ: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs it on the folder in a process of its own, which is ended where it hangs."""
    return subprocess.run(
        [sys.executable, "-c", program, folder],
        cwd=checkout,
        env=environ,
        capture_output=True,
        text=True,
        errors="replace",  # decoders quote the files' bytes
        timeout=HANGS,
    )


def test_a_thousand_damaged_images_are_seen_or_skipped_and_the_good_ones_seen(
    tmp_path: Path, checkout: Path, environ: dict[str, str]
):
    draw = random.Random(7)
    files = encoded()
    for number in range(IMAGES):
        content = mutated(draw.choice(files), files, draw)
        (tmp_path / f"damaged-{number:04d}").write_bytes(content)
    for number in range(GOOD):
        (tmp_path / f"good-{number:04d}").write_bytes(files[number % len(files)])
    done = python(EPOCH, str(tmp_path), checkout=checkout, environ=environ)

    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    left_out = found["listing"] | found["loader"]
    everything = {path.name for path in tmp_path.iterdir()}
    assert set(found["came"]) | set(left_out) == everything
    assert not set(found["came"]) & set(left_out)
    assert {f"good-{number:04d}" for number in range(GOOD)} <= set(found["came"])
    assert all(reason.strip() and "\n" not in reason for reason in left_out.values())
    assert len(found["listing"]) > IMAGES / 10
    assert len(found["loader"]) > IMAGES / 50
    assert len(found["came"]) > GOOD + IMAGES / 10


STRANGE = (
    *(None, True, False, 0, -1, 1, 2**31, 2**70, 0.0, -0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), "", " ", "1e-4", "auto", "null", "..", "/", "s3://bucket/key"),
    *("os", "os.path", "fastssl.train", "pipelines.rotation", "a" * 3000, "\u00e9\u4e2d", "a\nb"),
    *([], [[]], {}, [1, 2, 3], [-1, 0.5], {"a": {"b": 1}}, "2024-13-01", "0o17", "1:30"),
)


def mutate(recipe: dict, draw: random.Random) -> str:
    """A recipe with one to three of its keys damaged, as text; some of the text damaged as well."""
    recipe = json.loads(json.dumps(recipe))
    for _ in range(draw.randint(1, 3)):
        section = draw.choice([name for name in recipe if isinstance(recipe[name], dict)])
        keys = recipe[section]
        key = draw.choice(list(keys) or ["nothing"])
        match draw.randrange(7):
            case 0:
                keys[key] = draw.choice(STRANGE)
            case 1:
                keys.pop(key, None)
            case 2:  # a letter more, less or another
                keys[key[: draw.randrange(len(key))] + draw.choice("xyz_")] = keys.get(key)
            case 3:
                other = draw.choice(list(recipe))
                if isinstance(recipe[other], dict):
                    keys[key] = draw.choice(list(recipe[other].values()) or [None])
            case 4:
                recipe[draw.choice((section + "s", key, "demo"))] = recipe.pop(section)
            case 5:
                recipe[section] = draw.choice(STRANGE)
                if not any(isinstance(value, dict) for value in recipe.values()):
                    break
            case _:
                value = keys.get(key)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    keys[key] = value * draw.choice((-1, 0, 0.5, 10, 1e6, 1e12))
                else:
                    keys[key] = [value, value]
    text = yaml.safe_dump(recipe, sort_keys=draw.random() < 0.5)
    if draw.random() < 0.3:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(("\t", ":", "- ", "&a ", "*a", "!!python/name:os ", "\x07"))
        text += draw.choice(("", "\n", "'", "{", recipe.__repr__()))
    return text


@pytest.fixture
def recipes(checkout: Path) -> list[dict]:
    """All recipes of the checkout, as plain values."""
    found = sorted((checkout / "recipes").glob("*.yaml"))
    assert len(found) > 10
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in found]


# Loads every recipe of a folder; says what was said of those that are wrong.
LOAD = """
import json, pathlib, sys
from fastssl import config

said = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.yaml")):
    try:
        config.load(path)
    except config.RecipeError as error:
        said[str(path)] = str(error)
print(json.dumps(said))
"""


def test_a_thousand_damaged_recipes_end_in_a_recipe_error_or_load(
    recipes: list[dict], tmp_path: Path, checkout: Path, environ: dict[str, str]
):
    draw = random.Random(11)
    for number in range(RECIPES):
        text = mutate(draw.choice(recipes), draw)
        (tmp_path / f"damaged-{number:04d}.yaml").write_text(text, encoding="utf-8")
    done = python(LOAD, str(tmp_path), checkout=checkout, environ=environ)

    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-3000:]}"
    said = json.loads(done.stdout.splitlines()[-1])
    assert RECIPES / 3 < len(said) < RECIPES
    assert all(said[path].startswith(path) and len(said[path]) < 20_000 for path in said)


# Trains by every recipe of a folder for a step; says how each ended and what it told.
START = """
import contextlib, io, json, pathlib, sys
from fastssl import train

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.yaml")):
    print(path.name, file=sys.stderr)
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        code = train.main([str(path), "train.steps=1", f"train.out={path.with_suffix('')}"])
    print(json.dumps([path.name, code, told.getvalue()]))
"""
STARTED = ("pirl_jigsaw", "npid", "moco_v2", "rotation", "jigsaw", "exemplar", "colorization")
CHEAP = (
    *("train.batch=8", "train.log_steps=1", "data.limit=24", "probe.every_epochs=0"),
    *("backbone.use=tests.tiny_backbone", "optim.layer_decay=1.0", "loader.threads=1"),
)


def nudge(values: dict[str, dict], draw: random.Random) -> str:
    """One or two keys of a whole recipe set to what their types allow, mostly; which, in lines."""
    keys = [
        (section, key)
        for section in ("pipeline", "objective", "optim", "train", "loader", "data")
        for key, value in values[section].items()
        if key not in ("use", "weights", "out")  # other modules and other folders
        and (not isinstance(value, str) or draw.random() < 0.2)  # words are refused at once
    ]
    done = []
    for section, key in draw.sample(keys, draw.randint(1, 2)):
        old = values[section][key]
        if isinstance(old, bool):
            others = [not old]
        elif isinstance(old, int):
            others = [0, 1, 2, 3, -1, old * 2, old // 2, old + 1, old + 7, 10**12, 10**24]
        elif isinstance(old, float):
            others = [0.0, 0.5, 1.0, -old, old * 2, old / 2, 1e-12, 1e-300, 1e12, 3e38, 1e300]
        elif isinstance(old, list):
            others = [[], old[:1], old * 2, old[::-1], [0] * len(old), [each / 2 for each in old]]
        else:
            others = [*STRANGE]
        values[section][key] = draw.choice([each for each in others if each != old] or [[0]])
        done.append(f"# {section}.{key}: {old!r} -> {str(values[section][key])[:60]!r}")
    return "\n".join(done)


def test_training_by_damaged_recipes_ends_in_a_step_or_an_error_in_a_line(
    tmp_path: Path, checkout: Path, environ: dict[str, str], demo_images: Path
):
    draw = random.Random(7)
    for number in range(STARTS):
        name = STARTED[number % len(STARTED)]
        whole = config.load(checkout / "recipes" / f"{name}.yaml", CHEAP).values
        values = json.loads(json.dumps(whole))
        values["data"]["root"] = str(demo_images / "val")  # beside which nothing is to probe on
        values["probe"]["root"] = None
        text = f"{nudge(values, draw)}\n{yaml.safe_dump(values)}"
        (tmp_path / f"{number:02d}-{name}.yaml").write_text(text, encoding="utf-8")
    done = python(START, str(tmp_path), checkout=checkout, environ=environ)

    # a traceback out of train.main ends the process; the recipe's name is the last before it
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-3000:]}"
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == STARTS
    for name, code, told in ends:
        assert code in (0, 1, 2), f"{name}: {code}"
        assert "Traceback" not in told, f"{name}: {told}"
        assert code == 0 or any(line.startswith("error") for line in told.splitlines()), name
    codes = [code for _, code, _ in ends]
    assert codes.count(0) >= STARTS / 5
    assert codes.count(2) >= STARTS / 3
