"""All golden checkpoints: one forward and one generation each, against transformers and against each other."""

import concurrent.futures
import contextvars
import functools

import jax
import numpy as np
import pytest
from compare import check
from conftest import golden_cases
from core_models import golden_arrays, golden_model, quick_compile  # noqa: F401

import moe_jax
from moe_jax import generation

CASES = golden_cases()
WAYS = ("full", "right", "left")
#: Cases that are compiled as users compile them; the others without LLVM's optimisations.
OPTIMISED = ("mixtral", "deepseek_v3")
_logits_of_steps = contextvars.ContextVar("logits_of_steps")


@pytest.fixture(scope="module", autouse=True)
def runs(quick_compile):  # noqa: F811
    """A function from case to future; two threads compile ahead of the tests, steps report their logits."""
    sample = generation.sample

    def reporting(sampler, logits, key, seen=None):
        jax.debug.callback(_logits_of_steps.get().append, logits, ordered=True)
        return sample(sampler, logits, key, seen)

    with pytest.MonkeyPatch.context() as patch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        patch.setattr(generation, "sample", reporting)
        _forget()
        futures = {case: pool.submit(contextvars.copy_context().run, _run, case) for case in CASES}
        yield futures
        pool.shutdown(cancel_futures=True)
    _forget()


def _forget():
    """No other test meets the reporting steps, nor this one steps that do not report."""
    generation._prefill.clear_cache()
    generation._decode.clear_cache()


def _run(case):
    model, gold = golden_model(case), golden_arrays(case)
    records = {}
    for way in WAYS:
        if f"{way}.logits" in gold:
            ids, mask = (gold.get(f"{way}.{name}") for name in ("input_ids", "attention_mask"))
            records[way] = model(gold["input_ids"] if ids is None else ids, mask, return_record=True)
    steps = []
    _logits_of_steps.set(steps)
    prompt = gold["prompt_ids"]
    out = moe_jax.generate(model, prompt, max_new_tokens=24, eos_token_id=(), return_record=True)
    jax.effects_barrier()
    written = np.concatenate([prompt, gold["generated_ids"]], 1)
    again = model(np.concatenate([written[:, :17], written[:, 15:]]), return_record=True)
    return records, out, np.stack(steps), again


@pytest.mark.parametrize("case", CASES)
def test_records_equal_transformers(case, runs):
    records = runs[case].result()[0]
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
    wanted = {k for k in gold if k.split(".")[0] in WAYS and k.split(".")[1] not in beside}
    assert wanted >= {"full.logits", "full.hidden_states", "right.logits", "right.hidden_states"}
    assert set(mine) - wanted <= {"left.hidden_states"} and wanted <= set(mine)
    assert check(f"hf/{case}", {key: mine[key] for key in wanted}) == []


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
    np.testing.assert_allclose(steps[:10, 0], again.logits[0, 7:], atol=2e-5, rtol=0)
    for chosen, layer in zip(out.expert_ids, again.expert_ids, strict=True):
        np.testing.assert_array_equal(chosen[0, :17], layer[0])
        assert (chosen[0, -1] == -1).all() and (chosen[0, :-1] >= 0).all()


@functools.cache
def _bfloat16(case):
    return golden_model(case, "bfloat16")(golden_arrays(case)["input_ids"])


@pytest.mark.parametrize("case", ["mixtral_bf16", "gpt_oss_mxfp4"])
def test_in_bfloat16(case):
    model = golden_model(case, "bfloat16")
    assert model.dtype == jax.numpy.bfloat16
    logits = _bfloat16(case)
    assert logits.dtype == np.float32
    assert check(f"hf/{case}", {"full.logits_computed_in_bfloat16": logits}) == []
