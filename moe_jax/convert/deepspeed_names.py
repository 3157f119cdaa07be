"""Names of Megatron-DeepSpeed's tensors as the canonical ones, and whether all that a model needs is there."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.torch_file import LazyTensor

_TOP = r"(?:module\.)?(?:language_model\.)?"
_STACK = r"(?:(?:encoder|transformer)\.)?"
_MLP = r"(dense_h_to_4h|dense_4h_to_h)\.(weight|bias)"
_LAYER = re.compile(_TOP + _STACK + r"layers\.(\d{1,6})\.(.+)")
_OUTSIDE = [
    (re.compile(_TOP + r"(?:embedding\.)?((?:word|position)_embeddings\.weight)"), r"\1"),
    (re.compile(_TOP + _STACK + r"final_layernorm\.(weight|bias)"), r"final_layernorm.\1"),
    (re.compile(_TOP + r"(?:output_layer|lm_head)\.weight"), "lm_head.weight"),
]
_INSIDE = [
    (re.compile(r"(input_layernorm|post_attention_layernorm)\.(weight|bias)"), r"\1.\2"),
    (re.compile(r"(?:self_)?attention\.(query_key_value|dense)\.(weight|bias)"), r"self_attention.\1.\2"),
    (re.compile(r"mlp\." + _MLP), r"mlp.\1.\2"),
    (re.compile(r"mlp\.(?:moe\.)?deepspeed_moe\.gate\.wg\.weight"), "mlp.gate.weight"),
    (
        re.compile(r"mlp\.(?:moe\.)?deepspeed_moe\.experts\.deepspeed_experts\.(\d{1,6})\." + _MLP),
        r"mlp.experts.\1.\2.\3",
    ),
    (re.compile(r"mlp\.(?:moe\.)?mlp\." + _MLP), r"mlp.residual.\1.\2"),
    (re.compile(r"mlp\.(?:moe\.)?coefficient\.(weight|bias)"), r"mlp.coefficient.\1"),
]
# Buffers that hold nothing learned: causal masks and frequencies.
_BUFFERS = re.compile(r"(?:.*\.)?(?:(?:self_)?attention\.(?:bias|masked_bias)|rotary\w*\.inv_freq)")


def canonical(name: str) -> str | None:
    """The canonical name of a tensor, "" if it is to be skipped, None if it is not known.

    >>> canonical("language_model.encoder.layers.3.mlp.deepspeed_moe.gate.wg.weight")
    'layers.3.mlp.gate.weight'
    """
    if _BUFFERS.fullmatch(name):
        return ""
    layer = _LAYER.fullmatch(name)
    for pattern, meaning in _INSIDE if layer else _OUTSIDE:
        found = pattern.fullmatch(layer[2] if layer else name)
        if found:
            return f"layers.{int(layer[1])}.{found.expand(meaning)}" if layer else found.expand(meaning)
    return None


def translate(groups: Iterable[tuple[Path, Mapping[str, Any]]]) -> dict[str, LazyTensor]:
    """Tensors of several files of one rank under canonical names; `OSError` for unknown names and for double ones."""
    found: dict[str, LazyTensor] = {}
    source: dict[str, str] = {}
    for path, tensors in groups:
        unknown = [name for name, value in tensors.items() if canonical(name) is None]
        if unknown:
            raise OSError(f"{path}: tensors that are not known in a Megatron-DeepSpeed model: {', '.join(unknown)}")
        for name, value in tensors.items():
            new = canonical(name)
            if not new:
                continue
            if type(value) is not LazyTensor:
                raise OSError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
            if new in found:
                raise OSError(f"{path}: {name} is there twice, also as {source[new]}")
            found[new], source[new] = value, f"{name} in {path.name}"
    return found


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the shapes of a model's tensors say."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    num_experts: dict[int, int]
    residual: bool


def measure(tensors: Mapping[str, LazyTensor], folder: Path) -> Sizes:
    """Sizes of a whole model; `OSError`, naming the tensors, if some are missing or have other shapes than the rest."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layers: dict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in shapes.items():
        if name.startswith("layers."):
            index, rest = name.removeprefix("layers.").split(".", 1)
            layers[int(index)][rest] = shape
    # what one layer alone may lack: the names that its kind has in other layers, and those without which nothing works
    experts = {i: _experts(names) for i, names in layers.items() if "mlp.gate.weight" in names or _experts(names)}
    missing = [n for n in ("word_embeddings.weight", "final_layernorm.weight") if n not in shapes]
    missing += [f"layers.{i}" for i in range(max(layers, default=0) + 1) if i not in layers][:8]
    missing += _missing(layers, experts)
    if missing:
        raise OSError(f"{folder}: tensors are missing: {', '.join(missing)}")
    for name, shape in shapes.items():
        if len(shape) != (1 if name.endswith("bias") or "layernorm" in name else 2):
            raise OSError(f"{folder}: {name} has shape {shape}, with a wrong number of dimensions")
    for i, ids in experts.items():
        if len(ids) != layers[i]["mlp.gate.weight"][0]:
            rows = layers[i]["mlp.gate.weight"][0]
            raise OSError(f"{folder}: layer {i} has {len(ids)} experts, but its gate has rows for {rows}")
    first = next(n for n in shapes if n.endswith("dense_h_to_4h.weight"))
    sizes = Sizes(
        num_layers=len(layers),
        hidden_size=shapes["word_embeddings.weight"][-1],
        intermediate_size=shapes[first][0],
        vocab_size=shapes["word_embeddings.weight"][0],
        max_positions=shapes.get("position_embeddings.weight", (None,))[0],
        num_experts={i: len(experts[i]) for i in sorted(experts)},
        residual=any(".mlp.residual." in name for name in shapes),
    )
    _check_shapes(shapes, sizes, folder)
    return sizes


