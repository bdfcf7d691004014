"""An index gives the samples of a data set by number, without holding them."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.data.formats import index as module
from foveate.data.formats import open_dataset, write_dataset
from foveate.data.formats.index import open_index
from foveate.data.images import load_image
from foveate.data.sample import ImageSource, Sample
from foveate.errors import InputError
from foveate.train.sources import ListSource


def _samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (6, 8, 3), dtype=np.uint8) for _ in range(count)]
    return [Sample(f"s{i}", [ImageSource(p)], [[(f"wie groß, {i}?", f"{i} €")]]) for i, p in enumerate(pictures)]


def _content(sample: Sample) -> tuple:
    return sample.id, sample.branches, [np.asarray(load_image(m)).tobytes() for m in sample.media]


def _equal(path: Path) -> None:
    found, whole = open_index(path), list(open_dataset(path))
    assert len(found) == len(whole) > 0
    for number in np.random.default_rng(1).permutation(len(whole)):
        assert _content(found[int(number)]) == _content(whole[number])


@pytest.mark.parametrize(
    ("name", "form"), [("a.jsonl", "llava"), ("a.jsonl", "openai"), ("a.json", "llava"), ("a.tar", None)]
)
def test_samples_by_number_are_those_in_order(tmp_path, name, form, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)  # shorter than an item, so that items are put together
    write_dataset(_samples(9), tmp_path / name, form)
    _equal(tmp_path / name)


def test_shards_and_compressed_tars(tmp_path) -> None:
    for part, samples in (("0.tar", _samples(5)[:2]), ("1.tar", _samples(5)[2:])):
        write_dataset(samples, tmp_path / "set" / part)
    _equal(tmp_path / "set")
    packed = tmp_path / "one.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "set" / "1.tar").read_bytes()))
    _equal(packed)


def test_tables_by_row_group_and_mapped(tmp_path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    write_dataset(_samples(9), tmp_path / "set" / "all.parquet")
    file = tmp_path / "set" / "all.parquet"
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=4)
    _equal(tmp_path / "set")
    blocks = open_index(tmp_path / "set").blocks
    assert list(blocks) == [0, 4, 8]
    for kind, writer in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        arrow = tmp_path / f"{kind}.arrow"
        with writer(str(arrow), table.schema) as out:
            out.write_table(table, max_chunksize=4)
        _equal(arrow)

    source = ListSource("x", open_index(tmp_path / "set"), seed=0)
    order = [int(source.sample(i).id[1:]) for i in range(9)]
    assert sorted(order) == list(range(9)) != order
    runs = [number // 4 for number in order]
    assert sum(a != b for a, b in itertools.pairwise(runs)) == 2  # a row group is opened once an epoch


def test_bad_records_are_named_when_their_turn_comes(tmp_path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = json.dumps({"image": "a.png", "question": "q?", "answer": "a"})
    file = tmp_path / "d.jsonl"
    file.write_text(f'\n{good}\n{{"image": "gone.png", "question": "q?", "answer": "a"}}\n{{broken\n{good}')
    found = open_index(file)
    assert len(found) == 4 and found[0].answer() == found[3].answer() == "a"
    with pytest.raises(InputError, match=r"d\.jsonl:3: .*gone\.png: no such file"):
        found[1]
    with pytest.raises(InputError, match=r"d\.jsonl:4: not valid JSON"):
        found[2]
    (tmp_path / "e.json").write_text("[" + good + ", {")
    with pytest.raises(InputError, match=r"e\.json: not valid JSON in item 1"):
        open_index(tmp_path / "e.json")
    (tmp_path / "f.json").write_text('{"data": [' + good + "]}")
    assert open_index(tmp_path / "f.json")[0].answer() == "a"


def test_a_tar_cut_short_keeps_its_whole_samples(tmp_path) -> None:
    path = tmp_path / "a.tar"
    write_dataset(_samples(3), path)
    path.write_bytes(path.read_bytes()[:5000])  # 2,048 bytes a sample
    found = open_index(path)
    assert len(found) == 3 and found[0].id == "s0" and found[1].id == "s1"
    with pytest.raises(InputError, match="damaged or cut short"):
        found[2]


def test_many_rows_take_little_memory(tmp_path) -> None:
    rows = 50_000
    file = tmp_path / "big.jsonl"
    row = {"question": "?" * 200, "answer": "yes"}
    with file.open("w") as out:
        out.writelines(json.dumps({**row, "id": str(i)}) + "\n" for i in range(rows))
    tracemalloc.start()
    found = open_index(file)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == rows and found[rows - 1].id == str(rows - 1)
    assert held < 60 * rows  # three numbers a row, while their array grows; the rows themselves have 240 bytes
