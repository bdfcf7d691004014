"""The NVILA model: encoder algebra, placing features, batching, packing, precision, presets, initial values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.errors import CheckpointError, InputError, UnknownNameError
from foveate.nvila import PRESETS, NvilaConfig, NvilaForConditionalGeneration, VisualFeatures, build
from foveate.nvila.connector import Projector, VisualPosition
from foveate.nvila.features import join_tiles, pool_frames, resize_area, split_tiles
from foveate.nvila.initialise import empty_model, random_model

IMAGE, VIDEO = 1022, 1023
SPLIT = (2, 2)  # a square picture of nano: one tile of 64 px and four of 128 px, 64 tokens


@pytest.fixture(scope="module")
def nano() -> NvilaForConditionalGeneration:
    return build("nano", seed=1).eval()


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int | list[int], seed: int = 0) -> torch.Tensor:
    """Ids [L]: a number is that many random text tokens, a list [token, count] a run of placeholders."""
    generator = torch.Generator().manual_seed(seed)
    runs = [
        torch.full((p[1],), p[0]) if isinstance(p, list) else torch.randint(0, 1000, (p,), generator=generator)
        for p in parts
    ]
    return torch.cat(runs)


def test_nvila_area_resize_equals_interpolate() -> None:
    maps = torch.randn(2, 4, 8, 3)
    for rows, columns in ((4, 8), (8, 16), (12, 8), (5, 9), (2, 3), (8, 3)):
        expected = F.interpolate(maps.permute(0, 3, 1, 2), (rows, columns), mode="area").permute(0, 2, 3, 1)
        torch.testing.assert_close(resize_area(maps, rows, columns), expected)
    assert resize_area(maps.bfloat16(), 5, 9).dtype == torch.bfloat16


def test_nvila_join_and_split_are_inverse() -> None:
    tiles = torch.randn(2, 6, 4, 4, 3)
    joined = join_tiles(tiles, 2, 3)
    assert torch.equal(joined[:, :4, 4:8], tiles[:, 1])  # raster order: the second tile is right of the first
    assert torch.equal(split_tiles(joined, 2, 3), tiles)


def test_nvila_pooling_averages_a_shorter_last_group() -> None:
    frames = torch.randn(7, 4, 4, 5)
    pooled = pool_frames(frames, (2, 1, 1))
    assert pooled.shape == (4, 4, 4, 5)
    torch.testing.assert_close(pooled[1], frames[2:4].mean(0))
    torch.testing.assert_close(pooled[3], frames[6])
    assert pool_frames(frames, (8, 3, 2)).shape == (1, 2, 2, 5)
    torch.testing.assert_close(pool_frames(frames, (8, 3, 2))[0, 1, 0], frames[:, 3:, :2].mean((0, 1, 2)))


@torch.no_grad()
def test_nvila_clip_of_seven_frames(nano: NvilaForConditionalGeneration) -> None:
    clip = pixels(7)
    position = nano.mm_projector.position
    found = nano.get_video_features(clip, torch.tensor([7])).pooler_output
    assert [f.shape for f in found] == [(4 * 16, 128)]
    apart = nano._project(nano.tower(clip).repeat(1, 1, 2))
    groups = torch.stack([apart[i : i + 2].mean(0) for i in range(0, 7, 2)])
    torch.testing.assert_close(found[0], position(groups, is_video=True).flatten(0, 2))
    two = nano.get_video_features(torch.cat([clip, pixels(3, seed=5)]), [7, 3]).pooler_output
    torch.testing.assert_close(two[0], found[0])
    assert two[1].shape == (2 * 16, 128)


@torch.no_grad()
def test_nvila_mixed_grids_equal_each_alone(nano: NvilaForConditionalGeneration) -> None:
    grids, counts = [SPLIT, (0, 0), (2, 3), SPLIT, (1, 5)], [5, 1, 7, 5, 6]
    tiles = pixels(sum(counts))
    together = nano.get_image_features(tiles, torch.tensor(grids)).pooler_output
    assert [len(f) for f in together] == [64, 16, 96, 64, 80]
    for grid, part, found in zip(grids, tiles.split(counts), together):
        torch.testing.assert_close(nano.get_image_features(part, [grid]).pooler_output[0], found)


@torch.no_grad()
def test_nvila_tokens_run_over_the_whole_picture(nano: NvilaForConditionalGeneration) -> None:
    """Changing the top right tile of the last scale moves the top right tokens only (no position or attention leak)."""
    tiles = pixels(5)
    other = tiles.clone()
    other[2] = pixels(1, seed=9)[0]
    before, after = (nano.get_image_features(t, [SPLIT]).pooler_output[0].view(8, 8, -1) for t in (tiles, other))
    changed = (before != after).any(-1)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 4:] = True
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_nvila_layers_after_the_feature_layer_do_not_run(nano: NvilaForConditionalGeneration) -> None:
    config = PRESETS.get("nano").config(vision_feature_layer=-2)
    model = NvilaForConditionalGeneration(config).eval()
    expected = model.tower(pixels(2))
    for part in (model.vision_tower.encoder.layers[-1], model.vision_tower.post_layernorm):
        for parameter in part.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(model.tower(pixels(2)), expected)
    hidden = nano.vision_tower(pixels(2), output_hidden_states=True).hidden_states
    torch.testing.assert_close(nano.tower(pixels(2)), hidden[-1])
    with pytest.raises(CheckpointError, match="vision_feature_layer is -6"):
        PRESETS.get("nano").config(vision_feature_layer=-6)


@torch.no_grad()
def test_nvila_positions_are_relative() -> None:
    position = VisualPosition(8, 8, 4, width=6)
    for table in position.parameters():
        table.normal_()
    zeros = torch.zeros(2, 16, 8, 6)
    rows = F.interpolate(position.rows.T[None], size=16, mode="linear", align_corners=False)[0].T
    found = position(zeros)
    torch.testing.assert_close(found, (rows[:, None] + position.columns[None])[None].expand(2, -1, -1, -1))
    clip = position(torch.zeros(4, 8, 8, 6), is_video=True)
    torch.testing.assert_close(clip - position(torch.zeros(4, 8, 8, 6)), position.times[:, None, None].expand_as(clip))
    assert VisualPosition(8, 0, 0, 6).columns is None


def test_nvila_options_are_off_in_published_presets() -> None:
    projector = Projector("mlp_downsample", 12, 8)
    assert projector.output_norm is None and projector.position is None
    normed = Projector("mlp_downsample", 12, 8, output_norm=True)(torch.randn(2, 16, 12))
    torch.testing.assert_close(normed.pow(2).mean(-1), torch.ones(2, 4), atol=1e-3, rtol=0)
    with pytest.raises(UnknownNameError, match="mlp_upsample"):
        Projector("mlp_upsample", 12, 8)
    assert not PRESETS.get("nvila-8b").config().projector_output_norm


@torch.no_grad()
def test_nvila_features_go_to_their_placeholders(nano: NvilaForConditionalGeneration) -> None:
    ids = torch.stack(
        [prompt(3, [IMAGE, 64], 2, [VIDEO, 16], 4, seed=1), prompt(5, [IMAGE, 64], [VIDEO, 16], 4, seed=2)]
    )
    images = nano.get_image_features(pixels(10), [SPLIT, SPLIT]).pooler_output
    clips = nano.get_video_features(pixels(4, seed=3), [2, 2]).pooler_output
    embeds = nano.embed(ids, images, clips)
    for row in range(2):
        torch.testing.assert_close(embeds[row][ids[row] == IMAGE], images[row])
        torch.testing.assert_close(embeds[row][ids[row] == VIDEO], clips[row])
    text = (ids != IMAGE) & (ids != VIDEO)
    assert torch.equal(embeds[text], nano.get_input_embeddings()(ids[text]))


@torch.no_grad()
def test_nvila_wrong_counts_name_both_numbers(nano: NvilaForConditionalGeneration) -> None:
    ids = prompt(3, [IMAGE, 63], 4)[None]
    with pytest.raises(InputError, match="63 image placeholders, the pixels give 64 image features"):
        nano(input_ids=ids, pixel_values=pixels(5), image_grids=[SPLIT])
    with pytest.raises(InputError, match="63 image placeholders, but 0 image features"):
        nano(input_ids=ids)
    with pytest.raises(InputError, match=r"hold 4 tiles, image_grids .* ask for 5"):
        nano.get_image_features(pixels(4), [SPLIT])
    with pytest.raises(InputError, match=r"hold 4 frames, video_frames \[3\] ask for 3"):
        nano.get_video_features(pixels(4), [3])
    out = nano.get_image_features(pixels(5), [SPLIT])
    with pytest.raises(InputError, match="both pixels and mm_encoder_outputs"):
        nano(input_ids=ids, pixel_values=pixels(5), mm_encoder_outputs={"image": out})
    with pytest.raises(InputError, match="neither"):
        nano(pixel_values=pixels(5))


@torch.no_grad()
def test_nvila_encoder_outputs_replace_pixels(nano: NvilaForConditionalGeneration) -> None:
    ids = prompt(3, [IMAGE, 64], 4)[None]
    given = nano(input_ids=ids, pixel_values=pixels(5), image_grids=[SPLIT], output_tower_features=True)
    encoded = nano.get_image_features(pixels(5), [SPLIT])
    assert torch.equal(nano(input_ids=ids, mm_encoder_outputs={"image": encoded}).logits, given.logits)
    assert torch.equal(given.tower_features, nano.tower(pixels(5)))
    fewer = VisualFeatures(pooler_output=[encoded.pooler_output[0][:10]])
    short = prompt(3, [IMAGE, 10], 4)[None]
    made = nano.generate(input_ids=short, mm_encoder_outputs={"image": fewer}, max_new_tokens=3, pad_token_id=0)
    assert made.shape == (1, short.shape[1] + 3)


@torch.no_grad()
def test_nvila_eager_equals_sdpa(nano: NvilaForConditionalGeneration) -> None:
    inputs = {"input_ids": prompt(3, [IMAGE, 64], 4)[None], "pixel_values": pixels(5), "image_grids": [SPLIT]}
    expected = nano(**inputs).logits
    eager = build("nano", seed=1, attn="eager").eval()
    assert eager.vision_tower.config._attn_implementation == eager.llm.config._attn_implementation == "eager"
    assert nano.vision_tower.config._attn_implementation == nano.llm.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nvila_left_padded_batch_equals_each_alone(nano: NvilaForConditionalGeneration) -> None:
    alone = [prompt(3, [IMAGE, 64], 4, seed=1), prompt(2, [IMAGE, 16], 9, seed=2), prompt(12, seed=3)]
    grids, counts = [SPLIT, (0, 0)], [5, 1]
    tiles = pixels(6)
    length = max(map(len, alone))
    ids = torch.stack([F.pad(row, (length - len(row), 0), value=0) for row in alone])
    mask = torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in alone])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    batch = nano.generate(input_ids=ids, attention_mask=mask, pixel_values=tiles, image_grids=grids, **options)
    logits = nano(input_ids=ids, attention_mask=mask, pixel_values=tiles, image_grids=grids, logits_to_keep=1).logits
    start = 0
    for i, row in enumerate(alone):
        media = {}
        if i < len(grids):
            media = {"pixel_values": tiles[start : start + counts[i]], "image_grids": [grids[i]]}
            start += counts[i]
        torch.testing.assert_close(nano(input_ids=row[None], **media).logits[:, -1], logits[i], atol=1e-4, rtol=1e-4)
        single = nano.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **media, **options)
        assert single[0, len(row) :].tolist() == batch[i, length:].tolist()


@torch.no_grad()
def test_nvila_cached_decoding_equals_uncached(nano: NvilaForConditionalGeneration) -> None:
    inputs = {"input_ids": prompt(3, [IMAGE, 64], 4)[None], "pixel_values": pixels(5), "image_grids": [SPLIT]}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = nano.generate(**inputs, **options)
    assert torch.equal(nano.generate(**inputs, use_cache=False, **options), cached)
    beams = nano.generate(**inputs, num_beams=3, **options)
    assert beams.shape == cached.shape


@torch.no_grad()
def test_nvila_packed_row_equals_sequences_apart(nano: NvilaForConditionalGeneration) -> None:
    rows = [prompt(3, [IMAGE, 64], 4, seed=1), prompt(2, [IMAGE, 16], 9, seed=2)]
    tiles = pixels(6)
    owner = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    allowed = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner)).tril().bool()
    mask = torch.zeros(1, 1, len(owner), len(owner)).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = nano(
        input_ids=torch.cat(rows)[None],
        attention_mask=mask,
        position_ids=positions,
        pixel_values=tiles,
        image_grids=[SPLIT, (0, 0)],
        use_cache=False,
    ).logits[0]
    first = nano(input_ids=rows[0][None], pixel_values=tiles[:5], image_grids=[SPLIT]).logits[0]
    second = nano(input_ids=rows[1][None], pixel_values=tiles[5:]).logits[0]
    torch.testing.assert_close(packed, torch.cat([first, second]), atol=1e-4, rtol=1e-4)
    # rotary positions are relative, so a shift proves nothing: stretch them
    ids, stretched = rows[1][None], 3 * torch.arange(len(rows[1]))[None]
    features = nano.get_image_features(tiles[5:]).pooler_output
    direct = nano.llm(inputs_embeds=nano.embed(ids, features), position_ids=stretched).logits[0]
    assert torch.equal(nano(input_ids=ids, position_ids=stretched, pixel_values=tiles[5:]).logits[0], direct)
    assert (direct - second).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_nvila_half_precision_runs(dtype: torch.dtype) -> None:
    model = build("nano", dtype, seed=1).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    inputs = {"input_ids": prompt(3, [IMAGE, 64], 4)[None], "pixel_values": pixels(5), "image_grids": [SPLIT]}
    logits = model(**inputs).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    exact = build("nano", seed=1).eval()
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    torch.testing.assert_close(logits.float(), exact(**inputs).logits, atol=0.08, rtol=0.05)
    assert model.generate(**inputs, max_new_tokens=2, pad_token_id=0).shape[1] == inputs["input_ids"].shape[1] + 2


def test_nvila_gradients_reach_every_trained_part() -> None:
    model = build("nano", seed=1)
    ids = prompt(3, [IMAGE, 64], 2, [VIDEO, 32], 4)[None]
    inputs = {"pixel_values": pixels(5), "image_grids": [SPLIT], "pixel_values_videos": pixels(3), "video_frames": [3]}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    missing = {n for n, _ in model.named_parameters()} - set(plain)
    assert missing == {"vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"}
    assert all(grad.abs().sum() > 0 for name, grad in plain.items() if "k_proj.bias" not in name)

    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert all(layer.gradient_checkpointing for layer in model.vision_tower.encoder.layers)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-5)


def test_nvila_autocast_trains_without_a_warning() -> None:
    model = build("nano", seed=1, attn="eager")
    ids = prompt(3, [IMAGE, 64], 4)[None]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, pixel_values=pixels(5), image_grids=[SPLIT]).loss
    loss.backward()
    assert loss.isfinite()


def test_nvila_published_sizes() -> None:
    """Parameter counts that the published files have, without allocating a weight."""

    def count(part: torch.nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    base = empty_model(PRESETS.get("nvila-8b").config())
    assert count(base.vision_tower) == 413_327_088
    assert count(base.mm_projector) == 62_425_088
    assert all(p.is_meta for p in base.parameters())
    assert count(empty_model(PRESETS.get("nvila-lite-8b").config()).mm_projector) == 61_101_440
    lite = empty_model(PRESETS.get("nvila-lite-2b").config())
    assert lite.llm.lm_head.weight is lite.llm.model.embed_tokens.weight
    assert PRESETS.get("nvila-8b-video").config().video_pool_sizes == [[8, 1, 1]]
    assert PRESETS.get("nvila-15b").config().text_config.num_hidden_layers == 48
    with pytest.raises(UnknownNameError, match="nvila-8b"):
        build("nvila-8x")


@torch.no_grad()
def test_nvila_nano_starts_balanced() -> None:
    model = build("nano", seed=3)
    parameters = dict(model.named_parameters())
    assert 1.4e6 < sum(p.numel() for p in parameters.values()) < 1.7e6
    assert torch.equal(build("nano", seed=3).llm.lm_head.weight, model.llm.lm_head.weight)
    assert not torch.equal(build("nano", seed=4).llm.lm_head.weight, model.llm.lm_head.weight)

    expected = {
        "llm.model.embed_tokens.weight": 1.0,
        "llm.lm_head.weight": 0.1 / 128**0.5,
        "vision_tower.embeddings.position_embedding.weight": 0.3,
        "mm_projector.layers.2.weight": 768**-0.5,
        "llm.model.layers.1.mlp.down_proj.weight": (320 * 8) ** -0.5,
        "vision_tower.encoder.layers.0.self_attn.out_proj.weight": (96 * 8) ** -0.5,
    }
    for name, std in expected.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.06), name
    assert all(p.abs().sum() == 0 for n, p in parameters.items() if n.endswith("bias"))
    tokens = model.get_image_features(pixels(5), [SPLIT]).pooler_output[0]
    assert tokens.shape == (64, 128) and 0.8 < tokens.pow(2).mean() < 2.0


@torch.no_grad()
def test_nvila_random_weights_keep_the_tied_head() -> None:
    config = PRESETS.get("nano").config()
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = random_model(config, torch.bfloat16)
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    assert model.llm.lm_head.weight.dtype == torch.bfloat16
    assert not any(b.is_meta for b in model.buffers())
    logits = model(input_ids=prompt(3, [IMAGE, 64], 4)[None], pixel_values=pixels(5), image_grids=[SPLIT]).logits
    assert logits.isfinite().all()


def test_nvila_config_round_trip_and_contradictions() -> None:
    config = PRESETS.get("nano").config()
    again = NvilaConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() and again.spec == config.spec
    assert NvilaConfig().spec.tile_size == 448
    with pytest.raises(CheckpointError, match="joins 3 x 3 patches"):
        PRESETS.get("nano").config(projector_type="mlp_downsample_3x3_fix")
    with pytest.raises(CheckpointError, match="the tower takes 224 px"):
        NvilaConfig(vision_config={"image_size": 224, "patch_size": 14})
