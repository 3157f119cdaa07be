"""DeepSpeed's MoE layers once more, as repaired: float64, a token and a head at a time, unlike the library's code.

Options are dictionaries of DeepSpeed's own keys, weights those of its state dicts.
"""

import math

import numpy as np
from gate_oracle import oracle, softmax

DEFAULTS = dict(
    layer_norm_eps=1e-12,
    pre_layer_norm=True,
    norm_type="LayerNorm",
    scale_attention=True,
    use_mup=False,
    scale_attn_by_inverse_layer_idx=False,
    triangular_masking=True,
    local_attention=False,
    window_size=256,
    rotary_dim=-1,
    rotate_half=False,
    rope_theta=10000.0,
    num_kv=-1,
    bigscience_bloom=False,
    invert_mask=True,
    mlp_act_func_type="GELU",
    gelu=None,
    mlp_type="standard",
    moe_experts=1,
    k=1,
    eval_capacity_factor=1.0,
    min_capacity=1,
    drop_tokens=True,
    drop_policy="probs_upstream",
)


def complete(options):
    """The options with the defaults of those that are not given."""
    full = DEFAULTS | options
    full["head_dim"] = full["hidden_size"] // full["heads"]
    full["kv_heads"] = full["num_kv"] if full["num_kv"] > 0 else full["heads"]
    full["intermediate_size"] = full.get("intermediate_size", 4 * full["hidden_size"])
    full["gated"] = full["mlp_act_func_type"].startswith("GATED")
    return full


def shapes(options):
    """Names and shapes of the layer's state dict."""
    o = complete(options)
    width, hidden, experts = o["hidden_size"], o["intermediate_size"], o["moe_experts"]
    rows, columns = (o["heads"] + 2 * o["kv_heads"]) * o["head_dim"], hidden * (2 if o["gated"] else 1)
    made = {"norm_w": (width,), "attn_nw": (width,), "moe_gate.wg.weight": (experts, width)}
    if o["norm_type"] == "LayerNorm":
        made |= {"norm_b": (width,), "attn_nb": (width,)}
    made |= {"attention.attn_qkvw": (width, rows), "attention.attn_qkvb": (rows,)}
    made |= {"attention.attn_ow": (o["heads"] * o["head_dim"], width), "attention.attn_ob": (width,)}
    residual = o["mlp_type"] == "residual"
    if residual:
        made["res_coef"] = (width, 2)
    for prefix in [f"mlp.{e}." for e in range(experts)] + ["res_mlp."] * residual:
        made |= {prefix + "inter_w": (width, columns), prefix + "inter_b": (columns,)}
        made |= {prefix + "output_w": (hidden, width), prefix + "output_b": (width,)}
    return made


def random_weights(options, seed):
    """A state dict in which no part is negligible: kernels `1.3/sqrt(in)`, norms about 1, biases 0.3, sharp gates."""
    generator, made = np.random.default_rng(seed), {}
    for name, shape in shapes(options).items():
        w = generator.standard_normal(shape)
        if name in ("norm_w", "attn_nw"):
            w = 1 + 0.3 * w
        elif name == "moe_gate.wg.weight":
            w = w * 2 / math.sqrt(shape[1])
        else:
            w = w * (0.3 if len(shape) == 1 else 1.3 / math.sqrt(shape[0]))
        made[name] = w.astype(np.float32)
    return made


def normed(o, row, scale, bias):
    if o["norm_type"] == "RMSNorm":
        return row / math.sqrt((row**2).mean() + o["layer_norm_eps"]) * scale
    centred = row - row.mean()
    return centred / math.sqrt((centred**2).mean() + o["layer_norm_eps"]) * scale + bias


def split_qkv(o, fused):
    """One token's fused output as its query, key and value heads."""
    size, heads, kv = o["head_dim"], o["heads"], o["kv_heads"]
    pieces = [fused[i : i + size] for i in range(0, len(fused), size)]
    if o["bigscience_bloom"]:
        return pieces[0::3], pieces[1::3], pieces[2::3]
    return pieces[:heads], pieces[heads : heads + kv], pieces[heads + kv :]


