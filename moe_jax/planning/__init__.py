"""Plans: what a model needs on a mesh of devices that need not be there, from its compiled programs."""

from .devices import DEVICES, Device, Topology, open_topology
from .plan import Plan, make_plan
from .programs import Job
from .report import as_json, as_text
from .search import search

__all__ = [
    "DEVICES",
    "Device",
    "Job",
    "Plan",
    "Topology",
    "as_json",
    "as_text",
    "make_plan",
    "open_topology",
    "search",
]
