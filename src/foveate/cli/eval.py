"""`foveate eval`: accuracy per task with interval and chance."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from foveate.cli.common import (
    add_method_options,
    add_model_options,
    add_verb,
    bar,
    load_model,
    new_file,
    parse_reduce,
    positive_int,
    print_json,
    print_table,
)
from foveate.errors import InputError

SHOWN = 5
"""Bad samples that are named in the text; all are counted."""


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "eval", model=True)
    parser.add_argument(
        "--task", action="append", default=[], metavar="T", help="task, repeatable: world, world/<skill>, easy-vqa, ..."
    )
    parser.add_argument(
        "--data", metavar="PATH", help="folder of the named sets, or a file of your questions and answers"
    )
    parser.add_argument(
        "--scorer", metavar="S", help="judge every question by this rule: exact, vqa, anls, relaxed, mcq, ..."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawn scenes and of the choice under --limit")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="questions per task")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="B")
    parser.add_argument("--frames", type=positive_int, metavar="N", help="frames per clip (default: the model's)")
    parser.add_argument("--records", metavar="FILE", help="write one JSON line per question, for paired comparisons")
    parser.add_argument(
        "--text", metavar="FILE", help="measure perplexity on a text (.txt, or JSON lines with 'text') instead of tasks"
    )
    parser.add_argument("--seqlen", type=positive_int, metavar="N", help="tokens of a window of --text (default: all)")
    parser.add_argument("--list", action="store_true", help="list the tasks and exit")
    add_method_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from foveate.tasks.base import ALIASES, TASKS, find_tasks

    if args.list:
        names = [*ALIASES, *TASKS.names(), "data"]
        print_json(names) if args.json else print("\n".join(names))
        return 0
    if args.text:
        return _text(args)
    tasks, folder = find_tasks(
        args.task, args.data, args.scorer
    )  # before the model: a misspelt task should not wait for weights
    if args.records and Path(args.records).is_dir():
        raise InputError(f"--records {args.records} is a folder; give the name of a file")
    reduce = parse_reduce(args.reduce)
    vlm = load_model(args)

    from foveate.tasks.evaluate import Record, evaluate

    records: list[Record] = []
    result = evaluate(
        vlm,
        tasks,
        seed=args.seed,
        limit=args.limit,
        data_dir=folder,
        reduce=reduce,
        batch_size=args.batch_size,
        num_frames=args.frames,
        records=records,
    )
    if args.records:
        with new_file(args.records) as path, path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records)
    print_json(result) if args.json else show(result)
    return 0


def _text(args: argparse.Namespace) -> int:
    """Perplexity on --text."""
    from foveate.tasks.perplexity import perplexity, text_file

    if args.task or args.data or args.reduce:
        raise InputError("--text measures perplexity and takes no --task, --data or --reduce; give one or the other")
    documents = text_file(args.text)
    vlm = load_model(args)
    found = perplexity(vlm, documents, seqlen=args.seqlen, limit=args.limit, quiet=False)
    if args.json:
        print_json({"model": vlm.name, "recipe": vlm.recipe.text(), "text": args.text, **found})
        return 0
    recipe = f" with {vlm.recipe.text()}" if vlm.recipe else ""
    print(f"{vlm.name}{recipe}: perplexity {found['perplexity']:.3f} on {found['tokens']} tokens of {args.text}")
    print(f"{found['loss']:.4f} nats a token, {found['bits_per_byte']:.3f} bits a byte, {found['seconds']:.1f} s")
    return 0


def show(result: dict[str, Any]) -> None:
    """The result of `evaluate` as a table; `·` on a bar marks the chance level."""
    rows = [
        [
            name,
            bar(row["accuracy"], mark=row["chance"]),
            f"{row['accuracy']:.3f}",
            f"{row['low']:.3f} – {row['high']:.3f}",
            f"{row['chance']:.3f}",
            str(row["n"]),
        ]
        for name, row in result["tasks"].items()
    ]
    recipe = f" with {result['recipe']}" if result["recipe"] else ""
    columns = ["task", "", "accuracy", "95 % interval", "chance", "n"]
    print_table(columns, rows, title=f"{result['model']}{recipe}\n", left=2)
    print(f"\nmean {result['mean']:.3f} over {len(rows)} tasks in {result['seconds']:.1f} s")
    for name, row in result["tasks"].items():
        reasons = list(row.get("reasons", {}).items())[:SHOWN]
        if reasons:
            print(f"skipped {row['skipped']} bad samples of {name}:")
            print("\n".join(f"  {sample}: {' '.join(reason.split())}" for sample, reason in reasons))
        if row["skipped"] > len(reasons):
            print(f"  and {row['skipped'] - len(reasons)} more (--json names them)")
