"""Checkpoints of DeepSpeed-MoE as whole tensors under canonical names, whatever their ranks and versions."""

import contextlib
import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.torch_file import LazyTensor, TorchFile
from .deepspeed_layout import Layout, find_layout
from .deepspeed_merge import merge
from .deepspeed_names import canonical, measure, translate

_VERSIONS = (0, 1, 2, 3)  # 3 has the rows of 2
_INFERENCE = re.compile(
    r"(?:.*\.)?(\d+)\.(norm_[wb]|attn_n[wb]|attention\.attn_(?:qkv|o)[wb]|(?:mlp\.\d+|res_mlp)\.(?:inter|output)_[wb]"
    r"|res_coef|moe_gate\.wg\.weight)"
)


@dataclasses.dataclass(frozen=True)
class DeepSpeedFiles:
    """A checkpoint's tensors, by canonical name, and what its files say about the model.

    `num_experts` maps the index of each MoE layer's transformer layer to its number of experts. `vocab_size` counts
    the padding rows that Megatron adds. `args` are Megatron's, or None.
    """

    tensors: dict[str, LazyTensor]
    folder: Path
    tag: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    num_experts: dict[int, int]
    residual: bool
    num_heads: int | None
    checkpoint_version: float
    args: dict[str, Any] | None
    files: list[TorchFile] = dataclasses.field(repr=False)

    def close(self) -> None:
        """No more reading."""
        for file in self.files:
            file.close()


def open_checkpoint(
    path: str | Path, tag: str | None = None, *, num_heads: int | None = None, checkpoint_version: float | None = None
) -> DeepSpeedFiles:
    """Open what DeepSpeed's `save_checkpoint` wrote for a Megatron model with MoE layers.

    Takes the checkpoint folder (with `latest`, or `tag` to choose) or the folder of one tag. `num_heads` and
    `checkpoint_version` (how rows of query_key_value are ordered; 0 if nothing says more) are for files that do not
    tell. Headers are read now, weights when asked for; optimizer states are not opened. Raises `OSError` for missing,
    damaged, unknown or contradicting files, `ValueError` for arguments that contradict them or are needed and missing.

    >>> files = open_checkpoint("tests/golden/deepspeed/checkpoint_standard", num_heads=4, checkpoint_version=2.0)
    >>> files.tag, files.num_layers, files.num_experts
    ('global_step10', 4, {1: 4, 3: 4})
    >>> files.tensors["layers.3.self_attention.q.weight"].read().shape
    (16, 16)
    """
    layout = find_layout(path, tag)
    mains = [TorchFile(file) for file in layout.mains]
    modules = [_module(file) for file in mains]
    _check_ranks(mains)
    args = _args(mains[0])
    version = _version(mains, checkpoint_version)
    heads = _heads(args, num_heads, layout.folder)
    opened = {key: [TorchFile(file) for file in files] for key, files in layout.experts.items()}
    _check_experts(opened)
    ranks = []
    for rank, module in enumerate(modules):
        parts = [(files[rank].path, files[rank].content) for files in opened.values()]
        ranks.append(translate([(mains[rank].path, module), *parts]))
    sliced = (args or {}).get("enable_expert_tensor_parallelism")
    tensors = merge(ranks, version, heads, sliced if isinstance(sliced, bool) else None, layout.folder)
    sizes = measure(tensors, layout.folder)
    _check_counts(mains, sizes.num_experts)
    return DeepSpeedFiles(
        tensors=tensors,
        folder=layout.folder,
        tag=layout.tag,
        num_heads=heads,
        checkpoint_version=version,
        args=args,
        files=[*mains, *(file for files in opened.values() for file in files)],
        **vars(sizes),
    )


