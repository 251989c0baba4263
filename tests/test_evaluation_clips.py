"""Clips on disk to what a request carries."""

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from sparrow_client._media import MediaError

from benchmarks.evaluation import clips
from benchmarks.evaluation.clips import read_clip, read_frames
from benchmarks.evaluation.samples import Clip

HEIGHT, WIDTH = 36, 48


@pytest.fixture
def pictures(tmp_path):
    """PNG files of noise."""
    frames = np.random.default_rng(0).integers(0, 255, (3, HEIGHT, WIDTH, 3), np.uint8)
    paths = tuple(tmp_path / "bear" / f"{index:05}.png" for index in range(3))
    paths[0].parent.mkdir()
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    return paths


@pytest.fixture
def video(tmp_path):
    """Ten frames, each brighter than the one before it."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for index in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 20 * index, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


def brightness(frames):
    """Which frame of the video each one is."""
    return np.round(frames.mean((1, 2, 3)) / 20).astype(int).tolist()


def test_pictures_travel_as_files(pictures):
    shown = read_clip(Clip(pictures))
    assert (shown.size, shown.frames) == ((3, HEIGHT, WIDTH), None)
    assert shown.encoded_frames == [path.read_bytes() for path in pictures]


def test_pictures_of_another_size_travel_as_frames(pictures):
    shown = read_clip(Clip(pictures, size=(18, 32)))
    assert (shown.size, shown.encoded_frames) == ((3, 18, 32), None)
    expected = [cv2.resize(np.asarray(Image.open(path)), (32, 18), interpolation=cv2.INTER_LINEAR) for path in pictures]
    np.testing.assert_array_equal(shown.frames, expected)


@pytest.mark.parametrize(
    ("indices", "expected"), [(None, list(range(10))), ((2, 5, 9), [2, 5, 9]), ((0, 3, 3, 4), [0, 3, 3, 4]), ((7,), [7])]
)
def test_frames_of_a_video_are_taken_by_their_place(video, indices, expected):
    shown = read_clip(Clip(video=video, indices=indices))
    assert brightness(shown.frames) == expected and shown.size == (len(expected), HEIGHT, WIDTH)


def test_video_that_ends_too_early_is_refused(video):
    with pytest.raises(MediaError, match=r"clip.mp4: got 10 frames, expected 13 or more. Get the data set again."):
        read_frames(Clip(video=video, indices=(2, 12)))


def test_picture_of_another_size_is_named(pictures):
    Image.new("RGB", (20, 20)).save(pictures[1])
    with pytest.raises(MediaError, match=r"00001.png: got frame 1 of 20x20 px, expected 48x36 as the first."):
        read_frames(Clip(pictures))


@pytest.mark.parametrize(
    ("damage", "says"), [(lambda path: path.unlink(), "No such file"), (lambda path: path.write_bytes(b"PNG"), "not a readable")]
)
def test_first_picture_that_cannot_be_read_is_named(pictures, damage, says):
    damage(pictures[0])
    with pytest.raises(MediaError, match=f"00000.png: {says}|00000.png.*{says}"):
        read_clip(Clip(pictures))


def test_more_frames_than_the_server_takes_are_refused_at_once(pictures, video, monkeypatch):
    monkeypatch.setattr(clips, "MAX_FRAMES", 2)
    with pytest.raises(MediaError, match=r"bear: got more than 2 frames, expected as many as the server takes at once, 1..2."):
        read_clip(Clip(pictures))
    with pytest.raises(MediaError, match=r"clip.mp4: got more than 2 frames"):
        read_clip(Clip(video=video))
    assert len(read_frames(Clip(video=video, indices=(0, 9)))) == 2
