# %% [markdown]
# # The whole job, in Python
#
# Extract latents of photographs, train on them, interrupt and resume the training, draw samples,
# score them and save the model. Then train on satellite tiles, without an autoencoder. At these
# sizes everything takes about a minute on two processor cores, and the images are not recognisable
# yet: for real runs, change the numbers in the second cell.
#
# As a script: `python docs/walkthrough.py FOLDER`, where FOLDER does not exist yet. As a notebook:
# paste the cells, or open this file in an editor that supports `# %%`.
#
# It needs `pip install -e '.[demo,train,eval,hub]'` and, for the photographs,
# `pip install --no-deps foolbox==3.3.4`.

# %%
import dataclasses
import importlib.util
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dimr_fast import DiMR, optimize_for_inference
from dimr_fast.checkpoint import load_model, save_model
from dimr_fast.data.images import list_images, read_image
from dimr_fast.data.latents import LatentShards
from dimr_fast.data.tiles import load_tiles
from dimr_fast.diffusion import DiscreteSchedule
from dimr_fast.evaluation import EvaluateConfig, evaluate, frechet_scores
from dimr_fast.evaluation.features import EfficientNetLite0Features
from dimr_fast.export import ExportConfig, export
from dimr_fast.extraction import ExtractConfig, extract
from dimr_fast.sampling import (
    ImageSampler,
    SampleConfig,
    SamplerConfig,
    balanced_labels,
    sample,
)
from dimr_fast.sampling.writers import write_png
from dimr_fast.training import TrainConfig, train
from dimr_fast.utils.plots import image_grid

work = Path(sys.argv[1])  # in a notebook: Path("runs/walkthrough")
work.mkdir(parents=True)

# %%
IMAGE_SIZE = 64  # 256, or 512
LATENT_PRESET = "tiny"  # "DiMR-XL/2R" or "DiMR-G/2R" for 256 pixels, "DiMR-XL/3R" for 512
LATENT_STEPS = 200  # 1_000_000, as published
LATENT_BATCH = 8  # 1024, over all processes
LATENT_RATE = 4e-3  # 2e-4
TILE_PRESET = "tiny"  # "demo": 32x32 pixels instead of 16x16
TILE_STEPS = 300  # 3_500, ten minutes of "demo" on two cores
SAMPLER = SamplerConfig(steps=8)  # SamplerConfig(steps=250, guidance=0.4) for published scores
PER_CLASS = 10  # 50 of each of 1000 classes for published scores

# %% [markdown]
# ## Photographs
#
# Training data is a folder with a sub-folder for each class. This one contains 20 ImageNet
# photographs of a package, which is located but not imported. Ten of them form each class, so the
# classes have no meaning.

# %%
package = Path(importlib.util.find_spec("foolbox").origin).parent
photographs = sorted(package.glob("data/imagenet_*.jpg"))
for name, files in {"first": photographs[:10], "second": photographs[10:]}.items():
    (work / "photographs" / name).mkdir(parents=True)
    for file in files:
        shutil.copy(file, work / "photographs" / name)

# %% [markdown]
# Samples will be compared with the photographs as the model sees them: cropped to squares.

# %%
found = list_images(work / "photographs")
for name in found.names:
    square = read_image(found.root / name, IMAGE_SIZE)  # uint8 [3, s, s]
    target = (work / "squares" / name).with_suffix(".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_png(square.permute(1, 2, 0).numpy(), target)
print(f"{len(found.names)} images of the classes {found.classes}")

# %% [markdown]
# ## Latents
#
# A small autoencoder with random weights takes the place of `stabilityai/sd-vae-ft-mse`, whose name
# can be given instead of the folder. It has the same kinds of layers and the same shape of latents,
# and needs no download. It decodes to noise.

# %%
torch.manual_seed(0)
AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(8, 16, 16, 16),
    norm_num_groups=4,
).save_pretrained(work / "autoencoder")
autoencoder = str(work / "autoencoder")

# %% [markdown]
# After an interruption the same call resumes. On the command line, with one process per GPU:
#
#     dimr-fast extract --images imagenet/train --autoencoder stabilityai/sd-vae-ft-mse \
#         --output latents

# %%
extracted = extract(
    ExtractConfig(
        images=work / "photographs",
        autoencoder=autoencoder,
        output=work / "latents",
        image_size=IMAGE_SIZE,
        processes=1,
    )
)
print(extracted.sentence())
latents = LatentShards(work / "latents")
print(f"{len(latents)} latents of {latents.shape}, scaled with {latents.scale}")

# %% [markdown]
# ## Training, interrupted
#
# Ctrl-C, or the stop button of a notebook, ends a run after the current step and loses nothing.
# Here a thread sends that signal as soon as the run has logged a step.
#
# On the command line, with several processes; a run may be resumed with another number of them:
#
#     torchrun --nproc-per-node 8 -m dimr_fast.training --config imagenet256_xl2r \
#         --output runs/xl2r --set data=latents

# %%
run = TrainConfig(
    output=work / "run",
    data=str(work / "latents"),
    preset=LATENT_PRESET,
    minutes=None,
    steps=LATENT_STEPS,
    batch_size=LATENT_BATCH,
    learning_rate=LATENT_RATE,
    log_steps=20,
)


