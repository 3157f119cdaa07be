"""Attention: `prefill_attention` of a prompt's tokens."""

from .api import prefill_attention

__all__ = ["prefill_attention"]
