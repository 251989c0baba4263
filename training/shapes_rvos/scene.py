"""What happens in a video: shapes with attributes, their paths, occluders, background and camera; drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import hypot, pi, sin
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (41, 92, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 190),
    "orange": (245, 130, 30),
    "cyan": (50, 200, 210),
    "white": (240, 240, 240),
}
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "large")
MOTIONS = ("still", "left", "right", "up", "down", "roaming")
"""`roaming` follows a loop, may leave the frame and come back, and is never referred to by its motion."""
ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "pattern": PATTERNS, "size": SIZES, "motion": MOTIONS}
HELD_OUT = frozenset(
    {("red", "star"), ("green", "ring"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "circle"), ("orange", "square")}
)
"""Pairs of colour and shape that no training scene holds; validation and test scenes hold them as often as others."""

MAX_ACTORS = 5
SPLITS = {"train": 0, "valid": 1, "test": 2}
"""Split to the first word of its seeds."""


@dataclass(frozen=True)
class Actor:
    """A shape and its path. Lengths are parts of the frame's short side, positions parts of its width and height, times 0..1 of the video.

    The centre at time t is start + velocity t + swing (sin(2 pi (frequency t + phase)) - sin(2 pi phase)), before the camera moves it.

    Args:
        shape, colour, pattern, size, motion: attributes, as the words say.
        radius: of the circle around it.
        start, velocity, swing: x, y.
        frequency: turns per video.
        phase: x, y, in turns.
        angle, spin: in turns, and turns per video.
        rgb, pattern_rgb: 0..255, near the colour's own; of the stripes or dots.
        pattern_scale: stripes or dots across the radius.
    """

    shape: str
    colour: str
    pattern: str
    size: str
    motion: str
    radius: float
    start: tuple[float, float]
    velocity: tuple[float, float]
    swing: tuple[float, float]
    frequency: float
    phase: tuple[float, float]
    angle: float
    spin: float
    rgb: tuple[int, int, int]
    pattern_rgb: tuple[int, int, int]
    pattern_scale: float


@dataclass(frozen=True)
class Occluder:
    """A grey bar across the frame that stands in front of everything.

    Args:
        vertical: from top to bottom, else from left to right.
        centre, width: parts of the frame's width, or height.
        grey: 0..255.
    """

    vertical: bool
    centre: float
    width: float
    grey: int


@dataclass(frozen=True)
class Background:
    """Two muted colours mixed by waves and noise.

    Args:
        rgb: the two colours, 0..255.
        waves: four (frequency x, frequency y, phase, weight); frequencies in waves per frame, phase in turns, weights that sum to 1.
        noise: amplitude of the grain, 0..255.
        seed: of the grain.
    """

    rgb: tuple[tuple[int, int, int], tuple[int, int, int]]
    waves: tuple[tuple[float, float, float, float], ...]
    noise: float
    seed: int


@dataclass(frozen=True)
class Camera:
    """Moves everything but the grain and the occluders: an offset of amplitude * sin(2 pi (frequency t + phase)), and a zoom likewise.

    A point p of the world is seen at 1/2 + (p - 1/2) (1 + zoom) + offset.

    Args:
        amplitude: x, y, in parts of the frame, and of the zoom.
        frequency: turns per video.
        phase: turns.
    """

    amplitude: tuple[float, float, float]
    frequency: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """A video.

    Args:
        split: that it belongs to; only those of validation and test may be asked about held-out pairs.
        size: height and width in pixels; the scene makes sense at any other size too.
        num_frames: frame i is at time i / (num_frames - 1).
        actors: back to front: a later one covers an earlier one.
    """

    split: str
    size: tuple[int, int]
    num_frames: int
    actors: tuple[Actor, ...]
    occluders: tuple[Occluder, ...]
    background: Background
    camera: Camera

    def view(self, time: float) -> tuple[float, float, float]:
        """The camera at a time: offset x and y, and zoom around 1."""
        turn = sin(2 * pi * (self.camera.frequency * time + self.camera.phase))
        x, y, zoom = self.camera.amplitude
        return x * turn, y * turn, 1 + zoom * turn

    def centre(self, actor: int, time: float) -> tuple[float, float]:
        """Where an actor's centre is seen: x, y in parts of the frame."""
        a, (offset_x, offset_y, zoom) = self.actors[actor], self.view(time)
        x, y = (
            start + velocity * time + swing * (sin(2 * pi * (a.frequency * time + phase)) - sin(2 * pi * phase))
            for start, velocity, swing, phase in zip(a.start, a.velocity, a.swing, a.phase, strict=True)
        )
        return 0.5 + (x - 0.5) * zoom + offset_x, 0.5 + (y - 0.5) * zoom + offset_y


