"""bench/pack.py: what it unpacks is what it packed, bit for bit, and what is damaged is refused by name."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from bench import pack as script
from rcl_fast.train.data.cifar import CIFARS, Cifar
from rcl_fast.train.data.datasets import load_splits

BENCH = Path(__file__).parents[2] / "bench"
NAMES = ["ape", "bee", "große Katze"]
COUNTS = (120, 12, 1)  # more than a sheet holds, and not as many as two do


@pytest.fixture
def pack(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with a CIFAR-100 of 3 classes of 120 images."""
    monkeypatch.setitem(CIFARS, "cifar100_lt", Cifar(CIFARS["cifar100_lt"].torchvision, 3, COUNTS[0]))
    return script


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 120 images of noise of each class, in mixed order."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(3), COUNTS[0]))
    np.savez(
        folder / "cifar100_lt.npz",
        train=random.integers(0, 256, (len(labels), 32, 32, 3), np.uint8),
        train_labels=labels,
        test=random.integers(0, 256, (6, 32, 32, 3), np.uint8),
        test_labels=np.array([2, 1, 0, 0, 1, 2]),
        class_names=np.array(NAMES),
    )
    return folder


@pytest.fixture
def packed(pack: ModuleType, source: Path, tmp_path: Path) -> Path:
    """That set at an imbalance of 100, packed once."""
    if not (source / "out.tar").exists():
        pack.main(["pack", "--data", str(source), "--imbalance", "100", str(source / "out.tar")])
    return Path(shutil.copy(source / "out.tar", tmp_path))


