"""Looking inside a model's routing over a text: which experts serve which tokens, how evenly, and with whom."""

from .compare import Drift, drift
from .examples import Context, Examples, TokenCount
from .usage import Usage, usage

__all__ = ["Context", "Drift", "Examples", "TokenCount", "Usage", "drift", "usage"]
