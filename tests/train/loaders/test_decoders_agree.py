"""One decoder's truth: what verify.py calls good, each loader decodes, to the same pixels; what is bad, none."""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from bad_files import BAD, GOOD, SIZE, write_odd_files

from rcl_fast.train.data.manifest import Entry
from rcl_fast.train.data.samples import Samples, open_image
from rcl_fast.train.data.scan import scan_file
from rcl_fast.train.loaders.base import Loader, StateMismatch, evaluation_spec, read_loader_state, training_spec
from rcl_fast.train.loaders.build import make_loader
from rcl_fast.train.options import LoaderName, ViewKind, ViewOptions

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.Image")  # as decode.py does, which pytest undoes

OPTIONS = ViewOptions(
    image_size=max(SIZE),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.25),
    x1="crop_flip",
    x2="sim",
    x3="sim",
    evaluation="resize_center_crop",
    resize=min(SIZE),  # so that evaluation shows the whole image as it is, between two black bars
)
LOADERS: tuple[LoaderName, ...] = ("torchvision", "dali")
PICTURE = Image.fromarray(
    np.asarray(Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)).resize(SIZE))
)
GRAY = PICTURE.convert("L")
MASK = Image.fromarray(np.random.default_rng(2).integers(0, 256, SIZE[::-1], np.uint8))
WITH_ALPHA = Image.merge("RGBA", (*PICTURE.split(), MASK))
PALETTE = PICTURE.quantize(16)
TURNED = Image.Exif()
TURNED[0x112] = 6  # "turn me by 90 degrees"


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.copy().save(content, kind, **options)  # an image remembers how it was saved
    return content.getvalue()


def of_16_bits() -> bytes:
    """A PNG in colour, which Pillow reads and doesn't write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = np.random.default_rng(3).integers(0, 65536, (SIZE[1], 3 * SIZE[0])).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated(kind: str, **options: object) -> bytes:
    return saved(PICTURE, kind, save_all=True, append_images=[GRAY.convert("RGB"), PALETTE.convert("RGB")], **options)


def ycck(cmyk: bytes) -> bytes:
    """The JPEG with Adobe's word that its four channels are YCCK."""
    content = bytearray(cmyk)
    content[content.find(b"Adobe") + 11] = 2
    return bytes(content)


FILES: dict[str, bytes] = {
    **{f"{quality}.jpg": saved(PICTURE, "jpeg", quality=quality) for quality in (1, 75, 95)},
    **{f"{4 - name}:{name}.jpg": saved(PICTURE, "jpeg", subsampling=name) for name in (0, 1, 2)},
    "progressive.jpg": saved(PICTURE, "jpeg", progressive=True),
    "gray.jpg": saved(GRAY, "jpeg"),
    "turned.jpg": saved(PICTURE, "jpeg", exif=TURNED),
    "rgb inside.jpg": saved(PICTURE, "jpeg", keep_rgb=True),
    "cmyk.jpg": saved(PICTURE.convert("CMYK"), "jpeg"),
    "ycck.jpg": ycck(saved(PICTURE.convert("CMYK"), "jpeg")),
    "several.jpg": animated("mpo"),
    "of a column.jpg": saved(PICTURE.crop((0, 0, 1, 32)), "jpeg"),
    "plain.png": saved(PICTURE, "png"),
    "gray.png": saved(GRAY, "png"),
    "turned.png": saved(PICTURE, "png", exif=TURNED),
    "alpha.png": saved(WITH_ALPHA, "png"),
    "gray alpha.png": saved(WITH_ALPHA.convert("LA"), "png"),
    "palette.png": saved(PALETTE, "png"),
    "palette with alpha.png": saved(PALETTE, "png", transparency=bytes(range(0, 256, 16))),
    "transparent colour.png": saved(PICTURE, "png", transparency=PICTURE.getpixel((0, 0))),
    "black and white.png": saved(GRAY.convert("1"), "png"),
    "16 bits.png": saved(Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257 + 100), "png"),
    "animated.png": animated("png", default_image=True),
    "16 bits in colour.png": of_16_bits(),
    "without an end.png": saved(PICTURE, "png")[:-12],
    "of a pixel.png": saved(PICTURE.crop((0, 0, 1, 1)), "png"),
    "100 wide.png": saved(PICTURE.resize((100, 1)), "png"),
    "gif inside.jpg": saved(PALETTE, "gif"),
    "animated.gif": animated("gif"),
    "animated.webp": animated("webp", lossless=True),
    "lossy.webp": saved(PICTURE, "webp"),
    "lossless.webp": saved(PICTURE, "webp", lossless=True),
    "alpha.webp": saved(WITH_ALPHA, "webp", lossless=True),
    "turned.webp": saved(PICTURE, "webp", lossless=True, exif=TURNED),
    "webp inside.jpg": saved(PICTURE, "webp", exif=TURNED),
    "plain.bmp": saved(PICTURE, "bmp"),
    "palette.bmp": saved(PALETTE, "bmp"),
    "plain.ppm": saved(PICTURE, "ppm"),
    "100 levels.ppm": b"P6 48 32 100\n" + (np.asarray(PICTURE) // 3).tobytes(),
    **{f"turned by {way}.tiff": saved(PICTURE, "tiff", tiffinfo={274: way}) for way in range(1, 9)},
    "lzw.tiff": saved(PICTURE, "tiff", compression="tiff_lzw"),
    "turned lzw.tiff": saved(PICTURE, "tiff", compression="tiff_lzw", tiffinfo={274: 6}),
    "pages.tiff": animated("tiff"),
    "16 bits.tiff": saved(Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 257 + 100), "tiff"),
    "palette.tiff": saved(PALETTE, "tiff"),
    "gray alpha.tiff": saved(WITH_ALPHA.convert("LA"), "tiff"),
    "cmyk.tiff": saved(PICTURE.convert("CMYK"), "tiff"),
    "black and white.tiff": saved(GRAY.convert("1"), "tiff"),
    "plain.tga": saved(PICTURE, "tga"),
}
REFUSED = {
    "long.png": (saved(PICTURE.resize((101, 1)), "png"), r"it has 101x1 pixels, one side over 100 times the other"),
    "high.jpg": (saved(PICTURE.resize((2, 20_000)), "jpeg"), r"it has 2x20000 pixels, one side over 100 times"),
    "long.bmp": (saved(PALETTE.resize((20_000, 2)), "bmp"), r"it has 20000x2 pixels, one side over 100 times"),
    "float.tiff": (saved(GRAY.convert("F"), "tiff"), "pixels of 32 bits (mode F) have no agreed range"),
    "32 bits.tiff": (saved(GRAY.convert("I"), "tiff"), "pixels of 32 bits (mode I) have no agreed range"),
    "half.gif": (saved(PALETTE, "gif")[:-400], "OSError: image file is truncated"),
}


