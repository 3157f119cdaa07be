"""Perplexity of the demo model, upcycled to four experts, in float32, in bfloat16 and with int8 kernels.

    python scripts/perplexity.py --text botchan.txt --tokens 3000
    python scripts/perplexity.py --text botchan.txt --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16

The text that they are judged by is `test/botchan.txt` of sentencepiece 0.2.3's source distribution (PyPI). `--dtype`:
what int8 kernels are widened to. Exits with 1 where bfloat16 moves the perplexity by 0.2 percent or int8 by 1 percent.
"""

import argparse
import time
from pathlib import Path

import jax

from moe_jax.checkpoint.gguf import GGUFFile
from moe_jax.demo import fetch_demo
from moe_jax.pretrained import load_pretrained
from moe_jax.quantize import quantize
from moe_jax.text import score
from moe_jax.tokenizer import tokenizer_from_gguf
from moe_jax.upcycle import upcycle

_BFLOAT16, _INT8 = 0.002, 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, type=Path, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=3000, help="how many of its tokens, from the beginning")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once; windows overlap by half")
    parser.add_argument("--groups", type=int, nargs="*", default=[128], help="group sizes beside per-channel scales")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a Llama GGUF file (default: the demo's, fetched)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the models in int8")
    options = parser.parse_args()

    path = options.model or fetch_demo()
    ids = tokenizer_from_gguf(GGUFFile(path)).encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    model = upcycle(load_pretrained(path, dtype="float32"))

    def measure(name, model):
        begin = time.perf_counter()
        found = score(model, ids, options.window).perplexity
        size = sum(array.nbytes for array in jax.tree.leaves(model.arrays()))
        rise = 100 * (found / plain - 1) if plain else 0.0
        seconds = time.perf_counter() - begin
        print(f"{name:<24} {size / 1e6:8.1f} MB  perplexity {found:9.5f}  {rise:+.4f} %  {seconds:.0f} s", flush=True)
        return found

    plain = None
    print(f"{options.text.name}: {len(ids)} tokens, windows of {options.window}")
    plain = measure("float32", model)
    low = upcycle(load_pretrained(path, dtype="bfloat16"))
    failed = abs(measure("bfloat16", low) / plain - 1) >= _BFLOAT16
    model = model if options.dtype == "float32" else low
    for group_size in (None, *options.groups):
        name = "int8 per channel" if group_size is None else f"int8 groups of {group_size}"
        failed |= abs(measure(name, quantize(model, group_size=group_size)) / plain - 1) >= _INT8
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
