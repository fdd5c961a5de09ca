"""All tasks by name; those of a hub in harness.py. A new one: a file of its own with a `Task`, and its line here."""

from dataclasses import replace

from vllm_infllm.tools import UsageError
from vllm_infllm.tools.eval.haystack import HaystackName
from vllm_infllm.tools.eval.tasks import harness
from vllm_infllm.tools.eval.tasks.base import HaystackTask, Task
from vllm_infllm.tools.eval.tasks.code_run import CODE_RUN
from vllm_infllm.tools.eval.tasks.common_words import COMMON_WORDS
from vllm_infllm.tools.eval.tasks.digits import NUMBER, PASSKEY, PLAIN_PASSKEY
from vllm_infllm.tools.eval.tasks.frequent_words import FREQUENT_WORDS
from vllm_infllm.tools.eval.tasks.kv import KV
from vllm_infllm.tools.eval.tasks.math_find import MATH_FIND
from vllm_infllm.tools.eval.tasks.needle import NEEDLES
from vllm_infllm.tools.eval.tasks.perplexity import PERPLEXITY
from vllm_infllm.tools.eval.tasks.variable_tracking import VARIABLE_TRACKING

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        PASSKEY,
        PLAIN_PASSKEY,
        NUMBER,
        KV,
        MATH_FIND,
        CODE_RUN,
        *NEEDLES,
        VARIABLE_TRACKING,
        COMMON_WORDS,
        FREQUENT_WORDS,
        PERPLEXITY,
    )
}


def find(name: str, haystack: HaystackName | None = None) -> Task:
    """The task of this name, over another haystack than its benchmark's if one is given and the task has one.

    Raises:
        UsageError: for a name that is not there; lists those that are.
    """
    if name in harness.NAMES:
        return harness.find(name)
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}; the tasks are {', '.join((*TASKS, *harness.NAMES))}")
    task = TASKS[name]
    return replace(task, haystack=haystack) if haystack and isinstance(task, HaystackTask) else task
