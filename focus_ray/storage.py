"""Local paths and s3:// URIs behind one pyarrow filesystem, and one clear error for whatever goes wrong there.

S3 takes the standard variables and AWS files (`s3_settings`): AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or
AWS_PROFILE; AWS_REGION or AWS_DEFAULT_REGION; AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) for servers other than Amazon's;
AWS_CA_BUNDLE; HTTPS_PROXY and NO_PROXY; FOCUS_RAY_S3_ADDRESSING=virtual for servers that want the bucket in the host's name.
Credentials are never copied into a URI, a log or a pickled filesystem.

A request that is throttled, refused for the moment or cut off is sent again with growing pauses: AWS_MAX_ATTEMPTS times
in all, ten unless it is set, which outlasts a server that restarts.
"""

from __future__ import annotations

import errno
import io
import os
import random
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

from focus_ray.errors import DataError, StorageError
from focus_ray.extras import require_extra
from focus_ray.s3_settings import S3Settings, s3_settings

T = TypeVar("T")
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 60.0
MAX_ATTEMPTS = 10  # of a request; the pauses between them double and come to about 25 s
QUICK_ATTEMPTS, QUICK_TIMEOUT_S = 2, 10.0  # of callers that try again by themselves, or that only ask whether it works

_BUSY = ("Failed to flush response stream", "INTERNAL_FAILURE", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "status 503")


class Stamp(NamedTuple):
    """When a file was last changed, in ns since 1970 (S3 tells seconds), and its bytes."""

    mtime_ns: int
    num_bytes: int


def is_s3(uri: str | Path) -> bool:
    """Whether a location is on S3."""
    return str(uri).startswith("s3://")


def open_filesystem(uri: str | Path, is_quick: bool = False) -> tuple[fs.FileSystem, str]:
    """The filesystem of a location and the path inside it, without a closing slash.

    Args:
        uri: a local path (a leading ``~`` is resolved), ``file:///path`` or ``s3://bucket/prefix``.
        is_quick: requests to S3 fail after QUICK_ATTEMPTS and QUICK_TIMEOUT_S instead of minutes.

    Returns: for S3 the path is ``bucket/prefix``; local paths are absolute. Nothing is created or contacted, but for
        the bucket's region where neither a region nor an endpoint is set.

    Raises: DataError: another scheme, an S3 URI without a bucket or with a query.  MissingPackageError: S3 without boto3.
    """
    text = str(uri)
    scheme = text.partition("://")[0] if "://" in text else ""
    if is_s3(text):
        path = text[len("s3://") :].strip("/")
        if not path or "?" in path:
            raise DataError(
                f"{text}: expected s3://bucket/prefix without a query; set the server with AWS_ENDPOINT_URL"
            )
        if "//" in path:
            raise DataError(f"{text}: two slashes in a row: a folder's name is empty; leave one out")
        require_extra("s3", text)
        return _make_s3(_region(path.partition("/")[0]), s3_settings().endpoint, is_quick), path
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
    with _beside(Path(path), data) as temporary:
        os.replace(temporary, path)


