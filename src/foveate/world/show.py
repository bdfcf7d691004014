"""One sheet of pictures with their questions and answers, to see what a model is asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from foveate.errors import InputError
from foveate.world.evaluation import evaluation_questions
from foveate.world.kinds import CLIP_KINDS, draw
from foveate.world.scene import Question, Scene
from foveate.world.vocabulary import SKILLS

_PAPER, _INK, _SOFT, _ANSWER = (250, 250, 247), (30, 30, 30), (120, 120, 120), (10, 110, 60)
_GAP, _LINE, _FONT = 12, 15, 12
CLIP_FRAMES = 10
"""Frames of a clip that a sheet shows, evenly spread."""


def contact_sheet(
    skills: Sequence[str] = SKILLS,
    per_skill: int = 3,
    *,
    kinds: Sequence[str] = (),
    split: str = "validation",
    seed: int = 0,
    size: int = 128,
    seen_at: int | None = None,
) -> Image.Image:
    """A picture with a row for each skill (scored questions), then for each kind (all its questions, as in training).

    size: side of each picture on the sheet. seen_at: draw them as a model sees them at that side, for example 64, and
    enlarge to `size`. Raises UnknownNameError for skills and kinds, InputError for split, or when there is no row.
    """
    rows: list[tuple[str, list[tuple[Scene, list[Question]]]]] = []
    for skill in skills:
        found = evaluation_questions(skill, per_skill, split=split, seed=seed)
        rows.append((skill, [(scene, [question]) for scene, question in found]))
    for kind in kinds:
        scenes = [draw(kind, i, split=split, seed=seed) for i in range(per_skill)]
        rows.append((kind, [(scene, scene.questions) for scene in scenes]))
    if not rows or per_skill < 1:
        raise InputError(
            f"nothing to show: {len(rows)} rows of {per_skill} pictures; name a skill or kind, give 1 or more"
        )
    strips = [_row(name, cells, size, seen_at) for name, cells in rows]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), _PAPER)
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def _row(name: str, cells: list[tuple[Scene, list[Question]]], size: int, seen_at: int | None) -> Image.Image:
    tiles = [_cell(scene, questions, size, seen_at) for scene, questions in cells]
    head = _LINE + 8
    strip = Image.new(
        "RGB", (_GAP + sum(t.width + _GAP for t in tiles), head + max(t.height for t in tiles) + _GAP), _PAPER
    )
    ImageDraw.Draw(strip).text((_GAP, 5), name, fill=_INK, font=ImageFont.load_default(14))
    x = _GAP
    for tile in tiles:
        strip.paste(tile, (x, head))
        x += tile.width + _GAP
    return strip


def _cell(scene: Scene, questions: list[Question], size: int, seen_at: int | None) -> Image.Image:
    """The pictures of a scene side by side (a clip: some frames, with their numbers), its questions below."""
    images = scene.images
    chosen = list(range(len(images)))
    if scene.kind in CLIP_KINDS and len(images) > CLIP_FRAMES:
        chosen = np.linspace(0, len(images) - 1, CLIP_FRAMES).round().astype(int).tolist()
        if scene.kind == "clip_needle":  # the one frame that matters is always shown
            at = scene.truth["needle"][2]
            chosen = sorted({at, *(i for i in chosen if i != min(chosen, key=lambda j: abs(j - at)))})
    side = size if scene.kind not in CLIP_KINDS else max(48, size * 3 // 8)
    small = [_fit(Image.fromarray(images[i]), side, seen_at) for i in chosen]
    font = ImageFont.load_default(_FONT)
    lines = [_lines(q, font) for q in questions]
    text_width = max((font.getlength(line) for q in lines for line, _ in q), default=0)
    width = max(sum(i.width for i in small) + 3 * (len(small) - 1), int(text_width) + 2)
    caption = _LINE if scene.kind in CLIP_KINDS else 0
    height = small[0].height + caption + 4 + _LINE * sum(map(len, lines))
    tile = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(tile)
    x = 0
    for i, image in zip(chosen, small):
        tile.paste(image, (x, 0))
        if caption:
            pen.text((x, image.height + 1), f"{i + 1}/{len(images)}", fill=_SOFT, font=font)
        x += image.width + 3
    y = small[0].height + caption + 4
    for question in lines:
        for line, colour in question:
            pen.text((0, y), line, fill=colour, font=font)
            y += _LINE
    return tile


def _lines(question: Question, font: ImageFont.FreeTypeFont) -> list[tuple[str, tuple[int, int, int]]]:
    """A dialogue as lines with their colours, the scored answer last."""
    soft = _SOFT if question.auxiliary else _INK
    out = []
    for q, a in question.turns[:-1]:
        out.append((f"{q} {a}", _SOFT))
    out.append((question.text, soft))
    out.append((f"   {question.answer}", _ANSWER))
    if font.getlength(question.text) + font.getlength(question.answer) < 300:
        out[-2:] = [(f"{question.text} {question.answer}", soft if question.auxiliary else _ANSWER)]
    return out


def _fit(image: Image.Image, side: int, seen_at: int | None) -> Image.Image:
    """`image` scaled to a height of `side`, after the loss of detail of being seen at `seen_at`."""
    if seen_at is not None:
        image = image.resize((max(1, round(image.width * seen_at / image.height)), seen_at), Image.Resampling.BICUBIC)
    width = max(1, round(image.width * side / image.height))
    return image.resize((width, side), Image.Resampling.NEAREST)
