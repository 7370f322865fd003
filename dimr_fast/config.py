"""The configuration of a model, the published presets and two small ones."""

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from dimr_fast.utils.validation import require

NORM_TYPES = ("TDRMSN", "LN", "RMSN")
BLOCK_TYPES = ("TransformerBlock", "ConvNeXtBlock")


def _positive_int(config: object, name: str) -> int:
    """Check a field and convert integer-like values (numpy's) to int."""
    value = getattr(config, name)
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    require(whole and operator.index(value) > 0, name, value, "a positive integer")
    object.__setattr__(config, name, operator.index(value))
    return operator.index(value)


def _odd_int(config: object, name: str) -> None:
    value = _positive_int(config, name)
    require(value % 2 == 1, name, value, "an odd positive integer")


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """Configuration of one branch (one resolution); fields have the published names.

    A branch works at `max_height × max_width`, which is the input size divided by
    `input_feature_ratio`, and has `num_blocks // 2 · 2 + 1` blocks. Only a TransformerBlock uses
    `num_attention_heads`, only a ConvNeXtBlock `kernel_size`.

    `checkpointing` says what the backward pass computes again instead of storing it; the published
    configuration has no such field. True stores a block's input and computes the whole block again.
    "selective" also stores the results of those matrix products that backward would need to repeat
    (query, key and value, the projection after attention, the hidden layer of the MLP), and
    computes everything else again: convolution, attention, norms, casts of weights.
    """

    block_type: str
    dim: int
    hidden_dim: int
    num_blocks: int
    max_height: int
    max_width: int
    input_feature_ratio: int
    num_attention_heads: int = 1
    kernel_size: int = 7
    image_input_ratio: int = 1
    final_kernel_size: int = 3
    dropout_prob: float = 0.0
    checkpointing: bool | Literal["selective"] = False

    def __post_init__(self) -> None:
        require(self.block_type in BLOCK_TYPES, "block_type", self.block_type, f"{BLOCK_TYPES}")
        for name in ("dim", "hidden_dim", "num_blocks", "max_height", "max_width"):
            _positive_int(self, name)
        _positive_int(self, "input_feature_ratio")
        _odd_int(self, "final_kernel_size")
        if self.block_type == "ConvNeXtBlock":
            _odd_int(self, "kernel_size")
        else:
            heads = _positive_int(self, "num_attention_heads")
            divisor = f"a divisor of dim = {self.dim}"
            require(self.dim % heads == 0, "num_attention_heads", heads, divisor)
        require(
            self.image_input_ratio == 1,
            "image_input_ratio",
            self.image_input_ratio,
            "1: every branch reads the full-resolution image",
        )
        known = isinstance(self.checkpointing, bool) or self.checkpointing == "selective"
        require(known, "checkpointing", self.checkpointing, "True, False or 'selective'")
        number = isinstance(self.dropout_prob, int | float) and 0 <= self.dropout_prob < 1
        require(number, "dropout_prob", self.dropout_prob, "0 <= p < 1")


