"""What a training run is made of, as data: `Settings`, read from JSON files such as those in `configs/train`."""

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ..upcycle import upcycle

Schedule = Literal["cosine", "linear", "constant"]
Dtype = Literal["float32", "bfloat16"]


def _check(owner: Any, test: Any, what: str, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or not test(value)
        ):
            raise ValueError(f"{name}: {value!r}, expected {what}")


def _whole(owner: Any, *names: str, least: int = 1) -> None:
    for name in names:
        if not isinstance(getattr(owner, name), int):
            raise ValueError(f"{name}: {getattr(owner, name)!r}, expected an integer")
    _check(owner, lambda value: value >= least, f"at least {least}", *names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is read: `corpus`, see `data.load_corpus`, or several of them, a share `held_out` never trained on.

    `tokenizer`: "bytes"; "bpe:2048" for so many tokens learned from the text; "demo" for the demo model's; or a folder
    or .gguf file. Windows are of `length` predictions, `batch_size` in each step.
    """

    corpus: str | tuple[str, ...]
    tokenizer: str = "bytes"
    held_out: float = 0.1
    length: int = 256
    batch_size: int = 16

    def __post_init__(self):
        if isinstance(self.corpus, (list, tuple)):
            object.__setattr__(self, "corpus", tuple(self.corpus))
        if not self.corpora or not all(isinstance(source, str) for source in self.corpora):
            raise ValueError(f"corpus: {self.corpus!r}, expected a name or a path, or a list of them")
        _whole(self, "length", "batch_size")
        _check(self, lambda share: 0 < share < 1, "a share between 0 and 1", "held_out")

    @property
    def corpora(self) -> tuple[str, ...]:
        """All that is read."""
        return self.corpus if isinstance(self.corpus, tuple) else (self.corpus,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv:1711.05101) behind a clip of the gradient's norm.

    The learning rate rises over `warmup` steps, then falls to `final` times itself by `schedule`. `weight_decay` acts
    on matrices. `clip`: the largest norm, None for none. `accumulation`: parts that a batch is run in, one by one.
    """

    learning_rate: float = 3e-4
    warmup: int = 100
    schedule: Schedule = "cosine"
    final: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    accumulation: int = 1

    def __post_init__(self):
        if not isinstance(self.betas, (list, tuple)):
            raise ValueError(f"betas: {self.betas!r}, expected two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        _check(self, lambda value: value > 0, "a positive number", "learning_rate", "epsilon")
        _check(self, lambda value: value >= 0, "a number of at least 0", "weight_decay", "final")
        _whole(self, "accumulation")
        _whole(self, "warmup", least=0)
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule: {self.schedule!r} is not one of {', '.join(get_args(Schedule))}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: {self.betas!r}, expected two numbers in [0, 1)")
        if self.clip is not None:
            _check(self, lambda value: value > 0, "a positive number or null", "clip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How experts are kept busy: weights of the `balance` loss (Switch, arXiv:2101.03961) and of the `z` loss (ST-MoE,
    arXiv:2202.08906); `bias_rate`: the step by which selection biases move against uneven loads after every update
    (arXiv:2408.15664), for models that have them; `capacity_factor`: choices beyond it are dropped, None: none are."""

    balance: float = 0.01
    z: float = 0.001
    bias_rate: float = 0.0
    capacity_factor: float | None = None

    def __post_init__(self):
        _check(self, lambda value: value >= 0, "a number of at least 0", "balance", "z", "bias_rate")
        if self.capacity_factor is not None:
            _check(self, lambda value: value > 0, "a positive number or null", "capacity_factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along the axes of `moe_jax.make_mesh`."""

    data: int = 1
    expert: int = 1
    model: int = 1

    def __post_init__(self):
        _whole(self, "data", "expert", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run.

    `model`: a hub `config.json` as a dictionary, for random weights; the path of one (`*.json`, the same); a folder, a
    hub id or a `.gguf` file, whose weights are trained on; or "demo". `upcycle`: arguments of `moe_jax.upcycle`, first
    applied to it. `steps`: of the optimizer, in all. `dtype`: of computation; weights and optimizer are float32.
    `remat`: activations are computed again in the backward pass, which takes a third more time and little memory.
    `unroll`: layers (or periods of layers) that are compiled as one turn of the loop over them: all of a few layers run
    a tenth faster on a GPU and take longer to compile.
    `checkpoint_every`, `evaluate_every`: steps, None: only at the end. `keep`: checkpoints. `seed`: of weights and of
    the text's order.

    Raises `ValueError` for values out of range.

    >>> Settings(model="demo", data=Data(corpus="pydoc_topics"), steps=10).routing.balance
    0.01
    """

    model: Any
    data: Data
    steps: int
    optimizer: Optimizer = Optimizer()
    routing: Routing = Routing()
    mesh: Mesh = Mesh()
    upcycle: Mapping[str, Any] | None = None
    dtype: Dtype = "float32"
    remat: bool = False
    unroll: int = 1
    seed: int = 0
    checkpoint_every: int | None = None
    keep: int = 2
    evaluate_every: int | None = None

    def __post_init__(self):
        _whole(self, "steps", "keep", "unroll")
        _whole(self, "seed", least=0)
        _whole(self, *(name for name in ("checkpoint_every", "evaluate_every") if getattr(self, name) is not None))
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(get_args(Dtype))}")
        if not isinstance(self.remat, bool):
            raise ValueError(f"remat: {self.remat!r} is neither true nor false")
        if not isinstance(self.model, (str, Mapping)):
            raise ValueError(f"model: {self.model!r} is neither a config nor a path")
        known = set(inspect.signature(upcycle).parameters) - {"model"}
        if self.upcycle is not None and not (isinstance(self.upcycle, Mapping) and set(self.upcycle) <= known):
            raise ValueError(f"upcycle: {self.upcycle!r}, expected values of {', '.join(sorted(known))}")
        parts = self.optimizer.accumulation * self.mesh.data * self.mesh.expert
        if self.data.batch_size % parts:
            raise ValueError(f"batch_size: {self.data.batch_size} windows do not divide into {parts} parts")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """From a dictionary with a dictionary for each part; `ValueError` for keys that there are not.

        >>> Settings.from_dict({"model": "demo", "data": {"corpus": "austen"}, "steps": 5}).data.corpus
        'austen'
        """
        return _built(cls, "", values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "Settings":
        """From a file as in `configs/train`. `OSError` if it cannot be read or is not JSON."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise OSError(f"{path}: not a JSON file ({error})") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_PARTS = {"data": Data, "optimizer": Optimizer, "routing": Routing, "mesh": Mesh}


def _built(kind: Any, where: str, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'settings'}: expected a dictionary, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}{', '.join(unknown)}: unknown; there are: {', '.join(fields)}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}{', '.join(missing)}: missing")
    nested = kind is Settings
    made = {k: _built(_PARTS[k], f"{k}.", v) if nested and k in _PARTS else v for k, v in values.items()}
    return kind(**made)
