"""Cache methods against vectors that the official codes computed."""

from __future__ import annotations

import pytest
import torch

from foveate.cache import nuq, vidkv
from foveate.cache.kivi import dequantize, pack_last, quantize
from foveate.weights.normal_float import normal_float
from goldens_io import golden_cases

KIVI, KVQUANT, VIDKV = (golden_cases("compress", name) for name in ("kivi", "kvquant", "vidkv"))


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., N] as the official codes pack them: int32 words, the first code in the lowest bits."""
    return pack_last(codes, bits).contiguous().view(torch.int32)


@pytest.mark.parametrize("name", KIVI)
def test_compress_kivi_golden(name):
    case = KIVI[name]
    bits, group, path = case.params("bits", "group", "path")
    keys = path.startswith("key")
    states = case.tensor("K" if keys else "V")
    states = states.transpose(-1, -2) if keys else states  # groups of tokens for keys, of channels for values
    codes, scale, low = quantize(states, bits, group)
    packed, back = words(codes, bits), dequantize(codes, scale, low, states.dtype)
    if keys and "transposed" not in path:
        packed, back = packed.transpose(-1, -2), back.transpose(-1, -2)
        scale, low = (part.transpose(-1, -2) for part in (scale, low))
    assert torch.equal(packed, case.tensor("code", "out"))
    assert torch.equal(scale.flatten(), case.tensor("scale", "out").flatten())
    assert torch.equal(low.flatten(), case.tensor("min", "out").flatten())
    if ("out", "deq") in case:
        torch.testing.assert_close(back, case.tensor("deq", "out"), atol=1e-6, rtol=0)


def inertia(states, upper, lower, levels, weights):
    """Weighted squared distance of the normalised inliers to their nearest level."""
    scale, shift = nuq.scale_and_shift(upper, lower)
    inner = (states - shift) / scale
    inside = inner.abs() <= 1
    near = levels[nuq.nearest(inner[inside], levels).long()]
    return float((weights[inside] * (inner[inside] - near) ** 2).sum())


def restored(states, found, scale, shift, levels):
    codes = nuq.encode(states, found, scale, shift, levels)
    return torch.where(found, states, nuq.decode(codes, scale, shift, levels))


@pytest.mark.parametrize("name", [n for n, case in KVQUANT.items() if ("out", "centroids") in case])
def test_compress_kvquant_golden_levels(name):
    case = KVQUANT[name]
    bits, threshold, weighted = case.params("bits", "outlier_threshold", "fisher")
    outliers = 1 - threshold
    keys = name.startswith("K")
    states = case.tensor("K" if keys else "V")
    weights = case.tensor("fisher") if weighted else torch.ones_like(states)
    if keys:
        upper, lower = nuq.key_range(states, outliers)
    else:
        upper, lower = (nuq.quantile(states, q) for q in (nuq.tails(outliers), 1 - nuq.tails(outliers)))
    torch.testing.assert_close(upper, case.tensor("upper", "out"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lower, case.tensor("lower", "out"), atol=1e-5, rtol=1e-5)
    given = case.tensor("centroids", "out").sort().values
    fitted = nuq.fit_levels(states, upper, lower, bits, weights if weighted else None)
    assert fitted.shape == given.shape
    assert inertia(states, upper, lower, fitted, weights) <= 1.02 * inertia(states, upper, lower, given, weights)
    if keys:
        upper, lower = upper.half(), lower.half()
        found = nuq.key_outliers(states, upper, lower)
    else:
        found, upper, lower = nuq.value_range(states, outliers)
    assert torch.equal(found, case.tensor("outlier_mask", "out"))
    back = restored(states, found, *nuq.scale_and_shift(upper, lower), given)
    torch.testing.assert_close(back, case.tensor("deq", "out"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in KVQUANT if "_int_" in n])
def test_compress_kvquant_golden_integers(name):
    case = KVQUANT[name]
    keys = name.startswith("K")
    states, axis = case.tensor("K" if keys else "V"), 0 if keys else 1
    upper, lower = states.amax(axis, keepdim=True), states.amin(axis, keepdim=True)
    whole = bool(case.get(("param", "clamp"), False))
    codes, scale, shift = nuq.integer(states, upper, lower, case["param", "bits"], whole=whole)
    wanted = case.tensor("deq", "out")
    torch.testing.assert_close(codes * scale + shift, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("name", [n for n, case in KVQUANT.items() if ("param", "first_few_fp16") in case])
def test_compress_kvquant_golden_first_tokens(name):
    case = KVQUANT[name]
    threshold, exact, axis = case.params("threshold", "first_few_fp16", "channel")
    states = case.tensor(name[0])
    if axis == 0:
        found = nuq.key_outliers(states, *nuq.key_range(states, 1 - threshold), exact=exact)
    else:
        found = nuq.value_range(states, 1 - threshold)[0]
        found[:exact] = True
    assert torch.equal(found, case.tensor("outlier_mask", "out"))


@pytest.mark.parametrize("name", [n for n, case in KVQUANT.items() if ("out", "signposts") in case])
def test_compress_kvquant_golden_normal_float(name):
    case = KVQUANT[name]
    torch.testing.assert_close(normal_float(case["param", "bits"]), case.tensor("signposts", "out"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [n for n in VIDKV if n.startswith("key")])
def test_compress_vidkv_golden_keys(name):
    case = VIDKV[name]
    group, easy_bits, hard_bits = case.params("group", "easy_bits", "hard_bits")
    keys = case.tensor("K")
    batch, heads, tokens, _ = keys.shape
    chosen = case.tensor("difficult_idx", "out")
    # the official split is over the whole batch; ours is of each page, so the batch stands where heads do
    page = keys.flatten(0, 1)[None, None]
    hard, easy = vidkv.split_channels(page, len(chosen))
    assert torch.equal(hard.flatten(), chosen) and torch.equal(easy.flatten(), case.tensor("easy_idx", "out"))
    codes, scale, low = quantize(keys[..., hard.flatten()].transpose(-1, -2), hard_bits, group)
    assert torch.equal(words(codes, hard_bits), case.tensor("hard_code", "out"))
    torch.testing.assert_close(scale, case.tensor("hard_scale", "out"), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(low, case.tensor("hard_min", "out"), atol=1e-6, rtol=1e-6)
    count = easy.numel()
    half = vidkv.half_spectrum(keys[..., easy.flatten()]).transpose(-1, -2)
    half_codes, half_scale = vidkv.binary(half, group)
    # the official code stores the mirrored half as well, real and imaginary parts in turn
    where = [(0, False)] + [(k, part) for k in range(1, count // 2 + 1) for part in (False, True)]
    column = {place: index for index, place in enumerate(where[:count])}
    official = case.tensor("easy_scale", "out")
    assert official.shape == (batch, heads, 2 * count, tokens // group) and easy_bits == 1
    wanted = case.tensor("easy_code", "out")
    for k in range(count):
        for part in (False, True):
            row, twin = 2 * k + part, (min(k, count - k), part)
            if twin not in column:  # always 0 in exact arithmetic
                assert float(official[:, :, row].abs().max()) < 1e-4
                continue
            index = column[twin]
            torch.testing.assert_close(half_scale[:, :, index], official[:, :, row], atol=1e-4, rtol=1e-4)
            mirrored = part and k > count // 2
            code = 1 - half_codes[:, :, index] if mirrored else half_codes[:, :, index]
            near_zero = half[:, :, index].abs() < 1e-5
            found = words(torch.where(near_zero, 0, code), 1)
            bits = torch.from_numpy(_bits(wanted[:, :, row].numpy(), tokens))
            assert torch.equal(found, words(torch.where(near_zero, 0, bits), 1))


def _bits(packed, count):
    import numpy as np

    return np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")[..., :count]


@pytest.mark.parametrize("name", [n for n in VIDKV if n.startswith("value")])
def test_compress_vidkv_golden_values(name):
    case = VIDKV[name]
    group, bits = case["param", "group"], float(name.rpartition("_")[2])
    values = case.tensor("V").transpose(-1, -2)
    if bits == 1:
        codes, scale = vidkv.binary(values, group)
        packed = words(codes, 1)
    else:
        codes, scale = vidkv.ternary(values, group)
        packed = words((codes + 1).to(torch.uint8), 2)
        assert bool((case.tensor("mn", "out") == -1).all())
    assert torch.equal(packed, case.tensor("code", "out"))
    torch.testing.assert_close(scale, case.tensor("scale", "out"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in VIDKV if n.startswith("value")])
def test_compress_vidkv_golden_scale_is_not_lost(name):
    """The release's dequantiser forgets the scale, so what it reads does not follow the size of the values."""
    case = VIDKV[name]
    group, bits = case["param", "group"], float(name.rpartition("_")[2])
    values = case.tensor("V")
    values = values[:, :, : values.shape[2] // group * group]
    codec = vidkv.ScaleCodec(bits, group)

    def read(states):
        pages = states.unflatten(2, (-1, group)).transpose(1, 2)
        return codec.decode(codec.encode(pages, [0], [pages.shape[1]]), states.dtype).transpose(1, 2).flatten(2, 3)

    assert float((read(values) - values).norm()) < 0.7 * float(values.norm())
    torch.testing.assert_close(read(values / 8) * 8, read(values), atol=1e-2, rtol=2e-3)
