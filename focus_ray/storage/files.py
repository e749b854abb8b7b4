"""Reads and writes files on local disks and on S3 through one pyarrow filesystem, and turns every failure into one clear error.

S3 is configured by the standard variables and AWS files (`s3_settings`): AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN or AWS_PROFILE; AWS_REGION or AWS_DEFAULT_REGION; AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) for servers
other than Amazon's; AWS_CA_BUNDLE; HTTPS_PROXY and NO_PROXY; FOCUS_RAY_S3_ADDRESSING=virtual for servers that expect the
bucket in the host name. Credentials are never copied into a URI, a log or a pickled filesystem.

A request that is throttled, refused temporarily or interrupted is retried with exponential backoff. AWS_MAX_ATTEMPTS sets the
number of attempts; the default of ten is enough to outlast the restart of a server.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from focus_ray.errors import DataError, StorageError, check_extra_is_installed
from focus_ray.retries import compute_retry_pause_s
from focus_ray.storage.s3_settings import S3Settings, load_s3_settings

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 10  # attempts for one request; the pauses between them double and add up to about 25 s
QUICK_ATTEMPTS, QUICK_TIMEOUT_S = 2, 10.0  # for callers that retry by themselves, or that only check the access

_BUSY_SIGNS = ("Failed to flush response stream", "INTERNAL_FAILURE", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "status 503")


class FileStat(NamedTuple):
    """The time of the last change of a file, in ns since 1970 (S3 rounds to seconds), and its size in bytes."""

    mtime_ns: int
    num_bytes: int


def is_s3_uri(uri: str | Path) -> bool:
    """Returns whether a location is on S3, i.e. begins with s3://."""
    return str(uri).startswith("s3://")


def open_filesystem(uri: str | Path, is_quick: bool = False) -> tuple[fs.FileSystem, str]:
    """Returns the pyarrow filesystem of a location, and the path inside that filesystem without a closing slash.

    The function creates nothing. It contacts a server in one case only: to look up the region of a bucket when neither a region
    nor an endpoint is set.

    Args:
        uri: a local path (a leading ``~`` is resolved), ``file:///path`` or ``s3://bucket/prefix``.
        is_quick: requests to S3 fail after QUICK_ATTEMPTS and QUICK_TIMEOUT_S instead of minutes.

    Returns:
        The filesystem and the path. The path is ``bucket/prefix`` on S3; local paths are absolute.

    Raises:
        DataError: the scheme is unknown, a file URI names another host, the S3 URI has no bucket, an empty folder name or a
            query, an AWS setting is invalid, or the region of the bucket cannot be found.
        MissingPackageError: the location is on S3 and boto3 is not installed.
    """
    text = str(uri)
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme == "s3":
        path = text[len("s3://") :].strip("/")
        if not path or "?" in path or "//" in path:
            expected = "expected s3://bucket/prefix without a query or an empty folder name"
            raise DataError(f"{text}: {expected}; set the server with AWS_ENDPOINT_URL")
        check_extra_is_installed("s3", text)
        return _make_s3_filesystem(
            _find_bucket_region(path.partition("/")[0]), load_s3_settings().endpoint, is_quick
        ), path
    if scheme == "file":
        parsed = urllib.parse.urlparse(text)
        if parsed.netloc not in ("", "localhost"):
            raise DataError(f"{text}: expected a file URI with three slashes, as in file:///data/parts")
        text = urllib.parse.unquote(parsed.path)
    elif scheme or not text:
        raise DataError(f"{text!r}: expected a local path, file:///path or s3://bucket/prefix")
    return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())