def evaluation(name: LoaderName, paths: list[str], said: list[str], batch_size: int = 8) -> Loader:
    samples = Samples(paths, np.zeros(len(paths), np.int64))
    spec = evaluation_spec(samples, OPTIONS, batch_size=batch_size, on_bad=lambda error: said.append(str(error)))
    return make_loader(name, spec, device=torch.device("cpu"), workers=0)


def training(name: LoaderName, paths: list[str], kinds: tuple[ViewKind, ...], said: list[str]) -> Loader:
    samples = Samples(paths, np.zeros(len(paths), np.int64))
    spec = training_spec(
        samples, kinds, OPTIONS, seed=0, batch_size=8, drop_last=False, on_bad=lambda error: said.append(str(error))
    )
    return make_loader(name, spec, device=torch.device("cpu"), workers=0)


def views(loader: Loader) -> dict[int, torch.Tensor]:
    """View x1 of every image, in 255ths, by index."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (OPTIONS.mean, OPTIONS.std))
    found = {}
    for batch in loader.epoch(0):
        for index, view in zip(batch.indices.tolist(), batch.views[0], strict=True):
            found[index] = 255 * (view * std + mean)
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in FILES]


@pytest.fixture(scope="module")
def evaluated(paths: list[str]) -> dict[LoaderName, dict[int, torch.Tensor]]:
    said: list[str] = []
    found = {name: views(evaluation(name, paths, said)) for name in LOADERS}
    assert said == []
    return found


def apart(file: str) -> float:
    """How many levels a JPEG's or a resized image's pixels may be apart; others are the same."""
    return 1.01 if file.endswith(".jpg") or file in ("of a pixel.png", "100 wide.png") else 0.01


@pytest.mark.parametrize(("index", "file"), list(enumerate(FILES)), ids=list(FILES))
def test_dali_shows_what_torchvision_shows(
    index: int, file: str, evaluated: dict[LoaderName, dict[int, torch.Tensor]]
) -> None:
    dali, torchvision = evaluated["dali"][index], evaluated["torchvision"][index]
    assert float((dali - torchvision).abs().max()) <= apart(file)


def test_a_tiff_is_turned_and_nothing_else(
    paths: list[str], evaluated: dict[LoaderName, dict[int, torch.Tensor]]
) -> None:
    """By both loaders, and in the manifest."""
    for name in LOADERS:
        plain = evaluated[name][list(FILES).index("plain.png")].round()
        turned = evaluated[name][list(FILES).index("turned by 6.tiff")].round()
        assert torch.equal(turned, plain.rot90(-1, (1, 2)))
        for file in ("turned.png", "turned.webp"):
            assert torch.equal(evaluated[name][list(FILES).index(file)].round(), plain)
    entry = scan_file(Entry(paths[list(FILES).index("turned by 6.tiff")], "train", 0), Path())
    assert (entry.width, entry.height) == SIZE[::-1]


def test_training_views_are_those_of_the_decoded_pixels(paths: list[str], tmp_path: Path) -> None:
    """DALI's, of the same random parameters, of plain PNG files of what Pillow decodes."""
    samples = Samples(paths, np.zeros(len(paths), np.int64))
    plain = [str(tmp_path / f"{index}.png") for index in range(len(paths))]
    for index, path in enumerate(plain):
        open_image(samples, index).save(path)
    said: list[str] = []
    found, expected = (views(training("dali", files, ("digits_sim",), said)) for files in (paths, plain))
    assert said == []
    for index, file in enumerate(FILES):
        assert float((found[index] - expected[index]).abs().max()) <= (3 if file.endswith(".jpg") else 0), file


