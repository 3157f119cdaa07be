"""What the names in torch's pickles mean here: values of our own, made by the functions in one table."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
#: What keys and members of sets may be: values that hash at once.
SCALARS = (str, int, float, bool, bytes, type(None))

_DTYPES = """float16 float32 float64 half float double bfloat16 uint8 int8 int16 int32 int64 short int long bool
  complex64 complex128 float8_e4m3fn float8_e5m2""".split()


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file, or one made of several: shape and NumPy dtype now, the values when `read` is called."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def read(self) -> np.ndarray:
        """The values, in memory of their own. Raises `OSError` if the file has changed or was closed."""
        return self.load()


class Record(dict):
    """Fields of an object whose class is known but not built: `kind` is the class's name, such as `argparse.Namespace`.

    NumPy arrays and scalars (random number states, mostly) become records without fields.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def __repr__(self) -> str:
        return f"Record({self.kind!r}, {dict(self)!r})"


@dataclasses.dataclass(frozen=True)
class Name:
    """A name in the pickle: text, never what it names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of values in the archive: dtype, entry and length in values."""

    dtype: np.dtype
    key: str
    count: int


def meaning(module: str, name: str) -> Name | str | None:
    """A known name as an inert value (a dtype as text), None for any other name."""
    module = "builtins" if module == "__builtin__" else module
    if module == "torch" and name in _DTYPES:
        return f"torch.{name}"
    return Name(module, name) if (module, name) in _NAMES or (module, name) in CALLS else None


# Below, `m` is the machine that runs the pickle: it refuses, checks keys and counts what is copied.


def _ordered(m: Any, items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((m.key(key), value) for key, value in m.spend(_sequence(m, items)))


def _defaults(m: Any, factory: Any = None) -> dict[Any, Any]:
    """A defaultdict without its factory."""
    return {}


def _sequence(m: Any, items: Any) -> Any:
    if type(items) not in (list, tuple):
        m.refuse(f"a container made from a {type(items).__name__}")
    return items


def _encoded(m: Any, text: Any, encoding: Any) -> bytes:
    """Bytes, as old pickle protocols spell them."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        m.refuse("bytes that are not spelled as latin-1 text")
    return m.spend(text).encode("latin-1")


def _size(m: Any, lengths: Any) -> tuple[int, ...]:
    if any(type(n) is not int for n in m.spend(_sequence(m, lengths))):
        m.refuse("a torch.Size of something else than integers")
    return tuple(lengths)


def _device(m: Any, kind: Any, index: Any = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        m.refuse("a torch.device that is not named by text")
    return kind if index is None else f"{kind}:{index}"


def _tensor(
    m: Any, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, view: Any = None
) -> LazyTensor:
    if type(storage) is not Storage:
        m.refuse("a tensor without a storage")
    if view:
        m.refuse("a tensor with a conjugate or negative view, which is not supported")
    return m.tensor(storage, offset, shape, strides)


def _parameter(m: Any, data: Any, grad: Any, hooks: Any) -> LazyTensor:
    if type(data) is not LazyTensor:
        m.refuse("a parameter without a tensor")
    return data


def _record(kind: str) -> Callable[..., Record]:
    return lambda m, *args: Record(kind)


#: Names that the pickle may call, with what is done instead.
CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): _defaults,
    ("builtins", "set"): lambda m, items=(): set(m.keys(m.spend(_sequence(m, items)))),
    ("builtins", "frozenset"): lambda m, items=(): frozenset(m.keys(m.spend(_sequence(m, items)))),
    ("builtins", "bytes"): lambda m: b"",
    ("_codecs", "encode"): _encoded,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("numpy.core.multiarray", "_reconstruct"): _record("numpy.ndarray"),
    ("numpy._core.multiarray", "_reconstruct"): _record("numpy.ndarray"),
    ("numpy.core.multiarray", "scalar"): _record("numpy.generic"),
    ("numpy._core.multiarray", "scalar"): _record("numpy.generic"),
    ("numpy", "dtype"): _record("numpy.dtype"),
}
# Names that only stand for themselves: factories, classes, storage types.
_NAMES = {("builtins", name) for name in "int float bool str list dict tuple".split()}
_NAMES |= {("torch", name) for name in STORAGES} | {("argparse", "Namespace"), ("numpy", "ndarray")}
