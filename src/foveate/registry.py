"""One registry class for everything that has a name: methods, adapters, tasks, presets, losses.

Entries are lazy ("package.module:Attribute" of *this* code, never of a file that was loaded), so listing names imports
nothing heavy. Others add entries through entry-point groups (`foveate.methods`, `foveate.adapters`, `foveate.tasks`).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from foveate.errors import UnknownNameError


class Registry:
    """Names to objects. `kind` is the word used in errors ("method", "task"); `group` an entry-point group or None."""

    def __init__(self, kind: str, entries: dict[str, str] | None = None, group: str | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = dict(entries or {})
        self._group = group

    def register(self, name: str, value: Any = None) -> Any:
        """Add `value` (an object, or a lazy "module:attribute" string) under `name`; without value, a decorator."""
        if value is None:
            return lambda obj: self.register(name, obj) or obj
        if name in self._entries and self._entries[name] is not value:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = value
        return value

    def get(self, name: str) -> Any:
        """The object registered under `name`. Raises UnknownNameError that names the nearest entries."""
        self._load_entry_points()
        if name not in self._entries:
            raise UnknownNameError(self._unknown(name))
        value = self._entries[name]
        if isinstance(value, str):
            module, _, attribute = value.partition(":")
            value = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return value

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load_entry_points()
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        self._load_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        shown = ", ".join(sorted(self._entries)[:20])
        return f"unknown {self.kind} {name!r}: {hint}known: {shown}"

    def _load_entry_points(self) -> None:
        group, self._group = self._group, None  # once, and not again while an entry point is being imported
        if group:
            for point in metadata.entry_points(group=group):
                if point.name not in self._entries:
                    self._entries[point.name] = f"{point.module}:{point.attr}"


METHODS = Registry(
    "method",
    {
        "random": "foveate.reduce.random:Random",
        "uniform": "foveate.reduce.uniform:Uniform",
        "fastv": "foveate.reduce.fastv:FastV",
        "pyramiddrop": "foveate.reduce.pyramiddrop:PyramidDrop",
        "sparsevlm": "foveate.reduce.sparsevlm:SparseVLM",
        "visiondrop": "foveate.reduce.visiondrop:VisionDrop",
        "adatoken3d": "foveate.reduce.adatoken3d:AdaToken3D",
        "schedule": "foveate.reduce.schedule:Schedule",
        "yopo": "foveate.reduce.yopo:YOPO",
        "fastervlm": "foveate.reduce.fastervlm:FasterVLM",
        "divprune": "foveate.reduce.divprune:DivPrune",
        "dycoke": "foveate.reduce.dycoke:DyCoke",
        "flowcut": "foveate.reduce.flowcut:FlowCut",
        "framefusion": "foveate.reduce.framefusion:FrameFusion",
        "globalcom2": "foveate.reduce.globalcom2:GlobalCom2",
        "hired": "foveate.reduce.hired:HiRED",
        "holitom": "foveate.reduce.holitom:HoliTom",
        "mmtok": "foveate.reduce.mmtok:MMTok",
        "pitome": "foveate.reduce.pitome:PiToMe",
        "prumerge": "foveate.reduce.prumerge:PruMerge",
        "prunevid": "foveate.reduce.prunevid:PruneVid",
        "quota": "foveate.reduce.quota:Quota",
        "text_dominance": "foveate.reduce.text_dominance:TextDominance",
        "tome": "foveate.reduce.tome:ToMe",
        "ts_llava": "foveate.reduce.ts_llava:TSLLaVA",
        "visionzip": "foveate.reduce.visionzip:VisionZip",
        "rtn": "foveate.weights.rtn:RTN",
        "fp8_weights": "foveate.weights.fp8:Fp8Weights",
        "maskllm": "foveate.weights.maskllm:MaskLLM",
        "eora": "foveate.weights.eora:EoRA",
        "lq_lora": "foveate.weights.lq_lora:LQLoRA",
        "layered": "foveate.weights.layered:Layered",
        "mixed": "foveate.weights.mixed:Mixed",
        "magnitude": "foveate.weights.magnitude:Magnitude",
        "wanda": "foveate.weights.wanda:Wanda",
        "sparsegpt": "foveate.weights.sparsegpt:SparseGPT",
        "owl": "foveate.weights.owl:OWL",
        "gptq": "foveate.weights.gptq:GPTQ",
        "awq": "foveate.weights.awq:AWQ",
        "smoothquant": "foveate.weights.smoothquant:SmoothQuant",
        "mbq": "foveate.weights.mbq:MBQ",
        "int8": "foveate.cache.int8:Int8Cache",
        "fp8": "foveate.cache.fp8:Fp8Cache",
        "kivi": "foveate.cache.kivi:Kivi",
        "kvquant": "foveate.cache.kvquant:KVQuant",
        "vidkv": "foveate.cache.vidkv:VidKV",
        "sink": "foveate.cache.sink:Sink",
        "alisa": "foveate.cache.alisa:Alisa",
    },
    group="foveate.methods",
)
"""Every method of every socket, by the name that recipes use."""
