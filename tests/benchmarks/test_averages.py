"""The scores of a run's averages: their points, their weights, and how they are shown."""

from pathlib import Path

import torch

from benchmarks.model import averages
from benchmarks.report.sampling import averages_text
from dimr_fast.checkpoint import load_model
from dimr_fast.inference import optimize_for_inference
from dimr_fast.sampling import balanced_labels
from dimr_fast.training import CHECKPOINT
from dimr_fast.training.averages import average_weights
from tests.support.training import small_run, train_on_plain_images


def test_every_point_is_there_once() -> None:
    points = [tuple(point.values()) for point in averages.points()]
    assert len(set(points)) == len(points)
    assert (1.0, averages.GUIDED, None, 0.0) in points


def test_a_point_draws_with_its_averages(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path, average_steps=2, steps=6))
    checkpoint = tmp_path / CHECKPOINT
    trained = load_model(checkpoint)
    sampler = averages.sampler_of_averages(checkpoint)
    sampling = {**averages.SOLVER, "steps": 2, "guidance": 0.0}
    point = {"phase": 2 / 3, "length": 0.07, "guide": (1.0, 0.1), "strength": 0.5}
    draw = sampler(trained, sampling, point)

    def prediction(step: int, length: float) -> torch.Tensor:
        trained.model.load_state_dict(average_weights(checkpoint, length, step))
        network = optimize_for_inference(trained.model, torch.float32)
        return network(x, log_snr=condition, y=y)[-1]

    x = torch.randn(3, *trained.model.config.shape)
    y, condition = balanced_labels(3, len(trained.classes)), torch.tensor([0.5])
    with torch.inference_mode():
        main, guide = prediction(4, 0.07), prediction(6, 0.1)
        found = draw.network(x, log_snr=condition, y=y)[-1].float()
    assert not torch.allclose(main, guide)
    torch.testing.assert_close(found, main + 0.5 * (main - guide), rtol=0.02, atol=0.02)


def test_the_tables_show_the_scores() -> None:
    scores = {"precision": 0.5, "recall": 0.25, "evaluations": 8.0}
    rows = [
        {"phase": phase, "length": length, "guide": None, "strength": 0.0, "frechet": 100 * phase}
        | scores
        for phase in (0.5, 1.0)
        for length in (0.05, 0.1)
    ]
    guided = {"phase": 1.0, "length": 0.05, "guide": [0.25, 0.1], "strength": 0.5}
    rows.append(guided | scores | {"frechet": 91.26, "evaluations": 16.0})
    text = averages_text({"device": "CPU", "count": 768, "recipe": "a network", "rows": rows})
    assert "| of the run | length 0.05 | length 0.1 |" in text
    assert "| 50% | 50.0 | 50.0 |" in text
    assert "| 25% | 0.1 | 0.5 | 16 | 91.3 | 0.500 | 0.250 |" in text
