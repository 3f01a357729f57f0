"""python -m app score: the service's verdicts for files, rows in place and in order, exit codes, bounded memory."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from app.__main__ import cli
from app.codecs.npy import encode_npy
from app.scoring import run
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Service


def score(store: Path, *arguments: object, **environment: str) -> Result:
    # A row at a time: how many share a forward may move a last digit.
    variables = {"HOURGLASS_MODELS_STORE": str(store), "HOURGLASS_MAX_BATCH_SIZE": "1", **environment}
    return CliRunner().invoke(cli, ["score", *map(str, arguments)], env=variables)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("path", "row", "id")} for row in rows]


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def one_by_one(store: Path, run_app: Callable[..., AbstractContextManager[Service]]) -> Iterator[Service]:
    """A service over `store` whose batches are single rows."""
    with run_app(Settings(models_store=store, log_format="json", max_batch_size=1)) as service:
        yield service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures of every kind, and of what is to be passed over."""
    noise = np.random.default_rng(3)
    (tmp_path / "a.png").write_bytes(png(noise.integers(0, 230, (8, 8), np.uint8)))
    deep = tmp_path / "b" / "deep"
    deep.mkdir(parents=True)
    Image.fromarray(noise.integers(0, 230, (40, 30, 3), np.uint8)).save(deep / "photo.JPG", "JPEG")
    Image.fromarray(noise.integers(0, 60_000, (20, 8)).astype(np.uint16)).save(tmp_path / "c.tiff")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"no picture")
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "old.png").write_bytes(b"no picture")
    return tmp_path


def test_the_verdicts_are_those_of_the_service(store: Path, one_by_one: Service, folder: Path) -> None:
    """Pictures of a folder get, in order, the service's verdicts for the same files, to the last digit."""
    paths = [folder / "a.png", folder / "b" / "deep" / "photo.JPG", folder / "c.tiff"]
    files = [("file", (path.name, path.read_bytes())) for path in paths]
    own = one_by_one.client.post("/anomaly-score?target_fpr=0.05", files=files).json()["results"]
    result = score(store, folder, "--target-fpr", 0.05)
    assert result.exit_code == 0, result.stderr
    assert [row["path"] for row in rows_of(result)] == [str(path) for path in paths]
    assert verdicts(rows_of(result)) == own
    assert "3 items by tiny:2: 3 scored" in result.stderr
    assert "\x1b" not in result.stderr  # no bar where nobody looks
    first = one_by_one.client.post("/anomaly-score?model=tiny:1&invert=true", files=files[:1]).json()["results"]
    assert verdicts(rows_of(score(store, paths[0], "--model", "tiny:1", "--invert"))) == first


