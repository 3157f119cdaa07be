"""Files of torch.save: what honest ones hold, and that hostile ones are refused without any effect."""

import argparse
import copyreg
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN
from torch_writer import archive, group, named, number, save, storage, tensor, text

from moe_jax.checkpoint import torch_pickle
from moe_jax.checkpoint.torch_file import LazyTensor, Record, TorchFile

FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}


def arrays(content):
    return {name: value.read() for name, value in content.items() if isinstance(value, LazyTensor)}


@pytest.mark.parametrize("name", ["tensors.pt", "tensors_protocol4.pt"])
def test_what_torch_wrote(name):
    content = TorchFile(GOLDEN / "torch" / name).content
    base, deep = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(24).reshape(2, 3, 4)
    expected = {
        "base": base,
        "view": base.T,
        "row": base[1],
        "strided": deep[:, 1, ::2].astype(ml_dtypes.bfloat16),
        "bfloat16": deep.astype(ml_dtypes.bfloat16),
        "scalar": np.float32(3.5),
        "empty": np.zeros((0, 3), np.float32),
        "expanded": np.tile(np.arange(3, dtype=np.float32), (2, 1)),
        "parameter": np.ones(2, np.float32),
    }
    for dtype in "float16 float64 int8 int16 int32 int64 uint8 bool".split():
        expected[dtype] = np.array([[1, 2, 3], [0, 5, 100]]).astype(dtype)
    found = arrays(content)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape) == (content[key].dtype, value.shape)
        np.testing.assert_array_equal(found[key], value)
        assert found[key].flags.c_contiguous and found[key].flags.writeable
    assert isinstance(content["ordered"], OrderedDict) and list(content["ordered"]) == ["b", "a"]
    plain = {"default": {"a": [1]}, "set": {1, 2}, "frozen": frozenset("x"), "nested": (1, [2, (3,)], {"x": {}})}
    plain |= {"bytes": b"ab\xff", "no_bytes": b"", "none": None, "bools": [True, False], "big": 2**70, "negative": -5}
    plain |= {"float": 1.5, "text": "é中", "size": (3, 4), "dtype": "torch.bfloat16", "device": "cuda:1"}
    assert {key: content[key] for key in plain} == plain
    assert type(content["args"]) is Record and content["args"].kind == "argparse.Namespace"
    assert content["args"] == {"num_layers": 2, "params_dtype": "torch.float16", "lr": [0.1]}


def test_random_states_are_inert():
    kind, state, *_ = TorchFile(GOLDEN / "torch/tensors.pt").content["random"]
    assert kind == "MT19937" and type(state) is Record and state.kind == "numpy.ndarray" and state == {}


@pytest.mark.parametrize("case", ["standard", "residual"])
def test_what_deepspeed_wrote(case):
    """Every tensor that NAMES.txt lists, file by file."""
    folder = GOLDEN / f"deepspeed/checkpoint_{case}"
    listed, found, file = {}, {}, None
    for line in (folder / "NAMES.txt").read_text().splitlines():
        if not line.startswith(" "):
            file = listed.setdefault(line, [])
        elif "float32 [" in line:
            file.append(" ".join(line.split()))
    for path in sorted(folder.glob("*/*.pt")):
        content = TorchFile(path).content
        tensors = content.get("module", content)
        lines = [f"{n} {t.dtype} {list(t.shape)}" for n, t in tensors.items() if isinstance(t, LazyTensor)]
        found[f"{path.parent.name}/{path.name}"] = lines
    assert found == listed


def test_the_writer_of_the_tests(tmp_path):
    base = np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6)
    value = {
        "w": base,
        "view": base[1:, ::2].T,
        "args": argparse.Namespace(heads=4),
        "more": [1.5, None, ("é", -(2**40))],
    }
    save(tmp_path / "a.pt", value)
    content = TorchFile(tmp_path / "a.pt").content
    np.testing.assert_array_equal(content["w"].read(), base)
    np.testing.assert_array_equal(content["view"].read(), base[1:, ::2].T)
    assert content["args"] == {"heads": 4} and content["more"] == value["more"]
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        assert sum("/data/" in name for name in file.namelist()) == 1


def test_bytes_are_read_when_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save(path, {"big": np.zeros(1 << 20, np.float32), "small": np.arange(6, dtype=np.int8)[2:4]})
    taken, pread, preadv = [], os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, n, at: taken.append(n) or pread(fd, n, at))
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: taken.append(len(to[0])) or preadv(fd, to, at))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    file = TorchFile(path)
    assert sum(taken) < 4096
    taken.clear()
    assert file.content["small"].read().tolist() == [2, 3] and sum(taken) == 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
    os.utime(path, (1, 1))
    with pytest.raises(OSError, match="changed"):
        file.content["small"].read()
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.content["small"].read()


