"""Draw images from a trained model as a diffusers pipeline."""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import huggingface_hub
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor

from dimr_fast.checkpoint import TrainedModel, local_model
from dimr_fast.data.imagenet import imagenet_labels
from dimr_fast.data.scaling import LatentScale
from dimr_fast.diffusers.model import DiMRModel
from dimr_fast.diffusers.scheduler import DiMRScheduler, alphas_cumprod, time_of
from dimr_fast.diffusion import ConstantGuidance, guided, noise_schedule
from dimr_fast.errors import CheckpointError
from dimr_fast.hub.mixin import DOWNLOAD
from dimr_fast.sampling.sampler import DECODER_BATCH_SIZE, SamplerConfig
from dimr_fast.utils.files import write_atomically
from dimr_fast.utils.validation import require

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CUSTOM_PIPELINE = "pipeline.py"
"""The file of a pipeline's folder that diffusers takes the class of a custom pipeline from."""
_CODE = '''"""The class that DiffusionPipeline.from_pretrained makes with custom_pipeline."""

from dimr_fast.diffusers import DiMRPipeline  # noqa: F401
'''


class DiMRPipeline(DiffusionPipeline):
    """Draw images of classes with a trained DiMR.

    `transformer` is the model, `scheduler` ours or any of diffusers that takes predicted noise; by
    default the solver that `dimr-fast sample` uses for this model. `vae` decodes the latents of a
    latent model; a pixel model has none.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["scheduler", "vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    transformer: DiMRModel
    vae: AutoencoderKL | None
    scheduler: Any

    def __init__(
        self,
        transformer: DiMRModel,
        scheduler: SchedulerMixin | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        if scheduler is None:
            scheduler = default_scheduler(transformer.trained)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load the folder of a pipeline, a model folder, a checkpoint, or a repository of the Hub.

        Of a model folder (of `dimr-fast export`) and of a training checkpoint it makes a pipeline
        with the default scheduler; `dtype`, `scheduler` and `vae` are its options. For those of a
        pipeline see diffusers. A repository holds one of the two folders; its options are those of
        `DiMR.from_pretrained`. Raises the errors of `load_model`, of diffusers and of the Hub.
        """
        path = local_model(Path(pretrained_model_name_or_path))
        if not path.exists():
            options = {name: kwargs.pop(name) for name in DOWNLOAD if name in kwargs}
            name = str(pretrained_model_name_or_path)
            try:
                path = Path(huggingface_hub.snapshot_download(name, **options))
            except HFValidationError as error:
                raise CheckpointError(f"{name}: no such file or folder") from error
        if (path / cls.config_name).is_file():
            return super().from_pretrained(str(path), **kwargs)
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        return cls(DiMRModel.from_pretrained(path, **dtype), **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write `model_index.json`, a folder for each component, and `pipeline.py` for diffusers.

        `transformer/` is a model folder, which `load_model` and `dimr-fast sample` read, too.
        Options are those of diffusers.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # First, because diffusers may upload the folder.
        write_atomically(folder / CUSTOM_PIPELINE, lambda part: part.write_text(_CODE))
        super().save_pretrained(str(save_directory), *args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Raise NotImplementedError: the model's weights are packed as a whole."""
        raise NotImplementedError(
            "enable_sequential_cpu_offload: not possible for DiMR; use enable_model_cpu_offload"
        )

    @property
    def labels(self) -> dict[str, int]:
        """The label of each class name; ImageNet's names if the model has only their numbers."""
        classes = self.transformer.trained.classes
        return {name: label for label, name in enumerate(classes)} | imagenet_labels(classes)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Return the labels of class names. Raises ValueError for a name that is none."""
        labels = self.labels
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            if name not in labels:
                near = difflib.get_close_matches(name, labels) or [*labels][:10]
                known = ", ".join(near)
                raise ValueError(
                    f"label: got {name!r}, expected a class of the model, such as {known}"
                )
        return [labels[name] for name in names]

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt` to end the sampling after its step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label.

        Args:
            class_labels: labels of the images; the number of classes is the label for "no class".
            guidance_scale: 1 means no guidance, 0 images without class. It is the `guidance` of
                `SamplerConfig` plus 1. None: the default of the model.
            generator: draws the start noise; or a list with one for each image. The clamping of
                `SamplerConfig.noise_limit` is that of the model's default.
            num_inference_steps: as the scheduler counts. For `DiMRScheduler` these are network
                evaluations. None: the default of the model.
            output_type: "pil", "np" (float `[N, H, W, 3]` in 0..1), "pt" (float `[N, 3, H, W]` in
                0..1), or "latent", the model's output `[N, C, h, w]`.
            return_dict: return an `ImagePipelineOutput`, whose `images` are the result, or a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": x})` after
                each step; the state continues with the "latents" in the dict that it returns. It
                ends the sampling by `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of the tensors that it gets.

        Raises ValueError naming an argument or component that does not fit, before any work, and
        FloatingPointError for images that are not finite.
        """
        trained = self.transformer.trained
        settings = default_settings(trained)
        steps = settings.steps if num_inference_steps is None else num_inference_steps
        guidance = settings.guidance if guidance_scale is None else guidance_scale - 1
        labels = self._labels(class_labels)
        self._check(len(labels), steps, guidance_scale, generator, output_type)
        for name in callback_on_step_end_tensor_inputs:
            known = name in self._callback_tensor_inputs
            require(known, "callback_on_step_end_tensor_inputs", name, "only latents")
        config, device = trained.model.config, self._execution_device
        self.transformer.refresh()
        self._interrupt = False

        limit = cast(float, settings.noise_limit)
        shape = (len(labels), *config.shape)
        # The state stays in float32, whatever the model computes in.
        x = randn_tensor(shape, generator, device, torch.float32).clamp(-limit, limit)
        predict = guided(
            self.transformer,
            labels.to(device),
            config.null_class,
            ConstantGuidance(cast(float, guidance)),
            condition=noise_schedule(trained.schedule).condition_at,
        )
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
        draws = "generator" in inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generator} if draws else {}
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, timestep in enumerate(scheduler.timesteps):
                noise = predict(scheduler.scale_model_input(x, timestep), time_of(timestep))
                (x, *_) = scheduler.step(noise, timestep, x, return_dict=False, **options)
                if callback_on_step_end is not None:
                    tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    x = callback_on_step_end(self, i, timestep, tensors).get("latents", x)
                bar.update()
                if self._interrupt:
                    break
        if not x.isfinite().all():
            raise FloatingPointError(
                f"images: not finite in {self.transformer.dtype}: the weights are not finite, or "
                "the range is too small"
            )
        images = x if output_type == "latent" else _converted(self._pixels(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, given: Any) -> Tensor:
        null = self.transformer.trained.model.config.null_class
        try:
            labels = torch.as_tensor(given).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            labels = torch.empty(0)
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        fits = whole and len(labels) > 0 and bool(((labels >= 0) & (labels <= null)).all())
        wanted = f"labels in 0..{null}, where {null} means no class; see get_label_ids for names"
        require(fits, "class_labels", given, wanted)
        return labels.long()

    def _check(
        self, count: int, steps: Any, scale: float | None, generator: Any, output_type: str
    ) -> None:
        """Raise ValueError naming an argument or component that does not fit the model."""
        trained = self.transformer.trained
        whole = isinstance(steps, int) and steps > 0
        require(whole, "num_inference_steps", steps, "a whole number of at least 1, or None")
        finite = scale is None or 0 <= scale < math.inf
        require(finite, "guidance_scale", scale, "a finite number, 0 or more")
        fits = not isinstance(generator, list) or len(generator) == count
        require(fits, "generator", generator, f"one, or a list of {count}, as images")
        require(output_type in OUTPUT_TYPES, "output_type", output_type, f"one of {OUTPUT_TYPES}")
        _check_scheduler(self.scheduler, trained)
        if trained.evaluations is not None:
            wanted = f"{trained.evaluations}, which the model was distilled for"
            require(steps == trained.evaluations, "num_inference_steps", steps, wanted)
            wanted = "1: the model was distilled for images without guidance"
            require(scale in (None, 1), "guidance_scale", scale, wanted)
        latents = isinstance(trained.scale, LatentScale)
        if self.vae is None:
            pixels = not latents or output_type == "latent"
            require(
                pixels, "vae", None, "an AutoencoderKL to decode latents, or output_type latent"
            )
            return
        require(latents, "vae", type(self.vae).__name__, "None for a model that draws pixels")
        found = self.vae.config.latent_channels, LatentScale(self.vae.config.scaling_factor)
        require(
            found == (trained.model.config.channels, trained.scale),
            "vae",
            found,
            f"the model's {trained.model.config.channels} channels and {trained.scale}",
        )

    def _pixels(self, x: Tensor) -> Tensor:
        """Return images in 0..255, not yet rounded and clamped, from the model's outputs."""
        scale = self.transformer.trained.scale
        if not isinstance(scale, LatentScale):
            return x * scale.std + scale.mean
        vae: Any = self.vae
        z = (scale.to_latents(x) + (vae.config.shift_factor or 0.0)).to(vae.dtype)
        parts = [vae.decode(part).sample.float() for part in z.split(DECODER_BATCH_SIZE)]
        return torch.cat(parts) * 127.5 + 127.5


def _converted(pixels: Tensor, output_type: str) -> Any:
    """Return images, float [N, 3, H, W] in about 0..255, in the form of `output_type`."""
    if output_type == "pt":
        return (pixels / 255).clamp(0, 1)
    pixels = pixels.permute(0, 2, 3, 1).cpu()
    if output_type == "np":
        return (pixels / 255).clamp(0, 1).numpy()
    return [Image.fromarray(image) for image in pixels.round().clamp(0, 255).byte().numpy()]


def default_settings(trained: TrainedModel) -> SamplerConfig:
    """Return the settings that `dimr-fast sample` uses for the model, but for its precision."""
    return SamplerConfig(precision="fp32").resolved(trained, torch.device("cpu"))


def default_scheduler(trained: TrainedModel) -> DiMRScheduler:
    """Return the solver that `dimr-fast sample` uses for the model."""
    settings = default_settings(trained)
    clip = trained.scale.range if settings.clip else None
    return DiMRScheduler(
        schedule=trained.schedule, solver=settings.solver, spacing=settings.spacing, clip=clip
    )


def _check_scheduler(scheduler: Any, trained: TrainedModel) -> None:
    """Raise ValueError unless the scheduler has the model's noise schedule and takes noise."""
    name, config, schedule = type(scheduler).__name__, scheduler.config, trained.schedule
    if isinstance(scheduler, DiMRScheduler):
        found = f"{name} of schedule {config.schedule}, solver {config.solver}"
        require(config.schedule == schedule, "scheduler", found, f"the model's schedule {schedule}")
        fits = trained.evaluations is None or (config.solver, config.spacing) == ("ddim", "log_snr")
        require(fits, "scheduler", found, "solver ddim, spacing log_snr: the model was distilled")
        return
    require(trained.evaluations is None, "scheduler", name, "DiMRScheduler: the model is distilled")
    # Others have no such tables, and would not get them either.
    discrete = hasattr(scheduler, "alphas_cumprod")
    hint = f"; make it by {name}.from_config(DiMRScheduler(schedule={schedule!r}).config)"
    hint = hint if discrete else ", as DDIMScheduler and others of discrete steps do"
    kind = config.get("prediction_type")
    found = f"{name} of prediction_type {kind}"
    require(kind == "epsilon", "scheduler", found, f"one that takes epsilon{hint}")
    ours = alphas_cumprod(noise_schedule(schedule))
    theirs = torch.as_tensor(getattr(scheduler, "alphas_cumprod", 0.0)).cpu().double()
    same = theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-3, atol=1e-6)
    found = f"{name} of another noise schedule"
    require(same, "scheduler", found, f"one that takes the model's{hint}")
    if config.get("clip_sample"):
        needed = max(map(abs, trained.scale.range or (math.inf,)))
        found = f"clip_sample to ±{config.clip_sample_range}"
        fits = config.clip_sample_range >= needed
        require(fits, "scheduler", found, f"no clip_sample, since it would change images{hint}")
