"""Local paths and s3:// URIs behind one pyarrow filesystem, and one clear error for whatever goes wrong there.

S3 takes the standard variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE; AWS_REGION
or AWS_DEFAULT_REGION; AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) for servers other than Amazon's. Credentials are left
to the AWS client's own chain: they are never copied into a URI, a log or a pickled filesystem.
"""

from __future__ import annotations

import os
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from focus_ray.errors import DataError

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 60.0


def is_s3(uri: str | Path) -> bool:
    """Whether a location is on S3."""
    return str(uri).startswith("s3://")


def open_filesystem(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The filesystem of a location and the path inside it, without a closing slash.

    Args:
        uri: a local path (a leading ``~`` is resolved), ``file:///path`` or ``s3://bucket/prefix``.

    Returns: for S3 the path is ``bucket/prefix``; local paths are absolute. Nothing is created or contacted, but for
        the bucket's region where neither a region nor an endpoint is set.

    Raises: DataError: another scheme, an S3 URI without a bucket or with a query.
    """
    text = str(uri)
    scheme = text.partition("://")[0] if "://" in text else ""
    if is_s3(text):
        path = text[len("s3://") :].strip("/")
        if not path or "?" in path:
            raise DataError(
                f"{text}: expected s3://bucket/prefix without a query; set the server with AWS_ENDPOINT_URL"
            )
        return _open_s3(path.partition("/")[0]), path
    if scheme == "file":
        parsed = urllib.parse.urlparse(text)
        if parsed.netloc not in ("", "localhost"):
            raise DataError(f"{text}: a file URI has three slashes, as in file:///data/parts")
        text = urllib.parse.unquote(parsed.path)
    elif scheme or not text:
        raise DataError(f"{text!r}: expected a local path, file:///path or s3://bucket/prefix")
    return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())


def write_file(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """Writes a small file so that readers see the old or the new one, never a part, through a crash or power cut too.

    Raises: OSError: run it inside ``storage_errors``.
    """
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:  # S3 shows an object only once it is whole
            stream.write(data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}-{target.name}"
    try:
        temporary.write_bytes(data)
        sync_file(filesystem, str(temporary))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(filesystem: fs.FileSystem, path: str) -> None:
    """Waits until a written local file is on disk; S3 has done so by itself."""
    if isinstance(filesystem, fs.LocalFileSystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(filesystem: fs.FileSystem, path: str) -> bytes | None:
    """A small file's bytes; None where there is none. Raises: OSError: run it inside ``storage_errors``."""
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_file(path) as stream:
        return bytes(stream.read())


@contextmanager
def storage_errors(action: str, uri: str | Path, path: str | None = None) -> Iterator[None]:
    """Turns what the filesystem raises into one DataError with the action, the place and what to set.

    Args:
        action: what was being done, as in "write the commit file".
        uri: the data set's root.  path: the path inside the filesystem, where it is known.
    """
    try:
        yield
    except OSError as error:
        raise DataError(_explain(error, action, str(uri), path)) from error


def _open_s3(bucket: str) -> fs.S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint:
        region = "us-east-1"  # what servers other than Amazon's take
    elif region is None and not os.environ.get("AWS_PROFILE"):
        with storage_errors("find the bucket's region (or set AWS_REGION)", f"s3://{bucket}", bucket):
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
    )


def _explain(error: OSError, action: str, uri: str, path: str | None) -> str:
    if not is_s3(uri):
        detail = error.strerror or str(error)
        return f"{path or uri}: cannot {action}: {detail}"
    bucket, _, key = (path or uri[len("s3://") :]).partition("/")
    text = str(error)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    server = endpoint.rpartition("@")[2] if endpoint else "Amazon S3 (AWS_ENDPOINT_URL is not set)"
    return f"S3 bucket {bucket!r}, key {key!r} at {server}: cannot {action}: {_hint(text)} [{text}]"


def _hint(text: str) -> str:
    if any(sign in text for sign in ("SIGNATURE", "INVALID_ACCESS_KEY", "INVALID_CLIENT_TOKEN", "EXPIRED")):
        return (
            "the credentials are wrong or expired: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(with AWS_SESSION_TOKEN if they are temporary), or AWS_PROFILE"
        )
    if "ACCESS_DENIED" in text:
        return (
            "access denied: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to an identity that the "
            "bucket's policy allows this"
        )
    if "NO_SUCH_BUCKET" in text:
        return "there is no such bucket: create it, or mend the URI or AWS_ENDPOINT_URL"
    if "NETWORK_CONNECTION" in text or "REQUEST_TIMEOUT" in text or "curlCode" in text:
        return "no connection: set AWS_ENDPOINT_URL to the server's address, and see that it runs"
    if "PermanentRedirect" in text or "MOVED" in text.upper():
        return "the bucket is in another region: set AWS_REGION"
    return "the request failed"


def join(root: str | Path, *names: str) -> str:
    """A location below another, for paths and URIs alike."""
    return "/".join([str(root).rstrip("/"), *names])


def read_bytes(uri: str | Path) -> bytes:
    """A file's bytes. Raises: FileNotFoundError: there is none.  DataError: it cannot be read."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("read", uri, path):
        data = read_file(filesystem, path)
    if data is None:
        raise FileNotFoundError(f"{uri}: no such file")
    return data


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises: DataError: it cannot be written."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("write", uri, path):
        write_file(filesystem, path, data)


def list_names(uri: str | Path) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty where there is no such folder."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("list", uri, path):
        found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(item.base_name for item in found)


def exists(uri: str | Path) -> bool:
    """Whether a file is there. Raises: DataError: it cannot be told."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("look up", uri, path):
        return filesystem.get_file_info(path).type == fs.FileType.File


def remove_file(uri: str | Path) -> None:
    """Deletes a file; none there is no error."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("delete", uri, path):
        if filesystem.get_file_info(path).type == fs.FileType.File:
            filesystem.delete_file(path)


def remove_folder(uri: str | Path) -> None:
    """Deletes a folder and all below it; none there is no error."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("delete", uri, path):
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            filesystem.delete_dir(path)
