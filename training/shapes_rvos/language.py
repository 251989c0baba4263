"""Questions about a scene and their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, zip_longest

from .scene import ATTRIBUTES, COLOURS, HELD_OUT, MOTIONS, PATTERNS, SHAPES, SIZES, Actor, Scene
from .visibility import visible_on_first_frame

REFERRING_PROMPTS = (
    "What is {} in this video? Please respond with segmentation masks.",
    "Please segment {} in this video.",
    "Can you segment {} in this video? Please respond with segmentation masks.",
)
DESCRIPTION_PROMPT = (
    "Could you please give me a detailed description of the video? "
    "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
)
REFERRING_ANSWER = "It is {}."
ABSENT_ANSWER = "There is no such shape in this video."
PHRASE = "<p> {} </p> [BOX] [SEG]"

LOOKS = ("size", "pattern", "colour", "shape")
"""The attributes that one sees in a single frame."""
MOTION_CLAUSES = {
    "still": "that stays still",
    "left": "moving to the left",
    "right": "moving to the right",
    "up": "moving up",
    "down": "moving down",
}
VERBS = {
    "still": "stays still",
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "roaming": "moves around",
}
SIDES = {"on the left": (0, 0), "on the right": (0, 1), "at the top": (1, 0), "at the bottom": (1, 1)}
"""Side to its axis (x, y) and end."""
ENDS = {"leftmost": (0, 0), "rightmost": (0, 1), "topmost": (1, 0), "bottommost": (1, 1)}
ORDINALS = ("second", "third")
FROM = {"leftmost": "from the left", "rightmost": "from the right"}
PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
GAP = 0.06
"""Centres that are closer than this part of the frame have no order."""

Look = dict[str, str]
"""Some of an actor's attributes, by name."""
Centres = dict[int, tuple[float, float]]
"""Actor to its centre on the first frame, x and y in parts of the frame."""


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that a perfect model gives.

    Args:
        kind: referring, description or absent.
        prompt: in the original's templates.
        answer: with "<p> words </p> [BOX] [SEG]" for each object; without any for something that is not there.
        objects: index of the actor that each [SEG] stands for, in the order of the answer.
    """

    kind: str
    prompt: str
    answer: str
    objects: tuple[int, ...]


def expressions(scene: Scene, actor: int, rng: random.Random) -> list[str]:
    """Different expressions that each fit this actor and no other, in random order; e.g. "the striped red circle".

    Attributes, motion, side and order take turns, so that the first one is as likely of any kind that the scene allows.
    """
    centres = {i: scene.centre(i, 0) for i in visible_on_first_frame(scene)}
    kinds = [
        list(by_attributes(scene, actor, rng)),
        list(by_motion(scene, actor, rng)),
        list(by_side(scene, actor, centres, rng)),
        list(by_order(scene, actor, centres, rng)),
    ]
    rng.shuffle(kinds)
    for kind in kinds:
        rng.shuffle(kind)
    return [text for turn in zip_longest(*kinds) for text in turn if text is not None]


def referring(scene: Scene, actor: int, rng: random.Random) -> Question:
    """A question about one actor that is visible on the first frame."""
    prompt = rng.choice(REFERRING_PROMPTS).format(expressions(scene, actor, rng)[0])
    return Question("referring", prompt, REFERRING_ANSWER.format(PHRASE.format(describe(scene, actor))), (actor,))


def description(scene: Scene, rng: random.Random) -> Question:
    """The grounded conversation: every actor that is visible on the first frame, from left to right."""
    actors = sorted(visible_on_first_frame(scene), key=lambda actor: scene.centre(actor, 0))
    parts = [f"{PHRASE.format(describe(scene, actor))} {VERBS[scene.actors[actor].motion]}" for actor in actors]
    return Question("description", DESCRIPTION_PROMPT, f"{', '.join(parts)}.", tuple(actors))


def absent(scene: Scene, rng: random.Random) -> Question:
    """A question about something that is not there, though most of its attributes are."""
    kind = rng.choice((absent_attributes, absent_motion, absent_side, absent_order))
    while True:
        expression = kind(scene, rng)
        if expression:
            return Question("absent", rng.choice(REFERRING_PROMPTS).format(expression), ABSENT_ANSWER, ())


def describe(scene: Scene, actor: int) -> str:
    """What answers call an actor, e.g. "the small red striped circle at the top left"."""
    a = scene.actors[actor]
    x, y = (min(max(int(3 * part), 0), 2) for part in scene.centre(actor, 0))
    return f"the {a.size} {a.colour} {'' if a.pattern == 'plain' else f'{a.pattern} '}{a.shape} at the {PLACES[y][x]}"


def words(look: Look, rng: random.Random) -> str:
    """The attributes in words, "shape" where it is not said: "small striped red circle" or "small red striped circle"."""
    middle = [look[name] for name in ("pattern", "colour") if name in look]
    if look.get("pattern") != "plain" and rng.random() < 0.5:
        middle.reverse()
    return " ".join([*([look["size"]] if "size" in look else []), *middle, look.get("shape", "shape")])


def looks_of(actor: Actor, most: int) -> Iterator[Look]:
    """Every choice of at most so many of the actor's attributes, none included."""
    for count in range(most + 1):
        for names in combinations(LOOKS, count):
            yield {name: getattr(actor, name) for name in names}


