"""A run before it: what it plays, trains, needs and takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from lit_stepwise.algo.flops import Flops
from lit_stepwise.planning.architectures import folder_of_config, local_tokenizer
from lit_stepwise.planning.assumptions import Assumptions, Rates
from lit_stepwise.planning.attempts import Lengths, worst_lengths
from lit_stepwise.planning.engine import EngineRoom, engine_room
from lit_stepwise.planning.fitting import Change, Needs, needs_of, way_out_of_play, way_out_of_update
from lit_stepwise.planning.iteration import Iteration, Shape, fullest, iteration
from lit_stepwise.planning.machine import Machine
from lit_stepwise.planning.memory import RankMemory, Training, simulate
from lit_stepwise.planning.schedule import Schedule, schedule
from lit_stepwise.planning.seconds import Passes, Seconds, seconds
from lit_stepwise.planning.tasks import Survey, survey
from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.rollout.collector import Replica
from lit_stepwise.training.datamodule import TaskDataModule
from lit_stepwise.training.module import StepwiseModule
from lit_stepwise.training.objective import chosen
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import StepSample


@dataclass(frozen=True, slots=True)
class Settings:
    """A configuration as the command line gives it, and what planning is told besides."""

    module: StepwiseModule
    data: TaskDataModule
    rollout: RolloutCallback
    trainer: Any
    """The section ``trainer``, of which no Trainer was made."""
    gpu_memory_gib: float | None = None
    model_config: str | None = None
    assume: Assumptions = field(default_factory=Assumptions)
    rates: Rates = field(default_factory=Rates)


@dataclass(frozen=True, slots=True)
class Model:
    """What its configuration says."""

    path: str
    source: str
    """Where that is from."""
    num_parameters: int
    num_trained: int
    flops: Flops
    config: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``lit-stepwise plan`` prints."""

    model: Model
    machine: Machine
    strategy: str
    shape: Shape
    tasks: Survey
    schedule: Schedule
    lengths: Lengths
    max_rounds: int
    """Of play in an iteration, where filters ask for further tasks."""
    expected: Iteration
    worst: Iteration
    room: EngineRoom
    memory: RankMemory
    needs: Needs
    seconds: Seconds | None
    """None on CPUs, unless rates were given."""
    assume: Assumptions
    rates: Rates
    problem: str
    """The first thing that does not work, and the way out; empty where nothing was found."""


def make_plan(settings: Settings) -> Plan:
    """Look at everything, load nothing. Raises ``ConfigError`` for what a run would refuse at its start."""
    path = settings.module.model_path
    with ExitStack() as stack:
        source = _without_weights(settings, stack)
        return _plan(settings, path, source)


def _plan(settings: Settings, path: str, source: str) -> Plan:
    rollout, machine = settings.rollout, Machine.of(settings.trainer, settings.gpu_memory_gib)
    Replica.of(SimpleNamespace(global_rank=0, world_size=machine.num_ranks), rollout.engine)  # type: ignore[arg-type]
    model = _model(settings.module, path, source)
    tasks = survey(
        settings.data, rollout.environment, rollout.limits, rollout.history, local_tokenizer(path), settings.assume
    )
    training = Training(settings.module, machine, settings.trainer.strategy, settings.trainer.precision)
    shape = _shape(settings, training.num_shares)
    lengths = _expected_lengths(settings, tasks)
    expected, usual_batches = iteration(lengths, shape, model.flops)
    worst_case = worst_lengths(rollout.limits, rollout.history, settings.assume.thought_fraction)
    worst, worst_batches = iteration(worst_case, shape, model.flops)
    largest = fullest([*usual_batches, *worst_batches], shape, worst.tokens_of_step)
    room = engine_room(rollout.engine, model.config, model.num_parameters, machine, settings.assume)
    memory = simulate(training, largest)
    found = Plan(
        model=model,
        machine=machine,
        strategy=_name(settings.trainer.strategy, machine),
        shape=shape,
        tasks=tasks,
        schedule=schedule(settings.trainer, settings.data, rollout, expected.num_steps),
        lengths=lengths,
        max_rounds=rollout.filters.max_rounds if rollout.filters.dynamic_sampling else 1,
        expected=expected,
        worst=worst,
        room=room,
        memory=memory,
        needs=needs_of(memory, room, machine, settings.assume),
        seconds=_seconds(settings, model, expected, room, training),
        assume=settings.assume,
        rates=settings.rates,
        problem="",
    )
    return replace(found, problem=next(_problems(found, training), ""))


def _without_weights(settings: Settings, stack: ExitStack) -> str:
    """Let the module make models of configurations alone; where that of the policy is from."""
    module = settings.module
    own, reference = module.model_path, module.reference_path
    folder, source = stack.enter_context(folder_of_config(own, settings.model_config, "model.model_path"))
    module.model_path, module.reads_weights, module.staleness = folder, False, settings.rollout.staleness
    if reference is not None:
        other = folder_of_config(reference, settings.model_config if reference == own else None, "model.reference_path")
        module.reference_path = stack.enter_context(other)[0]
    return source


