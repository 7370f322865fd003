"""Pipelines are saved, loaded, moved, cast and offloaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dimr_fast.checkpoint import demo_model, load_model, save_model
from tests.support.paths import ROOT
from tests.support.pipelines import LABELS, autoencoder, generators, tiny

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: hub)")
ours = pytest.importorskip("dimr_fast.diffusers", reason="needs diffusers (extra: hub)")


def draw(pipe: Any) -> torch.Tensor:
    return pipe(LABELS, generator=generators(), output_type="pt").images


@pytest.mark.parametrize("channels", [3, 4])
def test_a_saved_pipeline_draws_the_same_images(channels: int, tmp_path: Path) -> None:
    trained = tiny(channels)
    vae = autoencoder(tmp_path / "vae") if channels == 4 else None
    pipe = ours.DiMRPipeline(ours.DiMRModel(trained), vae=vae)
    expected = draw(pipe)  # saving is possible after the model was optimised
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "DiMRPipeline"
    assert index["transformer"] == ["dimr_fast.diffusers.model", "DiMRModel"]
    assert index["scheduler"] == ["dimr_fast.diffusers.scheduler", "DiMRScheduler"]
    assert index["vae"] == (["diffusers", "AutoencoderKL"] if vae else [None, None])

    loaded = ours.DiMRPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.scheduler.to_json_string() == pipe.scheduler.to_json_string()
    assert torch.equal(draw(loaded), expected)
    # The model's folder is one that our own functions read.
    again = load_model(tmp_path / "saved" / "transformer")
    assert (again.classes, again.scale) == (trained.classes, trained.scale)


def test_a_scheduler_of_diffusers_is_saved(tmp_path: Path) -> None:
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny()))
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = ours.DiMRPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.UniPCMultistepScheduler
    assert torch.equal(draw(loaded), expected)


def test_recipe_scores_and_licence_survive(tmp_path: Path) -> None:
    recipe = {"config": {"steps": 20}}
    save_model(tiny(), tmp_path / "model", recipe=recipe, license="apache-2.0")
    ours.DiMRPipeline.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "pipe")
    ours.DiMRPipeline.from_pretrained(tmp_path / "pipe").save_pretrained(tmp_path / "again")
    folder = tmp_path / "again" / "transformer"
    written = json.loads((folder / "config.json").read_text())
    assert (written["recipe"], written["license"]) == (recipe, "apache-2.0")
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def test_repositories_of_the_hub_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny()))
    pipe.save_pretrained(tmp_path / "pipe")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path / "pipe" / name.removeprefix("you/pipe").removeprefix("-"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    whole = ours.DiMRPipeline.from_pretrained("you/pipe", revision="main", dtype=torch.float32)
    model = ours.DiMRPipeline.from_pretrained("you/pipe-transformer", dtype=torch.float32)
    assert asked == [("you/pipe", {"revision": "main"}), ("you/pipe-transformer", {})]
    assert torch.equal(draw(whole), draw(model))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtypes_are_those_of_the_caller(name: str, tmp_path: Path) -> None:
    """Without one, weights stay in float32 and a saved pipeline has them all."""
    trained = tiny()
    pipe = ours.DiMRPipeline(ours.DiMRModel(trained))
    draw(pipe)
    pipe.save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "transformer" / "model.safetensors")
    assert all(
        torch.equal(weights[key], value) for key, value in trained.model.state_dict().items()
    )

    exact = draw(pipe.to("cpu", torch.float32))
    loaded = ours.DiMRPipeline.from_pretrained(tmp_path / "whole", **{name: torch.bfloat16})
    assert loaded.dtype == loaded.transformer.dtype == torch.bfloat16
    half = draw(loaded)
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.25)
    assert torch.equal(draw(loaded), draw(loaded.to("cpu")))
    double = draw(pipe.to(torch.float64))  # the model itself computes
    torch.testing.assert_close(double, exact, rtol=0, atol=1e-3)


def test_a_device_map_names_one_device(tmp_path: Path) -> None:
    ours.DiMRPipeline(ours.DiMRModel(tiny())).save_pretrained(tmp_path)
    pytest.importorskip("accelerate", reason="diffusers places models by accelerate")
    pipe = ours.DiMRPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert draw(pipe).isfinite().all()
    with pytest.raises(ValueError, match=r"device_map: got .*expected one device"):
        ours.DiMRModel.from_pretrained(tmp_path / "transformer", device_map={"a": 0, "b": 1})
    with pytest.raises(ValueError, match="quantization_config: got one, expected None"):
        ours.DiMRModel.from_pretrained(tmp_path / "transformer", quantization_config={})


def test_offloading_moves_one_model_at_a_time(tmp_path: Path) -> None:
    """To the CPU itself here, by the hooks that would move the models to a GPU."""
    pytest.importorskip("accelerate", reason="diffusers offloads models by accelerate")
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny(4)), vae=autoencoder(tmp_path))
    expected = draw(pipe)
    if not torch.accelerator.is_available():
        with pytest.raises(RuntimeError, match="requires accelerator"):
            pipe.enable_model_cpu_offload()
    pipe.enable_model_cpu_offload(device="cpu")
    moved: list[str] = []
    for name in ("transformer", "vae"):
        hook = vars(getattr(pipe, name))["_hf_hook"]
        before = hook.pre_forward
        hook.pre_forward = lambda *given, name=name, before=before, **named: (
            moved.append(name),
            before(*given, **named),
        )[1]
    assert torch.equal(draw(pipe), expected)
    assert moved == ["transformer"] * 25 + ["vae"]
    assert torch.equal(draw(pipe), expected)


def test_offloading_in_parts_is_refused() -> None:
    pipe = ours.DiMRPipeline(ours.DiMRModel(tiny()))
    with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
    with pytest.raises(ValueError, match="not support"):
        pipe.transformer.enable_group_offload(torch.device("cpu"))


IN_A_NEW_PROCESS = """
import sys

import torch
from diffusers import DiffusionPipeline

folder, output = sys.argv[1:]
assert "dimr_fast" not in sys.modules
for code in (folder, "pipeline"):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=code, trust_remote_code=True)
    images = pipe(pipe.get_label_ids(["tropic coast"]), generator=torch.manual_seed(0)).images
    images[0].save(output)
    output = output + ".2.png"
"""


@pytest.mark.slow
def test_diffusers_loads_the_pipeline_in_a_new_process(tmp_path: Path) -> None:
    """`custom_pipeline` is the folder, or the name of the file in it."""
    pipe = ours.DiMRPipeline.from_pretrained(demo_model())
    pipe.save_pretrained(tmp_path / "pipe")
    (expected,) = pipe([2], generator=torch.manual_seed(0)).images
    output = tmp_path / "image.png"
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, str(tmp_path / "pipe"), str(output)],
        env=os.environ | {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for path in (output, tmp_path / "image.png.2.png"):
        assert Image.open(path).tobytes() == expected.tobytes()
