"""Folders of images: which files they hold, how an image is cropped, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dimr_fast.data.images import (
    ImageFolder,
    UnreadableImageError,
    find_unreadable,
    list_images,
    read_image,
)
from dimr_fast.data.scaling import PixelScale
from tests.support.photographs import photographs


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


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
        ImageFolder(folder, 8)


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
        ImageFolder(tmp_path / "grey", 8)
