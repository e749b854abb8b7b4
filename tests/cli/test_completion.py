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
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<< "$1"
[[ "$1" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
complete -p focus-ray > /dev/null && _python_argcomplete focus-ray "${COMP_WORDS[COMP_CWORD]}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(line: str, folder: Path) -> set[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", TAB, "bash", line], env={**os.environ, "PATH": path}, cwd=folder, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return {word.strip() for word in ended.stdout.splitlines()}


@pytest.mark.skipif(
    not shutil.which("bash") or not Path(sys.executable).with_name("focus-ray").exists(),
    reason="no bash, or not installed",
)
@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("focus-ray ins", "inspect-batch"),
        ("focus-ray inspect --en", "--engine"),
        ("focus-ray train ", "default"),
        ("focus-ray train ", "mine.yaml"),
        ("focus-ray train default model.backb", "model.backbone="),
        ("focus-ray train default model.backbone=", "resnet18"),
        ("focus-ray sweep sweep base.train.lambda_f", "base.train.lambda_fine="),
        ("focus-ray serve models pool.num_g", "pool.num_gpus="),
        ("focus-ray config explain train.lambda_f", "train.lambda_fine"),
    ],
)
def test_a_word_is_completed(line: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "photo.png").touch()
    words = completed(line, tmp_path)
    assert word in words
    assert "photo.png" not in words


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "focus-ray" in capsys.readouterr().out
