"""The models that come with the package."""

from pathlib import Path

import pytest
import torch

from dimr_fast.checkpoint import PACKAGED, demo_model, load_model, save_model
from dimr_fast.sampling import SamplerConfig, sample_images


def test_a_packaged_model_is_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    demo, distilled = (load_model(Path(name)) for name in PACKAGED)
    assert (demo.evaluations, distilled.evaluations) == (None, 2)
    assert demo.classes == distilled.classes
    assert all(
        torch.equal(value, load_model(demo_model()).model.state_dict()[name])
        for name, value in demo.model.state_dict().items()
    )
    # A file or folder of that name is the user's.
    save_model(distilled, tmp_path / "demo")
    assert load_model(Path("demo")).evaluations == 2


def test_the_distilled_model_draws_in_two_evaluations_nearly_what_its_teacher_draws() -> None:
    """From the same noise: nearer to the teacher's images than its teacher with two steps is."""
    labels = torch.arange(6).repeat(4)
    demo, distilled = (load_model(Path(name)) for name in PACKAGED)
    many = sample_images(demo, labels, SamplerConfig()).float()
    two = sample_images(demo, labels, SamplerConfig(steps=2)).float()
    drawn = sample_images(distilled, labels, SamplerConfig()).float()
    assert (drawn - many).square().mean() < 0.5 * (two - many).square().mean()


def test_packaged_files_are_small() -> None:
    """Together at most 16 MB, which a checkout and a wheel carry."""
    sizes = [path.stat().st_size for name in PACKAGED for path in demo_model(name).iterdir()]
    assert sum(sizes) < 16e6
