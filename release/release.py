"""Builds, checks and tries a release; uploads nothing.

    make release REPOSITORY=https://git.example/plant/focus-ray

1. the tree is clean, and CHANGELOG.md's first heading is the version of focus_ray/version.py, which has no tag elsewhere;
2. a source archive, and the wheel out of it, into dist/;
3. twine checks both; the wheel holds the package and nothing else, and no path of this machine;
4. for each Python: the wheel in new environments, with the extra `ray` and bare. The first fits a model of made-up parts,
   evaluates it and inspects with it, the other inspects with that model.

Then dist/NOTES.md has the version's part of CHANGELOG.md, and what is left to do is told.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).with_name("uv")
BELONGS = re.compile(r"focus_ray/|focus_ray-[^/]+\.dist-info/")
NEEDED = ("focus_ray/configs/default.yaml", "focus_ray/serving/page/index.html", "focus_ray/cli/main.py")


class ReleaseError(Exception):
    """What keeps this from being released."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", default=os.environ.get("FOCUS_RAY_REPOSITORY", ""), help="its public address")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", nargs="+", default=["{}.{}".format(*sys.version_info)], help="to install it with")
    parser.add_argument("--unclean", action="store_true", help="try it on a tree with changes; not to be released")
    arguments = parser.parse_args()
    try:
        version = check_tree(arguments.unclean)
        notes = notes_of((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
        wheel = build(arguments.output, version, arguments.repository)
        check_wheel(wheel)
        for python in arguments.python:
            try_out(wheel, python)
    except (ReleaseError, subprocess.CalledProcessError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    (arguments.output / "NOTES.md").write_text(notes, encoding="utf-8")
    print(f"\n{notes}\n{wheel.name} and its source archive are in {arguments.output}. What is left:")
    print(f"  git tag -a v{version} -m 'focus_ray {version}' && git push origin v{version}")
    print(f"  twine upload {arguments.output}/focus_ray-*")
    if not arguments.repository:
        print("  without --repository its long description has no links: build it again with one before it is uploaded")
    return 0


def check_tree(unclean: bool) -> str:
    """Returns: the version. Raises: ReleaseError: the tree, the changelog or a tag does not fit it."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "focus_ray/version.py").read_text(), flags=re.M)
    changes = run("git", "status", "--porcelain", "--untracked-files=no")
    if changes and not unclean:
        raise ReleaseError(f"files with changes: commit them first\n{changes}")
    tagged = run("git", "tag", "--list", f"v{version}") and run("git", "rev-parse", f"v{version}^{{commit}}")
    if tagged and tagged != run("git", "rev-parse", "HEAD") and not unclean:
        raise ReleaseError(f"v{version} is the tag of another commit: raise __version__ in focus_ray/version.py")
    return version


def notes_of(changelog: str, version: str) -> str:
    """The part of a version. Raises: ReleaseError: it is not the first."""
    parts = re.split(r"^## ", changelog, flags=re.M)
    heading, _, body = parts[1].partition("\n") if len(parts) > 1 else ("nothing", "", "")
    if heading.split()[0].strip("[]") != version:
        raise ReleaseError(f"CHANGELOG.md begins with {heading!r}: expected a part '## {version}'")
    if not body.strip():
        raise ReleaseError(f"CHANGELOG.md says nothing of {version}")
    return f"# focus_ray {version}\n\n{body.strip()}\n"


def build(output: Path, version: str, repository: str) -> Path:
    """Returns: the wheel, made from the source archive beside it."""
    output.mkdir(parents=True, exist_ok=True)
    for former in output.glob("focus_ray-*"):
        former.unlink()
    pinned = ("--require-hashes", "--build-constraints", ROOT / "container/build-requirements.txt")
    run(UV, "build", *pinned, "--out-dir", output, ROOT, environment={"FOCUS_RAY_REPOSITORY": repository})
    made = sorted(output.glob(f"focus_ray-{version}*"))
    if [path.suffix for path in made] != [".whl", ".gz"]:
        raise ReleaseError(
            f"built {', '.join(path.name for path in made)}: expected a wheel and a source archive of {version}"
        )
    print(run(sys.executable, "-m", "twine", "check", "--strict", *made))
    return made[0]


def check_wheel(wheel: Path) -> None:
    """Raises: ReleaseError: a file is missing, does not belong there, or tells where it was made."""
    here = str(ROOT).encode()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        strange = [name for name in names if not BELONGS.match(name) or "__pycache__" in name]
        telling = [name for name in names if here in archive.read(name)]
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    missing = [name for name in NEEDED if name not in names]
    if strange or missing or telling:
        raise ReleaseError(f"{wheel.name}: does not belong: {strange}; missing: {missing}; names {ROOT}: {telling}")
    dead = re.findall(r"\]\((?!https?://|#)[^)]+\)", metadata)
    if dead:
        raise ReleaseError(f"{wheel.name}: links of the long description that lead nowhere: {dead}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def try_out(wheel: Path, python: str) -> None:
    """Raises: CalledProcessError: a command fails where the wheel is newly installed."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        parts, model, bundle = scratch / "parts", scratch / "model", scratch / "model/bundles/gear"
        made = [
            ("samples", parts),
            ("fit", parts / "gear", model, "model.weights=random", "model.image_size_px=64"),
            ("evaluate", model),
            ("inspect", bundle, parts / "gear/test"),
            ("doctor",),
        ]
        for extra, commands in (("[ray]", made), ("", [("doctor",), ("inspect", bundle, parts / "gear/test")])):
            environment = scratch / f"environment{extra}"
            run(UV, "venv", "--python", python, environment)
            run(UV, "pip", "install", "--python", environment / "bin/python", f"{wheel}{extra}")
            for words in commands:
                run(environment / "bin/focus-ray", *words, folder=scratch)
                print(f"Python {python}, focus-ray{extra}: {words[0]} runs", flush=True)


def run(*command: str | Path, folder: Path = ROOT, environment: dict[str, str] | None = None) -> str:
    """What a command prints. Raises: CalledProcessError: it fails; what it said on stderr is printed."""
    ended = subprocess.run(
        list(map(str, command)), cwd=folder, env={**os.environ, **(environment or {})}, capture_output=True, text=True
    )
    if ended.returncode:
        print(ended.stdout[-4000:] + ended.stderr[-4000:], file=sys.stderr)
        ended.check_returncode()
    return ended.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