def members(packed: Path) -> dict[str, bytes]:
    with tarfile.open(packed) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def rewritten(packed: Path, **changed: bytes) -> Path:
    """The tar with members changed, by the file's name without its ending."""
    content = {name: changed.get(Path(name).stem, data) for name, data in members(packed).items()}
    with tarfile.open(packed, "w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed


def refusal(pack: ModuleType, packed: Path) -> str:
    """Why it is refused; nothing was written."""
    with pytest.raises(SystemExit) as error:
        pack.main(["unpack", str(packed), str(packed.parent / "new")])
    assert not list(packed.parent.glob("new/*"))
    assert str(packed) in str(error.value)
    return str(error.value)


def test_the_round_trip_is_exact(
    pack: ModuleType, source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack.main(["unpack", str(packed), str(tmp_path / "there")])
    assert "train 133 + test 6 images" in capsys.readouterr().out
    for options in ({"imbalance": 100}, {"imbalance": 120, "validate_on": "test"}):
        one, other = (load_splits("cifar100_lt", folder, **options) for folder in (source, tmp_path / "there"))
        for part in ("train", "validation", "test"):
            for of in ("images", "labels"):
                assert np.array_equal(getattr(getattr(one, part), of), getattr(getattr(other, part), of))
        assert one.class_names == other.class_names == NAMES
        assert one.published_counts.tolist() == other.published_counts.tolist()
    assert load_splits("cifar100_lt", tmp_path / "there", imbalance=100).published_counts.tolist() == list(COUNTS)
    with pytest.raises(ValueError, match="too few training images"):
        load_splits("cifar100_lt", tmp_path / "there", imbalance=20)


def test_what_was_unpacked_packs_to_the_same_bytes(pack: ModuleType, packed: Path, tmp_path: Path) -> None:
    pack.main(["unpack", str(packed), str(tmp_path / "there")])
    pack.main(["pack", "--data", str(tmp_path / "there"), "--imbalance", "100", str(tmp_path / "again.tar")])
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()


def test_pixels_survive_where_an_encoder_would_like_to_change_them(pack: ModuleType) -> None:
    """One shade, gradients, and noise that no predictor helps with."""
    ramp = np.arange(32, dtype=np.uint8)[:, None, None] * np.array([1, 3, 7], np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    images = np.stack([np.full((32, 32, 3), 255, np.uint8), ramp.repeat(32, 1), noise])
    assert np.array_equal(pack.decode("sheet", pack.encode(images))[:3], images)


def test_the_index_tells_people_what_is_packed(packed: Path) -> None:
    index = json.loads(members(packed)["index.json"])
    assert index["dataset"] == "cifar100_lt"
    assert index["imbalance"] == 100
    assert index["counts"] == {"train": list(COUNTS), "test": [2, 2, 2]}
    assert index["class_names"] == NAMES


def test_the_same_data_sets_as_the_trainers(pack: ModuleType) -> None:
    assert set(pack.DATASETS) == set(CIFARS)


class TestRefused:
    def test_a_sheet_that_is_no_webp(self, pack: ModuleType, packed: Path) -> None:
        assert "train/0001.webp is damaged" in refusal(pack, rewritten(packed, **{"0001": b"RIFF and no more"}))

    def test_a_sheet_cut_short(self, pack: ModuleType, packed: Path) -> None:
        cut = members(packed)["train/0001.webp"][:-500]
        assert "train/0001.webp is damaged" in refusal(pack, rewritten(packed, **{"0001": cut}))

    def test_a_sheet_of_another_size(self, pack: ModuleType, packed: Path) -> None:
        content = io.BytesIO()
        Image.new("RGB", (64, 32)).save(content, "WEBP", lossless=True)
        message = refusal(pack, rewritten(packed, **{"0001": content.getvalue()}))
        assert "train/0001.webp is damaged" in message
        assert "64x32 pixels" in message

    def test_other_pixels(self, pack: ModuleType, packed: Path) -> None:
        other = pack.encode(np.zeros((1, 32, 32, 3), np.uint8))
        message = refusal(pack, rewritten(packed, **{"0001": other}))
        assert "the sha256 differs of: train." in message

    @pytest.mark.parametrize(
        ("before", "after", "name"),
        [
            (b'"test_labels": [2', b'"test_labels": [1', "test_labels"),
            (b'"class_names": ["ape', b'"class_names": ["axe', "class_names"),
        ],
    )
    def test_other_labels_and_names(
        self, pack: ModuleType, packed: Path, before: bytes, after: bytes, name: str
    ) -> None:
        index = members(packed)["index.json"]
        assert before in index
        assert f"the sha256 differs of: {name}." in refusal(pack, rewritten(packed, index=index.replace(before, after)))

    @pytest.mark.parametrize(
        "index", [b"", b"[]", b"{", b"\xff", b'{"format": "rcl_fast sheets 1"}', b'{"format": "2"}']
    )
    def test_a_damaged_index(self, pack: ModuleType, packed: Path, index: bytes) -> None:
        assert "its index.json can't be read" in refusal(pack, rewritten(packed, index=index))

    @pytest.mark.parametrize("name", ["../cifar100_lt", "digits_lt"])
    def test_another_data_set(self, pack: ModuleType, packed: Path, name: str) -> None:
        index = json.loads(members(packed)["index.json"]) | {"dataset": name}
        assert repr(name) in refusal(pack, rewritten(packed, index=json.dumps(index).encode()))

    def test_an_incomplete_tar(self, pack: ModuleType, packed: Path) -> None:
        """Cut anywhere: what is missing is named, or that the tar is none of ours."""
        whole = packed.read_bytes()
        with tarfile.open(packed) as archive:
            index, *sheets = archive.getmembers()
        for keep, expected in [
            (0, "no uncompressed tar file made by bench/pack.py, or is cut short"),
            (300, "no uncompressed tar file made by bench/pack.py, or is cut short"),
            (index.offset_data + 10, "no uncompressed tar file made by bench/pack.py, or is cut short"),
            (sheets[0].offset, "3 sheets are missing, the first is train/0000.webp"),
            (sheets[1].offset + 100, "2 sheets are missing, the first is train/0001.webp"),
            (sheets[1].offset_data + 512, "2 sheets are missing, the first is train/0001.webp"),
            (sheets[2].offset_data + 1, "1 sheets are missing, the first is test/0000.webp"),
        ]:
            packed.write_bytes(whole[:keep])
            assert expected in refusal(pack, packed)

    @pytest.mark.parametrize("mode", ["w", "w:gz", None])
    def test_files_of_others(self, pack: ModuleType, tmp_path: Path, mode: Literal["w", "w:gz"] | None) -> None:
        other = tmp_path / "other.tar"
        other.write_bytes(b"no tar at all" * 100)
        if mode:
            with tarfile.open(other, mode) as archive:
                archive.add(__file__, "pack.py")
        assert "no uncompressed tar file made by bench/pack.py" in refusal(pack, other)

    def test_no_file(self, pack: ModuleType, tmp_path: Path) -> None:
        assert "gone.tar" in refusal(pack, tmp_path / "gone.tar")

    def test_data_that_is_not_there(self, pack: ModuleType, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"cifar100_lt\.npz"):
            pack.main(["pack", "--data", str(tmp_path), str(tmp_path / "out.tar")])
        assert not list(tmp_path.iterdir())


WITHOUT_THE_TRAINER = """
import sys
for name in ("rcl_fast", "torch", "torchvision", "rich", "tyro"):
    sys.modules[name] = None  # importing it raises ImportError
sys.path.insert(0, sys.argv[1])
import pack
pack.main(["unpack", *sys.argv[2:]])
"""


def test_unpacking_needs_numpy_and_pillow_alone(packed: Path) -> None:
    arguments = [str(BENCH), str(packed), str(packed.parent / "there")]
    subprocess.run([sys.executable, "-c", WITHOUT_THE_TRAINER, *arguments], check=True, timeout=1200)
    with np.load(packed.parent / "there" / "cifar100_lt.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["class_names", "test", "test_labels", "train", "train_labels"]


def test_help_says_how(pack: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["pack", "--help"], ["unpack", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            pack.main(arguments)
        assert "DIR" in capsys.readouterr().out
