"""Perplexity of the language model on text: how many tokens it hesitates between."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError
from foveate.progress import track
from foveate.weights.samples import read_texts

if TYPE_CHECKING:
    from foveate.vlm import VLM


def text_file(path: str | Path) -> list[str]:
    """The documents of a text file, or of JSON lines with "text". Raises InputError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f'{path} is not a file; give text (.txt), or JSON lines with "text"')
    found = read_texts(path)
    if not found or not any(document.strip() for document in found):
        raise InputError(f'{path} holds no text; give text (.txt), or JSON lines with "text"')
    return found


@torch.inference_mode()
def perplexity(
    vlm: VLM,
    documents: Sequence[str],
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    step: int | None = None,
    batch_size: int = 8,
    quiet: bool = True,
) -> dict[str, Any]:
    """{"perplexity", "loss" (nats a token), "bits_per_byte", "tokens", "documents", "seconds"} over all documents.

    Documents are encoded with the tokenizer's own opening. Of several, each is read from its start up to `seqlen`
    tokens (None: the model's context); a single one is cut into windows of so many. The first token of a window is not
    predicted. limit: so many documents. step: feed so many tokens at a
    time through the model's cache, so that a cache method is measured too; None: each window in one pass without one,
    unless the recipe has a cache.
    """
    length = min(seqlen or vlm.adapter.max_context, vlm.adapter.max_context)
    if length < 2:
        raise InputError(f"seqlen is {length}; a window needs at least 2 tokens")
    if step is None and vlm.recipe.of("cache"):
        step = max(1, length // 8)
    start, chosen = time.perf_counter(), list(documents[:limit])
    total, tokens, octets = 0.0, 0, 0
    windows: list[list[int]] = []
    for document in chosen:
        ids = vlm.tokenizer(document, verbose=False).input_ids
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        read = [piece for piece in (pieces if len(chosen) == 1 else pieces[:1]) if len(piece) > 1]
        windows += read
        seen = [i for piece in read for i in piece]
        octets += len(document.encode()) if len(seen) == len(ids) else len(vlm.tokenizer.decode(seen).encode())
    if not windows:
        raise InputError("the text is too short to measure: fewer than 2 tokens a document")
    windows.sort(key=len)
    rows = 1 if step else batch_size
    for batch in track(list(_batches(windows, rows)), "perplexity", quiet=quiet):
        loss, count = _in_steps(vlm, batch[0], step) if step else _at_once(vlm, batch)
        total, tokens = total + loss, tokens + count
    mean = total / tokens
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "loss": mean,
        "bits_per_byte": total / math.log(2) / octets,
        "tokens": tokens,
        "documents": len(chosen),
        "seconds": time.perf_counter() - start,
    }


def _batches(windows: Sequence[list[int]], rows: int) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(windows), rows):
        yield windows[start : start + rows]


def _at_once(vlm: VLM, batch: Sequence[list[int]]) -> tuple[float, int]:
    """Summed loss and predicted tokens. Rows are filled up on the right: what comes later is not seen earlier."""
    length = max(map(len, batch))
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    labels = torch.full((len(batch), length), -100)
    for row, window in enumerate(batch):
        ids[row, : len(window)] = labels[row, : len(window)] = torch.tensor(window)
    logits = _logits(vlm, ids)
    return _loss(logits[:, :-1], labels[:, 1:]), int((labels[:, 1:] != -100).sum())


def _in_steps(vlm: VLM, window: list[int], step: int) -> tuple[float, int]:
    ids, cache, total = torch.tensor([window]), vlm.new_cache(), 0.0
    for start in range(0, len(window), step):
        logits = _logits(vlm, ids[:, start : start + step], cache)
        targets = ids[:, start + 1 : start + step + 1]
        total += _loss(logits[:, : targets.shape[1]], targets)
    return total, len(window) - 1


def _logits(vlm: VLM, ids: Tensor, cache: Any = None) -> Tensor:
    """[B, T, V] of the language model on token ids alone."""
    adapter = vlm.adapter
    hidden = adapter.text_model(
        input_ids=ids.to(vlm.device), past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return adapter.model.get_output_embeddings()(hidden)


def _loss(logits: Tensor, labels: Tensor) -> float:
    wanted = labels.to(logits.device).flatten()
    return float(F.cross_entropy(logits.flatten(0, 1).float(), wanted, ignore_index=-100, reduction="sum"))
