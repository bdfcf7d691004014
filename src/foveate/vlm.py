"""`VLM`: a visual language model that answers, one object for every family, with recipes and reductions applied.

vlm = foveate.load("nano")
vlm.ask("chart.png", "Which bar is tallest?", reduce="uniform(keep=0.5)").text
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.adapters import ADAPTERS
from foveate.adapters.shape import steps_of
from foveate.disk import plain_errors
from foveate.errors import CheckpointError, InputError, RecipeError, UnknownNameError, UnsupportedError
from foveate.files import DTYPES
from foveate.method import Method, attached, nearest
from foveate.rows import Row
from foveate.runtime import Clock, Sampling, TextStream, check_context, encode, generate, open_batch, select

if TYPE_CHECKING:
    from foveate.adapters.base import Adapter
    from foveate.data.execute import Inputs
    from foveate.data.plan import Plan
    from foveate.data.spec import PreprocessSpec
    from foveate.recipe import Recipe

EMBEDDED = Path(__file__).parent / "nano" / "model"
"""The checkpoint of `nano` inside the package."""


@dataclass
class Request:
    """One question about media. Give `messages` (OpenAI style), or `media` and `text`.

    media: a picture or clip, or a list of them (paths, PIL images, arrays, foveate.data sources).
    reduce: a Reducer, a Recipe of them, its text, or "none"; None takes what is attached, or else the model's recipe.
    """

    text: str = ""
    media: Any = None
    messages: list[dict[str, Any]] | None = None
    num_frames: int | None = None
    reduce: Method | Recipe | str | None = None

    def to_messages(self) -> list[dict[str, Any]]:
        """The messages; media first, then the text."""
        if self.messages is not None:
            return self.messages
        from foveate.data.sample import as_media, media_parts

        if not self.text.strip():
            raise InputError("the question is empty; give a text after the pictures")
        single = self.media is not None and not isinstance(self.media, (list, tuple))
        media = [as_media(item) for item in ([self.media] if single else self.media or [])]
        return [{"role": "user", "content": [*media_parts(media), {"type": "text", "text": self.text}]}]


@dataclass
class Answer:
    """What came back.

    tokens: {"text", "visual", "kept"}: prompt tokens that are not visual features, visual features before and after
    reduction. ms: milliseconds of each stage (preprocess, encode, select, prefill, decode); in a batch, the batch's
    time divided by its requests. ids: new token ids. kept: indices of the visual features that stayed, or None when
    nothing was selected.
    """

    text: str
    tokens: dict[str, int] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    kept: list[int] | None = None


class VLM:
    """A loaded model. `name` is what it was loaded as; `recipe` what was applied to it (empty when dense)."""

    def __init__(self, adapter: Adapter, name: str, recipe: Recipe | None = None) -> None:
        from foveate.recipe import Recipe

        self.adapter, self.name = adapter, name
        self.recipe: Recipe = recipe if recipe is not None else Recipe()
        self.calibration: dict[str, Any] = {}
        """What data the weights of each part were calibrated on; saved as calibration.json."""
        self._stop: list[int] | None = None

    def __repr__(self) -> str:
        recipe = f", recipe={self.recipe.text()!r}" if self.recipe else ""
        return f"VLM({self.name!r}, {self.adapter.family}, {self.dtype}, {self.device}{recipe})"

    @property
    def model(self) -> Any:
        return self.adapter.model

    @property
    def tokenizer(self) -> Any:
        return self.adapter.tokenizer

    @property
    def spec(self) -> PreprocessSpec:
        return self.adapter.spec

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer."""
        if self._stop is None:
            self._stop = self.adapter.stop_ids()
        return self._stop

    # ---- one path from messages to an answer

    def plan(self, messages: Sequence[dict[str, Any]], **options: Any) -> Plan:
        """What a chat will become: views, frames and exact token counts. Options: those of `foveate.data.plan.plan`."""
        return self.adapter.plan(messages, **options)

    def prepare(self, plan: Plan) -> Inputs:
        """The tensors of a plan, on the CPU."""
        from foveate.data.execute import execute

        return execute(plan)

    def ask(
        self,
        media: Any,
        text: str,
        *,
        max_new_tokens: int = 256,
        reduce: Method | Recipe | str | None = None,
        on_text: Callable[[str], None] | None = None,
        num_frames: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Answer:
        """The answer to one question. on_text is called with each piece of text as it comes.

        Raises InputError (media, empty question), BudgetError (context), RecipeError and UnsupportedError (reduce).
        """
        request = Request(text, media, num_frames=num_frames, reduce=reduce)
        return self.respond(request, max_new_tokens, Sampling(temperature, top_p, seed), on_text)

    def respond(
        self,
        request: Request,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """As `ask`, for a `Request` (a dialogue, for example)."""
        stream = TextStream(self.tokenizer, on_text) if on_text else None
        answer = self._run([request], max_new_tokens, sampling, stream)[0]
        if stream:
            stream.close()
        return answer

    def answer(self, requests: Sequence[Request], max_new_tokens: int = 32, *, batch_size: int = 64) -> list[Answer]:
        """Greedy answers to many requests, in their order; batches of up to `batch_size` requests of like length.

        Row i of a batch is the answer of request i alone: rows are padded on the left and masked.
        """
        plans = [self.plan(r.to_messages(), num_frames=r.num_frames) for r in requests]
        order = sorted(range(len(plans)), key=lambda i: plans[i].num_tokens)
        out: list[Answer | None] = [None] * len(plans)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers = self._run([requests[i] for i in batch], max_new_tokens, plans=[plans[i] for i in batch])
            for index, answer in zip(batch, answers):
                out[index] = answer
        return out  # type: ignore[return-value]

    @torch.inference_mode()
    def _run(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stream: Callable[[int], None] | None = None,
        plans: Sequence[Plan] | None = None,
    ) -> list[Answer]:
        clock = Clock(self.device)
        reducers = [self.reducers(request.reduce) for request in requests]
        with clock.stage("preprocess"):
            plans = plans or [self.plan(r.to_messages(), num_frames=r.num_frames) for r in requests]
            inputs = [self.prepare(plan) for plan in plans]
        rows = self._rows(plans, inputs, reducers, clock)
        check_context(rows, self.adapter, max_new_tokens)
        new = generate(
            self.adapter,
            rows,
            self.new_cache(),
            max_new_tokens=max_new_tokens,
            stop=self.stop_ids,
            clock=clock,
            sampling=sampling,
            on_token=stream,
            strict=True,
        )
        ms = {stage: value / len(requests) for stage, value in clock.ms.items()}
        return [self._answer(row, ids, ms) for row, ids in zip(rows, new)]

    def _rows(
        self, plans: Sequence[Plan], inputs: Sequence[Inputs], reducers: Sequence[Sequence[Any]], clock: Clock
    ) -> list[Row]:
        steps = [steps_of(own, self.adapter.shape) for own in reducers]
        with clock.stage("encode"):
            encoded = encode(self.adapter, plans, inputs, steps)
        with clock.stage("select"):
            return [select(self.adapter, *parts) for parts in zip(plans, encoded, steps)]

    def _answer(self, row: Row, ids: list[int], ms: dict[str, float]) -> Answer:
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        kept = row.origin.tolist() if row.touched else None
        return Answer(text, {"text": row.text, "visual": row.visual, "kept": row.kept}, dict(ms), ids, kept)

    @torch.inference_mode()
    def logits(self, request: Request) -> torch.Tensor:
        """Next-token logits [V] float32 of one request: what tests and probes compare."""
        plan = self.plan(request.to_messages(), num_frames=request.num_frames)
        clock = Clock(self.device)
        rows = self._rows([plan], [self.prepare(plan)], [self.reducers(request.reduce)], clock)
        return open_batch(self.adapter, rows, self.new_cache(), clock).prefill()[0]

    def with_spec(self, **changes: Any) -> VLM:
        """The same weights with fields of the preprocessing spec changed, for instance `mode="resize"`, `num_frames=4`.

        Raises InputError for a field that there is not, or a value that does not fit.
        """
        known = [field.name for field in fields(self.spec)]
        if wrong := [name for name in changes if name not in known]:
            raise InputError(f"the preprocessing spec has no field {wrong[0]!r}; known: {', '.join(known)}")
        spec = replace(self.spec, **changes)
        return VLM(self.adapter.with_spec(spec), self.name, self.recipe)

    # ---- methods

    def reducers(self, asked: Method | Recipe | str | None = None) -> tuple[Any, ...]:
        """The reducers of a request: those asked for, or else attached ones, or else the recipe's; checked."""
        if asked is None:
            found = attached(self, "reduce") or self.recipe.of("reduce")
        else:
            from foveate.recipe import Recipe

            asked = Recipe.parse(asked) if isinstance(asked, str) else asked
            found = tuple(asked) if isinstance(asked, Recipe) else (asked,)
            wrong = next((method for method in found if method.socket != "reduce"), None)
            if wrong:
                raise RecipeError(f"{wrong.name} is a {wrong.socket} method; reduce= takes token reductions only")
        if found:
            from foveate.recipe import check_reducers

            check_reducers(found, self)
        return found

    def new_cache(self) -> Any:
        """The cache of one batch: that of an attached or recipe method, or the dense one."""
        methods = attached(self, "cache")[-1:] or self.recipe.of("cache")
        return methods[0].make(self.adapter) if methods else self.adapter.new_cache()

    # ---- files

    def extra_files(self) -> dict[str, dict[str, Any]]:
        """The JSON files beside a checkpoint: what was applied to it, and on what data."""
        from foveate.recipe import FILE

        extra = {FILE: self.recipe.to_json(self.adapter.family), **self.recipe.files()} if self.recipe else {}
        return extra | ({"calibration.json": self.calibration} if self.calibration else {})

    def save(self, path: str | Path) -> None:
        """Write the checkpoint, with its preprocessing spec and recipe, to the folder `path`: whole or not at all.

        An older checkpoint at `path` is replaced. Raises CheckpointError: `path` holds something else, a full disk.
        """
        with plain_errors(path, path, "nothing was changed"):
            self.adapter.save(Path(path), self.extra_files())


@torch.inference_mode(False)  # a model that was loaded in a block of inference mode could not be calibrated later
def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attn: str | None = None,
    random_weights: bool = False,
) -> VLM:
    """A `VLM` from a folder in any known layout, or by name: "nano" is shipped with the package.

    dtype: "float32", "bfloat16", "float16", or "auto" (float32 on a CPU, else as stored). device: "cpu", "cuda", ... or
    "auto" (CUDA when there is one). attn: an attention backend of transformers (None: SDPA). random_weights: build the
    architecture preset of this name with random numbers and a tokenizer of bytes. A recipe that the checkpoint was
    saved with is in force again. Raises UnknownNameError, CheckpointError (files), UnsupportedError (no adapter or
    device).
    """
    from foveate.recipe import Recipe

    name, device = str(path), _device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    if random_weights:
        adapter, recipe = _random(name, dtype, device, attn), Recipe()
    else:
        folder = find_folder(path)
        kind = family_of(folder)
        recipe = Recipe.restore(folder, kind.family)
        prepare = recipe.prepare_ if recipe.of("weights") else None
        adapter = kind.load(folder, dtype=_dtype(dtype), device=device, attn=attn, prepare=prepare)
    adapter.model.eval().requires_grad_(False)
    return VLM(adapter, name, recipe)


def find_folder(path: str | Path) -> Path:
    """The folder that `path` means. Raises UnknownNameError, or CheckpointError when it names no model.

    The text "nano" is the embedded model even where a folder of that name lies around; "./nano" is the folder.
    """
    name, folder = str(path), Path(path).expanduser()
    embedded = path == "nano" and (EMBEDDED / "config.json").is_file()
    if embedded or folder.is_dir():
        return EMBEDDED if embedded else folder
    if name == "nano":
        raise CheckpointError("nano's weights are not in this installation; make them with: foveate train nano")
    presets = _presets()
    if name in presets:
        raise CheckpointError(
            f"{name!r} is an architecture without weights; give the folder of its checkpoint, or take random numbers: "
            "bench --random-weights, or random_weights=True"
        )
    if folder.exists() or len(folder.parts) > 1 or name.startswith((".", "~")):
        raise CheckpointError(f"{name} is not a folder; give the folder of a checkpoint, or the name nano")
    raise UnknownNameError(unknown_model(name))


def unknown_model(name: str) -> str:
    """One line for a name that is neither a folder nor a preset."""
    return f"unknown model {name!r}: give a checkpoint's folder, or a preset{nearest(name, _presets())}"


def family_of(folder: Path) -> type[Adapter]:
    """The adapter class for the checkpoint in `folder`. Raises CheckpointError, or UnsupportedError if it has none."""
    config = folder / "config.json"
    if all((folder / part).is_dir() for part in ("llm", "vision_tower", "mm_projector")):
        return ADAPTERS.get("llava_llama")  # the three-folder layout, whatever its config calls itself
    if not config.is_file():
        raise CheckpointError(f"{folder} has no config.json; it is not the folder of a checkpoint")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} cannot be read as JSON: {error}") from None
    if kind not in ADAPTERS:
        raise UnsupportedError(f"{config} has model_type {kind!r}, which has no adapter; known: {', '.join(ADAPTERS)}")
    return ADAPTERS.get(kind)


