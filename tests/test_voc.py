"""VOC's layout: found wherever VOCdevkit is, labels and boxes read as written, mistakes named."""

import os

import numpy as np
import pytest

from fastssl import voc


@pytest.fixture
def devkit(tmp_path):
    """VOCdevkit with three images, two classes and one annotation."""
    root = tmp_path / "VOCdevkit"
    main = root / "VOC2007" / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "trainval.txt").write_text("000005\n000007\n000009\n")
    (main / "cat_trainval.txt").write_text("000005 -1\n000007  1\n000009  0\n")
    (main / "boat_trainval.txt").write_text("000009  1\n000007 -1\n000005 -1\n")  # another order
    (main / "cat_val.txt").write_text("000007  1\n")  # of another split
    annotations = root / "VOC2007" / "Annotations"
    annotations.mkdir()
    (annotations / "000005.xml").write_text(
        "<annotation><size><width>90</width></size>"
        "<object><name>cat</name><difficult>0</difficult><part><name>head</name><bndbox><xmin>2"
        "</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
        "<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>"
        "<object><name>boat</name><difficult>1</difficult>"
        "<bndbox><xmin>7</xmin><ymin>8</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
        "</annotation>"
    )
    return root


def test_labels_are_those_of_the_files_in_the_splits_order(devkit):
    stems, labels, classes = voc.classification(devkit, "2007", "trainval")

    assert stems == ["000005", "000007", "000009"]
    assert classes == ("boat", "cat")
    assert labels.dtype == np.int8
    assert labels.tolist() == [[-1, -1], [-1, 1], [1, 0]]


def test_the_root_may_be_the_devkit_the_folder_above_or_the_year(devkit):
    wanted = devkit / "VOC2007"

    for root in (devkit, devkit.parent, wanted, devkit / "VOC2012"):
        (devkit / "VOC2012").mkdir(exist_ok=True)
        assert voc.folder(root, "2007") == wanted
    plain = devkit.parent / "mine"
    os.rename(wanted, plain)
    assert voc.folder(plain, "2007") == plain
    assert voc.image_path(plain, "2007", "a") == plain / "JPEGImages" / "a.jpg"


def test_boxes_are_the_objects_own_and_not_those_of_their_parts(devkit):
    found = voc.objects(devkit, "2007", "000005")

    assert found == [("cat", 1, 2.5, 30, 40, False), ("boat", 7, 8, 9, 8, True)]


def test_an_annotation_that_declares_entities_is_not_read(devkit):
    path = devkit / "VOC2007" / "Annotations" / "000005.xml"
    bomb = '<!DOCTYPE a [<!ENTITY x "xxxx"><!ENTITY y "&x;&x;&x;&x;">]><annotation>&y;</annotation>'

    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(bomb.encode(encoding))
        with pytest.raises(ValueError, match=r"000005\.xml declares a document type"):
            voc.objects(devkit, "2007", "000005")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<annotation>", "is no whole XML"),
        ("<a><object><name>cat</name></object></a>", r"object 1 \(cat\) has no whole box"),
        (
            "<a><object><name>cat</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>2</xmax>"
            "<ymax>3</ymax></bndbox></object></a>",
            "x 9 to 2, y 1 to 3",
        ),
        (
            "<a><object><name>cat</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>2</xmax>"
            "<ymax>3</ymax></bndbox></object></a>",
            "can't be",
        ),
    ],
)
def test_a_broken_annotation_is_named(devkit, content, said):
    (devkit / "VOC2007" / "Annotations" / "000005.xml").write_text(content)

    with pytest.raises(ValueError, match=rf"000005\.xml.*{said}"):
        voc.objects(devkit, "2007", "000005")


def test_a_missing_annotation_is_named(devkit):
    with pytest.raises(ValueError, match=r"no annotation .*000007\.xml"):
        voc.objects(devkit, "2007", "000007")


def test_what_was_looked_for_and_where_is_said(devkit, tmp_path):
    with pytest.raises(ValueError, match=r"looked for .*VOC2012.*VOCdevkit/VOC2012"):
        voc.folder(devkit, "2012")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; VOC2007"):
        voc.folder(tmp_path / "nowhere", "2007")
    with pytest.raises(
        ValueError, match=r"no split test: looked for .*test\.txt; there are trainval"
    ):
        voc.names(devkit, "2007", "test")
    with pytest.raises(ValueError, match="four digits"):
        voc.folder(devkit, "07")
    (devkit / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("000001\n")
    with pytest.raises(ValueError, match=r"no class is labelled for test.*<class>_test\.txt"):
        voc.classification(devkit, "2007", "test")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("cat_trainval.txt", "000005 -1\n000007 2\n", r"cat_trainval\.txt, line 2.*'000007 2'"),
        ("cat_trainval.txt", "000005 -1\n", "no label for 000007, 000009, which trainval"),
        ("trainval.txt", "000005\n000005\n", "lists 000005 twice"),
        ("trainval.txt", "\n", "lists no image"),
        ("trainval.txt", "../x\n", "no name of an image"),
    ],
)
def test_a_broken_list_is_named(devkit, file, content, said):
    (devkit / "VOC2007" / "ImageSets" / "Main" / file).write_text(content)

    with pytest.raises(ValueError, match=said):
        voc.classification(devkit, "2007", "trainval")
