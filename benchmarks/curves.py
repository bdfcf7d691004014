"""Small plots of methods, lines over a setting and bars, in the SVG that the reports use."""

from __future__ import annotations

import math
from itertools import pairwise

from foveate.optimize.svg import INK, LINE, MUTED, Svg

TINTS = ("#1b6ca8", "#c8553d", "#588157", "#7b5ea7", "#b08900", "#2a9d8f", "#8d6a9f", "#444444")


def curves(
    series: dict[str, list[tuple[str, float]]],
    dense: float,
    *,
    axis: str,
    below: str,
    logarithmic: bool = False,
    width: int = 560,
    height: int = 340,
) -> str:
    """An SVG with one line a method. series: method -> (setting, value) in order; dense: a dashed line.

    axis: name of the values; below: of the settings. logarithmic: the scale of the values.
    """
    settings = list(dict.fromkeys(setting for points in series.values() for setting, _ in points))
    scale = math.log if logarithmic else float
    values = [scale(value) for points in series.values() for _, value in points if math.isfinite(value)]
    values.append(scale(dense))
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    left, right, top, bottom = 62.0, width - 120.0, 18.0, height - 44.0

    def x(setting: str) -> float:
        return left + (right - left) * (settings.index(setting) + 0.5) / len(settings)

    def y(value: float) -> float:
        share = (min(scale(value), high) - low) / (high - low)
        return bottom - (bottom - top) * share

    svg = Svg(width, height, f"{axis} over {below}")
    for step in range(5):
        at = low + (high - low) * step / 4
        shown = math.exp(at) if logarithmic else at
        height_at = bottom - (bottom - top) * step / 4
        svg.line(left, height_at, right, height_at, LINE)
        svg.label_at(left - 6, height_at + 4, f"{shown:.3g}", 11, text_anchor="end")
    for setting in settings:
        svg.label_at(x(setting), bottom + 17, setting, 11, text_anchor="middle")
    svg.label_at((left + right) / 2, bottom + 36, f"{axis} over {below}", 12, INK, text_anchor="middle")
    svg.line(left, y(dense), right, y(dense), MUTED, stroke_dasharray="5 4")
    svg.label_at(right + 8, y(dense) + 4, "dense", 11)
    for index, (name, points) in enumerate(series.items()):
        tint = TINTS[index % len(TINTS)]
        shown = [(setting, value) for setting, value in points if math.isfinite(value)]
        for (a, first), (b, second) in pairwise(shown):
            svg.line(x(a), y(first), x(b), y(second), tint, stroke_width=1.8)
        for setting, value in shown:
            svg.add("circle", title=f"{name} {setting}: {value:.4g}", cx=x(setting), cy=y(value), r=3.5, fill=tint)
        svg.line(right + 12, top + 20 + 17 * index, right + 28, top + 20 + 17 * index, tint, stroke_width=3)
        svg.label_at(right + 34, top + 24 + 17 * index, name, 11)
    # a file of its own, unlike the plots inside a report, has to say what it is
    return svg.text().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def heat(rows: dict[str, list[float | None]], columns: list[str], *, title: str, reach: float = 30.0) -> str:
    """An SVG table whose cells are tinted by their value in points: red below zero, blue above, white at zero.

    rows: name -> one value for each of `columns`, None where there is none. reach: the value of the deepest tint.
    """
    left, top, wide, tall = 150.0, 44.0, 92.0, 22.0
    svg = Svg(left + wide * len(columns) + 14, top + tall * len(rows) + 10, title)
    svg.label_at(8, 18, title, 12, INK)
    for c, column in enumerate(columns):
        svg.label_at(left + wide * (c + 0.5), 37, column, 11, text_anchor="middle")
    for r, (name, values) in enumerate(rows.items()):
        y = top + tall * r
        svg.label_at(left - 8, y + 15, name, 12, INK, text_anchor="end")
        for c, value in enumerate(values):
            if value is None:
                continue
            depth = min(1.0, abs(value) / reach)
            box = {"x": left + wide * c + 1, "y": y + 1, "width": wide - 2, "height": tall - 2}
            svg.add("rect", fill="#1b6ca8" if value > 0 else "#c8553d", fill_opacity=0.08 + 0.8 * depth, **box)
            ink = "#fff" if depth > 0.6 else INK
            svg.label_at(left + wide * (c + 0.5), y + 15, f"{value:+.1f}", 11, ink, text_anchor="middle")
    return svg.text().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def bars(rows: list[tuple[str, float, float, float | None]], axis: str, *, mark: str, width: int = 640) -> str:
    """An SVG with one bar a row: (name, value, first part of it, what was expected), values as shares of 1.

    The first part has a colour of its own, the expectation is a stroke (None: there is none); `mark` says what it is.
    """
    left, right, top, step = 190.0, width - 60.0, 26.0, 17.0
    height = int(top + step * len(rows) + 40)
    scale = max(1.0, *(value for _, value, _, _ in rows))
    svg = Svg(width, height, axis)

    def x(value: float) -> float:
        return left + (right - left) * value / scale

    for tick in range(5):
        svg.line(x(tick / 4), top - 4, x(tick / 4), height - 34, LINE)
        svg.label_at(x(tick / 4), height - 20, f"{tick / 4:g}", 11, text_anchor="middle")
    for index, (name, value, first, expected) in enumerate(rows):
        at = top + step * index
        svg.label_at(left - 8, at + 10, name, 11, text_anchor="end")
        title = f"{name}: {value:.3f}" + ("" if expected is None else f", {mark} {expected:.3f}")
        svg.add("rect", title=title, x=x(0), y=at, width=x(value) - x(0), height=step - 5, fill=TINTS[0])
        svg.add("rect", title=title, x=x(0), y=at, width=x(first) - x(0), height=step - 5, fill=TINTS[1])
        if expected is not None:
            svg.line(x(expected), at - 2, x(expected), at + step - 3, INK, stroke_width=2)
    svg.label_at((left + right) / 2, height - 5, axis, 12, INK, text_anchor="middle")
    return svg.text().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
