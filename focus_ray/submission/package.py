"""What a job is sent with: the working directory without data, environments, hidden files and trained weights."""

from __future__ import annotations

import fnmatch
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from focus_ray.errors import SubmissionError
from focus_ray.names import is_utf8
from focus_ray.standard import standard_folder

MAX_PACKAGE_MIB = 64  # Ray refuses 512; every node fetches it through the head node

LEFT_OUT = (
    "__pycache__",
    "*.egg-info",
    "node_modules",
    "*.pyc",
    "*.parquet",
    "*.safetensors",
    "*.pth",
    "*.pt",
    "*.ckpt",
)
LEFT_OUT_AT_TOP = ("data", "runs", "registry", "quickstart", "scratch")


@dataclass(frozen=True)
class Package:
    """The files that a job is sent with.

    content: a zip archive, the same bytes for the same files.  num_bytes: of the files, before compression.
    """

    content: bytes
    names: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        size = len(self.content) / 2**20
        return f"{len(self.names)} files, {self.num_bytes / 2**20:.1f} MiB ({size:.1f} MiB compressed)"


def build_package(folder: str | Path, excludes: Sequence[str] = ()) -> Package:
    """Packs a folder, without what a job does not need, and this package where the folder does not hold it.

    Args:
        excludes: shell patterns of names or of paths below the folder, besides LEFT_OUT and LEFT_OUT_AT_TOP.

    Raises: SubmissionError: no such folder, or more than MAX_PACKAGE_MIB; it names the largest files.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise SubmissionError(f"{folder}: no such folder to send: give --working-dir")
    files = dict(_files_to_send(root, excludes))
    if "focus_ray/__init__.py" not in files:
        package = Path(__file__).resolve().parents[1]
        files.update({f"focus_ray/{name}": path for name, path in _files_to_send(package, (), ())})
        files.update({f"focus_ray/configs/{path.name}": path for path in standard_folder().glob("*.yaml")})
    sizes = {name: path.stat().st_size for name, path in files.items()}
    limit = MAX_PACKAGE_MIB * 2**20
    largest = ", ".join(
        f"{name} ({size / 2**20:.1f} MiB)" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:5]
    )
    too_large = (
        f"{folder}: more than {MAX_PACKAGE_MIB} MiB to send; the largest files are {largest}: "
        "leave out what the job does not need with --exclude, and put data on S3"
    )
    if sum(sizes.values()) > 8 * limit:  # not worth compressing
        raise SubmissionError(too_large)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # its date is 1980: the same files make the same archive
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    if len(buffer.getvalue()) > limit:
        raise SubmissionError(too_large)
    return Package(buffer.getvalue(), tuple(sorted(files)), sum(sizes.values()))


def _files_to_send(
    root: Path, excludes: Sequence[str], at_top: Sequence[str] = LEFT_OUT_AT_TOP
) -> Iterator[tuple[str, Path]]:
    """(name below the root, file); at_top: names that are left out there alone."""
    patterns = (*LEFT_OUT, *(pattern.rstrip("/") for pattern in excludes))

    def wanted(name: str, is_top: bool) -> bool:
        base = name.rpartition("/")[2]
        if base.startswith(".") or (is_top and base in at_top):
            return False
        return not any(fnmatch.fnmatchcase(base, p) or fnmatch.fnmatchcase(name, p) for p in patterns)

    for folder, folders, files in os.walk(root):
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        folders[:] = sorted(
            name
            for name in folders
            if wanted(prefix + name, not prefix) and not (Path(folder) / name / "pyvenv.cfg").is_file()
        )
        for name in files:
            path = Path(folder) / name
            if not wanted(prefix + name, False):
                continue
            if not is_utf8(prefix + name):
                raise SubmissionError(
                    f"{prefix + name!a}: a name that is not valid UTF-8 cannot be sent: rename it, or leave it out with --exclude"
                )
            if path.is_file():
                yield prefix + name, path
