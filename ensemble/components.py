"""The contracts of every component, in dataflow order; config.pbtxt, ONNX graphs, samples and docs are derived from them.

frames ─► vision_encoder / image_encoder ─► visual tokens ─► language_model ─► text, [SEG] / [BOX] embeddings
├────► proposal_detector ─► boxes, features ─► proposal_selector ◄──────────┘
└────► frame_encoder ─► tracker [ memory_attention ─► mask_decoder ─► memory_encoder ] ─► masks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import settings
from .config import ModelConfig
from .tensors import Component, Dim, TensorSpec, Tolerance

IMAGES = Dim("images", 1, 1, 16)
FRAMES = Dim("frames", 1, 1, settings.MAX_FRAME_BATCH)
TRACKED_FRAMES = Dim("frames", 1, 1, settings.TRACKED_TOGETHER)
CLIP_FRAMES = Dim("clip_frames", 1, 16, settings.MAX_FRAMES)
TOKENS = Dim("tokens", 1, 16, 8192)
SEQUENCES = Dim("sequences", 1, 1, settings.MAX_GENERATIONS)
SLOTS = Dim("slots", 1, 4096, 8192)
STATES = Dim("states", 1, 1, settings.MAX_NEW_TOKENS)
EMBEDDINGS = Dim("embeddings", 1, 1, 256)
OBJECTS = Dim("objects", 1, 1, 256)
TRACKED_OBJECTS = Dim("objects", 1, 1, max(settings.OBJECT_BATCHES))
PROPOSALS = Dim("proposals", 1, settings.PROPOSAL_TOPK, 300)
PROMPTS = Dim("prompts", 1, settings.PROMPT_SLOTS[0], settings.PROMPT_SLOTS[-1])
MEMORIES = Dim("memories", 1, 7, 7)
POINTERS = Dim("pointers", 1, 16, 16)
HEIGHT = Dim("height", settings.MIN_FRAME_SIDE, 480, settings.MAX_FRAME_SIDE)
WIDTH = Dim("width", settings.MIN_FRAME_SIDE, 854, settings.MAX_FRAME_SIDE)
SESSION_HEIGHT = Dim("height", 0, 480, settings.MAX_FRAME_SIDE)
SESSION_WIDTH = Dim("width", 0, 854, settings.MAX_FRAME_SIDE)
TEXTS = Dim("texts", 0, 1, 256)
BOXES = Dim("boxes", 0, 1, 4096)
POINTS = Dim("points", 0, 1, 4096)
MASKS = Dim("masks", 0, 1, 256)
REMOVED = Dim("removed", 0, 1, 256)
ANY_OBJECTS = Dim("objects", 0, 1, settings.MAX_NEW_TOKENS)
ANY_BOXES = Dim("boxes", 0, 1, settings.MAX_NEW_TOKENS * settings.MAX_SELECTED_BOXES)
MASK_BYTES = Dim("mask_bytes", 0, 51240, settings.MAX_FRAME_SIDE**2 // 8)
CROP_HEIGHT = Dim("crop_height", 1, 336, settings.MAX_FRAME_SIDE)
CROP_WIDTH = Dim("crop_width", 1, 336, settings.MAX_FRAME_SIDE)
TARGET_ROWS = Dim("target_rows", 1, 1, 65536)
VISUAL_TOKENS = Dim("visual_tokens", 1, 3328, 8192)
TARGET_TOKENS = Dim("target_tokens", 0, settings.TARGET_TOKENS, settings.MAX_TARGET_TOKENS)
NEW_TOKENS = Dim("new_tokens", 0, 1, settings.MAX_NEW_TOKENS)

ABSENT, PAD, NEGATIVE, POSITIVE, TOP_LEFT, BOTTOM_RIGHT, TEXT = -2, -1, 0, 1, 2, 3, 4
"""Values of `prompt_labels`. SAM's labels, and two of ours: TEXT puts the text embedding in that slot, ABSENT masks it out."""

VISUAL_PLACEHOLDER, TARGET_PLACEHOLDER = -200, -201
"""Values of `prompt_ids` that stand for visual and target tokens, as in the original."""

TRACKING = (
    "frame_encoder",
    "mask_downsampler",
    "memory_attention",
    "mask_decoder",
    "memory_encoder",
    "frame_preprocessor",
    "frame_features",
    "tracker",
    "sparrow_track",
)
"""What SAM2 alone can do."""

