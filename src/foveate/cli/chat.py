"""`foveate chat`: a dialogue about pictures and clips, one line a turn; works on a terminal and in a pipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from foveate.cli.ask import check_media, summary
from foveate.cli.common import (
    DEFAULT_MODEL,
    add_method_options,
    add_model_options,
    add_verb,
    load_model,
    parse_reduce,
    positive_int,
)
from foveate.errors import FoveateError

HELP = """/image PATH   show a picture, clip or frame folder with the next question
/new          forget the dialogue and its pictures
/quit         leave (or end the input)"""


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "chat", epilog="In the dialogue: " + "; ".join(HELP.splitlines()))
    parser.add_argument("media", nargs="*", metavar="MEDIA", help="pictures, clips or frame folders to talk about")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help="folder or preset (default: nano)")
    parser.add_argument("--frames", type=positive_int, metavar="N", help="frames per clip (default: the model's)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, metavar="N")
    add_method_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    for name in args.media:
        check_media(name)
    reduce = parse_reduce(args.reduce)
    dialogue = Dialogue(load_model(args), reduce=reduce, frames=args.frames, max_new_tokens=args.max_new_tokens)
    for name in args.media:
        dialogue.show(name)
    live = sys.stdin.isatty()
    if live:
        print(f"{dialogue.vlm.name}: ask about the pictures.\n{HELP}", file=sys.stderr)
    failed = False
    while True:
        if live:
            print("\n> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() in ("/quit", "/exit"):
            return 2 if failed and not live else 0
        try:
            _turn(dialogue, line.strip(), args.json, live)
        except FoveateError as error:  # one bad turn does not end a dialogue
            failed = True
            print(f"foveate: {' '.join(str(error).split())}", file=sys.stderr)


def _turn(dialogue: Dialogue, line: str, as_json: bool, live: bool) -> None:
    command, _, rest = line.partition(" ")
    if not line:
        return
    if command == "/image":
        dialogue.show(rest.strip())
    elif command == "/new":
        dialogue.forget()
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif as_json:
        answer = dialogue.say(line)
        print(
            json.dumps({"answer": answer.text, "tokens": answer.tokens, "ms": answer.ms}, ensure_ascii=False),
            flush=True,
        )
    else:
        answer = dialogue.say(line, lambda text: print(text, end="", flush=True))
        print(flush=True)
        if live:
            print(summary(answer), file=sys.stderr)


class Dialogue:
    """Messages so far, and media waiting for the next question."""

    def __init__(self, vlm: Any, *, reduce: Any = None, frames: int | None = None, max_new_tokens: int = 256) -> None:
        self.vlm, self.reduce, self.frames, self.max_new_tokens = vlm, reduce, frames, max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[Any] = []

    def show(self, name: str) -> None:
        """Attach a picture, clip or frame folder to the next question. Raises InputError when it is not there."""
        from foveate.data.sample import as_media

        check_media(name)
        self.waiting.append(as_media(name))

    def forget(self) -> None:
        """Start again."""
        self.messages, self.waiting = [], []

    def say(self, text: str, on_text: Callable[[str], None] | None = None) -> Any:
        """The answer to one turn, which both then belong to the dialogue. A turn that fails leaves it as it was."""
        from foveate.data.sample import media_parts
        from foveate.vlm import Request

        content = [*media_parts(self.waiting), {"type": "text", "text": text}]
        turns = [*self.messages, {"role": "user", "content": content}]
        request = Request(messages=turns, num_frames=self.frames, reduce=self.reduce)
        answer = self.vlm.respond(request, self.max_new_tokens, on_text=on_text)
        self.messages, self.waiting = [*turns, {"role": "assistant", "content": answer.text}], []
        return answer
