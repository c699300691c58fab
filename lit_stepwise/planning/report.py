"""A plan on the screen, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_stepwise.planning.fitting import Needs
from lit_stepwise.planning.machine import GIB
from lit_stepwise.planning.plan import Plan


def as_json(plan: Plan) -> str:
    """All figures under the names of the fields of ``Plan``; bytes, seconds and tokens."""
    parts = {each.name: getattr(plan, each.name) for each in fields(plan) if each.name != "model"}
    found: dict[str, Any] = {name: _plain(value) for name, value in parts.items()}
    names = ("path", "source", "num_parameters", "num_trained")
    found["model"] = {name: getattr(plan.model, name) for name in names} | {"flops": asdict(plan.model.flops)}
    found["room"] |= {"tokens": plan.room.tokens}
    found["memory"] |= {"held": plan.memory.held}
    found["needs"] |= {"fits": plan.needs.fits}
    if plan.seconds is not None:
        found["seconds"] |= {"play": plan.seconds.play, "total": plan.seconds.total}
    return json.dumps(found | {"fits": not plan.problem}, indent=2)


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def show(plan: Plan, console: Console) -> None:
    """Tables for a person."""
    for line in _head(plan):
        console.print(line, markup=False)
    for table in (_counts(plan), _memory(plan), _engine(plan), _time(plan)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for note in _notes(plan):
        console.print(f"- {note}", markup=False)
    if not plan.problem:
        console.print(f"It fits, by this account: {_margins(plan.needs)}.", markup=False)


def _head(plan: Plan) -> Iterator[str]:
    machine, model = plan.machine, plan.model
    trained = f", {_counted(model.num_trained)} of them trained" if model.num_trained < model.num_parameters else ""
    yield f"{model.path}: {_counted(model.num_parameters)} weights{trained} (from {model.source})"
    one, several = ("GPU", "GPUs") if machine.kind == "gpu" else ("process", "processes")
    devices = f"{machine.num_devices} {one if machine.num_devices == 1 else several}"
    nodes = f" on each of {machine.num_nodes} nodes" if machine.num_nodes > 1 else ""
    memory = f"{machine.memory / GIB:.4g} GiB {'each' if machine.kind == 'gpu' else 'a node'} ({machine.memory_source})"
    yield f"{devices}{nodes}, {memory}; strategy: {plan.strategy}"


def _counted(number: int) -> str:
    return f"{number / 1e9:.3f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _counts(plan: Plan) -> Table:
    table = _table("An iteration, over all ranks", "expected", "every budget used up")
    rows = {
        "trajectories": "num_trajectories",
        "turns": "num_turns",
        "step samples": "num_step_samples",
        "tokens sampled": "generated_tokens",
        "tokens of step samples, prompts included": "read_tokens",
        "  of them distinct among attempts at a task": "distinct_tokens",
        "  computed in a forward pass, as packed": "computed_tokens",
        "micro-batches of a rank in an optimizer step": "micro_batches",
        "optimizer steps": "num_steps",
    }
    for name, key in rows.items():
        table.add_row(name, *(f"{getattr(each, key):,}" for each in (plan.expected, plan.worst)))
    schedule = plan.schedule
    iterations = "no end" if schedule.num_iterations is None else f"{schedule.num_iterations:,}"
    steps = "no end" if schedule.num_steps is None else f"{schedule.num_steps:,}"
    table.add_row("iterations of the run", iterations, "")
    table.add_row("optimizer steps of the run", steps, "")
    tasks = plan.tasks
    assumed = " (assumed)" if tasks.is_assumed else ""
    table.add_row(f"training tasks{assumed}", f"{tasks.num_tasks:,}", "")
    table.add_row("  dropped, their first prompt too long", f"{tasks.num_dropped:,}", "")
    return table


def _memory(plan: Plan) -> Table:
    memory, room, needs = plan.memory, plan.room, plan.needs
    table = _table("Memory of a rank, GiB", "optimizer step", "play")
    between = needs.play - memory.held - room.awake
    rows = [
        ("weights", memory.weights, memory.weights),
        ("gradients", memory.gradients, memory.gradients),
        ("optimizer states", memory.optimizer, memory.optimizer),
        ("reference model", memory.reference, memory.reference),
        ("copies that ddp sums", memory.buckets, memory.buckets),
        ("gathered from all ranks, at the peak", memory.put_together, 0),
        ("copies that gloo makes of them, at the peak", memory.gloo, 0),
        (f"activations of {memory.num_tokens:,} tokens, at the peak", memory.activations, 0),
        ("  of them logits and gradient of the head, up to", memory.head, None),
        ("engine, asleep and awake", room.asleep, room.awake),
        ("CUDA, NCCL, unused by the allocator (assumed)", between, between),
    ]
    for name, step, play in rows:
        if step or play:
            table.add_row(name, _number(step), "" if play is None else _number(play))
    table.add_row("together, at the peak", _number(needs.update), _number(needs.play), style="bold")
    table.add_row("there are", _number(needs.available), _number(needs.available))
    return table


def _engine(plan: Plan) -> Table | None:
    room, limit = plan.room, plan.shape.limits.max_context_tokens
    if not room.is_known or not room.cache:
        return None
    over = f" over {room.num_devices} GPUs" if room.num_devices > 1 else ""
    table = _table(f"{room.name}{over}", "GiB of a device")
    table.add_row("its share", _number(room.awake))
    table.add_row("  weights", _number(room.weights))
    table.add_row("  activations, graphs (assumed)", _number(room.overhead))
    table.add_row("  keys and values", _number(room.cache))
    table.add_row("tokens that it can hold", f"{room.tokens:,}")
    table.add_row(f"  sequences of {limit:,} tokens at a time", f"{room.sequences(limit):.1f}")
    used = plan.lengths.prompt + plan.lengths.turns * (plan.lengths.response + plan.lengths.observation)
    table.add_row("  conversations of the expected length", f"{room.tokens / used:.1f}")
    return table


def _time(plan: Plan) -> Table | None:
    times, schedule = plan.seconds, plan.schedule
    if times is None:
        return None
    table = _table("Time at assumed rates, measured nowhere", "seconds of an iteration")
    rows = [
        ("weight sync", times.sync),
        ("play", times.play),
        ("  sampling", times.decode),
        ("  reading prompts", times.prefill),
        ("  environment, beside the engine", times.environment),
        ("old and reference log-probabilities", times.scoring),
        ("update", times.update),
        ("together" + (", play beside training" if times.overlaps else ""), times.total),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:,.1f}")
    if schedule.num_iterations is not None:
        table.add_row("hours of the run, without validation", f"{schedule.num_iterations * times.total / 3600:,.1f}")
        validation = _hours_of_validation(plan)
        if validation is not None:
            table.add_row(f"hours of {schedule.num_validations:,} validations", f"{validation:,.1f}")
    return table


def _hours_of_validation(plan: Plan) -> float | None:
    schedule = plan.schedule
    if plan.seconds is None or not schedule.num_validations or not schedule.num_validation_trajectories:
        return None
    share = schedule.num_validation_trajectories / plan.expected.num_trajectories
    return schedule.num_validations * share * plan.seconds.play / 3600


def _notes(plan: Plan) -> Iterator[str]:
    lengths, assume, rates = plan.lengths, plan.assume, plan.rates
    yield (
        f"expected (assumed, --assume.*): {lengths.turns:g} turns, {lengths.response} tokens a response, "
        f"{lengths.thought} of them thought, {lengths.observation} tokens between two"
    )
    yield f"first prompts: {lengths.prompt} tokens in the mean, {plan.tasks.longest} the longest ({plan.tasks.source})"
    if plan.tasks.num_unplayable:
        yield f"{plan.tasks.num_unplayable} of the tasks looked at cannot be played; lit-stepwise data check says why"
    yield "memory: one micro-batch of full size, simulated; allocator, CUDA and the engine by the assumptions above"
    if plan.strategy in ("fsdp", "FSDPStrategy"):
        yield "fsdp is planned as fsdp2, which shards the same"
    if plan.max_rounds > 1:
        yield f"rollout.filters.dynamic_sampling may play up to {plan.max_rounds} times as much; it is not counted"
    if not plan.room.is_known:
        yield f"{plan.room.name}: its memory is not counted, and its rates are taken to be those of the trainer's GPUs"
    if plan.machine.kind == "gpu" and plan.room.is_known and not plan.room.cache:
        yield f"{plan.room.name}: its cache grows with what is played, and is not counted"
    if plan.memory.num_tokens > plan.shape.max_tokens:
        yield (
            f"a sample of full length is longer than model.max_tokens_per_micro_batch={plan.shape.max_tokens}; it runs "
            "by itself on one rank, and memory is planned for it"
        )
    if plan.seconds is not None:
        said = ", ".join(f"{each.name} {getattr(rates, each.name):g}" for each in fields(rates))
        yield f"rates of one device (assumed, --rates.*): {said}"
        if plan.schedule.num_validation_trajectories is None:
            yield "validation is left out: its tasks cannot be read"
    else:
        yield "time is left out: there are no rates for this CPU; give them with --rates.*"
    if assume.overhead_gib and plan.machine.kind == "gpu":
        asleep = f"{assume.engine_asleep_gib:g} of an engine that sleeps"
        yield f"assumed besides: {assume.overhead_gib:g} GiB for CUDA and the allocator, {asleep}"


def _margins(needs: Needs) -> str:
    update, play = ((needs.available - each) / GIB for each in (needs.update, needs.play))
    return f"{update:.1f} GiB are left in an optimizer step, {play:.1f} GiB in play"


def _number(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.2f}" if gib >= 0.1 or not gib else f"{gib:.4f}"