def hostile_pickles(marker):
    """Pickles that would do something if they were executed, and the text that a refusal has to show."""
    command = text(f"touch {marker}")

    class Reduced:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    for protocol in range(6):
        yield f"protocol {protocol}", pickle.dumps(Reduced(), protocol), f"{os.system.__module__}.system"
    yield "eval", named("builtins", "eval") + group(command) + b"R.", "builtins.eval"
    yield "py2 eval", named("__builtin__", "eval") + group(command) + b"R.", "__builtin__.eval"
    yield "getattr", named("builtins", "getattr") + group(text("a"), text("b")) + b"R.", "builtins.getattr"
    yield "import", named("builtins", "__import__") + group(text("os")) + b"R.", "builtins.__import__"
    yield "module", named("hostile_module", "thing") + b".", "hostile_module.thing"
    yield "stack global", text("hostile_module") + text("thing") + b"\x93.", "hostile_module.thing"
    yield "dots", text("torch") + text("serialization.os.system") + b"\x93" + group(command) + b"R.", "os.system"
    yield "torch.load", named("torch.serialization", "load") + group(command) + b"R.", "torch.serialization.load"
    yield "rebuild", named("torch._utils", "_rebuild_tensor_v2.__globals__") + b".", "__globals__"
    yield "split elsewhere", named("torch._utils._rebuild_tensor_v2", "__globals__") + b".", "__globals__"
    yield "number as name", number(1) + text("x") + b"\x93.", "not named by text"
    yield "INST", b"(" + command + b"ios\nsystem\n.", "INST for 'os.system'"
    yield "OBJ", b"(" + named("os", "system") + command + b"o.", "os.system"
    yield "OBJ of a known name", b"(" + named("argparse", "Namespace") + command + b"o.", "OBJ"
    yield "NEWOBJ_EX", named("argparse", "Namespace") + b")}\x92.", "NEWOBJ_EX"
    yield "NEWOBJ", named("torch", "FloatStorage") + b")\x81.", "torch.FloatStorage"
    yield "NEWOBJ with arguments", named("argparse", "Namespace") + group(command) + b"\x81.", "argparse.Namespace"
    yield "NEWOBJ of text", command + b")\x81.", "builds a str"
    yield "call of a type", named("builtins", "dict") + b")R.", "builtins.dict"
    yield "call of a dtype", named("torch", "float32") + b")R.", "calls a str"
    yield "call of the result", named("collections", "OrderedDict") + b")R)R.", "calls a OrderedDict"
    yield "arguments in a list", named("collections", "OrderedDict") + b"]R.", "calls"
    yield "EXT1", b"\x82\xf0" + group(command) + b"R.", "EXT1"
    yield "EXT2", b"\x83\xf0\x00" + group(command) + b"R.", "EXT2"
    yield "EXT4", b"\x84\xf0\x00\x00\x00" + group(command) + b"R.", "EXT4"
    yield "PERSID", b"P" + b"storage\n.", "PERSID"
    yield "buffer", b"\x97.", "NEXT_BUFFER"
    yield from hostile_states(command)


def hostile_states(command):
    """BUILD where it could run something, and factories."""
    state = b"}" + text("__setstate__") + command + b"s"
    yield "state of a dict", b"}" + state + b"b.", "state of a dict"
    yield "state of a list", b"]" + state + b"b.", "state of a list"
    yield "state of a tensor", tensor(storage()) + state + b"b.", "state of a LazyTensor"
    yield "state of a name", named("argparse", "Namespace") + state + b"b.", "state of a Name"
    yield (
        "state that is no dict",
        named("argparse", "Namespace") + b")\x81" + group(command) + b"b.",
        "state of a Record",
    )
    yield (
        "state after OrderedDict",
        named("collections", "OrderedDict") + b")R" + named("os", "system") + b"b.",
        "os.system",
    )
    yield "factory", named("collections", "defaultdict") + named("os", "getcwd") + b"\x85R.", "os.getcwd"


