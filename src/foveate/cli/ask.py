"""`foveate ask MEDIA... QUESTION`: one question, the answer streamed as it is generated."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.cli.common import (
    DEFAULT_MODEL,
    add_method_options,
    add_model_options,
    add_verb,
    check_picture,
    load_model,
    new_file,
    parse_reduce,
    positive_int,
    print_json,
    print_table,
)
from foveate.errors import InputError


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "ask", usage="foveate ask MEDIA... QUESTION [options]")
    parser.add_argument(
        "inputs", nargs="+", metavar="MEDIA... QUESTION", help="pictures, clips or frame folders, then a question"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help="folder or preset (default: nano)")
    parser.add_argument("--frames", type=positive_int, metavar="N", help="frames per clip (default: the model's)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, metavar="N")
    parser.add_argument("--show", metavar="FILE", help="draw the visual tokens that stay over the picture")
    parser.add_argument(
        "--dominance", action="store_true", help="how much text outweighs the picture in each layer (MDI, AEI)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the request would become, and run nothing")
    add_method_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    media, question = split_inputs(args.inputs)
    from foveate.show import kept_picture

    reduce = parse_reduce(args.reduce)
    vlm = load_model(args)
    if args.dry_run:
        plan = vlm.plan(user_message(media, question), num_frames=args.frames)
        print_json(plan.to_dict()) if args.json else show_plan(plan)
        return 0
    if args.show:
        check_picture(args.show, "--show")
    stream = None if args.json else _write
    answer = vlm.ask(
        media, question, max_new_tokens=args.max_new_tokens, reduce=reduce, num_frames=args.frames, on_text=stream
    )
    if args.show:
        plan = vlm.plan(user_message(media, question), num_frames=args.frames)
        with new_file(args.show) as path:
            kept_picture(plan, vlm.spec, vlm.adapter.layout(plan), answer.kept, max_panels=None).save(path)
    looks = _dominance(vlm, user_message(media, question), args) if args.dominance else None
    if args.json:
        result = {"answer": answer.text, "tokens": answer.tokens, "ms": answer.ms}
        print_json(result if looks is None else {**result, "dominance": [vars(layer) for layer in looks]})
    else:
        print()
        print(summary(answer), file=sys.stderr)
        if looks is not None:
            _show_dominance(looks)
    return 0


def _dominance(vlm: Any, messages: list[dict[str, Any]], args: argparse.Namespace) -> list[Any]:
    from foveate.reduce.dominance import dominance
    from foveate.vlm import Request

    request = Request(messages=messages, num_frames=args.frames, reduce=parse_reduce(args.reduce))
    return dominance(vlm, request, args.max_new_tokens)


def _show_dominance(layers: list[Any]) -> None:
    """A table of the layers, and of their thirds."""
    from foveate.reduce.dominance import stages

    named = [(str(layer.layer), layer) for layer in layers] + list(stages(layers).items())
    rows = [
        [name, str(d.text), str(d.visual), f"{d.mdi:.2f}", f"{d.aei_text:.2f}", f"{d.aei_visual:.2f}"]
        for name, d in named
    ]
    print_table(["layer", "text", "visual", "MDI", "AEI text", "AEI visual"], rows, left=1)


def split_inputs(inputs: list[str]) -> tuple[list[str], str]:
    """(media paths, question) of the arguments. Raises InputError: no such file, no question, or no media."""
    *media, question = inputs
    if looks_like_media(question):
        raise InputError(f"no question given after {question!r}; put it last: foveate ask {question} 'What is this?'")
    for name in media:
        check_media(name)
    if not media:
        raise InputError(f"no picture or clip given for the question {question!r}; put its path first")
    if not question.strip():
        raise InputError("the question is empty; put it last, in quotes")
    return media, question


def check_media(name: str) -> None:
    """Raises InputError when `name` is no file or folder of this machine."""
    if "://" in name:
        raise InputError(f"{name!r} is an address; foveate reads local files only: download it first")
    if not Path(name).exists():
        hint = "" if Path(name).suffix else " (a question of several words needs quotes)"
        raise InputError(f"no such picture or clip: {name!r}; check the path{hint}")


def looks_like_media(text: str) -> bool:
    """Whether an argument is a file name and not a question: it exists, or it ends as pictures and clips do."""
    from foveate.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    try:
        exists = Path(text).exists()
    except (OSError, ValueError):  # longer than a file name may be, or with a zero byte
        return False
    return exists or (len(text.split()) == 1 and Path(text).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def user_message(media: list[str], text: str) -> list[dict[str, Any]]:
    """One user turn: the media, then the text."""
    from foveate.data.sample import as_media, media_parts

    return [
        {"role": "user", "content": [*media_parts([as_media(name) for name in media]), {"type": "text", "text": text}]}
    ]


def summary(answer: Any) -> str:
    """One line on what the answer cost."""
    tokens, spent = answer.tokens, answer.ms
    kept = "" if tokens["kept"] == tokens["visual"] else f" ({tokens['kept']} kept)"
    stages = " · ".join(f"{stage} {time:.0f} ms" for stage, time in spent.items() if time >= 0.5)
    return f"{tokens['text']} text + {tokens['visual']} visual tokens{kept} · {stages}"


def show_plan(plan: Any) -> None:
    """A plan in words."""
    separators = plan.num_visual - sum(media.num_features for media in plan.media)
    apart = f" ({separators} of them separators)" if separators else ""
    print(f"{plan.num_tokens} tokens: {plan.num_text} text, {plan.num_visual} visual{apart}")
    for media in plan.media:
        width, height = media.size
        details = [f"{width} x {height}", f"{len(media.views)} views"]
        if media.block:
            details.append(f"block {media.block[0]} x {media.block[1]}")
        if media.frames:
            details.append(f"frames {' '.join(map(str, media.frames))}")
        print(f"{media.kind} {media.name}: {', '.join(details)}, {media.num_tokens} tokens")
    print(f"preprocessing {plan.spec_hash}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
