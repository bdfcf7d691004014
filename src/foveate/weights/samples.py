"""Calibration data: what flows through a model while methods look on. A source is a name or a file.

    auto, world    the drawn world: pictures (every eighth sample a clip) with a question and its answer; for a
                   language model without eyes, the same questions and answers as text
    random         uniform token ids, the sanity baseline
    ellipses       "..." again and again, the other one
    FILE.txt       text, cut into windows of `seqlen` tokens at places that the seed draws
    FILE.jsonl     rows with "text", or "question" and "answer" without media: documents, joined and cut likewise;
                   any other file or folder: a data set of pictures, questions and answers, as `foveate train` reads it

Sources as parameters follow arXiv 2410.07461 (calibration data for pruning); no padding ever enters a statistic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate.data.plan import Plan
from foveate.errors import BudgetError, InputError

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.vlm import VLM

TEXT, VISION, ANSWER = 0, 1, 2
"""What a token of the language model is: text of the prompt, a visual feature, text that is to be learned."""
NAMES = ("auto", "world", "random", "ellipses")
_READ_AT_MOST = 64_000_000
_CLIP_FRAMES = 8


@dataclass(frozen=True)
class Example:
    """One calibration sample: its plan, and what each token is ([L] of TEXT, VISION, ANSWER)."""

    number: int
    plan: Plan
    modality: Tensor


def draw_examples(vlm: VLM, calib: str, samples: int, seqlen: int, seed: int) -> list[Example]:
    """The samples of a source, the same for the same arguments. Raises InputError naming what cannot be used.

    A data set that is too small gives fewer. Samples longer than the model's context are left out, but not all may be.
    """
    check_source(calib)
    seqlen = min(seqlen, vlm.adapter.max_context)
    if calib in ("auto", "world"):
        plans = (
            _world(vlm, samples, seed)
            if sees(vlm.adapter)
            else _windows(vlm, _world_text(samples), samples, seqlen, seed)
        )
    elif calib == "random":
        plans = _random_ids(vlm, samples, seqlen, seed)
    elif calib == "ellipses":
        plans = _windows(vlm, ["..." * seqlen], samples, seqlen, seed)
    elif (documents := read_texts(Path(calib))) is not None:
        plans = _windows(vlm, documents, samples, seqlen, seed)
    else:
        plans = _data_set(vlm, Path(calib), samples, seed)
    out = []
    limit = vlm.adapter.max_context
    for number, made in enumerate(itertools.islice(plans, samples)):
        if made.num_tokens <= limit:
            out.append(Example(number, made, modality_of(made, vlm.adapter)))
    if not out:
        raise InputError(f"calib={calib}: no sample fits the {limit} tokens of this model's context")
    return out


def check_source(calib: str) -> None:
    """Raise InputError unless `calib` is a known name or a path that exists."""
    if calib not in NAMES and not Path(calib).exists():
        raise InputError(f"calib={calib!r} is neither a file nor one of {', '.join(NAMES)}")


def source_hash(calib: str) -> str:
    """What identifies the content of a source: its name, or the SHA-256 of its file (first 16 digits)."""
    path = Path(calib)
    if calib in NAMES or not path.is_file():
        return calib
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def sees(adapter: Adapter) -> bool:
    """Whether the model has a vision tower."""
    return "vision_tower" in adapter.parts()


def modality_of(plan: Plan, adapter: Adapter) -> Tensor:
    """[L] int64: TEXT, VISION or ANSWER for each token of a plan."""
    ids = torch.as_tensor(plan.input_ids)
    out = torch.full((len(ids),), TEXT)
    if plan.labels is not None:
        out[torch.as_tensor(plan.labels) != -100] = ANSWER
    if adapter.placeholders:
        out[torch.isin(ids, torch.tensor(adapter.placeholders))] = VISION
    return out


def token_weights(modality: Tensor | None, tokens: str) -> Tensor | None:
    """[T] float32 of mean 1, how much each token counts in statistics; None: all alike."""
    if modality is None or tokens == "all":
        return None
    vision = modality == VISION
    share = {"text": (1.0, 0.0), "vision": (0.0, 1.0), "balanced": (0.5, 0.5)}[tokens]
    if not vision.any() or vision.all():
        return None if tokens == "balanced" else torch.full((len(vision),), share[int(bool(vision.any()))])
    counts = int((~vision).sum()), int(vision.sum())
    return torch.where(vision, share[1] / counts[1], share[0] / counts[0]) * len(vision)


def read_texts(path: Path) -> list[str] | None:
    """The documents of a text source (at most 64 MB of it), or None when it is a data set with media."""
    if path.is_dir():
        return None
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix not in (".jsonl", ".json"):
                return [file.read(_READ_AT_MOST)] if path.suffix in (".txt", ".md", "") else None
            if path.suffix == ".json":
                return None
            documents: list[str] = []
            read = 0
            for line in file:
                read += len(line)
                if read > _READ_AT_MOST:
                    break
                if line.strip():
                    text = _document(json.loads(line))
                    if text is None:
                        return None
                    documents.append(text)
            return documents or None
    except UnicodeDecodeError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text or JSON lines: {error}") from None


def _document(row: Any) -> str | None:
    if not isinstance(row, dict) or any(key in row for key in ("image", "images", "video", "videos", "messages")):
        return None
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str):
        return f"{row['question']}\n{row['answer']}"
    return None


def token_stream(vlm: VLM, documents: list[str], enough: int) -> list[int]:
    """Token ids of the documents one after the other, each with the tokenizer's own opening; about `enough` of them."""
    ids: list[int] = []
    for document in documents:
        size = 65536  # a long text is encoded in pieces: tokenizers slow down on very long ones
        for start in range(0, len(document), size):
            piece = document[start : start + size]
            ids += vlm.tokenizer(piece, add_special_tokens=start == 0, verbose=False).input_ids
            if len(ids) >= enough:
                return ids
    return ids