@contextmanager
def _beside(target: Path, data: bytes) -> Iterator[Path]:
    """A file of the data in the target's folder, on disk, to be moved or linked to its place; gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = (
        target.parent / f".tmp-{uuid.uuid4().hex}"
    )  # without the target's name, which may be as long as a name can be
    try:
        temporary.write_bytes(data)
        sync_file(fs.LocalFileSystem(), str(temporary))
        yield temporary
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


def read_file(filesystem: fs.FileSystem, path: str, max_bytes: int | None = None) -> bytes | None:
    """A small file's bytes; None where there is none.

    Raises: OSError: run it inside ``storage_errors``.  DataError: the file has more than `max_bytes`; it is not read.
    """
    info = filesystem.get_file_info(path)
    if info.type != fs.FileType.File:
        return None
    if max_bytes is not None and info.size > max_bytes:
        raise DataError(f"{path}: the file has {info.size} bytes, expected {max_bytes} at most: it is not read")
    with open_input(filesystem, path) as stream:
        return bytes(stream.read() if max_bytes is None else stream.read(max_bytes))


def open_input(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """A file to read from, at any position. Raises: OSError: run it inside ``storage_errors``."""
    file = filesystem.open_input_file(path)
    return file if isinstance(filesystem, fs.LocalFileSystem) else pa.PythonFile(_PatientFile(file), mode="r")


def retrying(action: Callable[[], T]) -> T:
    """Does what reads from S3, again where the store was busy.

    A busy store's answer is longer than a small range of bytes, has no room in pyarrow's buffer (26.0) and comes up as a
    failure that pyarrow does not ask again for.

    Raises: OSError: the last one, after ``max_attempts``.
    """
    for attempt in range(1, max_attempts() + 1):
        try:
            return action()
        except OSError as error:
            if attempt == max_attempts() or not any(sign in str(error) for sign in _BUSY):
                raise
            time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
    raise AssertionError("max_attempts is 1 at least")


class _PatientFile(io.RawIOBase):
    """A file on S3 whose reads are tried again."""

    def __init__(self, file: pa.NativeFile) -> None:
        super().__init__()
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size()}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size() - self._position)
        count = left if size is None or size < 0 else min(size, left)
        content: bytes = retrying(lambda: self._file.read_at(count, self._position)) if count else b""
        self._position += len(content)
        return content

    def close(self) -> None:
        self._file.close()
        super().close()


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
        raise StorageError(_explain(error, action, str(uri), path)) from error


def find_os_error(error: BaseException | None) -> OSError | None:
    """The `OSError` that an error is or was raised from; None without one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException) -> bool:
    """Whether a disk, quota or limit of a file's size had no more room."""
    cause = find_os_error(error)
    return cause is not None and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _RetryingS3(fs.S3FileSystem):
    """pyarrow's, which forgets its retries when it is sent to another process (26.0); nothing secret is sent either."""

    def __reduce__(self) -> tuple[Any, ...]:
        _, (options,) = super().__reduce__()
        return _make_s3, (options["region"], options["endpoint_override"] or None)


def _make_s3(region: str | None, endpoint: str | None, is_quick: bool = False) -> fs.S3FileSystem:
    return _RetryingS3(
        region=region,
        endpoint_override=endpoint,
        **s3_settings().for_pyarrow(),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=QUICK_TIMEOUT_S if is_quick else REQUEST_TIMEOUT_S,
        allow_delayed_open=True,  # a small file is one PUT, not the three requests of a multipart upload
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=QUICK_ATTEMPTS if is_quick else max_attempts()),
    )


def max_attempts() -> int:
    """How often a request to S3 is sent before it has failed. Raises: DataError: AWS_MAX_ATTEMPTS is no such number."""
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(MAX_ATTEMPTS)
    if not text.isdigit() or not int(text):
        raise DataError(f"AWS_MAX_ATTEMPTS={text!r}: expected a number of attempts, 1 or more")
    return int(text)


def _region(bucket: str) -> str:
    settings = s3_settings()
    region = settings.region
    if region is None and settings.endpoint:
        return "us-east-1"  # what servers other than Amazon's take
    if region is None:
        with storage_errors("find the bucket's region (or set AWS_REGION)", f"s3://{bucket}", bucket):
            return str(fs.resolve_s3_region(bucket))
    return region


@lru_cache(maxsize=4)
def _boto_client(region: str, settings: S3Settings, attempts: int, identity: tuple[str | None, ...]) -> Any:
    """boto3's client, for what pyarrow cannot ask: a PUT on condition, and a server's own reason. `identity` parts clients of
    other credentials."""
    import boto3
    from botocore.config import Config

    options = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,  # as many threads read at once
        s3={
            "addressing_style": "virtual" if settings.virtual else "path" if settings.endpoint else "auto"
        },  # as pyarrow
        proxies={"http": settings.proxy, "https": settings.proxy} if settings.proxy else None,
        request_checksum_calculation="when_required",  # not every server knows the newer ones
    )
    return boto3.Session().client(
        "s3", region_name=region, endpoint_url=settings.endpoint, config=options, verify=settings.ca_file
    )