@dataclass(frozen=True, kw_only=True)
class DiMRConfig:
    """Configuration of a model: branches from low to high resolution, with the published names.

    `num_classes` includes the null class of classifier-free guidance, the last index. `norm_type`
    is the norm of the blocks: "TDRMSN" (`td_rms_norm`), "LN" (`td_layer_norm`) or "RMSN"
    (`rms_norm`). `block_grad_to_lowres` detaches the input that a branch gets from lower ones.
    Raises ValueError naming the field where a value is out of range or where a branch's size is no
    multiple of the next lower one's.
    """

    channels: int
    num_classes: int
    stage_configs: tuple[BranchConfig, ...]
    norm_type: str = "TDRMSN"
    block_grad_to_lowres: bool = False

    def __post_init__(self) -> None:
        _positive_int(self, "channels")
        _positive_int(self, "num_classes")
        require(self.norm_type in NORM_TYPES, "norm_type", self.norm_type, f"one of {NORM_TYPES}")
        some = isinstance(self.stage_configs, Sequence) and len(self.stage_configs) > 0
        require(some, "stage_configs", self.stage_configs, "a sequence of branches")
        object.__setattr__(self, "stage_configs", tuple(self.stage_configs))
        for i, branch in enumerate(self.stage_configs):
            require(
                isinstance(branch, BranchConfig), f"stage_configs[{i}]", branch, "a BranchConfig"
            )
            size = (branch.max_height, branch.max_width)
            full = tuple(s * branch.input_feature_ratio for s in size)
            require(
                full == self.image_size,
                f"stage_configs[{i}].input_feature_ratio",
                branch.input_feature_ratio,
                f"the ratio of the input size {self.image_size} to this branch's {size}",
            )
            if i > 0:
                low = self.stage_configs[i - 1]
                ratio = branch.max_height // low.max_height
                require(
                    ratio >= 1 and size == (low.max_height * ratio, low.max_width * ratio),
                    f"stage_configs[{i}].max_height, max_width",
                    size,
                    f"a multiple of the branch below, {(low.max_height, low.max_width)}",
                )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        last = self.stage_configs[-1]
        ratio = last.input_feature_ratio
        return last.max_height * ratio, last.max_width * ratio

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        return self.channels, *self.image_size

    @property
    def null_class(self) -> int:
        """Class index of the unconditional input in classifier-free guidance."""
        return self.num_classes - 1

    def fitted(self, channels: int, image_size: tuple[int, int], num_classes: int) -> Self:
        """Return the configuration for inputs of other channels and size, and other classes.

        Raises ValueError for a size that is no multiple of each branch's `input_feature_ratio`.
        """
        branches = []
        for branch in self.stage_configs:
            ratio = branch.input_feature_ratio
            divides = all(side % ratio == 0 for side in image_size)
            require(divides, "image_size", image_size, f"multiples of {ratio}")
            height, width = (side // ratio for side in image_size)
            branches.append(dataclasses.replace(branch, max_height=height, max_width=width))
        return dataclasses.replace(
            self, channels=channels, num_classes=num_classes, stage_configs=tuple(branches)
        )

    @classmethod
    def from_published(cls, config: Any) -> Self:
        """Read a published configuration: an object with these fields as attributes.

        Without `norm_type` it means "LN", as in the published model. The object is not changed.
        Fields that the published model does not read are ignored. Raises ValueError naming a field
        that is missing or out of range, or that would make another model of the published one: a
        `pe_type` other than "APE" (learned position embeddings), or `condition_dim`.
        """
        values = {"norm_type": "LN", **_read_fields(cls, config, "config", {"norm_type"})}
        positions = getattr(config, "pe_type", "APE")
        require(positions == "APE", "config.pe_type", positions, "'APE' (learned embeddings)")
        _refuse_condition(config, "config")
        stages = values["stage_configs"]
        require(isinstance(stages, Sequence), "config.stage_configs", stages, "a sequence")
        values["stage_configs"] = tuple(
            _published_branch(stage, f"config.stage_configs[{i}]") for i, stage in enumerate(stages)
        )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a configuration from the result of `to_dict`. Raises ValueError for others."""
        try:
            branches = tuple(BranchConfig(**branch) for branch in values["stage_configs"])
            return cls(**{**values, "stage_configs": branches})
        except (TypeError, KeyError) as error:
            raise ValueError(f"values: not a DiMR configuration ({error})") from error


def _published_branch(config: Any, where: str) -> BranchConfig:
    """Read one branch of a published configuration.

    The published model overwrites `norm_type` and `pe_type` of a branch: they mean nothing there.
    """
    _refuse_condition(config, where)
    transformer = getattr(config, "block_type", None) == "TransformerBlock"
    unused = "kernel_size" if transformer else "num_attention_heads"
    return BranchConfig(**_read_fields(BranchConfig, config, where, {"checkpointing", unused}))


def _refuse_condition(config: Any, where: str) -> None:
    if hasattr(config, "condition_dim"):
        raise ValueError(
            f"{where}.condition_dim: got {config.condition_dim!r}, expected no such field: "
            "this model has no attention to a text or other condition"
        )


def _read_fields(cls: type, config: Any, where: str, optional: set[str]) -> dict[str, Any]:
    """Return the fields of `cls` that `config` has. Raises ValueError for one that is missing."""
    values = {}
    for field in dataclasses.fields(cls):
        if hasattr(config, field.name):
            values[field.name] = getattr(config, field.name)
        elif field.name not in optional:
            raise ValueError(
                f"{where}: got {type(config).__name__} without {field.name!r}, expected that field"
            )
    return values


def _preset(
    channels: int,
    size: int,
    widths: tuple[int, ...],
    num_blocks: tuple[int, ...],
    heads: int,
    norm_type: str = "TDRMSN",
    num_classes: int = 1001,
    kernel_size: int = 7,
) -> DiMRConfig:
    """Return a transformer branch at the lowest resolution, ConvNeXt branches at each doubling."""
    branches = []
    for i, (width, depth) in enumerate(zip(widths, num_blocks, strict=True)):
        ratio = 2 ** (len(widths) - 1 - i)
        branches.append(
            BranchConfig(
                block_type="ConvNeXtBlock" if i else "TransformerBlock",
                dim=width,
                hidden_dim=2 * width,
                num_blocks=depth,
                max_height=size // ratio,
                max_width=size // ratio,
                input_feature_ratio=ratio,
                num_attention_heads=1 if i else heads,
                kernel_size=kernel_size,
            )
        )
    return DiMRConfig(
        channels=channels,
        num_classes=num_classes,
        stage_configs=tuple(branches),
        norm_type=norm_type,
    )


PRESETS: dict[str, DiMRConfig] = {
    "DiMR-XL/2R": _preset(4, 32, (960, 480), (39, 20), 16),
    "DiMR-G/2R": _preset(4, 32, (1152, 576), (57, 29), 16),
    "DiMR-XL/3R": _preset(4, 64, (960, 480, 240), (39, 20, 20), 16),
    "DiMR-M/3R": _preset(3, 64, (768, 384, 192), (15, 8, 8), 12, "LN"),
    "DiMR-L/3R": _preset(3, 64, (960, 480, 240), (21, 11, 11), 16, "LN"),
    "demo": _preset(3, 32, (144, 64, 32), (4, 2, 2), 4, num_classes=7),
    "tiny": _preset(3, 16, (24, 16, 8), (3, 2, 2), 2, num_classes=7, kernel_size=3),
}
"""The published models (paper table 1; the sizes of the 3R models are derived from their parameter
counts), `demo` for 32×32 images in 6 classes on any machine, and `tiny` for tests."""


def preset(name: str, **overrides: Any) -> DiMRConfig:
    """Return the preset `name`, with fields of `DiMRConfig` replaced by `overrides`."""
    require(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(DiMRConfig)]
    for key in overrides:
        require(key in fields, "overrides", key, f"fields of DiMRConfig: {', '.join(fields)}")
    return dataclasses.replace(PRESETS[name], **overrides)


def preset_of(config: DiMRConfig) -> str | None:
    """Return the name of the preset that equals `config` except for `num_classes`, or None."""
    for name, known in PRESETS.items():
        if dataclasses.replace(known, num_classes=config.num_classes) == config:
            return name
    return None
