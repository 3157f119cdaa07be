"""A small tokenizer of one's own: byte-level BPE, learned from the texts that a model is trained on."""

from collections.abc import Iterable
from typing import Any

from ..tokenizer import Tokenizer
from ..tokenizer_backends import Fast, need

END = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """A byte-level BPE tokenizer (GPT-2's kind: any text has ids, and comes back unchanged) of `vocab_size` tokens.

    Id 0 is `<|endoftext|>`, the eos, ids 1 to 256 are bytes, the rest merges in the order they were learned in. The
    same documents give the same tokenizer. `Tokenizer.save` writes it for `load_tokenizer` and for transformers.
    Raises `ValueError` for fewer than 257 tokens, and for texts too small to learn so many from.

    >>> tokenizer = train_tokenizer(["the cat and the hat " * 20], vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("the café")), tokenizer.vocab_size, tokenizer.eos_token_ids
    ('the café', 260, (0,))
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size: {vocab_size}; 256 bytes and {END} make 257")
    tokenizers = need("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = byte_level(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    made.train_from_iterator(documents, trainer)
    if (found := made.get_vocab_size()) < vocab_size:
        raise ValueError(f"vocab_size: {vocab_size}, but the texts give {found} tokens only")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["eos_token"] = END
    return Tokenizer(Fast(made, config), config, {})