def write_file(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    """Writes a small file atomically: readers see the old content or the new content, even after a crash or a power cut.

    On a disk, missing parent folders are created.

    Raises: OSError: the write fails. Call the function inside ``explain_storage_errors``.
    """
    if not isinstance(filesystem, fs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:  # S3 shows an object only when it is complete
            stream.write(data)
        return
    with _write_temporary_file(Path(path), data) as temporary:
        os.replace(temporary, path)


@contextmanager
def _write_temporary_file(target: Path, data: bytes) -> Iterator[Path]:
    """Context manager: writes data to a temporary file in the folder of a target file, which the caller can then rename or link.

    The data is synced to disk before the `with` block runs. Missing parent folders are created. The temporary file is removed
    afterwards.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # the name does not contain the target's name, which may already have the maximum length
    temporary = target.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        temporary.write_bytes(data)
        sync_file_to_disk(fs.LocalFileSystem(), str(temporary))
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync_file_to_disk(filesystem: fs.FileSystem, path: str) -> None:
    """Waits until a local file is on disk. On S3 a written object is already stored, so the function does nothing."""
    if isinstance(filesystem, fs.LocalFileSystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(filesystem: fs.FileSystem, path: str, max_bytes: int | None = None) -> bytes | None:
    """Reads a small file. Returns None if the file does not exist or is a folder.

    Raises:
        OSError: the read fails. Call the function inside ``explain_storage_errors``.
        DataError: the file has more than `max_bytes`. It is not read.
    """
    try:
        file = filesystem.open_input_file(path)  # sends one HEAD on S3, which also gives the size
    except FileNotFoundError:
        return None
    except OSError:
        if filesystem.get_file_info(path).type != fs.FileType.File:  # a folder of this name
            return None
        raise
    if max_bytes is not None and file.size() > max_bytes:
        raise DataError(f"{path}: the file has {file.size()} bytes, expected at most {max_bytes}: it is not read")
    with _wrap_with_retries(filesystem, file) as stream:
        return bytes(stream.read() if max_bytes is None else stream.read(max_bytes))


def open_file_for_reading(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """Opens a file for reading at any position. Reads from S3 are retried while the server is busy.

    Raises: OSError: the file cannot be opened or does not exist. Call the function inside ``explain_storage_errors``.
    """
    return _wrap_with_retries(filesystem, filesystem.open_input_file(path))


def _wrap_with_retries(filesystem: fs.FileSystem, file: pa.NativeFile) -> pa.NativeFile:
    """Returns a file whose reads are retried while an S3 server is busy; a local file is returned unchanged."""
    return file if isinstance(filesystem, fs.LocalFileSystem) else pa.PythonFile(_RetryingS3File(file), mode="r")


def _call_with_retries(action: Callable[[], T], is_temporary: Callable[[Exception], bool]) -> T:
    """Calls a function up to `read_max_attempts` times while its errors are temporary. Returns the result of the function.

    Args: is_temporary: returns whether an error may disappear.

    Raises: the error of the last attempt; an error that is not temporary at once.
    """
    attempt = 1
    while True:
        try:
            return action()
        except Exception as error:
            if attempt == read_max_attempts() or not is_temporary(error):
                raise
        time.sleep(compute_retry_pause_s(attempt))
        attempt += 1


class _RetryingS3File(io.RawIOBase):
    """A readable file on S3, as a Python file object, that retries its reads while the server is busy.

    pyarrow retries a busy server itself, except here (26.0): the error response of a busy server is longer than a small range of
    bytes. It does not fit into pyarrow's buffer and appears as a failure that pyarrow does not retry.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size()}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        count = self._file.size() - self._position if size is None or size < 0 else size
        content: bytes = _call_with_retries(
            lambda: self._file.read_at(count, self._position),
            lambda error: isinstance(error, OSError) and any(sign in str(error) for sign in _BUSY_SIGNS),
        )
        self._position += len(content)
        return content

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def explain_storage_errors(action: str, uri: str | Path, path: str | None = None) -> Iterator[None]:
    """Context manager: turns an OSError or an error of boto3 into a StorageError that names action, location and remedy.

    Args:
        action: the action that fails, as in "write the commit file".
        uri: the root of the data set.
        path: the path inside the filesystem; None: the message gives `uri`.

    Raises: StorageError: the code in the `with` block raised such an error.
    """
    errors: tuple[type[Exception], ...] = (OSError, *_get_client_error_types()) if is_s3_uri(uri) else (OSError,)
    try:
        yield
    except errors as error:
        raise StorageError(_explain_error(error, action, str(uri), path)) from error


@contextmanager
def _open_location(action: str, uri: str | Path, is_quick: bool = False) -> Iterator[tuple[fs.FileSystem, str]]:
    """Context manager: opens the filesystem of a location, and turns an OSError of the `with` block into a StorageError.

    Args: action: the action, for the message, see `explain_storage_errors`.

    Raises: as `open_filesystem` and `explain_storage_errors`.
    """
    filesystem, path = open_filesystem(uri, is_quick)
    with explain_storage_errors(action, uri, path):
        yield filesystem, path


def find_os_error(error: BaseException | None) -> OSError | None:
    """Returns the first `OSError` with an error number in an error and its causes; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def is_storage_full(error: BaseException) -> bool:
    """Returns whether an error was caused by a full disk, an exhausted quota or the limit for the size of a file."""
    cause = find_os_error(error)
    return cause is not None and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _RetryingS3FileSystem(fs.S3FileSystem):
    """The S3 filesystem of pyarrow, except that a pickled copy keeps the retry settings; pyarrow 26.0 loses them.

    The pickle contains no credentials: the receiving process reads its own.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        _, (options,) = super().__reduce__()
        return _make_s3_filesystem, (options["region"], options["endpoint_override"] or None)


def _make_s3_filesystem(region: str | None, endpoint: str | None, is_quick: bool = False) -> fs.S3FileSystem:
    """Returns an S3 filesystem with the timeouts, retries and AWS settings of this process.

    Raises: DataError: an AWS setting is invalid.
    """
    return _RetryingS3FileSystem(
        region=region,
        endpoint_override=endpoint,
        **load_s3_settings().build_pyarrow_arguments(),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=QUICK_TIMEOUT_S if is_quick else REQUEST_TIMEOUT_S,
        allow_delayed_open=True,  # a small file is one PUT, not the three requests of a multipart upload
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=QUICK_ATTEMPTS if is_quick else read_max_attempts()),
    )


def read_max_attempts() -> int:
    """Returns how many times a request to S3 is sent before it counts as failed.

    Raises: DataError: AWS_MAX_ATTEMPTS is not a whole number of at least 1.
    """
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(MAX_ATTEMPTS)
    if not text.isdigit() or not int(text):
        raise DataError(f"AWS_MAX_ATTEMPTS={text!r}: expected a number of attempts, at least 1")
    return int(text)


def _find_bucket_region(bucket: str) -> str:
    """Returns the region of a bucket: from the settings, a default for servers other than Amazon's, or Amazon's answer.

    Raises: DataError: the settings are invalid, or the region cannot be found.
    """
    settings = load_s3_settings()
    if settings.region or settings.endpoint:
        return settings.region or "us-east-1"  # servers other than Amazon's accept this region
    with explain_storage_errors("find the region of the bucket (or set AWS_REGION)", f"s3://{bucket}", bucket):
        return str(fs.resolve_s3_region(bucket))


@lru_cache(maxsize=4)
def _make_boto_client(region: str, settings: S3Settings, attempts: int, identity: tuple[str | None, ...]) -> Any:
    """Returns a cached boto3 client for S3. It sends requests that pyarrow does not offer, such as a conditional PUT.

    Args:
        region: region of the bucket.
        settings: settings of the connection.
        attempts: how often a request is sent.
        identity: the credentials of the environment. The cache key contains them, so that changed credentials get a new client.
    """
    import boto3
    from botocore.config import Config

    options = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,  # at most this many threads read at once
        # the same choice as pyarrow makes
        s3={"addressing_style": "virtual" if settings.virtual else "path" if settings.endpoint else "auto"},
        proxies={"http": settings.proxy, "https": settings.proxy} if settings.proxy else None,
        request_checksum_calculation="when_required",  # some servers do not know the newer checksums
    )
    return boto3.Session().client(
        "s3", region_name=region, endpoint_url=settings.endpoint, config=options, verify=settings.ca_file
    )


