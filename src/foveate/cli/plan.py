"""`foveate plan MODEL`: what a request would cost. Needs a config only; no weight is loaded."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from foveate.cli.common import add_verb, human, parse_recipe, positive_int, print_json, print_table
from foveate.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from foveate.bench.shape import ModelShape
    from foveate.data.spec import PreprocessSpec
    from foveate.recipe import Recipe


def add_parser(subparsers: Any) -> None:
    parser = add_verb(subparsers, "plan", model=True)
    parser.add_argument("--image", action="append", default=[], type=size, metavar="WxH", help="a picture, repeatable")
    parser.add_argument("--frames", type=positive_int, metavar="N", help="a clip of N frames")
    parser.add_argument("--frame-size", type=size, metavar="WxH", help="of the clip's frames (default: 1280x720)")
    parser.add_argument("--prompt-tokens", type=positive_int, default=64, metavar="N", help="text tokens (default: 64)")
    parser.add_argument("--new-tokens", type=positive_int, default=64, metavar="N", help="answer tokens (default: 64)")
    parser.add_argument("--recipe", metavar="R", help='text or file, for example "uniform(keep=0.5) + rtn(bits=4)"')
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--device",
        metavar="D",
        default="auto",
        help="machine of the time estimate, 'here' for this one, or 'list' (default: this one if it was calibrated, "
        "else h200)",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure what this machine reaches first, and keep it (under a minute)"
    )
    parser.add_argument("--threads", type=positive_int, metavar="N", help="threads of torch while calibrating")


def size(text: str) -> tuple[int, int]:
    """(width, height) of "WxH", for argparse."""
    match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip().lower())
    if not match or not int(match[1]) or not int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write width x height in pixels, for example 1920x1080"
        )
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    from foveate.bench.cost import Effect, estimate
    from foveate.bench.counts import CLIP, request_of_sizes
    from foveate.bench.device import chosen, devices

    if args.threads and not args.calibrate:
        raise InputError("--threads says how to calibrate; give --calibrate with it")
    if args.frame_size and not args.frames:
        raise InputError("--frame-size is the size of a clip's frames; give --frames N with it, or --image WxH")
    if args.calibrate:
        calibrate(args.threads, quiet=args.json)
    machines = devices()
    if args.device == "list":
        rows = [[d.name, d.label, human(d.flops["bfloat16"], "FLOP/s"), d.source] for d in machines.values()]
        print_json([row[0] for row in rows]) if args.json else print_table(["device", "", "bf16", "from"], rows, left=4)
        return 0
    device = chosen("here" if args.calibrate and args.device == "auto" else args.device, machines)
    if device is None:
        raise UnknownNameError(f"unknown device {args.device!r}: known: here, {', '.join(machines)}")
    shape, spec, limit, saved = shape_of(args.model)
    asked = parse_recipe(args.recipe)
    recipe = saved + asked if asked else saved
    request = request_of_sizes(
        spec,
        shape,
        images=args.image,
        frames=args.frames,
        clip=args.frame_size or CLIP,
        text=args.prompt_tokens,
        new=args.new_tokens,
    )
    result = estimate(shape, request, device, dtype=args.dtype, effect=Effect.of(recipe))
    longest = result["tokens"]["prompt"] + request.new
    if longest > limit:
        raise InputError(
            f"the request needs {longest} tokens, {args.model} takes {limit}; use fewer or smaller pictures, "
            "fewer frames, or a recipe that keeps fewer tokens"
        )
    if args.json:
        print_json({**result, "model": args.model, "recipe": recipe.text() or None, "device": device.name})
    else:
        show(result, args, device.label)
    return 0


def calibrate(threads: int | None, quiet: bool) -> None:
    """Measure this machine, keep what was found, and say it on stderr."""
    import sys

    import torch

    from foveate.bench import calibrate as measured
    from foveate.bench.roofline import table
    from foveate.progress import progress

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        with progress("calibrate", measured.measurements(torch.cuda.is_available())) as bar:
            device = measured.calibrate(advance=bar.advance)
    finally:
        torch.set_num_threads(before)
    path = measured.store(device)
    if not quiet:
        rows = [f"{what}, {dtype}: {human(rate, unit)}" for what, dtype, rate, unit in table(device)]
        print(f"{device.label}, {device.source}\n  " + "\n  ".join(rows) + f"\nkept in {path}\n", file=sys.stderr)


def shape_of(model: str) -> tuple[ModelShape, PreprocessSpec, int, Recipe]:
    """(shape, preprocessing, longest context, saved recipe) of a folder or preset, without its weights."""
    from pathlib import Path

    from foveate.bench.shape import ModelShape
    from foveate.recipe import Recipe

    if Path(model).is_dir():
        from foveate.vlm import family_of

        kind = family_of(Path(model))
        config, spec = kind.describe(Path(model))
        recipe = Recipe.restore(Path(model), kind.family)
    else:
        from foveate.adapters import presets
        from foveate.nvila.presets import PRESETS

        recipe = Recipe()
        if model in presets.PRESETS:
            _, config, spec = presets.describe(model)
        elif model in PRESETS:
            config = PRESETS.get(model).config()
            spec = config.spec
        else:
            from foveate.vlm import unknown_model

            raise UnknownNameError(unknown_model(model))
    context = int(config.get_text_config().max_position_embeddings)
    return ModelShape.from_config(config, spec), spec, context, recipe


def show(result: dict[str, Any], args: argparse.Namespace, machine: str) -> None:
    """The estimate in words and a table of stages."""
    from foveate.bench.cost import STAGES

    tokens, total = result["tokens"], result["bytes"]
    kept = "" if tokens["kept"] == tokens["visual"] else f" ({tokens['kept']} kept)"
    print(f"{args.model}: {tokens['text']} text + {tokens['visual']} visual tokens{kept}, {tokens['views']} views")
    cache = f"{human(total['kv'], 'B')} ({human(total['kv_per_token'], 'B')} a token)"
    whole = f", {human(total['process'], 'B')} with Python and its libraries" if total["process"] else ""
    print(f"weights {human(total['weights'], 'B')}, cache {cache}, peak about {human(total['peak'], 'B')}{whole}")
    layers = tokens["per_layer"]
    if len(set(layers)) > 1:
        starts = [index for index in range(len(layers)) if not index or layers[index] != layers[index - 1]]
        print("visual tokens by layer: " + ", ".join(f"{layers[index]} from layer {index}" for index in starts))
    print()
    names = {"decode": "decode, each token"}
    rows = [
        [names.get(stage, stage), human(result["flops"][stage], "FLOP"), f"{result['ms'][stage]:.3g} ms"]
        for stage in (*STAGES, "ttft")
    ]
    print_table(["stage", "work", "time"], rows)
    if result["unmeasured"]:
        print(f"\nnote: what {', '.join(result['unmeasured'])} takes was not measured here; times are those of dense")
    print(f"\ntimes are a roofline estimate for {machine} in {args.dtype}; measure with foveate bench")
