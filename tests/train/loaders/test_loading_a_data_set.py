"""What `build.load` makes of a folder of images: without the bad ones, and only where it can be trained on."""

from pathlib import Path

import pytest
from PIL import Image

from rcl_fast.train import verify
from rcl_fast.train.config import config_of
from rcl_fast.train.errors import NotFound, UserError
from rcl_fast.train.loaders import build
from rcl_fast.train.options import Config


def folder(data: Path, images: dict[str, int]) -> Path:
    for place, count in images.items():
        (data / place).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, len(place), 0)).save(data / place / f"{number}.png")
    return data


def config(data: Path, *arguments: str) -> Config:
    return config_of(["--dataset", "folder", "--data", str(data), "--validation-fraction", "0.3", *arguments])


@pytest.mark.parametrize("validated", [True, False])
def test_bad_images_that_are_left_out_are_not_counted(tmp_path: Path, validated: bool) -> None:
    """Where validation is held out, those held out count among a class's images, and bad ones among them do not."""
    own = {"val/ash": 2, "val/oak": 2} if validated else {}
    data = folder(tmp_path, {"train/ash": 10, "train/oak": 5, "test/ash": 1, "test/oak": 1, **own})
    before = build.load(config(data))
    bad = [before.train.images[0], before.train.images[-1], before.validation.images[0]]
    for path in bad:
        Path(path).write_bytes(b"")
    assert verify.main(["--dataset", "folder", "--data", str(data), "--workers", "0"]) == 1

    after = build.load(config(data, "--on-bad-image", "skip"))

    assert before.published_counts.tolist() == [10, 5]
    assert after.published_counts.tolist() == [9 if validated else 8, 4]
    assert after.class_counts.tolist() == [count - 1 for count in before.class_counts]


def test_a_manifest_that_is_named_must_be_there(tmp_path: Path) -> None:
    data = folder(tmp_path, {"train/ash": 4, "train/oak": 4, "test/ash": 1, "test/oak": 1})
    with pytest.raises(NotFound, match=r"there is no manifest .*gone\.jsonl; this makes it"):
        build.load(config(data, "--manifest", str(tmp_path / "gone.jsonl")))


def test_a_manifest_without_some_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path, {"train/ash": 4, "train/oak": 4, "test/ash": 1, "test/oak": 1})
    assert verify.main(["--dataset", "folder", "--data", str(data), "--workers", "0"]) == 0
    Image.new("RGB", (8, 8)).save(data / "train/oak/new.png")
    build.load(config(data))
    assert (
        f"does not have 1 image, such as the image {data / 'train/oak/new.png'}; this makes it anew"
        in capsys.readouterr().out
    )


def test_one_class_is_nothing_to_classify(tmp_path: Path) -> None:
    data = folder(tmp_path, {"train/ash": 4, "test/ash": 1})
    with pytest.raises(UserError, match="there is one class, ash: a classifier needs two"):
        build.load(config(data))
