# %% [markdown]
# # The whole job, in Python
#
# Photographs become latents, a model learns them, is stopped and goes on, draws, is scored and
# saved; then satellite tiles, the same without an autoencoder. All of it at sizes that take about
# a minute on two processor cores, so what is drawn here is no picture yet: the numbers in the
# second cell are what makes the difference.
#
# As a script: `python docs/walkthrough.py FOLDER`, with a folder that does not exist yet. As a
# notebook: paste the cells, or open this file in an editor that knows `# %%`.
#
# It needs `pip install -e '.[demo,train,eval,hub]'` and, for its photographs,
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
from dimr_fast.sampling import ImageSampler, SampleConfig, Sampler, balanced_labels, sample
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
SAMPLER = Sampler(steps=8)  # Sampler(steps=250, guidance=0.4) for published scores
PER_CLASS = 10  # 50 of each of 1000 classes for published scores

# %% [markdown]
# ## Photographs
#
# A folder with a sub-folder for each class is all that the data needs to be. Here it is made of the
# 20 ImageNet photographs inside a package, which is found and not imported; ten each are called a
# class, so the classes mean nothing.

# %%
package = Path(importlib.util.find_spec("foolbox").origin).parent
photographs = sorted(package.glob("data/imagenet_*.jpg"))
for name, files in {"first": photographs[:10], "second": photographs[10:]}.items():
    (work / "photographs" / name).mkdir(parents=True)
    for file in files:
        shutil.copy(file, work / "photographs" / name)

# %% [markdown]
# What is drawn later will be compared with them as the model saw them: cut to squares.

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
# The autoencoder is a small one with random weights. It stands for `stabilityai/sd-vae-ft-mse`,
# whose name can be given in place of the folder: it has the same layers and the same latents, and
# needs no download. Pictures that it decodes mean nothing.

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
# Interrupted, the same call goes on. With many GPUs, from the shell, a process for each:
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
# Ctrl-C, or the stop button of a notebook, ends a run after the step in progress and loses nothing.
# Here a thread presses it as soon as the run has logged something.
#
# On several processes, from the shell; a run may go on with another number of them:
#
#     torchrun --nproc-per-node 8 -m dimr_fast.training.run --config imagenet256_xl2r \
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
# It goes on where it was, also after `kill -9`, then from the newest checkpoint, which is always
# whole. On a CPU it ends with the same bits as a run that nobody stopped.

# %%
trained = train(run, resume=True)
print(trained.sentence(run))

# %% [markdown]
# ## Samples
#
# Drawn with the moving average of the weights. `grid.png` has a row for each class; `samples.npz`
# is for `evaluate`, and for the ADM evaluation suite. On several processes, from the shell:
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
# Twenty images against twenty say nothing of the model, neither by the distance, whose features
# have 1280 dimensions, nor by precision and recall, where three neighbours of twenty are nearly
# everything. This shows how a score is made, and that all it depends on is printed with it. Take
# 50,000 images, and Inception's weights for a FID: `docs/evaluation.md`.

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
# A folder of weights, configuration and a model card with the recipe and the scores. `hf upload`
# takes it to the Hub as it is.

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
# The same in pixels: satellite pictures from a package, in six classes, and no autoencoder.

# %%
tile_run = TrainConfig(
    output=work / "tile-run", data="tiles", preset=TILE_PRESET, minutes=None, steps=TILE_STEPS
)
print(train(tile_run).sentence(tile_run))

# %% [markdown]
# This time the images are drawn into memory. `ImageSampler` is built once for many calls.

# %%
tile_model = load_model(tile_run.output / "checkpoint.safetensors")
labels = balanced_labels(PER_CLASS * len(tile_model.classes), len(tile_model.classes))
images = ImageSampler(tile_model, SAMPLER)(labels)  # uint8 [N, 3, h, w]; labels go round
rows = images.unflatten(0, (PER_CLASS, len(tile_model.classes))).transpose(0, 1)
image_grid(rows, tile_model.classes, work / "tiles.png")

# %% [markdown]
# Beside as many training images and as much noise, the distance can be read: good samples come
# close to the training images. The features are another network's than those of FID, so it is none.

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
# `from_pretrained` takes a folder or a name on the Hub and gives the bare model;
# `optimize_for_inference` a copy with packed weights that computes the same, faster.

# %%
model = DiMR.from_pretrained(tile_folder)
fast = optimize_for_inference(model, torch.float32)
x = torch.randn(2, model.config.channels, *model.config.image_size)
y = torch.tensor([0, model.config.null_class])  # polar coast, and no class
condition = DiscreteSchedule().condition(torch.tensor([500, 500]))
with torch.inference_mode():
    low_to_high = model(x, log_snr=condition, y=y)
    (noise,) = fast(x, log_snr=condition, y=y, last_only=True)
print(f"largest difference: {(noise - low_to_high[-1]).abs().max():.1e}")

# %% [markdown]
# `load_model` also gives classes and scale, as drawing needs them. The same labels and seed give
# the same images.

# %%
again = ImageSampler(load_model(tile_folder), SAMPLER)(labels)
print(f"drawn again: {'the same' if torch.equal(again, images) else 'other'} images")

# %%
for what, path in {
    "latents": work / "latents",
    "run on latents, with loss.png and log.jsonl": run.output,
    "samples of it, which mean nothing": drawn[0],
    "scores and their recipe": work / "scores" / "evaluation.json",
    "model of the photographs": photograph_model,
    "run on tiles": tile_run.output,
    "samples of it": work / "tiles.png",
    "model of the tiles, with its card in README.md": tile_folder,
}.items():
    print(f"{what}: {path}")
