"""The configuration of NVILA: a SigLIP tower, a connector, a Qwen2 language model, and how media become tiles."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from foveate.data.spec import PreprocessSpec
from foveate.errors import CheckpointError


class NvilaConfig(PreTrainedConfig):
    """Every size of an NVILA model (arXiv 2412.04468), of any of its three variants.

    vision_config, text_config: configs of transformers, or dicts of their fields.
    projector_type: a name of `foveate.nvila.connector` ("mlp_downsample" for NVILA, "mlp_downsample_3x3_fix" for Lite).
    mm_hidden: channels that enter the connector; 0 derives it (tower width, times the number of S2 scales).
    preprocess: `PreprocessSpec.to_dict()`, so that model and pixels cannot drift apart.
    video_pool_sizes: (frames, rows, columns) mean-pool levels of a clip; None takes the spec's `video_pool`.
    vision_feature_layer: negative index into the tower's hidden states; -2 leaves the last layer unused (the official
        choice), -1 is the output of the last layer. The tower's final LayerNorm is never applied.
    projector_output_norm: RMSNorm on the connector's output. visual_position_embedding: sizes of the learned tables
        (rows, columns, times) that are added after it; 0 switches a table off. Both are off in published checkpoints.
    Raises CheckpointError when sizes contradict one another.
    """

    model_type = "foveate_nvila"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": Qwen2Config}  # noqa: RUF012 (read by transformers)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vision_config: SiglipVisionConfig | dict[str, Any] | None = None,
        text_config: Qwen2Config | dict[str, Any] | None = None,
        projector_type: str = "mlp_downsample",
        mm_hidden: int = 0,
        preprocess: dict[str, Any] | None = None,
        image_token_id: int = 151649,
        video_token_id: int = 151650,
        video_pool_sizes: list[list[int]] | None = None,
        projector_output_norm: bool = False,
        visual_position_embedding: tuple[int, int, int] | list[int] = (0, 0, 0),
        vision_feature_layer: int = -2,
        **kwargs: Any,
    ) -> None:
        spec = PreprocessSpec.from_dict(preprocess) if preprocess else PreprocessSpec()
        if vision_config is None:
            vision_config = {"image_size": spec.tile_size, "patch_size": spec.patch_size}
        self.vision_config = _sub_config(vision_config, SiglipVisionConfig)
        self.text_config = _sub_config(text_config, Qwen2Config)
        # the pooling head of SigLIP has no place in a VLM: without this, transformers would expect its weights
        self.vision_config.vision_use_head = False
        self.preprocess = spec.to_dict()
        self.projector_type = projector_type
        self.mm_hidden = mm_hidden or self.vision_config.hidden_size * num_scales(spec)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        pools = spec.video_pool if video_pool_sizes is None else video_pool_sizes
        self.video_pool_sizes = [list(level) for level in pools]
        self.projector_output_norm = projector_output_norm
        self.visual_position_embedding = list(visual_position_embedding)
        self.vision_feature_layer = vision_feature_layer
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        super().__init__(**kwargs)
        self._check(spec)

    @property
    def spec(self) -> PreprocessSpec:
        """The preprocessing that the model was built for."""
        return PreprocessSpec.from_dict(self.preprocess)

    @property
    def num_vision_layers(self) -> int:
        """Encoder layers that run: those up to `vision_feature_layer`."""
        return self.vision_config.num_hidden_layers + self.vision_feature_layer + 1

    def get_text_config(self, *args: Any, **kwargs: Any) -> Qwen2Config:
        """The language model's config: transformers sizes caches and masks by it."""
        return self.text_config

    def _check(self, spec: PreprocessSpec) -> None:
        vision = self.vision_config
        if not -vision.num_hidden_layers - 1 <= self.vision_feature_layer <= -1:
            raise CheckpointError(
                f"vision_feature_layer is {self.vision_feature_layer}; with {vision.num_hidden_layers} layers it must "
                f"lie between {-vision.num_hidden_layers - 1} and -1"
            )
        if vision.image_size != spec.tile_size or vision.patch_size != spec.patch_size:
            raise CheckpointError(
                f"the tower takes {vision.image_size} px in patches of {vision.patch_size}, the preprocessing makes "
                f"tiles of {spec.tile_size} px in patches of {spec.patch_size}; make them equal"
            )
        if connector_ratio(self.projector_type) != spec.downsample:
            raise CheckpointError(
                f"projector {self.projector_type!r} joins {connector_ratio(self.projector_type)} x "
                f"{connector_ratio(self.projector_type)} patches, the preprocessing counts on downsample "
                f"{spec.downsample}; make them equal"
            )


def connector_ratio(projector_type: str) -> int:
    """r of the r x r spatial-to-channel step of a connector; 1 when it has none."""
    found = re.search(r"downsample(?:_(\d)x\d)?", projector_type)
    return int(found.group(1) or 2) if found else 1


def num_scales(spec: PreprocessSpec) -> int:
    """How many S2 feature maps are joined along the channels."""
    return len(spec.scales) if spec.mode == "dynamic_s2" else 1


def _sub_config(value: Any, kind: type[PreTrainedConfig]) -> Any:
    if value is None:
        return kind()
    return kind(**{k: v for k, v in value.items() if k != "model_type"}) if isinstance(value, dict) else value
