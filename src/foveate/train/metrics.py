"""Metrics of a run: one JSON line every few steps (metrics.jsonl), and TensorBoard when it is installed."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from foveate.disk import plain_errors
from foveate.train.checkpoint import WAY_OUT, write_text

_log = logging.getLogger("foveate")


class Metrics:
    """Appends rows to `folder`/metrics.jsonl and to TensorBoard.

    `step` is the step a run resumes from: later rows, written by a run that was killed, are dropped, so the file reads
    as if the run had never stopped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        with plain_errors(self.path, folder, WAY_OUT):
            folder.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(row) for row in read_metrics(self.path) if row.get("step", 0) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(folder / "tensorboard", step)

    def write(self, step: int, **values: Any) -> None:
        """Add one row; numbers also go to TensorBoard."""
        with plain_errors(self.path, self.path.parent, WAY_OUT):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _tensorboard(folder: Path, step: int) -> Any | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

            return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except ImportError:
        _log.warning(
            "TensorBoard is not installed, so only metrics.jsonl is written; to add it: pip install 'foveate[train]'"
        )
        return None
