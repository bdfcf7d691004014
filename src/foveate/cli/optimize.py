"""`foveate optimize MODEL`: a budget in, a model out. Exit code 0 when the budget is met, 1 when it is not."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from foveate.cli.common import add_model_options, add_verb, load_model, positive_int, print_json

LIMITS = {
    "flops": "of one mean request, to the end of its answer",
    "bytes": "weights, and the cache of one mean request",
    "size": "weights on disk",
    "memory": "peak of one request: counted, then measured for the finalists",
    "tokens": "visual tokens that reach the language model, mean over its layers",
    "nonzeros": "weights that are not zero, what pruning lowers",
    "ttft": "time to first token, measured beside the dense model",
    "tpot": "time of each further token, measured beside the dense model",
    "throughput": "requests a second in batches, measured beside the dense model",
}
NAMES = ("surrogate", "halving", "random", "tpe", "nsga2", "genetic", "milp", "p_sigmoid", "g_search")
"""Strategies, without importing them; a test compares them with the registry."""
NAMED = ("easy-vqa", "nlvr", "flickr8k-match")
"""What --data takes beside a file: tasks of public sets, read from --data-dir."""


def add_parser(subparsers: Any) -> None:
    parser = add_verb(
        subparsers,
        "optimize",
        model=True,
        epilog="Limits are relative to the model as it is given (0.5x) or absolute (2.5GFLOP, 8GiB, 400ms, 128). "
        "Without any: half the FLOPs and half the bytes. Exit code 1 when nothing meets the budget.",
    )
    limits = parser.add_argument_group("budget")
    for axis, about in LIMITS.items():
        limits.add_argument(f"--{'min' if axis == 'throughput' else 'max'}-{axis}", metavar="X", help=about)
    limits.add_argument(
        "--max-loss", metavar="X", default="1pt", help="loss of mean accuracy, in points (default: 1pt)"
    )
    limits.add_argument("--max-skill-loss", metavar="X", help="loss of any single skill beyond noise, in points")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="D", help=f"your file of questions and answers, or one of {', '.join(NAMED)}")
    data.add_argument("--data-dir", metavar="DIR", help="folder of the named sets (default: $FOVEATE_DATA)")
    data.add_argument("--task", action="append", default=[], metavar="T", help="task, repeatable (default: world)")
    data.add_argument(
        "--scorer", metavar="S", help="judge every question by this rule: exact, vqa, anls, relaxed, mcq, ..."
    )
    data.add_argument("--limit", type=positive_int, metavar="N", help="questions per task")
    data.add_argument("--seed", type=int, default=0, help="of the questions and of the intervals")
    space = parser.add_argument_group("space and search")
    space.add_argument("--method", action="append", metavar="M", help="search only these methods, repeatable")
    space.add_argument(
        "--pin", action="append", default=[], metavar="M", help="in every recipe: fastervlm, rtn(bits=4)"
    )
    space.add_argument("--forbid", action="append", default=[], metavar="M", help="a method, or one of its settings")
    space.add_argument("--add", action="append", default=[], metavar="M", help="a setting to try as well")
    space.add_argument("--strategy", metavar="S", help=f"{', '.join(NAMES)} (default: {NAMES[0]})")
    space.add_argument(
        "--time-on", metavar="PRESET", help="time the finalists on this shape, random weights in bfloat16"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="fit the number of questions to this time")
    parser.add_argument("-o", "--out", metavar="OUT", help="folder for model and report (default: <model>-optimized)")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from foveate.optimize.budget import Budget
    from foveate.optimize.result import check_out, text
    from foveate.tasks.base import find_tasks

    given = {axis: getattr(args, f"{'min' if axis == 'throughput' else 'max'}_{axis}") for axis in LIMITS}
    budget = Budget.parse(loss=args.max_loss, skill_loss=args.max_skill_loss, **given)
    out = Path(args.out or f"{Path(args.model).name}-optimized")
    check_out(out)
    tasks, data = list(args.task), args.data
    if data in NAMED and not Path(data).exists():
        tasks, data = [data, *tasks], None
    data = data or args.data_dir or (os.environ.get("FOVEATE_DATA") if tasks else None)
    find_tasks(tasks, data, args.scorer)  # before the model: a misspelt task should not wait for weights
    vlm = load_model(args)

    from foveate.optimize import optimize

    report = optimize(
        vlm,
        budget,
        tasks=tasks,
        data=data,
        scorer=args.scorer,
        limit=args.limit,
        minutes=args.minutes,
        seed=args.seed,
        out=out,
        methods=args.method,
        pin=args.pin,
        forbid=args.forbid,
        add=args.add,
        strategy=args.strategy,
        time_on=args.time_on,
        command=shlex.join(["foveate", *sys.argv[1:]]),
        quiet=args.quiet,
        say=None if args.quiet else lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.json:
        print_json(report)
    else:
        print(text(report))
        print(f"report: {out / 'report.html'}")
        if report["out"]:
            print(f"try it: foveate ask --model {shlex.quote(str(out))} picture.png 'What is this?'")
        elif report["recipe"]:
            recipe, model = shlex.quote(report["recipe"]), shlex.quote(args.model)
            print(
                f"the model was not written; to have it all the same: foveate compress {model} --recipe {recipe} -o OUT"
            )
    if report["interrupted"]:
        return 130
    return 0 if report["met"] else 1
