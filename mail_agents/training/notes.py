"""What a reader must know of a run: where it differs from what its agent is meant to be."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mail_agents.agent import Agent


def task_warning(agent: "Agent") -> str | None:
    """Says when an agent has to guess which of several tasks it is in."""
    if len(agent.tasks) < 2 or agent.task_embedder() is not None:
        return None
    hint = (
        "; add --config.language hash, or the id of a text model, unless"
        if hasattr(agent.config, "language")
        else ", but if"
    )
    return (
        f"The agent is not told which of the {len(agent.tasks)} tasks it is in{hint} the "
        "observations show it."
    )


def training_notes(agent: "Agent", steps: int) -> list[str]:
    """What a reader must know of a run: where it differs from what its agent is meant to be.

    Args:
        agent: Fitted.
        steps: Updates of the whole run.

    Returns:
        Sentences; none for most runs.
    """
    notes = [task_warning(agent)]
    if trainable_parameters(agent):
        notes += [_warmup_note(agent, steps), _evolution_note(agent, steps)]
    return [note for note in notes if note is not None]


def _warmup_note(agent: "Agent", steps: int) -> str | None:
    warmup = agent.config.optim.warmup_steps
    if not warmup or warmup < steps:
        return None
    return (
        f"All {steps:,} updates are warm-up: the learning rate rises for {warmup:,} updates "
        "(--config.optim.warmup-steps). Train for longer, or warm up for less."
    )


def _evolution_note(agent: "Agent", steps: int) -> str | None:
    evolution = getattr(agent.config, "self_evolution", None)
    if evolution is None or not evolution.enabled or steps > evolution.steps_per_stage:
        return None
    return (
        f"Self-evolution never starts: its first stage takes {evolution.steps_per_stage:,} updates "
        f"(--config.self-evolution.steps-per-stage) and the run has {steps:,}. Train for longer, "
        "or take shorter stages."
    )


def aims(agent: "Agent", target_returns: Sequence[float] = ()) -> str:
    """Says which returns an agent will aim for, in numbers; empty for one that aims for none.

    Args:
        agent: Fitted.
        target_returns: As given; none means the agent's own.
    """
    if target_returns:
        return f", targets {', '.join(f'{target:g}' for target in target_returns)}"
    if not agent.uses_target_return:
        return ""
    own = {agent.resolve_target(None, task) for task in agent.tasks or (None,)}
    numbers = sorted(target for target in own if target is not None)
    if not numbers:
        return ""
    several = f" to {numbers[-1]:g} by task" if len(numbers) > 1 else ""
    return f", target {numbers[0]:g}{several} (the agent's choice)"


def trainable_parameters(agent: "Agent") -> int:
    """Number of weights that training changes; 0 for reference agents."""
    return sum(p.numel() for p in agent.policy.parameters() if p.requires_grad)
