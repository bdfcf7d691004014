"""The preprocessing spec: how pictures and clips become tiles and tokens. One object for train, ask, eval and serve.

It is saved in each checkpoint (`preprocess.json`) with its hash, and the hash is checked on load, so a model is never
fed pixels that were prepared in another way than the ones it learned from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from foveate.errors import CheckpointError, InputError

MODES = ("dynamic_s2", "dynamic", "resize", "pad", "crop", "anyres", "native", "split")
FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
)
"""Model types of transformers whose prompts and frame rules are known (`foveate.data.families`)."""
FILTERS = ("bicubic", "lanczos", "bilinear", "nearest", "box", "hamming")


@dataclass(frozen=True)
class PreprocessSpec:
    """How media become views of `tile_size` pixels and how many tokens each view costs.

    mode: "dynamic_s2" (NVILA, arXiv 2412.04468: every scale tiled, features of all scales joined), "dynamic" (Lite,
    InternVL: tiles and a thumbnail), "resize" (one squashed square), "pad" (one letterboxed square), "crop" (shortest
    side to `edge`, centre cut out), "anyres" (LLaVA-NeXT: a base view and padded tiles), "native" (Qwen: one view of
    the picture's own shape) or "split" (Idefics3: longest side to `edge`, tiles and the whole). NVILA tiles a single
    image only; several images in one prompt, and video frames, are one square each, as in the official code.
    """

    mode: str = "dynamic_s2"
    tile_size: int = 448
    """Side of one view, in pixels."""
    patch_size: int = 14
    scales: tuple[int, ...] = (448, 896, 1344)
    """S2 scales in pixels, ascending; the last one is tiled by aspect ratio. Empty without S2."""
    resize_to_scale: int = -1
    """Index of the scale whose map size all maps are resized to."""
    downsample: int = 2
    """r of the r x r spatial-to-channel step: tokens per tile = ceil(tile_size / patch_size / r) ** 2."""
    min_tiles: int = 1
    max_tiles: int = 12
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    num_frames: int = 8
    """Frames sampled from a clip, evenly from the first to the last."""
    repeat_frames: bool = True
    """A clip shorter than `num_frames`: repeat frames (the official rule), or take each frame once (False)."""
    fps: float = 0.0
    """When above 0, sample at this rate instead, at most `num_frames`."""
    video_pool: tuple[tuple[int, int, int], ...] = ()
    """(time, rows, columns) mean-pool sizes of the video encoder, one level each; empty: frames stay apart."""
    image_end: str = "\n"
    """Text whose embedding closes every image block, frame or pooled group."""
    video_sep: str = ""
    """Text between the levels of `video_pool`."""
    max_pixels: int = 89_478_485
    """Largest picture accepted (width x height), against decompression bombs."""
    max_aspect: float = 200.0
    """Largest ratio of the longer to the shorter side accepted."""
    family: str = ""
    """Model type of transformers whose prompt text and frame sampling are followed; empty: NVILA."""
    image_token: str = ""
    """Text of the token that stands for one visual token (families of transformers)."""
    video_token: str = ""
    """Text of the token that the chat template writes for a clip; empty: the model takes no clips."""
    edge: int = 0
    """Pixels that the shortest ("crop") or longest ("split") side is resized to first."""
    video_edge: int = 0
    """The same for frames of a clip, in mode "split"."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """(height, width) of the canvases that mode "anyres" chooses from."""
    max_anyres: int = 0
    """Mode "anyres": maps of more than about this many tiles are resized to this many tiles; 0: never."""
    min_area: int = 0
    """Mode "native": fewest pixels of a picture."""
    max_area: int = 0
    """Mode "native": most pixels of a picture."""
    video_min_area: int = 0
    """Mode "native": fewest pixels of a frame (qwen3_vl: of all frames together)."""
    video_max_area: int = 0
    """Mode "native": most pixels of a frame (qwen3_vl: of all frames together)."""
    video_tokens: int = 0
    """Mode "native": the `max_video_tokens` of transformers where its per-frame cap is on; 0: no such cap."""
    temporal_patch: int = 1
    """Frames that the tower joins into one."""
    min_frames: int = 1
    """Fewest frames taken when `fps` decides, if the clip has them."""
    filter: str = "bicubic"
    """Resampling filter of Pillow."""

    def __post_init__(self) -> None:
        for name in ("scales", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("video_pool", "pinpoints"):
            object.__setattr__(self, name, tuple(tuple(level) for level in getattr(self, name)))
        if self.mode not in MODES:
            raise InputError(f"preprocess mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.family not in ("", *FAMILIES):
            raise InputError(f"preprocess family is {self.family!r}; it must be one of {', '.join(FAMILIES)}")
        if self.filter not in FILTERS:
            raise InputError(f"resampling filter is {self.filter!r}; it must be one of {', '.join(FILTERS)}")
        if not self.family and self.mode in ("crop", "anyres", "native", "split"):
            raise InputError(f"preprocess mode {self.mode!r} needs a family, one of {', '.join(FAMILIES)}")
        if self.family:
            self._check_family()
        elif self.tile_size % self.patch_size:
            raise InputError(f"tile_size {self.tile_size} is not a multiple of patch_size {self.patch_size}")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise InputError(f"min_tiles {self.min_tiles} and max_tiles {self.max_tiles}: need 1 <= min <= max")
        if self.num_frames < 1 or any(len(level) != 3 or min(level) < 1 for level in self.video_pool):
            raise InputError(
                f"num_frames {self.num_frames} and video_pool {self.video_pool}: need whole numbers above 0"
            )
        if self.mode == "dynamic_s2":
            if not self.scales or any(s % self.tile_size for s in self.scales):
                raise InputError(f"scales {self.scales} must be multiples of tile_size {self.tile_size}")
            if self.scales[0] != self.tile_size or list(self.scales) != sorted(set(self.scales)):
                raise InputError(f"scales {self.scales} must start with tile_size {self.tile_size} and ascend")
            if not -len(self.scales) <= self.resize_to_scale < len(self.scales):
                raise InputError(f"resize_to_scale is {self.resize_to_scale}; there are {len(self.scales)} scales")
            if (self.scales[-1] // self.scales[0]) ** 2 > self.max_tiles:
                raise InputError(f"max_tiles {self.max_tiles} is less than the square of the last scale")

    def _check_family(self) -> None:
        if not self.image_token:
            raise InputError(f"family {self.family!r} needs image_token, the text of its placeholder token")
        if self.mode in ("crop", "split") and self.edge < 1:
            raise InputError(f"mode {self.mode!r} needs edge, the pixels of the side that is resized first")
        if self.mode == "anyres":
            if not self.pinpoints:
                raise InputError("mode 'anyres' needs pinpoints, the canvases (height, width) to choose from")
            if bad := [p for p in self.pinpoints if len(p) != 2 or min(p) < 1 or any(x % self.tile_size for x in p)]:
                raise InputError(f"canvas {bad[0]} is not a whole number of tiles of {self.tile_size} px (tile_size)")
        if self.mode == "native" and not 0 < self.min_area <= self.max_area:
            raise InputError(f"min_area {self.min_area} and max_area {self.max_area}: need 0 < min <= max")
        if self.temporal_patch < 1 or self.min_frames < 1:
            raise InputError(
                f"temporal_patch {self.temporal_patch}, min_frames {self.min_frames}: need numbers above 0"
            )

    @property
    def side(self) -> int:
        """Patches along one side of a view."""
        return self.tile_size // self.patch_size

    @property
    def token_side(self) -> int:
        """Tokens along one side of a view after spatial-to-channel (padded up)."""
        return -(-self.side // self.downsample)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. Fields of the families are left out while unset, so older specs keep their hash."""
        data = json.loads(json.dumps(dataclasses.asdict(self)))
        return {k: v for k, v in data.items() if k not in _UNSET or v != _UNSET[k]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PreprocessSpec:
        """From `to_dict`. A stored "hash" is checked; an unknown key is an error, since it would change the pixels."""
        data = dict(data)
        stored = data.pop("hash", None)
        unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise CheckpointError(f"preprocess.json has unknown keys {', '.join(unknown)}; update foveate")
        spec = cls(**data)
        if stored is not None and stored != spec.hash():
            raise CheckpointError(
                f"preprocess.json was edited: stored hash {stored}, computed {spec.hash()}; "
                "restore the file, or delete its hash to accept the change"
            )
        return spec

    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON form."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_NAMES = [field.name for field in dataclasses.fields(PreprocessSpec)]
_UNSET = {
    field.name: list(field.default) if isinstance(field.default, tuple) else field.default
    for field in dataclasses.fields(PreprocessSpec)[_NAMES.index("family") :]
}
"""JSON values of the fields that `to_dict` leaves out."""
