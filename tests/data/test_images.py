"""Folders of images: which files they hold, how an image is cropped, and what is refused."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, TiffImagePlugin

from dimr_fast.data.images import (
    ImageFolder,
    UnreadableImageError,
    decode_image,
    find_unreadable,
    list_images,
    read_image,
)
from dimr_fast.data.scaling import PixelScale
from tests.support.image_files import noise, save
from tests.support.memory import memory_from_here
from tests.support.photographs import photographs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, five images; names out of order, one deeper, some to pass over."""
    root = tmp_path / "pictures"
    for seed, name in enumerate(["b/2.png", "b/1.BMP", "a/deep/er/x.png", "a/y.png", "b/10.png"]):
        save(root / name, noise(9 + seed, 12, seed))
    (root / "a" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    save(root / "a" / ".thumbnail.png", noise(4, 4))
    return root


def test_a_class_is_a_sub_folder_with_the_images_at_any_depth(folder: Path) -> None:
    files = list_images(folder)
    assert files.classes == ("a", "b")
    assert files.names == ("a/deep/er/x.png", "a/y.png", "b/1.BMP", "b/10.png", "b/2.png")
    assert files.labels.tolist() == [0, 0, 1, 1, 1]
    one = list_images(folder / "b")
    assert (one.classes, one.names) == (("b",), ("1.BMP", "10.png", "2.png"))
    assert one.labels.tolist() == [0, 0, 0]


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere, expected an existing folder"):
        list_images(tmp_path / "nowhere")
    (folder / "c").mkdir()
    with pytest.raises(ValueError, match="pictures/c without images, expected some of"):
        list_images(folder)
    save(folder / "loose.png", noise(4, 4))
    with pytest.raises(ValueError, match=r"images \(loose.png, …\) beside folders \(a, …\)"):
        list_images(folder)
    with pytest.raises(ValueError, match="without images"):
        list_images(folder / "c")
    with pytest.raises(ValueError, match="size: got 0, expected 1 or more"):
        ImageFolder(folder / "a", 0)


def test_fingerprint_follows_names_and_sizes(folder: Path) -> None:
    before = list_images(folder).fingerprint()
    assert list_images(folder).fingerprint() == before
    (folder / "b" / "2.png").rename(folder / "b" / "3.png")
    renamed = list_images(folder).fingerprint()
    with (folder / "b" / "3.png").open("ab") as file:
        file.write(b"x")
    assert len({before, renamed, list_images(folder).fingerprint()}) == 3


def test_halving_by_boxes_and_the_crop(tmp_path: Path) -> None:
    """At 4 times the size nothing but two halvings is left, rounded up after each direction."""
    pixels = noise(44, 32)
    expected = pixels.astype(int)
    for _ in range(2):
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
        expected = (expected[::2] + expected[1::2] + 1) // 2
    image = read_image(save(tmp_path / "x.png", pixels), 8)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected[:, 1:9])


@pytest.mark.parametrize(("width", "height"), [(29, 21), (21, 30), (9, 7)])
def test_resizing_is_bicubic_with_antialiasing(tmp_path: Path, width: int, height: int) -> None:
    """As torch computes it; rounded to whole pixels after each direction. (9, 7) is enlarged."""
    smooth = np.array(
        Image.fromarray(noise(5, 5)).resize((width, height), Image.Resampling.BICUBIC)
    )
    image = read_image(save(tmp_path / "x.png", smooth), 16)
    scale = 16 / min(width, height)
    size = (round(height * scale), round(width * scale))
    x = torch.from_numpy(smooth).permute(2, 0, 1)[None].double()
    expected = F.interpolate(x, size, mode="bicubic", antialias=True)[0].clamp(0, 255)
    top, left = (size[0] - 16) // 2, (size[1] - 16) // 2
    assert (image - expected[:, top : top + 16, left : left + 16]).abs().max() <= 1.5


def test_photographs_keep_their_colours() -> None:
    """Each halving of the three rounds up by half a level on average."""
    for path in photographs()[:3]:
        with Image.open(path) as file:
            whole = np.asarray(file.convert("RGB")).reshape(-1, 3).mean(0)
            square = min(file.size) == max(file.size)
        image = read_image(path, 64)
        assert image.shape == (3, 64, 64)
        assert square
        assert np.allclose(image.double().mean((1, 2)), whole + 1.5, atol=0.5)


