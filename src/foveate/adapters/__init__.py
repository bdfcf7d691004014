"""Adapters: what Foveate knows of each model family; nothing outside this folder knows a model class by name."""

from __future__ import annotations

from foveate.registry import Registry

ADAPTERS = Registry(
    "model family",
    {
        "foveate_nvila": "foveate.adapters.nvila:NvilaAdapter",
        "llava_llama": "foveate.adapters.nvila:NvilaAdapter",
        "nvila": "foveate.adapters.nvila:NvilaAdapter",
        "nvila_lite": "foveate.adapters.nvila:NvilaAdapter",
        "vila": "foveate.adapters.nvila:NvilaAdapter",
        "llava": "foveate.adapters.llava:LlavaAdapter",
        "llava_next": "foveate.adapters.llava_next:LlavaNextAdapter",
        "llava_onevision": "foveate.adapters.llava_onevision:LlavaOnevisionAdapter",
        "qwen2_vl": "foveate.adapters.qwen_vl:Qwen2VLAdapter",
        "qwen2_5_vl": "foveate.adapters.qwen_vl:Qwen25VLAdapter",
        "qwen3_vl": "foveate.adapters.qwen3_vl:Qwen3VLAdapter",
        "internvl": "foveate.adapters.internvl:InternVLAdapter",
        "smolvlm": "foveate.adapters.smolvlm:SmolVLMAdapter",
        "idefics3": "foveate.adapters.smolvlm:Idefics3Adapter",
        "llama": "foveate.adapters.text:LlamaAdapter",
        "mistral": "foveate.adapters.text:MistralAdapter",
        "qwen2": "foveate.adapters.text:Qwen2Adapter",
        "qwen3": "foveate.adapters.text:Qwen3Adapter",
        "phi3": "foveate.adapters.text:Phi3Adapter",
        "olmo2": "foveate.adapters.text:Olmo2Adapter",
    },
    group="foveate.adapters",
)
"""Adapter classes by the `model_type` of a checkpoint's config.json."""
