"""Chat of the families of transformers: the checkpoint's own template, media markers replaced by the family's text.

The template is rendered by transformers, sandboxed. What it writes for media (`spec.image_token`, `spec.video_token`)
is replaced, one after the other, by `MediaPlan.marker`; text of messages cannot hold such tokens, so no text adds
media. A template that takes content parts gets parts, one that takes text gets text. Training labels are the answers
and the special token that ends each, found by their place in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from foveate.data.chat import _MARK, _MARKS, IGNORE, ChatCodec, Turn, _warn_once
from foveate.data.families import family_tokens
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.data.plan import MediaPlan
    from foveate.data.spec import PreprocessSpec


class FamilyCodec(ChatCodec):
    """A `ChatCodec` for a family of transformers. Get it with `codec(tokenizer, spec)`."""

    def __init__(self, tokenizer: Any, spec: PreprocessSpec) -> None:
        self.image_token, self.video_token = spec.image_token, spec.video_token
        tokens = family_tokens(spec)
        # the other tokens are replaced before encoding, or are text to a tokenizer that does not know them
        written = spec.video_token if spec.family.startswith("qwen") or spec.family == "llava_onevision" else ""
        self._read(tokenizer, (spec.image_token, *([written] if written else ())))
        self._forbidden = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        markers = sorted(filter(None, (spec.image_token, spec.video_token)), key=len, reverse=True)
        self._markers = re.compile("(" + "|".join(map(re.escape, markers)) + ")")
        self.bos = getattr(tokenizer, "bos_token", None)
        bare, full = (list(tokenizer("a", add_special_tokens=add).input_ids) for add in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self._opening = tuple(full[:at])
        self.takes_parts = self._takes_parts()

    def _takes_parts(self) -> bool:
        """Whether the template reads lists of content parts, and not text."""
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _MARK.format(0)}]}]
        try:
            text = self._apply(probe, False)
        except Exception:  # a template that adds the content to a text
            return False
        return self.image_token in text and _MARK.format(0) in text and "'type'" not in text

    def _apply(self, messages: list[dict[str, Any]], generate: bool) -> str:
        apply = self._tokenizer().apply_chat_template  # type: ignore[union-attr]
        return apply(messages, chat_template=self.template, tokenize=False, add_generation_prompt=generate)

    # ---- messages to ids

    def dialogue(
        self, turns: Sequence[Turn], media: Sequence[MediaPlan], generate: bool
    ) -> tuple[tuple[int, ...], list[int] | None, tuple[MediaPlan, ...]]:
        turns = [Turn(turn.role, self._tidy(turn.parts)) for turn in turns]
        trained = turns[-1].role == "assistant"
        generate = generate and not trained
        pieces, order = self._fill(self._write(turns, generate), media)
        text = "".join(pieces)
        opening = () if self.bos and text.startswith(self.bos) else self._opening
        if not trained:
            return opening + self.encode(text), None, order
        ids, labels = self._label(text, self._answers(turns, media, text))
        return opening + ids, [IGNORE] * len(opening) + labels, order

    def _tidy(self, parts: Sequence[Any]) -> tuple[Any, ...]:
        """Parts whose texts hold none of the family's tokens, neighbours that would spell one joined first."""
        out: list[Any] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, str)):
            texts = list(run)
            if is_text and self._forbidden.search("".join(texts)):
                texts = [self._clean("".join(texts))]
            out += texts
        return tuple(out)

    def _clean(self, text: str) -> str:
        while self._forbidden.search(text):  # repeated: what is left may spell one again
            text = self._forbidden.sub("", text)
            _warn_once(
                "strip", f"text held {self.image_token} or its like: removed, media come from message parts only"
            )
        return text

    def _write(self, turns: Sequence[Turn], generate: bool, marks: bool = False) -> str:
        """The rendered dialogue, media as the template writes them. marks: a numbered mark for each answer's text."""
        messages = []
        for number, turn in enumerate(turns):
            parts = turn.parts
            if marks and turn.role == "assistant":
                parts = (_MARK.format(number),)
            if self.takes_parts:
                content: Any = [
                    {"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind} for p in parts or ("",)
                ]
            else:
                tokens = {"image": self.image_token, "video": self.video_token}
                content = "".join(p if isinstance(p, str) else tokens[p.kind] for p in parts)
            messages.append({"role": turn.role, "content": content})
        try:
            return self._apply(messages, generate)
        except Exception as error:  # jinja's errors, and the template's own raise_exception
            raise InputError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from None

    def _fill(self, text: str, media: Sequence[MediaPlan]) -> tuple[list[str], tuple[MediaPlan, ...]]:
        """The pieces of `text` with its markers replaced, and the media in the order they stand there."""
        pieces = self._markers.split(text)
        queues = {
            self.image_token: [item for item in media if item.kind == "image"],
            self.video_token: [item for item in media if item.kind == "video"],
        }
        found, order = len(pieces) // 2, []
        for k in range(1, len(pieces), 2):
            if not queues[pieces[k]]:
                break
            order.append(queues[pieces[k]].pop(0))
            pieces[k] = order[-1].marker
        if len(order) != len(media) or found != len(media):
            raise InputError(
                f"the chat template made {found} media placeholders of {len(media)}; put each picture before the text "
                "of its message, and no piece of a placeholder's name into the text"
            )
        return pieces, tuple(order)

    # ---- labels

    def _answers(self, turns: Sequence[Turn], media: Sequence[MediaPlan], text: str) -> list[tuple[int, int]] | None:
        """(start, end) of each answer in `text`, or None when the template changes what it is given."""
        answers = {i: "".join(turn.parts) for i, turn in enumerate(turns) if turn.role == "assistant"}
        form = "".join(self._fill(self._write(turns, False, marks=True), media)[0])
        for change in (str, str.strip):
            out, spans = "", []
            for k, piece in enumerate(_MARKS.split(form)):
                written = change(answers.get(int(piece), "")) if k % 2 else piece
                if k % 2:
                    spans.append((len(out), len(out) + len(written)))
                out += written
            if out == text:
                return spans
        return None

    def _label(self, text: str, answers: list[tuple[int, int]] | None) -> tuple[tuple[int, ...], list[int]]:
        """(ids, labels) of a text: tokens that reach into an answer, and the special token behind it (after blanks)."""
        if self._backend is None or answers is None:
            _warn_once("align", "an answer could not be told apart from the chat template; its sample gives no loss")
            ids = self.encode(text)
            return ids, [IGNORE] * len(ids)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, labels, specials = tuple(encoding.ids), [IGNORE] * len(encoding.ids), set(self._special_ids())
        for start, end in answers:
            behind: list[int] = []
            for k, (left, right) in enumerate(encoding.offsets):
                if left < end and right > start:
                    labels[k] = ids[k]
                elif left >= end:
                    behind.append(k)
                    if ids[k] in specials:
                        for index in behind:
                            labels[index] = ids[index]
                    if ids[k] in specials or text[left:right].strip():
                        break
        return ids, labels

    def _special_ids(self) -> list[int]:
        tokenizer = self._tokenizer()
        return [*self._special.values(), *getattr(tokenizer, "all_special_ids", [])]

    def stops(self) -> list[int]:
        turns = [Turn("user", ("x",)), Turn("assistant", ("y",))] * 2
        text = self._write(turns, False)
        labels = self._label(text, self._answers(turns, (), text))[1]
        specials = set(self._special_ids())
        return list(dict.fromkeys(label for label in labels if label in specials))