def test_exif_orientation_is_respected(tmp_path: Path) -> None:
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    image = read_image(tmp_path / "x.png", 16)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 77, "png", (77, 77, 77)),
        ("P", 5, "gif", None),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("LA", (9, 255), "png", (9, 9, 9)),
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (255, 0, 0, 0), "webp", (255, 255, 255)),
        ("RGBA", (0, 100, 200, 51), "png", (204, 224, 244)),
        ("I;16", 300, "png", (1, 1, 1)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("CMYK", (255, 0, 0, 0), "tif", (0, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int, suffix: str, expected: tuple[int, ...] | None
) -> None:
    image = Image.new(mode, (8, 8), colour)
    path = tmp_path / f"x.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    expected = expected or image.convert("RGB").getpixel((0, 0))
    assert read_image(path, 4).flatten(1).unique(dim=1).flatten().tolist() == list(expected)


def test_unreadable_images_are_named(folder: Path) -> None:
    whole = save(folder / "b" / "photo.jpg", noise(64, 64)).read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "empty.png").write_bytes(b"")
    (folder / "b" / "text.png").write_text("no image at all")
    (folder / "b" / "gone.png").symlink_to(folder / "nowhere.png")
    Image.new("F", (8, 8)).save(folder / "b" / "real.tif")
    bad = {"b/cut.jpg", "b/empty.png", "b/gone.png", "b/real.tif", "b/text.png"}
    for name in bad:
        with pytest.raises(UnreadableImageError, match=f"{name}: not a readable image"):
            read_image(folder / name, 8)
    found = find_unreadable(folder)
    assert set(found) == bad
    assert "truncated" in found["b/cut.jpg"]
    assert "real numbers" in found["b/real.tif"]
    with pytest.raises(UnreadableImageError, match=r"b/cut\.jpg"):
        _ = ImageFolder(folder, 8).scale


def test_examples_in_any_order_and_mirrored(folder: Path) -> None:
    images = pickle.loads(pickle.dumps(ImageFolder(folder, 8)))
    assert images.shape == (3, 8, 8)
    assert images.classes == ("a", "b")
    read = images.read(torch.tensor([4, 0, 4]), torch.tensor([False, True, True]))
    assert read.dtype == torch.uint8
    assert torch.equal(read[0], read_image(folder / "b/2.png", 8))
    assert torch.equal(read[1], read_image(folder / "a/deep/er/x.png", 8).flip(2))
    assert torch.equal(read[2], read[0].flip(2))


def test_the_scale_is_that_of_all_images(folder: Path) -> None:
    images = ImageFolder(folder, 8)
    every = images.read(torch.arange(5), torch.zeros(5, dtype=torch.bool))
    assert images.scale == PixelScale.of(every)


def test_the_scale_of_many_images_is_that_of_512_evenly_spaced_ones(tmp_path: Path) -> None:
    """The others are not even decoded."""
    many = tmp_path / "many"
    for number in range(1024):
        if number % 2 == 0:
            save(many / f"{number:04}.png", noise(4, 4, number))
        else:
            (many / f"{number:04}.png").write_text("no image")
    images = ImageFolder(many, 4)
    read = images.read(torch.arange(0, 1024, 2), torch.zeros(512, dtype=torch.bool))
    assert images.scale == PixelScale.of(read)


def test_images_of_one_colour_have_no_scale(tmp_path: Path) -> None:
    save(tmp_path / "grey" / "x.png", np.full((8, 8, 3), 7, np.uint8))
    with pytest.raises(ValueError, match="grey, whose images have one colour"):
        _ = ImageFolder(tmp_path / "grey", 8).scale


def test_a_thin_image_takes_little_memory(tmp_path: Path) -> None:
    """A line of 60,000 pixels is not enlarged as a whole, which would take 12 GB."""
    pixels = np.zeros((60_000, 1, 3), np.uint8)
    pixels[29_999:30_001] = 200
    path = save(tmp_path / "line.png", pixels)
    used = memory_from_here()
    image = read_image(path, 256)
    assert used() < 100 * 2**20
    # The square is one pixel of the middle: the two bright ones are enlarged 256 times.
    assert image.shape == (3, 256, 256)
    assert (image > 150).all()


@pytest.mark.parametrize(("width", "height"), [(160, 10), (10, 157), (40, 30), (7, 64)])
def test_the_crop_of_an_image_up_to_16_times_as_long_as_wide_is_that_of_the_whole(
    tmp_path: Path, width: int, height: int
) -> None:
    pixels = noise(width, height)
    scale = 24 / min(width, height)
    image = Image.fromarray(pixels)
    while min(image.size) >= 48:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = 24 / min(image.size)
    whole = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (whole.width - 24) // 2, (whole.height - 24) // 2
    expected = np.asarray(whole)[top : top + 24, left : left + 24]
    found = read_image(save(tmp_path / "x.png", pixels), 24)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_a_png_with_much_text_or_a_large_profile_is_read(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    image = Image.fromarray(noise(8, 8))
    image.save(tmp_path / "text.png", pnginfo=text)
    image.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
    assert find_unreadable(tmp_path) == {}


def png(path: Path, depth: int, colour: int, rows: list[bytes], transparent: bytes) -> Path:
    """Write a PNG file, one byte string for each row, as Pillow cannot write this depth."""
    width = 8 * len(rows[0]) // (depth * (3 if colour == 2 else 1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))
    return path


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "expected"),
    [
        (16, 0, struct.pack(">2H", 300, 0), struct.pack(">H", 0), (1, 255)),
        (16, 0, struct.pack(">2H", 257, 256), struct.pack(">H", 256), (1, 255)),
        (8, 0, bytes([7, 0]), struct.pack(">H", 0), (7, 255)),
        (4, 0, bytes([0x72]), struct.pack(">H", 2), (7 * 17, 255)),
        (2, 0, bytes([0b01_10_10_01]), struct.pack(">H", 2), (85, 255, 255, 85)),
        (1, 0, bytes([0b01010101]), struct.pack(">H", 0), (255,)),
        (16, 2, struct.pack(">6H", *[0] * 3, *[0x1234] * 3), b"\x12\x34" * 3, (0, 255)),
        (8, 2, bytes([9, 9, 9, 5, 5, 5]), struct.pack(">3H", 5, 5, 5), (9, 255)),
    ],
)
def test_the_transparent_value_of_a_png_is_white(
    tmp_path: Path,
    depth: int,
    colour: int,
    row: bytes,
    transparent: bytes,
    expected: tuple[int, ...],
) -> None:
    """At every depth, the value is stored in units of the file's samples."""
    path = png(tmp_path / "x.png", depth, colour, [row] * 2, transparent)
    found = np.asarray(decode_image(path))[0]
    assert (found == found[:, :1]).all()
    wanted = expected * (len(found) // len(expected))
    assert found[:, 0].tolist() == list(wanted)


def test_greys_of_16_bits_in_other_formats(tmp_path: Path) -> None:
    values = np.array([[0, 257, 25_700, 65_535]] * 2, np.uint16)
    white_is_zero = TiffImagePlugin.ImageFileDirectory_v2()
    white_is_zero[262] = 0
    Image.fromarray(values).save(tmp_path / "x.tif")
    Image.fromarray(values).save(tmp_path / "inverted.tif", tiffinfo=white_is_zero)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "wide.tif")
    (tmp_path / "x.pgm").write_bytes(b"P5 4 2 65535\n" + values.astype(">u2").tobytes())
    for name in ("x.tif", "wide.tif", "x.pgm"):
        assert np.asarray(decode_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 100, 255], name
    inverted = np.asarray(decode_image(tmp_path / "inverted.tif"))[0, :, 0]
    assert inverted.tolist() == [255, 254, 155, 0]