def test_what_verify_calls_good_is_what_loaders_load(tmp_path: Path) -> None:
    """In batches that have bad ones among the good, ones of bad ones only, and in the same words."""
    write_odd_files(tmp_path)
    for name, (content, _) in REFUSED.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(tmp_path / name) for name in (*GOOD, *BAD, *REFUSED)]
    entries = [scan_file(Entry(path, "train", 0), Path()) for path in paths]
    bad = [f"cannot read the image {entry.path}: {entry.error}" for entry in entries if entry.error]
    assert len(bad) == len(BAD) + len(REFUSED)
    for text, (_, expected) in zip(bad[len(BAD) :], REFUSED.values(), strict=True):
        assert expected in text
    for name in LOADERS:
        said: list[str] = []
        loader = evaluation(name, paths, said, batch_size=4)
        for _ in range(2):
            batches = list(loader.epoch(0))
            assert len(batches) == loader.steps_per_epoch
            assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(len(GOOD)))
            assert [len(batch.views[0]) for batch in batches] == [len(batch.labels) for batch in batches]
        assert said == 2 * bad


@pytest.mark.parametrize("kinds", [("digits_sim",) * 3, ()], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_step_of_bad_images_is_a_batch_of_none(name: LoaderName, kinds: tuple[ViewKind, ...], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(16)]
    said: list[str] = []

    def make() -> Loader:
        return training(name, paths, kinds, said) if kinds else evaluation(name, paths, said)

    for path in paths:
        PICTURE.save(path)
    first, second = (batch.indices.tolist() for batch in make().epoch(0))
    for index in first:
        Path(paths[index]).unlink()
    for start in (0, 1):
        batches = list(make().epoch(0, start))
        assert [batch.indices.tolist() for batch in batches] == [[], second][start:]
    empty = next(iter(make().epoch(0)))
    assert [tuple(view.shape) for view in empty.views] == [(0, 3, 48, 48)] * max(len(kinds), 1)
    assert (empty.labels.dtype, empty.indices.dtype) == (torch.int64, torch.int64)
    assert {f"cannot read the image {paths[index]}: there is no such file" for index in first} == set(said)


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_goes_bad_is_left_out_from_then_on(name: LoaderName, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path in paths:
        PICTURE.save(path)
    said: list[str] = []
    loader = evaluation(name, paths, said)
    assert sorted(views(loader)) == [0, 1, 2]
    Path(paths[1]).write_bytes(FILES["plain.png"][:200])
    assert sorted(views(loader)) == [0, 2]
    assert said == [f"cannot read the image {paths[1]}: OSError: image file is truncated"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file name is Unicode")
def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    names = [b"\xff.png", b"\xff\xfe gif.jpg", b"\xff empty.jpg"]
    for name, content in zip(names, (FILES["plain.png"], FILES["gif inside.jpg"], b""), strict=True):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(content)
    paths = [os.fsdecode(os.fsencode(tmp_path) + b"/" + name) for name in names]
    for loader in LOADERS:
        said: list[str] = []
        assert sorted(views(evaluation(loader, paths, said))) == [0, 1]
        assert said == [f"cannot read the image {paths[2]}: the file is empty"]


@pytest.mark.parametrize("name", LOADERS)
def test_a_view_that_does_not_crop_names_images_of_other_sizes(name: LoaderName, tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{side}.png") for side in (47, 48, 49)]
    said: list[str] = []
    for path in paths:
        PICTURE.resize((int(Path(path).stem),) * 2).save(path)
    assert list(views(training(name, paths, ("digits",), said))) == [1]
    for side in (47, 49):
        expected = f"{side}.png: it has {side}x{side} pixels, and the view digits expects 48x48: set --image-size"
        assert any(expected in text for text in said)


def test_dali_runs_of_files_from_before_are_refused_by_name_and_those_of_pixels_go_on(paths: list[str]) -> None:
    loader = evaluation("dali", paths, [])
    now = loader.fingerprint["loader"]
    saved_then = {
        "epoch": 0,
        "step": 0,
        "identity": {**loader.fingerprint, "loader": now.replace("4, unusual files by Pillow", "3, without Numba")},
    }
    with pytest.raises(StateMismatch, match=r"was DALI 3, without Numba \(.*now DALI 4, unusual files by Pillow"):
        read_loader_state(loader, saved_then)
    pixels = Samples(np.zeros((1, 48, 48, 3), np.uint8), np.zeros(1, np.int64))
    spec = evaluation_spec(pixels, dataclasses.replace(OPTIONS, evaluation="as_is"), batch_size=1)
    in_memory = make_loader("dali", spec, device=torch.device("cpu"), workers=0)
    assert in_memory.fingerprint["loader"].startswith("DALI 3, without Numba (")
