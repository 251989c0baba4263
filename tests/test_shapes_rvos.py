"""What one may rely on in the world of moving shapes: its scenes, pictures, words and files."""

import json
import random
import re
from dataclasses import replace
from math import hypot

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.evaluation.clips import read_frames
from benchmarks.evaluation.palettes import PALETTE
from benchmarks.evaluation.shapes_rvos import ShapesRvos
from training.shapes_rvos.__main__ import main
from training.shapes_rvos.files import object_ids, render_scene
from training.shapes_rvos.language import absent, corpus, description, expressions, referring
from training.shapes_rvos.render import pack, render
from training.shapes_rvos.scene import COLOURS, HELD_OUT, MAX_ACTORS, PATTERNS, SHAPES, SIZES, draw_scene
from training.shapes_rvos.visibility import visible_on_first_frame

COUNT = 120
SCENES = {split: [draw_scene(split, index) for index in range(COUNT)] for split in ("train", "test")}
ALL = [scene for scenes in SCENES.values() for scene in scenes]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The arrays are small, and threads on busy cores wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def at(scenes, time, size=(96, 96)):
    """Frames [S, 3, H, W] and masks [S, MAX_ACTORS, H, W] at one time."""
    frames, masks = render(pack(scenes), torch.full((len(scenes), 1), float(time)), size)
    return frames[:, 0], masks[:, 0]


def questions(scene, seed=0):
    rng = random.Random(seed)
    return [*(referring(scene, actor, rng) for actor in visible_on_first_frame(scene)), description(scene, rng), absent(scene, rng)]


# Scenes


def test_same_seed_same_scene():
    assert draw_scene("train", 7) == SCENES["train"][7]
    assert draw_scene("train", 8) != SCENES["train"][7]
    assert draw_scene("test", 7) != SCENES["train"][7]


def test_scenes_are_as_varied_as_they_should_be():
    assert {len(scene.actors) for scene in ALL} == {2, 3, 4, 5}
    assert len({scene.size for scene in ALL}) > 6
    assert 0.35 < np.mean([scene.size == (240, 320) for scene in ALL]) < 0.65
    assert 0.15 < np.mean([bool(scene.occluders) for scene in ALL]) < 0.35
    assert 0.08 < np.mean([len(visible_on_first_frame(scene)) < len(scene.actors) for scene in ALL]) < 0.25


def test_training_holds_no_held_out_pairs_and_the_others_do():
    pairs = {split: [(a.colour, a.shape) in HELD_OUT for scene in scenes for a in scene.actors] for split, scenes in SCENES.items()}
    assert not any(pairs["train"])
    assert 0.2 < np.mean(pairs["test"]) < 0.36


def test_two_actors_are_in_sight_at_first_and_nobody_looks_like_two_others():
    for scene in ALL:
        visible = visible_on_first_frame(scene)
        assert len(visible) >= 2
        looks = [(a.shape, a.colour, a.pattern, a.size) for a in (scene.actors[i] for i in visible)]
        assert max(map(looks.count, looks)) <= 2


def test_actors_move_as_their_motion_says():
    for scene in ALL:
        for actor in scene.actors:
            path = [replace(scene, actors=(actor,), camera=replace(scene.camera, amplitude=(0, 0, 0))).centre(0, i / 23) for i in range(24)]
            (x0, y0), (x1, y1) = path[0], path[-1]
            dx, dy = x1 - x0, y1 - y0
            farthest = max(hypot(x - x0, y - y0) for x, y in path)
            along, across = {"left": (-dx, dy), "right": (dx, dy), "up": (-dy, dx), "down": (dy, dx)}.get(actor.motion, (0, 0))
            if actor.motion == "still":
                assert farthest < 0.03
            elif actor.motion == "roaming":
                assert farthest > 0.15
                assert hypot(dx, dy) < 0.25
            else:
                assert along > 0.25
                assert abs(across) < 0.5 * along


# Pictures


@pytest.mark.parametrize("size", [(96, 96), (90, 160), (160, 90)])
def test_what_is_visible_on_the_first_frame_shows(size):
    _, masks = at(ALL, 0, size)
    shown = masks.flatten(2).sum(2)
    for scene, areas in zip(ALL, shown.tolist(), strict=True):
        scale = (min(size) / min(scene.size)) ** 2
        for actor in range(MAX_ACTORS):
            assert areas[actor] > 60 * scale if actor in visible_on_first_frame(scene) else areas[actor] == 0


def test_visible_actors_are_mostly_uncovered():
    for scene in ALL[::5]:
        alone = [replace(scene, actors=(actor,), occluders=()) for actor in scene.actors]
        whole = at(alone, 0)[1][:, 0].flatten(1).sum(1)
        share = at([scene], 0)[1][0, : len(alone)].flatten(1).sum(1) / whole.clamp(min=1)
        assert (share[list(visible_on_first_frame(scene))] > 0.6).all()