def _experts(names: Iterable[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in names if name.startswith("mlp.experts.")}


def _missing(layers: Mapping[int, Mapping[str, Any]], experts: Mapping[int, set[int]]) -> list[str]:
    """Names that layers lack: what their kind has in some other layer, and the weights without which nothing works."""
    norms = ("input_layernorm", "post_attention_layernorm")
    wanted = {f"{n}.weight" for n in (*norms, *(f"self_attention.{part}" for part in ("q", "k", "v", "dense")))}
    mlp = {"dense_h_to_4h.weight", "dense_4h_to_h.weight"}
    dense, routed, parts = {f"mlp.{n}" for n in mlp}, {"mlp.gate.weight"}, set(mlp)
    for i, names in layers.items():
        for name in names:
            if name.startswith("mlp.experts."):
                parts.add(name.split(".", 3)[3])
            elif name.startswith("mlp."):
                (routed if i in experts else dense).add(name)
            else:
                wanted.add(name)
    missing = []
    for i, names in layers.items():
        need = wanted | (routed if i in experts else dense)
        for e in range(max(experts.get(i, ()), default=0) + 1 if i in experts else 0):
            if e not in experts[i]:
                missing.append(f"layers.{i}.mlp.experts.{e}")
                break
            need.update(f"mlp.experts.{e}.{part}" for part in parts)
        missing += [f"layers.{i}.{name}" for name in sorted(need - set(names))]
    return missing


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], sizes: Sizes, folder: Path) -> None:
    width, hidden, wide = sizes.hidden_size, sizes.intermediate_size, shapes["layers.0.self_attention.q.weight"][0]
    rules: list[tuple[str, Callable[[], tuple[int | None, ...]]]] = [
        (r"(word_embeddings|lm_head)\.weight", lambda: (sizes.vocab_size, width)),
        (r"position_embeddings\.weight", lambda: (sizes.max_positions, width)),
        (r".*layernorm\.(weight|bias)", lambda: (width,)),
        (r".*self_attention\.[qkv]\.weight", lambda: (wide, width)),
        (r".*self_attention\.[qkv]\.bias", lambda: (wide,)),
        (r".*self_attention\.dense\.weight", lambda: (width, wide)),
        (r".*dense_h_to_4h\.weight", lambda: (hidden, width)),
        (r".*dense_h_to_4h\.bias", lambda: (hidden,)),
        (r".*dense_4h_to_h\.weight", lambda: (width, hidden)),
        (r".*(self_attention\.dense|dense_4h_to_h)\.bias", lambda: (width,)),
        (r".*mlp\.coefficient\.weight", lambda: (2, width)),
        (r".*mlp\.coefficient\.bias", lambda: (2,)),
    ]
    for name, shape in shapes.items():
        expected = next((rule() for pattern, rule in rules if re.fullmatch(pattern, name)), None)
        if name.endswith("mlp.gate.weight"):
            expected = (sizes.num_experts[int(name.split(".")[1])], width)
        if expected is not None and shape != expected:
            raise OSError(f"{folder}: {name} has shape {shape}, expected {expected}")
