"""Who calls whom: the edges of the system, checked at both ends and drawn."""

from __future__ import annotations

from collections.abc import Mapping

from .tensors import Component, TensorSpec

PUBLIC = ("sparrow", "sparrow_track")
"""The components that applications call; everything else is internal."""


def served(components: Mapping[str, Component]) -> list[Component]:
    """The components that are Triton models."""
    return [component for component in components.values() if component.serving != "graph"]


def parts(components: Mapping[str, Component], model: str) -> list[Component]:
    """The graphs in the process of a Triton model: the one that it is, or those that it runs."""
    component = components[model]
    return [component] if component.is_graph else [components[part] for part in component.parts]


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
    """The Triton models, the graphs in the process of each, and the calls between them, as a mermaid flowchart."""
    lines = ["flowchart LR"]
    for model in served(components):
        name = f"{model.name}, public" if model.name in PUBLIC else model.name
        parts = [f"        {model.name}.{part}[{part}]" for part in model.parts]
        lines += [f'    subgraph {model.name} ["{name}"]', *parts, "    end"] if parts else [f'    {model.name}["{name}"]']
    for model in served(components):
        lines += [f"    {model.name} --> {call}" for call in model.calls]
    return "\n".join(lines)