def _open_boto_client(bucket: str, attempts: int | None = None) -> Any:
    """Returns the boto3 client for a bucket, with the current settings and credentials.

    Args: attempts: how often a request is sent; None: `read_max_attempts`.

    Raises: DataError: an AWS setting is invalid, or the region of the bucket cannot be found.
    """
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    identity = tuple(os.environ.get(name) for name in names)
    return _make_boto_client(_find_bucket_region(bucket), load_s3_settings(), attempts or read_max_attempts(), identity)


def _ask_refusal_reason(bucket: str) -> str:
    """Asks an S3 server why it refuses requests to a bucket. Returns its explanation; an empty text if it accepts a listing.

    pyarrow sends a HEAD request, and the response has no body. This function sends a GET request to get the explanation.
    """
    try:
        _open_boto_client(bucket, attempts=1).list_objects_v2(Bucket=bucket, MaxKeys=1)
    except DataError:
        return ""
    except _get_client_error_types() as error:
        response = getattr(error, "response", {})
        message = response.get("Error", {}).get("Message", "")
        return f"{_get_error_code(error)}: {message} {response.get('Region', '')}".strip(": ")
    return ""


def _explain_error(error: Exception, action: str, uri: str, path: str | None) -> str:
    """Returns the error message for a failed action: the location, the action, the reason and the remedy.

    For S3 it may ask the server for the reason.
    """
    if not is_s3_uri(uri):
        return f"{path or uri}: cannot {action}: {getattr(error, 'strerror', None) or error}"
    bucket, _, key = (path or uri[len("s3://") :]).partition("/")
    text = str(error)
    endpoint = load_s3_settings().endpoint
    server = endpoint.rpartition("@")[2] if endpoint else "Amazon S3 (AWS_ENDPOINT_URL is not set)"
    hint = _find_remedy(text)
    if hint in (_DENIED, _FAILED) and (reason := _ask_refusal_reason(bucket)):
        text = f"{text}; the server says: {reason}"
        hint = _find_remedy(reason) if _find_remedy(reason) != _FAILED else hint
    return f"S3 bucket {bucket!r}, key {key!r} at {server}: cannot {action}: {hint} (on machine {socket.gethostname()}) [{text}]"


