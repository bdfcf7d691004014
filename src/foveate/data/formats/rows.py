"""One record of any format to one `Sample`: LLaVA conversations, OpenAI messages, plain question and answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from foveate.data.chat import parse_messages
from foveate.data.images import image_size
from foveate.data.sample import Box, ImageSource, Media, Sample, VideoSource, as_media
from foveate.errors import InputError

PLACEHOLDER = re.compile(r"<image>|<video>|<vila/video>")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_CONTENT_KEYS = {
    *("id", "image", "images", "video", "videos", "question", "answer"),
    *("conversations", "messages", "branches", "objects", "meta"),
}
Resolve = Callable[[Any, str], Media]


def resolver(root: Path) -> Resolve:
    """A function that turns a media value of a record into a `Media`; relative paths are looked up in `root`."""

    def resolve(value: Any, kind: str) -> Media:
        if isinstance(value, ImageSource | VideoSource):
            return value
        if isinstance(value, dict):  # {"url"} of OpenAI, {"bytes", "path"} of Hugging Face datasets
            if value.get("bytes") is not None:
                name = str(value.get("path") or "")
                return ImageSource(value["bytes"], name) if kind == "image" else VideoSource(value["bytes"], name)
            value = value.get("url") or value.get("path")
        if value is None or value == "":
            raise InputError(f"the {kind} is empty")
        if isinstance(value, str) and not value.startswith("data:") and "://" not in value:
            path = Path(value)
            path = path if path.is_absolute() else root / path
            if not path.exists():
                raise InputError(f"{path}: no such file")
            value = path
        return as_media(value, kind)

    return resolve


def to_sample(row: Any, name: str, resolve: Resolve, check: bool = True) -> Sample:
    """The sample of a record; its form is told by its keys. check: read the headers of pictures too.

    Raises InputError with the reason when the record cannot be used.
    """
    if not isinstance(row, dict):
        raise InputError(f"a record must be an object with keys, not {type(row).__name__}")
    media = _media(row, resolve)
    messages: list[dict[str, Any]] = []
    if row.get("branches") is not None:
        made = Sample(str(row.get("id", name)), media, _branches(row["branches"]))
    elif row.get("conversations") is not None:
        messages = _from_llava(row["conversations"], media)
    elif row.get("messages") is not None:
        messages = _from_openai(row["messages"], media, resolve)
    elif row.get("question") is not None:
        parts = [{"type": m.kind, m.kind: m} for m in media]
        parts.append({"type": "text", "text": PLACEHOLDER.sub("", str(row["question"])).strip()})
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": _answer(row)}]
    else:
        raise InputError(f"keys are {', '.join(map(str, row)) or 'none'}; need conversations, messages or question")
    if row.get("branches") is None:
        made = _from_messages(str(row.get("id", name)), messages)
    if check:
        for item in made.media:
            if isinstance(item, ImageSource):
                image_size(item)
    made.meta = _meta(row)
    made.objects = _objects(row.get("objects"))
    return made


def _media(row: dict[str, Any], resolve: Resolve) -> list[Media]:
    found: list[Media] = []
    for key, kind in (("image", "image"), ("images", "image"), ("video", "video"), ("videos", "video")):
        value = row.get(key)
        if value is None:
            continue
        many = isinstance(value, list | tuple) and (kind == "image" or key == "videos")
        for item in value if many else [value]:
            if isinstance(item, list | tuple):  # a clip given as its frames
                found.append(VideoSource([resolve(frame, "image") for frame in item]))
            else:
                found.append(resolve(item, kind))
    return found


def _branches(stored: Any) -> list[list[tuple[str, str]]]:
    """Several dialogues about the same media: [[[question, answer], ...], ...]."""
    try:
        branches = [[(question, answer) for question, answer in branch] for branch in stored]
    except (TypeError, ValueError):
        raise InputError("branches must be lists of [question, answer] pairs") from None
    texts = [text for branch in branches for turn in branch for text in turn]
    if not branches or not all(branches) or not all(isinstance(text, str) for text in texts):
        raise InputError("branches must hold at least one [question, answer] pair of texts each")
    return branches


def _answer(row: dict[str, Any]) -> str:
    answer = row.get("answer")
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    if isinstance(answer, bool):
        return "true" if answer else "false"
    if not isinstance(answer, str | int | float):
        raise InputError(f"answer is {answer!r}; it must be text, a number, true or false")
    return str(answer)


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    meta = {k: v for k, v in row.items() if k not in _CONTENT_KEYS}
    if isinstance(row.get("meta"), dict):
        meta.update(row["meta"])
    if isinstance(row.get("answer"), list | tuple):
        meta["answers"] = [str(a) for a in row["answer"]]
    return meta


def _objects(stored: Any) -> list[list[Box]] | None:
    if not isinstance(stored, list):
        return None
    names = {f.name for f in fields(Box)}
    try:
        return [[Box(**{k: v for k, v in box.items() if k in names}) for box in boxes] for boxes in stored]
    except (TypeError, AttributeError):
        return None  # objects of another tool, in a form of its own


def _from_llava(conversations: Any, media: list[Media]) -> list[dict[str, Any]]:
    """Messages of a LLaVA conversation; its placeholders take the media in order, wherever they stand."""
    if not isinstance(conversations, list | tuple):
        raise InputError(f"conversations is {type(conversations).__name__}; it must be a list of turns")
    messages = []
    for i, turn in enumerate(conversations):
        role = ROLES.get(turn.get("from", turn.get("role"))) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if role is None or not isinstance(text, str):
            raise InputError(f"turn {i} needs from (human or gpt) and value (text)")
        messages.append({"role": role, "content": text})
    return _place(messages, media)


def _place(messages: list[dict[str, Any]], media: list[Media]) -> list[dict[str, Any]]:
    """Put media where the user's text has placeholders, or before the first user text when it has none."""
    marks = [m for turn in messages if turn["role"] == "user" for m in PLACEHOLDER.findall(turn["content"])]
    if marks and len(marks) != len(media):
        raise InputError(f"{len(marks)} media placeholders in the text, but {len(media)} media in the record")
    following, before = iter(media), [] if marks else list(media)
    out = []
    for turn in messages:
        if turn["role"] != "user":
            out.append(turn)
            continue
        parts: list[dict[str, Any]] = [{"type": m.kind, m.kind: m} for m in before]
        before, at = [], 0
        for mark in PLACEHOLDER.finditer(turn["content"]):
            parts.append({"type": "text", "text": turn["content"][at : mark.start()]})
            item = next(following)
            parts.append({"type": item.kind, item.kind: item})
            at = mark.end()
        parts.append({"type": "text", "text": turn["content"][at:]})
        out.append({"role": "user", "content": [p for p in parts if p.get("text") != ""]})
    return out


