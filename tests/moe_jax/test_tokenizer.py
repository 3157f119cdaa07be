"""Tokenizers, streams and chat templates on tiny vocabularies made here; ids are worked out by hand."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.tokenizer import load_tokenizer, tokenizer_from_gguf

SAMPLES = [
    "",
    " ",
    "hello",
    " hello  world",
    "a\n\n b\t",
    "1984",
    "naïve 日本語 🙂👩‍👩‍👧",
    "tail ",
    "\ufffd x",
    "<s>",
    "x</s> y",
]
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def byte_letters():
    """GPT-2's letter for each byte: itself where it prints, else the next letter from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + k) for k, b in enumerate(hidden)}


LETTERS = byte_letters()
TOKENS = ["<s>", "</s>", "<user>"] + [LETTERS[b] for b in range(256)] + ["he", "ll", "hell", "hello", "Ġhello", "19"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 9"]
BYTE = 3  # id of byte 0


def metadata(**changes):
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 1,
    } | changes
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return SimpleNamespace(metadata=named | {"tokenizer.chat_template": CHATML})


def sentencepiece_model(**options):
    import sentencepiece

    sink = io.BytesIO()
    lines = ["hello world the cat sat on the mat", "a naïve test of hello, hello again", "one two  three   four"] * 5
    defaults = {"vocab_size": 310, "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    defaults |= {"normalization_rule_name": "identity", "minloglevel": 2, "hard_vocab_limit": False, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=sink, **defaults | options)
    return sink.getvalue()


@pytest.fixture(scope="module")
def piece_model():
    return sentencepiece_model()


def piece_folder(folder, model, **config):
    (folder / "tokenizer.model").write_bytes(model)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def fallback_folder(folder):
    """A tokenizer.json as Llama's: SentencePiece spaces, byte tokens, one leading space stripped."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a", "é"]
    vocab = {word: i for i, word in enumerate(words)}
    model = models.BPE(vocab, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_gguf_ids():
    tokenizer = tokenizer_from_gguf(metadata())
    assert tokenizer.encode("hello hello") == [TOKENS.index("hello"), TOKENS.index("Ġhello")]
    # Digits stand alone, so the merge "1 9" never applies.
    assert tokenizer.encode("x19") == [BYTE + ord(c) for c in "x19"]
    assert tokenizer_from_gguf(metadata(pre="gpt-2")).encode("19") == [TOKENS.index("19")]
    # A control token and a user-defined one in the text become themselves.
    assert tokenizer.encode("<s>he<user>") == [0, TOKENS.index("he"), 2]
    assert tokenizer.decode([0, TOKENS.index("he"), 2, 1]) == "he<user>"
    assert tokenizer.decode(np.array([0, TOKENS.index("he")]), skip_special_tokens=False) == "<s>he"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (0, (1,), 1)
    assert tokenizer.vocab_size == len(TOKENS) and tokenizer.special_ids == {0, 1}
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_gguf_bos_eos_and_stop_ids():
    tokenizer = tokenizer_from_gguf(metadata(add_bos_token=True, add_eos_token=True, eot_token_id=2, eom_token_id=1))
    assert tokenizer.encode("he") == [0, TOKENS.index("he"), 1]
    assert tokenizer.encode("he", add_special_tokens=False) == [TOKENS.index("he")]
    assert tokenizer.eos_token_ids == (1, 2)
    bare = tokenizer_from_gguf(metadata(bos_token_id=None, eos_token_id=None, padding_token_id=None, token_type=None))
    assert (bare.bos_token_id, bare.eos_token_ids, bare.pad_token_id) == (None, (), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "'tokenizer.ggml.model' is 'llama'; known are gpt2"),
        ({"model": None}, "'tokenizer.ggml.model' is None"),
        ({"pre": "qwen2"}, "'tokenizer.ggml.pre' is 'qwen2'; known are gpt-2, smollm"),
        ({"merges": None}, "merges and token_type are missing"),
        ({"tokens": TOKENS[:-1] + ["he"]}, "doubled"),
        ({"token_type": [1]}, "unequal length"),
        ({"merges": ["h q"]}, "merges do not fit"),
        ({"merges": ["h"]}, "merges do not fit"),
    ],
)
def test_gguf_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(metadata(**changes))


def test_save_and_load(tmp_path):
    first = tokenizer_from_gguf(metadata(add_bos_token=True))
    first.save(tmp_path / "new" / "folder")
    second = load_tokenizer(tmp_path / "new" / "folder")
    config = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["eos_token"] == "</s>"
    messages = [{"role": "user", "content": "hello"}]
    assert second.chat(messages) == first.chat(messages) and second.eos_token_ids == first.eos_token_ids
    for text in SAMPLES:
        assert second.encode(text) == first.encode(text)


def test_folder_files_in_order_of_authority(tmp_path):
    tokenizer_from_gguf(metadata()).save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<user>", "eos_token": "<user>", "other": 1}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": null, "pad_token": {"content": "<user>"},'
        ' "chat_template": [{"name": "default", "template": "x"}]}'
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2, 0], "bos_token_id": 0}')
    tokenizer = load_tokenizer(tmp_path)
    # bos: null is meant. eos: the map's, then the generation config's others.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (None, (2, 1, 0), 2)
    assert tokenizer.chat_template == "x" and 2 in tokenizer.special_ids
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(tmp_path).chat_template == "jinja"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (0, (1,), 2)


def test_tokens_that_only_the_config_names(tmp_path):
    tokenizer_from_gguf(metadata()).save(tmp_path)
    number = len(TOKENS)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": {str(number): {"content": "<new>", "special": True}}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<new>") == [number] and tokenizer.vocab_size == number + 1
    path.write_text(json.dumps({"added_tokens_decoder": {str(number + 1): {"content": "<new>"}}}))
    with pytest.raises(OSError, match=f"'<new>' cannot have id {number + 1}"):
        load_tokenizer(tmp_path)


def test_folder_refusals(tmp_path):
    with pytest.raises(OSError, match="no tokenizer.json and no tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(OSError, match="tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match="tokenizer.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "must hold a JSON object, holds list"), ("\xff", "not UTF-8")):
        (tmp_path / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(OSError, match="tokenizer_config.json: " + message):
            load_tokenizer(tmp_path)
    tokenizer_from_gguf(metadata()).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(OSError, match="eos_token '<gone>' is not in the vocabulary"):
        load_tokenizer(tmp_path)


def test_wrong_values():
    tokenizer = tokenizer_from_gguf(metadata())
    with pytest.raises(ValueError, match="text must be str, is bytes"):
        tokenizer.encode(b"x")
    with pytest.raises(ValueError, match="surrogates not allowed at character 1"):
        tokenizer.encode("a\udcff")
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        tokenizer.decode([5, -1])
    with pytest.raises(ValueError, match="must not be negative, got -2"):
        tokenizer.decode_stream().push(-2)
    assert tokenizer.decode([len(TOKENS), 10**6]) == ""


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece", "jinja2"])
def test_absent_packages(tmp_path, monkeypatch, package, piece_model):
    tokenizer = tokenizer_from_gguf(metadata())
    tokenizer.save(tmp_path)
    piece_folder(tmp_path, piece_model)
    if package == "sentencepiece":
        (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OSError, match=rf"{package} is needed.*pip install {package}"):
        tokenizer.chat([{"role": "user", "content": "x"}]) if package == "jinja2" else load_tokenizer(tmp_path)


def test_training_cuts_and_padding_are_off(tmp_path):
    assert len(load_tokenizer(fallback_folder(tmp_path)).encode("a a a a a a")) == 6


def test_sentencepiece_ids(tmp_path, piece_model):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=piece_model)
    tokenizer = load_tokenizer(piece_folder(tmp_path, piece_model))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (1, (2,), None)
    assert tokenizer.vocab_size == model.get_piece_size() and tokenizer.special_ids == {0, 1, 2}
    for text in SAMPLES[:-2]:
        assert tokenizer.encode(text) == [1, *model.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text == model.decode(tokenizer.encode(text))
    # Control tokens in the text become themselves; by default what follows gets its own leading space.
    ids = [*model.encode("x"), 2, *model.encode("hello")]
    assert tokenizer.encode("x</s>hello", add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "x</s> hello"
    assert tokenizer.decode([model.piece_to_id("<0xF0>"), 10**6]) == "\ufffd"


def test_sentencepiece_settings(tmp_path, piece_model):
    added = {"400": {"content": "<end>", "special": True, "rstrip": True}, "401": {"content": "<tool>"}}
    config = {"legacy": False, "add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": added}
    tokenizer = load_tokenizer(piece_folder(tmp_path, piece_model, **config))
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [*plain, 2]
    # No leading space after a special token, and <end> swallows the spaces on its right.
    text = "hello<end>  hello<tool> x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[: len(plain) + 1] == [*plain, 400] and 401 in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<end>hello<tool> x"
    assert tokenizer.decode(ids) == "hellohello<tool> x" and tokenizer.vocab_size == 402
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode(text) == tokenizer.encode(text)


def test_sentencepiece_that_squeezes_spaces(tmp_path):
    import sentencepiece

    proto = sentencepiece_model(remove_extra_whitespaces=True, add_dummy_prefix=True)
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokenizer = load_tokenizer(piece_folder(tmp_path, proto))
    space = model.piece_to_id("▁")
    ids = [space, space, *model.encode("the cat"), space, space, *model.encode("sat")]
    stream = tokenizer.decode_stream()
    assert tokenizer.decode(ids) == model.decode(ids) == "".join(map(stream.push, ids)) + stream.flush()
