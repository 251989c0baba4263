"""Who calls whom: the edges of the system, checked at both ends and drawn."""

from __future__ import annotations

from collections.abc import Mapping

from .tensors import Component, TensorSpec

PUBLIC = ("sparrow", "sparrow_track")
"""The components that applications call; everything else is internal."""


def served(components: Mapping[str, Component]) -> list[Component]:
    """The components that are Triton models."""
    return [component for component in components.values() if component.part_of is None]


def parts(components: Mapping[str, Component], model: str) -> list[Component]:
    """The graphs that a Triton model loads: its own, or those that are part of it."""
    return [component for component in components.values() if component.is_graph and (component.part_of or component.name) == model]


def ensemble_steps(components: Mapping[str, Component], name: str) -> list[tuple[Component, list[TensorSpec]]]:
    """The steps of an ensemble, each with the inputs that the ensemble's inputs or an earlier step provide.

    Raises:
        ValueError: a required input of a step, or an output of the ensemble, is provided by nobody.
    """
    ensemble = components[name]
    provided = {spec.name for spec in ensemble.inputs}
    steps = []
    for step in (components[call] for call in ensemble.calls):
        missing = [spec.name for spec in step.inputs if spec.name not in provided and not spec.optional]
        if missing:
            raise ValueError(f"{name}: nobody provides {', '.join(missing)} of {step.name}, expected an earlier step or an input to.")
        steps.append((step, [spec for spec in step.inputs if spec.name in provided]))
        provided |= {spec.name for spec in step.outputs}
    missing = [spec.name for spec in ensemble.outputs if spec.name not in provided]
    if missing:
        raise ValueError(f"{name}: no step provides the output {', '.join(missing)}.")
    return steps


def mermaid(components: Mapping[str, Component]) -> str:
    """The call graph as a mermaid flowchart; public models are stadium-shaped."""
    lines = ["flowchart LR"]
    for component in served(components):
        lines.append(f"    {component.name}([{component.name}])" if component.name in PUBLIC else f"    {component.name}[{component.name}]")
    for component in served(components):
        lines += [f"    {component.name} --> {call}" for call in component.calls]
    return "\n".join(lines)