def turned(o, head, position):
    """Rotary positions on the first `rotary_dim` components: halves, or neighbours."""
    dim, out = o["rotary_dim"], np.array(head, np.float64)
    for i in range(max(dim, 0) // 2):
        angle = position * o["rope_theta"] ** (-2 * i / dim)
        first, second = (i, i + dim // 2) if o["rotate_half"] else (2 * i, 2 * i + 1)
        out[first] = head[first] * math.cos(angle) - head[second] * math.sin(angle)
        out[second] = head[second] * math.cos(angle) + head[first] * math.sin(angle)
    return out


def alibi_slopes(heads):
    """As in Bloom: a geometric series for the largest power of two, then every other one of twice as many."""
    closest = 2 ** math.floor(math.log2(heads))
    base, extra = 2 ** -(2 ** -(math.log2(closest) - 3)), 2 ** -(2 ** -(math.log2(2 * closest) - 3))
    return [base**i for i in range(1, closest + 1)] + [extra**i for i in range(1, 2 * (heads - closest), 2)]


def addend(o, mask, place, new, total):
    """What the mask adds to one score; `place`: row, head, query, key."""
    if mask is None:
        return 0.0
    b, n, t, key = place
    if mask.shape[-1] == new != total:  # of the new tokens only
        key -= total - new
        if key < 0:
            return 0.0
    if mask.ndim == 2:
        value = mask[b, key]
    else:
        value = mask[min(b, mask.shape[0] - 1), min(n, mask.shape[1] - 1), min(t, mask.shape[2] - 1), key]
    if mask.dtype.kind == "f":
        return float(value)
    return (1 - int(value) if o["invert_mask"] else int(value)) * -10000.0


def scale_of(o, layer_index):
    if not o["scale_attention"]:
        return 1.0
    divisor = o["head_dim"] if o["use_mup"] else math.sqrt(o["head_dim"])
    return 1 / (divisor * (layer_index + 1 if o["scale_attn_by_inverse_layer_idx"] else 1))


def attention(options, weights, x, past=None, mask=None, layer_index=0):
    """Output `[B, T, D]` with its bias, `(keys, values)` `[B, K, S, H]`, probabilities `[B, N, T, S]`."""
    o, x = complete(options), np.asarray(x, np.float64)
    w = {name: np.asarray(weights[f"attn_{name}"], np.float64) for name in ("qkvw", "qkvb", "ow", "ob")}
    batch, new, _ = x.shape
    before = 0 if past is None else np.shape(past[0])[2]
    total, shape = before + new, (batch, o["kv_heads"], before + new, o["head_dim"])
    keys, values = np.zeros(shape), np.zeros(shape)
    if past is not None:
        keys[:, :, :before], values[:, :, :before] = past
    chances, out = np.zeros((batch, o["heads"], new, total)), np.zeros(x.shape)
    queries = {}
    for b, t in np.ndindex(batch, new):
        q, k, v = split_qkv(o, x[b, t] @ w["qkvw"] + w["qkvb"])
        queries[b, t] = [turned(o, head, before + t) for head in q]
        keys[b, :, before + t] = [turned(o, head, before + t) for head in k]
        values[b, :, before + t] = v
    for b, t in np.ndindex(batch, new):
        mixed = []
        for n, q in enumerate(queries[b, t]):
            group = n // (o["heads"] // o["kv_heads"])
            scores = keys[b, group] @ q * scale_of(o, layer_index)
            for key in range(total):
                scores[key] += addend(o, mask, (b, n, t, key), new, total)
                if o["bigscience_bloom"]:
                    scores[key] += alibi_slopes(o["heads"])[n] * (key - before - t)
                later = o["triangular_masking"] and key > before + t
                if later or (o["local_attention"] and key <= before + t - o["window_size"]):
                    scores[key] = -math.inf
            chances[b, n, t] = softmax(scores)
            mixed.append(chances[b, n, t] @ values[b, group])
        out[b, t] = np.concatenate(mixed) @ w["ow"] + w["ob"]
    return out, (keys, values), chances


def gelu(value, form):
    if form == "erf":
        return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def activated(kind, form, row):
    """The activation of one token's hidden units; a gated one multiplies the first half by it of the second."""
    if not kind.startswith("GATED"):
        return np.array([max(v, 0.0) if kind == "ReLU" else gelu(v, form or "tanh") for v in row])
    plain, gates = np.split(row, 2)
    silu = kind == "GATED_SILU"
    return plain * np.array([v / (1 + math.exp(-v)) if silu else gelu(v, form or "erf") for v in gates])


def mlp(o, weights, prefix, row):
    w = {n: np.asarray(weights[prefix + n], np.float64) for n in ("inter_w", "inter_b", "output_w", "output_b")}
    hidden = activated(o["mlp_act_func_type"], o["gelu"], row @ w["inter_w"] + w["inter_b"])
    return hidden @ w["output_w"] + w["output_b"]


def routed(o, gate, expert, rows, used=None):
    """The experts' weighted outputs for `rows [G, D]`, choices per expert, auxiliary loss; `expert(e, row)`."""
    k, count = o["k"], len(gate)
    capacity = None
    if o["drop_tokens"]:
        wanted = math.ceil(len(rows) / count * (o["eval_capacity_factor"] * k))
        capacity = max(wanted, o["min_capacity"])
    policy = {1: "position", 2: "choice"}.get(k, o["drop_policy"])
    combine, counts, aux = oracle(rows @ np.asarray(gate, np.float64).T, k, capacity, policy, used)
    out = np.zeros(rows.shape)
    for t, e, slot in np.argwhere(combine):
        out[t] += combine[t, e, slot] * expert(e, rows[t])
    return out, counts, aux


def layer(options, weights, x, data_flow="standard", layer_index=0, past=None, mask=None):
    """Output `[B, T, D]`, `(keys, values)`, probabilities of the fused inference layer."""
    o, x = complete(options), np.asarray(x, np.float64)
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    first, second = (w["norm_w"], w.get("norm_b")), (w["attn_nw"], w.get("attn_nb"))
    rows = lambda a, scale, bias: np.array([[normed(o, row, scale, bias) for row in sequence] for sequence in a])
    own = {name.removeprefix("attention."): value for name, value in w.items() if name.startswith("attention.")}
    h, present, chances = attention(o, own, rows(x, *first) if o["pre_layer_norm"] else x, past, mask, layer_index)
    stream = h if data_flow == "literal" else x + h
    flat = rows(stream, *second).reshape(-1, x.shape[2])
    y, _, _ = routed(o, w["moe_gate.wg.weight"], lambda e, row: mlp(o, w, f"mlp.{e}.", row), flat)
    if o["mlp_type"] == "residual":
        for t, row in enumerate(flat):
            share = softmax(row @ w["res_coef"])
            y[t] = share[0] * mlp(o, w, "res_mlp.", row) + share[1] * y[t]
    y = y.reshape(x.shape) + stream
    return (y if o["pre_layer_norm"] else rows(y, *first)), present, chances


def moe(options, weights, x, used=None):
    """Output, auxiliary loss and counts of the training layer, kernels `[out, in]`; experts come before the MLP."""
    o = DEFAULTS | options
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    rows = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])

    def two_maps(prefix, row):
        first, second = "dense_h_to_4h", "dense_4h_to_h"
        hidden = activated("GELU", o["gelu"], w[f"{prefix}{first}.weight"] @ row + w[f"{prefix}{first}.bias"])
        return w[f"{prefix}{second}.weight"] @ hidden + w[f"{prefix}{second}.bias"]

    expert = lambda e, row: two_maps(f"deepspeed_moe.experts.deepspeed_experts.{e}.", row)
    y, counts, aux = routed(o, w["deepspeed_moe.gate.wg.weight"], expert, rows, used)
    if "coefficient.weight" in w:
        for t, row in enumerate(rows):
            share = softmax(w["coefficient.weight"] @ row + w["coefficient.bias"])
            y[t] = share[0] * y[t] + share[1] * two_maps("mlp.", row)
    return y.reshape(np.shape(x)), aux, counts
