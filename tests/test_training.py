"""What is trained must be what is served: the training's own ways through the modules are compared with the serving path."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ensemble import frames as serving
from ensemble.config import TINY
from ensemble.prompt import prompt_ids
from ensemble.runner import SequenceRequest
from ensemble.tokenizer import Tokenizer
from ensemble.tracker import Tracker
from export.models.layers import LayerNorm2d
from export.runners import TorchDevice, TorchGraph
from export.seeded import write_tokenizer
from training import batches, joint, language, losses, segmentation, towers
from training.loop import fit, rate
from training.model import MapNorm, Model, RowNorm, load, save
from training.replay import Replay, weigh
from training.shapes_rvos.language import corpus, description
from training.shapes_rvos.scene import draw_scene


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small operators are slower on busy cores with more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Model(TINY)
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.layers[-1].bias += 2  # objects count as present
    return model


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, TINY.language.vocab_size, corpus())
    return folder


@pytest.fixture(scope="module")
def pool(tokenizer_folder):
    return batches.Pool("train", range(12), tokenizer_folder, TINY, "cpu", workers=1)


# Batches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", batches.SIZES[:4])
def test_frames_are_prepared_as_the_server_does(size):
    picture = F.interpolate(torch.rand(1, 3, 20, 20), size, mode="bicubic").clamp(0, 1).mul(255).round()
    frame = picture[0].permute(1, 2, 0).numpy().astype(np.uint8)
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    got = batches.grounding(picture, TINY)[0]
    # Pillow and torch round weights of the same filter differently: a grey level or two.
    assert (got - torch.from_numpy(serving.grounding_frame(frame, TINY))).mul(std).abs().max() <= 2
    grounded = torch.from_numpy(serving.grounding_frame(frame, TINY))[None]
    served = serving.proposal_frame(serving.proposal_image(grounded[0].numpy(), TINY))
    assert np.abs(batches.proposal_image(grounded, TINY).numpy() - served).mean() <= 1 / 57
    seen = batches.Seen(
        batches.context_pixels(picture, TINY)[None].byte(), batches.video_pixels(picture, TINY)[None].byte(), torch.empty(0), torch.empty(0)
    )
    first = torch.tensor([0])
    assert np.abs(seen.context_frames(first)[0].numpy() - serving.context_frame(frame, TINY)).max() <= 3 / 255 / 0.26
    assert np.abs(seen.video_frames(first)[0].numpy() - serving.video_frame(frame, TINY)).max() <= 2 / 255 / 0.22


def test_questions_start_with_the_tokens_that_the_server_sends(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    scene = draw_scene("train", 0)
    question = description(scene, random.Random(0))
    ids, start = batches.tokens(tokenizer, question)
    assert ids[:start] == prompt_ids(tokenizer, question.prompt, False)
    answer = tokenizer.decode(ids[start:-1])
    assert answer.replace(" ", "") == question.answer.replace(" ", "")
    assert ids[-1] in TINY.language.eos_token_ids


def test_row_of_a_scene_holds_each_of_its_questions_as_if_it_were_alone(pool, tokenizer_folder):
    tokenizer, questions = Tokenizer(tokenizer_folder), pool.questions
    for index in range(0, len(pool), 5):
        scene = draw_scene("train", index)
        asked = batches.ask(scene, random.Random(f"train {index}"))
        for turn, question in enumerate(asked):
            own = (questions.turns[index] == turn) | (questions.turns[index] == -1)
            ids, start = batches.tokens(tokenizer, question)
            assert questions.ids[index][own].tolist() == ids
            assert questions.positions[index][own].tolist() == list(range(len(ids)))
            targets = questions.targets[index][own]
            assert targets.tolist() == [batches.IGNORED] * (start - 1) + ids[start:] + [batches.IGNORED]
            spoken = questions.spoken[index][own]
            emitting = torch.where(targets == TINY.language.seg_token_id)[0]
            assert tuple(spoken[emitting].tolist()) == question.objects
            if question.kind == "absent":
                assert set(spoken[targets != batches.IGNORED].tolist()) == {batches.NOTHING}
        objects = [actor for question in asked for actor in question.objects]
        assert questions.objects[index].tolist() == objects + [-1] * (batches.MAX_OBJECTS - len(objects))
        for own, token in zip(questions.emitting[:, index], (TINY.language.seg_token_id, TINY.language.box_token_id), strict=True):
            assert set(questions.targets[index][own[: len(objects)]].tolist()) == {token}


# Modules ------------------------------------------------------------------------------------------------------------------


def test_language_model_reads_a_row_of_answers_as_it_decodes_each_of_them_token_by_token(model, pool):
    questions, scene = pool.questions, torch.tensor([3])
    ids, turns, positions = (getattr(questions, name)[scene] for name in ("ids", "turns", "positions"))
    frames = pool.seen.context_frames(scene), pool.seen.video_frames(scene)
    with torch.no_grad():
        visual = language.see(model, *frames)
        served = model.vision_encoder(frames[1], frames[0])
        torch.testing.assert_close(visual[0], served, rtol=1e-4, atol=1e-5)
        states = language.answer(model, questions.place, ids, turns, positions, visual)[0, TINY.video_tokens - 1 :]
        for turn in (1, 6):
            own = (turns[0] == turn) | (turns[0] == -1)
            text = model.token_embedder(ids[:, own].clamp(min=0))
            embeddings = torch.cat([text[:, : questions.place], served[None], text[:, questions.place + 1 :]], 1)
            heads, length = TINY.language.heads, embeddings.shape[1]
            cache = torch.zeros(TINY.language.layers, 1, heads, length, TINY.language.width // heads)
            keys, values = cache.clone(), cache.clone()
            place = length - 12
            _, state = model.language_decoder.decode_(embeddings[:, :place], torch.arange(place)[None], keys, values)
            mine = states[own[questions.place :]]
            torch.testing.assert_close(mine[-13], state[0], rtol=1e-3, atol=1e-4)
            for position in range(place, place + 3):
                one = embeddings[:, position : position + 1]
                _, state = model.language_decoder.decode_(one, torch.tensor([[position]]), keys, values)
                torch.testing.assert_close(mine[position - length], state[0], rtol=1e-3, atol=1e-4)


def test_visual_tokens_are_shared_among_the_actors_that_their_patches_show(pool):
    scenes = torch.arange(len(pool))
    shares = language.shares_of(pool.seen, scenes, TINY)
    assert shares.shape == (len(pool), batches.MAX_ACTORS, TINY.video_tokens)
    grid, frames = TINY.context.grid, TINY.num_frames
    first = shares[:, :, : (grid // 2) ** 2].sum(2) * 4
    shown = torch.stack([(pool.seen.context_actors[:, 0] == actor).flatten(1).sum(1) for actor in range(batches.MAX_ACTORS)], 1)
    torch.testing.assert_close(first, shown.float())
    assert frames > 1


def test_pointing_is_right_where_the_states_look_at_what_they_speak_of():
    pointing = language.Pointing(TINY)
    shares = torch.zeros(1, batches.MAX_ACTORS, 4)
    shares[0, 2, 1], shares[0, 0, 3] = 1, 0.5
    visual = torch.randn(1, 4, TINY.language.width)
    with torch.no_grad():
        keys = torch.cat([pointing.visual(visual[0]), pointing.nothing[None]])
        wanted = torch.stack([keys[1], keys[3], keys[4], keys[0]]) * 20
        states = torch.linalg.lstsq(pointing.states.weight, (wanted - pointing.states.bias).T).solution.T[None]
        right = pointing(torch.tensor([[2, 0, batches.NOTHING, batches.IGNORED]]), states, visual, shares)
        wrong = pointing(torch.tensor([[0, batches.NOTHING, 2, batches.IGNORED]]), states, visual, shares)
        unseen = pointing(torch.tensor([[4, batches.IGNORED, batches.IGNORED, batches.IGNORED]]), states, visual, shares)
    assert (right["_pointed"], wrong["_pointed"], unseen["pointing"]) == (1, 0, 0)
    assert right["pointing"] < 0.1 < wrong["pointing"]


def test_embeddings_of_objects_are_of_the_states_that_emit_their_tokens(model, pool):
    questions, rows = pool.questions, torch.arange(4)
    behind = questions.ids[rows][:, questions.place + 1 :]
    states = torch.randn(*behind.shape, TINY.language.width)
    with torch.no_grad():
        seg, box = joint.prompts_of(model, questions.place, questions.emitting[:, rows], states)
        for token, found in ((TINY.language.seg_token_id, seg), (TINY.language.box_token_id, box)):
            for row in range(len(rows)):
                emitting = torch.where(behind[row] == token)[0] - 1
                torch.testing.assert_close(found[row, : len(emitting)], model.prompt_projector(states[row, emitting]))


def test_tracks_are_trained_as_the_tracker_computes_them(model, pool):
    """A box on the first frame, and two frames behind it; the tracker starts with the same box in its own way."""
    num_frames, size = 3, TINY.sam2.image_size
    frames = torch.randn(num_frames, 3, size, size)
    box = torch.tensor([[0.2, 0.3, 0.6, 0.7]])
    labels, points = torch.tensor([[2, 3, -1]]), torch.cat([box.view(1, 2, 2) * size, torch.zeros(1, 1, 2)], 1)
    yes = torch.ones(1, dtype=torch.bool)
    first = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        levels = model.frame_encoder.encode(frames)
        steps = [tuple(level[index : index + 1] for level in levels) for index in range(num_frames)]
        decoded = segmentation.decode(model, steps[0], first, labels, points)
        target = torch.zeros(1, size, size, dtype=torch.bool)
        _, logits, token = segmentation.decode_loss(decoded, target, ~yes)
        trained, maps, pointers, score = [logits], [], [], decoded[2]
        tokens = decoded[3][torch.arange(1), token]
        for index in range(num_frames):
            if index:
                conditioned = segmentation.attend(model, steps[index], first, maps, pointers)
                nothing = torch.tensor([[-1, -1, -2]])
                decoded = segmentation.decode(model, steps[index], first, nothing, points * 0, conditioned=conditioned, has_memory=yes)
                _, logits, token = segmentation.decode_loss(decoded, target, yes)
                tokens, score = decoded[3][torch.arange(1), token], decoded[2]
                trained.append(logits)
            maps.append(model.memory_encoder(steps[index][0], first, logits, yes if index == 0 else ~yes, score))
            pointers.append(model.mask_decoder.point(tokens, score))
    names = ("mask_downsampler", "memory_attention", "mask_decoder", "memory_encoder")
    tracker = Tracker(TINY, {name: TorchGraph(model.graph(name).eval(), name) for name in names}, TorchDevice())
    for index in range(num_frames):
        features = dict(zip(("frame_embeddings", "high_res_1", "high_res_0"), (level.numpy() for level in steps[index]), strict=True))
        inputs = {**features, "frame_size": np.array([size, size], np.int32)}
        start = {"boxes": box.numpy(), "box_objects": np.zeros(1, np.int32)} if index == 0 else {}
        (result,) = tracker.step([SequenceRequest(1, {**inputs, **start}, start=index == 0, parameters={"mask_format": "logits"})])
        assert result["object_scores"][0] > 0
        np.testing.assert_allclose(result["mask_logits"][0], trained[index][0].numpy(), atol=2e-2, rtol=1e-2)  # bfloat16 memories


@pytest.mark.parametrize(("norm", "shape"), [(LayerNorm2d(4), (2, 4, 5, 6)), (torch.nn.LayerNorm(24, eps=1e-6), (2, 5, 24))])
def test_norms_of_few_channels_are_those_of_the_served_graphs(norm, shape):
    x = torch.randn(shape) * 3 + 1
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = norm(x)
    norm.__class__ = {LayerNorm2d: MapNorm, torch.nn.LayerNorm: RowNorm}[type(norm)]
    torch.testing.assert_close(norm(x), expected)


def test_weights_that_graphs_share_are_one_parameter_and_kept_once(model, tmp_path):
    assert model.vision_encoder.context_tower.pre_layrnorm.weight is model.image_encoder.context_tower.pre_layrnorm.weight
    assert model.mask_decoder.no_mem_embed is model.proposal_selector.no_mem_embed
    alone = model.parameters_of(["proposal_selector"])
    assert not any(parameter is model.mask_decoder.no_mem_embed for parameter in alone)  # the mask decoder reads it too
    save(tmp_path / "stage.safetensors", model, ["mask_decoder"], 0.25)
    other = Model(TINY)
    assert load(tmp_path / "stage.safetensors", other) == 0.25
    torch.testing.assert_close(other.mask_decoder.iou_token.weight, model.mask_decoder.iou_token.weight, atol=1e-3, rtol=1e-3)  # float16


# Losses -------------------------------------------------------------------------------------------------------------------


def test_mask_losses_know_a_right_mask_from_a_wrong_one():
    target = torch.zeros(1, 64, 64)
    target[:, 16:40, 8:32] = 1
    low = F.avg_pool2d(target[None], 4)[0]
    logits = torch.stack([20 * low - 10, 10 - 20 * low], 1)[0][None]  # [1, 2, 16, 16]
    (loss,), (iou,) = losses.mask_losses(logits, target[:, None])
    assert loss[0] < 0.2 < loss[1]
    assert iou[0] > 0.9
    assert iou[1] < 0.05


def test_stretch_is_bilinear_interpolation():
    maps = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(losses.stretch(maps, 20), F.interpolate(maps, (20, 20), mode="bilinear"))


def test_boxes_of_masks_are_tight_and_zero_for_empty_ones():
    masks = torch.zeros(2, 10, 20, dtype=torch.bool)
    masks[0, 2:5, 4:10] = True
    torch.testing.assert_close(losses.mask_boxes(masks), torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]))


def test_matching_gives_every_object_its_nearest_queries():
    objects = torch.tensor([[[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9], [0, 0, 0, 0]]])
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.6, 0.6, 0.9, 0.9], [0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.85, 0.9]]])
    image, query, target = losses.match(torch.zeros(1, 4), boxes, objects, 1)
    assert set(zip(image.tolist(), query.tolist(), target.tolist(), strict=True)) == {(0, 2, 0), (0, 1, 1)}
    _, query, target = losses.match(torch.zeros(1, 4), boxes, objects[:, 1:2], 2)
    assert set(query[target == 0].tolist()) == {1, 3}


def test_selection_counts_the_best_proposal():
    boxes = torch.tensor([[[0.0, 0.0, 0.4, 0.4], [0.5, 0.5, 1.0, 1.0]]])
    terms = joint.selection_loss(torch.tensor([[3.0, -3.0]]), boxes, torch.tensor([[0.0, 0.0, 0.4, 0.42]]))
    swapped = joint.selection_loss(torch.tensor([[-3.0, 3.0]]), boxes, torch.tensor([[0.0, 0.0, 0.4, 0.42]]))
    assert (terms["_selected"], swapped["_selected"]) == (1, 0)
    assert terms["selection"] < swapped["selection"]


# Loop ---------------------------------------------------------------------------------------------------------------------


def test_replay_adds_the_gradients_that_the_loss_has():
    weight, x = torch.nn.Parameter(torch.ones(3)), torch.tensor([1.0, 2.0, 3.0])

    def loss(x):
        return {"square": (weight * x).square().sum(), "_logged": weight.sum()}

    replay = Replay(loss, [weight])
    terms = replay(x=x)
    replay(x=x)
    torch.testing.assert_close(weight.grad, 4 * x.square())  # twice 2 w x^2
    assert not terms["square"].requires_grad
    assert weigh(terms) == terms["square"]


def test_stage_goes_on_where_its_file_stopped(model, tmp_path):
    seen = []

    def loss(step, progress):
        seen.append(progress)
        return {"norm": sum(parameter.square().mean() for parameter in model.prompt_projector.parameters())}

    def run(minutes):
        fit("stage", model, ("prompt_projector",), loss, minutes, 1e-2, tmp_path)

    before = model.prompt_projector.text_hidden_fcs[0].weight.square().mean().item()
    other = model.mask_decoder.iou_token.weight.clone()
    run(0.01)
    assert model.prompt_projector.text_hidden_fcs[0].weight.square().mean().item() < before
    assert torch.equal(model.mask_decoder.iou_token.weight, other)
    save(tmp_path / "stage.safetensors", model, ("prompt_projector",), 0.6)
    seen.clear()
    run(0.01)
    assert seen[0] >= 0.6
    seen.clear()
    run(0.01)
    assert not seen  # it is finished


def test_learning_rate_rises_and_falls():
    assert rate(0) == 0
    assert rate(0.04) == pytest.approx(1, abs=0.01)
    assert rate(1) == pytest.approx(0)


@pytest.mark.parametrize("stage", [segmentation, towers, language, joint])
def test_a_step_of_every_kind_gives_gradients_to_what_it_trains(model, pool, stage):
    loss = stage.loss(model, pool, 2)
    loss = loss[0] if isinstance(loss, tuple) else loss
    model.requires_grad_(False)
    trained = model.parameters_of(stage.GRAPHS)
    for parameter in trained:
        parameter.requires_grad_(True)
        parameter.grad = None
    terms = loss(0, 0.0)
    if waiting := [term for term in terms.values() if term.requires_grad]:
        torch.stack(waiting).sum().backward()
    model.requires_grad_(True)
    got = [parameter for parameter in trained if parameter.grad is not None]
    assert len(got) > 0.8 * len(trained)  # all but the region helper, and what only some prompts use
    assert all(torch.isfinite(parameter.grad).all() for parameter in got)
