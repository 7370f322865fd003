"""The scores of samples over the number of network evaluations, and how they are shown."""

from pathlib import Path

import pytest

from benchmarks.model import guidance, sampling_curve
from benchmarks.report.sampling import (
    draw_sampling_curve,
    guidance_text,
    sampling_text,
)
from dimr_fast.checkpoint import demo_model, load_model
from dimr_fast.data.tiles import load_tiles
from dimr_fast.evaluation import EfficientNetLite0Features, TensorImages, compute_statistics
from dimr_fast.sampling import balanced_labels
from dimr_fast.utils.tensors import sha256_of_named

ROWS = [
    {
        "solver": solver,
        "spacing": spacing,
        "guidance": guidance,
        "steps": steps,
        "frechet": 170.0 + 100 / steps,
        "precision": 0.5,
        "recall": 0.25,
    }
    for solver, spacing, guidance in (("dpm++2m", "log_snr", 0.5), ("dpm++", "time", 0.0))
    for steps in (1, 8)
]
REPORT = {
    "weights_sha256": "0" * 64,
    "device": "CPU",
    "count": 768,
    "recipe": "a network",
    "rows": ROWS,
    "rates": [
        {"guided": guided, "steps": steps, "images_per_second": 300 / steps / (1 + guided)}
        for guided in (True, False)
        for steps in (1, 8)
    ],
}


def test_every_point_is_there_once_and_every_solver_has_a_curve() -> None:
    points = [tuple(point.values()) for point in sampling_curve.points()]
    assert len(set(points)) == len(points)
    assert {point[:2] for point in points} == {
        (solver, spacing) for solver in sampling_curve.SOLVERS for spacing in ("time", "log_snr")
    }
    assert ("dpm++2m", "log_snr", 0.0, 8) in points  # what `dimr-fast sample` draws by default
    assert ("dpm++", "time", 1.0, 25) in points  # what it drew in earlier versions


def test_a_point_is_drawn_and_scored() -> None:
    features = EfficientNetLite0Features()
    reference = compute_statistics(features, TensorImages(load_tiles().val_images[:64], "tiles"))
    point = {"solver": "dpm++2m", "spacing": "log_snr", "guidance": 0.0, "steps": 2}
    trained, labels = load_model(demo_model()), balanced_labels(24, 6)
    draw = sampling_curve.sampler_of(trained, {}, point)
    row = sampling_curve.score(draw, labels, features, reference)
    assert row["frechet"] > 0
    assert 0 <= row["precision"] <= 1
    assert 0 <= row["recall"] <= 1
    assert row["evaluations"] == 2
    guided = {"guidance": 0.5, "guidance_interval": (0.0, 0.8)}
    draw = sampling_curve.sampler_of(trained, {}, point | guided)
    row = sampling_curve.score(draw, labels, features, reference)
    assert row["evaluations"] == 3  # at time 1 the model is evaluated once


def test_results_say_whether_they_are_of_the_packaged_weights() -> None:
    packaged = sha256_of_named(load_model(demo_model()).model.state_dict())
    for weights, words in (
        (packaged, "768 samples of the packaged model"),
        ("0" * 64, "768 samples of an earlier packaged model"),
    ):
        assert words in sampling_text(REPORT | {"weights_sha256": weights})


def test_every_guidance_is_there_once() -> None:
    points = [tuple(point.values()) for point in guidance.points()]
    assert len(set(points)) == len(points)
    assert (0.5, (0.0, 1.0)) in points


def test_the_table_of_guidance_shows_the_scores() -> None:
    scores = {"frechet": 168.04, "precision": 0.5, "recall": 0.25, "evaluations": 12.0}
    report = {
        "device": "CPU",
        "count": 768,
        "recipe": "a network",
        "weights_sha256": "0" * 64,
        "sampling": guidance.SOLVER,
        "rows": [{"guidance": 0.5, "guidance_interval": [0.2, 1.0], **scores}],
    }
    assert "| 0.5 | 0.2..1 | 12 | 168.0 | 0.500 | 0.250 |" in guidance_text(report)


@pytest.mark.parametrize("timed", [True, False])
def test_tables_and_plot_show_the_scores(tmp_path: Path, timed: bool) -> None:
    report = REPORT if timed else {k: v for k, v in REPORT.items() if k != "rates"}
    text = sampling_text(report)
    assert "| dpm++2m, log_snr, guidance 0.5 | 270.0 | 182.5 |" in text
    assert ("| with guidance | 150 | 18.8 |" in text) == timed
    draw_sampling_curve(report, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 0