def test_hostile_pickles(tmp_path, monkeypatch):
    """All are refused by an OSError that names the file and what was wanted, and nothing has happened."""
    marker, path = tmp_path / "marker", tmp_path / "hostile.pt"
    (tmp_path / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w')\nthing = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    copyreg.add_extension("os", "system", 240)
    try:
        for what, pickled, message in hostile_pickles(marker):
            archive(path, pickled, FOUR)
            with pytest.raises(OSError, match=message) as raised:
                TorchFile(path)
            assert str(path) in str(raised.value), what
            assert not marker.exists() and "hostile_module" not in sys.modules, what
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_names_in_a_record_are_data(tmp_path):
    state = b"}" + text("__class__") + text("os") + b"s" + text("__init__") + number(1) + b"s"
    archive(tmp_path / "a.pt", named("argparse", "Namespace") + b")\x81" + state + b"b.", {})
    content = TorchFile(tmp_path / "a.pt").content
    assert type(content) is Record and content == {"__class__": "os", "__init__": 1}


STRANGE_TENSORS = {
    "claims more": tensor(storage(count=5)),
    "claims less": tensor(storage(count=3), shape=(3,)),
    "claims 2**60": tensor(storage(count=2**60), shape=(2**60,)),
    "no such entry": tensor(storage("7")),
    "key is a path": tensor(storage("../0")),
    "key is a path of digits": tensor(storage("0/../0")),
    "negative length": tensor(storage(count=-4)),
    "storage of a name": tensor(storage(kind="float32")),
    "storage of a class": tensor(storage(module="builtins", kind="int")),
    "complex": tensor(storage(kind="ComplexFloatStorage")),
    "id of four": tensor(group(text("storage"), named("torch", "FloatStorage"), text("0"), number(4)) + b"Q"),
    "id is text": tensor(text("storage") + b"Q"),
    "id is a module": tensor(group(text("module"), named("torch", "FloatStorage"), *[text("0")] * 3) + b"Q"),
    "length is text": tensor(group(text("storage"), named("torch", "FloatStorage"), *[text("0")] * 3) + b"Q"),
    "no storage": tensor(b"N"),
    "negative offset": tensor(storage(), offset=-1),
    "offset": tensor(storage(), offset=1),
    "huge offset": tensor(storage(), offset=2**200),
    "negative stride": tensor(storage(), strides=(-1,)),
    "stride": tensor(storage(), strides=(2,)),
    "huge stride": tensor(storage(), strides=(2**62,)),
    "negative shape": tensor(storage(), shape=(-4,)),
    "shape": tensor(storage(), shape=(5,)),
    "two and one": tensor(storage(), shape=(2, 2)),
    "repeated 2**40 times": tensor(storage(), shape=(2**40, 4), strides=(0, 1)),
    "empty and huge": tensor(storage(), shape=(0, 2**60), strides=(1, 1)),
    "40 dimensions": tensor(storage(), shape=(1,) * 40, strides=(1,) * 40),
    "conjugate": tensor(storage(), view=b"}" + text("conj") + b"\x88s"),
    "too few arguments": named("torch._utils", "_rebuild_tensor_v2") + group(storage()) + b"R",
    "parameter of text": named("torch._utils", "_rebuild_parameter") + group(text("a"), b"N", b"N") + b"R",
}
BOMBS = {
    "memo": b"Nr\xff\xff\xff\x7f0" * 10 + b"Nj\xff\xff\xff\x7e.",
    "text": b"\x8d" + struct.pack("<Q", 2**62) + b".",
    "bytes": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "frame": b"\x95" + struct.pack("<Q", 2**62),
    "long integer": b"\x8b" + struct.pack("<I", 2**31 - 1) + b".",
    "deep": b"]" * 20_000 + b"a" * 19_999 + b".",
    "deep tuples": b")" + b"\x85" * 20_000 + b".",
    "contains itself": b"]q\x00h\x00a.",
    "contains itself further down": b"]q\x00](h\x00ea}" + text("a") + b"h\x00sa.",
    "doubled": b")" + b"2\x86" * 1000 + b".",
    "doubled as a key": b"})" + b"2\x86" * 60 + b"Ns.",
    "list as a key": b"}]Ns.",
    "list in a set": b"\x8f(]\x90.",
    "copies": text("x" * 100_000)
    + b"q\x000("
    + (named("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R") * 700
    + b"t.",
    "pickle itself": b"N0" * (9 << 20) + b"N.",
    "no stop": b"N",
    "nothing": b"",
    "two values": b"NN.",
    "mark left": b"N(.",
    "no mark": b"Nt.",
    "no value": b".",
    "odd items": b"}(Nu.",
    "append to a tuple": b")Na.",
    "append to nothing": b"Na.",
    "missing memo": b"h\x05.",
    "text that is not UTF-8": b"X\x02\x00\x00\x00\xff\xff.",
    "no opcode": b"\xff.",
    "global without an end": b"cos",
}


@pytest.mark.parametrize(
    "pickled", [*(t + b"." for t in STRANGE_TENSORS.values()), *BOMBS.values()], ids=[*STRANGE_TENSORS, *BOMBS]
)
def test_strange_pickles(tmp_path, pickled):
    """Refused with little memory: what a file claims is held against what it has."""
    path = tmp_path / "a.pt"
    archive(path, pickled, FOUR)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match=r"a\.pt: "):
            TorchFile(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_steps_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_STEPS", 1000)
    archive(tmp_path / "a.pt", b"N0" * 1000 + b"N.", {})
    with pytest.raises(OSError, match="more than 1000 steps"):
        TorchFile(tmp_path / "a.pt")
