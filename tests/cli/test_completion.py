"""A real bash completes the words of commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from focus_ray.cli.completion import SHELLS
from focus_ray.cli.main import main

# does what bash does when a user presses TAB at the end of a line
TAB = """
eval "$(focus-ray completion bash)"
complete -p focus-ray > /dev/null || exit 1
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMPREPLY=()
    read -ra COMP_WORDS <<< "$COMP_LINE"
    [[ "$COMP_LINE" == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _python_argcomplete focus-ray "${COMP_WORDS[COMP_CWORD]}" ""
    printf '%s\\n' "${COMPREPLY[@]}" END
done
"""


def complete(lines: list[str], folder: Path) -> list[set[str]]:
    """Returns the words that a bash offers for each line."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", TAB, "bash", *lines],
        env={**os.environ, "PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return [{word.strip() for word in words.splitlines()} for words in ended.stdout.split("END\n")[:-1]]


@pytest.mark.skipif(
    not shutil.which("bash") or not Path(sys.executable).with_name("focus-ray").exists(),
    reason="no bash, or not installed",
)
def test_words_are_completed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "photo.png").touch()
    word_by_line = {
        "focus-ray ins": "inspect-batch",
        "focus-ray inspect --en": "--engine",
        "focus-ray train ": "default",
        "focus-ray train m": "mine.yaml",
        "focus-ray train default model.backb": "model.backbone=",
        "focus-ray train default model.backbone=": "resnet18",
        "focus-ray sweep sweep base.train.lambda_f": "base.train.lambda_fine=",
        "focus-ray serve models pool.num_g": "pool.num_gpus=",
        "focus-ray config explain train.lambda_f": "train.lambda_fine",
    }
    for word, words in zip(word_by_line.values(), complete(list(word_by_line), tmp_path), strict=True):
        assert word in words
        assert "photo.png" not in words


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "focus-ray" in capsys.readouterr().out
