"""`foveate world show` and `foveate world write`: look at the drawn world, or put a part of it on disk."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from foveate.cli.common import add_verb, check_picture, new_file, new_folder, positive_int, print_json

if TYPE_CHECKING:
    from foveate.data.sample import Sample

FILES = {
    "llava": "data.jsonl",
    "openai": "data.jsonl",
    "plain": "data.jsonl",
    "webdataset": "data-000000.tar",
    "hf": "data.parquet",
}
"""Formats of `foveate.data.formats`, and the file that each writes in the new folder."""
SPLITS = ("train", "validation", "test")


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "world")
    actions = parser.add_subparsers(metavar="ACTION", required=True, dest="action", parser_class=type(parser))
    show = actions.add_parser("show", help="draw a contact sheet of pictures with their questions and answers")
    show.add_argument("--out", required=True, metavar="FILE", help="picture to write, for example sheet.png")
    show.add_argument("--n", type=positive_int, default=4, metavar="N", help="scenes per skill (default: 4)")
    write = actions.add_parser("write", help="write scenes with all their questions in a data format")
    write.add_argument("--out", required=True, metavar="DIR", help="new folder")
    write.add_argument("--format", choices=FILES, default="llava", help="default: llava")
    write.add_argument("--n", type=positive_int, default=100, metavar="N", help="scenes (with --skill: of each skill)")
    for action in (show, write):
        action.add_argument("--skill", action="append", default=[], metavar="S", help="only this skill, repeatable")
        action.add_argument("--split", choices=SPLITS, default="train" if action is write else "test")
        action.add_argument("--seed", type=int, default=0)
        action.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    skills = check_skills(args.skill)
    if args.action == "show":
        result = _show(args, skills)
    else:
        result = _write(args, skills)
    if args.json:
        print_json(result)
    else:
        print(f"{result['out']}: " + ", ".join(f"{value} {key}" for key, value in result.items() if key != "out"))
    return 0


def check_skills(asked: list[str]) -> list[str]:
    """The skills to draw, all of them when none is asked for. Raises UnknownNameError naming the nearest."""
    from foveate.registry import Registry
    from foveate.world import SKILLS

    known = Registry("skill", dict.fromkeys(SKILLS, ""))
    for skill in asked:
        if skill not in known:
            known.get(skill)
    return asked or list(SKILLS)


def _show(args: argparse.Namespace, skills: list[str]) -> dict[str, Any]:
    from foveate.world.show import contact_sheet

    check_picture(args.out, "--out")
    sheet = contact_sheet(skills, args.n, split=args.split, seed=args.seed)
    with new_file(args.out) as path:
        sheet.save(path)
    return {"out": args.out, "skills": len(skills), "scenes": len(skills) * args.n}


def _write(args: argparse.Namespace, skills: list[str]) -> dict[str, Any]:
    from foveate.data.formats import write_dataset

    samples = _evaluation(args, skills) if args.skill else _scenes(args)
    with new_folder(args.out, "--out") as folder:
        count = write_dataset(samples, folder / FILES[args.format], args.format)
    return {"out": args.out, "samples": count, "format": args.format}


def _evaluation(args: argparse.Namespace, skills: list[str]) -> Iterator[Sample]:
    from foveate.progress import track
    from foveate.world import evaluation_samples

    for skill in track(skills, "world write"):
        yield from evaluation_samples(skill, args.n, split=args.split, seed=args.seed)


def _scenes(args: argparse.Namespace) -> Iterator[Sample]:
    """All kinds of scenes in turn, each with all its questions."""
    from foveate.progress import track
    from foveate.world import KINDS, draw

    kinds = list(KINDS)
    for index in track(range(args.n), "world write"):
        yield draw(kinds[index % len(kinds)], index // len(kinds), split=args.split, seed=args.seed).sample()