def _client(bucket: str, attempts: int | None = None) -> Any:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    identity = tuple(os.environ.get(name) for name in names)
    return _boto_client(_region(bucket), s3_settings(), attempts or max_attempts(), identity)


def _own_reason(bucket: str) -> str:
    """Why the server refuses, in its own words: pyarrow asks with a HEAD, whose answer has no body, so this asks with a GET."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        _client(bucket, attempts=1).list_objects_v2(Bucket=bucket, MaxKeys=1)
    except ClientError as error:
        told = error.response.get("Error", {})
        return f"{told.get('Code', '')}: {told.get('Message', '')} {error.response.get('Region', '')}".strip(": ")
    except (BotoCoreError, DataError):
        return ""
    return ""


def _explain(error: OSError, action: str, uri: str, path: str | None) -> str:
    if not is_s3(uri):
        detail = error.strerror or str(error)
        return f"{path or uri}: cannot {action}: {detail}"
    bucket, _, key = (path or uri[len("s3://") :]).partition("/")
    text = str(error)
    endpoint = s3_settings().endpoint
    server = endpoint.rpartition("@")[2] if endpoint else "Amazon S3 (AWS_ENDPOINT_URL is not set)"
    hint = _hint(text)
    if hint in (_DENIED, _FAILED) and (reason := _own_reason(bucket)):
        text = f"{text}; the server says: {reason}"
        hint = _hint(reason) if _hint(reason) != _FAILED else hint
    return f"S3 bucket {bucket!r}, key {key!r} at {server}: cannot {action}: {hint} [{text}]"


_DENIED = (
    "access denied: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to an identity that the "
    "bucket's policy allows this"
)
_FAILED = "the request failed"


def _hint(text: str) -> str:
    text = text.upper().replace("_", "")  # pyarrow writes ACCESS_DENIED, boto3 AccessDenied
    if "TOOSKEWED" in text or "SKEWED" in text:
        return "this machine's clock is too far from the server's: set it right (timedatectl set-ntp true)"
    if any(sign in text for sign in ("QUOTA", "STORAGEFULL", "INSUFFICIENTSTORAGE", "NOSPACELEFT", "STATUS 507")):
        return "the storage or its quota is full: free space, or raise the quota"
    if any(
        sign in text
        for sign in (
            "AUTHORIZATIONHEADERMALFORMED",
            "PERMANENTREDIRECT",
            "ILLEGALLOCATION",
            "STATUS 301",
            "IS WRONG; EXPECTING",
        )
    ):
        return "the bucket is in another region: set AWS_REGION to the one that the server names"
    if "UNABLE TO LOCATE CREDENTIALS" in text:
        return "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if any(sign in text for sign in ("SIGNATURE", "INVALIDACCESSKEY", "INVALIDCLIENTTOKEN", "EXPIRED")):
        return (
            "the credentials are wrong or expired: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(with AWS_SESSION_TOKEN if they are temporary), or AWS_PROFILE"
        )
    if "ACCESSDENIED" in text:
        return _DENIED
    if "NOSUCHBUCKET" in text:
        return "there is no such bucket: create it, or mend the URI or AWS_ENDPOINT_URL"
    if any(
        sign in text for sign in ("NETWORKCONNECTION", "REQUESTTIMEOUT", "CURLCODE", "COULD NOT CONNECT", "TIMEOUT")
    ):
        return "no connection: set AWS_ENDPOINT_URL to the server's address, and see that it runs"
    if "PERMANENTREDIRECT" in text or "MOVED" in text:
        return "the bucket is in another region: set AWS_REGION"
    return _FAILED


def leads_out(place: str, root: str) -> bool:
    """Whether a folder, or anything in it, is a link to a place outside `root`, or no file; False on S3, which has no links."""
    if is_s3(place):
        return False
    limit, top = (os.path.realpath(open_filesystem(uri)[1]) for uri in (root, place))
    if not is_below(top, limit):
        return True
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            real = os.path.realpath(f"{folder}/{name}")
            if not is_below(real, limit) or not (os.path.isdir(real) or os.path.isfile(real)):
                return True
    return False


def is_below(place: str, root: str) -> bool:
    """Whether a normal path or URI is another one, or lies below it."""
    return f"{place}/".startswith(f"{root.rstrip('/')}/")


def join(root: str | Path, *names: str) -> str:
    """A location below another, for paths and URIs alike."""
    return "/".join([str(root).rstrip("/"), *names])


def absolute_place(place: str) -> str:
    """A local path made absolute, for workers run in other folders; a URI as it is."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def read_bytes(uri: str | Path, is_quick: bool = False, max_bytes: int | None = None) -> bytes:
    """Returns the bytes of a file.

    Args:
        is_quick: as of `open_filesystem`.

    Raises: FileNotFoundError: there is no such file.  DataError: it cannot be read, or has more than `max_bytes`.
    """
    filesystem, path = open_filesystem(uri, is_quick)
    with storage_errors("read", uri, path):
        data = read_file(filesystem, path, max_bytes)
    if data is None:
        raise FileNotFoundError(f"{uri}: no such file")
    return data


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises: DataError: it cannot be written."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("write", uri, path):
        write_file(filesystem, path, data)


