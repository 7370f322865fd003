"""The scores of samples over the number of network evaluations, and how they are shown."""

from pathlib import Path

import pytest

from benchmarks.model import guidance, sampling_curve
from benchmarks.report.sampling import (
    cost_of_an_image,
    draw_sampling_curve,
    guidance_text,
    sampling_text,
)
from dimr_fast.checkpoint import demo_model, load_model
from dimr_fast.data.tiles import load_tiles
from dimr_fast.evaluation import EfficientNetLite0Features, TensorImages, compute_statistics
from dimr_fast.sampling import balanced_labels

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


def test_a_sentence_says_what_an_image_costs() -> None:
    scores = {"precision": 0.5, "recall": 0.2}
    rows = [
        {"solver": s, "spacing": t, "guidance": g, "steps": n, "frechet": d, **scores}
        for s, t, g, n, d in (
            ("dpm++2m", "log_snr", 0.0, 8, 165.8),
            ("dpm++", "time", 1.0, 25, 164.9),
        )
    ]
    rates = [
        {"guided": guided, "steps": steps, "images_per_second": rate}
        for guided, steps, rate in ((False, 8, 90.4), (True, 25, 13.6))
    ]
    text = cost_of_an_image({"count": 768, "rows": rows, "rates": rates})
    assert "draws 90 images a second" in text
    assert "distance of 166. With 25 guided evaluations it draws 14, and" in text
    assert "solver reaches 165 (768 samples)" in text
    assert cost_of_an_image({"count": 768, "rows": rows}) == "Not measured yet."


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