FRAME_SIZES = ((200, 360), (180, 320), (320, 180), (256, 256), (240, 360), (320, 240), (180, 240), (360, 300))
"""Height and width of the scenes that are not 240 by 320."""
RADII = {"small": (0.07, 0.095), "large": (0.145, 0.2)}
PATTERN_SCALES = {"small": (1.3, 1.7), "large": (2.0, 3.0)}
LIGHT = ("yellow", "cyan", "white")
"""Colours of which only a darker variant is told apart."""
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
"""Motion to its axis (x, y) and sign."""
MARGIN = 0.09
"""More than the camera moves anything."""


class Look(NamedTuple):
    """The attributes of an actor."""

    shape: str
    colour: str
    pattern: str
    size: str
    motion: str


class Path(NamedTuple):
    """The numbers of an actor's path."""

    start: tuple[float, float]
    velocity: tuple[float, float]
    swing: tuple[float, float]
    frequency: float
    phase: tuple[float, float]


def draw_scene(split: str, index: int) -> Scene:
    """The scene of a split; the same arguments give the same scene."""
    rng = np.random.default_rng((SPLITS[split], index))
    size = (240, 320) if rng.random() < 0.5 else pick(rng, FRAME_SIZES)
    empty = Scene(split, size, 24, (), (), draw_background(rng), draw_camera(rng))
    scene = empty
    while len(scene.actors) < 2:  # a crowded start can leave one actor alone
        scene = empty
        for look in draw_looks(rng, split):
            scene = add_actor(rng, scene, look)
    visible = len(scene.actors)
    if visible < MAX_ACTORS and rng.random() < 0.22:
        scene = replace(scene, actors=(*scene.actors, draw_late(rng, draw_look(rng, split))))
    if rng.random() < 0.3:
        scene = add_occluder(rng, scene, visible)
    return replace(scene, actors=tuple(scene.actors[i] for i in rng.permutation(len(scene.actors))))


def pick(rng: np.random.Generator, choices: tuple[T, ...]) -> T:
    """One of them; `rng.choice` takes ten times as long."""
    return choices[int(rng.random() * len(choices))]


def draw_look(rng: np.random.Generator, split: str) -> Look:
    """Attributes; the pair of colour and shape as the split has them."""
    look = Look(*(pick(rng, choices) for choices in ATTRIBUTES.values()))
    if split == "train":
        return look if (look.colour, look.shape) not in HELD_OUT else draw_look(rng, split)
    if rng.random() < 0.2:
        colour, shape = pick(rng, tuple(sorted(HELD_OUT)))
        return look._replace(colour=colour, shape=shape)
    return look


def draw_looks(rng: np.random.Generator, split: str) -> list[Look]:
    """The actors of a free scene, of one with distractors that each differ from a target in one attribute, or of one with twins."""
    looks = [draw_look(rng, split)]
    kind = rng.random()
    if kind < 0.45:
        for i in rng.permutation(len(ATTRIBUTES))[: 1 + int(rng.random() * 3)]:
            looks.append(draw_distractor(rng, split, looks[0], Look._fields[i]))
    elif kind < 0.65:
        looks.append(looks[0]._replace(motion=pick(rng, MOTIONS)))
    count = max(len(looks), 2 + int(rng.random() * (MAX_ACTORS - 1)))
    while len(looks) < count:
        look = draw_look(rng, split)
        if sum(look[:4] == other[:4] for other in looks) < 2:  # two of a look are told apart by their places, three not always
            looks.append(look)
    return looks


