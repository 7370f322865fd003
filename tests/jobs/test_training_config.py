"""Settings of training, read from YAML and KEY=VALUE words."""

import dataclasses
import re
from pathlib import Path

import pytest

from dimr_fast.config import PRESETS
from dimr_fast.data.sources import open_examples
from dimr_fast.demo import DemoConfig
from dimr_fast.extraction import ExtractConfig
from dimr_fast.sampling import SamplerConfig
from dimr_fast.training.config import RESUME_OVERRIDES, TrainConfig, shipped_recipes
from tests.support.image_files import noise, save


def test_words_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\nlearning_rate: 1e-4\nbatch_size: 64\nminutes: none\n")
    changes = ["batch_size=128", "steps=1e3", "betas=[0.8, 0.95]", "checkpointing=[0, 1]"]
    found = TrainConfig.read(path, changes, tmp_path / "run")
    assert (found.preset, found.learning_rate, found.batch_size) == ("tiny", 1e-4, 128)
    assert (found.steps, found.minutes, found.betas) == (1000, None, (0.8, 0.95))
    assert isinstance(found.steps, int)
    assert found.checkpointing == (0, 1)
    assert found.output == tmp_path / "run"
    assert found.warmup_steps == TrainConfig(output=tmp_path).warmup_steps


def test_written_settings_are_read_back(tmp_path: Path) -> None:
    config = TrainConfig(
        output=tmp_path / "run", minutes=None, steps=5, betas=(0.5, 0.6), autoencoder="vae"
    )
    config.write(tmp_path / "config.yaml")
    assert TrainConfig.read(tmp_path / "config.yaml") == config


TEXTS = ("0123", "1_000", "no", "2024-01-02", "ph: #x", "1e3", "null", "~x", "0x10", "12:30:45")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is_written(tmp_path: Path, text: str) -> None:
    """YAML would read a number, a date or a truth value."""
    found = TrainConfig.read(None, [f"data={text}", f"output={text}"], None)
    assert (found.data, str(found.output)) == (text, text)
    assert TrainConfig.read(None, [f"autoencoder={text}"], tmp_path).autoencoder == text
    # And from the file that the run writes.
    found.write(tmp_path / "config.yaml")
    assert TrainConfig.read(tmp_path / "config.yaml") == found


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("ph: #x", "null")])
def test_a_text_in_a_file_is_taken_as_it_is_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {text}  # comment\nautoencoder: '{text}'\nsteps: 1_000\n")
    found = TrainConfig.read(path, output=tmp_path)
    assert (found.data, found.autoencoder, found.steps) == (text, text, 1000)