def test_every_kind_of_file_and_of_output_has_the_same_digits(
    store: Path, one_by_one: Service, items: np.ndarray, tmp_path: Path
) -> None:
    """Arrays, archives and tables of pictures are scored as the service does, and written alike in each format."""
    pixels = (items[:, 0] * 120).astype(np.uint8)  # dark: nothing is inverted
    np.save(tmp_path / "items.npy", pixels[:, np.newaxis])
    with zipfile.ZipFile(tmp_path / "items.zip", "w") as archive:
        for index, picture in enumerate(pixels):
            archive.writestr(f"{index}.png", png(picture))
    files = [png(picture) for picture in pixels]
    pq.write_table(pa.table({"id": list(range(10)), "image": files}), tmp_path / "items.parquet")
    structs = [{"bytes": data, "path": None} for data in files]
    pq.write_table(pa.table({"image": structs}), tmp_path / "structs.parquet")
    lines = [
        json.dumps({"id": f"n{index}", "instance": (row / np.float32(255)).tolist()})
        for index, row in enumerate(pixels)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    body = {"content": encode_npy(pixels[:, np.newaxis]), "headers": {"content-type": "application/x-npy"}}
    own = one_by_one.client.post("/anomaly-score", **body).json()["results"]
    for name in ("items.npy", "items.zip", "items.parquet", "structs.parquet"):
        result = score(store, tmp_path / name)
        assert result.exit_code == 0, result.stderr
        assert verdicts(rows_of(result)) == own, name
        assert [row["row"] for row in rows_of(result)] == list(range(10))
    result = score(store, tmp_path / "items.jsonl")
    assert [row["id"] for row in rows_of(result)] == [f"n{index}" for index in range(10)]
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        result = score(store, tmp_path / "items.parquet", "--out", tmp_path / name)
        assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert verdicts(written) == own
    assert [row["id"] for row in written] == list(range(10))
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    with (tmp_path / "out.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert table[0].keys() == cells[0].keys()
    for row, line, expected in zip(table, cells, own, strict=True):
        assert {name: row[name] for name in expected if name != "components"} == {
            name: value for name, value in expected.items() if name != "components"
        }
        assert (row["id"], row["error"]) == (line["id"], None)
        assert json.loads(line["score"]) == expected["score"]
        assert line["is_anomaly"] == json.dumps(expected["is_anomaly"])


def test_records_from_tables(
    records_store: Path, run_app: Callable[..., AbstractContextManager[Service]], tmp_path: Path
) -> None:
    """Rows of CSV and Parquet, their columns in any order, get the service's verdicts; so does a folder of them."""
    rows = np.random.default_rng(5).normal(size=(6, 64)).astype(np.float32)
    names = [f"f{number}" for number in reversed(range(64))]
    columns = {"id": [f"r{index}" for index in range(6)], **{name: rows[:, int(name[1:])] for name in names}}
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    table = [",".join(columns)] + [",".join(str(column[index]) for column in columns.values()) for index in range(6)]
    (tmp_path / "a.csv").write_text("\n".join(table))
    with run_app(Settings(models_store=records_store, log_format="json", max_batch_size=1)) as service:
        own = service.client.post("/anomaly-score", json={"instances": rows.astype(float).tolist()}).json()["results"]
    result = score(records_store, tmp_path)
    assert result.exit_code == 0, result.stderr
    assert verdicts(rows_of(result)) == own + own
    assert [row["id"] for row in rows_of(result)] == [f"r{index}" for index in range(6)] * 2
    broken = pa.table({**columns, "f1": [0.5, None, 0.5, 0.5, 0.5, 0.5]})
    pq.write_table(broken, tmp_path / "b.parquet")
    result = score(records_store, tmp_path / "b.parquet")
    assert [row.get("code") for row in rows_of(result)] == [None, "invalid_input", None, None, None, None]


def test_one_items_trouble_stands_in_its_place(store: Path, folder: Path, items: np.ndarray) -> None:
    """Bad files and rows among good ones are told where they stand; the others are scored, and the exit code is 1."""
    (folder / "bad.png").write_bytes(b"no picture")
    poisoned = items[:3].copy()
    poisoned[1, 0, 0, 0] = 0.9375
    np.save(folder / "rows.npy", poisoned)
    (folder / "cut.npy").write_bytes(encode_npy(items)[:-100])
    (folder / "locked").symlink_to(folder / "nowhere")
    arguments = [folder / name for name in ("bad.png", "rows.npy", "cut.npy", "locked", "a.png")]
    out = folder / "out.csv"
    result = score(store, *arguments, "--out", out, HOURGLASS_MAX_BATCH_SIZE="16")
    assert result.exit_code == 1
    assert "16 items by tiny:2: 12 scored" in result.stderr
    with out.open(newline="") as file:
        rows = [(Path(row["path"]).name, row["row"], row["code"]) for row in csv.DictReader(file)]
    cut = [("cut.npy", str(row), "") for row in range(9)] + [("cut.npy", "9", "malformed_payload")]
    assert rows == [
        ("bad.png", "", "image_not_decodable"),
        ("rows.npy", "0", ""),
        ("rows.npy", "1", "inference_failed"),
        ("rows.npy", "2", ""),
        *cut,
        ("locked", "", "invalid_input"),
        ("a.png", "", ""),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png: no such file or folder, and no glob that matches one"),
        (["."], "expected pictures for this model, found none"),
        (["a.png", "--model", "nobody"], "expected one of tiny, tiny-plain; found 'nobody'"),
        (["a.png", "--target-fpr", "2"], "--target-fpr: Input should be less than 1"),
        (["a.png", "--target-fpr", "0.001"], "99 calibration scores support rates down to"),
        (["a.png", "--out", "rows.txt"], "expected a name that ends with .parquet, .csv, .jsonl"),
        (["a.png", "--out", "nowhere/rows.csv"], "the folder nowhere does not exist"),
    ],
)
def test_what_cannot_be_done_is_told(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Whatever makes scoring impossible is one line on stderr and exit code 2, and leaves no file behind."""
    monkeypatch.chdir(tmp_path)
    if arguments != ["."]:
        (tmp_path / "a.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    before = os.listdir(tmp_path)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "rows.csv"]
    result = score(store, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize("arguments", [["rows.parquet"], ["a.png", "--out", "rows.parquet"]])
def test_parquet_without_pyarrow(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Where pyarrow is not installed, Parquet is refused with the way to install it; nothing else needs it."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "rows.parquet")
    (tmp_path / "a.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = score(store, *arguments)
    assert result.exit_code == 2
    assert "pip install 'hourglass-autoencoders[parquet]'" in result.stderr
    assert score(store, "a.png", "--out", "rows.csv").exit_code == 0


def test_globs_and_folders_are_sorted(store: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files come as they are named, those of globs and folders sorted; a name with brackets is a name first."""
    monkeypatch.chdir(folder)
    (folder / "x[1].png").write_bytes((folder / "a.png").read_bytes())
    result = score(store, "c.tiff", "**/*.JPG", "x[1].png", "b")
    assert [row["path"] for row in rows_of(result)] == ["c.tiff", "b/deep/photo.JPG", "x[1].png", "b/deep/photo.JPG"]


def test_no_more_is_read_than_is_worked_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of many items is read only a few batches ahead of the rows that are written."""
    np.save(tmp_path / "many.npy", np.full((1000, 64), 0.25, np.float32))
    read, written, ahead = 0, 0, 0
    read_items, row = run.read_items, run._row

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal read, ahead
        for found in read_items(*arguments):
            read += 1
            ahead = max(ahead, read - written)
            yield found

    def written_row(*arguments: Any) -> dict[str, Any]:
        nonlocal written
        written += 1
        return row(*arguments)

    monkeypatch.setattr(run, "read_items", counted)
    monkeypatch.setattr(run, "_row", written_row)
    assert score(store, tmp_path / "many.npy", HOURGLASS_MAX_BATCH_SIZE="16").exit_code == 0
    assert (read, written) == (1000, 1000)
    assert ahead <= 4 * 16  # batches of 16 rows
