"""Messages to token ids and label masks, with one placeholder token per piece of media.

Covered: the tokenizer's own chat template (Qwen2's when it has none), media placeholders that text cannot forge, labels
by the sentinel rule of NVILA, stop tokens, and the cached fast path for many short dialogues about the same media.
Not covered: how many features a placeholder becomes (that is `foveate.data.plan`), and the prompts of the families of
transformers (`foveate.data.family_chat`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np

from foveate.data.sample import Media, as_media
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.data.plan import MediaPlan
    from foveate.data.spec import PreprocessSpec

IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<vila/video>"
SENTINEL = "<vila/sentinel>"
IGNORE = -100
QWEN2_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages if message['content'] is not none %}{{ '<|im_start|>' + message['role'] + "
    "'\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used for a tokenizer without a template: the `qwen2` conversation of NVILA (system prompt without a full stop)."""

# A template that looks into the text (to cut out reasoning, say) must be rendered anew for each dialogue.
_READS_CONTENT = re.compile(r"startswith|endswith|split|replace|'[^']*' in |\"[^\"]*\" in |content *[=!]= *['\"]")
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")
_log = logging.getLogger("foveate")
_warned: set[str] = set()


class Turn(NamedTuple):
    """One message: its role and its parts, texts and media, in order."""

    role: str
    parts: tuple[str | Media, ...]


def parse_messages(messages: Sequence[dict[str, Any]]) -> list[Turn]:
    """Turns from OpenAI-style messages. Raises InputError for an unknown role or part, or media outside a user turn.

    Parts: {"type": "text", "text"}, {"type": "image", "image"}, {"type": "image_url", "image_url": str | {"url"}}, and
    the same two for video. A payload is anything `as_media` takes.
    """
    turns = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise InputError(f"message {i}: role is {role!r}; it must be system, user or assistant")
        content = message.get("content")
        parts = [content] if isinstance(content, str) else content if isinstance(content, list | tuple) else None
        if parts is None:
            raise InputError(f"message {i}: content is {type(content).__name__}; it must be text or a list of parts")
        turn = Turn(role, tuple(_part(part, i) for part in parts))
        if role != "user" and any(not isinstance(p, str) for p in turn.parts):
            raise InputError(f"message {i}: a {role} message cannot hold pictures or clips; put them in a user message")
        turns.append(turn)
    if not turns:
        raise InputError("there are no messages; give at least one user message")
    return turns


def _part(part: Any, index: int) -> str | Media:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text") and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url", "video", "video_url"):
        value = part.get(kind)
        value = value.get("url") if isinstance(value, dict) else value
        if value is not None:
            return as_media(value, kind.partition("_")[0])
    found = sorted(part) if isinstance(part, dict) else type(part).__name__
    raise InputError(f"message {index}: part {kind!r} with {found} is not known; use text, image, image_url or video")


def clean_text(text: str) -> str:
    """Text without media placeholders; says so once. Repeats until none is left, so that none can be assembled."""
    while IMAGE_TOKEN in text or VIDEO_TOKEN in text:
        text = text.replace(IMAGE_TOKEN, "").replace(VIDEO_TOKEN, "")
        _warn_once("strip", f"text held {IMAGE_TOKEN} or {VIDEO_TOKEN}: removed, media come from message parts only")
    return text


def _warn_once(key: str, message: str) -> None:
    if key not in _warned:
        _warned.add(key)
        _log.warning(message)


class Rest(NamedTuple):
    """A dialogue cut behind its last media placeholder: ids up to there, and ids and labels of what follows."""

    head: tuple[int, ...]
    ids: tuple[int, ...]
    labels: tuple[int, ...]