def press_ctrl_c() -> None:
    log = run.output / "log.jsonl"
    while not log.exists() or log.stat().st_size == 0:
        time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)


threading.Thread(target=press_ctrl_c, daemon=True).start()
stopped = train(run)
print(stopped.sentence(run))

# %% [markdown]
# Resume from the newest checkpoint, which is always complete, even after `kill -9`. On a CPU the
# run ends with the same bits as a run without an interruption.

# %%
trained = train(run, resume=True)
print(trained.sentence(run))

# %% [markdown]
# ## Samples
#
# Samples are drawn with the EMA weights. `grid.png` has a row for each class; `samples.npz` is for
# `evaluate` and for the ADM evaluation suite. On the command line, with several processes:
#
#     dimr-fast sample --checkpoint runs/xl2r/checkpoint.safetensors --output samples \
#         --count 50000 --formats npz --autoencoder stabilityai/sd-vae-ft-mse --processes 8

# %%
drawn = sample(
    SampleConfig(
        checkpoint=run.output / "checkpoint.safetensors",
        output=work / "samples",
        processes=1,
        per_class=PER_CLASS,
        formats=("grid", "npz"),
        autoencoder=autoencoder,
        sampler=SAMPLER,
    )
)

# %% [markdown]
# ## Scores
#
# Scores of twenty images against twenty have no meaning: the features have 1280 dimensions, and the
# three nearest neighbours of precision and recall are a large part of twenty. This cell shows how
# to compute a score, and that its recipe is printed with it. For FID, use 50,000 images and the
# weights of Inception: `docs/evaluation.md`.

# %%
scores = evaluate(
    EvaluateConfig(
        images=work / "samples" / "samples.npz",
        reference=str(work / "squares"),
        output=work / "scores",
        cache=work / "cache",
    )
)
print(scores)

# %% [markdown]
# ## A model to share
#
# Export a folder with weights, configuration and a model card that states recipe and scores.
# `hf upload` uploads it to the Hub as it is.

# %%
photograph_model = export(
    ExportConfig(
        checkpoint=run.output / "checkpoint.safetensors",
        output=work / "models" / "photographs",
        scores=work / "scores" / "evaluation.json",
        pictures=(work / "samples" / "grid.png",),
    )
)

# %% [markdown]
# ## Tiles
#
# The same for a model of pixels: satellite tiles of a package, in six classes.

# %%
tile_run = TrainConfig(
    output=work / "tile-run", data="tiles", preset=TILE_PRESET, minutes=None, steps=TILE_STEPS
)
print(train(tile_run).sentence(tile_run))

# %% [markdown]
# Draw images in memory. Construct an `ImageSampler` once for many calls.

# %%
tile_model = load_model(tile_run.output / "checkpoint.safetensors")
labels = balanced_labels(PER_CLASS * len(tile_model.classes), len(tile_model.classes))
images = ImageSampler(tile_model, SAMPLER)(labels)  # uint8 [N, 3, h, w]; labels cycle
rows = images.unflatten(0, (PER_CLASS, len(tile_model.classes))).transpose(0, 1)
image_grid(rows, tile_model.classes, work / "tiles.png")

# %% [markdown]
# Compare the distance of the samples with those of as many training images and of noise: the
# distance of good samples is close to that of training images. It uses another network than FID, so
# it is not FID.

# %%
tiles = load_tiles(images.shape[-1])
tile_scores = frechet_scores(
    EfficientNetLite0Features(), images, tiles.train_images, tiles.val_images[::4]
)
print(tile_scores)

# %%
tile_folder = work / "models" / "tiles"
save_model(
    tile_model,
    tile_folder,
    recipe=tile_run.to_dict(),
    scores=dataclasses.asdict(tile_scores),
    pictures=[work / "tiles.png"],
)

# %% [markdown]
# ## Loaded again
#
# `from_pretrained` loads a model from a folder or from the Hub. `optimize_for_inference` returns a
# copy with packed weights that computes the same, faster.

# %%
model = DiMR.from_pretrained(tile_folder)
fast = optimize_for_inference(model, torch.float32)
x = torch.randn(2, model.config.channels, *model.config.image_size)
y = torch.tensor([0, model.config.null_class])  # polar coast, and the null class
condition = DiscreteSchedule().condition(torch.tensor([500, 500]))
with torch.inference_mode():
    low_to_high = model(x, log_snr=condition, y=y)
    (noise,) = fast(x, log_snr=condition, y=y, last_only=True)
print(f"largest difference: {(noise - low_to_high[-1]).abs().max():.1e}")

# %% [markdown]
# `load_model` also returns the classes and the input scale, which sampling needs. The same labels
# and seed give the same images.

# %%
again = ImageSampler(load_model(tile_folder), SAMPLER)(labels)
print(f"drawn again: {'the same' if torch.equal(again, images) else 'different'} images")

# %%
for title, path in {
    "latents": work / "latents",
    "run on latents, with loss.png and log.jsonl": run.output,
    "samples of it (noise)": drawn[0],
    "scores and their recipe": work / "scores" / "evaluation.json",
    "model of the photographs": photograph_model,
    "run on tiles": tile_run.output,
    "samples of it": work / "tiles.png",
    "model of the tiles, with its card in README.md": tile_folder,
}.items():
    print(f"{title}: {path}")
