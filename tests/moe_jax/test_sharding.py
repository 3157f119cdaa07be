"""How models are cut along meshes: tables, shares, specs, and what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from core_models import folder, golden_model

import moe_jax
from moe_jax import Axes, ModelConfig, make_mesh
from moe_jax.axes import RULES, TOGETHER
from moe_jax.model import Model, tiny_config
from moe_jax.sharding import Sharding
from moe_jax.sharding.mesh import mesh_sizes
from moe_jax.sharding.shares import kv_heads, shares
from moe_jax.weights import flattened, parameters

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_the_tests_run_on_eight_devices():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (dict(batch=("data",), heads=("data",)), "heads: .'data'. cuts the batch already"),
        (dict(experts=("expert",), hidden=("expert",)), "hidden: .'expert'. cuts the experts already"),
        (dict(batch=("data", "expert"), experts=("expert", "model")), "all or none may cut the batch"),
        (dict(batch="data"), "batch: 'data' is not a tuple"),
        (dict(heads=("model", "model")), "names an axis twice"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Axes(**table)


def test_meshes():
    assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "expert": 2, "model": 2}
    assert make_mesh(expert=4).size == 4
    with pytest.raises(ValueError, match="2 x 8 x 1 is 16 devices, there are 8"):
        make_mesh(2, 8)
    with pytest.raises(ValueError, match="model: 0 is not a positive integer"):
        make_mesh(model=0)
    with pytest.raises(ValueError, match="devices: 2 given"):
        make_mesh(expert=4, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="mesh: 'experts=2', expected sizes of data, expert, model"):
        mesh_sizes("experts=2")
    with pytest.raises(ValueError, match="no jax.sharding.Mesh"):
        moe_jax.load_pretrained(folder("mixtral"), mesh="cpu:8")
    with pytest.raises(ValueError, match="not rows"):
        Sharding(make_mesh(), Axes(batch=("rows",)))
    with pytest.raises(ValueError, match=r"rules: 'together' is no moe_jax.Axes; moe_jax.axes.NAMED has some"):
        moe_jax.load_pretrained(folder("mixtral"), mesh=make_mesh(expert=8), rules="together")
    with pytest.raises(ValueError, match="rules: .* say what lies where on a mesh, but mesh is None"):
        moe_jax.load_pretrained(folder("mixtral"), rules=TOGETHER)
    with pytest.raises(ValueError, match=r"placement: \[\[0\]\] is no moe_jax.Placement"):
        moe_jax.shard(golden_model("mixtral"), make_mesh(expert=8), placement=[[0]])


def test_a_mesh_as_jax_makes_it():
    """Its axes are of type Explicit, where shardings are part of types: this library's are not."""
    mesh = jax.make_mesh((2, 4, 1), ("data", "expert", "model"))
    whole = golden_model("mixtral")
    model = moe_jax.shard(whole, mesh)
    ids = [[1, 2, 3, 4], [5, 6, 7, 8]]
    np.testing.assert_allclose(model(ids), whole(ids), atol=1e-5)
    want, got = (moe_jax.generate(one, ids, max_new_tokens=3, temperature=1.0, key=1) for one in (whole, model))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("heads", "kv", "ways"), [(12, 3, 2), (4, 2, 8), (32, 4, 8), (16, 16, 4), (6, 2, 4), (5, 1, 2)]
)
def test_every_device_has_the_keys_of_its_queries(heads, kv, ways):
    config = golden_model("mixtral").architecture.block.attention
    config = type(config)(num_heads=heads, num_kv_heads=kv, head_dim=4, value_dim=4, scale=1.0, rope=None)
    there, own = kv_heads(config, ways), -(-heads // ways)
    assert len(there) % ways == 0
    each = len(there) // ways
    for head in range(heads):
        device, place = divmod(head, own)
        assert there[device * each + place // (own // each)] == head // (heads // kv)
    counts = np.bincount(there[there >= 0], minlength=kv)
    assert len(set(counts)) == 1  # norms over all heads count on it


def test_shares_of_a_mesh_with_one_device_are_the_parameters():
    architecture = tiny_config().architecture
    sizes = dict.fromkeys(("data", "expert", "model"), 1)
    for name, share in shares(architecture, RULES, sizes).items():
        assert share.stored_shape(parameters(architecture)[name].shape) == parameters(architecture)[name].shape


def test_no_device_holds_more_than_its_part():
    model = moe_jax.shard(golden_model("mixtral"), make_mesh(1, 4, 2))
    for name, array in flattened(model.arrays()).items():
        if name.startswith("moe.") and "router" not in name:
            assert {shard.data.size * 8 for shard in array.addressable_shards} == {array.size}


@pytest.fixture(scope="module")
def pyramid():
    hub = json.loads((CONFIGS / "tiny" / "deepspeed_moe.json").read_text())
    hub |= {"num_hidden_layers": 4, "num_experts": [0, 4, 0, 8], "drop_tokens": False, "num_experts_per_tok": 1}
    return Model.initialize(ModelConfig.from_dict(hub), seed=1)


def test_pyramids_are_dealt_out_evenly_or_refused(pyramid, tmp_path):
    assert pyramid.architecture.pyramid
    with pytest.raises(
        ValueError, match=r"layers with \[4\] experts do not divide by 8 ranks; these would do: \[1, 2, 4\]"
    ):
        moe_jax.shard(pyramid, make_mesh(expert=8))
    ids = [[1, 2, 3, 4], [5, 6, 7, 8]]
    moe_jax.save_pretrained(pyramid, tmp_path)
    for mesh in (make_mesh(expert=4), make_mesh(2, 2, 2)):
        model = moe_jax.shard(pyramid, mesh)
        np.testing.assert_allclose(model(ids), pyramid(ids), atol=1e-5)
        np.testing.assert_array_equal(moe_jax.load_pretrained(tmp_path, mesh=mesh)(ids), model(ids))


def test_gates_with_a_capacity_see_all_tokens():
    hub = json.loads((CONFIGS / "tiny" / "deepspeed_moe.json").read_text())
    hub |= {"eval_capacity_factor": 0.5, "min_capacity": 1, "drop_tokens": True}
    whole = Model.initialize(ModelConfig.from_dict(hub), seed=1)
    ids = np.random.default_rng(0).integers(0, whole.architecture.vocab_size, (6, 9))
    mask = np.ones(ids.shape, int)
    mask[2, 5:] = 0
    record = whole(ids, mask, return_record=True)
    assert any((np.asarray(layer)[mask.astype(bool)] < 0).any() for layer in record.expert_ids)  # some are dropped
    for sizes in [(8, 1, 1), (2, 2, 2)]:
        got = moe_jax.shard(whole, make_mesh(*sizes))(ids, mask, return_record=True)
        for ours, theirs in zip(got.expert_ids, record.expert_ids, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_another_table():
    """Attention over both axes, tokens the same on all ranks of experts."""
    rules = Axes(
        batch=("data",), experts=("expert",), heads=("expert", "model"), hidden=("model",), vocab=("expert", "model")
    )
    whole = golden_model("mixtral")
    model = moe_jax.shard(whole, make_mesh(2, 2, 2), rules)
    ids = [[1, 2, 3, 4], [5, 6, 7, 8]]
    np.testing.assert_allclose(model(ids), whole(ids), atol=1e-5)
    assert (
        moe_jax.generate(model, ids, max_new_tokens=4).tolist()
        == moe_jax.generate(whole, ids, max_new_tokens=4).tolist()
    )


def test_quantised_kernels_are_not_cut_inside_a_block():
    model = moe_jax.quantize(golden_model("mixtral"), group_size=8)  # 4 heads of 8 inputs: half a head to a device
    with pytest.raises(ValueError, match=r"attention.o: .* inputs along \('model',\), no multiple of 16"):
        moe_jax.shard(moe_jax.quantize(golden_model("mixtral"), group_size=16), make_mesh(model=4))
    assert moe_jax.shard(model, make_mesh(model=4))([[1, 2]]).shape == (1, 2, 160)


def test_random_weights_do_not_depend_on_the_mesh():
    plain, spread = (Model.initialize(tiny_config(), mesh=mesh) for mesh in (None, make_mesh(2, 2, 2)))
    np.testing.assert_allclose(spread([[1, 2, 3]]), plain([[1, 2, 3]]), atol=1e-5)


def test_gathered_and_saved_as_before(tmp_path):
    whole = golden_model("qwen2_moe")
    model = moe_jax.shard(whole, make_mesh(1, 2, 4))
    for name, array in flattened(moe_jax.gather(model).arrays()).items():
        np.testing.assert_array_equal(array, flattened(whole.arrays())[name])
    moe_jax.save_pretrained(model, tmp_path)
    again = moe_jax.load_pretrained(tmp_path)
    np.testing.assert_array_equal(again([[1, 2, 3]]), whole([[1, 2, 3]]))


def test_placed_experts_change_nothing_but_the_ranks():
    whole, mesh = golden_model("mixtral"), make_mesh(1, 4, 2)
    prompt = np.random.default_rng(0).integers(0, 160, (4, 12))
    made = moe_jax.generate(whole, prompt, max_new_tokens=8, eos_token_id=(), return_record=True)
    counts = made.expert_counts(8)
    assert counts.sum() == sum((np.asarray(layer) >= 0).sum() for layer in made.expert_ids)
    counts[:, 2] += 500  # a hot expert
    placement = moe_jax.balance(counts, 4, replicas=4)
    before, after = (p.imbalance(counts) for p in (moe_jax.Placement.identity(3, 8, 4), placement))
    assert after.max() < 1.15 < before.min()
    model = moe_jax.shard(whole, mesh, placement=placement)
    want, got = (one(prompt, return_record=True) for one in (whole, model))
    np.testing.assert_allclose(got.logits, want.logits, atol=1e-5 * np.abs(np.asarray(want.logits)).max())
    for ours, theirs in zip(got.expert_ids, want.expert_ids, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (moe_jax.generate(model, prompt, max_new_tokens=8, eos_token_id=()) == made.ids).all()
    loaded = moe_jax.load_pretrained(folder("mixtral"), mesh=mesh, placement=placement)
    for name, array in flattened(loaded.arrays()).items():
        np.testing.assert_array_equal(array, flattened(model.arrays())[name], err_msg=name)
    back = moe_jax.gather(model)
    np.testing.assert_array_equal(back(prompt), whole(prompt))


def test_placements_of_other_models_are_refused():
    with pytest.raises(ValueError, match="placement: of 3 layers of 8 on 2, not 3 layers of .8. experts on 4 ranks"):
        moe_jax.shard(golden_model("mixtral"), make_mesh(1, 4, 2), placement=moe_jax.Placement.identity(3, 8, 2))
    with pytest.raises(ValueError, match="placement: of experts on ranks, but mesh is None"):
        moe_jax.load_pretrained(folder("mixtral"), placement=moe_jax.Placement.identity(3, 8, 2))
