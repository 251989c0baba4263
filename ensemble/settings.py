"""Every number that is not a size of the model, with its origin ("spec" is the model specification that ADR 0002 summarises)."""

# Input frames --------------------------------------------------------------------------------------------------------
MIN_FRAME_SIDE = 8
"""px; below it a resized frame would hold less than one patch of picture."""
MAX_FRAME_SIDE = 4096
"""px; 4K video fits, and one frame stays under 50 MB."""
MAX_FRAMES = 1024
"""Frames of one clip that `sparrow` answers at once: evaluations ask about whole sequences (spec 10)."""
MAX_SAMPLED_FRAMES = 64
"""Most frames taken from a video file (spec 1.1)."""
VIDEO_SAMPLE_FPS = 1
"""Frames per second taken from a video file (spec 1.1)."""

# Normalisation, per RGB channel (spec 1.2) ---------------------------------------------------------------------------
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)

# Prompt and answer ---------------------------------------------------------------------------------------------------
MAX_PROMPT_TOKENS = 512
"""Tokens of the user's text with its template; keeps prompt and answer of a video within the key/value cache."""
SAMPLING_TOP_K, MAX_SAMPLING_TOP_K = 50, 1000
"""top_k that generation has in the original where its configuration names none."""
MAX_NEW_TOKENS = 1024
"""Longest answer (spec 9, --max_new_tokens)."""
MAX_GENERATIONS = 8
"""Answers decoded together; each holds one slot of the key/value cache."""
GENERATION_IDLE_S = 30
"""An answer whose next step is not asked for within this time is dropped."""

# Target-specific features (spec 1.7) ---------------------------------------------------------------------------------
MAX_TARGET_TOKENS = 16
"""Placeholders that a video prompt has; an image prompt has one."""
TARGET_TOKENS = 4
"""--tsf_k"""
TARGET_KMEANS_STEPS = 8
"""--tsf_kmeans_iters"""

# Proposals and their selection (spec 4.3, 5) -------------------------------------------------------------------------
PROPOSAL_TOPK = 100
"""--proposal_topk"""
COCO_SCORE_POWER, SA1B_SCORE_POWER = 0.3, 0.7
"""--proposal_score_power"""
SELECTION_THRESHOLD = 0.4
"""--proposal_score_threshold"""
MAX_SELECTED_BOXES = 16
"""max_selected_boxes_per_token"""
ROI_FUSION_GAMMA = 0.1
"""--roi_fusion_init; the scalar in the checkpoint is never loaded by the original (spec 5.4)."""
BOX_PRIOR_MIN_SCORE = 0.35
BOX_PRIOR_MAX_KEEP = 4
"""chat.py; every evaluation script of the original keeps 1."""
PRIOR_MASK_SIZE = 256
"""px; side of the masks that box priors are scored on."""

# Masks ---------------------------------------------------------------------------------------------------------------
STABILITY_DELTA, STABILITY_THRESHOLD = 0.05, 0.98
"""dynamic_multimask_via_stability (spec 6.3)"""
NO_OBJECT_LOGIT = -1024.0
"""Mask logit of an object whose score is not positive (sam2_base.py NO_OBJ_SCORE)."""
MASK_PROMPT_CLAMP = 32.0
"""Bound of the logits that go back into the decoder as a prompt (sam2_video_predictor.py)."""
DRAWN_MASK_LOGIT = 10.0
"""Logits of a mask that the caller drew: this inside, its negative outside (sam2_base.py _use_mask_as_output)."""
MEMORY_MASK_SCALE, MEMORY_MASK_BIAS = 20.0, -10.0
"""sigmoid_scale_for_mem_enc, sigmoid_bias_for_mem_enc (sam2_hiera_l.yaml)"""

# Tracked memory ------------------------------------------------------------------------------------------------------
MAX_RECENT_POINTERS = 15
"""max_obj_ptrs_in_encoder less the conditioning frame's (sam2_base.py)"""

# Prompts of tracked objects -------------------------------------------------------------------------------------------
PROMPT_SLOTS = (3, 16)
"""Slots that a decode's prompt is filled up to with absent ones: few shapes, whoever shares the call."""
MAX_POINTS = 13
"""Points of one object: what 16 slots hold beside a box and SAM2's padding."""

# Sessions: `sparrow export` writes these into tracker/config.pbtxt, where a deployment changes them ---------------------
MAX_SESSIONS = 64
"""Tracking sessions at once."""
MAX_OBJECTS = 16
"""Objects of one session."""
MAX_MEMORY_MIB = 512
"""Memory banks of all sessions together; 3.5 MiB an object at full size on a GPU."""
SESSION_IDLE_S = 60
"""A tracking session without a frame for this long is closed."""
EVICTABLE_IDLE_S = 10
"""Without a frame for this long, a session makes room when a limit is reached: its client is probably gone."""

SWEEP_S = 1
"""How often idle sessions are looked for and figures are passed to /metrics."""

# Batching -------------------------------------------------------------------------------------------------------------
TRITON_IDLE_S = 120
"""Triton forgets a tracking session later than the tracker itself, which then still says why it was closed."""
TRITON_SEQUENCES = 32768
"""Tracking sessions that Triton lets through to the tracker, which refuses surplus ones with a message. A client that vanishes, or is
refused and sends no END, holds one until TRITON_IDLE_S: enough for 270 a second."""
TOKEN_DELAY_US = 500
"""How long the next token of an answer waits for those of others to share its step: they are asked for when the last step has answered.
Frames do not wait: those that come while a step runs share the next.
"""
MAX_FRAME_BATCH = 8
"""Frames of different sessions that are tracked together, and requests in one step."""
TRACKED_TOGETHER = 4
"""Frames of one session in a request to the tracker. A request pays for a hop between processes and for a wait of several ms, however many
frames it holds; with more, the masks of the first come later, and so do those of the sessions that share the step.
"""
ENCODER_BATCH = 4
"""Frames in one call of frame_encoder: more at once take no less time each, hold 2.5 GB more of a GPU, and let the tracker wait."""
OBJECT_BATCHES = (16, 8, 4, 3, 2, 1)
"""Objects in one call of a graph: few sizes, since a GPU captures a call for each of them at every age of the objects."""
MAX_REQUESTS = 8
"""Clips that `sparrow` works on at once; more wait in Triton's queue."""
FRAMES_AHEAD = 16
"""Frames encoded on a GPU before the tracker asks for them, while an answer is decoded; bounds the memory of a long clip. On a CPU,
where frames that are encoded at once keep the next one waiting, they are ENCODER_BATCH.
"""
