import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimr_fast.data.autoencoder import Autoencoder
from dimr_fast.data.scaling import LatentScale
from dimr_fast.errors import DataUnavailableError
from tests.support.autoencoder import original_names, save_autoencoder

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("autoencoder")
    save_autoencoder(path, scaling_factor=0.25)
    return path


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(0))


def test_moments_and_images_equal_those_of_diffusers(folder: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    ours = Autoencoder.load(str(folder), CPU)
    assert (ours.channels, ours.downsampling, ours.scale) == (4, 8, LatentScale(0.25))
    pixels = images(2, 3, 32, 48)
    with torch.no_grad():
        posterior = theirs.encode(pixels / 127.5 - 1).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    moments = ours.moments(pixels)
    assert moments.shape == (2, 8, 4, 6)
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], 1))
    drawn = ours.decode(posterior.mean)
    assert drawn.dtype == torch.uint8
    expected = (decoded.clamp(-1, 1) + 1) * 127.5
    assert (drawn - expected).abs().max() <= 0.5 + 1e-3
    assert expected.std() > 1


def test_an_autoencoder_with_a_shift_gives_latents_without_it(folder: Path, damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"shift_factor": 0.5}))
    plain, shifted = (Autoencoder.load(str(path), CPU) for path in (folder, damaged))
    pixels = images(1, 3, 16, 16)
    mean, log_variance = plain.moments(pixels).chunk(2, 1)
    torch.testing.assert_close(shifted.moments(pixels), torch.cat([mean - 0.5, log_variance], 1))
    assert torch.equal(shifted.decode(mean - 0.5), plain.decode(mean - 0.5 + 0.5))


def test_moments_in_bf16_are_close_to_exact_ones(folder: Path) -> None:
    pixels = images(1, 3, 32, 32)
    exact = Autoencoder.load(str(folder), CPU).moments(pixels)
    half = Autoencoder.load(str(folder), CPU, torch.bfloat16).moments(pixels)
    assert half.dtype == torch.float32
    error = (half - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.05


def test_the_fingerprint_is_that_of_the_weights(folder: Path, damaged: Path) -> None:
    before = Autoencoder.load(str(folder), CPU).fingerprint()
    assert Autoencoder.load(str(damaged), CPU).fingerprint() == before
    weights = load_file(damaged / WEIGHTS)
    weights["quant_conv.bias"] += 1e-3
    save_file(weights, damaged / WEIGHTS, {"format": "pt"})
    assert Autoencoder.load(str(damaged), CPU).fingerprint() != before


def test_an_incomplete_or_other_model_is_refused(damaged: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ValueError, match="expected a folder or name of an") as raised:
            Autoencoder.load(str(path), CPU)
        assert str(path) in str(raised.value)
        return str(raised.value)

    assert "config.json" in refusal(tmp_path)
    weights = load_file(damaged / WEIGHTS)
    del weights["decoder.conv_in.weight"]
    save_file(weights, damaged / WEIGHTS, {"format": "pt"})
    assert "decoder.conv_in.weight is missing" in refusal(damaged)
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:1000])
    refusal(damaged)
    (damaged / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "of class UNet2DModel" in refusal(damaged)


def test_a_missing_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DataUnavailableError, match=r"diffusers.*dimr_fast\[hub\]"):
        Autoencoder.load(str(folder), CPU)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of an autoencoder, and a file of its weights as the published code stores them."""
    path = tmp_path_factory.mktemp("original")
    # The original code has 32 groups in every norm.
    widths = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
    save_autoencoder(path / "folder", layers_per_block=2, **widths)
    weights = original_names(load_file(path / "folder" / WEIGHTS))
    torch.save(weights, path / "autoencoder_kl_ema.pth")
    return path / "folder", path / "autoencoder_kl_ema.pth"


def test_original_weights_are_the_same_autoencoder(original: tuple[Path, Path]) -> None:
    theirs, ours = (Autoencoder.load(str(path), CPU) for path in original)
    assert (ours.channels, ours.downsampling, ours.scale) == (4, 8, LatentScale(0.18215))
    assert ours.fingerprint() == theirs.fingerprint()
    pixels = images(1, 3, 32, 32)
    assert torch.equal(ours.moments(pixels), theirs.moments(pixels))
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(ours.decode(latents), theirs.decode(latents))


def test_the_original_names_are_those_of_the_published_file(original: tuple[Path, Path]) -> None:
    """Names in the file that the published code loads."""
    names = torch.load(original[1], weights_only=True).keys()
    assert {
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down.2.downsample.conv.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "decoder.mid.block_2.conv2.weight",
        "decoder.up.3.block.2.conv1.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.norm_out.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
    } <= names


def test_unusable_files_of_weights_are_named(original: tuple[Path, Path], tmp_path: Path) -> None:
    weights = torch.load(original[1], weights_only=True)
    part = {name: value for name, value in weights.items() if "decoder.mid" not in name}
    for name, content, message in (
        ("code", {"a": Path("x")}, "holds Python objects"),
        ("list", [1, 2], "holds other data, expected a state dict"),
        ("model", {"a": torch.zeros(2)}, "its weights are not those of an autoencoder"),
        ("part", part, r"decoder\.mid_block.* is missing"),
        ("more", {**weights, "decoder.up.1.attn.0.q.weight": torch.zeros(4)}, "it has others"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=rf"autoencoder: got .*{name}.pth.*{message}"):
            Autoencoder.load(str(tmp_path / f"{name}.pth"), CPU)
