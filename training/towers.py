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
    context, video = Naming(config.context.width).to(pool.device), Naming(config.video.width).to(pool.device)
    places = nn.ModuleDict({"context": nn.Linear(config.context.width, 2), "video": nn.Linear(config.video.width, 2)}).to(pool.device)

    def of(step: int, progress: float) -> dict[str, Tensor]:
        scenes = pool.pick(clips)
        with pool.half():
            still = encoder.context_tower(seen.context_frames(scenes)).flatten(0, 1).float()
            moving = encoder.video_tower(seen.video_frames(scenes)).flatten(0, 1).float()
        terms: dict[str, Tensor] = {}
        for name, naming, features, actors in (
            ("context", context, still, seen.context_actors[scenes]),
            ("video", video, moving, seen.video_actors[scenes]),
        ):
            owner = scenes.repeat_interleave(actors[0].numel())
            classes = {attribute: values[owner] for attribute, values in pool.attributes.items()}
            named = naming(features, actors.flatten().long(), classes)
            named["place"] = (places[name](features) - patch_centres(actors)).abs().mean()  # the language model asks where things are
            terms |= {f"{'_' * key.startswith('_')}{name}_{key.removeprefix('_')}": value for key, value in named.items()}
        return terms

    return of, [*context.parameters(), *video.parameters(), *places.parameters()]


def patch_centres(actors: Tensor) -> Tensor:
    """[N, T, grid, grid] to [N * T * grid * grid, 2]: row and column of each patch, 0..1."""
    line = (torch.arange(actors.shape[-1], device=actors.device) + 0.5) / actors.shape[-1]
    return torch.cartesian_prod(line, line).repeat(actors.shape[0] * actors.shape[1], 1)
