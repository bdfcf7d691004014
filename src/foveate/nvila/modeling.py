"""NVILA as a transformers model: SigLIP tower, connector, Qwen2; pictures by Dynamic-S2 or tiles, clips by pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel, Qwen2ForCausalLM, SiglipVisionModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from foveate.errors import InputError
from foveate.nvila.configuration import NvilaConfig
from foveate.nvila.connector import Projector, VisualPosition
from foveate.nvila.features import join_scales, join_tiles, pool_frames, split_by_image, split_tiles

Grid = tuple[int, int]


@dataclass
class VisualFeatures(ModelOutput):
    """What the encoder makes of pictures or clips; the value of `mm_encoder_outputs["image"]` and `["video"]`.

    pooler_output: one [N_i, D] tensor per picture or clip, in the order of the placeholders.
    tower_features: [n_tiles, side*side, C] of the tower, per tile or frame, before the connector.
    """

    pooler_output: Any = None
    tower_features: Tensor | None = None


@dataclass
class NvilaOutput(ModelOutput):
    """Loss, logits [B, L or kept, V], cache; `image_features` and `tower_features` as in `VisualFeatures`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Any = None
    tower_features: Tensor | None = None


class NvilaPreTrainedModel(PreTrainedModel):
    """What transformers must know: attention backends, modalities, checkpointing, initial values."""

    config_class = NvilaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisualPosition):
            for table in module.parameters(recurse=False):
                init.normal_(table, mean=0.0, std=self.config.text_config.initializer_range)


