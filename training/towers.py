"""Stage `towers`: the vision towers name what each patch shows; stands for the pretraining of CLIP and InternVideo2.

The heads that name it are thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Pool
from .loop import Loss
from .model import Model
from .replay import Replay
from .shapes_rvos.scene import ATTRIBUTES

GRAPHS = ("vision_encoder", "image_encoder")
LEARNING_RATE = 1e-3


class Naming(nn.Module):
    """A linear head for each attribute on top of a tower."""

    def __init__(self, width: int, without: Sequence[str] = ()) -> None:
        super().__init__()
        # The last class of each head: no object.
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in ATTRIBUTES.items() if name not in without})

    def forward(self, features: Tensor, actors: Tensor, classes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy and share of right names.

        Args:
            features: [P, width]
            actors: [P] int64, -1 for none.
            classes: attribute to [P, MAX_ACTORS] int64.
        """
        there = actors >= 0
        losses, right = [], []
        for name, head in self.heads.items():
            none = len(ATTRIBUTES[name])
            wanted = torch.where(there, classes[name].gather(1, actors.clamp(min=0)[:, None])[:, 0], none)
            logits = head(features)
            weight = torch.where(there, 1.0, 0.1)
            losses.append((F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum())
            right.append(((logits.argmax(1) == wanted) & there).sum() / there.sum().clamp(min=1))
        return {"loss": torch.stack(losses).sum(), **{f"_{name}": share for name, share in zip(self.heads, right, strict=True)}}


def loss(model: Model, pool: Pool, clips: int = 64) -> tuple[Loss, list[nn.Parameter]]:
    """The loss of a step, and the heads, which are trained too."""
    config, encoder, seen = model.config, model.vision_encoder, pool.seen
    namings = {"context": Naming(config.context.width).to(pool.device), "video": Naming(config.video.width).to(pool.device)}
    places = {"context": nn.Linear(config.context.width, 2).to(pool.device), "video": nn.Linear(config.video.width, 2).to(pool.device)}
    heads = [parameter for head in (*namings.values(), *places.values()) for parameter in head.parameters()]

    def name(
        context_frames: Tensor, video_frames: Tensor, context_actors: Tensor, video_actors: Tensor, **attributes: Tensor
    ) -> dict[str, Tensor]:
        with pool.half():
            still = encoder.context_tower(context_frames).flatten(0, 1).float()
            moving = encoder.video_tower(video_frames).flatten(0, 1).float()
        terms: dict[str, Tensor] = {}
        for tower, features, actors in (("context", still, context_actors), ("video", moving, video_actors)):
            patches = actors[0].numel()
            classes = {attribute: values.repeat_interleave(patches, 0) for attribute, values in attributes.items()}
            named = namings[tower](features, actors.flatten(), classes)
            named["place"] = (places[tower](features) - patch_centres(actors)).abs().mean()  # the language model asks where things are
            terms |= {f"{'_' * key.startswith('_')}{tower}_{key.removeprefix('_')}": value for key, value in named.items()}
        return terms

    replay = Replay(name, [*model.parameters_of(GRAPHS), *heads])

    def of(step: int, progress: float) -> dict[str, Tensor]:
        scenes = pool.pick(clips)
        terms = replay(
            context_frames=seen.context_frames(scenes),
            video_frames=seen.video_frames(scenes),
            context_actors=seen.context_actors[scenes].long(),
            video_actors=seen.video_actors[scenes].long(),
            **{attribute: values[scenes] for attribute, values in pool.attributes.items()},
        )
        return terms

    return of, heads


def patch_centres(actors: Tensor) -> Tensor:
    """[N, T, grid, grid] to [N * T * grid * grid, 2]: row and column of each patch, 0..1."""
    line = (torch.arange(actors.shape[-1], device=actors.device) + 0.5) / actors.shape[-1]
    return torch.cartesian_prod(line, line).repeat(actors.shape[0] * actors.shape[1], 1)
