"""Training: settings in, a model out, with checkpoints that a run goes on from (`moe-jax train`)."""

from .run import Evaluation, Outcome, train
from .settings import Data, Mesh, Optimizer, Routing, Settings
from .update import Report, State, Training

__all__ = [
    "Data",
    "Evaluation",
    "Mesh",
    "Optimizer",
    "Outcome",
    "Report",
    "Routing",
    "Settings",
    "State",
    "Training",
    "train",
]