def test_none_and_null_stand_for_no_value_where_one_is_optional(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in ("none", "null", "~", ""):
        path.write_text(f"autoencoder: {text}\nminutes: {text}\nsteps: 3\n")
        found = TrainConfig.read(path, output=tmp_path)
        assert (found.autoencoder, found.minutes) == (None, None)
    assert TrainConfig.read(path, ["autoencoder=none"], tmp_path).autoencoder is None


def test_a_setting_that_is_given_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\nbatch_size: 4\nsteps: 5\n")
    with pytest.raises(ValueError, match=r"run\.yaml: got steps twice, expected each setting once"):
        TrainConfig.read(path, output=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_file_may_have_any_encoding_of_unicode(tmp_path: Path, encoding: str) -> None:
    """PowerShell writes UTF-16, Windows editors a byte order mark."""
    path = tmp_path / "run.yaml"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path.write_text(f"{mark}steps: 3\ndata: фото\n", encoding=encoding)
    found = TrainConfig.read(path, output=tmp_path)
    assert (found.steps, found.data) == (3, "фото")
    path.write_bytes("data: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.yaml: not valid YAML .*invalid continuation byte"):
        TrainConfig.read(path, output=tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells expand it only at the start of a word, so not in --set data=~/photos."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text("output: ~/runs/a\ndata: ~/photos\n")
    found = TrainConfig.read(path)
    assert found.output == tmp_path / "runs" / "a"
    for seed in range(2):
        save(tmp_path / "photos" / f"{seed}.png", noise(8, 8, seed))
    assert open_examples(found.data, 8, 8).classes == ("photos",)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_has_64_bits(tmp_path: Path, seed: int) -> None:
    expected = f"seed: got {seed}, expected 0..18446744073709551615"
    job = {"output": tmp_path}
    for settings in (
        TrainConfig(seed=seed, **job),
        SamplerConfig(seed=seed),
        DemoConfig(seed=seed),
    ):
        with pytest.raises(ValueError, match=expected.replace(".", "[.]")):
            settings.validate()
    TrainConfig(seed=2**64 - 1, **job).validate()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bath_size=3", r"bath_size: got an unknown setting, .*batch_size\?"),
        ("batch_size=many", "batch_size: got 'many', expected a whole number"),
        ("batch_size=1.5", "batch_size: got 1.5, expected a whole number"),
        ("batch_size=true", "batch_size: got True"),
        ("learning_rate=.inf", "learning_rate: got inf"),
        ("learning_rate=fast", "learning_rate: got 'fast', expected a finite number"),
        ("betas=0.9", "betas: got 0.9, expected a list of 2"),
        ("betas=[0.9]", r"betas: got \[0.9\], expected a list of 2"),
        ("precision=fp8", "precision: got 'fp8', expected one of auto"),
        ("tensorboard=1", "tensorboard: got 1, expected true or false"),
        ("steps=[1]", "steps: got"),
        ("steps", "set: got 'steps', expected KEY=VALUE"),
        ("betas=[", "betas: not valid YAML"),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(None, [word], tmp_path)


def test_missing_or_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config: got 'nowhere', expected .*demo"):
        TrainConfig.read("nowhere")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="expected settings as KEY: VALUE"):
        TrainConfig.read(path, output=tmp_path)
    with pytest.raises(ValueError, match="output: got None"):
        TrainConfig.read("demo")


def test_every_shipped_recipe_is_valid(tmp_path: Path) -> None:
    assert set(shipped_recipes()) == {
        "demo",
        "distill",
        "imagenet64_m3r",
        "imagenet64_l3r",
        "imagenet256_xl2r",
        "imagenet256_g2r",
        "imagenet512_xl3r",
    }
    for name in shipped_recipes():
        config = TrainConfig.read(name, output=tmp_path)
        config.validate()
        assert config.preset in PRESETS


def test_the_demo_recipe_differs_from_the_defaults_by_its_optimizer(tmp_path: Path) -> None:
    """Runs of earlier versions had the defaults, so a recipe changes and they do not."""
    expected = TrainConfig(output=tmp_path, optimizer="muon", learning_rate=16e-3)
    assert TrainConfig.read("demo", output=tmp_path) == expected


@pytest.mark.parametrize("name", ["imagenet256_xl2r", "imagenet256_g2r", "imagenet512_xl3r"])
def test_the_imagenet_recipes_have_the_published_values(tmp_path: Path, name: str) -> None:
    config = TrainConfig.read(name, output=tmp_path)
    assert (config.batch_size, config.steps, config.minutes) == (1024, 1_000_000, None)
    assert (config.learning_rate, config.warmup_steps, config.decay) == (2e-4, 5000, 0)
    assert (config.betas, config.weight_decay) == ((0.99, 0.99), 0.03)
    assert config.max_grad_norm is None
    assert (config.ema_decay, config.ema_warmup, config.label_dropout) == (0.9999, False, 0.1)
    latent = 32 if "256" in name else 64
    assert PRESETS[config.preset].image_size == (latent, latent)
    # No sampling of latents is asked for without what decodes them: the recipe runs as it is.
    assert config.autoencoder is not None or config.sample_steps is config.score_steps is None


@pytest.mark.parametrize("name", ["imagenet64_m3r", "imagenet64_l3r"])
def test_the_recipes_of_pixels_have_the_values_of_u_vit(tmp_path: Path, name: str) -> None:
    config = TrainConfig.read(name, output=tmp_path)
    assert (config.batch_size, config.steps, config.minutes) == (1024, 300_000, None)
    assert (config.learning_rate, config.warmup_steps, config.decay) == (3e-4, 5000, 0)
    assert (config.betas, config.weight_decay) == ((0.99, 0.99), 0.03)
    assert (config.ema_decay, config.ema_warmup, config.label_dropout) == (0.9999, False, 0.0)
    assert (config.schedule, config.pixel_scale) == ("vp-sde", (127.5, 127.5))
    assert PRESETS[config.preset].shape == (3, 64, 64)
    assert config.image_size == 64
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    for source in ("the paper:", "U-ViT's configuration", "ours:"):
        assert source in text


@pytest.mark.parametrize("name", ["imagenet256_xl2r", "imagenet256_g2r", "imagenet512_xl3r"])
def test_the_extraction_command_in_a_recipe_has_existing_options(name: str) -> None:
    text = shipped_recipes()[name].read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "dimr-fast extract" in line)
    words = re.findall(r"--([a-z-]+)", line)
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(ExtractConfig)}
    assert {"images", "image-size", "autoencoder", "output"} == set(words) <= fields


def test_settings_that_may_change_on_resuming_exist() -> None:
    assert set(TrainConfig.__dataclass_fields__) >= RESUME_OVERRIDES
