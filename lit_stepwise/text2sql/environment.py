"""Text-to-SQL as a game: a question and the tables, looks into the database, one final answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from lit_stepwise.errors import ConfigError, DataError
from lit_stepwise.interfaces import Environment, Episode, Executor, Reward
from lit_stepwise.text2sql.comparison import has_top_level_order_by, results_match
from lit_stepwise.text2sql.data import SchemaStyle, SQLTask, read_schema
from lit_stepwise.text2sql.executors import SQLiteExecutor
from lit_stepwise.text2sql.prompts import (
    INSTRUCTIONS,
    STOP,
    Action,
    format_observation,
    format_question,
    format_reprimand,
    parse_action,
)
from lit_stepwise.text2sql.reward import ExecutionReward
from lit_stepwise.types import Feedback, Message, QueryResult, SQLTurn, Task

_REWARD = ExecutionReward()
_CALLERS = 8  # enough to keep any sensible number of workers busy


class Text2SQL(Environment):
    """Questions about databases, answered with SQL over several turns."""

    stop = STOP

    def __init__(
        self,
        executor: Executor | None = None,
        reward: Reward = _REWARD,
        instructions: str = INSTRUCTIONS,
        schema: SchemaStyle = "compact",
        max_shown_rows: int = 50,
        max_cell_chars: int = 200,
        max_observation_chars: int = 6000,
    ) -> None:
        """Settings only; workers start with the first statement.

        Args:
            executor: Runs the statements; by default a ``SQLiteExecutor``.
            reward: What a turn earns.
            instructions: The system message; empty for none, as for a model that was trained on the protocol.
            schema: How the prompt shows tables: ``orders(id, status)`` a line, or the statements that made them.
            max_shown_rows: Rows of one observation.
            max_cell_chars: Characters of one value in an observation.
            max_observation_chars: Characters of the table in one observation; rows beyond are left out.
        """
        limits = {
            "max_shown_rows": max_shown_rows,
            "max_cell_chars": max_cell_chars,
            "max_observation_chars": max_observation_chars,
        }
        for name, limit in limits.items():
            if limit < 1:
                raise ConfigError(f"rollout.environment.{name}={limit} shows nothing; use 1 or more")
        self.executor = executor or SQLiteExecutor()
        self.reward = reward
        self.instructions = instructions
        self.schema: SchemaStyle = schema
        self.max_shown_rows = max_shown_rows
        self.max_cell_chars = max_cell_chars
        self.max_observation_chars = max_observation_chars
        self._schemas: dict[Path, str] = {}
        self._golds: dict[tuple[Path, str], QueryResult] = {}

    def start(self, task: Task, max_turns: int) -> Episode:
        """Begin a fresh attempt. Raises ``DataError`` when the gold statement of the task does not run."""
        task = _sql_task(task)
        gold = self._gold(task)
        if complaint := _complain(gold):
            raise DataError(f"task {task.task_id} on {task.database}: {complaint}")
        return _SQLEpisode(self, task, gold, self._schema(task.database), max_turns)

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Read every schema and run every gold statement once. Raises ``DataError`` naming those that do not run."""
        distinct = list({(task.database, task.gold_sql): task for task in map(_sql_task, tasks)}.values())
        for task in distinct:
            self._schema(task.database)
        with ThreadPoolExecutor(_CALLERS) as pool:
            golds = pool.map(self._gold, distinct)
            golds = tqdm(golds, desc="gold statements", total=len(distinct), delay=2, leave=False)
            complaints = [
                f"task {task.task_id} on {task.database}: {complaint}"
                for task, gold in zip(distinct, golds, strict=True)
                if (complaint := _complain(gold))
            ]
        if complaints:
            raise DataError(
                f"{len(complaints)} of {len(distinct)} gold statements have no result to compare with; mend them or "
                "take their tasks out: " + "; ".join(complaints[:3]) + ("; ..." if len(complaints) > 3 else "")
            )

    def close(self) -> None:
        """End the executor's workers."""
        self.executor.close()

    def _schema(self, database: Path) -> str:
        if database not in self._schemas:
            self._schemas[database] = read_schema(database, self.schema)
        return self._schemas[database]

    def _gold(self, task: SQLTask) -> QueryResult:
        key = (task.database, task.gold_sql)
        if key in self._golds:
            return self._golds[key]
        gold = self.executor.execute(*key)
        if gold.status == "ok":  # a timeout may be over next time
            self._golds[key] = gold
        return gold


@dataclass
class _SQLEpisode(Episode):
    environment: Text2SQL
    task: SQLTask
    gold: QueryResult
    schema: str
    turns_left: int
    last_turn: SQLTurn | None = None

    def prompt(self) -> Sequence[Message]:
        question = Message("user", format_question(self.schema, self.task.question, self.task.evidence))
        instructions = self.environment.instructions
        return [Message("system", instructions), question] if instructions else [question]

    def step(self, response: str) -> Feedback:
        self.turns_left -= 1
        action = parse_action(response)
        if action.kind == "none":
            return self._feedback(action, None)
        return self._feedback(action, self.environment.executor.execute(self.task.database, action.sql))

    def cut_short(self) -> Mapping[str, float] | None:
        return self.environment.reward(replace(self.last_turn, last=True)) if self.last_turn else None

    def _feedback(self, action: Action, result: QueryResult | None) -> Feedback:
        details = _details(action, result)
        if result is not None and result.status == "infra":
            return Feedback("", failure=f"executor: {result.error}", details=details)
        is_solution = action.kind == "solution"
        correct = is_solution and result is not None and self._is_right(result)
        self.last_turn = SQLTurn(
            query=result,
            is_solution=is_solution,
            correct=correct,
            format_error=result is None,
            last=is_solution or self.turns_left <= 0,
        )
        return Feedback(
            observation="" if is_solution else self._observation(result),
            rewards=self.environment.reward(self.last_turn),
            done=is_solution,
            success=correct,
            format_error=result is None,
            details=details,
        )

    def _is_right(self, result: QueryResult) -> bool:
        return results_match(result, self.gold, ordered=has_top_level_order_by(self.task.gold_sql))

    def _observation(self, result: QueryResult | None) -> str:
        if result is None:
            return format_reprimand(self.turns_left)
        limits = self.environment
        return format_observation(
            result, self.turns_left, limits.max_shown_rows, limits.max_cell_chars, limits.max_observation_chars
        )


def _sql_task(task: Task) -> SQLTask:
    if not isinstance(task, SQLTask):
        raise ConfigError(f"Text2SQL cannot play a {type(task).__name__}; let data.source be one that reads SQLTask")
    return task


def _details(action: Action, result: QueryResult | None) -> dict[str, str | int]:
    if result is None:
        return {"action": action.kind, "sql": "", "status": "", "rows": 0, "error": ""}
    return {
        "action": action.kind,
        "sql": action.sql,
        "status": result.status,
        "rows": len(result.rows),
        "error": result.error,
    }


def _complain(gold: QueryResult) -> str:
    """Why a result cannot serve as gold; empty when it can."""
    if gold.status != "ok":
        return f"{gold.status}: {gold.error}"
    if gold.truncated:
        return f"more than {len(gold.rows)} rows or too many bytes; raise the executor's max_rows or max_bytes"
    return ""