RECURRENT = Tolerance(2e-3, "softmax over thousands of keys amplifies float32 summation order")


def propagation(config: ModelConfig) -> Component:
    """The contract of what `decoding.Propagation` makes of three graphs; it is not exported."""
    contracts, parts = components(config), ("memory_attention", "mask_decoder", "memory_encoder")
    attention, decoder, encoder = (contracts[part] for part in parts)
    logits, *others = decoder.outputs
    return Component(
        "propagation",
        "The next frame of tracked objects: their masks, and what later frames remember of it (spec 7.3-7.5).",
        (*attention.inputs, *(decoder.input(name) for name in ("high_res_1", "high_res_0"))),
        (replace(logits, doc="> 0 is the object; gated by object_scores"), *others, *encoder.outputs),
        parts=parts,
    )


def components(config: ModelConfig, native_encoder: bool = False) -> dict[str, Component]:
    """The contracts at one size of the model, by name, in dataflow order.

    Args:
        config: sizes.
        native_encoder: Triton's own backend runs frame_encoder, which takes pictures of one size alone: frame_features is an ensemble then.
    """
    context, video, language, sam2, proposer = config.context, config.video, config.language, config.sam2, config.proposer
    visual_width, dim, grid = language.width, sam2.width, sam2.grid

    frame_tensors = (
        TensorSpec("frame_embeddings", "float32", (FRAMES, dim, grid, grid), "stride-16 features, without no_mem_embed"),
        TensorSpec("high_res_1", "float32", (FRAMES, dim // 4, 2 * grid, 2 * grid), "stride-8 features, after conv_s1"),
        TensorSpec("high_res_0", "float32", (FRAMES, dim // 8, 4 * grid, 4 * grid), "stride-4 features, after conv_s0"),
    )
    picture = TensorSpec(
        "picture",
        "uint8",
        (sam2.image_size, sam2.image_size, 3),
        "RGB, its long side resized to the square's; what lies beyond is not read",
    )
    picture_size = TensorSpec("picture_size", "int64", (2,), "Height and width of the picture, which lies at the top left.")
    one_frame = tuple(TensorSpec(spec.name, spec.dtype, (1, *spec.shape[1:]), spec.doc) for spec in frame_tensors)
    proposals = (
        TensorSpec("proposal_boxes", "float32", (PROPOSALS, 4), "xyxy, normalised, not clamped"),
        TensorSpec("proposal_features", "float32", (PROPOSALS, proposer.width), "last decoder states"),
        TensorSpec("proposal_scores", "float32", (PROPOSALS,), "0..1, descending"),
    )
    object_frame = TensorSpec("object_frame", "int64", (OBJECTS,), "Index of the frame that each object is on.", below=FRAMES)
    tracked_object_frame = replace(object_frame, shape=(TRACKED_OBJECTS,))
    cache_shape = (language.layers, SEQUENCES, language.heads, SLOTS, language.width // language.heads)
    embedding = TensorSpec("token_embeddings", "float32", (SEQUENCES, TOKENS, visual_width), "text and visual tokens")

    graphs = [
        Component(
            "vision_encoder",
            "CLIP and InternVideo2 features of a clip, projected, pooled and merged (spec 1.3-1.5).",
            (
                TensorSpec("video_frames", "float32", (config.num_frames, 3, video.image_size, video.image_size), "ImageNet-normalised"),
                TensorSpec("context_frames", "float32", (config.num_frames, 3, context.image_size, context.image_size), "CLIP-normalised"),
            ),
            (
                TensorSpec(
                    "visual_tokens", "float32", (config.video_tokens, visual_width), "context tokens of all frames, then video tokens"
                ),
            ),
        ),
        Component(
            "image_encoder",
            "CLIP features of images, projected (spec 1.5, 1.7).",
            (TensorSpec("context_frames", "float32", (IMAGES, 3, context.image_size, context.image_size), "CLIP-normalised"),),
            (TensorSpec("image_tokens", "float32", (IMAGES, config.context_tokens, visual_width), "row-major patches"),),
        ),
        Component(
            "token_embedder",
            "Rows of the embedding table.",
            (TensorSpec("token_ids", "int64", (TOKENS,), "vocabulary indices", below=language.vocab_size),),
            (TensorSpec("token_embeddings", "float32", (TOKENS, visual_width), "one row per id"),),
        ),
        Component(
            "language_decoder",
            "Phi-3 over new tokens and a static key/value cache (spec 3).",
            (
                embedding,
                TensorSpec("positions", "int64", (SEQUENCES, TOKENS), "Cache slot that each token is written to.", below=SLOTS),
                TensorSpec("key_cache", "float32", cache_shape, "keys of slots below the first position"),
                TensorSpec("value_cache", "float32", cache_shape, "values of slots below the first position"),
            ),
            (
                TensorSpec("logits", "float32", (SEQUENCES, language.vocab_size), "next-token scores after the last token"),
                TensorSpec("final_states", "float32", (SEQUENCES, visual_width), "final-norm state of the last token"),
                TensorSpec("new_key_cache", "float32", cache_shape, "key_cache with the new tokens"),
                TensorSpec("new_value_cache", "float32", cache_shape, "value_cache with the new tokens"),
            ),
        ),
        Component(
            "prompt_projector",
            "text_hidden_fcs: states that emitted [SEG] or [BOX] to prompt embeddings (spec 3.3).",
            (TensorSpec("final_states", "float32", (STATES, visual_width), "final-norm states"),),
            (TensorSpec("prompt_embeddings", "float32", (STATES, dim), "as the mask decoder and the selector take them"),),
        ),
        Component(
            "proposal_detector",
            "DDETR-SAM2: class-agnostic boxes of frame 0 (spec 4).",
            (TensorSpec("proposal_image", "float32", (1, 3, proposer.image_size, proposer.image_size), "ImageNet-normalised"),),
            (
                TensorSpec("query_boxes", "float32", (proposer.queries, 4), "xyxy, normalised, not clamped; in the encoder's order"),
                TensorSpec("query_features", "float32", (proposer.queries, proposer.width), "last decoder states"),
                TensorSpec("coco_scores", "float32", (proposer.queries,), "0..1, of the head trained on COCO"),
                TensorSpec("sa1b_scores", "float32", (proposer.queries,), "0..1, of the head trained on SA-1B"),
            ),
            tolerance=Tolerance(1e-3, "a top-k selection: queries follow ranks, not values"),
            ranked=True,
        ),
        Component(
            "proposal_selector",
            "Scores every proposal against every [BOX] or [SEG] embedding (spec 5.1, 5.2).",
            (
                TensorSpec("prompt_embeddings", "float32", (STATES, dim), "[BOX] embeddings, or [SEG] where there are none"),
                *proposals,
                *one_frame,
            ),
            (
                TensorSpec("selector_logits", "float32", (STATES, PROPOSALS), "attention logits plus log score (A_old)"),
                TensorSpec("roi_logits", "float32", (STATES, PROPOSALS), "region-of-interest logits"),
                TensorSpec("refined_embeddings", "float32", (STATES, dim), "prompt embeddings plus fused proposal features"),
            ),
        ),
        Component(
            "frame_encoder",
            "SAM2 image encoder: one encode serves every prompt and object of a frame (spec 6.1).",
            (
                TensorSpec("pictures", "uint8", (FRAMES, *picture.shape), picture.doc),
                TensorSpec("picture_sizes", "int64", (FRAMES, 2), picture_size.doc, below=sam2.image_size + 1, above=1),
            ),
            frame_tensors,
            serving="native_graph" if native_encoder else "graph",
        ),
        Component(
            "mask_downsampler",
            "A mask that the caller drew to what the mask decoder takes as a mask prompt (sam2_base.py mask_downsample).",
            (
                TensorSpec(
                    "masks", "float32", (TRACKED_OBJECTS, sam2.image_size, sam2.image_size), "0 or 1, stretched to the grounding frame"
                ),
            ),
            (TensorSpec("mask_prompts", "float32", (TRACKED_OBJECTS, sam2.low_res, sam2.low_res), "not logits, but takes their place"),),
        ),
        Component(
            "memory_attention",
            "Conditions a frame on each object's memories and pointers (spec 7.5).",
            (
                frame_tensors[0],
                tracked_object_frame,
                TensorSpec(
                    "memory_maps", "float32", (TRACKED_OBJECTS, MEMORIES, sam2.memory_width, grid, grid), "memory features, any order"
                ),
                TensorSpec(
                    "memory_rows",
                    "int64",
                    (TRACKED_OBJECTS, MEMORIES),
                    "Temporal row of each map: 6 conditioning, d-1 for d frames ago.",
                    below=sam2.num_maps,
                ),
                TensorSpec("object_pointers", "float32", (TRACKED_OBJECTS, POINTERS, dim), "pointers, any order"),
                TensorSpec("pointer_distances", "int64", (TRACKED_OBJECTS, POINTERS), "Frames since each pointer was made."),
            ),
            (
                TensorSpec(
                    "conditioned_embeddings", "float32", (TRACKED_OBJECTS, dim, grid, grid), "what mask_decoder takes from frame 1 on"
                ),
            ),
            tolerance=RECURRENT,
        ),
        Component(
            "mask_decoder",
            "Prompts to one mask per object, with SAM2's choice among mask tokens (spec 6.2, 6.3, 7.3, appendix B).",
            (
                TensorSpec("image_embeddings", "float32", (EMBEDDINGS, dim, grid, grid), "frame or conditioned embeddings"),
                *frame_tensors[1:],
                TensorSpec("object_embedding", "int64", (OBJECTS,), "Index of each object's image embedding.", below=EMBEDDINGS),
                object_frame,
                TensorSpec("has_memory", "bool", (OBJECTS,), "False: the embedding is a frame's own and gets no_mem_embed"),
                TensorSpec("multimask", "bool", (OBJECTS,), "True: best of masks 1-3 by predicted IoU; False: mask 0 unless unstable"),
                TensorSpec("prompt_points", "float32", (OBJECTS, PROMPTS, 2), "x, y in pixels of the square grounding frame"),
                TensorSpec(
                    "prompt_labels",
                    "int64",
                    (OBJECTS, PROMPTS),
                    "-2 absent, -1 pad, 0 negative, 1 positive, 2 top left, 3 bottom right, 4 text.",
                    below=TEXT + 1,
                    above=ABSENT,
                ),
                TensorSpec("text_embeddings", "float32", (OBJECTS, dim), "read where a label is 4"),
                TensorSpec("mask_prompts", "float32", (OBJECTS, sam2.low_res, sam2.low_res), "earlier logits, read where has_mask_prompt"),
                TensorSpec("has_mask_prompt", "bool", (OBJECTS,), "False: no_mask_embed instead"),
            ),
            (
                TensorSpec(
                    "mask_logits", "float32", (OBJECTS, sam2.low_res, sam2.low_res), "> 0 is the object; not gated by object_scores"
                ),
                TensorSpec("predicted_iou", "float32", (OBJECTS,), "the decoder's own estimate, 0..1"),
                TensorSpec("object_scores", "float32", (OBJECTS,), "> 0: the object is in the frame"),
                TensorSpec("object_pointers", "float32", (OBJECTS, dim), "no_obj_ptr where the score is not positive"),
            ),
            tolerance=RECURRENT,
        ),
        Component(
            "memory_encoder",
            "A frame and an object's mask to a memory map, rounded to bfloat16 as the original stores it (spec 7.4).",
            (
                frame_tensors[0],
                tracked_object_frame,
                TensorSpec("mask_logits", "float32", (TRACKED_OBJECTS, sam2.low_res, sam2.low_res), "of mask_decoder"),
                TensorSpec("prompted", "bool", (TRACKED_OBJECTS,), "True: the mask is binarised first, as on a conditioning frame"),
                TensorSpec(
                    "object_scores", "float32", (TRACKED_OBJECTS,), "> 0: the object is in the frame; otherwise its mask counts as empty"
                ),
            ),
            (TensorSpec("memory_maps", "float32", (TRACKED_OBJECTS, sam2.memory_width, grid, grid), "values representable in bfloat16"),),
            tolerance=Tolerance(1e-2, "one bfloat16 ulp (2^-8) where float32 noise crosses a rounding boundary"),
        ),
    ]

    session_frame = TensorSpec("frame", "uint8", (SESSION_HEIGHT, SESSION_WIDTH, 3), "RGB; 0 by 0 with END closes the session only")
    frame_size = TensorSpec("frame_size", "int32", (2,), "height and width of the caller's frame; 0, 0 closes the session only")
    tracked_frames = tuple(replace(spec, shape=(TRACKED_FRAMES, *spec.shape[1:]), optional=True) for spec in frame_tensors)
    frame_idx = TensorSpec("frame_idx", "int32", (1,), "index of the frame in its session or clip, from 0")
    edits = (
        TensorSpec("text_embeddings", "float32", (TEXTS, dim), "[SEG] embeddings of objects to track from this frame on", optional=True),
        TensorSpec("text_objects", "int32", (TEXTS,), "id of each one's object; 0, 1, ... where left out", optional=True),
        TensorSpec("boxes", "float32", (BOXES, 4), "xyxy, normalised; around objects to track from this frame on", optional=True),
        TensorSpec("box_objects", "int32", (BOXES,), "id of each box's object", optional=True),
        TensorSpec("points", "float32", (POINTS, 2), "x, y, normalised; on, or beside, objects to track from this frame on", optional=True),
        TensorSpec("point_labels", "int32", (POINTS,), "1: on the object, 0: not on it.", optional=True, below=POSITIVE + 1),
        TensorSpec("point_objects", "int32", (POINTS,), "id of each point's object", optional=True),
        TensorSpec(
            "masks",
            "bool",
            (MASKS, SESSION_HEIGHT, SESSION_WIDTH),
            "masks of objects to track from this frame on, of its size",
            optional=True,
        ),
        TensorSpec("mask_objects", "int32", (MASKS,), "id of each mask's object", optional=True),
        TensorSpec("removed_objects", "int32", (REMOVED,), "ids of objects to follow no longer", optional=True),
    )
    decoded_masks = (
        TensorSpec("mask_rle", "string", (ANY_OBJECTS,), "with mask_format rle: COCO's compressed RLE counts of each mask"),
        TensorSpec("mask_bits", "uint8", (ANY_OBJECTS, MASK_BYTES), "with bits: each mask's H*W bits, row by row, high bit first"),
        TensorSpec(
            "mask_logits",
            "float32",
            (ANY_OBJECTS, sam2.low_res, sam2.low_res),
            "with logits: of the frame stretched to a square; > 0 is mask",
        ),
        TensorSpec("mask_boxes", "int32", (ANY_OBJECTS, 4), "xyxy in pixels of the frame, right and bottom exclusive; zeros: empty mask"),
        TensorSpec("mask_areas", "int32", (ANY_OBJECTS,), "pixels of the frame"),
        TensorSpec("predicted_iou", "float32", (ANY_OBJECTS,), "the decoder's own estimate, 0..1"),
        TensorSpec("object_scores", "float32", (ANY_OBJECTS,), "> 0: the object is in the frame"),
        TensorSpec("visible", "bool", (ANY_OBJECTS,), "the mask is not empty and the score is positive"),
    )
    object_ids = TensorSpec("object_ids", "int32", (ANY_OBJECTS,), "of the objects, in the order of their arrival")

    features = [
        Component(
            "frame_features",
            "A caller's frame to its features (spec 1.2, 6.1); an ensemble where frame_encoder is a TensorRT plan (ADR 0022).",
            (session_frame,),
            (*one_frame, frame_size),
            serving="frames",
            parts=("frame_encoder",),
        )
    ]
    if native_encoder:
        prepared = (replace(picture, name="pictures"), replace(picture_size, name="picture_sizes"), frame_size)
        features = [
            Component("frame_preprocessor", "A caller's frame to the encoder's input.", (session_frame,), prepared, serving="function"),
            replace(features[0], serving="ensemble", calls=("frame_preprocessor", "frame_encoder"), parts=()),
        ]
    served = [
        Component(
            "sparrow",
            "A question about a clip or an image to text and masks, streamed (public).",
            (
                TensorSpec("prompt", "string", (1,), "the question, UTF-8"),
                TensorSpec("frames", "uint8", (CLIP_FRAMES, HEIGHT, WIDTH, 3), "RGB frames", optional=True),
                TensorSpec("encoded_frames", "string", (CLIP_FRAMES,), "JPEG or PNG files, instead of frames", optional=True),
                TensorSpec("target_boxes", "float32", (TARGET_ROWS, 4), "pixels, xyxy or xywh, a row per frame (spec 1.7)", optional=True),
                TensorSpec(
                    "target_crop",
                    "uint8",
                    (CROP_HEIGHT, CROP_WIDTH, 3),
                    "RGB picture of the target, instead of target_boxes",
                    optional=True,
                ),
            ),
            (
                TensorSpec("text", "string", (1,), "next piece of the answer"),
                TensorSpec("phrases", "string", (ANY_OBJECTS,), "words of the answer that name each object"),
                TensorSpec("text_embeddings", "float32", (ANY_OBJECTS, dim), "[SEG] embeddings, as sparrow_track takes them"),
                TensorSpec("selected_boxes", "float32", (ANY_BOXES, 4), "xyxy, normalised, before the prior filter"),
                TensorSpec("selected_box_objects", "int32", (ANY_BOXES,), "object of each selected box"),
                TensorSpec(
                    "boxes", "float32", (ANY_BOXES, 4), "the selected boxes that the prior filter kept, as sparrow_track takes them"
                ),
                TensorSpec("box_objects", "int32", (ANY_BOXES,), "object of each box"),
                TensorSpec("proposal_frame", "uint8", (sam2.image_size, sam2.image_size, 3), "with proposal_debug: where they were found"),
                *(proposals[0], proposals[2]),
                TensorSpec("branch", "string", (1,), "tracked or framewise: how the masks in this response were made"),
                frame_idx,
                TensorSpec("frame_size", "int32", (2,), "height and width of the masks"),
                *decoded_masks,
                TensorSpec("summary", "string", (1,), "JSON, last response: answer, branch, video_init, policy, timings_ms, ..."),
            ),
            serving="stream",
            calls=("language_model", "frame_features", "tracker"),
            parts=("vision_encoder", "image_encoder", "proposal_detector", "proposal_selector", "mask_decoder"),
        ),
        Component(
            "language_model",
            "Prefill and decode, greedy; one request per decoded token, START carries the prompt (spec 1.6, 3.3).",
            (
                TensorSpec(
                    "num_tokens", "int32", (1,), "Tokens to decode; 0 with END frees the sequence.", below=settings.MAX_NEW_TOKENS + 1
                ),
                TensorSpec(
                    "prompt_ids",
                    "int32",
                    (TOKENS,),
                    "Vocabulary indices, -200 for the visual tokens, -201 for the target tokens; START only.",
                    optional=True,
                    below=language.vocab_size,
                    above=TARGET_PLACEHOLDER,
                ),
                TensorSpec("visual_tokens", "float32", (VISUAL_TOKENS, visual_width), "START only", optional=True),
                TensorSpec("target_tokens", "float32", (TARGET_TOKENS, visual_width), "START only", optional=True),
            ),
            (
                TensorSpec("token_ids", "int32", (NEW_TOKENS,), "decoded tokens"),
                TensorSpec("prompt_embeddings", "float32", (NEW_TOKENS, dim), "prompt_projector of the state that emitted each token"),
                TensorSpec("final_states", "float32", (NEW_TOKENS, visual_width), "that state"),
                TensorSpec("finished", "bool", (1,), "an end token was decoded or the cache is full"),
            ),
            serving="sequence",
            parts=("token_embedder", "language_decoder", "prompt_projector"),
        ),
        *features,
        Component(
            "tracker",
            "The next frames of tracking sessions, rows of a frame below those of the one before; memories stay inside (spec 7).",
            (*tracked_frames, frame_size, *edits),
            (replace(frame_idx, shape=(TRACKED_FRAMES,)), object_ids, *decoded_masks),
            serving="sequence",
            parts=("mask_downsampler", "memory_attention", "mask_decoder", "memory_encoder"),
        ),
        Component(
            "sparrow_track",
            "One request per frame, one correlation id per tracking session (public).",
            (session_frame, *edits),
            (frame_idx, object_ids, *decoded_masks),
            serving="ensemble",
            calls=("frame_features", "tracker"),
        ),
    ]
    scopes: dict[str, Callable[[str], bool]] = {
        "full": lambda name: True,
        "unguided": lambda name: not name.startswith("proposal_"),
        "tracking": lambda name: name in TRACKING,
    }
    there = scopes[config.scope]
    kept = [component for component in (*graphs, *served) if there(component.name)]
    return {
        component.name: replace(component, calls=tuple(filter(there, component.calls)), parts=tuple(filter(there, component.parts)))
        for component in kept
    }
