"""Run every stored checkpoint on this machine's default device and compare with transformers' outputs.

    python scripts/check_golden.py [CASE ...]
    python scripts/check_golden.py --dtype bfloat16 [CASE ...]

Full, right- and left-padded runs (logits, hidden states, routing) and greedy ids, in float32 with the highest matmul
precision. Exits with 1 if anything differs beyond the golden tolerances. With `--dtype bfloat16` or float16 greedy ids
are compared with float32's choice for the same prefix instead. A different choice is wrong where its float32 logit lies
further below the best one than rounding can bring it, twice the largest error of any logit at that place, both runs
following the experts that ran: a router's choice that rounding turns changes logits by far more than rounding. How many
of the tokens' experts are float32's own, behind the same experts in the layers before, is counted beside it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import compare  # noqa: E402

import moe_jax  # noqa: E402
from moe_jax.families import FAMILIES  # noqa: E402


def outputs(model: moe_jax.Model, gold) -> dict[str, np.ndarray]:
    """This model's arrays under the golden names, for each way of padding that the case has."""
    found = {}
    for way in ("full", "right", "left"):
        if f"{way}.logits" not in gold:
            continue
        prefix = "" if way == "full" else f"{way}."
        mask = None if way == "full" else gold[f"{way}.attention_mask"]
        record = model(gold[f"{prefix}input_ids"], mask, return_record=True)
        found |= {f"{way}.logits": record.logits, f"{way}.hidden_states": record.hidden_states}
        per_layer = zip(record.router_logits, record.expert_ids, record.expert_weights, strict=True)
        for layer, arrays in zip(model.architecture.moe_layers, per_layer, strict=True):
            names = ("router_logits", "expert_indices", "expert_weights")
            found |= {f"{way}.{name}.layer{layer}": array for name, array in zip(names, arrays, strict=True)}
    prompt, want = gold["prompt_ids"], gold["generated_ids"]
    ids = moe_jax.generate(model, prompt, max_new_tokens=want.shape[1], eos_token_id=())
    found["generated_ids"] = ids[:, prompt.shape[1] :]
    return {name: np.asarray(array) for name, array in found.items() if name in gold}


def greedy(path: Path, dtype: str, gold) -> tuple[int, int, int, str]:
    """Of the ids generated in `dtype`: float32's own choices, others that rounding allows, and wrong ones.

    With words on the experts.
    """
    exact, model = (moe_jax.load_pretrained(path, dtype=kind) for kind in ("float32", dtype))
    prompt, new = gold["prompt_ids"], gold["generated_ids"].shape[1]
    made = moe_jax.generate(model, prompt, max_new_tokens=new, eos_token_id=(), return_record=True)
    start, chosen = prompt.shape[1], made.ids[:, prompt.shape[1] :, None]

    def logits(one, experts):
        return np.asarray(one(made.ids, routing=experts))[:, start - 1 : -1].astype(np.float64)

    def gap(values):
        return values.max(-1) - np.take_along_axis(values, chosen, -1)[..., 0]

    same = gap(logits(exact, None)) == 0
    want, got = (logits(one, made.expert_ids or None) for one in (exact, model))
    allowed = gap(want) <= 2 * np.abs(want - got).max(-1)
    return int(same.sum()), int((~same & allowed).sum()), int((~same & ~allowed).sum()), experts(exact, made)


def experts(exact: moe_jax.Model, made) -> str:
    """On how many tokens' experts `exact` agrees with `made`, each layer given the experts of those before."""
    agreed = total = 0
    for layer, ran in enumerate(made.expert_ids):
        free = [np.where(layer == other, -1, ids) for other, ids in enumerate(made.expert_ids)]
        own = exact(made.ids, routing=free, return_record=True).expert_ids[layer]
        real = (ran >= 0).any(-1)
        agreed, total = agreed + int((own == ran).all(-1)[real].sum()), total + int(real.sum())
    return f"; experts of {agreed} of {total}" if total else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="names of folders in tests/golden/hf; all supported ones without")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    folder, failed = ROOT / "tests" / "golden" / "hf", 0
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for path in sorted(folder / name for name in options.cases) or sorted(folder.iterdir()):
        begin = time.perf_counter()
        if json.loads((path / "config.json").read_text())["model_type"] not in FAMILIES:
            continue
        gold = np.load(path / "expected.npz")
        if options.dtype != "float32":
            same, near, wrong, ran = greedy(path, options.dtype, gold)
            failed += bool(wrong)
            print(f"{path.name}: {same} of {same + near + wrong} ids are float32's, {near} more are within rounding, "
                  f"{wrong} wrong{ran} ({time.perf_counter() - begin:.0f} s)", flush=True)  # fmt: skip
            continue
        model = moe_jax.load_pretrained(path, dtype="float32")
        found = outputs(model, gold)
        wrong = compare.check(f"hf/{path.name}", found)
        failed += bool(wrong)
        worst = np.abs(found["full.logits"] - gold["full.logits"]).max()
        print(f"{path.name}: {'; '.join(wrong) or 'ok'} ({len(found)} arrays, logits within {worst:.1e}, "
              f"{time.perf_counter() - begin:.0f} s)", flush=True)  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