class NvilaForConditionalGeneration(NvilaPreTrainedModel, GenerationMixin):
    """A picture-, clip- and text-to-text model. Parts: `vision_tower`, `mm_projector`, `llm`.

    Placeholders (`config.image_token_id`, `config.video_token_id`) stand in `input_ids` once per visual token; the
    line feed that closes a picture or frame group is ordinary text. `foveate.data.plan` writes both.
    """

    def __init__(self, config: NvilaConfig) -> None:
        super().__init__(config)
        self.spec = config.spec
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.mm_projector = Projector(
            config.projector_type,
            config.mm_hidden,
            config.text_config.hidden_size,
            config.projector_output_norm,
            config.visual_position_embedding,
        )
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.llm.lm_head = value

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.llm.model

    # ---- the encoder

    def tower(self, pixels: Tensor) -> Tensor:
        """Patch features of tiles: [n, 3, S, S] -> [n, side*side, C], `hidden_states[vision_feature_layer]`.

        Layers after that one, and the final LayerNorm, are not run: nothing reads them.
        """
        tower = self.vision_tower
        hidden = tower.embeddings(pixels)
        for layer in tower.encoder.layers[: self.config.num_vision_layers]:
            hidden = layer(hidden, None)
        return hidden

    def connect(self, features: Tensor, image_grids: Tensor | Sequence[Grid] | None = None) -> list[Tensor]:
        """Tower features of tiles -> one [N_i, D] tensor per picture, row by row over the whole picture.

        features: [n_tiles, side*side, C]. image_grids: [n_images, 2] (rows, columns) of the tiles of the last scale,
        (0, 0) for a picture that is one square; None: every tile is one. Without S2 each tile (and the thumbnail) of
        a Lite picture counts as a picture. Raises InputError when the grids do not add up to the tiles.
        """
        grids = _pairs(image_grids, features.shape[0])
        sizes = split_by_image(features.shape[0], grids, self.spec)
        side = self.spec.side
        maps = features.unflatten(1, (side, side))
        if self.spec.mode != "dynamic_s2":
            tokens = self._positioned(self._project(features)).flatten(1, 2)
            return list(tokens)

        starts = [sum(sizes[:i]) for i in range(len(sizes))] if len(set(grids)) > 1 else []
        groups: list[tuple[list[int], Tensor, Grid]] = []
        for grid in dict.fromkeys(grids):  # pictures of one grid are stacked: no loop over a training batch
            members = [i for i, g in enumerate(grids) if g == grid]
            count = sizes[members[0]]
            if starts:
                picked = torch.tensor([starts[i] + k for i in members for k in range(count)], device=maps.device)
                tiles = maps.index_select(0, picked)
            else:
                tiles = maps
            joined, block = join_scales(tiles.unflatten(0, (len(members), count)), grid, self.spec)
            groups.append((members, split_tiles(joined, *block), block))

        chunks = torch.cat([c.flatten(0, 1) for _, c, _ in groups])  # [chunks, side, side, C*scales]
        tokens = self._project(chunks.flatten(1, 2))
        out: list[Tensor] = [tokens] * len(grids)
        for (members, _, block), part in zip(groups, tokens.split([c.shape[0] * c.shape[1] for _, c, _ in groups])):
            stacked = join_tiles(part.unflatten(0, (len(members), block[0] * block[1])), *block)
            for i, picture in zip(members, self._positioned(stacked).flatten(1, 2)):
                out[i] = picture
        return out

    def connect_video(self, features: Tensor, video_frames: Tensor | Sequence[int] | None = None) -> list[Tensor]:
        """Tower features of frames -> one [N_i, D] tensor per clip: groups in time order, levels one after the other.

        features: [n_frames, side*side, C]. video_frames: frames of each clip; None: all belong to one clip.
        Raises InputError when the counts do not add up.
        """
        counts = [features.shape[0]] if video_frames is None else _ints(video_frames)
        if sum(counts) != features.shape[0]:
            raise InputError(
                f"pixel_values_videos hold {features.shape[0]} frames, video_frames {counts} ask for {sum(counts)}"
            )
        if self.spec.mode == "dynamic_s2":
            features = features.repeat(1, 1, len(self.spec.scales))
        out = []
        for clip in self._project(features).split(counts):
            levels = [pool_frames(clip, level) for level in self.config.video_pool_sizes or [[1, 1, 1]]]
            out.append(torch.cat([self._positioned(level, is_video=True).flatten(0, 2) for level in levels]))
        return out

    def get_image_features(
        self, pixel_values: Tensor, image_grids: Tensor | Sequence[Grid] | None = None, **kwargs: Any
    ) -> VisualFeatures:
        """Encoded pictures. pixel_values: [n_tiles, 3, S, S], one picture after the other; grids: see `connect`."""
        features = self.tower(pixel_values)
        return VisualFeatures(pooler_output=self.connect(features, image_grids), tower_features=features)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_frames: Tensor | Sequence[int] | None = None, **kwargs: Any
    ) -> VisualFeatures:
        """Encoded clips, without the end tokens. pixel_values_videos: [n_frames, 3, S, S]; see `connect_video`."""
        features = self.tower(pixel_values_videos)
        return VisualFeatures(pooler_output=self.connect_video(features, video_frames), tower_features=features)

    def _project(self, features: Tensor) -> Tensor:
        """[n, side*side, C] -> [n, token_side, token_side, D]."""
        return self.mm_projector(features).unflatten(1, (self.spec.token_side, self.spec.token_side))

    def _positioned(self, tokens: Tensor, is_video: bool = False) -> Tensor:
        position = self.mm_projector.position
        return tokens if position is None else position(tokens, is_video)

    def _refuse_placeholders(self, input_ids: Tensor) -> None:
        """A prompt with placeholders but no pictures would silently read the embedding of a special token."""
        for kind, token in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
            if count := int((input_ids == token).sum()):
                raise InputError(f"input_ids hold {count} {kind} placeholders, but 0 {kind} features; pass the pixels")

    # ---- the language model

    def embed(
        self, input_ids: Tensor, image_features: Sequence[Tensor] = (), video_features: Sequence[Tensor] = ()
    ) -> Tensor:
        """Text embeddings [B, L, D] with visual features written over their placeholders, in order of appearance.

        Raises InputError when placeholders and features differ in number.
        """
        embeds = self.get_input_embeddings()(input_ids)
        embeds = _place(embeds, input_ids == self.config.image_token_id, image_features, "image")
        return _place(embeds, input_ids == self.config.video_token_id, video_features, "video")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | Sequence[Grid] | None = None,
        pixel_values_videos: Tensor | None = None,
        video_frames: Tensor | Sequence[int] | None = None,
        mm_encoder_outputs: dict[str, VisualFeatures] | None = None,
        output_tower_features: bool = False,
        **kwargs: Any,
    ) -> NvilaOutput:
        """Logits (and the loss of `labels`, -100 ignored) of a batch of texts with pictures and clips.

        input_ids: [B, L] with one placeholder per visual token. attention_mask: [B, L], or an additive [B, 1, L, L]
        mask that goes to the language model as it is (packing, with `position_ids` [B, L]). Pixels: see
        `get_image_features`, `get_video_features`; `mm_encoder_outputs` {"image": .., "video": ..} replaces them.
        logits_to_keep: the last so many positions only, 0 for all. `output_tower_features` also returns the tower's
        output per tile (pictures first, then frames). Raises InputError for contradictory or miscounted inputs.
        """
        encoded = dict(mm_encoder_outputs or {})
        for kind, pixels in (("image", pixel_values), ("video", pixel_values_videos)):
            if pixels is not None and encoded.get(kind) is not None:
                raise InputError(f"both pixels and mm_encoder_outputs were given for {kind}s; give one of them")
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, image_grids)
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_frames)
        images, videos = (_features(encoded.get(kind)) for kind in ("image", "video"))

        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("forward needs input_ids or inputs_embeds; neither was given")
            if not images and not videos and (past_key_values is None or past_key_values.get_seq_length() == 0):
                self._refuse_placeholders(input_ids)
            inputs_embeds = self.embed(input_ids, images, videos)
        elif images or videos:
            raise InputError("inputs_embeds cannot be combined with pictures; use embed() to place them")

        outputs = self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        maps = [o.tower_features for o in encoded.values() if o is not None and o.tower_features is not None]
        return NvilaOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=images or None,
            tower_features=torch.cat(maps) if output_tower_features and maps else None,
        )


def _place(embeds: Tensor, where: Tensor, features: Sequence[Tensor], kind: str) -> Tensor:
    if not features:
        return embeds  # a decoding step may well produce a placeholder id: it is then an ordinary token
    flat = torch.cat(list(features)).to(embeds)
    slots = where.flatten().nonzero().squeeze(1)
    if slots.shape[0] != flat.shape[0]:
        raise InputError(
            f"input_ids hold {slots.shape[0]} {kind} placeholders, the pixels give {flat.shape[0]} {kind} features; "
            "build both from one plan"
        )
    # index_copy and not masked_scatter: its backward is a gather, without a mask as large as the embeddings
    return embeds.flatten(0, 1).index_copy(0, slots, flat).view_as(embeds)


def _features(output: Any) -> list[Tensor]:
    if output is None or output.pooler_output is None:
        return []
    pooled = output.pooler_output
    if isinstance(pooled, Tensor):
        return [pooled.reshape(-1, pooled.shape[-1])]
    return list(pooled)


def _pairs(grids: Tensor | Sequence[Grid] | None, count: int) -> list[Grid]:
    if grids is None:
        return [(0, 0)] * count
    return [(int(r), int(c)) for r, c in (grids.tolist() if isinstance(grids, Tensor) else grids)]


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