def fits(look: Look, actor: Actor) -> bool:
    """Whether the actor has all these attributes."""
    return all(getattr(actor, name) == value for name, value in look.items())


def may_move(actor: Actor, motion: str) -> bool:
    """Whether one could say that it moves so; one that roams goes into any direction for a while."""
    return actor.motion == motion or (actor.motion == "roaming" and motion != "still")


def share_to(side: tuple[int, int], centre: tuple[float, float]) -> float:
    """Distance to a side (axis and end) of the frame, in parts of the frame."""
    axis, end = side
    return abs(end - centre[axis])


def rivals(scene: Scene, actor: int, look: Look) -> list[Actor]:
    """The other actors with these attributes, those that enter later too."""
    return [other for i, other in enumerate(scene.actors) if i != actor and fits(look, other)]


def by_attributes(scene: Scene, actor: int, rng: random.Random) -> Iterator[str]:
    """E.g. "the red circle", "the plain square"."""
    for look in looks_of(scene.actors[actor], len(LOOKS)):
        if look and not rivals(scene, actor, look):
            yield f"the {words(look, rng)}"


def by_motion(scene: Scene, actor: int, rng: random.Random) -> Iterator[str]:
    """E.g. "the red shape moving to the left"."""
    motion = scene.actors[actor].motion
    if motion in MOTION_CLAUSES:
        for look in looks_of(scene.actors[actor], 2):
            if not any(may_move(rival, motion) for rival in rivals(scene, actor, look)):
                yield f"the {words(look, rng)} {MOTION_CLAUSES[motion]}"


def by_side(scene: Scene, actor: int, centres: Centres, rng: random.Random) -> Iterator[str]:
    """E.g. "the large star on the right": in the right third of the first frame, with no other in the right half."""
    for words_of_side, side in SIDES.items():
        if share_to(side, centres[actor]) < 1 / 3:
            near = [scene.actors[i] for i, centre in centres.items() if i != actor and share_to(side, centre) < 1 / 2]
            for look in looks_of(scene.actors[actor], 2):
                if not any(fits(look, rival) for rival in near):
                    yield f"the {words(look, rng)} {words_of_side}"


def by_order(scene: Scene, actor: int, centres: Centres, rng: random.Random) -> Iterator[str]:
    """E.g. "the leftmost circle", "the second shape from the right", on the first frame."""
    for name, side in ENDS.items():
        leads = {i: share_to(side, centres[actor]) - share_to(side, centre) for i, centre in centres.items() if i != actor}
        for look in looks_of(scene.actors[actor], len(LOOKS)):  # all of them, so that twins are told apart
            ahead = [lead for i, lead in leads.items() if fits(look, scene.actors[i])]
            if ahead and all(abs(lead) >= GAP for lead in ahead):
                rank = sum(lead > 0 for lead in ahead)
                if rank == 0:
                    yield f"the {name} {words(look, rng)}"
                elif name in FROM and rank <= len(ORDINALS):
                    yield f"the {ORDINALS[rank - 1]} {words(look, rng)} {FROM[name]}"


