"""From what the user names to a folder on disk."""

import os
import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
#: Models that come with the package, a folder each.
SHIPPED = Path(__file__).resolve().parent.parent / "shipped"


def resolve(path_or_id: str | os.PathLike) -> Path:
    """A folder as it is; an id such as `mistralai/Mixtral-8x7B-v0.1` downloaded through `huggingface_hub`; or a model
    that comes with the package, by its name ("novels").

    Only safetensors, JSON and tokenizer files at the top are fetched; some models keep a second copy in a folder.
    Raises `OSError` for what is neither a folder nor a well-formed id, for a missing `huggingface_hub`, and when the
    hub cannot be reached or has no such model.
    """
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name.isidentifier() and (SHIPPED / name).is_dir():
        return SHIPPED / name
    if path.exists() or not _ID.fullmatch(name):
        raise OSError(f"{name}: neither a folder nor a hub id of the form owner/name, nor 'novels'")
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError(
            f"{name} is not a folder here, and huggingface_hub, which would fetch it, is not installed: "
            "pip install 'moe-jax[hub]', or give a folder"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, ignore_patterns="*/*"))
    except Exception as error:  # the hub raises errors of several libraries; none of them is ours to list
        raise OSError(f"{name}: could not be fetched from the hub ({type(error).__name__}: {error})") from error
