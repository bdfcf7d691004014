"""A tokenizer of bytes, for models of random weights that come without a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD]", "<image>", "<vila/video>", "<vila/sentinel>")


def byte_tokenizer(extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """256 bytes and the special tokens of a Qwen2 chat with media: 263 tokens, one per byte of text.

    extra: more special tokens, for the prompts of another family (`foveate.data.families.family_tokens`).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="[PAD]",
        additional_special_tokens=[t for t in (*SPECIAL_TOKENS, *extra) if t not in ("<|im_end|>", "[PAD]")],
        clean_up_tokenization_spaces=False,
    )
