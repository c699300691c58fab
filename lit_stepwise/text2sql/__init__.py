"""Text-to-SQL from end to end: tasks, prompts, play, execution, comparison, reward. Copy this room for a new task."""

from lit_stepwise.text2sql.data import JSONLTasks, SQLTask
from lit_stepwise.text2sql.demo import DemoTasks
from lit_stepwise.text2sql.environment import Text2SQL
from lit_stepwise.text2sql.executors import SQLiteExecutor
from lit_stepwise.text2sql.reward import ExecutionReward

__all__ = ["DemoTasks", "ExecutionReward", "JSONLTasks", "SQLTask", "SQLiteExecutor", "Text2SQL"]
