"""Weight methods measured: bits and sparsity against method, on nano (skills) and on a language model (perplexity).

    python benchmarks/weights.py --data ../shared/data --out benchmarks/results/weights.json

nano: accuracy per skill with paired intervals against dense. The language model (--stories, the real one of 260K
parameters by default): perplexity, and for pruning the source of calibration data. Plots go beside the docs.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from common import compare, run_header, write_json
from curves import curves

import foveate
from foveate.progress import track
from foveate.recipe import Recipe
from foveate.tasks.evaluate import Record, evaluate
from foveate.tasks.perplexity import perplexity, text_file

ROOT = Path(__file__).resolve().parents[1]
BITS = (8, 4, 3, 2)
SHARES = (0.3, 0.5, 0.6, 0.7)
PATTERN = "2:4"
SOURCES = {
    "stories": "text/tinystories_train.jsonl",
    "wikitext": "text/wikitext2_valid.txt",
    "shakespeare": "text/tinyshakespeare.txt",
    "gsm8k": "text/gsm8k_train.jsonl",
    "random": "random",
}
PRUNERS = ("magnitude", "wanda", "sparsegpt", "owl")


def quantizers(bits: int, group: int, vision: bool) -> dict[str, str]:
    """Recipe text of each method at so many bits."""
    found = {name: f"{name}(bits={bits}, group={group}, DATA)" for name in ("gptq", "awq")}
    if vision:
        found["mbq"] = f"mbq(bits={bits}, group={group}, DATA)"
    if bits == 8:
        found["smoothquant"] = "smoothquant(DATA)"
    return {"rtn": f"rtn(bits={bits}, group={group})", **found}


def pruners(share: float | str) -> dict[str, str]:
    """Recipe text of each method at a share of dropped weights, or with a pattern."""
    what = f"pattern='{share}'" if isinstance(share, str) else f"sparsity={share}"
    return {name: f"{name}({what}{'' if name == 'magnitude' else ', DATA'})" for name in PRUNERS}


def repairs() -> dict[str, list[str]]:
    """Recipe texts of low-rank parts beside compressed layers, with and without weighing by the inputs, and of the
    methods that come in one setting; by method."""
    broken = ("rtn(bits=3, group=0)", "gptq(bits=3, group=0, DATA)", "awq(bits=3, group=0, DATA)")
    broken += ("wanda(sparsity=0.6, DATA)", f"sparsegpt(pattern='{PATTERN}', DATA)")
    forms = [f"eora(rank={rank}, {how})" for rank in (4, 16) for how in ("DATA", "space=plain")]
    return {
        "eora": [f"{base} + {form}" for base in broken for form in forms],
        "lq_lora": [f"lq_lora(rank=16, bits={bits}, block=8, DATA)" for bits in (4, 3)],
        "maskllm": [f"maskllm(pattern='{PATTERN}', DATA)"],
        "fp8_weights": ["fp8_weights"],
    }


def filled(recipe: str, data: str) -> Recipe:
    return Recipe.parse(recipe.replace("DATA", data))


def on_nano(model: str, limit: int, seed: int, samples: int) -> dict[str, Any]:
    """{"dense", "limit", "rows"}: each recipe on the same questions as dense."""
    vlm = foveate.load(model)
    runs: dict[str, list[Record]] = {"": []}
    options = {"seed": seed, "limit": limit, "progress": False, "batch_size": 64}
    dense = evaluate(vlm, ["world"], records=runs[""], **options)
    wanted: list[tuple[str, str, float | str, str]] = []
    for bits in BITS:
        wanted += [(name, "bits", bits, text) for name, text in quantizers(bits, 32, True).items()]
    for share in (0.5, PATTERN):
        wanted += [(name, "sparsity", share, text) for name, text in pruners(share).items() if name != "owl"]
    rows = []
    for name, kind, value, text in track(wanted, "nano"):
        small = filled(text, f"samples={samples}").apply(vlm, quiet=True)
        records: list[Record] = []
        result = evaluate(small, ["world"], records=records, **options)
        size = sum(tensor.nbytes for tensor in small.model.state_dict().values())
        row = {"method": name, kind: value, "recipe": filled(text, f"samples={samples}").text(), "bytes": size}
        rows.append(row | {"mean": result["mean"], "tasks": result["tasks"], "paired": compare(records, runs[""])})
    return {"model": model, "dense": dense, "limit": limit, "rows": rows}


def on_stories(folder: Path, data: Path, documents: int, samples: int) -> dict[str, Any]:
    """{"dense", "tokens", "rows"}: perplexity of each recipe, and for pruning with each source of data."""
    llm = foveate.load(folder)
    texts = text_file(data / "text" / "tinystories_eval.jsonl")[:documents]
    dense = perplexity(llm, texts)
    wanted: list[tuple[str, str, float | str, str, str]] = []
    for bits in BITS:
        wanted += [(name, "bits", bits, text, "stories") for name, text in quantizers(bits, 0, False).items()]
    for share in (*SHARES, PATTERN):
        for name, text in pruners(share).items():
            if name == "owl" and share == PATTERN:
                continue  # with the paper's spread no block's share of four differs
            every = share in (0.5, PATTERN) and name != "magnitude"
            wanted += [(name, "sparsity", share, text, source) for source in (SOURCES if every else ["stories"])]
    wanted += [(name, "repair", "", text, "stories") for name, texts in repairs().items() for text in texts]
    rows = []
    for name, kind, value, text, source in track(wanted, "stories"):
        where = SOURCES[source] if source == "random" else str(data / SOURCES[source])
        recipe = filled(text, f"calib='{where}', samples={samples}, seqlen=256")
        found = perplexity(recipe.apply(llm, quiet=True), texts)
        shown = text.replace(", DATA", "").replace("(DATA)", "")
        used = source if "DATA" in text else ""
        row = {"method": name, kind: value, "recipe": shown, "calib": used, "perplexity": found["perplexity"]}
        rows.append(row | {"loss": found["loss"]})
    return {"model": folder.name, "dense": dense["perplexity"], "tokens": dense["tokens"], "rows": rows}


def plots(report: dict[str, Any], folder: Path) -> None:
    """Curves of every method over bits and over sparsity."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(rows: list[dict[str, Any]], kind: str, value: str) -> dict[str, list[tuple[str, float]]]:
        out: dict[str, list[tuple[str, float]]] = {}
        for row in rows:
            if kind in row and row.get("calib", "") in ("", "stories"):
                out.setdefault(row["method"], []).append((str(row[kind]), row[value]))
        return out

    nano, stories = report["nano"], report["stories"]
    pictures = {
        "weights_nano_bits": (lines(nano["rows"], "bits", "mean"), nano["dense"]["mean"], "mean accuracy", False),
        "weights_stories_bits": (lines(stories["rows"], "bits", "perplexity"), stories["dense"], "perplexity", True),
        "weights_stories_sparsity": (
            lines(stories["rows"], "sparsity", "perplexity"),
            stories["dense"],
            "perplexity",
            True,
        ),
    }
    for name, (series, dense, axis, logarithmic) in pictures.items():
        text = curves(series, dense, axis=axis, below=name.rpartition("_")[2], logarithmic=logarithmic)
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
        print(f"wrote {folder / name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FOVEATE_DATA", "../shared/data")))
    parser.add_argument("--stories", type=Path, help="folder of the language model (default: DATA/llm-stories260k)")
    parser.add_argument("--limit", type=int, default=16, help="questions per skill")
    parser.add_argument("--documents", type=int, default=40, help="stories that perplexity is measured on")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "weights.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the plots")
    args = parser.parse_args()

    start = time.monotonic()
    report = run_header() | {"seed": args.seed, "samples": args.samples}
    report["nano"] = on_nano(args.model, args.limit, args.seed, args.samples)
    report["stories"] = on_stories(
        args.stories or args.data / "llm-stories260k", args.data, args.documents, args.samples
    )
    report["seconds"] = round(time.monotonic() - start, 1)
    write_json(args.out, report)
    plots(report, args.images)


if __name__ == "__main__":
    main()