def test_covered_actor_is_not_visible():
    scene = next(scene for scene in ALL if len(scene.actors) == 2)
    back = replace(scene.actors[0], radius=0.08)
    front = replace(back, shape="circle", radius=0.2)
    assert visible_on_first_frame(replace(scene, actors=(back, front), occluders=())) == (1,)
    assert visible_on_first_frame(replace(scene, actors=(front, back), occluders=())) in ((0, 1), (1,))


def test_actors_that_enter_later_do_come():
    late = [scene for scene in ALL if len(visible_on_first_frame(scene)) < len(scene.actors)]
    _, masks = render(pack(late), torch.linspace(0, 1, 6).expand(len(late), -1), (64, 64))
    for scene, own in zip(late, masks, strict=True):
        (actor,) = set(range(len(scene.actors))) - set(visible_on_first_frame(scene))
        assert own[:, actor].any()


def test_masks_do_not_overlap_and_colours_are_the_actors():
    frames, masks = at(ALL, 0.5)
    assert frames.min() >= 0
    assert frames.max() <= 255
    assert masks.sum(1).max() == 1
    for scene, frame, own in zip(ALL, frames, masks, strict=True):
        for actor, mask in zip(scene.actors, own, strict=False):
            if actor.pattern == "plain" and mask.sum() > 60:
                assert (frame[:, mask].median(1).values - torch.tensor(actor.rgb)).abs().max() < 12


def test_masks_hide_what_is_behind():
    scene = SCENES["train"][0]
    big = replace(scene.actors[0], shape="circle", radius=0.2, start=(0.5, 0.5))
    small = replace(big, shape="square", radius=0.1)
    ring = replace(big, shape="ring")
    both = [replace(scene, actors=actors, occluders=()) for actors in ((small, big), (big, small), (small, ring))]
    _, masks = at(both, 0)
    areas = masks.flatten(2).sum(2)
    assert areas[0, 0] == 0
    assert areas[1, 0] == areas[0, 1] - areas[1, 1]
    assert areas[2, 0] == areas[1, 1]  # through the hole


def test_shapes_keep_their_form_at_any_aspect_ratio():
    scene = SCENES["train"][0]
    circle = replace(scene.actors[0], shape="circle", radius=0.2, start=(0.5, 0.5))
    scene = replace(scene, actors=(circle,), occluders=(), camera=replace(scene.camera, amplitude=(0, 0, 0)))
    for size in ((100, 200), (200, 100), (100, 100)):
        mask = at([scene], 0, size)[1][0, 0]
        assert mask.any(0).sum() == mask.any(1).sum() == 40


def test_a_scene_looks_the_same_alone_and_among_others():
    scenes = SCENES["test"][:6]
    times = torch.linspace(0, 1, 3).expand(6, -1)
    frames, masks = render(pack(scenes), times, (90, 120))
    alone, own = render({name: tensor[4:5] for name, tensor in pack(scenes).items()}, times[:1], (90, 120))
    torch.testing.assert_close(alone[0], frames[4])
    assert torch.equal(own[0], masks[4])


# Words