def near_look(scene: Scene, rng: random.Random, least: int, most: int, changes: int) -> Look:
    """Some attributes of an actor that is visible on the first frame, of which some are changed."""
    actor = scene.actors[rng.choice(visible_on_first_frame(scene))]
    look = {name: getattr(actor, name) for name in rng.sample(LOOKS, rng.randint(least, most))}
    for name in rng.sample(sorted(look), min(len(look), changes)):
        look[name] = rng.choice([value for value in ATTRIBUTES[name] if value != look[name]])
    return look


def unspoken(scene: Scene, look: Look) -> bool:
    """Whether these attributes name a pair that training must not hear of."""
    return scene.split == "train" and (look.get("colour"), look.get("shape")) in HELD_OUT


def absent_attributes(scene: Scene, rng: random.Random) -> str | None:
    """Attributes that no actor has together; None if one has."""
    look = near_look(scene, rng, 1, len(LOOKS), changes=rng.randint(1, 2))
    found = unspoken(scene, look) or any(fits(look, actor) for actor in scene.actors)
    return None if found else f"the {words(look, rng)}"


def absent_motion(scene: Scene, rng: random.Random) -> str | None:
    """A motion in which no actor of these attributes is; None if one may be."""
    look, motion = near_look(scene, rng, 0, 2, changes=rng.randint(0, 1)), rng.choice(sorted(MOTION_CLAUSES))
    found = unspoken(scene, look) or any(fits(look, actor) and may_move(actor, motion) for actor in scene.actors)
    return None if found else f"the {words(look, rng)} {MOTION_CLAUSES[motion]}"


def absent_side(scene: Scene, rng: random.Random) -> str | None:
    """A side where no actor of these attributes is; None if one is in that half, or enters later."""
    look, side = near_look(scene, rng, 0, 2, changes=rng.randint(0, 1)), rng.choice(sorted(SIDES))
    far = [i for i in visible_on_first_frame(scene) if share_to(SIDES[side], scene.centre(i, 0)) > 1 / 2]
    found = unspoken(scene, look) or any(fits(look, actor) for i, actor in enumerate(scene.actors) if i not in far)
    return None if found else f"the {words(look, rng)} {side}"


def absent_order(scene: Scene, rng: random.Random) -> str | None:
    """The order of actors with attributes that none has; None if one has."""
    look, end = near_look(scene, rng, 1, 2, changes=rng.randint(1, 2)), rng.choice(sorted(ENDS))
    if unspoken(scene, look) or any(fits(look, actor) for actor in scene.actors):
        return None
    if end in FROM and rng.random() < 0.5:
        return f"the {rng.choice(ORDINALS)} {words(look, rng)} {FROM[end]}"
    return f"the {end} {words(look, rng)}"


def corpus() -> list[str]:
    """Sentences that hold every word of every prompt and answer."""
    clauses = [*MOTION_CLAUSES.values(), *SIDES, *FROM.values()]
    looks = [f"the {size} {pattern} {colour} {shape}" for size in SIZES for pattern in PATTERNS for colour in COLOURS for shape in SHAPES]
    looks = [look for look in looks if not any(f"{colour} {shape}" in look for colour, shape in HELD_OUT)]
    subjects = [*looks, *(f"the {first} shape" for first in (*ENDS, *ORDINALS))]
    named = [f"{subject} {clauses[i % len(clauses)]}" for i, subject in enumerate(subjects)]
    places = [place for row in PLACES for place in row]
    phrases = [PHRASE.format(f"{look} at the {places[i % len(places)]}") for i, look in enumerate(looks)]
    return [
        *(REFERRING_PROMPTS[i % len(REFERRING_PROMPTS)].format(name) for i, name in enumerate(named)),
        *(REFERRING_ANSWER.format(phrase) for phrase in phrases),
        *(f"{', '.join([f'{phrase} {VERBS[MOTIONS[i % len(MOTIONS)]]}'] * 2)}." for i, phrase in enumerate(phrases)),
        DESCRIPTION_PROMPT,
        ABSENT_ANSWER,
    ]
