"""The synthetic tasks, one file each; importing this package registers them all in ``TASKS``."""

from stepladder.data.base import TASKS
from stepladder.data.tasks import (
    addition,
    chain,
    compare,
    copy,
    dyck,
    listops,
    mod_add,
    multiplication,
    parity,
    recall,
    reverse,
    state_tracking,
    successor,
)

__all__ = [
    "TASKS",
    "addition",
    "chain",
    "compare",
    "copy",
    "dyck",
    "listops",
    "mod_add",
    "multiplication",
    "parity",
    "recall",
    "reverse",
    "state_tracking",
    "successor",
]