def stands_for(expression, scene):
    """The actors that an expression fits, by reading it: a brute-force check that shares nothing with its making."""
    visible = visible_on_first_frame(scene)
    said = expression.split()
    names = {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
    fit = [i for i, a in enumerate(scene.actors) if all(getattr(a, key) in said for key, words in names.items() if set(words) & set(said))]
    place = {i: scene.centre(i, 0) for i in visible}
    motions = {
        "still": "stays still",
        "left": "moving to the left",
        "right": "moving to the right",
        "up": "moving up",
        "down": "moving down",
    }
    for motion, clause in motions.items():
        if clause in expression:
            return [i for i in fit if scene.actors[i].motion == motion]
    sides = {
        "on the left": lambda x, y: x,
        "on the right": lambda x, y: 1 - x,
        "at the top": lambda x, y: y,
        "at the bottom": lambda x, y: 1 - y,
    }
    for clause, to in sides.items():
        if clause in expression:
            return [i for i in fit if i in place and to(*place[i]) < 0.5]
    fit_visible = [i for i in fit if i in place]
    for end, to in zip(("leftmost", "rightmost", "topmost", "bottommost"), sides.values(), strict=True):
        ranked = sorted(fit_visible, key=lambda i: to(*place[i]))
        if end in expression:
            return ranked[:1]
        if f"from the {end.removesuffix('most')}" in expression:
            rank = ["second", "third"].index(said[1]) + 1
            return ranked[rank : rank + 1]
    return fit


def test_every_expression_fits_its_actor_alone():
    for scene in ALL[::3]:
        for actor in visible_on_first_frame(scene):
            said = expressions(scene, actor, random.Random(1))
            assert len(said) >= 4
            assert len(set(said)) == len(said)
            for expression in said:
                assert stands_for(expression, scene) == [actor], expression


def test_expressions_are_of_every_kind():
    first = [expressions(scene, actor, random.Random(i))[0] for i, scene in enumerate(ALL) for actor in visible_on_first_frame(scene)]
    for words in ("moving to the left", "stays still", "on the right", "at the top", "leftmost", "second", "from the left"):
        assert any(words in expression for expression in first)
    assert any(re.fullmatch(r"the (red|blue) (circle|square)", expression) for expression in first)
    assert 0.1 < np.mean([bool(re.search("moving|still", expression)) for expression in first]) < 0.4


def test_absent_fits_nothing():
    for scene in ALL:
        for seed in range(5):
            question = absent(scene, random.Random(seed))
            expression = re.search(r"(the .*?) in this video", question.prompt)[1]
            assert not stands_for(expression, scene), expression
            assert question.answer == "There is no such shape in this video."
            assert question.objects == ()


def test_training_never_speaks_of_held_out_pairs():
    for scene in SCENES["train"]:
        for question in questions(scene):
            for phrase in re.split(r"<p>|\.|,", question.prompt + question.answer):
                words = phrase.split()
                assert not any(colour in words and shape in words for colour, shape in HELD_OUT), phrase


def test_answers_have_a_phrase_box_and_mask_per_object():
    for scene in ALL[::5]:
        for question in questions(scene):
            count = len(question.objects)
            assert question.answer.count("</p> [BOX] [SEG]") == question.answer.count("[SEG]") == question.answer.count("<p>") == count
            for phrase, actor in zip(re.findall("<p> (.*?) </p>", question.answer), question.objects, strict=True):
                assert {scene.actors[actor].shape, scene.actors[actor].colour, scene.actors[actor].size} <= set(phrase.split())


def test_description_goes_from_left_to_right_over_all_that_is_visible():
    for scene in ALL:
        objects = description(scene, random.Random(0)).objects
        assert sorted(objects) == list(visible_on_first_frame(scene))
        assert [scene.centre(i, 0)[0] for i in objects] == sorted(scene.centre(i, 0)[0] for i in objects)


def test_corpus_holds_every_word_and_no_held_out_pair():
    known = {word for sentence in corpus() for word in sentence.split()}
    asked = [question for i, scene in enumerate(ALL[-100:]) for question in questions(scene, i)]
    assert len(asked) > 200
    assert {word for question in asked for word in f"{question.prompt} {question.answer}".split()} <= known
    assert not any(f"{colour} {shape}" in sentence for sentence in corpus() for colour, shape in HELD_OUT)


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    result = CliRunner().invoke(main, [str(out), "--split", "test", "--videos", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    return out / "test"


def test_files_hold_what_was_drawn(written):
    videos = ShapesRvos(written.parent, "test").videos
    assert [video.name for video in videos] == ["test_00000", "test_00001"]
    for video, scene in zip(videos, SCENES["test"], strict=False):
        frames, annotations = render_scene(scene)
        assert np.abs(read_frames(video.samples[0].clip).astype(int) - frames).mean() < 6  # of the codec, and its halved colours
        stored = [Image.open(path) for path in video.annotations]
        np.testing.assert_array_equal(np.stack(stored), annotations)
        assert stored[0].mode == "P"
        assert stored[0].getpalette()[:12] == list(PALETTE[:12]) == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert set(np.unique(annotations[0])) == {0, *object_ids(scene).values()}
        assert [sample.kind for sample in video.samples] == ["referring"] * len(object_ids(scene)) + ["description", "absent"]


def test_four_expressions_per_object_in_its_turn(written):
    videos = json.loads((written / "meta_expressions.json").read_text())["videos"]
    for (name, entry), scene in zip(videos.items(), SCENES["test"], strict=False):
        assert entry["frames"] == [f"{i:05}" for i in range(scene.num_frames)]
        assert list(entry["expressions"]) == [str(i) for i in range(4 * len(object_ids(scene)))], name
        actors = {object_id: actor for actor, object_id in object_ids(scene).items()}
        for index, expression in entry["expressions"].items():
            assert int(expression["obj_id"]) == int(index) // 4 + 1
            assert stands_for(expression["exp"], scene) == [actors[int(expression["obj_id"])]]


def test_distractors_differ_in_one_attribute_at_most(written):
    asked = json.loads((written / "questions.json").read_text())["test_00000"]
    actors = {object_id: SCENES["test"][0].actors[actor] for actor, object_id in object_ids(SCENES["test"][0]).items()}
    for question in asked[: len(actors)]:
        (own,) = (actors[object_id] for object_id in question["objects"])
        alike = [
            object_id
            for object_id, a in actors.items()
            if a is not own and (a.shape == own.shape) + (a.colour == own.colour) + (a.pattern == own.pattern) + (a.size == own.size) >= 3
        ]
        assert question["distractors"] == alike


def test_files_are_the_same_every_time(written, tmp_path):
    CliRunner().invoke(main, [str(tmp_path), "--split", "test", "--videos", "1"], catch_exceptions=False)
    first = sorted((written / "Annotations" / "test_00000").iterdir())
    assert [path.read_bytes() for path in first] == [
        (tmp_path / "test" / "Annotations" / "test_00000" / path.name).read_bytes() for path in first
    ]
    again = json.loads((tmp_path / "test" / "questions.json").read_text())
    assert again["test_00000"] == json.loads((written / "questions.json").read_text())["test_00000"]