_SET_IDENTITY = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_DENIED = f"access denied: {_SET_IDENTITY}, to an identity that the policy of the bucket allows to do this"
_FAILED = "the request failed"
# signs in the error text of pyarrow or boto3 -> reason and remedy; the first match counts
_HINTS = {
    (
        "SKEWED",
    ): "the clocks of this machine and of the server differ too much: set this clock (timedatectl set-ntp true)",
    ("QUOTA", "STORAGEFULL", "INSUFFICIENTSTORAGE", "NOSPACELEFT", "STATUS 507"): (
        "the storage or its quota is full: free space, or raise the quota"
    ),
    ("AUTHORIZATIONHEADERMALFORMED", "PERMANENTREDIRECT", "ILLEGALLOCATION", "STATUS 301", "IS WRONG; EXPECTING"): (
        "the bucket is in another region: set AWS_REGION to the region that the server names"
    ),
    ("UNABLE TO LOCATE CREDENTIALS",): f"no credentials found: {_SET_IDENTITY}",
    ("SIGNATURE", "INVALIDACCESSKEY", "INVALIDCLIENTTOKEN", "EXPIRED"): (
        f"the credentials are wrong or expired: {_SET_IDENTITY}; temporary ones also need AWS_SESSION_TOKEN"
    ),
    ("ACCESSDENIED",): _DENIED,
    ("NOSUCHBUCKET",): "the bucket does not exist: create it, or correct the URI or AWS_ENDPOINT_URL",
    ("NETWORKCONNECTION", "CURLCODE", "COULD NOT CONNECT", "TIMEOUT"): (
        "no connection: set AWS_ENDPOINT_URL to the address of the server, and check that the server runs"
    ),
}


def _find_remedy(text: str) -> str:
    """Returns the reason and the remedy for an error text of pyarrow or boto3; `_FAILED` for an unknown text."""
    text = text.upper().replace("_", "")  # pyarrow writes ACCESS_DENIED, boto3 AccessDenied
    return next((hint for signs, hint in _HINTS.items() if any(sign in text for sign in signs)), _FAILED)


def leads_outside_root(location: str, root: str) -> bool:
    """Returns whether a folder contains or is a link to a place outside `root`, or contains something that is no file or folder.

    Args:
        location: the folder; on S3 the result is False.
        root: the folder that no link may leave.

    Raises: DataError: a location is not valid.
    """
    if is_s3_uri(location):
        return False
    limit, top = (os.path.realpath(open_filesystem(uri)[1]) for uri in (root, location))
    if not is_below(top, limit):
        return True
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            target = os.path.realpath(f"{folder}/{name}")
            if not is_below(target, limit) or not (os.path.isdir(target) or os.path.isfile(target)):
                return True
    return False


def is_below(location: str, root: str) -> bool:
    """Returns whether a path or URI is `root` or lies below it. It compares only the texts, without following links or ".."."""
    return f"{location}/".startswith(f"{root.rstrip('/')}/")


def join_path(root: str | Path, *names: str) -> str:
    """Joins a local path or a URI and names with slashes."""
    return "/".join([str(root).rstrip("/"), *names])


