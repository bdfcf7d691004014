"""The processor: chats and media to model inputs, through the one path of `foveate.data` (plan, execute, collate)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerBase

from foveate.data.chat import IMAGE_TOKEN, VIDEO_TOKEN, codec, flatten, media_of, parse_messages
from foveate.data.execute import collate, execute
from foveate.data.plan import plan
from foveate.data.spec import PreprocessSpec
from foveate.errors import InputError
from foveate.files import write_json
from foveate.nvila.checkpoint import load_config, load_tokenizer
from foveate.nvila.layouts import detect

Message = dict[str, Any]


class NvilaProcessor:
    """Tokenizer and `PreprocessSpec` together, with the calls of a transformers processor.

    `apply_chat_template(messages, tokenize=True, return_dict=True)` is the main door; batches are padded on the left.
    """

    model_input_names = (
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grids",
        "pixel_values_videos",
        "video_frames",
    )
    image_token, video_token = IMAGE_TOKEN, VIDEO_TOKEN

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: PreprocessSpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> NvilaProcessor:
        """From a checkpoint folder in any layout; loading options of transformers are accepted and not needed."""
        folder = Path(path)
        _, spec = load_config(folder)
        return cls(load_tokenizer(folder, detect(folder)), spec)

    def save_pretrained(self, path: str | Path, **kwargs: Any) -> None:
        """Tokenizer files and `preprocess.json`, into a folder that may already hold the model."""
        self.tokenizer.save_pretrained(path)
        write_json(Path(path) / "preprocess.json", self.spec.to_dict() | {"hash": self.spec.hash()})

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Text of the prompt(s), or with `tokenize` model inputs as torch tensors.

        conversation: OpenAI-style messages (content: text, or parts of type text, image, image_url, video), or a list
        of such conversations. Returns str or list[str]; with tokenize `input_ids` [B, L], with return_dict too a
        BatchFeature of everything that the model's `forward` takes. Raises InputError.
        """
        if chat_template is not None and chat_template != self.tokenizer.chat_template:
            raise InputError("a processor uses its tokenizer's chat template; set tokenizer.chat_template instead")
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        chats = [_with_payloads(chat) for chat in (conversation if batched else [conversation])]
        if not tokenize:
            texts = [self._render(chat, add_generation_prompt) for chat in chats]
            return texts if batched else texts[0]
        made = [
            execute(
                plan(
                    chat, self.spec, self.tokenizer, num_frames=num_frames, add_generation_prompt=add_generation_prompt
                )
            )
            for chat in chats
        ]
        inputs = BatchFeature(collate(made, self._pad_id()).model_kwargs())
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str] = "",
        images: Any = None,
        videos: Any = None,
        *,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of one question about pictures and clips, or of several questions of one batch.

        text: the user's words, not a rendered prompt; media go before it, or where `<image>` and `<vila/video>` stand
        in it. images, videos: one item or a list; for several texts a list of lists. Raises InputError when
        placeholders and media differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text)
        many = not isinstance(text, str)
        chats = [
            [{"role": "user", "content": _parts(t, pictures, clips)}]
            for t, pictures, clips in zip(
                texts, _per_text(images, len(texts), many), _per_text(videos, len(texts), many), strict=True
            )
        ]
        return self.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, num_frames=num_frames
        )

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Texts of generated ids."""
        return self.tokenizer.batch_decode(outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def _render(self, chat: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = parse_messages(chat)
        markers = [IMAGE_TOKEN if media.kind == "image" else VIDEO_TOKEN for media in media_of(turns)]
        return codec(self.tokenizer).render(*flatten(turns, markers), add_generation_prompt)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id


def _with_payloads(chat: Sequence[Message]) -> list[Message]:
    """Parts written as {"type": "image", "url" or "path": ..} (transformers' own form) in the form that data reads."""
    out = []
    for message in chat:
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = [_payload(part) for part in content]
        out.append({**message, "content": content})
    return out


def _payload(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") in ("image", "video") and part["type"] not in part:
        for key in ("path", "url"):
            if key in part:
                return {"type": part["type"], part["type"]: part[key]}
    return part


def _parts(text: str, images: list[Any], videos: list[Any]) -> list[dict[str, Any]]:
    media = {IMAGE_TOKEN: ("image", list(images)), VIDEO_TOKEN: ("video", list(videos))}
    for token, (kind, items) in media.items():
        count = text.count(token)
        if count and count != len(items):
            raise InputError(f"the text holds {count} {token} placeholders, {len(items)} {kind}s were given")
    if "<|im_start|>" in text:
        raise InputError("the text is a rendered prompt; give messages to apply_chat_template(..., tokenize=True)")
    head = [{"type": kind, kind: item} for token, (kind, items) in media.items() if token not in text for item in items]
    pieces: list[dict[str, Any]] = []
    for piece in re.split(f"({re.escape(IMAGE_TOKEN)}|{re.escape(VIDEO_TOKEN)})", text):
        if piece in media:
            kind, items = media[piece]
            pieces.append({"type": kind, kind: items.pop(0)})
        elif piece:
            pieces.append({"type": "text", "text": piece})
    return head + pieces


def _per_text(media: Any, count: int, many: bool) -> list[list[Any]]:
    if media is None:
        return [[] for _ in range(count)]
    if not many:
        return [list(media) if isinstance(media, list | tuple) else [media]]
    if len(media) != count:
        raise InputError(f"{count} texts came with media for {len(media)}; give one list of media per text")
    return [list(item) if isinstance(item, list | tuple) else [item] for item in media]