def draw_distractor(rng: np.random.Generator, split: str, target: Look, attribute: str) -> Look:
    """The target with another value of the attribute."""
    while True:
        look = target._replace(**{attribute: pick(rng, ATTRIBUTES[attribute])})
        if look != target and not (split == "train" and (look.colour, look.shape) in HELD_OUT):
            return look


def add_actor(rng: np.random.Generator, scene: Scene, look: Look) -> Scene:
    """The scene with one more actor that is clear of the others on the first frame; without, where there is no room for it."""
    for _ in range(20):
        radius = rng.uniform(*RADII[look.size])
        actor = dress(rng, look, radius, draw_path(rng, look.motion, radius))
        added = replace(scene, actors=(*scene.actors, actor))
        if stands_clear(added):
            return added
    return scene


def stands_clear(scene: Scene) -> bool:
    """Whether the last actor is apart from the others and not on the border between two places of the 3 x 3 grid.

    Distances are taken as if the frame were a square: so an actor stands clear at whatever aspect ratio it is rendered.
    """
    *others, last = (scene.centre(i, 0) for i in range(len(scene.actors)))
    if any(abs(part - border) < 0.015 for part in last for border in (1 / 3, 2 / 3)):
        return False
    radius = scene.actors[-1].radius
    return all(
        (apart := hypot(x - last[0], y - last[1])) >= 0.9 * (actor.radius + radius) and apart >= 0.15
        for (x, y), actor in zip(others, scene.actors, strict=False)
    )


def draw_path(rng: np.random.Generator, motion: str, radius: float) -> Path:
    """A path of that motion which starts inside the frame."""
    x, y = rng.uniform(0.8 * radius, 1 - 0.8 * radius, 2).tolist()
    if motion == "still":
        velocity = rng.uniform(-0.008, 0.008, 2).tolist()
        return Path((x, y), (velocity[0], velocity[1]), (0.006 * rng.random(), 0.006 * rng.random()), 1.0, (rng.random(), rng.random()))
    if motion == "roaming":
        return draw_roaming(rng, radius)
    axis, sign = DIRECTIONS[motion]
    length = rng.uniform(0.33, 0.62)
    leaves = rng.random() < 0.2
    begin = rng.uniform(0.8 * radius, 1 - (0.6 * length if leaves else length + 0.8 * radius))
    return straight(rng, axis, sign, begin, length, (x, y)[1 - axis])


def straight(rng: np.random.Generator, axis: int, sign: int, begin: float, length: float, across: float) -> Path:
    """A path along an axis, swinging a little across it; `begin` counts from the edge that it comes from."""
    along, drift, swing = begin if sign > 0 else 1 - begin, rng.uniform(-0.05, 0.05), rng.uniform(0, 0.03)
    frequency, phase = rng.uniform(0.5, 1.5), (rng.random(), rng.random())
    if axis == 0:
        return Path((along, across), (sign * length, drift), (0.0, swing), frequency, phase)
    return Path((across, along), (drift, sign * length), (swing, 0.0), frequency, phase)


def draw_roaming(rng: np.random.Generator, radius: float) -> Path:
    """A loop inside the frame, or, of every third, one that leaves through the left or right, top or bottom edge and comes back."""
    phase, places, swings = [], [], []
    out = int(rng.random() * 6)
    for axis in range(2):
        if out == axis:
            edge = rng.uniform(0.8 * radius, 0.3)
            swing, turn, side = 0.5 * (edge + radius + rng.uniform(MARGIN, 0.2)), 0.75, rng.random() < 0.5
            place, swing = (edge, -swing) if side else (1 - edge, swing)
        else:
            middle, turn = rng.uniform(0.3, 0.7), rng.random()
            swing = rng.uniform(0.12, min(middle, 1 - middle) - 0.6 * radius + 0.02)
            place = middle + swing * sin(2 * pi * turn)
        phase.append(turn)
        places.append(place)
        swings.append(swing)
    drift = rng.uniform(-0.04, 0.04, 2).tolist()
    return Path((places[0], places[1]), (drift[0], drift[1]), (swings[0], swings[1]), rng.uniform(0.95, 1.05), (phase[0], phase[1]))