def _module(file: TorchFile) -> dict[str, Any]:
    """The weights of a main file, by full name."""
    content = file.content
    present = [key for key in ("module", "model") if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if len(present) != 1:
        raise OSError(f"{file.path}: expected the weights under 'module' or 'model', found {present or 'neither'}")
    flat: dict[str, Any] = {}
    pending = [("", content[present[0]])]
    while pending:  # Megatron nests, the engine does not
        prefix, group = pending.pop()
        for name, value in group.items():
            if not isinstance(name, str):
                raise OSError(f"{file.path}: a tensor in {prefix or present[0]!r} is not named by text")
            if isinstance(value, dict):
                pending.append((f"{prefix}{name}.", value))
            elif f"{prefix}{name}" in flat:
                raise OSError(f"{file.path}: {prefix}{name} is there twice")
            else:
                flat[f"{prefix}{name}"] = value
    return flat


def _args(main: TorchFile) -> dict[str, Any] | None:
    args = main.content.get("args")
    return dict(args) if isinstance(args, dict) else None


def _version(mains: list[TorchFile], given: float | None) -> float:
    """The checkpoint's version: the files' word, else the argument, else 0."""
    found = [file.content.get("checkpoint_version") for file in mains]
    if any(value != found[0] for value in found):
        raise OSError(f"{mains[0].path}: checkpoint_version differs between ranks: {found}")
    if None not in (found[0], given) and found[0] != given:
        raise ValueError(f"checkpoint_version: {given} contradicts {mains[0].path}, which says {found[0]}")
    version = found[0] if found[0] is not None else given if given is not None else 0
    if isinstance(version, bool) or not isinstance(version, (int, float)) or version not in _VERSIONS:
        error = OSError if found[0] is not None else ValueError
        raise error(f"checkpoint_version {version!r} of {mains[0].path} is not supported; supported: {_VERSIONS}")
    return float(version)


def _heads(args: dict[str, Any] | None, given: int | None, folder: Path) -> int | None:
    found = (args or {}).get("num_attention_heads")
    if None not in (found, given) and found != given:
        raise ValueError(f"num_heads: {given} contradicts {folder}, whose args say {found}")
    heads = given if found is None else found
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
        error = ValueError if found is None else OSError
        raise error(f"{folder}: the number of heads is {heads!r}, not a positive integer")
    return heads


def _check_experts(opened: Mapping[tuple[int | None, int], list[TorchFile]]) -> None:
    """Expert files hold their own expert only, and MoE layers are counted in the order of transformer layers."""
    layers: dict[int, int] = {}
    for (moe_layer, expert), files in opened.items():
        for file in files:
            if not isinstance(file.content, dict) or any(not isinstance(name, str) for name in file.content):
                raise OSError(f"{file.path}: expected a dict from names to tensors")
            for name in file.content:
                parts = (canonical(name) or "").split(".")
                if parts[2:4] != ["mlp", "experts"] or parts[4] != str(expert):
                    raise OSError(f"{file.path}: holds {name}, which is not of expert {expert}")
                if moe_layer is not None and layers.setdefault(moe_layer, int(parts[1])) != int(parts[1]):
                    raise OSError(f"{file.path}: holds {name}, but MoE layer {moe_layer} is layer {layers[moe_layer]}")
    order = [layers[moe_layer] for moe_layer in sorted(layers)]
    if order != sorted(set(order)):
        folder = next(iter(opened.values()))[0].path.parent
        raise OSError(f"{folder}: expert files of MoE layers 0, 1, ... hold layers {order}, which is not their order")


def _check_counts(mains: list[TorchFile], experts: Mapping[int, int]) -> None:
    """What the main files say about experts against what is there."""
    for file in mains:
        claimed = file.content.get("num_experts")
        found = list(experts.values())
        if isinstance(claimed, list) and experts and claimed != found:
            raise OSError(f"{file.path}: num_experts is {claimed}, but the MoE layers have {found}")


def _check_ranks(mains: list[TorchFile]) -> None:
    """The last ranks may be missing without a gap."""
    for file in mains:
        ranks = file.content.get("mp_world_size")
        if isinstance(ranks, int) and ranks != len(mains):
            raise OSError(f"{file.path}: mp_world_size is {ranks}, but there are main files for {len(mains)}")


def stack_state_dicts(path: str | Path, tag: str | None = None) -> list[dict[str, np.ndarray]]:
    """Weights of a stack of fused MoE inference layers, one dict per layer, in their order.

    Takes a folder as `open_checkpoint` does; its main file's names are those of the inference layer (`norm_w`,
    `attention.attn_qkvw`, `mlp.0.inter_w`, `moe_gate.wg.weight`, ...) after a prefix that ends in the layer's index.
    Raises `OSError` for other names, gaps, several prefixes or several model-parallel ranks.
    """
    layout: Layout = find_layout(path, tag)
    if len(layout.mains) != 1 or layout.experts:
        raise OSError(
            f"{layout.folder}: a stack of inference layers is one main file, found {len(layout.mains)} and "
            f"{len(layout.experts)} experts' files"
        )
    with contextlib.closing(TorchFile(layout.mains[0])) as file:
        layers: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        prefixes, unknown = set(), []
        for name, tensor in _module(file).items():
            match = _INFERENCE.fullmatch(name)
            if match is None or type(tensor) is not LazyTensor:
                unknown.append(name)
                continue
            prefixes.add(name[: match.start(1)])
            layers[int(match[1])][match[2]] = tensor.read()
        if unknown or len(prefixes) > 1:
            why = (
                f"names that no inference layer has: {', '.join(unknown)}"
                if unknown
                else f"prefixes {sorted(prefixes)}"
            )
            raise OSError(f"{file.path}: not one stack of inference layers: {why}")
        if set(layers) != set(range(len(layers))) or not layers:
            raise OSError(f"{file.path}: layers {sorted(layers)[:8]}, expected 0, 1, ... without a gap")
        return [layers[i] for i in range(len(layers))]