def probe(uri: str | Path, actions: Sequence[str] = ("write", "read", "list", "delete")) -> None:
    """Tries, on a small file of its own, what a job will do in a folder; asks twice at most, so that it fails in seconds.

    Args:
        actions: of "write", "read", "list" and "delete", in this order; without "write" only "list" is tried.

    Raises: DataError: the first that is not allowed, with bucket, key and action.
    """
    filesystem, path = open_filesystem(uri, is_quick=True)
    content = uuid.uuid4().hex.encode()
    file = f"{path}/_probe-{content.decode()}"
    if "write" in actions:
        with storage_errors("write", uri, file):
            write_file(filesystem, file, content)
        if "read" in actions:
            with storage_errors("read", uri, file):
                if read_file(filesystem, file) != content:
                    raise OSError("what was just written is not what is read")
    if "list" in actions:
        with storage_errors("list", uri, path):
            filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    if "write" in actions and "delete" in actions:
        with storage_errors("delete", uri, file):
            filesystem.delete_file(file)


def create_bytes(uri: str | Path, data: bytes) -> bool:
    """Writes a file, whole, only if there is none; of several writers at once one succeeds.

    Args:
        data: another for every caller (a random part will do): that is how a writer whose answer was lost on the way, and
            who asked again, knows its own file.

    Returns: whether the file is this caller's.

    Raises: DataError: it cannot be written.
    """
    filesystem, path = open_filesystem(uri)
    with storage_errors("create", uri, path):
        if not isinstance(filesystem, fs.LocalFileSystem):
            bucket, _, key = path.partition("/")
            return _put_if_none(bucket, key, data) or read_file(filesystem, path) == data
        try:
            with _beside(Path(path), data) as temporary:
                os.link(temporary, path)  # unlike a rename it does not replace
        except FileExistsError:
            return False
        return True