class ChatCodec:
    """What chat needs of one tokenizer: rendering, encoding, special ids, and the caches. Get it with `codec`."""

    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN

    def __init__(self, tokenizer: Any) -> None:
        self._read(tokenizer, (IMAGE_TOKEN, VIDEO_TOKEN, SENTINEL))
        self.rest = lru_cache(65536)(self._rest)
        self._form = lru_cache(1024)(self._make_form)
        self._fixed_form = not _READS_CONTENT.search(self.template)
        self.sentinel_id = self.ids[SENTINEL]

    def _read(self, tokenizer: Any, tokens: Sequence[str]) -> None:
        """Take over the tokenizer. tokens: those it must have, the placeholders of a picture and of a clip first."""
        self.template = _template(tokenizer)
        self.vocabulary = len(tokenizer)
        self._tokenizer = ref(tokenizer)  # the codec must not keep its tokenizer alive
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._special, self._cut = _special_tokens(tokenizer)
        self._piece = lru_cache(65536)(self._encode)
        first, last = tokens[0], tokens[-1]
        probes = ("a b", " a", f"{first}a b", f"a{first} b", f" {first}\n{last}\n\na", f"A {last} ")
        if self._cut and any(self.encode(text) != self._encode(text) for text in probes):
            self._cut = None  # this tokenizer looks across special tokens
        unknown = getattr(tokenizer, "unk_token_id", None)
        self.ids = {t: tokenizer.convert_tokens_to_ids(t) for t in tokens}
        missing = [t for t, i in self.ids.items() if i is None or i == unknown]
        if missing:
            raise InputError(f"the tokenizer lacks {', '.join(missing)}; add them as special tokens, resize the model")
        self.image_id = self.ids[self.image_token]
        self.video_id = self.ids.get(self.video_token, self.image_id)

    def dialogue(
        self, turns: Sequence[Turn], media: Sequence[MediaPlan], generate: bool
    ) -> tuple[tuple[int, ...], list[int] | None, tuple[MediaPlan, ...]]:
        """(ids, labels, media) of a dialogue: placeholders not expanded yet, media in the order of their placeholders.

        generate: open the assistant's turn. A dialogue that ends with an answer has labels instead.
        """
        roles, texts = flatten(turns, [item.marker for item in media])
        trained = roles[-1] == "assistant"
        ids = self.encode(self.render(roles, texts, generate and not trained))
        return ids, self.labels(ids, roles, texts) if trained else None, tuple(media)

    def stops(self) -> list[int]:
        """Ids of the tokens that follow answers in the chat template."""
        form = self.encode(self.render(("user", "assistant") * 5, ["x", SENTINEL] * 5))
        return list(dict.fromkeys(after for token, after in pairwise(form) if token == self.sentinel_id))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, nothing added. Cut at the special tokens, so that pieces seen before are not encoded again."""
        if self._cut is None:
            return self._encode(text)
        ids: list[int] = []
        for i, piece in enumerate(self._cut.split(text)):
            if i % 2:
                ids.append(self._special[piece])
            elif piece:
                ids += self._piece(piece)
        return tuple(ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._backend is not None:
            return tuple(self._backend.encode(text, add_special_tokens=False).ids)
        return tuple(self._tokenizer()(text, add_special_tokens=False).input_ids)  # type: ignore[misc]

    def render(self, roles: tuple[str, ...], texts: Sequence[str], generate: bool = False) -> str:
        """The whole dialogue as text, by the chat template; generate adds the opening of the assistant's turn."""
        if not self._fixed_form:
            return self._render(roles, texts, generate)
        form = self._form(roles, tuple(map(bool, texts)), generate)
        return "".join(texts[piece] if isinstance(piece, int) else piece for piece in form)

    def _make_form(self, roles: tuple[str, ...], filled: tuple[bool, ...], generate: bool) -> tuple[str | int, ...]:
        """The template rendered once with marks for the texts: pieces of text, and indices of messages."""
        marks = [_MARK.format(i) if full else "" for i, full in enumerate(filled)]
        pieces = _MARKS.split(self._render(roles, marks, generate))
        return tuple(int(p) if i % 2 else p for i, p in enumerate(pieces))

    def _render(self, roles: tuple[str, ...], texts: Sequence[str], generate: bool) -> str:
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts)]
        apply = self._tokenizer().apply_chat_template  # type: ignore[union-attr]
        try:
            return apply(messages, chat_template=self.template, tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # jinja's errors, and the template's own raise_exception
            raise InputError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from None

    def labels(self, ids: Sequence[int], roles: tuple[str, ...], texts: Sequence[str]) -> list[int]:
        """Labels for `ids` by the sentinel rule (see `encode_chat`)."""
        masked = [SENTINEL if role == "assistant" else text for role, text in zip(roles, texts)]
        form = self.encode(self.render(roles, masked))
        for also_before in (False, True):
            labels = _align(ids, form, self.sentinel_id, also_before)
            if labels is not None:
                return labels
        _warn_once("align", "an answer could not be told apart from the chat template; its sample gives no loss")
        return [IGNORE] * len(ids)

    def is_media(self, token: int) -> bool:
        """Whether a token id is a media placeholder."""
        return token in (self.image_id, self.video_id)

    def _rest(self, marker: str, turns: tuple[tuple[str, str], ...]) -> Rest:
        """`Rest` of a dialogue of (question, answer) turns whose first question follows the text `marker`."""
        roles = ("user", "assistant") * len(turns)
        texts = [tidy(text, role) for role, text in zip(roles, (text for turn in turns for text in turn), strict=True)]
        texts[0] = (marker + _clean(turns[0][0], "user")).strip()
        ids = self.encode(self.render(roles, texts))
        labels = self.labels(ids, roles, texts)
        cut = max((i for i, token in enumerate(ids) if self.is_media(token)), default=-1) + 1
        return Rest(ids[:cut], ids[cut:], tuple(labels[cut:]))


def _special_tokens(tokenizer: Any) -> tuple[dict[str, int], re.Pattern[str] | None]:
    """The added tokens and a pattern that cuts a text at them; None when one of them also takes what is around it."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    if not added or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added.values()):
        return {}, None
    ids = {token.content: i for i, token in added.items()}
    longest_first = sorted(ids, key=len, reverse=True)
    return ids, re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None) or QWEN2_TEMPLATE
    if not isinstance(template, str):
        raise InputError("the tokenizer has several chat templates; keep one as its chat_template")
    return template


_codecs: WeakKeyDictionary[Any, dict[Any, ChatCodec]] = WeakKeyDictionary()


def codec(tokenizer: Any, spec: PreprocessSpec | None = None) -> ChatCodec:
    """The codec of a tokenizer for the family of `spec`, made once; again when its template or vocabulary changed."""
    family = (spec.family, spec.image_token, spec.video_token) if spec is not None and spec.family else None
    known = _codecs.setdefault(tokenizer, {})
    found = known.get(family)
    if found is None or found.template != _template(tokenizer) or found.vocabulary != len(tokenizer):
        if family is None:
            found = ChatCodec(tokenizer)
        else:
            from foveate.data.family_chat import FamilyCodec

            found = FamilyCodec(tokenizer, spec)  # type: ignore[arg-type]
        known[family] = found
    return found


def _align(ids: Sequence[int], form: Sequence[int], sentinel: int, also_before: bool) -> list[int] | None:
    """Labels of `ids`: what the form (the dialogue with sentinels for answers) does not explain, or None."""
    drop = set()
    for k, token in enumerate(form[:-1]):
        if token == sentinel:
            drop |= {k, k + 1} | ({k - 1} if also_before else set())
    expected = [token for k, token in enumerate(form) if k not in drop]
    labels, p = [IGNORE] * len(ids), 0
    for k, token in enumerate(ids):
        if p < len(expected) and token == expected[p]:
            p += 1
        else:
            labels[k] = token
    return labels if p == len(expected) else None


def tidy(text: str, role: str) -> str:
    """A message's text as it is rendered: no media placeholders, no sentinel outside answers, no outer white space."""
    return _clean(text, role).strip()


def _clean(text: str, role: str) -> str:
    """No media placeholders anywhere, and no sentinel outside answers, where it would spoil the label mask."""
    if role == "assistant":
        return clean_text(text)
    while SENTINEL in text or IMAGE_TOKEN in text or VIDEO_TOKEN in text:
        text = clean_text(text.replace(SENTINEL, ""))
    return text


def flatten(turns: Sequence[Turn], markers: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """(roles, texts) with the i-th piece of media written as markers[i]; parts are joined without a separator."""
    following, texts = iter(markers), []
    for turn in turns:
        pieces = []
        for is_text, parts in groupby(turn.parts, lambda part: isinstance(part, str)):
            if is_text:  # neighbours are joined first: together they could spell a placeholder
                pieces.append(_clean("".join(parts), turn.role))  # type: ignore[arg-type]
            else:
                pieces += [next(following) for _ in parts]
        texts.append("".join(pieces).strip())
    return tuple(turn.role for turn in turns), texts


def encode_chat(
    messages: Sequence[dict[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels), both [L] int64, with one placeholder token for each piece of media.

    Labels are -100 but for the answers and the token that ends each. Rule: the dialogue is rendered again with a
    sentinel for each answer; the sentinels and the one token after each are removed; the rest is matched greedily, and
    what was not matched is a target. Source: NVILA, `preprocess_conversation` (specification A.6).
    """
    chat = codec(tokenizer)
    turns = parse_messages(messages)
    markers = [IMAGE_TOKEN if part.kind == "image" else VIDEO_TOKEN for part in media_of(turns)]
    roles, texts = flatten(turns, markers)
    ids = chat.encode(chat.render(roles, texts, add_generation_prompt))
    labels = [IGNORE] * len(ids) if add_generation_prompt else chat.labels(ids, roles, texts)
    return np.array(ids, np.int64), np.array(labels, np.int64)


def media_of(turns: Sequence[Turn]) -> list[Media]:
    """All media of the turns, in order."""
    return [part for turn in turns for part in turn.parts if not isinstance(part, str)]


def stop_token_ids(tokenizer: Any, spec: PreprocessSpec | None = None) -> list[int]:
    """Ids that end an answer: the tokenizer's end of sequence, and what follows answers in its chat template."""
    eos = getattr(tokenizer, "eos_token_id", None)
    return list(dict.fromkeys(([eos] if eos is not None else []) + codec(tokenizer, spec).stops()))
