"""Sets of images to score: finding and reading them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimr_fast.data.images import list_images
from dimr_fast.evaluation.image_sets import FolderImages, NpzImages, TensorImages, open_images
from tests.support.image_files import random_images, read_all, write_folder, write_npz


def test_images_are_read_unchanged(tmp_path: Path) -> None:
    images = random_images(17)
    folder = write_folder(images, tmp_path / "folder")
    npz = write_npz(images, tmp_path / "images.npz", arr_1=np.arange(17) % 4)
    sets = FolderImages(folder), NpzImages(npz), TensorImages(images, "memory")
    for found in sets:
        assert (found.count, found.size) == (17, (16, 16))
        assert torch.equal(read_all(found), images)
        assert read_all(found).is_contiguous()
    assert sets[1].classes == "4 classes, 4 to 5 images each"
    np.savez_compressed(tmp_path / "small.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(read_all(open_images(tmp_path / "small.npz")), images)


def test_sub_folders_are_classes_and_grey_images_have_three_channels(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_folder(random_images(3), tmp_path / "images" / name)
    Image.new("L", (16, 16), 9).save(tmp_path / "images" / "dog" / "grey.JPG")
    found = open_images(tmp_path / "images")
    assert (found.count, found.classes) == (7, "2 classes, 3 to 4 images each")
    assert "(jpg, png)" in found.source
    assert read_all(found)[6].unique().tolist() == [9]


def test_a_folder_has_the_same_images_as_for_training(tmp_path: Path) -> None:
    write_folder(random_images(3), tmp_path / "elsewhere")
    write_folder(random_images(4), tmp_path / "images" / "cat" / "deep")
    write_folder(random_images(1), tmp_path / "images" / ".hidden")
    (tmp_path / "images" / "dog").symlink_to(tmp_path / "elsewhere")
    found = open_images(tmp_path / "images")
    assert found.count == len(list_images(tmp_path / "images").names) == 7


def test_different_images_have_different_fingerprints(tmp_path: Path) -> None:
    images = random_images(4)
    other = images.clone()
    other[3, 2, 15, 15] ^= 1
    tensors = [TensorImages(x, "").fingerprint for x in (images, images.clone(), other)]
    assert tensors[0] == tensors[1] != tensors[2]
    files = [write_npz(x, tmp_path / f"{i}.npz") for i, x in enumerate((images, other))]
    assert NpzImages(files[0]).fingerprint != NpzImages(files[1]).fingerprint
    folder = write_folder(images, tmp_path / "folder")
    before = FolderImages(folder).fingerprint
    assert FolderImages(folder).fingerprint == before
    (folder / "0003.png").write_bytes((folder / "0002.png").read_bytes())
    assert FolderImages(folder).fingerprint != before


def test_scored_images_are_decoded_as_those_for_training(tmp_path: Path) -> None:
    """16 bits are not clipped to white, and every kind of file is read."""
    Image.fromarray(np.full((4, 4), 20_000, np.uint16)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "c.tif")
    Image.new("L", (4, 4), 9).save(tmp_path / ".hidden.png")
    pixels = read_all(FolderImages(tmp_path))
    assert pixels[:, :, 0, 0].tolist() == [[77, 77, 77], [255, 255, 255], [1, 2, 3]]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen upright it has to be turned
    folder = tmp_path / "turned"
    folder.mkdir()
    Image.new("RGB", (4, 8)).save(folder / "d.png", exif=exif)
    assert FolderImages(folder).size == (4, 8)
    assert read_all(FolderImages(folder)).shape == (1, 3, 4, 8)


def test_a_truncated_jpeg_is_detected_and_named(tmp_path: Path) -> None:
    Image.fromarray(random_images(1, size=64)[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"images: got .*b\.jpg, expected a whole image"):
        read_all(FolderImages(tmp_path))


def test_a_damaged_npz_is_detected(tmp_path: Path) -> None:
    path = write_npz(random_images(12), tmp_path / "fake.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images: got .*fake\.npz, which is damaged"):
        read_all(open_images(path))