def _windows(vlm: VLM, documents: list[str], samples: int, seqlen: int, seed: int) -> Iterator[Plan]:
    rng = random.Random(seed)
    documents = list(documents)
    if len(documents) > 1:
        rng.shuffle(documents)
    ids = token_stream(vlm, documents, max(4 * samples * seqlen, 1 << 16))
    if len(ids) < 2:
        raise InputError("the calibration text is empty")
    length = min(seqlen, len(ids))
    count = min(samples, max(1, len(ids) // length))
    starts = [rng.randrange(len(ids) - length + 1) for _ in range(count)]
    return (_plan_of(vlm, ids[start : start + length]) for start in starts)


def _plan_of(vlm: VLM, ids: list[int]) -> Plan:
    tokens = np.asarray(ids, np.int64)
    return Plan(tokens, tokens.copy(), (), (), vlm.spec)


def _random_ids(vlm: VLM, samples: int, seqlen: int, seed: int) -> Iterator[Plan]:
    rng = np.random.default_rng(seed)
    banned = set(vlm.adapter.placeholders)
    allowed = np.array([i for i in range(vlm.adapter.text_config.vocab_size) if i not in banned])
    return (_plan_of(vlm, rng.choice(allowed, seqlen).tolist()) for _ in range(samples))


def _world(vlm: VLM, samples: int, seed: int) -> Iterator[Plan]:
    from foveate import world

    pictures = [kind for kind in world.KINDS if kind not in world.CLIP_KINDS]
    clips = list(world.CLIP_KINDS)
    for number in range(samples):
        clip = number % 8 == 7
        kinds = clips if clip else pictures
        kind = kinds[number // 8 % len(kinds)] if clip else kinds[number % len(kinds)]
        sample = world.draw(kind, number, split="train", seed=seed).sample()
        branch = random.Random(seed * 1_000_003 + number).randrange(len(sample.branches))
        yield vlm.plan(sample.messages(branch), num_frames=_CLIP_FRAMES if clip else None)


def _world_text(samples: int) -> list[str]:
    from foveate import world

    out = []
    kinds = list(world.KINDS)
    for number in range(8 * samples):
        scene = world.draw(kinds[number % len(kinds)], number, split="train")
        out.append("\n".join(f"{ask} {answer}" for q in scene.questions for ask, answer in q.turns))
    return out


def _data_set(vlm: VLM, path: Path, samples: int, seed: int) -> Iterator[Plan]:
    from foveate.data.formats import SkipReport, open_dataset

    report = SkipReport()
    found = list(itertools.islice(open_dataset(path, report=report), 64 * samples))
    if not found:
        raise InputError(f"calib={path} holds no usable sample; see docs/train.md for the formats")
    random.Random(seed).shuffle(found)
    for sample in found:
        try:
            yield vlm.plan(sample.messages(0))
        except (InputError, BudgetError):
            continue  # damaged pixels show only here; the next sample takes its place
