"""Lists of `path label` lines: encodings, absurd labels, and every bad line at once."""

import codecs
import os
from pathlib import Path

import pytest

from rcl_fast.train.data.datasets import load_splits
from rcl_fast.train.data.list_file import read_list
from rcl_fast.train.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "list.txt"


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("between", [b" ", b"\t", b"  "])
def test_what_editors_make_of_a_list(file: Path, start: bytes, end: bytes, between: bytes) -> None:
    lines = ["größe 3/ein bild.png".encode() + between + b"0", b"", b"b.png" + between + b"1"]
    file.write_bytes(start + end.join(lines))
    found = read_list(file)
    assert found.problems == []
    assert found.samples.images == [str(file.parent / "größe 3/ein bild.png"), str(file.parent / "b.png")]
    assert found.samples.labels.tolist() == [0, 1]
    assert found.samples.origins == ["list.txt, line 1", "list.txt, line 3"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(file: Path, encoding: str) -> None:
    file.write_text("a.png 0\n", encoding=encoding)
    assert read_list(file).problems == [f"{file} is UTF-16, or no text: save it as UTF-8"]


def test_a_path_that_is_no_utf_8_is_that_of_a_file_or_of_another_encoding(file: Path) -> None:
    file.write_bytes("a.png 0\ncafé.png 1\n".encode("latin-1"))
    assert read_list(file).problems == [
        f"{file}, line 2: it is not UTF-8, and there is no file {file.parent}/caf\\xe9.png: save the list as UTF-8"
    ]
    path = os.path.join(os.fsencode(file.parent), b"caf\xe9.png")
    Path(os.fsdecode(path)).touch()
    assert read_list(file).problems == []
    assert os.fsencode(read_list(file).samples.images[1]) == path


def test_a_comma_is_no_part_of_a_path(file: Path) -> None:
    file.write_text("a.png, 0\n")
    assert "expected `path label`" in read_list(file).problems[0]


@pytest.mark.parametrize("label", ["-1", "1.0", "x", "٣", "+1", "1e3", "0x1"])
def test_what_is_no_label(file: Path, label: str) -> None:
    file.write_text(f"a.png 0\nb.png {label}\n", encoding="utf-8")
    assert read_list(file).problems[0].startswith(f"{file}, line 2: expected `path label`")


@pytest.mark.parametrize("digits", [8, 18, 30, 5000])
def test_an_absurd_label_is_named_and_fills_no_memory(file: Path, digits: int) -> None:
    label = digits * "9"
    file.write_text(f"a.png 0\nb.png {label}\n")
    problem = read_list(file).problems[0]
    assert f"{file}, line 2: no data set has a class {label[:20]}" in problem
    assert len(problem) < len(str(file)) + 80


def test_bad_lines_are_named_up_to_five(file: Path) -> None:
    file.write_text("".join(f"{number}.png\n" for number in range(8)) + "a.png 0\n")
    problems = read_list(file).problems
    assert [problem.split(":")[0] for problem in problems] == [*(f"{file}, line {n}" for n in range(1, 6)), str(file)]
    assert problems[-1] == f"{file}: 3 more lines can't be read"


def test_the_problems_of_all_lists_come_together(tmp_path: Path) -> None:
    for part, text in {"train": "a/1.jpg 0\nb/1.jpg 3\n", "val": "a/2.jpg\n", "test": "a/3.jpg 7\na/4.jpg 8\n"}.items():
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text(text)
    with pytest.raises(UserError) as error:
        load_splits("imagenet_lt", tmp_path)
    assert str(error.value).splitlines() == [
        "imagenet_lt: these lists can't be trained on as they are:",
        f"  {tmp_path}/ImageNet_LT_val.txt, line 1: expected `path label`, the label a number from 0, found 'a/2.jpg'",
        f"  {tmp_path}/ImageNet_LT_train.txt, line 2 has the largest label, 3, but there is no image of 2 classes "
        "below: 1, 2. Labels count from 0 without gaps",
        f"  {tmp_path}/ImageNet_LT_test.txt, line 1: label 7 is not among the training set's, 0 to 3, nor are those of "
        "1 more line",
    ]


@pytest.mark.filterwarnings("ignore:these lists are not the published", "ignore:listed in")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a/1.jpg 0", r"listed more than once: 1 image: .*a/1.jpg \(ImageNet_LT_train.txt, line 3\)"),
        ("a/1.jpg 1", r"listed more than once: 1 image, 1 with another label: .*line 3"),
    ],
)
def test_an_image_that_is_listed_twice_is_told(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "ImageNet_LT_train.txt").write_text(f"a/1.jpg 0\nb/1.jpg 1\n{line}\n")
    for part in ("val", "test"):
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text("a/1.jpg 0\n")
    with pytest.warns(UserWarning, match=said):
        splits = load_splits("imagenet_lt", tmp_path)
    assert len(splits.train) == 3


@pytest.mark.filterwarnings("ignore:these lists are not the published")
def test_an_image_that_two_lists_have_is_told(tmp_path: Path) -> None:
    for part, path in {"train": "a/1.jpg", "val": "./a/2.jpg", "test": "a//2.jpg"}.items():
        (tmp_path / f"ImageNet_LT_{part}.txt").write_text(f"{path} 0\nb/{part}.jpg 1\n")
    (tmp_path / "ImageNet_LT_train.txt").write_text("a/1.jpg 0\nb/1.jpg 1\n")
    with pytest.warns(UserWarning, match=r"listed in validation and in test: 1 image: .*a/2.jpg"):
        load_splits("imagenet_lt", tmp_path, validate_on="test")
