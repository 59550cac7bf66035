"""The demo bank's data, or other tasks', rebuilt from reasoning-gym and Python's own documentation.

python -m molora.training.recipes --out data/ --seed 0 --num-train 30000
"""

from molora.training.recipes.build import Summary, build, num_files, write
from molora.training.recipes.conversations import Message, Part, Record
from molora.training.recipes.items import Item
from molora.training.recipes.tasks import DEMO, DOMAINS, TASKS, Task, verify, verify_composite

__all__ = [
    "DEMO",
    "DOMAINS",
    "TASKS",
    "Item",
    "Message",
    "Part",
    "Record",
    "Summary",
    "Task",
    "build",
    "num_files",
    "verify",
    "verify_composite",
    "write",
]