def _put_if_none(bucket: str, key: str, data: bytes) -> bool:
    """Whether the object was created. Raises: OSError: the server could not be asked."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = _client(bucket)
    for _ in range(max_attempts()):
        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in ("PreconditionFailed", "412"):
                return False
            if code != "ConditionalRequestConflict":  # Amazon's word for two at once: ask again
                raise OSError(str(error)) from error
        except BotoCoreError as error:
            raise OSError(str(error)) from error
        else:
            return True
    raise OSError("other writers of the same object kept coming first")


class Listed(NamedTuple):
    """An object: its path below what was listed, its bytes, and its ETag, which no other content has."""

    path: str
    num_bytes: int
    etag: str


def list_objects(uri: str) -> Iterator[Listed]:
    """Every object below an s3:// prefix, in the order of their keys: a request a thousand. Raises: DataError."""
    from botocore.exceptions import BotoCoreError, ClientError

    _, place = open_filesystem(uri)
    bucket, _, key = place.partition("/")
    prefix = f"{key}/" if key else ""
    with storage_errors("list", uri, place):
        try:
            for page in _client(bucket).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    if item["Key"] != prefix:
                        yield Listed(item["Key"][len(prefix) :], item["Size"], item["ETag"].strip('"'))
        except (BotoCoreError, ClientError) as error:
            raise OSError(str(error)) from error


class ObjectReader:
    """Reads whole objects of one bucket, a request each; pyarrow takes three. Threads may share it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._made: Any = None
        self._lock = threading.Lock()

    def read(self, uri: str) -> bytes | None:
        """An object's bytes; None where there is none. Raises: DataError: it cannot be read."""
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = uri[len("s3://") :].partition("/")
        with self._lock:  # making a client is not safe among threads
            client = self._made = self._made or _client(bucket)
        with storage_errors("read", self.uri, f"{bucket}/{key}"):
            for attempt in range(1, max_attempts() + 1):
                try:
                    return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
                except ClientError as error:
                    if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404"):
                        return None
                    raise OSError(str(error)) from error
                except BotoCoreError as error:  # cut off in the middle, for what boto3 does not ask again
                    if attempt == max_attempts():
                        raise OSError(str(error)) from error
                    time.sleep(min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
        raise AssertionError("max_attempts is 1 at least")


def list_names(uri: str | Path) -> list[str]:
    """Names of the files and folders directly in a folder, sorted; empty where there is no such folder."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("list", uri, path):
        selector = fs.FileSelector(path, allow_not_found=True)
        try:
            found = filesystem.get_file_info(selector)
        except FileNotFoundError:  # pyarrow looks twice, and says so of a folder that is made in between
            found = filesystem.get_file_info(selector)
        except NotADirectoryError:
            return []
    return sorted(item.base_name for item in found)


def stamp(uri: str | Path) -> Stamp | None:
    """A file's stamp; None where there is none. Raises: DataError: it cannot be told."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("look up", uri, path):
        info = filesystem.get_file_info(path)
    return Stamp(info.mtime_ns or 0, info.size) if info.type == fs.FileType.File else None


def stamps(uri: str | Path, name: str) -> dict[str, Stamp]:
    """The files of one name in the folders directly in a folder: folder's name -> stamp, sorted.

    One listing on S3, of everything below; on a disk a listing of the folder and a look at each file.

    Raises: DataError: the folder cannot be listed.
    """
    filesystem, path = open_filesystem(uri)
    with storage_errors("list", uri, path):
        if isinstance(filesystem, fs.LocalFileSystem):
            found = filesystem.get_file_info([f"{path}/{folder}/{name}" for folder in list_names(path)])
        else:
            found = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [item for item in found if item.type == fs.FileType.File]
    parts = ((item.path.removeprefix(f"{path}/").split("/"), item) for item in files)
    return dict(
        sorted((place[0], Stamp(item.mtime_ns or 0, item.size)) for place, item in parts if place[1:] == [name])
    )


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
    """Deletes a folder with all that is in it; none there is no error."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("delete", uri, path):
        filesystem.delete_dir_contents(path, missing_dir_ok=True)
        if isinstance(filesystem, fs.LocalFileSystem) and Path(path).is_dir():
            filesystem.delete_dir(path)
