"""Tasks: questions with known answers, a scorer, and the statistics to compare models on them."""

from foveate.tasks.base import TASKS, Item, Task, find_tasks
from foveate.tasks.evaluate import Record, evaluate
from foveate.tasks.stats import mcnemar, paired_bootstrap, wilson

__all__ = ["TASKS", "Item", "Record", "Task", "evaluate", "find_tasks", "mcnemar", "paired_bootstrap", "wilson"]