def draw_late(rng: np.random.Generator, look: Look) -> Actor:
    """An actor that is outside the frame at first and comes in."""
    radius = rng.uniform(*RADII[look.size])
    look = look._replace(motion=pick(rng, tuple(DIRECTIONS)))
    axis, sign = DIRECTIONS[look.motion]
    begin = -radius - MARGIN - rng.uniform(0, 0.1)
    return dress(rng, look, radius, straight(rng, axis, sign, begin, rng.uniform(0.25, 0.6) - begin, rng.uniform(0.2, 0.8)))


def dress(rng: np.random.Generator, look: Look, radius: float, path: Path) -> Actor:
    """An actor of that look on that path."""
    red, green, blue = (int(min(max(part + rng.uniform(-18, 18), 0), 255)) for part in COLOURS[look.colour])
    darker = look.colour in LIGHT or rng.random() < 0.5
    pattern_red, pattern_green, pattern_blue = (int(0.15 * part if darker else 0.35 * part + 0.65 * 255) for part in (red, green, blue))
    return Actor(
        *look,
        radius=radius,
        **path._asdict(),
        angle=rng.random(),
        spin=rng.uniform(-0.5, 0.5) if rng.random() < 0.5 else 0.0,
        rgb=(red, green, blue),
        pattern_rgb=(pattern_red, pattern_green, pattern_blue),
        pattern_scale=rng.uniform(*PATTERN_SCALES[look.size]),
    )


def add_occluder(rng: np.random.Generator, scene: Scene, visible: int) -> Scene:
    """The scene behind a bar that leaves at least most of each of the first `visible` actors in sight; without, where there is no room."""
    centres = [scene.centre(i, 0) for i in range(visible)]
    for _ in range(10):
        axis, width, centre = int(rng.random() * 2), rng.uniform(0.05, 0.12), rng.uniform(0.1, 0.9)
        clear = (abs(centre - at[axis]) >= width / 2 + 0.7 * actor.radius for at, actor in zip(centres, scene.actors, strict=False))
        if all(clear):
            grey = rng.uniform(15, 45) if rng.random() < 0.5 else rng.uniform(150, 185)
            return replace(scene, occluders=(Occluder(axis == 0, centre, width, int(grey)),))
    return scene


def draw_background(rng: np.random.Generator) -> Background:
    """Two greys with a tint, lighter than dark patterns and darker than white actors, in soft blobs and a finer texture."""
    base = rng.uniform(65, 145, 2)
    tint = rng.uniform(-14, 14, (2, 3))
    first, second = (tuple(int(part) for part in row) for row in (base[:, None] + tint).tolist())
    weights = rng.dirichlet((2.0, 2.0, 1.0, 1.0)).tolist()
    reach = (2.0, 3.0, 6.0, 12.0)
    waves = tuple((*rng.uniform(-far, far, 2).tolist(), rng.random(), weight) for far, weight in zip(reach, weights, strict=True))
    return Background((first, second), waves, rng.uniform(1, 9), int(rng.integers(1 << 31)))  # type: ignore[arg-type]


def draw_camera(rng: np.random.Generator) -> Camera:
    """A camera that stands in half of the scenes, and sways a little in the others."""
    if rng.random() < 0.5:
        return Camera((0.0, 0.0, 0.0), 1.0, 0.0)
    x, y, zoom = (rng.random(3) * (0.03, 0.03, 0.05)).tolist()
    return Camera((x, y, zoom), rng.uniform(0.3, 1.0), rng.random())
