"""What a run logs and draws on the way."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dimr_fast.training.log import TrainLog
from tests.support.files import file_size_limit
from tests.support.image_files import random_images, write_folder
from tests.support.training import log_lines, small_run, train_on_plain_images


def test_the_log_has_one_line_per_interval_also_after_a_kill(tmp_path: Path) -> None:
    train_on_plain_images(small_run(tmp_path, log_steps=2, tensorboard=True))
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    names = {"loss", "gradient_norm", "learning_rate", "images_per_second", "mfu"}
    assert names <= set(lines[0])
    assert all(0 < line["mfu"] < 1 for line in lines)
    assert list((tmp_path / "tensorboard").iterdir())
    # After a full disk and a kill: two lines in one, one after the checkpoint, one cut off.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo{"step": 8, "loss": 1.0}\n{"step": 10, "loss": 1.0}\n{"step": 1')
    resumed = small_run(tmp_path, steps=12, log_steps=2, tensorboard=True)
    train_on_plain_images(resumed, resume=True)
    assert [line["step"] for line in log_lines(tmp_path)] == [2, 4, 6, 8, 10, 12]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [2, 4, 6, 8, 10, 12]


def test_a_run_continues_where_its_log_and_samples_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def block(step: int) -> None:
        if step == 1:
            (tmp_path / "samples").write_text("a file where a folder is to be")
            (tmp_path / "log.jsonl").unlink()
            (tmp_path / "log.jsonl").mkdir()

    run = small_run(tmp_path, steps=2, log_steps=2, sample_steps=2)
    assert train_on_plain_images(run, block).steps == 2
    printed = capsys.readouterr()
    assert "not logged: " in printed.out + printed.err
    assert "no samples at step 2: " in printed.out + printed.err


def test_a_full_disk_leaves_no_half_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = TrainLog(tmp_path, 0, tensorboard=False)
    with file_size_limit(8191):  # odd, so that a line is cut off
        for step in range(1, 1000):
            log.scalars(step, loss=step / 2)
    log.scalars(1000, loss=0.0)
    assert "not logged: " in capsys.readouterr().out
    *before, last = log_lines(tmp_path)
    assert last == {"step": 1000, "loss": 0.0}
    assert before == [{"step": step, "loss": step / 2} for step in range(1, len(before) + 1)]
    assert 100 < len(before) < 999


def test_samples_and_scores_come_on_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the feature network's package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = write_folder(random_images(20), tmp_path / "real")
    settings = {"sample_steps": 2, "score_steps": 4, "score_images": 8}
    run = small_run(tmp_path, steps=4, score_reference=str(real), **settings)
    train_on_plain_images(run)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "00000002.png",
        "00000004.png",
    ]
    (score,) = [line for line in log_lines(tmp_path) if "frechet_distance" in line]
    assert score["step"] == 4
    assert score["frechet_distance"] > 0

    # A kill right after the checkpoint leaves neither grid nor score.
    (tmp_path / "samples" / "00000004.png").unlink()
    log = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(line for line in log if "frechet" not in line))
    resumed = small_run(tmp_path, steps=5, score_reference=str(real), **settings)
    train_on_plain_images(resumed, resume=True)
    assert (tmp_path / "samples" / "00000004.png").exists()
    (again,) = [line for line in log_lines(tmp_path) if "frechet_distance" in line]
    assert again["step"] == 4
    # The images are the same bit for bit; the last bit of the distance depends on LAPACK's memory.
    assert again["frechet_distance"] == pytest.approx(score["frechet_distance"], rel=1e-9)
