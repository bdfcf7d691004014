"""Hugging Face datasets on disk: folders (or single files) of parquet or arrow, read with pyarrow alone.

A folder written by `Dataset.save_to_disk` and a folder of parquet shards both work; `datasets` itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.errors import InputError, UnsupportedError

BATCH = 64


def pyarrow() -> Any:
    """The module, or UnsupportedError that says how to get it."""
    try:
        import pyarrow as module
    except ImportError:
        raise UnsupportedError(
            "parquet and arrow files need pyarrow, which is not installed; pip install pyarrow"
        ) from None
    return module


def table_files(path: Path) -> list[Path]:
    """Data files of a datasets folder, in order: those of state.json if there is one, else all parquet, else arrow."""
    if path.is_file():
        return [path]
    state = path / "state.json"
    if state.exists():
        try:
            named = [path / f["filename"] for f in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{state} is damaged ({error}); save the dataset again") from None
        return named
    return sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow"))


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of one parquet or arrow file, a few at a time. Raises InputError when the file is damaged."""
    pa = pyarrow()
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(file) as table:
                for batch in table.iter_batches(BATCH):
                    yield from batch.to_pylist()
            return
        with pa.memory_map(str(file)) as source:
            try:
                reader = pa.ipc.open_stream(source)
                batches: Any = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            for batch in batches:
                for start in range(0, batch.num_rows, BATCH):
                    yield from batch.slice(start, BATCH).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"the file is damaged or cut short ({' '.join(str(error).split())[:160]})") from None


def write_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    """Rows with keys id, images, videos, conversations, meta to a parquet file that `datasets` opens with pictures."""
    pa = pyarrow()
    import pyarrow.parquet as pq

    source = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(source)),
            ("videos", pa.list_(pa.list_(source))),
            ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
            ("meta", pa.string()),
        ]
    )
    text = {"dtype": "string", "_type": "Value"}
    picture = {"feature": {"_type": "Image"}, "_type": "List"}
    features = {
        "id": text,
        "images": picture,
        "videos": {"feature": picture, "_type": "List"},
        "conversations": {"feature": {"from": text, "value": text}, "_type": "List"},
        "meta": text,
    }
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd", row_group_size=256)
