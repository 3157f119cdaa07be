"""What `decode_attention` should give, in NumPy, a row and a head at a time; shared by its tests."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.decode import QKNorm, Rotary, Seen

LAYERS, LAYER, EPSILON = 3, 1, 1e-2
ALL = Seen()


def prepared(x, norm, epsilon, rotary, row, rounded):
    """Norm and rotation of one row's heads `[heads, H]`."""
    if norm is not None:
        squares = np.mean(x**2, axis=None if norm.ndim == 2 else -1, keepdims=True)
        x = rounded(x / np.sqrt(squares + x.dtype.type(epsilon)) * norm.astype(x.dtype))
    if rotary is None:
        return x
    cos, sin = (np.asarray(a)[row].astype(x.dtype) for a in (rotary.cos, rotary.sin))
    y, half = x.copy(), len(cos)
    for i in range(half):
        low, high = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + half)
        y[:, low] = x[:, low] * cos[i] - x[:, high] * sin[i]
        y[:, high] = x[:, high] * cos[i] + x[:, low] * sin[i]
    return rounded(y)


def oracle(q, k, v, cache, lengths, *, scale, norm=None, rotary=None, seen=ALL, narrow=None):
    """Output `[B, N, Hv]` and new entries `k [B, K, H]`, in float64; or in float32, `narrow` the dtype that normed and
    rotated heads, the softmax and the output are rounded to."""
    wide = np.float64 if narrow is None else np.float32
    rounded = lambda a: a if narrow is None else a.astype(narrow).astype(wide)
    q, k, v = (np.asarray(a).astype(wide) for a in (q, k, v))
    keys, values = (np.asarray(cache[name][LAYER]).astype(wide) for name in "kv")
    own = lambda stack: None if stack is None else np.asarray(stack)[LAYER].astype(wide)
    scales = (None, None, 0) if norm is None else (own(norm.q), own(norm.k), norm.epsilon)
    sinks, group = own(seen.sinks), q.shape[1] // k.shape[1]
    y, entries = np.zeros((*q.shape[:2], v.shape[2]), wide), np.zeros_like(k)
    for row, position in enumerate(np.asarray(lengths)):
        first = 0 if seen.window is None else max(0, position - int(seen.window) + 1)
        first = first if seen.chunk is None else max(first, position - position % int(seen.chunk))
        queries = prepared(q[row], scales[0], scales[2], rotary, row, rounded)
        entries[row] = prepared(k[row], scales[1], scales[2], rotary, row, rounded)
        for head, query in enumerate(queries):
            kv = head // group
            theirs = np.concatenate([keys[row, kv, first:position], entries[row, kv][None]])
            mine = np.concatenate([values[row, kv, first:position], v[row, kv][None]])
            scores = theirs @ query * wide(scale)
            logits = scores if sinks is None else np.append(scores, sinks[head])
            powers = np.exp(logits - logits.max())
            y[row, head] = rounded((powers / powers.sum())[: len(mine)]) @ mine
    return rounded(y), entries


def make(batch, heads, kv_heads, size, width, columns, lengths, dtype, *, norm=None, half=0, interleaved=False, **seen):
    """Operands of a call; what lies behind a row's tokens, and in other layers, is large."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    cache = {"k": draw(LAYERS, batch, kv_heads, columns, size), "v": draw(LAYERS, batch, kv_heads, columns, width)}
    for stack in cache.values():
        stack[[0, 2]] *= 50
        for row, length in enumerate(lengths):
            stack[LAYER, row, :, length:] = 1000
    given = dict(
        q=draw(batch, heads, size), k=draw(batch, kv_heads, size), v=draw(batch, kv_heads, width), cache=cache,
        lengths=np.array(lengths, np.int32), scale=size**-0.5, norm=None, rotary=None,
    )  # fmt: skip
    if norm is not None:
        shapes = ((heads, size), (kv_heads, size)) if norm == "full" else ((size,), (size,))
        given["norm"] = QKNorm(*(draw(LAYERS, *shape) for shape in shapes), EPSILON)
    if half:
        angles = (rng.random((batch, half)) * 6).astype(np.float32)
        given["rotary"] = Rotary(np.cos(angles), np.sin(angles), interleaved)
    if seen.pop("sinks", False):
        seen["sinks"] = jnp.asarray(draw(LAYERS, heads) * 2)
    given["seen"] = Seen(**seen)
    return given
