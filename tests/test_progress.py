"""Progress lines: a short step prints none, a long step prints few, with the remaining time."""

from __future__ import annotations

from focus_ray.progress import format_duration, format_progress, track_progress


def progress_lines(num_items: int, seconds_each: float, total: int) -> list[str]:
    clock_s = [0.0]
    lines: list[str] = []
    for item in track_progress(range(num_items), "reading", total, lines.append, clock=lambda: clock_s[0]):
        assert item >= 0
        clock_s[0] += seconds_each
    return lines


def test_a_short_step_prints_nothing() -> None:
    assert progress_lines(100, 0.04, 100) == []


def test_a_long_step_prints_progress_and_remaining_time() -> None:
    lines = progress_lines(100, 0.5, 100)
    assert lines[0] == "reading: 10 of 100 images, 2/s, 45 s left"
    assert len(lines) < 10


def test_the_pauses_between_lines_grow() -> None:
    assert 10 < len(progress_lines(7200, 1.0, 7200)) < 40


def test_items_are_complete_and_in_order() -> None:
    assert list(track_progress(range(5), "x", 0, print)) == [0, 1, 2, 3, 4]


def test_progress_and_durations_are_formatted() -> None:
    assert format_progress(120, 320, 4.0) == "120 of 320 images, 30/s, 7 s left"
    assert format_progress(5, 0, 10.0) == "5 images, 0.5/s"
    assert [format_duration(s) for s in (45, 200, 9000)] == ["45 s", "3 min", "2.5 h"]