def make_absolute_path(location: str) -> str:
    """Returns a local path as an absolute path, because workers run in other folders. A URI is returned unchanged."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


def read_bytes(uri: str | Path, is_quick: bool = False, max_bytes: int | None = None) -> bytes:
    """Reads a file on a disk or on S3, and returns its bytes.

    Args:
        uri: local path or URI of the file.
        is_quick: as for `open_filesystem`.
        max_bytes: largest allowed size of the file; None: any size.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file cannot be read, or has more than `max_bytes`.
    """
    with _open_location("read", uri, is_quick) as (filesystem, path):
        data = read_file(filesystem, path, max_bytes)
    if data is None:
        raise FileNotFoundError(f"{uri}: no such file")
    return data


def write_bytes(uri: str | Path, data: bytes, is_quick: bool = False) -> None:
    """Writes a file on a disk or on S3, completely or not at all. Missing folders are created.

    Args: is_quick: as for `open_filesystem`.

    Raises: DataError: the file cannot be written.
    """
    with _open_location("write", uri, is_quick) as (filesystem, path):
        write_file(filesystem, path, data)


def check_folder_access(
    uri: str | Path, actions: Sequence[str] = ("write", "read", "list", "delete"), is_quick: bool = True
) -> None:
    """Checks with a small test file that this process may write, read, list and delete files in a folder.

    The test file is deleted only if `actions` contains "delete". Writing creates a missing local folder.

    Args:
        uri: the folder.
        actions: a selection of "write", "read", "list" and "delete". Without "write" only "list" is checked.
        is_quick: each request is sent at most twice, so that the check fails within seconds.

    Raises: DataError: an action is not allowed. The message names the location and the first action that failed.
    """
    filesystem, path = open_filesystem(uri, is_quick)
    content = uuid.uuid4().hex.encode()
    probe = f"{path}/_probe-{content.decode()}"
    if "write" in actions:
        with explain_storage_errors("write", uri, probe):
            write_file(filesystem, probe, content)
        if "read" in actions:
            with explain_storage_errors("read", uri, probe):
                if read_file(filesystem, probe) != content:
                    raise OSError("the content that was read differs from the content that was written")
    if "list" in actions:
        with explain_storage_errors("list", uri, path):
            filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    if "write" in actions and "delete" in actions:
        with explain_storage_errors("delete", uri, probe):
            filesystem.delete_file(probe)


def write_bytes_if_absent(uri: str | Path, data: bytes) -> bool:
    """Writes a file completely, but only if the file does not exist. Of several concurrent writers exactly one succeeds.

    Args:
        uri: local path or URI of the file. Missing local folders are created.
        data: the content. It must differ between callers (a random part is enough). When the response of the server is lost and
            the request is retried, a writer recognises its own file by its content.

    Returns:
        Whether this caller wrote the file.

    Raises:
        DataError: the file cannot be written.
    """
    with _open_location("create", uri) as (filesystem, path):
        if not isinstance(filesystem, fs.LocalFileSystem):
            bucket, _, key = path.partition("/")
            return _put_object_if_absent(bucket, key, data) or read_file(filesystem, path) == data
        try:
            with _write_temporary_file(Path(path), data) as temporary:
                os.link(temporary, path)  # unlike a rename, a link never replaces an existing file
        except FileExistsError:
            return False
        return True


def _put_object_if_absent(bucket: str, key: str, data: bytes) -> bool:
    """Creates an S3 object, but only if it does not exist. Returns whether it was created.

    Raises: ClientError: the request failed. DataError: an AWS setting is invalid.
    """
    client = _open_boto_client(bucket)
    try:
        # Amazon reports two concurrent writers as a conflict
        _call_with_retries(
            lambda: client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"),
            lambda error: _get_error_code(error) == "ConditionalRequestConflict",
        )
    except _get_client_error_types() as error:
        if _get_error_code(error) in ("PreconditionFailed", "412"):
            return False
        raise
    return True


def _get_client_error_types() -> tuple[type[Exception], ...]:
    """Returns the base classes of all errors of boto3, for an `except` clause. It imports botocore only when it is called."""
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError


def _get_error_code(error: Exception) -> str:
    """Returns the error code of S3 in an error of boto3, such as NoSuchKey; "" for an error without a response."""
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


class ListedObject(NamedTuple):
    """An object in a listing of S3: path relative to the listed prefix, size in bytes, and ETag (hash of its content)."""

    path: str
    num_bytes: int
    etag: str


def list_objects(uri: str) -> Iterator[ListedObject]:
    """Generator: yields every object below an s3:// prefix in the order of the keys, with one request per thousand objects.

    Raises: DataError: the prefix cannot be listed.
    """
    with _open_location("list", uri) as (_, path):
        bucket, _, key = path.partition("/")
        prefix = f"{key}/" if key else ""
        pages = _open_boto_client(bucket).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for item in (item for page in pages for item in page.get("Contents", ())):
            if item["Key"] != prefix:
                yield ListedObject(item["Key"][len(prefix) :], item["Size"], item["ETag"].strip('"'))


class S3ObjectReader:
    """Reads complete objects of one S3 bucket with one request per object; pyarrow needs three. Threads may share a reader."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._cached_client: Any = None
        self._lock = threading.Lock()

    def read_object(self, uri: str) -> bytes | None:
        """Returns the bytes of an S3 object, or None if it does not exist.

        Args: uri: s3:// URI of an object in the bucket of the reader.

        Raises: DataError: the object cannot be read.
        """
        bucket, _, key = uri[len("s3://") :].partition("/")
        with self._lock:  # boto3 clients must not be created in several threads at once
            client = self._cached_client = self._cached_client or _open_boto_client(bucket)
        with explain_storage_errors("read", self.uri, f"{bucket}/{key}"):
            try:
                # without a code, the body was interrupted, and boto3 does not retry that
                return _call_with_retries(
                    lambda: bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read()),
                    lambda error: isinstance(error, _get_client_error_types()) and not _get_error_code(error),
                )
            except _get_client_error_types() as error:
                if _get_error_code(error) in ("NoSuchKey", "404"):
                    return None
                raise


