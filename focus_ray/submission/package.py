"""The files that are sent with a job: the working directory without data, environments, hidden files and trained weights."""

from __future__ import annotations

import fnmatch
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from focus_ray.errors import SubmissionError
from focus_ray.names import is_valid_utf8
from focus_ray.settings.standard import find_standard_config_folder

MAX_PACKAGE_MIB = 64  # Ray allows less than 512; but every node fetches the package through the head node

EXCLUDED = (
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
EXCLUDED_AT_TOP = ("data", "runs", "registry", "quickstart", "scratch")


@dataclass(frozen=True)
class JobPackage:
    """The files that are sent with a job.

    Attributes:
        content: A zip archive; the same files always give the same bytes.
        names: Paths of the files in the archive.
        num_bytes: Size of all files before compression.
    """

    content: bytes
    names: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        size = len(self.content) / 2**20
        return f"{len(self.names)} files, {self.num_bytes / 2**20:.1f} MiB ({size:.1f} MiB compressed)"


NO_FILES = JobPackage(b"", (), 0)


def build_job_package(folder: str | Path, excludes: Sequence[str] = ()) -> JobPackage:
    """Packs a folder without the files that a job does not need. Adds the code of focus_ray if the folder does not contain it.

    Args:
        folder: Working directory of the job.
        excludes: Shell patterns of names or relative paths, in addition to EXCLUDED and EXCLUDED_AT_TOP.

    Raises:
        SubmissionError: The folder does not exist, a file name is not valid UTF-8, or the archive is larger than
            MAX_PACKAGE_MIB.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise SubmissionError(f"{folder}: this folder does not exist: give --working-dir")
    files = dict(_list_files_to_send(root, excludes))
    if "focus_ray/__init__.py" not in files:
        package = Path(__file__).resolve().parents[1]
        files.update({f"focus_ray/{name}": path for name, path in _list_files_to_send(package, (), ())})
        files.update({f"focus_ray/configs/{path.name}": path for path in find_standard_config_folder().glob("*.yaml")})
    sizes = {name: path.stat().st_size for name, path in files.items()}
    limit = MAX_PACKAGE_MIB * 2**20
    # compression cannot make a folder of 8 times the limit small enough
    content = _build_zip_archive(files) if sum(sizes.values()) <= 8 * limit else None
    if content is None or len(content) > limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        raise SubmissionError(
            f"{folder}: the package is larger than {MAX_PACKAGE_MIB} MiB; the largest files are "
            f"{', '.join(f'{name} ({sizes[name] / 2**20:.1f} MiB)' for name in largest)}: "
            "exclude files that the job does not need with --exclude, and put data on S3"
        )
    return JobPackage(content, tuple(sorted(files)), sum(sizes.values()))


def _build_zip_archive(files: Mapping[str, Path]) -> bytes:
    """Returns a zip archive of files by their name in the archive. The same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name)  # a fixed date (1980)
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _list_files_to_send(
    root: Path, excludes: Sequence[str], top_excludes: Sequence[str] = EXCLUDED_AT_TOP
) -> Iterator[tuple[str, Path]]:
    """Yields (path relative to the root, file) of every file that is sent.

    Skips hidden files, hidden folders, virtual environments, and names that match EXCLUDED.

    Args:
        root: Folder to walk.
        excludes: Shell patterns, in addition to EXCLUDED.
        top_excludes: Names of folders that are excluded directly below the root only.

    Raises:
        SubmissionError: A file name is not valid UTF-8.
    """
    patterns = (*EXCLUDED, ".*", *(pattern.rstrip("/") for pattern in excludes))

    def is_excluded(name: str) -> bool:
        """Returns True if a pattern matches a relative path or its last name."""
        base_name = name.rpartition("/")[2]
        return any(fnmatch.fnmatchcase(text, pattern) for text in (base_name, name) for pattern in patterns)

    for folder, folders, files in os.walk(root):
        relative_folder = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative_folder == "." else f"{relative_folder}/"
        included = (name for name in folders if not is_excluded(prefix + name) and prefix + name not in top_excludes)
        folders[:] = sorted(name for name in included if not (Path(folder) / name / "pyvenv.cfg").is_file())
        for name in files:
            path = Path(folder) / name
            if is_excluded(prefix + name) or not path.is_file():
                continue
            if not is_valid_utf8(prefix + name):
                raise SubmissionError(
                    f"{prefix + name!a}: a file name that is not valid UTF-8 cannot be sent: rename the file, or use --exclude"
                )
            yield prefix + name, path
