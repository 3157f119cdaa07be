"""Streams and chat templates, on the tiny vocabularies of test_tokenizer."""

import random

import pytest
from test_tokenizer import BYTE, CHATML, SAMPLES, TOKENS, fallback_folder, metadata, piece_folder, piece_model  # noqa: F401 (piece_model is a fixture)

from moe_jax.tokenizer import load_tokenizer, tokenizer_from_gguf


@pytest.fixture(params=["bytes", "pieces", "fallback"])
def any_tokenizer(request, tmp_path, piece_model):  # noqa: F811
    if request.param == "bytes":
        return tokenizer_from_gguf(metadata())
    if request.param == "pieces":
        return load_tokenizer(piece_folder(tmp_path, piece_model))
    return load_tokenizer(fallback_folder(tmp_path))


@pytest.mark.parametrize("skip", [True, False])
def test_stream_is_decode_in_whole_characters(any_tokenizer, skip):
    stream = any_tokenizer.decode_stream(skip)
    for text in SAMPLES:
        ids = any_tokenizer.encode(text)
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.flush() == any_tokenizer.decode(ids, skip)
        if "\ufffd" not in text:
            assert not any("\ufffd" in part for part in parts)


def test_stream_of_arbitrary_ids(any_tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(any_tokenizer.vocab_size) for _ in range(draw.randrange(20))]
        stream = any_tokenizer.decode_stream()
        text = "".join(stream.push(i) for i in ids) + stream.flush()
        expected = any_tokenizer.decode(ids)
        # Llama's decoder in `tokenizers` turns a whole run of bytes to marks after the fact; a stream cannot.
        if "\ufffd" not in expected:
            assert text == expected


def test_stream_of_bytes_is_exact_even_where_malformed():
    tokenizer = tokenizer_from_gguf(metadata())
    draw = random.Random(1)
    for _ in range(300):
        ids = [BYTE + draw.choice([0x61, 0x20, 0xF0, 0x9F, 0x99, 0x82, 0xE4, 0xBD, 0xA0]) for _ in range(12)]
        stream = tokenizer.decode_stream()
        assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids)


def test_stream_gives_text_at_once(tmp_path):
    tokenizer = load_tokenizer(fallback_folder(tmp_path))
    stream = tokenizer.decode_stream()
    smile = [3 + b for b in "🙂".encode()]
    space = tokenizer.encode("a")[0]
    pushed = [stream.push(i) for i in [space, *smile, *smile, space, 2, space]]
    assert pushed == ["a", "", "", "", "🙂", "", "", "", "🙂", " a", "", " a"]
    assert stream.push(smile[0]) == "" and stream.flush() == "\ufffd"
    # After a flush a new text begins, without its leading space.
    assert stream.push(space) == "a"


def chatting(template):
    source = metadata()
    source.metadata["tokenizer.chat_template"] = template
    return tokenizer_from_gguf(source)


def test_chat_ids():
    tokenizer = tokenizer_from_gguf(metadata(add_bos_token=True))
    messages = [{"role": "user", "content": "hello"}]
    prompt = tokenizer.chat(messages)
    # The template writes its own <s>: no other one is put before it.
    assert prompt[0] == 0 and prompt.count(0) == 2 and TOKENS.index("hello") in prompt
    assert tokenizer.decode(prompt, skip_special_tokens=False) == "<s>user\nhello</s><s>assistant\n"
    assert tokenizer.chat(messages, add_generation_prompt=False) == prompt[: prompt.index(1) + 1]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}", "<s></s>False"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "<é>!"),
        ("{{ tools is none }}{{ documents is none }}{{ 'name' in messages[0] }}{{ mood }}", "TrueTrueFalsegood"),
        ("{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = 2 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_chat_template_helpers(template, expected):
    messages = [{"role": "user", "content": "<é>", "name": None}]
    assert chatting(template).render_chat(messages, mood="good") == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("a\n{% if %}", "chat template, line 2"),
    ],
)
def test_chat_template_failures(template, message):
    with pytest.raises(ValueError, match=message):
        chatting(template).chat([{"role": "user", "content": "x"}])


def test_chat_refusals():
    tokenizer = chatting(CHATML)
    for messages in ("hi", {"role": "user"}, ["hi"], [{"content": "hi"}]):
        with pytest.raises(ValueError, match="messages must be a list of mappings"):
            tokenizer.chat(messages)
    with pytest.raises(ValueError, match="no chat template"):
        chatting(None).chat([{"role": "user", "content": "x"}])
