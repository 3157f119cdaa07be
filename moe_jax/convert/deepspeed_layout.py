"""Which files a DeepSpeed checkpoint folder has: the main file and the experts' files of each model-parallel rank."""

import dataclasses
import itertools
import re
from collections.abc import Collection
from pathlib import Path

_MAIN = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OLD_EXPERT = re.compile(r"expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_PARTITIONED = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_PIPELINE = re.compile(r"layer_\d+-model_(\d+-)?.*model_states\.pt")
_MAX_LATEST = 4096


@dataclasses.dataclass(frozen=True)
class Layout:
    """Files by rank: `mains[mp]` and `experts[moe layer, expert][mp]`; the older layout has None as its MoE layer."""

    folder: Path
    tag: str
    mains: list[Path]
    experts: dict[tuple[int | None, int], list[Path]]


def find_layout(path: str | Path, tag: str | None = None) -> Layout:
    """The files below `path`: a checkpoint folder with `latest`, or the folder of one tag.

    Raises `OSError` for files that are missing, there twice, or of a kind that is not supported.
    """
    folder, tag = _find_folder(Path(path), tag)
    names = sorted(p.name for p in folder.iterdir())
    _refuse_kinds(folder, names)
    mains: dict[int, str] = {}
    experts: dict[tuple[int | None, int], dict[int, str]] = {}
    for name in names:
        if match := _MAIN.fullmatch(name):
            _place(mains, int(match[1]), name, folder)
        elif match := _EXPERT.fullmatch(name):
            _place(experts.setdefault((int(match[1]), int(match[2])), {}), int(match[3]), name, folder)
        elif match := _OLD_EXPERT.fullmatch(name):
            _place(experts.setdefault((None, int(match[1])), {}), int(match[2]), name, folder)
    if not mains:
        raise OSError(f"{folder}: no mp_rank_00_model_states.pt")
    _refuse_gaps(folder, "the main files' model-parallel ranks", mains)
    layers = {layer for layer, _ in experts}
    if None in layers and len(layers) > 1:
        raise OSError(f"{folder}: expert files of the older layout beside those of the newer one")
    _refuse_gaps(folder, "MoE layers with expert files", layers - {None})
    for layer in layers:
        what = "expert files" if layer is None else f"expert files of MoE layer {layer}"
        _refuse_gaps(folder, what, {number for at, number in experts if at == layer})
    for files in experts.values():
        if set(files) != set(mains):
            raise OSError(
                f"{folder}: {files[min(files)]} is there for model-parallel ranks {sorted(files)[:8]}, "
                f"but main files are there for ranks 0 to {len(mains) - 1}"
            )
    return Layout(
        folder,
        tag,
        [folder / mains[rank] for rank in range(len(mains))],
        {key: [folder / experts[key][rank] for rank in range(len(mains))] for key in sorted(experts, key=_order)},
    )


def _order(key: tuple[int | None, int]) -> tuple[int, int]:
    """By number: `expert_10` comes before `expert_2` among names."""
    return (-1 if key[0] is None else key[0], key[1])


def _find_folder(path: Path, tag: str | None) -> tuple[Path, str]:
    if not path.is_dir():
        raise OSError(f"{path}: no such folder")
    if tag is None and _has_states(path):
        return path, path.resolve().name
    if tag is None:
        latest = path / "latest"
        if not latest.is_file():
            tags = sorted(p.name for p in path.iterdir() if p.is_dir() and _has_states(p))
            raise OSError(f"{path}: no file named latest; give one of the tags there: {', '.join(tags) or 'none'}")
        with open(latest, "rb") as file:
            tag = file.read(_MAX_LATEST).decode("utf-8", "replace").strip()
    if tag in ("", ".", "..") or not tag.isprintable() or {"/", "\\"} & set(tag):
        raise OSError(f"{path}: the tag {tag[:100]!r} is not the name of a folder in it")
    if not (path / tag).is_dir():
        if path.name == tag and _has_states(path):
            return path, tag
        raise OSError(f"{path}: no folder for the tag {tag!r}")
    return path / tag, tag


def _has_states(folder: Path) -> bool:
    return any(p.name.endswith("model_states.pt") for p in folder.iterdir())


def _refuse_kinds(folder: Path, names: list[str]) -> None:
    """Kinds of checkpoints that spread a tensor or a layer over files in other ways."""
    for name in names:
        if _PARTITIONED.fullmatch(name):
            raise OSError(
                f"{folder}: {name} holds weights partitioned by ZeRO-3, which is not supported; "
                "join them with the zero_to_fp32.py that DeepSpeed puts into the folder"
            )
        if _PIPELINE.fullmatch(name):
            raise OSError(f"{folder}: {name} is of a pipeline-parallel checkpoint, which is not supported")


def _place(files: dict, key: object, name: str, folder: Path) -> None:
    if key in files:
        raise OSError(f"{folder}: {files[key]} and {name} are the same file by their numbers")
    files[key] = name


def _refuse_gaps(folder: Path, what: str, numbers: Collection) -> None:
    """Numbers have to be 0, 1, ... without a gap."""
    present = set(numbers)
    if present and len(present) != max(present) + 1:
        gaps = list(itertools.islice((n for n in range(max(present)) if n not in present), 8))
        raise OSError(f"{folder}: {what} go up to {max(present)}, but these are missing: {', '.join(map(str, gaps))}")
