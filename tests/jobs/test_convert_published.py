"""Converting what training leaves: several weights in a file, published runs, configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from dimr_fast import DiMR, DiMRConfig, cli, convert
from dimr_fast.checkpoint import CheckpointError, load_published, read_weights, save_checkpoint
from dimr_fast.convert import ConvertConfig
from dimr_fast.utils.tensors import read_tensors
from tests.support.models import randomised


@pytest.fixture(scope="module")
def model() -> DiMR:
    return randomised(DiMR.from_preset("tiny"))


@pytest.fixture(scope="module")
def other(model: DiMR) -> DiMR:
    """Another model of the same sizes."""
    found = DiMR.from_preset("tiny")
    found.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    return found


def run(source: Path, output: Path, **settings: Any) -> convert.Conversion:
    return convert.convert(ConvertConfig(input=source, output=output, **settings))


def holds(path: Path, model: DiMR) -> bool:
    weights = read_tensors(path)[0]
    expected = model.state_dict()
    return weights.keys() == expected.keys() and all(
        torch.equal(weights[name], value) for name, value in expected.items()
    )


def test_a_key_chooses_one_of_several_weights(model: DiMR, other: DiMR, tmp_path: Path) -> None:
    path = tmp_path / "two.pth"
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    sets = {"model": other.state_dict(), "ema": model.state_dict()}
    torch.save({**sets, "opt": optimizer, "step": 7}, path)
    run(path, tmp_path / "ema.safetensors", key="ema")
    run(path, tmp_path / "model.safetensors", key="model")
    assert holds(tmp_path / "ema.safetensors", model)
    assert holds(tmp_path / "model.safetensors", other)
    for key, message in (
        (None, r"several weights that differ \(model, ema\); choose by --key"),
        ("opt", "got key 'opt', but it holds the weights model, ema"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(path, tmp_path / "out", key=key)
    assert not (tmp_path / "out").exists()


def test_equal_weights_and_a_single_one_need_no_key(model: DiMR, tmp_path: Path) -> None:
    state = model.state_dict()
    torch.save({"model": state, "ema": dict(state)}, tmp_path / "equal.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "one.pth")
    for name in ("equal", "one"):
        run(tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors")
        assert holds(tmp_path / f"{name}.safetensors", model)


def test_a_key_for_a_file_of_one_model_is_refused(model: DiMR, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    model.save_pretrained(tmp_path / "folder")
    for name in ("nnet.pth", "folder"):
        with pytest.raises(CheckpointError, match=f"{name}: got key 'ema', but it holds one"):
            run(tmp_path / name, tmp_path / "out", key="ema")


def test_a_published_run_gives_its_average_or_its_weights(
    model: DiMR, other: DiMR, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published training writes a folder of these files."""
    folder = tmp_path / "ckpts" / "50000.ckpt"
    folder.mkdir(parents=True)
    torch.save(50000, folder / "step.pth")
    torch.save(torch.optim.AdamW(other.parameters()).state_dict(), folder / "optimizer.pth")
    torch.save({"base_lrs": [2e-4], "last_epoch": 50000}, folder / "lr_scheduler.pth")
    ddp = {f"module.{name}": value for name, value in other.state_dict().items()}
    torch.save(ddp, folder / "nnet.pth")
    torch.save(model.state_dict(), folder / "nnet_ema.pth")
    words = ["convert", "--input", str(folder), "--output", str(tmp_path / "a.safetensors")]
    assert cli.main(words) == 0
    assert "took the weights nnet_ema of a published run" in capsys.readouterr().out
    assert holds(tmp_path / "a.safetensors", model)
    said = run(folder, tmp_path / "b.safetensors", key="nnet")
    assert said.remarks == (
        "took the weights nnet of a published run",
        "removed `module.` from the weights' names",
    )
    assert holds(tmp_path / "b.safetensors", other)
    with pytest.raises(CheckpointError, match="key 'ema', expected nnet_ema or nnet"):
        run(folder, tmp_path / "out", key="ema")
    assert cli.main(["sample", "--checkpoint", str(folder), "--output", str(tmp_path / "o")]) == 2
    hint = f"convert it first: dimr-fast convert --input {folder} --output FOLDER"
    assert hint in capsys.readouterr().err