def list_folder_entries(uri: str | Path) -> list[str]:
    """Returns the sorted names of the files and folders directly in a folder.

    Returns: an empty list if the folder does not exist or is a file.

    Raises: DataError: the folder cannot be listed.
    """
    with _open_location("list", uri) as (filesystem, path):
        selector = fs.FileSelector(path, allow_not_found=True)
        try:
            entries = filesystem.get_file_info(selector)
        except FileNotFoundError:  # pyarrow looks twice, and fails if the folder is created in between
            entries = filesystem.get_file_info(selector)
        except NotADirectoryError:
            return []
    return sorted(entry.base_name for entry in entries)


def read_file_stat(uri: str | Path) -> FileStat | None:
    """Returns time of change and size of a file; None if there is no file at this location.

    Raises: DataError: the lookup fails.
    """
    with _open_location("look up", uri) as (filesystem, path):
        info = filesystem.get_file_info(path)
    return FileStat(info.mtime_ns or 0, info.size) if info.type == fs.FileType.File else None


def read_stats_in_subfolders(uri: str | Path, name: str) -> dict[str, FileStat]:
    """Looks up a file of the same name in each folder directly below a location, and returns time of change and size of each.

    On S3 one listing of everything below the location is enough. On a disk each file is looked up.

    Args:
        uri: the location.
        name: the file name to look for in each folder.

    Returns:
        Folder name -> stamp, sorted by folder name. Folders without such a file are left out.

    Raises:
        DataError: the location cannot be listed.
    """
    with _open_location("list", uri) as (filesystem, path):
        if isinstance(filesystem, fs.LocalFileSystem):
            entries = filesystem.get_file_info([f"{path}/{folder}/{name}" for folder in list_folder_entries(path)])
        else:
            entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = ((entry.path.removeprefix(f"{path}/").split("/"), entry) for entry in entries if entry.is_file)
    stamps = {names[0]: FileStat(file.mtime_ns or 0, file.size) for names, file in files if names[1:] == [name]}
    return dict(sorted(stamps.items()))


def file_exists(uri: str | Path) -> bool:
    """Returns whether a file exists. For a folder the result is False. Raises: DataError: the lookup fails."""
    return read_file_stat(uri) is not None


def remove_file(uri: str | Path) -> None:
    """Deletes a file. If there is no file at this location, nothing happens.

    Raises: DataError: the file cannot be deleted.
    """
    with _open_location("delete", uri) as (filesystem, path):
        if filesystem.get_file_info(path).type == fs.FileType.File:
            filesystem.delete_file(path)


def remove_folder(uri: str | Path) -> None:
    """Deletes a folder and everything in it. If the folder does not exist, nothing happens.

    Raises: DataError: the deletion fails.
    """
    with _open_location("delete", uri) as (filesystem, path):
        filesystem.delete_dir_contents(path, missing_dir_ok=True)
        if isinstance(filesystem, fs.LocalFileSystem) and Path(path).is_dir():
            filesystem.delete_dir(path)
