"""Sources on S3 give the same data set as the same folders on a disk, and each object is read once."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pytest
from made_sources import ingest_quietly, make_folder, make_mvtec, pixels, rows_of, save, save_all, spot
from s3_faults import FaultyProxy, faulty
from s3_server import S3Server

from focus_ray.cli.main import main
from focus_ray.data import store
from focus_ray.data.read import data_fingerprint, read_index
from focus_ray.data.source import S3Listing, S3Path, get_relative_path, open_source_folder
from focus_ray.data.store import open_data_set
from focus_ray.errors import DataError
from focus_ray.storage.files import ListedObject, write_bytes

pytestmark = pytest.mark.s3

VISA = """object,split,label,image,mask
candle,train,normal,candle/a.png,
candle,train,normal,candle/b.png,
candle,test,normal,candle/c.png,
candle,test,anomaly,candle/d.png,candle/m.png
candle,test,anomaly,candle/lost.png,
"""


def upload(folder: Path, uri: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            write_bytes(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return uri


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty(s3.endpoint, share=0) as recording_proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", recording_proxy.endpoint)
        yield recording_proxy


def count_requests(proxy: FaultyProxy, part_of_path: str) -> Counter[str]:
    """Returns the number of recorded requests per method, for requests whose path contains a text."""
    return Counter(method for method, path, _, _ in proxy.requests if part_of_path in unquote(path))


def make_visa(root: Path) -> Path:
    images = {f"candle/{name}.png": number for number, name in enumerate("abcd")}
    return save_all(root, {**images, "candle/m.png": spot((1, 1)), "split_csv/1cls.csv": VISA.encode()})


def make_unusual(root: Path) -> Path:
    texts = dict.fromkeys([f"train/good/{name}" for name in ("notes.txt", ".hidden", "odd.xyz")], b"text")
    images = {"train/good/deeper/x.png": 70, "test_private/x.png": 71, "raw/x.png": 72, "test/good/größe 1+1.png": 73}
    odd = {"train/good/broken.png": b"", "train/good/copy.png": 1, "ground_truth/crack/lone.png": spot((1, 1))}
    return save_all(make_mvtec(root), {**texts, **images, **odd})


@pytest.mark.parametrize("make", [make_mvtec, make_unusual, make_folder, make_visa])
def test_a_source_on_s3_gives_the_data_set_of_the_same_source_on_a_disk(
    s3: S3Server, tmp_path: Path, make: object
) -> None:
    folder = make(tmp_path / "bolt")  # type: ignore[operator]
    uri, out, local_out = upload(folder, f"{s3.new_uri()}/bolt"), s3.new_uri(), tmp_path / "out"
    local, remote = ingest_quietly(folder, local_out), ingest_quietly(uri, out)
    assert remote == local
    assert str(remote) == str(local)
    for category in (item.name for item in local.categories):
        assert sorted(rows_of(out, category), key=lambda row: row["id"]) == rows_of(local_out, category)
        assert data_fingerprint(out, category) == data_fingerprint(local_out, category)
        commits = [open_data_set(root).require_commit(category) for root in (local_out, out)]
        assert commits[0]["source_fingerprint"] == commits[1]["source_fingerprint"]


def test_each_object_is_read_once_and_unchanged_objects_are_not_read_again(proxy: FaultyProxy, tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "parts/bolt", num_train=17)
    make_mvtec(tmp_path / "parts/nut", num_train=7, seed=500)
    source, out = upload(tmp_path / "parts", "s3://focus-ray-tests/once-source"), "s3://focus-ray-tests/once-out"
    proxy.requests.clear()
    ingest_quietly(source, out)
    num_objects = sum(path.is_file() for path in (tmp_path / "parts").rglob("*"))
    source_requests = count_requests(proxy, "once-source")
    assert source_requests == {"GET": num_objects + 1}  # one request lists the objects
    data_requests = count_requests(proxy, "once-out")
    assert data_requests.total() <= 60

    proxy.requests.clear()
    assert [item.status for item in ingest_quietly(source, out).categories] == ["unchanged"] * 2
    assert count_requests(proxy, "once-source") == {"GET": 1}

    save(root / "train/good/new.png", pixels(999))
    write_bytes(f"{source}/bolt/train/good/new.png", (root / "train/good/new.png").read_bytes())
    proxy.requests.clear()
    (report, other) = ingest_quietly(source, out, append=True).categories
    assert (report.num_added, report.num_existing, other.status) == (1, 20, "unchanged")
    assert count_requests(proxy, "once-source") == {"GET": 2}


def test_the_cost_of_an_append_does_not_depend_on_the_number_of_part_files(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mvtec(tmp_path / "bolt", num_train=37)
    monkeypatch.setattr(store, "MAX_ROW_GROUP_ROWS", 2)
    counts, num_parts = [], []
    for file_bytes in (1, 1 << 30):
        source, out = f"s3://focus-ray-tests/append-{file_bytes}", f"s3://focus-ray-tests/appended-{file_bytes}"
        monkeypatch.setattr(store, "FILE_BYTES", file_bytes)
        ingest_quietly(tmp_path / "bolt", out)
        num_parts.append(len(open_data_set(out).require_commit("bolt")["files"]))
        upload(save_all(tmp_path / "more", {"train/good/new.png": 700}), f"{source}/bolt")
        proxy.requests.clear()
        (report,) = ingest_quietly(f"{source}/bolt", out, append=True).categories
        assert report.num_added == 1
        counts.append(count_requests(proxy, "appended"))
        assert not count_requests(proxy, "part-").keys() - {"PUT", "HEAD"}
        assert read_index(out, "bolt").num_rows == 41
    assert num_parts == [40, 1]
    assert counts[0] == counts[1]
    assert counts[0].total() <= 45


def test_errors_and_reports_name_the_uri(s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = s3.new_uri()
    with pytest.raises(DataError, match=f"{empty}: "):
        ingest_quietly(empty, tmp_path / "out")
    save(tmp_path / "bolt/pictures/a.png", pixels(0))
    unusual = upload(tmp_path / "bolt", f"{s3.new_uri()}/bolt")
    assert main(["ingest", unusual, str(tmp_path / "out")]) == 1
    output = capsys.readouterr().err
    assert f"focus-ray: {unusual}: no category found" in output
    assert f"{unusual}/pictures/good/" in output


def test_an_object_in_a_folder_with_an_empty_name_is_refused() -> None:
    with pytest.raises(DataError, match=r"s3://b/parts/train//x.png: "):
        S3Listing("s3://b/parts").add_objects([ListedObject("train//x.png", 1, "e")])


@pytest.mark.parametrize("name", ["a.png", "a.b.PNG", ".hidden", ".a.png", "a.", "a", "a..png", "größe 1.tif"])
def test_the_parts_of_a_path_are_those_of_pathlib(name: str) -> None:
    root = S3Path(S3Listing("s3://b/parts"))
    path, file = root / "train" / name, Path("/b/parts/train") / name
    assert (path.name, path.stem, path.suffix) == (file.name, file.stem, file.suffix)
    assert (path.parent.name, path.parts) == ("train", file.parts[1:])
    assert (root / f"train/{name}", root / PurePosixPath("train") / name) == (path, path)


def test_a_throttled_source_loses_no_image(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_mvtec(tmp_path / "bolt", num_train=30)
    uri, out = upload(folder, f"{s3.new_uri()}/bolt"), s3.new_uri()
    ingest_quietly(folder, tmp_path / "out")
    with faulty(s3.endpoint, share=0.2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert ingest_quietly(uri, out).num_rows == 33
        assert proxy.refused > 5
        assert data_fingerprint(out, "bolt") == data_fingerprint(tmp_path / "out", "bolt")


def test_a_pickled_path_contains_no_listing_and_no_secret(s3: S3Server, tmp_path: Path) -> None:
    uri = upload(make_mvtec(tmp_path / "bolt"), f"{s3.new_uri()}/bolt")
    root = open_source_folder(uri)
    path = root / "train" / "good" / "000.png"
    path.read_bytes()
    sent = pickle.dumps([path, root])
    assert len(sent) < 400
    again, base = pickle.loads(sent)
    assert isinstance(again, S3Path)
    assert (again, str(again)) == (path, f"{uri}/train/good/000.png")
    assert again.read_bytes() == (tmp_path / "bolt/train/good/000.png").read_bytes()
    assert get_relative_path(again, base) == "train/good/000.png"
