"""The option --group-by of `ingest` and `fit`."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_sources import pixels, save

from focus_ray.cli.main import build_parser, main, parse_command_line


def test_ingest_applies_a_rule_and_prints_the_number_of_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(10):
        save(tmp_path / f"bolt/good/p{number // 2}_v{number}.png", pixels(number))
    command = ["ingest", str(tmp_path / "bolt"), str(tmp_path / "out"), "--group-by"]
    assert main([*command, r"name:^(p\d+)_"]) == 0
    assert "bolt: 10 training images of 5 parts" in capsys.readouterr().out
    assert main([*command, "part"]) == 1
    assert "'part'" in capsys.readouterr().err


def test_settings_may_follow_an_option() -> None:
    words = ["fit", "photographs", "model", "a=1", "--group-by", "time:2", "b=2", "c=3"]
    arguments = parse_command_line(build_parser(), words)
    assert (arguments.override, arguments.group_by) == (["a=1", "b=2", "c=3"], "time:2")


@pytest.mark.parametrize(
    "words", [["fit", "a", "b", "--group"], ["fit", "a", "b", "--gruop-by=x", "k=1"], ["ingest", "a", "b", "c"]]
)
def test_unknown_options_and_superfluous_words_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_command_line(build_parser(), words)


def test_fit_refuses_a_rule_that_fits_no_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        save(tmp_path / f"photographs/{number}.png", pixels(number))
    assert (
        main(
            [
                "fit",
                str(tmp_path / "photographs"),
                str(tmp_path / "model"),
                "model.weights=random",
                "--group-by",
                "time:3",
            ]
        )
        == 1
    )
    assert "'time:3'" in capsys.readouterr().err
