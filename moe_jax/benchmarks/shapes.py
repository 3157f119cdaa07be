"""Shapes of MoE blocks by name: short names of recorded figures, configs of this repository, paths of config.json."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from pallas_kernels import Activation

from ..block_config import BlockConfig
from ..config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEShape:
    """What `moe_block` needs to know of a model: widths `D` and `F`, experts `E`, choices `k`, rules.

    `left_out`: parts of the model's block that `moe_block` has not, and that are therefore not in its times.

    >>> print(MoEShape(name="tiny", width=64, hidden=32, experts=4, top_k=2))
    D=64 F=32 E=4 k=2
    """

    name: str
    width: int
    hidden: int
    experts: int
    top_k: int
    score: str = "softmax"
    renormalize: bool = True
    activation: Activation = Activation("swiglu")
    bias: bool = False
    left_out: tuple[str, ...] = ()

    def __str__(self):
        return f"D={self.width} F={self.hidden} E={self.experts} k={self.top_k}"

    @property
    def plain(self) -> bool:
        """Whether softmax, SwiGLU and no bias are all there is: what baselines know how to compute."""
        return self.score == "softmax" and self.activation.name == "swiglu" and not self.bias

    def flops(self, tokens: int) -> float:
        """Operations of the experts' products, two per multiplication and addition."""
        return 2 * (3 if self.activation.gated else 2) * tokens * self.top_k * self.width * self.hidden

    def nbytes(self, tokens: int, active: float, itemsize: int) -> float:
        """Bytes of `active` experts' kernels, of x and of y, each moved once."""
        kernels = (3 if self.activation.gated else 2) * active * self.width * self.hidden
        return itemsize * (kernels + 2 * tokens * self.width)


def _short(name: str, width: int, hidden: int, experts: int, top_k: int) -> MoEShape:
    return MoEShape(name=name, width=width, hidden=hidden, experts=experts, top_k=top_k)


#: Shapes of the recorded figures (`recorded.py`): a model's sizes, all with SwiGLU and renormalised softmax weights.
SHORT = {
    shape.name: shape
    for shape in (
        _short("mixtral", 4096, 14336, 8, 2),
        _short("qwen3", 2048, 768, 128, 8),
        _short("olmoe", 2048, 1024, 64, 8),
        _short("gptoss", 2880, 2880, 32, 4),
        _short("dsv3ep", 7168, 2048, 32, 1),
    )
}


def find(name: str) -> MoEShape:
    """The shape of a short name, of `configs/NAME.json`, or of the config.json at a path.

    `ValueError` if there is no such config, or the model has no experts.

    >>> find("qwen3").experts, find("nowhere")
    Traceback (most recent call last):
    ValueError: model: 'nowhere' is none of mixtral, qwen3, olmoe, gptoss, dsv3ep, no file, ...
    """
    if name in SHORT:
        return SHORT[name]
    path = config_path(name, SHORT)
    label = path.parent.name if path.stem == "config" else path.stem
    return from_config(name if label in SHORT else label, ModelConfig.from_json_file(path))


def config_path(name: str, short: Iterable[str]) -> Path:
    """The file of a config: a path, or `configs/NAME.json`; `ValueError` with the `short` names if there is none."""
    folders = (Path("configs"), Path(__file__).resolve().parents[2] / "configs")
    for path in (Path(name), *(folder / f"{name}.json" for folder in folders)):
        if path.is_file():
            return path
    raise ValueError(
        f"model: {name!r} is none of {', '.join(short)}, no file, and there is no {name}.json in a folder configs/ "
        "here or beside the package (an installed package has none: give the path of a config.json)"
    )


def from_config(name: str, config: ModelConfig) -> MoEShape:
    """The shape of a model's MoE layers; of those with most experts, where they differ."""
    block, architecture = config.architecture.block, config.architecture
    if not architecture.moe_layers:
        raise ValueError(f"model: {name} has no layer with experts")
    return MoEShape(
        name=name,
        width=block.width,
        hidden=block.experts.hidden,
        experts=max(architecture.expert_counts),
        top_k=block.router.top_k,
        score=block.router.score,
        renormalize=block.router.renormalize,
        activation=block.experts.activation,
        bias=block.experts.bias,
        left_out=_left_out(block),
    )


def _left_out(block: BlockConfig) -> tuple[str, ...]:
    router = block.router
    parts = {
        "expert groups": router.groups > 1,
        "weight scale": router.scale != 1,
        "router bias": router.logit_bias,
        "selection bias": router.selection_bias,
        "weights on inputs": router.scale_input,
        "capacity": router.rule is not None,
        "shared expert": block.shared is not None,
    }
    return tuple(part for part, present in parts.items() if present)
