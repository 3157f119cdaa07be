"""Expert parallelism: tokens meet experts that other devices hold. One file for each way."""

from .api import EXCHANGES, check, chosen, exchange
from .value import Work

__all__ = ["EXCHANGES", "Work", "check", "chosen", "exchange"]
