"""Stage `selection`: selector and ROI helper on frozen everything else, fused as at inference; the original's refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble import settings

from .batches import Pool, frame_times, grounding, proposal_image
from .joint import boxes_of, prompts_of, propose, selection_loss
from .language import answer, see
from .loop import Loss
from .model import Model

GRAPHS = ("proposal_selector",)
LEARNING_RATE = 5e-4


def loss(model: Model, pool: Pool, clips: int = 16) -> Loss:
    """The loss of a step."""
    questions, config, seen = pool.questions, model.config, pool.seen
    place = questions.place

    def of(step: int, progress: float) -> dict[str, Tensor]:
        scenes, shape = pool.alike(clips)
        rows = questions.of(scenes)
        first, masks = pool.render(scenes, frame_times([0], pool.device).expand(clips, -1), shape)
        with torch.no_grad(), pool.half():
            frames = grounding(first[:, 0], config)
            features = model.frame_encoder.encode(frames)
            boxes, proposal_features, scores = propose(model, proposal_image(frames, config))
            visual = see(model, seen.context_frames(scenes), seen.video_frames(scenes))
            states = answer(model, place, rows["ids"], rows["turns"], rows["positions"], visual)[:, config.video_tokens :]
            _, box = prompts_of(model, place, rows["emitting"], states)
        truth = boxes_of(masks, rows["objects"]).flatten(0, 1)
        attention, regions = [], []
        for clip in range(clips):  # the graph serves one
            pyramid = [level[clip : clip + 1].float() for level in features]
            logits, roi, _ = model.proposal_selector(box[clip], boxes[clip], proposal_features[clip], scores[clip], *pyramid)
            attention.append(logits)
            regions.append(roi)
        logits, roi = torch.cat(attention), torch.cat(regions)
        each = boxes.repeat_interleave(box.shape[1], 0)
        fused = selection_loss(logits + settings.ROI_FUSION_GAMMA * roi, each, truth)
        alone = selection_loss(roi, each, truth)
        return {
            "fused": fused["selection"],
            "roi": 0.3 * alone["selection"],
            "_fused_right": fused["_selected"],
            "_roi_right": alone["_selected"],
        }

    return of
