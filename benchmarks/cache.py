"""What every cache method keeps: nano's accuracy and the stories model's perplexity, with bytes measured.

    python benchmarks/cache.py --stories ../shared/data/llm-stories260k --out benchmarks/results/cache.json

A prompt attends to itself exactly, so an answer of one token would not notice the cache. Here the pictures are read
first and the question in a second pass, which sees them through the cache, as in a dialogue about a picture.
Differences are paired: the mean over skills of each skill's difference, with a bootstrap interval. Perplexity is
taken `--step` tokens at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import compare, run_header, write_json

import foveate
from foveate.adapters.base import Adapter
from foveate.cache.base import cache_bytes
from foveate.progress import track
from foveate.recipe import Recipe
from foveate.rows import pad
from foveate.runtime import Clock
from foveate.tasks.evaluate import Record, evaluate
from foveate.vlm import VLM, Answer, Request

NANO = (
    "int8",
    "fp8",
    "fp8(scaled=false)",
    "kivi(bits=4, group=32, window=32)",
    "kivi(bits=2, group=32, window=32)",
    "kvquant(bits=4)",
    "kvquant(bits=3)",
    "kvquant(bits=2)",
    "kvquant(bits=2, q_norm=true)",
    "kvquant(bits=4, levels=int)",
    "kvquant(bits=3, outliers=0.0)",
    "vidkv(key_bits=2, value_bits=2, window=32)",
    "vidkv(key_bits=1.5, value_bits=1.58, window=32)",
    "vidkv(key_bits=1, value_bits=1, window=32)",
    "sink(window=64)",
    "alisa(keep=0.5)",
    "alisa(keep=0.2)",
    "alisa(keep=0.2, cold=int8)",
)
NARROW = {"group=32": "group=8"}
"""The stories model's heads have 8 channels."""


class SecondLook(VLM):
    """A model that reads the end of its prompts in a pass of its own. seen: bytes and tokens of the caches."""

    def __init__(self, vlm: VLM, seen: list[tuple[int, int]]) -> None:
        super().__init__(vlm.adapter, vlm.name, vlm.recipe)
        self.seen = seen

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], max_new_tokens: int = 32, **options: Any) -> list[Answer]:
        plans = [self.plan(r.to_messages(), num_frames=r.num_frames) for r in requests]
        reducers = [self.reducers(r.reduce) for r in requests]
        rows = self._rows(plans, [self.prepare(plan) for plan in plans], reducers, Clock(self.device))
        cache = self.new_cache()
        ids, mask, positions, newlines = pad(rows, self.adapter)
        mask = torch.ones_like(ids) if mask is None else mask
        features = torch.cat([row.features for row in rows if row.kept])
        embeds = self.adapter.embed(ids, features, newlines=newlines)["inputs_embeds"]
        tail = min(len(row) - 1 - int(row.where.max()) for row in rows)  # text after the last visual token of each row
        cut = ids.shape[1] - tail
        part = {"inputs_embeds": embeds[:, :cut]}
        _step(self.adapter, part, mask[:, :cut], positions[..., :cut], cache)
        self.seen.append((cache_bytes(cache), cache.get_seq_length() * len(rows)))
        logits = _step(self.adapter, {"inputs_embeds": embeds[:, cut:]}, mask, positions[..., cut:], cache)
        following = torch.tensor([row.next_position for row in rows])[:, None]
        out: list[list[int]] = [[] for _ in rows]
        going = [True] * len(rows)
        for _ in range(max_new_tokens):
            token = logits.argmax(dim=-1)
            for row, value in enumerate(token.tolist()):
                going[row] = going[row] and value not in self.stop_ids
                if going[row]:
                    out[row].append(value)
            if not any(going):
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            now = following.expand(*positions.shape[:-1], 1)
            logits = _step(self.adapter, {"input_ids": token[:, None]}, mask, now, cache)
            following = following + 1
        return [Answer(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids=ids) for ids in out]


def _step(adapter: Adapter, inputs: dict[str, Any], mask: Any, positions: Any, cache: Any) -> torch.Tensor:
    return adapter.forward(**inputs, attention_mask=mask, position_ids=positions, past_key_values=cache)


def nano(model: str, limit: int, seed: int, recipes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, paired difference and measured bytes of each recipe."""
    vlm = foveate.load(model)
    runs: dict[str, list[Record]] = {}
    taken: dict[str, tuple[float, float]] = {}
    rows, dense = [], 0.0
    for recipe in track(["", *recipes], "nano"):
        seen: list[tuple[int, int]] = []
        runs[recipe] = []
        made = SecondLook(Recipe.parse(recipe).apply(vlm, quiet=True) if recipe else vlm, seen)
        result = evaluate(
            made, ["world"], seed=seed, limit=limit, records=runs[recipe], progress=False, batch_size=min(32, limit)
        )
        taken[recipe] = sum(size for size, _ in seen) / sum(n for _, n in seen), sum(n for _, n in seen)
        if not recipe:
            dense = result["mean"]
            continue
        rows.append(
            {
                "recipe": recipe,
                "method": recipe.partition("(")[0],
                "mean": result["mean"],
                "paired": compare(runs[recipe], runs[""]),
                "bytes_per_token": taken[recipe][0],
                "ratio": taken[recipe][0] / taken[""][0],
            }
        )
    tokens = taken[""][1] / len(runs[""])
    return {"dense": dense, "limit": limit, "tokens": tokens, "bytes_per_token": taken[""][0], "rows": rows}


def stories(folder: Path, documents: int, step: int, recipes: Sequence[str]) -> dict[str, Any]:
    """Perplexity of each recipe on the stories beside the model."""
    from foveate.tasks.perplexity import perplexity, text_file

    vlm = foveate.load(folder)
    texts = text_file(next(iter(sorted(folder.parent.glob("text/*eval*")) or sorted(folder.parent.glob("text/*.txt")))))
    texts = texts[:documents]
    dense = perplexity(vlm, texts, step=step)
    rows = []
    for recipe in track(recipes, "stories"):
        for wide, narrow in NARROW.items():
            recipe = recipe.replace(wide, narrow)
        found = perplexity(Recipe.parse(recipe).apply(vlm, quiet=True), texts, step=step)
        rows.append({"recipe": recipe, "method": recipe.partition("(")[0], "perplexity": found["perplexity"]})
    return {"dense": dense["perplexity"], "tokens": dense["tokens"], "step": step, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--limit", type=int, default=32, help="questions per skill")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--stories", type=Path, help="folder of the stories model")
    parser.add_argument("--documents", type=int, default=24, help="stories to take perplexity on")
    parser.add_argument("--step", type=int, default=16, help="tokens a pass through the stories model")
    parser.add_argument("--recipe", action="append", help="only this cache method; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cache.json"))
    args = parser.parse_args()
    recipes = args.recipe or NANO
    report = run_header() | {"model": args.model, "seed": args.seed}
    report["nano"] = nano(args.model, args.limit, args.seed, recipes)
    if args.stories:
        report["stories"] = stories(args.stories, args.documents, args.step, recipes)
    write_json(args.out, report)


if __name__ == "__main__":
    main()
