"""The page of `moe-jax inspect`: what is in it, that no text becomes markup, and how it behaves in a browser."""

import base64
import json
import re

import browser
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import moe_jax
from moe_jax.cli import main
from moe_jax.inspect import usage
from moe_jax.inspect.page import page
from moe_jax.model import Model, tiny_config
from moe_jax.tokenizer import load_tokenizer
from moe_jax.upcycle import tiny_llama

WORDS = [
    "<end>",
    "the",
    "cat",
    "sat",
    "</script><script>window.broken=1</script>",
    "<img/src=x/onerror=broken()>",
    "&lt;",
]
TEXT = " ".join(WORDS[1:] * 9 + ["the", "cat"] * 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with one tokenizer, a dense one with the same, and a text."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for seed, (name, config) in enumerate({"one": tiny_config(), "two": tiny_config(), "dense": tiny_llama()}.items()):
        moe_jax.save_pretrained(Model.initialize(config, seed=seed), path / name)
        tokenizer.save(str(path / name / "tokenizer.json"))
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def report(folders):
    """What the command writes, comparing two models."""
    out = folders / "report"
    given = ["--text", str(folders / "text.txt"), "--out", str(out), "--window", "16"]
    assert main(["inspect", str(folders / "one"), *given, "--compare", str(folders / "two")]) == 0
    return out


def data_of(html: str):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_holds_what_was_counted(folders, report):
    data = data_of((report / "index.html").read_text(encoding="utf-8"))
    model, tokenizer = moe_jax.load_pretrained(folders / "one"), load_tokenizer(folders / "one")
    found = usage(model, tokenizer.encode(TEXT), window=16)
    assert data["title"] == "one" and data["other"] == "two" and data["tokens"] == found.tokens == 66
    assert data["counts"] == [count.tolist() for count in found.counts]
    assert data["pairs"][1][3] == found.co_activation(1)[3].tolist()
    for layer, expert in np.ndindex(2, 4):
        frequent, _, contexts = data["cells"][layer][expert]
        examples = found.examples(layer, expert, 10)
        assert [t[:2] for t in frequent] == [[tokenizer.decode([t.token]), t.count] for t in examples.frequent]
        assert [position for position, _ in contexts] == [c.position for c in examples.contexts[:4]]
    text = "".join(data["pieces"]["texts"][i] for i in data["pieces"]["at"])
    assert text == tokenizer.decode(found.ids)
    assert "total variation" in data["table"]["head"] and len(data["metrics"]) == 5


def test_no_text_becomes_markup(folders, report):
    html = (report / "index.html").read_text(encoding="utf-8")
    assert len(re.findall("<script", html)) == 2 and len(re.findall("</script", html)) == 2
    assert "<img" not in html and "broken" in html
    around = html.split('id="data"')[0]
    assert not re.search(r'(src|href)=(?!"data:)|@import|url\(|https?://', around)
    tokenizer = load_tokenizer(folders / "one")
    found = usage(moe_jax.load_pretrained(folders / "one"), [1, 2, 3])
    title = "</title></script><script>/*data*/\u2028"
    assert data_of(page(found, tokenizer, title))["title"] == title


def test_heat_maps_are_written(report):
    for name in ("usage.png", "co_activation.png"):
        assert (report / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table(folders, tmp_path, capsys):
    given = ["inspect", str(folders / "one"), "--text", str(folders / "text.txt"), "--out", str(tmp_path)]
    assert main(given) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "imbalance" in head and len(rows) == 2 and rows[0].split()[:2] == ["0", "4"]
    assert main([*given, "--json", "--max-tokens", "5", "--compare", str(folders / "one"), "--dtype", "bfloat16"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tokens"] == 5 and [sum(count) for count in values["counts"]] == [10, 10]
    assert values["drift"]["agreement"] == [1, 1]


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("dense", [], "llama model has no MoE layers"),
        ("one", ["--max-tokens", "0"], "max_tokens: expected at least 1, got 0"),
        ("one", ["--window", "0"], "window: expected an integer of at least 1, got 0"),
        ("one", ["--compare", "nowhere"], "neither a folder nor a hub id"),
        ("one", ["--compare", "dense"], "no MoE layers"),
    ],
)
def test_errors_are_one_line(model, given, message, folders, tmp_path, capsys):
    given = [str(folders / "dense") if value == "dense" else value for value in given]
    text = ["--text", str(folders / "text.txt"), "--out", str(tmp_path / "out")]
    assert main(["inspect", str(folders / model), *text, *given]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


needs_chromium = pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(report, tmp_path, dark):
    file = report / "index.html"
    data = data_of(file.read_text(encoding="utf-8"))
    with browser.Page(file, tmp_path / "profile", dark=dark) as at:
        assert at.evaluate("document.querySelectorAll('#map td').length") == 8
        at.mouse('#map td[data-layer="1"][data-expert="2"]')
        shown = at.evaluate("document.getElementById('detail').textContent")
        assert "Layer 1, expert 2" in shown and f"{data['counts'][1][2]} of 132" in shown
        assert all(text.replace(" ", "␣") in shown for text, *_ in data["cells"][1][2][0])
        at.evaluate("document.querySelector('#map td[tabindex=\"0\"]').focus()")
        at.key("ArrowRight")
        assert "Layer 0, expert 1" in at.evaluate("document.getElementById('detail').textContent")
        assert at.evaluate("document.querySelectorAll('#detail mark').length") == len(data["cells"][0][1][2])

        check_colours(at, data, layer=0, rank=0)
        choose(at, "layer", 1)
        choose(at, "rank", 1)
        check_colours(at, data, layer=1, rank=1)
        at.mouse("#legend button:nth-child(3)", click=True)  # expert 2
        hits = at.evaluate("[...document.querySelectorAll('#text span[data-expert]')].map(s => Number(s.dataset.at))")
        assert hits == np.flatnonzero((choices_of(data)[1] == 2).any(-1)).tolist()
        assert f"{len(hits)} of the 66 tokens go to expert 2" in at.evaluate(
            "document.getElementById('count').textContent"
        )
        at.key("Escape")
        check_colours(at, data, layer=1, rank=1)

        at.mouse("#pairs")
        assert "Expert 2 serves" in at.evaluate("document.getElementById('pair').textContent")
        at.evaluate("document.getElementById('pairs').focus()")
        at.key("ArrowLeft")
        both = data["pairs"][1][2][1]
        assert f"expert 1 serves {both} tokens" in at.evaluate("document.getElementById('pair').textContent")
        choose(at, "metric", 4)
        assert at.evaluate("document.querySelectorAll('#layers tr').length") == 3
        assert at.evaluate("typeof window.broken") == "undefined"
        assert at.errors == [] and at.requests == [file.resolve().as_uri()]


def choices_of(data) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(data["choices"]), "<i2")
    return flat.reshape(len(data["layers"]), data["shown"], data["chosen"])


def choose(at: browser.Page, select: str, value: int) -> None:
    find = f"document.getElementById('{select}')"
    at.evaluate(f"{find}.value = {value}; {find}.dispatchEvent(new Event('change'))")


def check_colours(at: browser.Page, data, layer: int, rank: int) -> None:
    """Tokens of one expert have one colour, those of different experts different ones."""
    colours = at.evaluate("[...document.querySelectorAll('#text span')].map(s => getComputedStyle(s).backgroundColor)")
    experts = choices_of(data)[layer, :, rank].tolist()
    assert len(set(zip(experts, colours, strict=True))) == len(set(experts)) == len(set(colours)) > 1