def _from_openai(messages: Any, media: list[Media], resolve: Resolve) -> list[dict[str, Any]]:
    """OpenAI messages with their media opened; parts without a payload take `media` in order."""
    if not isinstance(messages, list | tuple):
        raise InputError(f"messages is {type(messages).__name__}; it must be a list of messages")
    if all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        roles = [{"role": ROLES.get(m.get("role"), m.get("role")), "content": m["content"]} for m in messages]
        return _place(roles, media)
    following, out = iter(media), []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list | tuple):
            content = [_open_part(part, following, resolve) for part in content]
        out.append({"role": message.get("role") if isinstance(message, dict) else None, "content": content})
    left = sum(1 for _ in following)
    if left:
        raise InputError(f"{left} media of the record are not used by any message part")
    return out


def _open_part(part: Any, following: Any, resolve: Resolve) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "image_url", "video", "video_url"):
        return part
    value, plain = part.get(kind), kind.partition("_")[0]
    if value is None:
        item = next(following, None)
        if item is None:
            raise InputError(f"an {kind} part has no payload, and the record has no more media")
    else:
        item = resolve(value, plain)
    return {"type": item.kind, item.kind: item}


def _from_messages(identity: str, messages: Sequence[dict[str, Any]]) -> Sample:
    """A sample with media first when the dialogue has that form, else one that keeps the messages as they are.

    In the first form the line feed that LLaVA files put between `<image>` and the question is dropped, so that training
    and asking render the same prompt.
    """
    turns = parse_messages(messages)
    dialogue = [turn for turn in turns if turn.role != "system"]
    texts = ["".join(part for part in turn.parts if isinstance(part, str)) for turn in dialogue]
    if not dialogue or [turn.role for turn in dialogue] != ["user", "assistant"] * (len(dialogue) // 2):
        roles = ", ".join(turn.role for turn in turns)
        raise InputError(f"roles are {roles or 'none'}; need user and assistant in turn, an answer last")
    media = [part for turn in dialogue for part in turn.parts if not isinstance(part, str)]
    leading = 0
    for part in dialogue[0].parts:
        if isinstance(part, str):
            break
        leading += 1
    plain = len(turns) == len(dialogue) and leading == len(media)
    branch = [(texts[i].strip() if media else texts[i], texts[i + 1]) for i in range(0, len(texts), 2)]
    return Sample(identity, media, [branch], turns=None if plain else list(messages))
