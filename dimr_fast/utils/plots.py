"""Labelled image grids and loss curves as PNG files."""

import math
import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dimr_fast.errors import DataUnavailableError
from dimr_fast.utils.files import write_atomically

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
FONT_SIZE = 14


def image_grid(
    images: torch.Tensor, row_names: Sequence[str], path: str | os.PathLike[str], scale: int = 3
) -> None:
    """Write images uint8 [rows, columns, 3, h, w] as a PNG, with the name of each row on the left.

    Images are enlarged `scale` times without smoothing. A name in a script that no installed font
    has is replaced by the number of its row, and a text file beside the picture lists the numbers
    and names. The files are written atomically.
    Raises ValueError for another dtype or shape, or where names and rows differ in number.
    """
    if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[2] != 3:
        raise ValueError(
            f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 [R, C, 3, h, w]"
        )
    rows, columns, _, height, width = images.shape
    if len(row_names) != rows:
        raise ValueError(f"row_names: got {len(row_names)}, expected one for each of {rows} rows")
    gap = 2
    # macOS stores é as e and an accent; a font may have é only.
    names = [" ".join(unicodedata.normalize("NFC", name).split()) for name in row_names]
    fonts = [_font_for(name) for name in names]
    labels = [
        (str(row + 1), _default_font()) if font is None else (name, font)
        for row, (name, font) in enumerate(zip(names, fonts, strict=True))
    ]
    margin = math.ceil(max((font.getlength(text) for text, font in labels), default=0)) + 8
    cell_height, cell_width = height * scale + gap, width * scale + gap
    grid = Image.new("RGB", (margin + columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    for row, (text, font) in enumerate(labels):
        middle = row * cell_height + height * scale // 2
        draw.text((4, middle), text, fill="black", font=font, anchor="lm")
        for column in range(columns):
            pixels = images[row, column].permute(1, 2, 0).cpu().numpy()
            cell = Image.fromarray(pixels).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            grid.paste(cell, (margin + column * cell_width, row * cell_height))
    write_atomically(path, lambda part: grid.save(part, format="PNG"))
    if None in fonts:
        legend = "".join(f"{row}: {name}\n" for row, name in enumerate(names, 1))
        write_atomically(
            Path(path).with_suffix(".txt"), lambda part: part.write_text(legend, encoding="utf-8")
        )


def _default_font() -> Font:
    return ImageFont.load_default(size=FONT_SIZE)


@cache
def _font_for(text: str) -> Font | None:
    """Return Pillow's font or an installed one that has all characters of `text`, or None."""
    default = _default_font()
    if _has(default, text):
        return default
    try:
        from matplotlib import font_manager  # it lists the installed fonts, and has some itself
    except ModuleNotFoundError:
        return None
    # Upright text of medium weight first. Last Resort draws a placeholder for every script.
    entries = sorted(
        (e for e in font_manager.fontManager.ttflist if not e.name.startswith("Last Resort")),
        key=lambda entry: (entry.style != "normal", entry.weight != 400, "Sans" not in entry.name),
    )
    for entry in entries:
        try:
            font = ImageFont.truetype(entry.fname, FONT_SIZE)
            if _has(font, text):
                return font
        except OSError:  # a font of bitmaps in other sizes
            continue
    return None


def _has(font: Font, text: str) -> bool:
    """Return whether a font has a glyph for every character, not the box for missing ones."""
    missing = bytes(font.getmask("\U0010ffff"))  # no character, by definition
    return all(bytes(font.getmask(letter)) != missing for letter in text if not letter.isspace())


def loss_curve(losses: Sequence[float], path: str | os.PathLike[str]) -> None:
    """Plot the loss of every step and its running mean over a twentieth of the run, as a PNG.

    The file is written atomically.
    Raises ValueError without a loss, and DataUnavailableError where matplotlib is missing.
    """
    if len(losses) == 0:
        raise ValueError("losses: got none, expected one for each step")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.asarray(losses, dtype=np.float64)
    steps = np.arange(1, len(values) + 1)
    span = max(1, len(values) // 20)
    smooth = np.convolve(values, np.full(span, 1 / span), mode="valid")

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, values, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[span - 1 :], smooth, color="tab:blue", label=f"mean of {span} steps")
    if (values > 0).all():
        axes.set_yscale("log")
    axes.set(xlabel="training step", ylabel="loss")
    axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(path, lambda part: canvas.print_png(part))


def require_matplotlib() -> None:
    """Raise DataUnavailableError where matplotlib, which `loss_curve` needs, is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataUnavailableError("the matplotlib package") from error