def _model(module: StepwiseModule, path: str, source: str) -> Model:
    policy = PolicyModel.load(module.model_path, packing=module.packing, empty_on="meta")
    num_parameters = sum(each.numel() for each in policy.parameters())
    if module.lora is not None:
        module.lora.attach(policy)
    num_trained = sum(each.numel() for each in policy.parameters() if each.requires_grad)
    return Model(path, source, num_parameters, num_trained, policy.flops, policy.language_model.config)


def _shape(settings: Settings, num_shares: int) -> Shape:
    rollout, experience = settings.rollout, settings.data.experience
    return Shape(
        limits=rollout.limits,
        history=rollout.history,
        rows=rollout.samples,
        samples_per_task=rollout.samples_per_task,
        tasks_per_iteration=settings.data.tasks_per_iteration,
        mini_batches=experience.mini_batches,
        passes=experience.passes,
        packing=settings.module.packing,
        max_tokens=settings.module.max_tokens_per_micro_batch,
        num_shares=num_shares,
    )


def _expected_lengths(settings: Settings, tasks: Survey) -> Lengths:
    limits, assume = settings.rollout.limits, settings.assume
    response = assume.response_tokens if assume.response_tokens is not None else -(-limits.max_new_tokens // 4)
    response = max(1, min(response, limits.max_new_tokens))
    turns = assume.turns if assume.turns is not None else (1 + limits.max_turns) / 2
    return Lengths(
        prompt=max(tasks.prompt_tokens, 1),
        response=response,
        thought=int(assume.thought_fraction * response),
        observation=assume.observation_tokens,
        turns=min(max(turns, 1.0), limits.max_turns),
    )


def _seconds(
    settings: Settings, model: Model, expected: Iteration, room: EngineRoom, training: Training
) -> Seconds | None:
    machine = training.machine
    if machine.kind == "cpu" and settings.rates == Rates():
        return None
    module, rollout = settings.module, settings.rollout
    old = chosen(module.old_logprobs, module.correction, rollout.staleness)[0]
    passes = Passes(
        recomputed=module.activation_checkpointing,
        old_logprobs=old == "trainer" and expected.num_steps > 1,
        reference=module.objective.kl.needs_reference,
    )
    travels = model.num_trained if rollout.engine.takes_adapters and module.lora else model.num_parameters
    return seconds(
        expected,
        passes,
        num_passes=settings.data.experience.passes,
        flops=model.flops,
        sync_bytes=4.0 * travels,
        num_ranks=machine.num_ranks,
        ranks_per_layer=training.ranks_per_layer,
        num_engines=max(machine.num_ranks // room.num_devices, 1),
        num_threads=rollout.num_environment_threads,
        rates=settings.rates,
        overlaps=rollout.staleness > 0,
    )


def _problems(plan: Plan, training: Training) -> Iterator[str]:
    """What does not work, as one line each with the way out."""
    shape, room = plan.shape, plan.room
    limits = shape.limits
    positions = getattr(plan.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and limits.max_context_tokens > positions:
        yield (
            f"rollout.limits.max_context_tokens={limits.max_context_tokens} is more than the {positions} tokens that "
            f"{plan.model.path} can read; use {positions} or fewer"
        )
    heads = plan.model.config.get_text_config(decoder=True).num_attention_heads
    if heads % room.num_devices:
        yield (
            f"rollout.engine.init_args.tensor_parallel_size={room.num_devices} does not divide the {heads} attention "
            f"heads of {plan.model.path}; use one that does"
        )

    def try_out(change: Change) -> Needs:
        memory = simulate(change.training, _largest(plan, change.shape))
        return needs_of(memory, room, change.training.machine, plan.assume)

    if plan.needs.update > plan.needs.available:
        yield way_out_of_update(training, shape, plan.memory, plan.needs, try_out)
    if room.cache and room.is_known and plan.machine.kind == "gpu":
        said = way_out_of_play(room, plan.needs, plan.machine, limits.max_context_tokens)
        if said:
            yield said
    elif plan.needs.play > plan.needs.available:
        yield f"rollout.engine={room.name} and the trainer do not fit together; use trainer.devices or a smaller model"


def _largest(plan: Plan, shape: Shape) -> list[StepSample]:
    """The micro-batch that takes the most memory, in another shape than that of the plan."""
    worst = worst_lengths(shape.limits, shape.history, plan.assume.thought_fraction)
    usual = replace(plan.lengths, prompt=min(plan.lengths.prompt, shape.limits.max_prompt_tokens))
    expected, at_worst = (iteration(lengths, shape, plan.model.flops) for lengths in (usual, worst))
    return fullest([*expected[1], *at_worst[1]], shape, at_worst[0].tokens_of_step)


def _name(strategy: Any, machine: Machine) -> str:
    if not isinstance(strategy, str):
        return type(strategy).__name__
    return {1: "one process", 2: "ddp"}[min(machine.num_ranks, 2)] if strategy == "auto" else strategy