@pytest.mark.parametrize("values", [(-1, 0), (0, 65_536), (0, 2**31 - 1)])
def test_integers_of_unknown_range_are_refused(tmp_path: Path, values: tuple[int, int]) -> None:
    Image.fromarray(np.array([values] * 2, np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImageError, match=r"integers outside 0\.\.65535, of"):
        read_image(tmp_path / "x.tif", 2)


def without_privileges(folder: Path) -> subprocess.CompletedProcess[str]:
    """List the images of a folder in a process that may not read everything, as root may."""
    code = "import sys; from pathlib import Path; from dimr_fast.data.images import list_images; "
    code += "print(list_images(Path(sys.argv[1])).names)"
    words = [sys.executable, "-c", code, str(folder)]
    if os.geteuid() == 0:
        drop = "-dac_override,-dac_read_search"
        words = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *words]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("setpriv") is None,
    reason="root may read everything, and there is no setpriv to give that up",
)
def test_a_folder_that_cannot_be_read_is_an_error(folder: Path) -> None:
    closed = folder / "a" / "deep"
    closed.chmod(0)
    try:
        result = without_privileges(folder)
    finally:
        closed.chmod(0o755)
    assert result.returncode == 1
    assert "PermissionError" in result.stderr
    assert "a/deep" in result.stderr


@pytest.mark.parametrize("target", ["..", "../..", ".", "deep/.."])
def test_a_link_upwards_is_refused(folder: Path, target: str) -> None:
    (folder / "a" / "all").symlink_to(target)
    with pytest.raises(ValueError, match=r"a/all, a link to .*, expected no link to a folder"):
        list_images(folder)


def test_links_that_lead_to_one_another_are_refused(folder: Path) -> None:
    (folder / "a" / "other").symlink_to("../b")
    (folder / "b" / "other").symlink_to("../a")
    with pytest.raises(ValueError, match="other/other, a link to"):
        list_images(folder)


def test_links_to_other_folders_and_files_are_followed(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "in" / "z.png", noise(8, 8))
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "more").symlink_to(tmp_path / "elsewhere" / "in")
    (folder / "b" / "w.png").symlink_to(tmp_path / "elsewhere" / "in" / "z.png")
    files = list_images(folder)
    assert files.classes == ("a", "b", "c")
    assert files.labels.bincount().tolist() == [3, 4, 1]
    assert {"a/more/z.png", "b/w.png", "c/in/z.png"} < set(files.names)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"])
def test_folders_of_operating_systems_are_passed_over(folder: Path, name: str) -> None:
    before = list_images(folder)
    save(folder / name / "a" / "1.png", noise(4, 4))
    save(folder / "a" / name / "2.png", noise(4, 4))
    assert list_images(folder).names == before.names
    assert list_images(folder / "b").classes == ("b",)
