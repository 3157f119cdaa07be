"""A run's checkpoints: Orbax's, written beside training, whole or not there, read onto any devices."""

import contextlib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from .update import State

_PREFIX = "step"


class Checkpoints:
    """The checkpoints of `State`s in `folder`, the last `keep` of them; a context manager that waits for the last one.

    A checkpoint is written beside training under another name and takes its own when it is whole. One that is not
    readable all the same (truncated by a full disk, say) is passed over with a warning that names it, and set aside as
    `<name>.unreadable`. Raises `OSError` where the folder cannot be written.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix=_PREFIX, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, step: int) -> None:
        """Begin to write the state after `step` steps; it has been read when this returns, and may be donated."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, like: State) -> tuple[State, int] | None:
        """The last readable state, as the arrays `like` says, and its step; None if there is no checkpoint.

        Raises `OSError` if there are some, none of them readable, and `MemoryError` if there is no room for one.
        """
        broken: dict[Path, str] = {}
        for step in reversed(self.steps()):
            path = self.folder / f"{_PREFIX}_{step}"
            with _aftermath_ignored():
                try:
                    state = self._read(step, like)
                except MemoryError:
                    raise
                except Exception as error:  # Orbax and TensorStore raise whatever they like for a broken file
                    broken[path] = (str(error).splitlines() or [type(error).__name__])[0]
                if path in broken:
                    gc.collect()
                    time.sleep(_SETTLED)
                    gc.collect()
                    continue
            for path, words in broken.items():
                warnings.warn(f"checkpoint {path} is not readable, going on from step {step}: {words}", stacklevel=2)
                path.rename(path.with_name(f"{path.name}.unreadable"))
            self._manager.reload()
            return state, step
        if broken:
            raise OSError("; ".join(f"checkpoint {path} is not readable: {words}" for path, words in broken.items()))
        return None

    def _read(self, step: int, like: State) -> State:
        try:
            return jax.block_until_ready(self._manager.restore(step, args=ocp.args.StandardRestore(like)))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise MemoryError(f"no room for the checkpoint of step {step}: {error}") from error
            raise


@contextlib.contextmanager
def _aftermath_ignored() -> Iterator[None]:
    """Without the tracebacks of reads that were under way when another one failed: they find Orbax's event loop closed
    and Python prints that, as nobody waits for them any more."""
    before = sys.unraisablehook
    closed = lambda caught: "Event loop is closed" in str(caught.exc_value)
    sys.unraisablehook = lambda caught: None if closed(caught) else before(caught)
    try:
        yield
    finally:
        sys.unraisablehook = before


#: Seconds in which reads that were under way end.
_SETTLED = 0.2
