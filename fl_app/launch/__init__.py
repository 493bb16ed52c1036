"""A whole federation on this machine: `python -m fl_app.launch`, and `federate` for programs."""

from fl_app.launch.federation import LaunchError, federate
from fl_app.launch.silo_data import partition_data

__all__ = ["LaunchError", "federate", "partition_data"]