def _presets() -> dict[str, Any]:
    """Named sizes of all families."""
    from foveate.adapters.presets import PRESETS as OTHERS
    from foveate.nvila.presets import PRESETS

    return {name: registry.get(name) for registry in (PRESETS, OTHERS) for name in registry}


def _random(name: str, dtype: str | torch.dtype, device: torch.device, attn: str | None) -> Adapter:
    from foveate.adapters import presets
    from foveate.adapters.nvila import NvilaAdapter
    from foveate.adapters.vocabulary import byte_tokenizer
    from foveate.nvila.checkpoint import media_token_ids
    from foveate.nvila.presets import build

    known = _presets()
    if name not in known:
        raise UnknownNameError(f"unknown preset {name!r}{nearest(name, known)}")
    wanted = torch.bfloat16 if dtype == "auto" else _dtype(dtype)
    # a preset keeps its own vocabulary size, so that measured costs are those of the published shape
    if isinstance(known[name], presets.HfPreset):
        return presets.build(known[name], wanted, device, attn=attn)
    tokenizer = byte_tokenizer()
    image, video = media_token_ids(tokenizer)
    model = build(name, wanted, device, attn=attn, image_token_id=image, video_token_id=video)
    return NvilaAdapter(model, tokenizer, model.spec)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UnsupportedError(f"unknown device {device!r}; use auto, cpu or cuda") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r} was asked for, but this machine has no CUDA device; use cpu")
    return found


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UnsupportedError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
