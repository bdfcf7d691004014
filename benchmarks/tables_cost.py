"""Tables of costs: time and memory of reductions, plans held against them, and what compressing takes and gives."""

from __future__ import annotations

from collections.abc import Callable

from tables_text import Row, conditions, missing, table

SELECTION, BEYOND = 0.03, 0.10
"""What selecting may cost of the dense prefill, and how far the time to the first token may lie from its FLOPs."""
PREDICTED_TIME, PREDICTED_MEMORY = 0.25, 0.10
"""How far a plan may be off."""


def speed(name: str, report: Row | None) -> str:
    """What each recipe of a reduction (of all, for "") costs and saves at every size; missed targets are marked."""
    if report is None:
        return missing("speed")
    parts, found = [], False
    for run in report["runs"]:
        for size in run["sizes"]:
            rows = [
                _speed_row(row, run, size["dense"])
                for row in size["rows"]
                if _is_of(row["recipe"], name) and "failed" not in row
            ]
            if not rows:
                continue
            found = True
            head = [
                "recipe",
                "selection / dense prefill",
                "of it in the tower",
                "selection / dense TTFT",
                "TTFT / dense [95 %]",
                "FLOPs predict",
                "over it",
                "pays from",
            ]
            parts.append(_speed_title(run, size) + "\n\n" + table(head, rows))
    if not found:
        return f"*Not taken yet: `benchmarks/results/speed.json` holds no recipe of `{name}`.*"
    if not name:
        parts += [_speed_memory(run) for run in report["runs"] if run.get("memory")]
    marks = (
        f"{_speed_met(report, name)} ✗: selection above {SELECTION:.0%} of the dense prefill, or TTFT over "
        f"{BEYOND:.0%} from what FLOPs predict."
    )
    return "\n\n".join([*parts, marks, conditions(report)])


def _speed_met(report: Row, name: str) -> str:
    """How many rows meet both targets, and what was left out for want of time."""
    sizes = [size for run in report["runs"] for size in run["sizes"]]
    rows = [row for size in sizes for row in size["rows"] if "failed" not in row and _is_of(row["recipe"], name)]
    cheap = sum(row["selection_share"]["value"] <= SELECTION for row in rows)
    known = [row for row in rows if counted(row)]
    near = sum(abs(row["ttft_over_predicted"] - 1) <= BEYOND for row in known)
    skipped = "".join(f" Left out for want of time: {_skipped(one)}." for one in report.get("skipped", []))
    return (
        f"Selection costs at most {SELECTION:.0%} of the dense prefill in {cheap} of {len(rows)} rows; TTFT lies "
        f"within {BEYOND:.0%} of what FLOPs predict in {near} of {len(known)}.{skipped}"
    )


def _skipped(one: Row) -> str:
    return f"`{one['preset']}`, " + (f"{one['frames']} frames" if one["frames"] else "x".join(map(str, one["size"])))


def counted(row: Row) -> bool:
    """Whether the counts know what a recipe saves; they do not know masks inside layers."""
    return any(tokens < row["visual"] for tokens in row["per_layer"])


def _is_of(recipe: str, name: str) -> bool:
    return not name or recipe.partition("(")[0] == name


def _speed_title(run: Row, size: Row) -> str:
    """What was asked of which model, and how noisy it was."""
    media = (
        f"a clip of {size['frames']} frames" if size["frames"] else f"a picture of {size['size'][0]}x{size['size'][1]}"
    )
    dense, again = size["dense"], size["again"]
    noise = ", on a machine that was never quiet" if size["noisy"] else f", {size['discarded']} dropped"
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    tokens = f"{size['visual']} visual and {size['text']} text tokens"
    return (
        f"**`{run['preset']}`, {run['dtype']}, {threads}, {media}: {tokens}.** "
        f"Dense: tower {dense['tower_ms'] / 1e3:.2f} s, prefill {dense['prefill_ms'] / 1e3:.2f} s; {size['rounds']} "
        f"rounds{noise}; dense against itself {again['value']:.3f} [{again['low']:.3f}, {again['high']:.3f}]."
    )


def _speed_row(row: Row, run: Row, dense: Row) -> list[str]:
    selection, ttft, over = row["selection_share"], row["ttft_ratio"], row["ttft_over_predicted"]
    crossing = run["break_even"][row["recipe"]]
    least, most = crossing["points"][0], crossing["points"][-1]
    pays = f"{crossing['tokens']:.0f}" if crossing["tokens"] else f"≤ {least['tokens']}"
    if crossing["tokens"] is None and most["ratio"] >= 1:
        pays = f"> {most['tokens']}"
    known = counted(row)
    return [
        f"`{row['recipe']}`",
        f"{selection['value']:.1%}" + (" ✗" if selection["value"] > SELECTION else ""),
        f"{row['signals_ms'] / row['select_ms']:.0%}" if row["signals_ms"] >= 0.1 else "",
        f"{row['select_ms'] / sum(dense.values()):.1%}",
        f"{ttft['value']:.3f} [{ttft['low']:.3f}, {ttft['high']:.3f}]",
        f"{row['ttft_predicted']:.3f}" if known else "",
        (f"{over - 1:+.1%}".replace("-", "−") + (" ✗" if abs(over - 1) > BEYOND else "")) if known else "",
        pays,
    ]


