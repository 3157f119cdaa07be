"""All golden checkpoints: one forward and one generation each, against transformers and against each other."""

import concurrent.futures
import contextvars
import json

import jax
import numpy as np
import pytest
from compare import check
from conftest import GOLDEN, golden_cases
from core_models import folder, golden_arrays, golden_model, only

import moe_jax
from moe_jax import engine

#: Quick: one of each family, and those that share its programs.
QUICK = """deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe_tied hunyuan_v1_moe llama4
llama4_text llama_linear minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe""".split()
CASES = only(QUICK, golden_cases())
WAYS = ("full", "right", "left")


@pytest.fixture(scope="module")
def runs(request):
    """A future per case that a test asks for: two threads compile ahead. Generation reports its steps' logits."""
    sample, steps = engine.sample, {}
    tracing = contextvars.ContextVar("architecture")

    def reporting(sampler, logits, key, seen=None, first=0):
        architecture = tracing.get()  # the program outlives this call, for cases of equal architecture
        jax.debug.callback(lambda row: steps[architecture].append(row), logits)
        return sample(sampler, logits, key, seen, first)

    def run_group(cases):
        architecture = golden_model(cases[0]).architecture
        tracing.set(architecture)
        for case in cases:
            steps[architecture] = []
            try:
                futures[case].set_result(_run(case, steps[architecture]))
            except BaseException as error:
                futures[case].set_exception(error)

    mine = [item for item in request.session.items if "runs" in getattr(item, "fixturenames", ())]
    asked = {item.callspec.params["case"] for item in mine if hasattr(item, "callspec")}
    futures = {case: concurrent.futures.Future() for case in golden_cases() if case in asked}
    groups = {}
    for case in futures:
        groups.setdefault(golden_model(case).architecture, []).append(case)
    _forget()
    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        patch.setattr(engine, "sample", reporting)
        for cases in groups.values():
            pool.submit(contextvars.copy_context().run, run_group, cases)
        yield futures
        pool.shutdown(cancel_futures=True)
    _forget()


def _forget():
    """No other test meets the reporting steps, nor this one steps that do not report."""
    engine.prefill.clear_cache()
    engine.decode.clear_cache()


def _run(case, steps):
    model, gold = golden_model(case), golden_arrays(case)
    records = {}
    for way in WAYS:
        if f"{way}.logits" in gold:
            ids, mask = (gold.get(f"{way}.{name}") for name in ("input_ids", "attention_mask"))
            records[way] = model(gold["input_ids"] if ids is None else ids, mask, return_record=True)
    prompt = gold["prompt_ids"]
    out = moe_jax.generate(model, prompt, max_new_tokens=24, eos_token_id=(), return_record=True)
    jax.effects_barrier()
    written = np.concatenate([prompt, gold["generated_ids"]], 1)
    again = model(np.concatenate([written[:, :17], written[:, 15:]]), return_record=True)
    return records, out, np.stack(steps), again


def _complaints(case, records):
    model, gold = golden_model(case), golden_arrays(case)
    mine = {}
    for way, record in records.items():
        mine[f"{way}.logits"] = record.logits
        mine[f"{way}.hidden_states"] = record.hidden_states
        for i, layer in enumerate(model.architecture.moe_layers):
            mine[f"{way}.router_logits.layer{layer}"] = record.router_logits[i]
            mine[f"{way}.expert_indices.layer{layer}"] = record.expert_ids[i]
            mine[f"{way}.expert_weights.layer{layer}"] = record.expert_weights[i]
    beside = {"last_layer_output", "input_ids", "attention_mask", "position_ids", "logits_computed_in_bfloat16"}
    ours = {k for k in gold if k.split(".")[0] in records and k.split(".")[1] not in beside}
    assert ours >= {f"{way}.logits" for way in records} | {"full.hidden_states"}
    assert set(mine) - ours <= {"left.hidden_states"} and ours <= set(mine)
    return check(f"hf/{case}", {key: mine[key] for key in ours})


@pytest.mark.parametrize("case", CASES)
def test_records_equal_transformers(case, runs):
    records = runs[case].result()[0]
    assert {"full", "right"} <= set(records) and ("left" in records or case == "llama4_text_k2")
    assert _complaints(case, records) == []


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_equal_transformers(case, runs):
    out, gold = runs[case].result()[1], golden_arrays(case)
    assert out.ids.dtype == np.int32
    np.testing.assert_array_equal(out.ids[:, :8], gold["prompt_ids"])
    np.testing.assert_array_equal(out.ids[:, 8:], gold["generated_ids"])


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_decode_equals_one_forward(case, runs):
    _, out, steps, again = runs[case].result()
    assert steps.shape == (24, 1, golden_model(case).architecture.vocab_size)
    # Two float32 computations: where float32 itself is far from float64 (1.4e-5 for gpt_oss_mxfp4, whose logits differ
    # by 2.9e-5 here on a CPU with AVX-512), each may be as far.
    meta = json.loads((GOLDEN / "hf" / case / "meta.json").read_text())
    atol = max(2e-5, 2.5 * meta["max_abs_diff_float32_vs_float64"]["logits"])
    np.testing.assert_allclose(steps[:10, 0], again.logits[0, 7:], atol=atol, rtol=0)
    for chosen, layer in zip(out.expert_ids, again.expert_ids, strict=True):
        np.testing.assert_array_equal(chosen[0, :17], layer[0])
        assert (chosen[0, -1] == -1).all() and (chosen[0, :-1] >= 0).all()


@pytest.mark.parametrize("case", ["mixtral_bf16", "gpt_oss_mxfp4"])
def test_in_bfloat16(case):
    model = golden_model(case, "bfloat16")
    assert model.dtype == jax.numpy.bfloat16
    logits = model(golden_arrays(case)["input_ids"])
    assert logits.dtype == np.float32
    assert check(f"hf/{case}", {"full.logits_computed_in_bfloat16": logits}) == []


def test_compiled_as_users_compile_it(runs):
    concurrent.futures.wait(runs.values())
    quick = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        model = moe_jax.load_pretrained(folder("deepseek_v3"), implementation="xla_tiles")  # the default, compiled anew
        record = model(golden_arrays("deepseek_v3")["input_ids"], return_record=True)
    finally:
        jax.config.update("jax_disable_most_optimizations", quick)
    assert _complaints("deepseek_v3", {"full": record}) == []
