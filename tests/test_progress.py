"""Lines of progress: none of a short step, few of a long one, with what is left."""

from __future__ import annotations

from focus_ray.progress import format_duration, format_progress, track


def told(num_items: int, seconds_each: float, total: int) -> list[str]:
    now = [0.0]
    lines: list[str] = []
    for item in track(range(num_items), "reading", total, lines.append, clock=lambda: now[0]):
        assert item >= 0
        now[0] += seconds_each
    return lines


def test_a_short_step_says_nothing() -> None:
    assert told(100, 0.04, 100) == []


def test_a_long_step_tells_how_far_it_is_and_what_is_left() -> None:
    lines = told(100, 0.5, 100)
    assert lines[0] == "reading: 10 of 100 images, 2/s, 45 s left"
    assert len(lines) < 10


def test_a_step_of_hours_tells_ever_more_rarely() -> None:
    assert 10 < len(told(7200, 1.0, 7200)) < 40


def test_nothing_is_lost_or_reordered() -> None:
    assert list(track(range(5), "x", 0, print)) == [0, 1, 2, 3, 4]


def test_amounts_are_told_in_words() -> None:
    assert format_progress(120, 320, 4.0, "images") == "120 of 320 images, 30/s, 7 s left"
    assert format_progress(5, 0, 10.0, "rows") == "5 rows, 0.5/s"
    assert [format_duration(s) for s in (45, 200, 9000)] == ["45 s", "3 min", "2.5 h"]
