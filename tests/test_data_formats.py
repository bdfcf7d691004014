"""Data sets: every format round trips, bad samples are counted and named, files appear whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.data.datasets import load_named, named_sets
from foveate.data.formats import SkipReport, open_dataset, tables, write_dataset
from foveate.data.images import load_image
from foveate.data.sample import Box, ImageSource, Sample, VideoSource
from foveate.data.video import decode_frames
from foveate.errors import InputError, UnknownNameError, UnsupportedError

RNG = np.random.default_rng(0)


def _picture(width: int = 8, height: int = 6) -> np.ndarray:
    return RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)


def _png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_picture()).save(path)
    return path


def _lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def _pixels(sample: Sample) -> list[np.ndarray]:
    out: list[np.ndarray] = []
    for item in sample.media:
        if isinstance(item, ImageSource):
            out.append(np.asarray(load_image(item)))
        else:
            out += [np.asarray(f) for f in decode_frames(item, range(3))]
    return out


def _samples() -> list[Sample]:
    box = [[Box(0, 1, 2, 3, "circle", "red", None)]]
    return [
        Sample("one", [ImageSource(_picture())], [[("What is it?", "a ring")]], box, {"skill": "shape"}),
        Sample("pair", [ImageSource(_picture()), ImageSource(_picture(9, 9))], [[("Same?", "no")]]),
        Sample("clip", [VideoSource([_picture() for _ in range(3)])], [[("What moves?", "nothing")]]),
        Sample("words", [], [[("2 + 2?", "4")]]),
    ]


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.json", "llava"), ("a.jsonl", "llava"), ("a.jsonl", "openai"), ("a.jsonl", "plain"), ("a.tar", None)],
)
def test_round_trip(tmp_path: Path, name: str, format: str | None) -> None:
    samples = _samples()
    assert write_dataset(samples, tmp_path / name, format) == len(samples)
    report = SkipReport()
    back = list(open_dataset(tmp_path / name, report=report))
    assert not report.count, str(report)
    assert [s.id for s in back] == [s.id for s in samples]
    assert [s.branches for s in back] == [s.branches for s in samples]
    assert all(s.turns is None for s in back)
    for mine, theirs in zip(samples, back):
        assert all(np.array_equal(a, b) for a, b in zip(_pixels(mine), _pixels(theirs), strict=True))
    assert back[0].objects == samples[0].objects
    assert back[0].meta["skill"] == "shape"
    assert not list(tmp_path.rglob("*.tmp"))


def test_round_trip_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    samples = _samples()
    write_dataset(samples, tmp_path / "data" / "train.parquet")
    back = list(open_dataset(tmp_path / "data"))  # a folder, as of a datasets repository
    assert [(s.id, s.branches, s.objects) for s in back] == [(s.id, s.branches, s.objects) for s in samples]
    for mine, theirs in zip(samples, back):
        assert all(np.array_equal(a, b) for a, b in zip(_pixels(mine), _pixels(theirs), strict=True))


def test_reads_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    Image.fromarray(_picture()).save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}, "question": f"q{i}", "answer": "a"} for i in range(3)]
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as out:
        out.write_table(table)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    back = list(open_dataset(tmp_path))
    assert [s.question() for s in back] == ["q0", "q1", "q2"]
    assert len(_pixels(back[0])) == 1


def test_no_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnsupportedError, match="pip install pyarrow"):
        tables.pyarrow()


def test_several_branches_become_rows_or_stay_together(tmp_path: Path) -> None:
    sample = Sample("s", [ImageSource(_picture())], [[("a", "1")], [("b", "2")]], meta={"skills": ["x", "y"]})
    write_dataset([sample], tmp_path / "a.jsonl", "plain")
    rows = list(open_dataset(tmp_path / "a.jsonl"))
    assert [(r.id, r.question(), r.meta["skill"]) for r in rows] == [("s#0", "a", "x"), ("s#1", "b", "y")]
    assert rows[0].media[0].data == rows[1].media[0].data  # one file, not two
    write_dataset([sample], tmp_path / "a.tar")
    (whole,) = open_dataset(tmp_path / "a.tar")
    assert whole.branches == sample.branches


def test_llava_placeholders(tmp_path: Path) -> None:
    _png(tmp_path / "a.png")
    turn = lambda text: [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]  # noqa: E731
    path = _lines(
        tmp_path / "d.jsonl",
        {"id": "first", "image": "a.png", "conversations": turn("<image>\nIs it?")},
        {"id": "none", "image": "a.png", "conversations": turn("Is it?")},
        {"id": "middle", "image": "a.png", "conversations": turn("Look: <image> is it?")},
        {"id": "two", "image": "a.png", "conversations": turn("<image><image>\nIs it?")},
    )
    report = SkipReport()
    first, none, middle = open_dataset(path, report=report)
    assert first.branches == none.branches == [[("Is it?", "yes")]]
    parts = middle.messages()[0]["content"]
    assert [p["type"] for p in parts] == ["text", "image", "text"]
    assert report.reasons() == {"d.jsonl:4": "2 media placeholders in the text, but 1 media in the record"}


def test_openai_forms(tmp_path: Path) -> None:
    _png(tmp_path / "a.png")
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    user = lambda *parts: {"role": "user", "content": [*parts, {"type": "text", "text": "Is it?"}]}  # noqa: E731
    yes = {"role": "assistant", "content": "yes"}
    path = _lines(
        tmp_path / "d.jsonl",
        {"messages": [user(image), yes]},
        {"messages": [user({"type": "image"}), yes], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>Is it?"}, yes], "images": ["a.png"]},
        {"messages": [{"role": "system", "content": "Be brief."}, user(image), yes]},
        {"messages": [user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), yes]},
        {"messages": [user(image)]},
    )
    report = SkipReport()
    samples = list(open_dataset(path, report=report))
    assert [s.branches for s in samples] == [[[("Is it?", "yes")]]] * 4
    assert [s.turns is None for s in samples] == [True, True, True, False]
    assert samples[3].messages(with_answer=False)[-1]["role"] == "user"
    assert "not fetched" in report.reasons()["d.jsonl:5"]
    assert "an answer last" in report.reasons()["d.jsonl:6"]


def test_bad_samples_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _png(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    path = _lines(
        tmp_path / "d.jsonl",
        {"image": "good.png", "question": "a?", "answer": True},
        {"image": "missing.png", "question": "a?", "answer": "b"},
        "{broken",
        {"image": "bad.png", "question": "a?", "answer": "b"},
        {"image": "good.png", "question": "a?"},
        {"prompt": "a?"},
        [1],
        {"images": ["good.png", "good.png"], "question": "a?", "answer": ["x", "y"]},
    )
    report = SkipReport()
    good = list(open_dataset(path, report=report))
    assert [s.answer() for s in good] == ["true", "x"]
    assert (report.count, report.total) == (6, 8)
    reasons = report.reasons()
    assert list(reasons) == [f"d.jsonl:{i}" for i in (2, 3, 4, 5, 6, 7)]
    assert "no such file" in reasons["d.jsonl:2"]
    assert "not valid JSON" in reasons["d.jsonl:3"]
    assert "not a picture" in reasons["d.jsonl:4"]
    assert "6 of 8" in str(report)
    with caplog.at_level(logging.WARNING, "foveate"):
        assert len(list(open_dataset(path))) == 2
    assert sum("6 of 8 samples skipped" in r.message for r in caplog.records) == 1


def test_truncated_tar_keeps_the_whole_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_dataset([Sample(str(i), [ImageSource(_picture(64, 64))], [[("q", "a")]]) for i in range(4)], path)
    data = path.read_bytes()
    second = data.index(b'"conversations"', data.index(b'"conversations"') + 1)
    for cut in (second - 3000, second):  # inside a picture, and between a picture and its text
        path.write_bytes(data[:cut])
        report = SkipReport()
        assert len(list(open_dataset(path, report=report))) == 1
        assert report.count == 1
        assert "cut short" in next(iter(report.reasons().values()))


def test_foreign_tar_with_captions(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(_png(tmp_path / "x.png"), "dir/0001.png")
        (tmp_path / "x.txt").write_text("a cat\n")
        archive.add(tmp_path / "x.txt", "dir/0001.txt")
    (sample,) = open_dataset(tmp_path / "a.tar")
    assert (sample.answer(), len(sample.media)) == ("a cat", 1)


def test_write_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")

    def fails() -> Any:
        yield _samples()[0]
        raise RuntimeError("stop")

    for name in ("a.jsonl", "a.tar"):
        with pytest.raises(RuntimeError):
            write_dataset(fails(), tmp_path / name)
    assert path.read_text() == "old"
    assert not (tmp_path / "a.tar").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_dataset(tmp_path / "nothing.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"\.csv is not known"):
        open_dataset(tmp_path / "a.csv")
    with pytest.raises(InputError, match="use one of llava"):
        write_dataset([], tmp_path / "a.csv")


# ---- named sets, on small stand-ins of the same form, and on the real files where they are


@pytest.fixture
def named(tmp_path: Path) -> Path:
    picture = _png(tmp_path / "p.png").read_bytes()
    rows = {
        "easy-vqa": (("train.jsonl", "test.jsonl"), "images.zip"),
        "nlvr": (("dev.jsonl",), "dev_images.zip"),
        "flickr8k-224": (("match_dev.jsonl",), "images.zip"),
    }
    for folder, (files, archive) in rows.items():
        (tmp_path / folder).mkdir()
        with zipfile.ZipFile(tmp_path / folder / archive, "w") as out:
            for i in range(30):
                out.writestr(f"{i}.png", picture)
        for file in files:
            both = [
                {"image": f"{i // 2}.png", "question": f"q{i}?", "answer": "yes" if i % 3 else "circle"}
                | {"caption": f"c{i}", "match": bool(i % 2), "label": bool(i % 2), "sentence": f"s{i}."}
                | {"identifier": f"{i // 3}-0"}
                for i in range(60)
            ]
            _lines(tmp_path / folder / file, *both)
    return tmp_path


def test_named_sets(named: Path) -> None:
    assert named_sets()["nlvr"] == ("dev", "test", "dev-train", "dev-val")
    nlvr = load_named("nlvr", named, "dev")
    assert nlvr[1].branches == [[("s1. True or false?", "true")]]
    match = load_named("flickr8k-match", named, "dev")
    assert match[0].branches == [[('Does this caption match the picture? "c0"', "no")]]
    assert len(load_named("easy-vqa", named, "test")) == 60
    grouped = load_named("easy-vqa", named, "train")
    assert (len(grouped), len(grouped[0].branches)) == (30, 2)
    some = [s.id for s in load_named("easy-vqa", named, "test", limit=7, seed=3)]
    assert some == [s.id for s in load_named("easy-vqa", named, "test", limit=7, seed=3)]
    assert some != [s.id for s in load_named("easy-vqa", named, "test", limit=7, seed=4)]


def test_nlvr_is_split_by_sentence(named: Path) -> None:
    parts = [load_named("nlvr", named, split) for split in ("dev-train", "dev-val")]
    left, right = ({s.meta["identifier"] for s in part} for part in parts)
    assert not left & right
    assert len(parts[0]) + len(parts[1]) == 60
    assert len(parts[0]) > len(parts[1]) > 0


def test_named_set_errors(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="easy-vqa"):
        load_named("easyvqa", named)
    with pytest.raises(UnknownNameError, match="dev-val"):
        load_named("nlvr", named, "hidden")
    with pytest.raises(InputError, match="no such folder"):
        load_named("nlvr", named / "nowhere", "dev")
    with pytest.raises(InputError, match="cannot be read"):
        load_named("nlvr", named, "test")
    monkeypatch.delenv("FOVEATE_DATA", raising=False)
    with pytest.raises(InputError, match="FOVEATE_DATA"):
        load_named("nlvr")


def test_real_sets_have_their_known_sizes() -> None:
    folder = os.environ.get("FOVEATE_DATA")
    if not folder or not Path(folder, "easy-vqa").is_dir():
        pytest.skip("FOVEATE_DATA does not name the folder of public sets")
    assert len(load_named("easy-vqa", folder, "test")) == 9673
    assert len(load_named("nlvr", folder, "dev")) == 2967
    picture = load_named("nlvr", folder, "dev", limit=1)[0]
    assert load_image(picture.media[0]).size == (400, 100)
