"""Three boxes of things or towers: statements and the lesson about them agree with what is drawn."""

from __future__ import annotations

from foveate import world
from foveate.world.boxes import BOX, PITCH


def scenes(kind: str, n: int) -> list[world.Scene]:
    return [world.draw(kind, i, split="validation") for i in range(n)]


def test_statements_are_balanced_and_true_of_the_picture() -> None:
    answers: list[str] = []
    checked = 0
    for scene in scenes("boxes", 150):
        objects: list[list[tuple[str, str]]] = [[], [], []]
        for box, items in zip(objects, scene.truth["boxes"]):
            box += [(shape, colour) for shape, colour, *_ in items]
        assert scene.images[0].shape == (100, 400, 3)
        assert len(scene.objects[0]) == sum(map(len, objects))
        assert all(b.x0 % PITCH < BOX for b in scene.objects[0])
        for q in scene.questions:
            assert q.auxiliary and q.answer in ("true", "false") and q.text.endswith(" True or false?")
            answers.append(q.answer)
            words = q.text.removesuffix(" True or false?").rstrip(".").lower().split()
            # Re-evaluate the simplest form without the grammar: "there are exactly 3 blue items".
            numbers = {w: i for i, w in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven"))}
            if len(words) == 6 and words[:3] in (["there", "are", "exactly"], ["there", "is", "exactly"]):
                n = int(words[3]) if words[3].isdigit() else numbers.get(words[3], -1)
                colour, noun = words[4], words[5].rstrip("s")
                if colour in ("black", "blue", "yellow") and noun != "tower" and n >= 0:
                    generic = noun in ("item", "object", "shape", "block")
                    k = sum(c == colour and (generic or s == noun) for box in objects for s, c in box)
                    assert q.answer == ("true" if k == n else "false"), (q.text, scene.truth)
                    checked += 1
    assert checked >= 6
    assert 0.45 < answers.count("true") / len(answers) < 0.55


def test_inventory_agrees_with_what_is_drawn() -> None:
    forms = set()
    for scene in scenes("inventory", 80):
        boxes = [[b for b in scene.objects[0] if b.x0 // PITCH == i] for i in range(3)]
        boxes = [[(b.shape, b.colour or "black") for b in sorted(box, key=lambda b: -b.y0)] for box in boxes]
        everything = [b for box in boxes for b in box]
        for q in scene.questions:
            assert q.auxiliary
            forms.add(q.form)
            words = q.text.rstrip("?").split()
            named_colours = [w for w in words if w in ("black", "blue", "yellow")]
            shape = next((w.rstrip("s") for w in words if w.rstrip("s") in ("circle", "square", "triangle")), "")
            place = next((i for i, w in enumerate(("left", "middle", "right")) if f"{w} tower" in q.text), None)

            def fits(thing: tuple[str, str], shape: str = shape, colours: list[str] = named_colours) -> bool:
                return (not shape or thing[0] == shape) and (not colours or thing[1] == colours[0])

            if place is not None:
                column = [colour for _, colour in boxes[place]]
                want = {"blocks": " ".join(column), "height": str(len(column)), "base": column[0], "top": column[-1]}
                assert q.answer == want[q.form]
            elif q.form in ("colour_blocks", "colour_all", "shape_all", "kind_all", "all_blocks"):
                assert q.answer == str(sum(map(fits, everything))), q
            elif q.form == "holding":
                assert q.answer == str(sum(any(map(fits, box)) for box in boxes)), q
            elif q.form in ("bases", "tops"):
                at = 0 if q.form == "bases" else -1
                assert q.answer == str(sum(box[at][1] == named_colours[0] for box in boxes))
            elif q.form == "over":
                high, low = named_colours
                pairs = [list(zip([c for _, c in box], [c for _, c in box[1:]])) for box in boxes]
                assert q.answer == str(sum((low, high) in p for p in pairs))
    assert {"blocks", "over", "holding", "kind_all", "edge", "wall", "each", "tallest"} <= forms
