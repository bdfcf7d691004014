"""The drawn world: same scene for same numbers, answers that agree with pixels, disjoint splits, speed."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import numpy as np
import pytest

from foveate import world
from foveate.errors import InputError, UnknownNameError
from foveate.world.show import contact_sheet
from foveate.world.vocabulary import DIRECTIONS, INK_ON, RGB


def scenes(kind: str, n: int, **options: object) -> list[world.Scene]:
    return [world.draw(kind, i, split="validation", **options) for i in range(n)]  # type: ignore[arg-type]


def scored(scene: world.Scene, form: str) -> list[tuple[str, str]]:
    return [(q.text, q.answer) for q in scene.questions if q.form == form]


def named(text: str, words: tuple[str, ...]) -> list[str]:
    return [w for w in text.replace("?", " ").replace(",", " ").split() if w in words]


def labels_of(scene: world.Scene, frame: int = 0) -> dict[str, str]:
    """Label colour to text, read from boxes: characters that lie in a coloured box, by their index."""
    boxes = scene.objects[frame]
    found = {}
    for plate in (b for b in boxes if b.colour and not b.chars):
        chars = [
            b for b in boxes if b.chars and plate.x0 <= b.x0 and b.x1 <= plate.x1 + 1 and plate.y0 <= b.y0 <= plate.y1
        ]
        found[plate.colour] = "".join(b.chars or "" for b in sorted(chars, key=lambda b: b.index))
    return found


@pytest.mark.parametrize("kind", world.KINDS)
def test_same_numbers_same_scene(kind: str) -> None:
    a, b, c = world.draw(kind, 3, seed=5), world.draw(kind, 3, seed=5), world.draw(kind, 4, seed=5)
    assert a.questions == b.questions and a.signature == b.signature and a.objects == b.objects
    assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images))
    assert a.signature != c.signature
    for image in a.images:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.flags.writeable


def test_scene_does_not_depend_on_the_process() -> None:
    """A signature written down on another run: neither hash randomisation nor the platform may change scenes."""
    assert world.draw("count", 1).signature == "ae1fc628b7340c418f87b6a935dd5459"
    assert world.draw("bars", 1).signature == "6348bc722e99af0dfa2576b18e2a837a"


@pytest.mark.parametrize("kind", world.KINDS)
def test_splits_are_disjoint_and_decided_by_the_truth(kind: str) -> None:
    seen: dict[str, set[str]] = {}
    for split in world.SPLITS:
        drawn = [world.draw(kind, i, split=split, seed=s) for s in (0, 1) for i in range(20)]
        assert all(scene.split == split for scene in drawn)
        seen[split] = {scene.signature for scene in drawn}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_truth_without_jitter_decides_the_signature() -> None:
    from foveate.world.scene import signature

    scene = world.draw("scene", 0)
    assert signature("scene", scene.truth) == scene.signature
    assert signature("tags", scene.truth) != scene.signature


def test_scene_answers_agree_with_pixels_and_boxes() -> None:
    for scene in scenes("scene", 60):
        image, boxes = scene.images[0], [b for b in scene.objects[0] if b.shape]
        for b in boxes:
            middle = int((b.x0 + b.x1) // 2)
            y = int(b.y0) + 1 if b.shape == "ring" else int((b.y0 + b.y1) // 2)
            assert tuple(image[y, middle]) == RGB[b.colour]  # type: ignore[index]
        for text, answer in scored(scene, "colour"):
            (shape,) = named(text, world.SHAPES)
            assert [b.colour for b in boxes if b.shape == shape] == [answer]
        for text, answer in scored(scene, "shape"):
            (colour,) = named(text, world.COLOURS)
            assert [b.shape for b in boxes if b.colour == colour] == [answer]
        for text, answer in scored(scene, "relation"):
            a, b = [
                next(x for x in boxes if w in (x.shape, x.colour)) for w in named(text, world.SHAPES + world.COLOURS)
            ]
            dx, dy = (a.x0 + a.x1 - b.x0 - b.x1) / 2, (a.y0 + a.y1 - b.y0 - b.y1) / 2
            value = {"left": -dx, "right": dx, "above": -dy, "below": dy}
            assert max(value, key=value.__getitem__) == answer
        for text, answer in scored(scene, "presence"):
            words = named(text, world.SHAPES + world.COLOURS)
            there = any(all(w in (b.shape, b.colour) for w in words) for b in boxes)
            assert answer == ("yes" if there else "no")


def test_mark_is_tiny_and_carries_its_digit() -> None:
    found = 0
    for scene in scenes("scene", 30):
        for _, answer in scored(scene, "mark"):
            teal = (scene.images[0] == (0, 120, 120)).all(-1)
            ys, xs = np.nonzero(teal)
            area = (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
            assert 100 < area < 0.01 * 128 * 128
            on = [
                b for b in scene.objects[0] if b.chars and xs.min() <= b.x0 <= xs.max() and ys.min() <= b.y0 <= ys.max()
            ]
            assert [b.chars for b in on] == [answer]
            found += 1
    assert found > 10


def test_counts_are_what_is_drawn() -> None:
    answers = []
    for scene in scenes("count", 80):
        for text, answer in scored(scene, "count"):
            (colour,) = named(text, world.COLOURS)
            assert str(sum(b.colour == colour for b in scene.objects[0])) == answer
        answers += [int(q.answer) for q in scene.questions if not q.auxiliary]
    assert set(answers) == set(range(7))
    assert np.bincount(answers, minlength=7).min() > len(answers) / 7 * 0.5


def test_counted_shapes_do_not_overlap() -> None:
    for scene in scenes("count", 40):
        covered = np.zeros((128, 128), int)
        for b in scene.objects[0]:
            assert min(b.x0, b.y0) >= 0 and max(b.x1, b.y1) <= 128
            covered[int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)] += 1
        assert covered.max() <= 1


def test_labels_say_what_the_characters_say() -> None:
    lengths = set()
    for scene in scenes("tags", 60):
        labels = labels_of(scene)
        for q in scene.questions:
            (colour,) = named(q.text, world.COLOURS)
            if q.form == "label":
                assert labels[colour] == q.answer
                lengths.add((q.skill, len(q.answer), q.auxiliary))
            elif q.form == "character":
                place = next(i for i, w in enumerate(("first", "second", "third", "fourth")) if w in q.text)
                assert labels[colour][place] == q.answer
        for b in scene.objects[0]:
            if b.chars:  # the ink of a label is seen within the box of each character
                patch = scene.images[0][int(b.y0) : int(b.y1), int(b.x0) : int(b.x1)].astype(int)
                plate = next(p for p in scene.objects[0] if not p.chars and p.x0 <= b.x0 < p.x1 and p.y0 <= b.y0 < p.y1)
                ink = INK_ON[plate.colour]  # type: ignore[index]
                assert (abs(patch - ink).sum(-1) < 150).any()
    assert {x for x in lengths if not x[2]} == {
        *(("text_large", n, False) for n in (2, 3, 4)),
        *(("text_small", n, False) for n in (1, 2)),
    }


def test_small_text_needs_the_finer_scale() -> None:
    """Characters of small text: 8 px or lower (4 px at the base view of 64); of large text 11 px or more."""
    for scene in scenes("tags", 40):
        boxes = scene.objects[0]
        for q in scene.questions:
            if q.form != "label":
                continue
            (colour,) = named(q.text, world.COLOURS)
            plate = next(b for b in boxes if b.colour == colour)
            heights = {
                b.y1 - b.y0 for b in boxes if b.chars and plate.x0 <= b.x0 < plate.x1 and plate.y0 <= b.y0 < plate.y1
            }
            assert heights and (max(heights) <= 8 if q.skill == "text_small" else min(heights) >= 11)


def test_bars_can_be_read_off_the_grid() -> None:
    for scene in scenes("bars", 40):
        heights = {b.colour: b.y1 - b.y0 for b in scene.objects[0]}
        unit = scene.truth["scale"][0]
        for text, answer in scored(scene, "value"):
            (colour,) = named(text, world.COLOURS)
            assert heights[colour] == unit * int(answer)
        for text, answer in scored(scene, "extreme"):
            pick = max if "tallest" in text else min
            assert pick(heights, key=heights.__getitem__) == answer


def test_lines_agree_with_their_points() -> None:
    for scene in scenes("lines", 40):
        points = {}
        for b in scene.objects[0]:
            if b.colour:
                points.setdefault(b.colour, []).append((b.x0, -b.y0))
        assert len({p for row in points.values() for p in row}) == 6 * len(points)  # no point hides another
        for q in scene.questions:
            if q.form in ("trend", "peak"):
                (colour,) = named(q.text, world.COLOURS)
                heights = [y for _, y in sorted(points[colour])]
                rises = "rise" if heights[-1] > heights[0] else "fall"
                assert q.answer == (rises if q.form == "trend" else str(int(np.argmax(heights)) + 1))


def test_table_cells_are_where_the_question_says() -> None:
    for scene in scenes("table", 40):
        cells, heads = scene.truth["cells"], scene.truth["heads"]
        chars = [b for b in scene.objects[0] if b.chars]
        for text, answer in scored(scene, "cell"):
            row, column = text.removeprefix("What is in row ").removesuffix("?").split(", column ")
            r = heads.index(row) if heads else int(row) - 1
            assert cells[r][int(column) - 1] == answer
            columns = sorted({round(b.x0 + b.x1) for b in chars})
            assert answer in {b.chars for b in chars if round(b.x0 + b.x1) in columns}


def test_pairs_compare_what_is_in_both_pictures() -> None:
    for scene in scenes("pair", 40):
        assert len(scene.images) == 2
        have = [{b.colour for b in boxes} for boxes in scene.objects]
        for text, answer in scored(scene, "which"):
            (colour,) = named(text, world.COLOURS)
            first, second = colour in have[0], colour in have[1]
            assert answer == ("both" if first and second else "first" if first else "second" if second else "neither")
        for text, answer in scored(scene, "colour"):
            (shape,) = named(text, world.SHAPES)
            boxes = scene.objects["second" in text]
            assert [b.colour for b in boxes if b.shape == shape] == [answer]


def test_last_turn_of_a_dialogue_needs_the_turns_before() -> None:
    forms: dict[str, set[str]] = {}
    for scene in scenes("dialogue", 80):
        for q in scene.questions:
            if q.skill == "dialogue":
                assert len(q.turns) in (2, 3)
                forms.setdefault(q.text, set()).add(q.form)
                if q.form != "it":
                    texts = [t for t, _ in q.turns]
                    key = named(texts[-1], world.SHAPES + world.COLOURS)
                    alone = [
                        o
                        for o in scene.questions
                        if len(o.turns) == 1 and named(o.text, world.SHAPES + world.COLOURS) == key
                    ]
                    assert q.answer in {o.answer for o in alone}
    # The same words ask for a colour (or shape) after one history, and for a digit after another.
    ambiguous = [f for text, f in forms.items() if text.startswith("And the")]
    assert ambiguous and all(len(f) == 2 and "digit" in f for f in ambiguous)


def runs(on: list[bool]) -> list[int]:
    """Lengths of the runs of True."""
    return [len(r) for r in "".join("x" if o else " " for o in on).split()]


def seen_in(scene: world.Scene, colour: str) -> list[bool]:
    return [any(b.colour == colour for b in boxes) for boxes in scene.objects]


@pytest.mark.parametrize("kind", world.CLIP_KINDS)
def test_clips_have_8_to_32_frames_or_as_many_as_asked(kind: str) -> None:
    lengths = {len(scene.objects) for scene in scenes(kind, 40, size=16)}
    shortest = 2 if kind in world.LESSONS else 8
    assert lengths <= set(range(shortest, 33)) and len(lengths) > 12
    assert {len(scene.images) for scene in scenes(kind, 8, size=16, frames=9)} == {9}


def test_moving_things_move_steadily_one_way() -> None:
    ways = set()
    for scene in scenes("clip_motion", 30):
        for text, answer in scored(scene, "way"):
            (colour,) = named(text, world.COLOURS)
            path = [next(b for b in boxes if b.colour == colour) for boxes in scene.objects]
            steps = np.diff([(b.x0, b.y0) for b in path], axis=0)
            along, across = steps @ DIRECTIONS[answer], steps @ DIRECTIONS[answer][::-1]
            assert (along >= 0).all() and along.sum() >= 30 and np.ptp(along) <= 1.01 and not across.any()
            ways.add(answer)
    assert ways == set(DIRECTIONS)


def test_order_of_events_is_the_order_of_frames() -> None:
    for scene in scenes("clip_order", 40):
        first = {}
        for colour in world.COLOURS:
            on = seen_in(scene, colour)
            if any(on):
                assert len(runs(on)) == 1 and runs(on)[0] >= 2
                first[colour] = on.index(True)
        order = sorted(first, key=first.__getitem__)
        for q in scene.questions:
            if q.form == "first":
                assert q.answer == order[0]
            elif q.form == "last":
                assert q.answer == order[-1]
            elif q.form == "after":
                (before,) = named(q.text, world.COLOURS)
                assert q.answer == order[order.index(before) + 1]


def test_flashes_are_counted_and_apart() -> None:
    for scene in scenes("clip_flash", 40):
        for text, answer in scored(scene, "flashes"):
            (colour,) = named(text, world.COLOURS)
            on = seen_in(scene, colour)
            assert len(runs(on)) == int(answer)
            assert all(n >= 2 for n in runs(on))
            pauses = runs([not o for o in on])
            inner = pauses[(not on[0]) : len(pauses) - (not on[-1])] if int(answer) else []
            assert all(n >= 2 for n in inner)


def test_needle_is_in_one_frame() -> None:
    for scene in scenes("clip_needle", 30):
        ((_, answer),) = scored(scene, "digit")
        with_digit = [b.chars for boxes in scene.objects for b in boxes if b.chars]
        assert with_digit == [answer]
        at = next(i for i, boxes in enumerate(scene.objects) if any(b.chars for b in boxes))
        (box,) = [b for b in scene.objects[at] if b.chars]
        assert box.y1 - box.y0 >= 30  # legible at half the size


def test_lesson_signs_stand_alone_and_carry_their_digits() -> None:
    numbers = set()
    for scene in scenes("clip_signs", 40):
        assert all(q.auxiliary for q in scene.questions)
        read = {}
        for boxes in scene.objects:
            assert sum(b.chars is not None for b in boxes) <= 1
            if boxes:
                plate, digit = boxes
                read[plate.colour] = digit.chars
        numbers.add(len(read))
        assert {named(text, world.COLOURS)[0]: answer for text, answer in scored(scene, "on")} == read
        for form, place in (("first", 0), ("last", -1)):
            assert [answer for _, answer in scored(scene, form)] == [list(read.values())[place]] * (len(read) > 1)
        if len(read) == 1:
            assert (("Which digit appears in the clip?", *read.values())) in scored(scene, "needle")
    assert numbers == {1, 2, 3, 4}


def test_lesson_tables_ask_for_cells_places_rows_and_columns() -> None:
    shapes = set()
    for scene in scenes("grid", 40):
        cells, heads = scene.truth["cells"], scene.truth["heads"]
        names = heads or [str(r + 1) for r in range(len(cells))]
        shapes.add((len(cells), len(cells[0])))
        assert all(q.auxiliary for q in scene.questions)
        assert scored(scene, "row") == [(f"What is in row {n}?", " ".join(row)) for n, row in zip(names, cells)]
        assert scored(scene, "column") == [
            (f"What is in column {c + 1}?", " ".join(column)) for c, column in enumerate(zip(*cells))
        ]
        places = dict(scored(scene, "where"))
        for text, answer in scored(scene, "cell"):
            x, y = map(int, places[text.replace("What is in", "Where is")].split())
            at = [b for b in scene.objects[0] if b.chars == answer]
            assert any(
                8 * (b.x0 + b.x1) / 256 // 1 == x and 8 * (b.y0 + b.y1) / 256 // 1 in (y - 1, y, y + 1) for b in at
            )
    assert (2, 2) in shapes and len(shapes) > 4


def test_single_shape_questions_agree_with_the_shape() -> None:
    yes = total = 0
    for scene in scenes("single", 60):
        assert scene.images[0].shape == (64, 64, 3)
        for q in scene.questions:
            if q.answer in ("yes", "no"):
                there = scene.truth["shape"] in q.text or scene.truth["colour"] in q.text
                denied = " not " in q.text or " no " in q.text
                assert (q.answer == "yes") == (there != denied), q
                yes, total = yes + (q.answer == "yes"), total + 1
    assert 0.4 < yes / total < 0.6


def test_size_scales_the_drawing_not_the_scene() -> None:
    for kind in ("tags", "scene", "bars"):
        full, half = world.draw(kind, 2), world.draw(kind, 2, size=64)
        assert half.images[0].shape == (64, 64, 3)
        assert full.questions == half.questions and full.signature == half.signature
        for a, b in zip(full.objects[0], half.objects[0]):
            assert abs(a.x0 - 2 * b.x0) <= 4 and abs(a.y1 - 2 * b.y1) <= 4


def test_alphabet_of_labels() -> None:
    chars = {b.chars for scene in scenes("tags", 20, alphabet="ABC7") for b in scene.objects[0] if b.chars}
    assert chars == set("ABC7")
    tables = {q.answer for scene in scenes("table", 20, alphabet="XY") for q in scene.questions if q.form == "cell"}
    assert tables == {"X", "Y"}


def test_scene_travels_between_processes() -> None:
    scene = world.draw("clip_needle", 1)
    again = pickle.loads(pickle.dumps(scene))
    assert again.questions == scene.questions and again.objects == scene.objects
    assert all(np.array_equal(a, b) for a, b in zip(again.images, scene.images))


def test_sample_has_all_questions_as_branches() -> None:
    scene = world.draw("dialogue", 0)
    sample = scene.sample()
    assert sample.branches == [list(q.turns) for q in scene.questions]
    assert [m.kind for m in sample.media] == ["image"]
    assert sample.objects is not None and len(sample.objects[0]) == len(scene.objects[0])
    assert sample.meta["skills"] == [q.skill for q in scene.questions]
    assert [m.kind for m in world.draw("clip_order", 0, size=16).sample().media] == ["video"]
    assert [m.kind for m in world.draw("pair", 0).sample().media] == ["image", "image"]


@pytest.mark.parametrize(
    "kind", ["scene", "count", "tags", "bars", "lines", "table", "pair", "dialogue", "clip_motion"]
)
def test_draws_a_thousand_pictures_a_second(kind: str) -> None:
    """Layout, questions, drawing and conversion to numpy at 128 px, on one core (processor time, best of three)."""
    rates = []
    for attempt in range(3):
        start = time.process_time()
        images = sum(len(world.draw(kind, 1000 * attempt + i).images) for i in range(60))
        rates.append(images / (time.process_time() - start))
    assert max(rates) > 1000, rates


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'scene'"):
        world.draw("scenes", 0)
    with pytest.raises(InputError, match="unknown split 'dev'"):
        world.draw("scene", 0, split="dev")
    with pytest.raises(InputError, match=r"frames=40.*8 to 32"):
        world.draw("clip_order", 0, frames=40)
    with pytest.raises(InputError, match="size=4"):
        world.draw("scene", 0, size=4)
    with pytest.raises(InputError, match="alphabet='aa'"):
        world.draw("tags", 0, alphabet="aa")


def test_contact_sheet_shows_rows_of_skills_and_kinds() -> None:
    one = contact_sheet(["colour"], 1, size=64)
    sheet = contact_sheet(["colour", "needle"], 2, kinds=["boxes"], size=64, seen_at=64)
    assert sheet.mode == "RGB" and sheet.height > 2 * one.height and sheet.width > one.width
    with pytest.raises(InputError, match="nothing to show"):
        contact_sheet([], 2)


def test_the_world_needs_no_torch() -> None:
    code = "import sys; from foveate import world; world.draw('scene', 0).images; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