def _speed_memory(run: Row) -> str:
    rows = [
        [f"`{row['recipe']}`" if row["recipe"] else "dense", f"{row['peak'] / 1e6:.0f}", f"{row['weights'] / 1e6:.0f}"]
        for row in run["memory"]
    ]
    size = run["memory"][0]["size"]
    head = [f"`{run['preset']}`, {run['dtype']}, {size[0]}x{size[1]}", "peak MB", "of which weights"]
    return table(head, rows)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plan_check(report: Row | None) -> str:
    """Predicted over measured, time by stage and peak memory, and how many are as near as a plan may be."""
    if report is None:
        return missing("plan_check")
    rows, hits = [], {"times": [], "peaks": []}

    def cell(predicted: float, measured: float, within: float, kind: str, show: Callable[[float], str]) -> str:
        hits[kind].append(abs(predicted / measured - 1) <= within)
        return f"{show(predicted)} / {show(measured)} ({predicted / measured - 1:+.0%}){'' if hits[kind][-1] else ' ✗'}"

    for row in report["rows"]:
        pairs = [row["stages"][stage] for stage in ("tower", "prefill", "decode", "ttft")]
        cells = [cell(pair["predicted"], pair["measured"], PREDICTED_TIME, "times", _ms) for pair in pairs]
        held = report.get("peaks", {}).get(f"{row['preset']} {row['dtype']} {row['recipe']}".strip())
        whole, process = "", row["bytes"].get("process")
        if held and process:
            total = held["baseline"] + held["peak"]
            whole = cell(process, total, PREDICTED_MEMORY, "peaks", lambda value: f"{value / 1e6:.0f}")
        above = f"{row['bytes']['peak'] / 1e6:.0f} / {held['peak'] / 1e6:.0f}" if held else ""
        noisy = ", never quiet" if row["noisy"] else ""
        if row.get("repeats", 1) > 2:
            noisy += f", {row['repeats']} repeats that spread by {row['spread']['ttft']:.0%}"
        form = f"clip of {row['frames']} frame" if row.get("frames") else "picture"
        what = f"`{row['preset']}` {row['dtype']}, {form} {row['size'][0]}x{row['size'][1]}{noisy}"
        rows.append([what, f"`{row['recipe']}`" if row["recipe"] else "dense", *cells, whole, above])
    head = ["model", "recipe", "tower ms", "prefill ms", "a token ms", "TTFT ms", "process MB", "of that request MB"]
    near = ", ".join(f"{sum(hits[kind])} of {len(hits[kind])} {kind}" for kind in hits if hits[kind])
    drift = [abs(rate - 1) for rate in report.get("drift", {}).values()]
    moved = f" Calibrated again at the end, rates differed by up to {max(drift):.0%}." if drift else ""
    note = (
        f"Predicted / measured (error); ✗: time off by more than {PREDICTED_TIME:.0%} or memory of the process by more "
        f"than {PREDICTED_MEMORY:.0%}. Near enough: {near}. Machine: {report['machine']['source']}.{moved}"
    )
    return f"{table(head, rows)}\n\n{note}\n\n{conditions(report)}"


def compress_cost(report: Row | None) -> str:
    """Minutes, peak and bytes of each recipe on a model of published shape, and its stages over those of the dense."""
    if report is None:
        return missing("compress_cost")
    rows = []
    for recipe, row in report["recipes"].items():
        before, after = row["saved_bytes"]
        ratios = ["", "", ""]
        if stages := row.get("stages"):
            ratios = [_over(stages[name]) for name in ("tower", "prefill", "decode")]
        rows.append(
            [
                f"`{recipe}`",
                f"{sum(row['seconds'].values()) / 60:.1f}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                f"{before / 1e6:.0f} → {after / 1e6:.0f}",
                *ratios,
            ]
        )
    head = ["recipe", "minutes", "peak GiB", "MB on disk", "tower", "prefill", "a token"]
    timed = [row for row in report["recipes"].values() if "run" in row]
    pairs = "".join(
        f" {row['run']['pairs']} pairs{', on a machine that was never quiet' if row['run']['noisy'] else ''}, "
        f"{row['tokens']['visual']} visual and {row['tokens']['text']} text tokens."
        for row in timed[:1]
    )
    about = (
        f"`{report['preset']}` with random weights, {report['dtype']} on {report['where']}: loaded, compressed and "
        f"saved by one process, whose whole memory is counted. Ratios are time over that of the dense model [95 %], "
        f"in turns; ≈: not told apart from the dense model against itself.{pairs}"
    )
    return f"{about}\n\n{table(head, rows)}\n\n{conditions(report)}"


def _over(stage: Row) -> str:
    """The ratio of one stage, small over dense."""
    mark = "" if stage["real"] else " ≈"
    return f"{stage['ratio']:.2f} [{stage['low']:.2f}, {stage['high']:.2f}]{mark}"
