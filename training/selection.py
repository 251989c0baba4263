"""Stage `selection`: selector and ROI helper on frozen everything else, fused as at inference; the original's refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble import settings

from .batches import Pool, frame_times, grounding, proposal_image
from .detection import visible_boxes
from .joint import prompts_of, propose, selection_loss
from .language import embed, read
from .loop import Loss
from .model import Model

GRAPHS = ("proposal_selector",)
LEARNING_RATE = 5e-4


def loss(model: Model, pool: Pool, clips: int = 16) -> Loss:
    """The loss of a step."""
    questions, config = pool.questions, model.config
    assert questions
    seen = pool.seen

    def of(step: int, progress: float) -> dict[str, Tensor]:
        rows, shape = pool.rows(clips)
        first, masks = pool.render(questions.scene[rows], frame_times([0], pool.device).expand(clips, -1), shape)
        with torch.no_grad(), pool.half():
            grounded_frames = grounding(first[:, 0], config)
            features = model.frame_encoder(grounded_frames)
            boxes, proposal_features, scores = propose(model, proposal_image(grounded_frames, config))
            states = read(model, embed(model, questions, rows, seen))
            question, actor, _, box = prompts_of(model, questions, rows, states)
        truth = visible_boxes(masks[:, 0])
        attention, regions, owners = [], [], []
        for clip in question.unique().tolist():
            own = question == clip
            pyramid = [level[clip : clip + 1].float() for level in features]
            logits, roi, _ = model.proposal_selector(box[own], boxes[clip], proposal_features[clip], scores[clip], *pyramid)
            attention.append(logits)
            regions.append(roi)
            owners.append(torch.where(own)[0])
        logits, roi, owner = torch.cat(attention), torch.cat(regions), torch.cat(owners)
        targets = truth[question[owner], actor[owner]]
        fused = selection_loss(logits + settings.ROI_FUSION_GAMMA * roi, boxes[question[owner]], targets)
        alone = selection_loss(roi, boxes[question[owner]], targets)
        return {
            "fused": fused["selection"],
            "roi": 0.3 * alone["selection"],
            "_fused_right": fused["_selected"],
            "_roi_right": alone["_selected"],
        }

    return of