def test_a_model_folder_is_no_published_run(model: DiMR, other: DiMR, tmp_path: Path) -> None:
    """Although the published file that it was converted from may be in it."""
    model.save_pretrained(tmp_path / "folder")
    torch.save(other.state_dict(), tmp_path / "folder" / "nnet_ema.pth")
    run(tmp_path / "folder", tmp_path / "out.safetensors")
    assert holds(tmp_path / "out.safetensors", model)


def test_a_training_checkpoint_gives_its_average_or_its_weights(
    model: DiMR, other: DiMR, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    tensors = {f"ema.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"model.{name}": value for name, value in other.state_dict().items()}
    save_checkpoint(path, tensors, {"config": model.config.to_dict()})
    run(path, tmp_path / "ema.safetensors")
    run(path, tmp_path / "model.safetensors", key="model")
    assert holds(tmp_path / "ema.safetensors", model)
    assert holds(tmp_path / "model.safetensors", other)
    with pytest.raises(CheckpointError, match="key 'nnet', expected ema or model"):
        run(path, tmp_path / "out", key="nnet")


def test_the_counter_of_an_averaged_model_is_removed(model: DiMR, tmp_path: Path) -> None:
    averaged = AveragedModel(model)
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    said = run(tmp_path / "swa.pth", tmp_path / "out.safetensors")
    assert "removed `n_averaged`, the counter of an AveragedModel" in said.remarks
    assert holds(tmp_path / "out.safetensors", model)


CONFIG = """
import ml_collections
from dataclasses import dataclass

open({touched!r}, "w")

@dataclass
class Args:
    def __init__(self, **kwargs):
        for key, value in kwargs.items():
            setattr(self, key, value)

common = 3
model = Args(
    channels = 4,
    num_classes = {classes},
    block_grad_to_lowres = False,
    norm_type = "LN",
    stage_configs = [
        Args(block_type = "TransformerBlock", dim = 32, hidden_dim = 64, num_attention_heads = 4,
             num_blocks = 3, max_height = 4, max_width = 4, image_input_ratio = 1,
             input_feature_ratio = 2, final_kernel_size = 3, dropout_prob = 0),
        Args(block_type = "ConvNeXtBlock", dim = 16, hidden_dim = 32, kernel_size = 3,
             num_blocks = 3, max_height = 8, max_width = 8, image_input_ratio = 1,
             input_feature_ratio = 1, final_kernel_size = 3, dropout_prob = 0),
    ],
)

def d(**kwargs):
    return ml_collections.ConfigDict(initial_dictionary=kwargs)

def get_config():
    config = ml_collections.ConfigDict()
    config.nnet = d(name="mr", model_args=model)
    config.loss_coeffs = [1/4, 1]
    return config
"""


def test_a_published_configuration_is_read_without_executing_it(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    config = tmp_path / "DiMR-small.py"
    config.write_text(CONFIG.format(touched=str(touched), classes=11))
    # The same file, executed.
    names: dict[str, Any] = {}
    source = config.read_text().replace("import ml_collections", "")
    exec(source.partition("def d(")[0], names)
    expected = DiMRConfig.from_published(names["model"])
    touched.unlink()

    model = randomised(DiMR(expected))
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    run(tmp_path / "nnet.pth", tmp_path / "out", config=config)
    assert DiMR.from_pretrained(tmp_path / "out").config == expected
    assert holds(tmp_path / "out" / "model.safetensors", model)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONFIG.format(touched="", classes="10 * common"), r"line 16: got 10 \* common, expected"),
        ("model = 3\n", "got 0 calls with stage_configs=, expected one"),
        ("model = (\n", "not a readable configuration"),
        ("model = Args(stage_configs=[])\n", "without 'channels'"),
    ],
)
def test_an_unusable_configuration_is_named(
    model: DiMR, tmp_path: Path, text: str, message: str
) -> None:
    torch.save(model.state_dict(), tmp_path / "nnet.pth")
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config.py: .*{message}"):
        run(tmp_path / "nnet.pth", tmp_path / "out", config=tmp_path / "config.py")


def test_weights_are_read_with_the_facts_beside_them(model: DiMR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "folder", config={"classes": list("abcdef")})
    found = read_weights(tmp_path / "folder")
    assert (found.config, found.notes, found.remarks) == (
        model.config,
        {"classes": list("abcdef")},
        (),
    )
    torch.save({"a": model.state_dict()}, tmp_path / "a.pth")
    assert load_published(tmp_path / "a.pth", "a").keys() == found.weights.keys()
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["classes"][0] == "a"
