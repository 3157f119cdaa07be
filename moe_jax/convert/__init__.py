"""Between checkpoints of other programs and ours."""

from . import deepspeed

__all__ = ["deepspeed"]
