"""Training recipes: what a stage trains, how fast, on what, for how long. YAML is only the saved form of these classes.

A file names parts, sources, losses and optimizers by registered names; nothing imports a dotted path from a file.
An error names the key, the value that was found, and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from foveate.errors import RecipeError, UnknownNameError
from foveate.registry import Registry

PARTS = ("vision_tower", "mm_projector", "llm", "heads")
"""Parts of a model in training. `heads` are the linear read-outs of the "dense" loss; they are never released."""
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("float32", "bfloat16")
ATTENTION = ("lean", "eager", "sdpa")
LOSSES = Registry(
    "loss",
    {
        "lm": "foveate.train.losses:LanguageLoss",
        "soft_ce": "foveate.train.losses:SoftTimeLoss",
        "dense": "foveate.train.losses:DenseLoss",
    },
)
"""Every loss by the name that recipes use."""
BOOKKEEPING = ("output", "save_every", "keep_checkpoints", "threads", "log_every", "device")
"""Keys of a recipe that may change between a run and its resumption."""


@dataclass(frozen=True)
class Stage:
    """One stage of training."""

    name: str
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Samples of one optimizer step, over all its micro-batches."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Source to weight: "world/<kind>", a named set ("easy-vqa"), or a data set's path; "?" at the end = optional."""
    train: tuple[str, ...] = ("*",)
    """Globs over PARTS; what matches none stays frozen."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the matrices of encoder layers, projector and decoder layers, with AdamW for the rest."""
    lr: dict[str, float] = field(default_factory=lambda: {"*": 1e-3})
    """Peak learning rate of each part (a number means all parts)."""
    adamw_lr: float | None = None
    """With "muon": peak rate of what AdamW trains, in the part of highest `lr`; lower parts get it in proportion."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; vectors, embeddings and positions have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 0
    schedule: str = "constant"
    decay_fraction: float = 1.0
    """Share of the steps, at the end, over which the schedule falls to `final_lr_ratio`."""
    final_lr_ratio: float = 0.0
    clip_norm: float = 1.0
    """Largest norm of all gradients together; 0 = no clipping."""
    losses: dict[str, float] = field(default_factory=lambda: {"lm": 1.0})
    """Loss to weight. Without a language loss the language model is not run at all."""
    questions_per_sample: int = 8
    """At most so many branches of a sample share its media in one sequence; 0 = all."""
    skills: dict[str, float] = field(default_factory=dict)
    """Relative chance of a branch of this skill when there are more than `questions_per_sample`; 1 where not named."""
    low_resolution: float = 0.0
    """Chance that a sample's images are prepared as one square of the tile size instead of tiles."""
    max_length: int = 1024
    """Tokens of one packed row; a longer sample loses branches, then is skipped and counted."""
    accumulate: int = 1
    """Micro-batches of one step."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        for key, low in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("max_length", 16)):
            _limit(where, key, getattr(self, key), low)
        for key in ("warmup_steps", "questions_per_sample", "weight_decay", "clip_norm", "final_lr_ratio"):
            _limit(where, key, getattr(self, key), 0)
        for key in ("low_resolution", "decay_fraction"):
            _limit(where, key, getattr(self, key), 0, 1)
        _choice(where, "optimizer", self.optimizer, OPTIMIZERS)
        _choice(where, "schedule", self.schedule, SCHEDULES)
        if self.accumulate > self.batch_size:
            raise RecipeError(f"{where}: accumulate is {self.accumulate}, more than batch_size {self.batch_size}")
        if self.optimizer == "muon" and self.adamw_lr is None:
            raise RecipeError(f"{where}: optimizer 'muon' needs adamw_lr, the rate of norms, embeddings and heads")
        if not self.mixture or min(self.mixture.values()) < 0 or sum(self.mixture.values()) <= 0:
            raise RecipeError(f"{where}: mixture must give at least one source a weight above 0, got {self.mixture}")
        if not self.losses:
            raise RecipeError(f"{where}: losses is empty; name at least one, for example {{lm: 1.0}}")
        for name in self.losses:
            if name not in LOSSES:
                raise RecipeError(f"{where}: losses names {name!r}{_near(name, LOSSES)}")
        if "dense" in self.losses and "heads" not in self.trained_parts():
            raise RecipeError(f"{where}: loss 'dense' needs 'heads' among train, got {', '.join(self.train)}")
        for key in ("train", "lr"):
            for pattern in getattr(self, key):
                if not fnmatch.filter(PARTS, pattern):
                    raise RecipeError(f"{where}: {key} names part {pattern!r}{_near(pattern, PARTS)}")
        for part in self.trained_parts():
            if part != "heads" or "dense" in self.losses:
                self.part_lr(part)

    def trained_parts(self) -> tuple[str, ...]:
        """The parts that this stage trains, in the order of PARTS."""
        return tuple(p for p in PARTS if any(fnmatch.fnmatchcase(p, g) for g in self.train))

    def part_lr(self, part: str) -> float:
        """Peak rate of `part`: its own entry of `lr` first, then the first glob that matches."""
        if part in self.lr:
            return self.lr[part]
        for pattern, value in self.lr.items():
            if fnmatch.fnmatchcase(part, pattern):
                return value
        if part == "heads":
            return max(self.lr.values())
        raise RecipeError(f"stage {self.name!r}: lr gives no rate for {part!r}, which it trains; add it, or '*'")

    def part_adamw_lr(self, part: str) -> float:
        """Peak rate of what AdamW trains in `part` (see `adamw_lr`)."""
        rate = self.part_lr(part)
        if self.optimizer == "adamw":
            return rate
        top = max(self.lr.values())
        return float(self.adamw_lr or 0.0) * (rate / top if top else 0.0)


@dataclass(frozen=True)
class TrainRecipe:
    """A whole training run."""

    model: str
    """Preset name ("nano": fresh weights) or a checkpoint's folder (goes on from its weights)."""
    stages: tuple[Stage, ...]
    name: str = "run"
    tokenizer: str = ""
    """Folder of the tokenizer; empty: the model's own."""
    seed: int = 0
    precision: str = "float32"
    """"bfloat16" computes under autocast; weights and optimizer state stay float32."""
    threads: int = 0
    """Threads of torch; 0 leaves torch's choice. A run is bitwise repeatable only with the same number."""
    device: str = "auto"
    """"auto" is CUDA where there is one, else the CPU."""
    attention: str = "eager"
    """"lean" is eager attention that keeps the softmax in the compute type: fastest on CPUs."""
    output: str = ""
    """Folder of the run; empty: runs/<name>."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    world: dict[str, Any] = field(default_factory=dict)
    """Options of the drawn world (`size`, `frames`, ...)."""
    preprocess: dict[str, Any] = field(default_factory=dict)
    """Fields of the preprocessing spec to change from the model's own (`num_frames`, `max_tiles`, ...)."""

    def __post_init__(self) -> None:
        _choice("recipe", "precision", self.precision, PRECISIONS)
        _choice("recipe", "attention", self.attention, ATTENTION)
        for key, low in (("save_every", 1), ("keep_checkpoints", 1), ("log_every", 1), ("threads", 0), ("seed", 0)):
            _limit("recipe", key, getattr(self, key), low)
        if not self.stages:
            raise RecipeError("recipe: stages is empty; a recipe needs at least one")
        names = [s.name for s in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"recipe: two stages are called {name!r}; give each its own name")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(s.steps for s in self.stages)

    def scaled(self, factor: float) -> TrainRecipe:
        """The same recipe with `factor` times the steps and warm-up of every stage, at least one step each."""
        if not factor > 0:
            raise RecipeError(f"--steps-scale is {factor}; it must be above 0")
        stages = tuple(
            dataclasses.replace(s, steps=max(1, round(s.steps * factor)), warmup_steps=round(s.warmup_steps * factor))
            for s in self.stages
        )
        return dataclasses.replace(self, stages=stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """The YAML form; `TrainRecipe.from_dict(yaml.safe_load(text))` gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def hash(self, stages: int | None = None) -> str:
        """16 hex digits over everything that changes the weights of the first `stages` stages (default: of all).

        Later stages and BOOKKEEPING are left out, so a run may be resumed after what lies ahead of it was edited.
        """
        data = {k: v for k, v in self.to_dict().items() if k not in BOOKKEEPING}
        data["stages"] = data["stages"][:stages]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> TrainRecipe:
        """From plain types. Raises RecipeError naming key, value and the nearest valid key."""
        values = _values(cls, data, where)
        stages = values.get("stages")
        if not isinstance(stages, list):
            raise RecipeError(f"{where}: stages must be a list, got {stages!r:.60}")
        values["stages"] = tuple(Stage(**_values(Stage, s, _stage_name(where, i, s))) for i, s in enumerate(stages))
        return cls(**values)


def load_recipe(name_or_path: str | Path) -> TrainRecipe:
    """The shipped recipe of that name, or the recipe in that YAML file."""
    text = str(name_or_path)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"no recipe file {text}; shipped recipes: {', '.join(shipped_recipes())}")
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), path.name)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {text} cannot be read: {error}") from None
    if text not in shipped_recipes():
        known = shipped_recipes()
        raise UnknownNameError(f"unknown training recipe {text!r}{_near(text, known)}, or give a .yaml file")
    shipped = resources.files("foveate.train") / "recipes" / f"{text}.yaml"
    return parse_recipe(shipped.read_text(encoding="utf-8"), text)


def parse_recipe(text: str, where: str = "recipe") -> TrainRecipe:
    """A recipe from YAML text; `where` stands in errors."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    return TrainRecipe.from_dict(data, where)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the library."""
    folder = resources.files("foveate.train") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def _values(cls: type, data: Any, where: str) -> dict[str, Any]:
    """`data` checked and converted to the field types of dataclass `cls`; nested stages are left to the caller."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must be a mapping of keys to values, got {data!r:.60}")
    hints = get_type_hints(cls)
    out = {}
    for key, value in data.items():
        if key not in hints:
            raise RecipeError(f"{where}: unknown key {key!r} (value {value!r:.40}){_near(str(key), hints)}")
        out[key] = value if key == "stages" else _convert(hints[key], value, f"{where}: {key}")
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in out:
            raise RecipeError(f"{where}: key {f.name!r} is missing")
    return out


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`. A YAML "1e-3" is a string (YAML 1.1 wants "1.0e-3"), so numbers parse."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict:
        if args[1] is float and isinstance(value, int | float | str) and where.endswith("lr"):
            return {"*": _convert(float, value, where)}
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be a mapping, got {value!r:.60}")
        return {str(k): v if args[1] is Any else _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise RecipeError(f"{where} must be a list, got {value!r:.60}")
        return tuple(_convert(args[0], v, where) for v in items)
    if type(None) in args:
        return None if value is None else _convert(args[0], value, where)
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise RecipeError(f"{where} must be true or false, got {value!r:.60}")
    if kind is str:
        if isinstance(value, str):
            return value
        raise RecipeError(f"{where} must be text, got {value!r:.60}")
    try:
        number = float(value)
        if isinstance(value, bool) or number != number or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (TypeError, ValueError, OverflowError):
        word = "a whole number" if kind is int else "a number"
        raise RecipeError(f"{where} must be {word}, got {value!r:.60}") from None


def _stage_name(where: str, index: int, data: Any) -> str:
    name = data.get("name") if isinstance(data, dict) else None
    return f"{where}, stage {name!r}" if name else f"{where}, stage {index + 1}"


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _choice(where: str, key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"{where}: {key} is {value!r}{_near(value, known)}")


def _limit(where: str, key: str, value: float, low: float, high: float | None = None) -> None:
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RecipeError(f"{where}: {key} is {value}; it must be {bound}")
