"""Every family of transformers, on a tiny random model: the same logits, tokens and signals as its own code gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import foveate
from families import CLIPS, FAMILIES, clip, picture, tiny
from foveate.data.execute import Inputs, normalise
from foveate.data.plan import Plan
from foveate.errors import CheckpointError, UnsupportedError
from foveate.vlm import VLM, Request

MIXES = {
    "picture": [picture(0)],
    "tall picture": [picture(1, 24, 90)],
    "pictures": [picture(2), picture(3, 40, 64)],
    "text": [],
    "clip": [clip(0)],
    "clip and picture": [clip(1, 4), picture(4)],
}
CASES = [(f, m) for f in FAMILIES for m in MIXES if "clip" not in m or f in CLIPS]
QWEN = [family for family in FAMILIES if family.startswith("qwen")]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def prepared(vlm: VLM, mix: str, text: str = "What is it?") -> tuple[Plan, Inputs]:
    plan = vlm.plan(Request(text, MIXES[mix]).to_messages())
    return plan, vlm.prepare(plan)


def patches(pixels: Tensor, spec: Any, kind: str) -> Tensor:
    """Qwen's patches one by one: those of a merged token together, tokens in raster order, frames in pairs."""
    size, merge, times = spec.patch_size, spec.downsample, spec.temporal_patch
    if kind == "image":
        pixels = torch.stack([pixels[0]] * times)
    rows, cols = pixels.shape[2] // size // merge, pixels.shape[3] // size // merge
    out = []
    for t in range(0, len(pixels), times):
        for token in range(rows * cols):
            for cell in range(merge * merge):
                y = (token // cols * merge + cell // merge) * size
                x = (token % cols * merge + cell % merge) * size
                out.append(pixels[t : t + times, :, y : y + size, x : x + size].transpose(0, 1).flatten())
    return torch.stack(out)


def plain(vlm: VLM, plan: Plan, inputs: Inputs) -> dict[str, Tensor]:
    """What the family's own `forward` and `generate` take for one request."""
    family, spec = vlm.adapter.family, vlm.spec
    ids = torch.as_tensor(plan.input_ids)[None]
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = {
        kind: [normalise(item.pixels, spec) for item in inputs.media if item.kind == kind]
        for kind in ("image", "video")
    }
    if family in QWEN:
        kwargs["mm_token_type_ids"] = (ids == vlm.model.config.image_token_id) + 2 * (
            ids == vlm.model.config.video_token_id
        )
        for kind, name, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            if pixels[kind]:
                kwargs[name] = torch.cat([patches(part, spec, kind) for part in pixels[kind]])
                kwargs[grid] = torch.tensor([item.grid for item in inputs.media if item.kind == kind])
        if family == "qwen2_5_vl" and pixels["video"]:
            seconds = [media.seconds_per_unit for media in plan.media if media.kind == "video"]
            kwargs["second_per_grid_ts"] = torch.tensor(seconds)
        return kwargs
    if family in ("internvl", "smolvlm"):  # one stream of views, frames among them
        views = [normalise(item.pixels, spec) for item in inputs.media]
    else:
        views = pixels["image"]
    if views:
        kwargs["pixel_values"] = torch.cat(views)
        if family in ("smolvlm", "idefics3"):
            kwargs["pixel_values"] = kwargs["pixel_values"][None]
    if family in ("llava_next", "llava_onevision") and pixels["image"]:
        kwargs["image_sizes"] = torch.tensor([item.size[::-1] for item in inputs.media if item.kind == "image"])
    if family == "llava_onevision":
        if pixels["image"]:
            kwargs["batch_num_images"] = torch.tensor([len(pixels["image"])])
        if pixels["video"]:
            kwargs["pixel_values_videos"] = torch.stack(pixels["video"])
    return kwargs


@pytest.mark.parametrize(("family", "mix"), CASES)
def test_logits_are_those_of_the_family_itself(family: str, mix: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, mix)
    expected = vlm.model(**plain(vlm, plan, inputs)).logits[0, -1]
    torch.testing.assert_close(vlm.logits(Request("What is it?", MIXES[mix])), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_decide_the_logits(family: str):
    vlm = tiny(family)
    one, other = (vlm.logits(Request("What is it?", [picture(seed)])) for seed in (0, 1))
    assert (one - other).abs().max() > 0.05


@pytest.mark.parametrize(("family", "mix"), [c for c in CASES if c[1] in ("picture", "text", "clip and picture")])
def test_answers_are_those_of_generate(family: str, mix: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, mix)
    expected = vlm.model.generate(
        **plain(vlm, plan, inputs), max_new_tokens=6, do_sample=False, eos_token_id=vlm.stop_ids, pad_token_id=0
    )
    answer = vlm.respond(Request("What is it?", MIXES[mix]), max_new_tokens=6)
    found = [*answer.ids, *expected[0, plan.num_tokens + len(answer.ids) :].tolist()]  # generate keeps the stop token
    assert found == expected[0, plan.num_tokens :].tolist()
    assert len(found) - len(answer.ids) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_request_alone(family: str):
    vlm = tiny(family)
    requests = [Request(f"What is {mix}?", MIXES[mix]) for f, mix in CASES if f == family]
    together = vlm.answer(requests, max_new_tokens=4)
    for request, answer in zip(requests, together):
        assert answer.ids == vlm.respond(request, max_new_tokens=4).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_two_requests_leave_nothing_behind(family: str):
    """No state of a request stays on the model: the first one's logits are the same after others ran."""
    vlm = tiny(family)
    before = vlm.logits(Request("What?", [picture(0)]))
    vlm.respond(Request("And that?", [picture(5, 100, 30)]), max_new_tokens=3)
    vlm.respond(Request("No picture"), max_new_tokens=3)
    assert torch.equal(before, vlm.logits(Request("What?", [picture(0)])))


# ---- features and signals


@pytest.mark.parametrize(("family", "mix"), [c for c in CASES if c[1] != "text"])
def test_layout_counts_every_feature_and_placeholder(family: str, mix: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, mix)
    layout = vlm.adapter.layout(plan)
    slots = torch.isin(torch.as_tensor(plan.input_ids), torch.tensor(vlm.adapter.placeholders))
    assert torch.equal(layout.position, slots.nonzero().squeeze(1))
    (encoded,) = vlm.adapter.encode([inputs], [plan])
    assert len(encoded.features) == len(layout.features()) == sum(media.num_features for media in plan.media)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_connector_alone_gives_the_features(family: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "pictures")
    (patches_only,) = vlm.adapter.encode([inputs], [plan], stop="post_encoder")
    (whole,) = vlm.adapter.encode([inputs], [plan])
    assert torch.equal(vlm.adapter.connect(patches_only.features), whole.features)


def reference(vlm: VLM, inputs: Inputs) -> Any:
    """Attention maps [V, H, T, T] and states [V, T, C] of every block, by the tower's own code without fast kernels."""
    tower = vlm.adapter.tower
    config, kernel = tower.config, tower.config._attn_implementation
    pixels = torch.cat([normalise(item.pixels, vlm.spec) for item in inputs.media])
    config._attn_implementation = "eager"
    try:
        return tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
    finally:
        config._attn_implementation = kernel


def expected_tokens(vlm: VLM, plan: Plan, values: Tensor) -> Tensor:
    """Values of patches [V, P, ...] -> of tokens, one by one: the mean over the patches that a token joins."""
    side, ratio = vlm.spec.side, vlm.spec.downsample
    layout, out = vlm.adapter.layout(plan).features(), []
    firsts = [0, *np.cumsum([len(media.views) for media in plan.media]).tolist()]
    for media, view, row, col in zip(*(getattr(layout, n).tolist() for n in ("media", "view", "row", "col"))):
        cells = [(row * ratio + y) * side + col * ratio + x for y in range(ratio) for x in range(ratio)]
        out.append(values[firsts[media] + view, cells].mean(dim=0))
    return torch.stack(out)


VIEWS = ["llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3"]


@pytest.mark.parametrize("block", [0, -1])
@pytest.mark.parametrize("family", VIEWS)
def test_signals_are_those_of_the_tower(family: str, block: int):
    vlm = tiny(family)
    adapter = vlm.adapter
    plan, inputs = prepared(vlm, "pictures")
    names = [f"{name}@{block}" for name in adapter.signals[3:]]
    (encoded,) = adapter.encode([inputs], [plan], names)
    found = {name.partition("@")[0]: value for name, value in encoded.signals.items()}
    assert sorted(encoded.signals) == sorted(names)
    out, index = reference(vlm, inputs), block % adapter.num_blocks
    attention, first = out.attentions[index].float(), int(adapter.has_cls)
    check = {"received_attention": attention.mean(dim=2)[:, :, first:].transpose(1, 2)}
    check["hidden"] = out.hidden_states[index + 1][:, first:]
    if adapter.has_cls:
        check["cls_attention"] = attention[:, :, 0, 1:].transpose(1, 2)
    for name, values in check.items():
        torch.testing.assert_close(found[name], expected_tokens(vlm, plan, values), atol=1e-5, rtol=1e-4)
    if adapter.has_cls:  # logits and the states they come from say the same as the map
        logits = found["cls_logits"] - found["cls_attention"].log()
        views = adapter.view_index(plan)[:, 0] if adapter.spec.downsample == 1 else None
        if views is not None:
            assert max(logits[views == view].std(dim=0).max() for view in views.unique()) < 1e-4
            heads = adapter.num_heads
            query, keys = found["cls_query"][views].unflatten(-1, (heads, -1)), found["keys"].unflatten(-1, (heads, -1))
            scale = adapter.attention_of(adapter.blocks[index]).scale
            torch.testing.assert_close((query * keys).sum(-1) * scale, found["cls_logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bare_attention_is_the_mean_over_heads_of_the_last_block(family: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "picture")
    (encoded,) = vlm.adapter.encode([inputs], [plan], ["received_attention", "received_attention@-1"])
    scores, heads = encoded.signals["received_attention"], encoded.signals["received_attention@-1"]
    assert scores.shape == (len(encoded.features),) and heads.shape[1] == vlm.adapter.num_heads
    torch.testing.assert_close(scores, heads.mean(dim=1))
    assert scores.std() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_block_is_refused(family: str):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "picture")
    with pytest.raises(UnsupportedError, match=r"'keys@9' asks for encoder block 9, the tower uses \d"):
        vlm.adapter.encode([inputs], [plan], ["keys@9"])


@pytest.mark.parametrize("family", QWEN)
def test_qwen_signals_are_those_of_the_tower(family: str):
    """Recomputed for the one window or frame of a small picture, where the tower's order is plain."""
    vlm = tiny(family)
    adapter = vlm.adapter
    plan = vlm.plan(Request("What?", [picture(0, 16, 16)]).to_messages())
    inputs = vlm.prepare(plan)
    block, seen = adapter.blocks[1], {}
    handles = [
        block.attn.register_forward_hook(
            lambda m, a, k, o: seen.update(states=a[0] if a else k["hidden_states"], rotary=k["position_embeddings"]),
            with_kwargs=True,
        ),
        block.register_forward_hook(lambda m, a, o: seen.update(hidden=o)),
    ]
    names = ["received_attention@1", "keys@1", "values@1", "hidden@1"]
    (encoded,) = adapter.encode([inputs], [plan], names)
    for handle in handles:
        handle.remove()
    heads, count = adapter.num_heads, len(seen["states"])
    q, k, v = block.attn.qkv(seen["states"]).reshape(count, 3, heads, -1).unbind(1)
    cos, sin = (x[:, None] for x in seen["rotary"])
    turn = lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)  # noqa: E731
    rq, rk = (x * cos + turn(x) * sin for x in (q, k))
    weights = (torch.einsum("qhd,khd->hqk", rq, rk) * q.shape[-1] ** -0.5).softmax(-1)
    check = [weights.mean(dim=1).T, k.flatten(1), v.flatten(1), seen["hidden"]]
    for name, values in zip(names, check):
        torch.testing.assert_close(encoded.signals[name], values.reshape(count // 4, 4, -1).mean(dim=1))


def test_windows_put_signals_at_their_tokens():
    """Qwen2.5-VL's first block sees windows of 2 x 2 tokens: a changed patch changes the states of its window only."""
    vlm = tiny("qwen2_5_vl")
    array = np.array(picture(0, 48, 40))
    plan = vlm.plan(Request("What?", [array]).to_messages())
    changed = array.copy()
    changed[0:2, 40:42] = 255 - changed[0:2, 40:42]
    other = vlm.plan(Request("What?", [changed]).to_messages())
    assert plan.media[0].view_size == (48, 40)
    states = [vlm.adapter.encode([vlm.prepare(p)], [p], ["hidden@0"])[0].signals["hidden@0"] for p in (plan, other)]
    moved = (states[0] - states[1]).abs().amax(dim=1) > 1e-6
    layout = vlm.adapter.layout(plan)
    window = (layout.row // 2 == 0) & (layout.col // 2 == (40 // 8) // 2)
    assert torch.equal(moved, window) and window.sum() == 4


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_tower_in_pieces_gives_the_patches(family: str):
    vlm = tiny(family)
    adapter = vlm.adapter
    plan, inputs = prepared(vlm, "pictures")
    hidden = adapter.tower_embed(inputs, plan)
    for block in adapter.blocks:
        hidden = block(hidden, None)
    index = adapter.view_index(plan)
    (encoded,) = adapter.encode([inputs], [plan], stop="post_encoder")
    torch.testing.assert_close(adapter.tower_finish(hidden)[index[:, 0], index[:, 1]], encoded.features)


# ---- folders


def same_weights(one: VLM, other: VLM) -> bool:
    """Bit for bit, buffers included."""
    left, right = (
        {name: value for model in (vlm.model,) for name, value in (*model.named_parameters(), *model.named_buffers())}
        for vlm in (one, other)
    )
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_a_plain_checkpoint(family: str, tmp_path: Path):
    vlm = tiny(family)
    plan, inputs = prepared(vlm, "picture")
    expected = vlm.logits(Request("What is it?", MIXES["picture"]))
    vlm.save(tmp_path / "model")
    again = foveate.load(tmp_path / "model", device="cpu")
    assert again.adapter.family == family and again.spec == vlm.spec
    assert same_weights(again, vlm)
    torch.testing.assert_close(again.logits(Request("What is it?", MIXES["picture"])), expected, atol=1e-5, rtol=0)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(theirs) is type(vlm.model)
    torch.testing.assert_close(theirs(**plain(vlm, plan, inputs)).logits[0, -1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_transformers_wrote_is_read(family: str, tmp_path: Path):
    vlm = tiny(family)
    vlm.model.save_pretrained(tmp_path)
    vlm.tokenizer.save_pretrained(tmp_path)
    spec = vlm.spec.to_dict()
    (tmp_path / "preprocess.json").write_text(json.dumps(spec))
    again = foveate.load(tmp_path, device="cpu")
    assert same_weights(again, vlm)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "model"
    tiny("llava").save(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    data = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**data, **changes}))


def test_a_missing_tensor_is_named(broken: Path):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.multi_modal_projector.linear_2.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.multi_modal_projector.linear_2.weight' is missing.*\(32, 32\)"):
        foveate.load(broken)


def test_a_wrong_shape_is_named(broken: Path):
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(280, 16)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*has shape \(280, 16\), the config expects \(280, 32\)"):
        foveate.load(broken)


def test_a_pickle_is_refused(broken: Path):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which can run code; convert"):
        foveate.load(broken)


def test_what_does_not_fit_is_said(broken: Path):
    edit(broken, "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="is quantized with awq; give the folder of the unquantized checkpoint"):
        foveate.load(broken)
    edit(broken, "config.json", quantization_config=None, image_token_index=3)
    with pytest.raises(CheckpointError, match="'<image>' is token 260 of the tokenizer, but image_token_id is 3"):
        foveate.load(broken)
    edit(broken, "config.json", image_token_index=260, vision_feature_layer=[-2, -1])
    with pytest.raises(CheckpointError, match=r"vision_feature_layer is \[-2, -1\]: connectors that join several"):
        foveate.load(broken)
    edit(broken, "config.json", vision_feature_layer=-2, vision_feature_select_strategy="full")
    with pytest.raises(CheckpointError, match="with a clip_vision_model tower only 'default' is supported"):
        foveate.load(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; copy the tokenizer files"):
        foveate.load(broken)


def test_an_error_while_saving_leaves_the_old_folder(broken: Path, monkeypatch: pytest.MonkeyPatch):
    before = sorted((path.name, path.read_bytes()) for path in broken.iterdir())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foveate.files, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was changed"):
        tiny("llava").save(broken)
    assert sorted((path.name, path.read_bytes()) for path in broken.iterdir()) == before
    assert sorted(path.name for path in broken.parent.iterdir()) == ["broken"]
