import shutil
import struct
import wave
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from sparrow_client import _media
from sparrow_client._media import MediaError, open_frames, read_image, read_mask, read_media, sample_stride

from tests import goldens

HORSE_JUMP = goldens.ROOT.parent / "assets" / "horse_jump.mp4"
BITS, BAR = 10, 8
"""Every frame of a test video shows its number: as many black or white bars, each so many pixels wide."""


def numbered(index, height=48):
    bars = np.array([index >> bit & 1 for bit in range(BITS)]).repeat(BAR) * 255
    return np.broadcast_to(bars[None, :, None], (height, BITS * BAR, 3)).astype(np.uint8)


def number(frame):
    bars = frame[:, BAR // 2 :: BAR].mean((0, 2)) > 128
    return sum(1 << bit for bit in range(BITS) if bars[bit])


def write_video(path, num_frames, fps, draw=numbered, times_ms=None, rotation=0):
    """H.264; `times_ms` gives every frame its own time, `rotation` is how players should turn it (degrees, counterclockwise)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *draw(0).shape[:2], "yuv420p"
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(index), format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sampled(num_frames, fps):
    """Which source frames the original takes, word for word from spec 1.1."""
    indices = [index for index in range(num_frames) if index % round(fps / 1) == 0]
    return indices if len(indices) <= 64 else [indices[int(position)] for position in np.linspace(0, len(indices) - 1, 64, dtype=int)]


@pytest.mark.parametrize(
    ("fps", "num_frames", "stride"),
    [
        (8, 50, 8),
        (10, 41, 10),  # the last frame is one of them
        (12.5, 100, 12),  # half to even: down,
        (13.5, 100, 14),  # and up
        (30, 61, 30),
        (Fraction(30000, 1001), 70, 30),
        (1, 64, 1),  # exactly as many as fit
        (1, 65, 1),
        (2, 300, 2),
        (3, 500, 3),
        (0.6, 5, 1),
        (25, 12, 25),  # shorter than a second
    ],
)
def test_video_is_sampled_as_the_original_does(tmp_path, fps, num_frames, stride):
    media = read_media(write_video(tmp_path / "clip.mp4", num_frames, fps))
    expected = sampled(num_frames, float(fps))
    assert [number(frame) for frame in media.frames] == expected
    assert len(expected) < 3 or np.gcd.reduce(expected) == stride
    assert (media.modality, media.frames.dtype, media.frames.shape[1:]) == ("video", np.uint8, (48, 80, 3))
    assert media.names == [f"{index:05d}" for index in range(len(expected))]
    assert media.fps == pytest.approx(float(fps) / stride)


@pytest.mark.parametrize(("fps", "stride"), [(0.6, 1), (1.5, 2), (2.5, 2), (3.5, 4), (12.5, 12), (13.5, 14), (29.97, 30), (60, 60)])
def test_stride_is_the_rate_rounded_half_to_even(tmp_path, fps, stride):
    assert sample_stride(tmp_path, Fraction(fps).limit_denominator(1001), 1) == stride


def test_video_can_be_sampled_at_another_rate(tmp_path):
    media = read_media(write_video(tmp_path / "clip.mp4", 40, 10), sample_fps=5)
    assert [number(frame) for frame in media.frames] == list(range(0, 40, 2))
    assert media.fps == 5


@pytest.mark.parametrize("fps", [0.4, 0.5])
def test_video_is_refused_when_it_is_slower_than_the_sampling(tmp_path, fps):
    path = write_video(tmp_path / "slow.mp4", 5, fps)
    with pytest.raises(MediaError, match=rf"slow.mp4: {fps} frames per second, expected more than 0.5. Take all with --sample-fps {fps}"):
        read_media(path)
    assert len(read_media(path, sample_fps=fps).frames) == 5


def test_video_with_uneven_times_is_sampled_by_its_average_rate(tmp_path):
    times_ms = np.cumsum(np.random.default_rng(0).integers(50, 250, 60)).tolist()
    path = write_video(tmp_path / "uneven.mp4", 60, 10, times_ms=times_ms)
    with av.open(str(path)) as container:
        fps = float(container.streams.video[0].average_rate)
    assert 6 < fps < 7.4  # and not the 10 that the encoder was told
    assert [number(frame) for frame in read_media(path).frames] == sampled(60, fps)


def test_video_without_a_frame_rate_is_refused(tmp_path):
    for fps in (None, Fraction(0)):
        with pytest.raises(MediaError, match=r"clip: the file names no frame rate. Convert it"):
            sample_stride(tmp_path / "clip", fps, 1)


def marked(_index):
    """A white top left corner on black, lying on its side."""
    frame = np.zeros((48, 80, 3), np.uint8)
    frame[:16, :32] = 255
    return frame


def corner(frame):
    """Which corner is white: (bottom, right)."""
    height, width = frame.shape[:2]
    y, x = np.argwhere(frame.mean(2) > 128).mean(0)
    return bool(y > height / 2), bool(x > width / 2)


@pytest.mark.parametrize(
    ("rotation", "size", "expected"),
    [(0, (48, 80), (False, False)), (90, (80, 48), (True, False)), (180, (48, 80), (True, True)), (-90, (80, 48), (False, True))],
)
def test_video_comes_out_upright_when_players_should_turn_it(tmp_path, rotation, size, expected):
    media = read_media(write_video(tmp_path / "clip.mp4", 5, 1, draw=marked, rotation=rotation))
    assert media.frames.shape[1:3] == size
    assert {corner(frame) for frame in media.frames} == {expected}


def test_portrait_video_of_a_phone_comes_out_upright(tmp_path):
    path = write_video(tmp_path / "phone.mp4", 5, 1, draw=marked)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # ISO/IEC 14496-12: 4 bytes of name, 4 of version and flags, 36 of other fields
    assert struct.unpack(">9i", content[matrix : matrix + 36]) == (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    # What phones held upright write: x' = -y, y' = x, a quarter turn clockwise.
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    path.write_bytes(content)
    media = read_media(path)
    assert media.frames.shape[1:3] == (80, 48)
    assert {corner(frame) for frame in media.frames} == {(False, True)}


def test_video_is_refused_when_it_has_a_single_frame(tmp_path):
    with pytest.raises(MediaError, match=r"one.mp4: a video of 1 frames, expected 2 or more. Save a single frame as PNG"):
        read_media(write_video(tmp_path / "one.mp4", 1, 10))


def test_file_is_refused_when_it_holds_no_video(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(MediaError, match=r"sound.wav: no video in the file. Name a video or a picture"):
        read_media(tmp_path / "sound.wav")


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100])
@pytest.mark.parametrize("name", ["clip.mp4", "clip"])
def test_file_is_refused_when_it_is_not_readable_as_video(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=f"{name}: not a readable video .*. Convert it, e.g. to MP4"):
        read_media(tmp_path / name)


@pytest.mark.parametrize("name", ["gone.mp4", "gone.png", "gone"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(MediaError, match=f"{name}: no such file. Check the path"):
        read_media(tmp_path / name)


def test_damaged_end_of_a_video_costs_its_frames_only(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 60, 10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    numbers = [number(frame) for frame in read_media(path).frames]
    assert numbers == sampled(60, 10)[: len(numbers)]
    assert len(numbers) >= 2


PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", ["picture.png", "picture.PNG", "picture.jpg", "picture.JPEG"])
def test_picture_is_recognised_by_its_suffix(tmp_path, name):
    Image.fromarray(PICTURE).save(tmp_path / name, quality=100, subsampling=0)
    media = read_media(tmp_path / name)
    assert (media.modality, media.frames.shape, media.frames.dtype, media.names) == ("image", (1, 20, 30, 3), np.uint8, ["00000"])
    assert abs(media.frames[0].astype(int) - PICTURE).max() <= (8 if "J" in name.upper() else 0)


def test_picture_loses_its_alpha_and_keeps_its_colours(tmp_path):
    alpha = np.random.default_rng(1).integers(0, 256, (20, 30, 1)).astype(np.uint8)
    Image.fromarray(np.concatenate([PICTURE, alpha], 2)).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(read_image(tmp_path / "picture.png"), PICTURE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_turned_upright_as_opencv_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE).resize((300, 200)).save(tmp_path / "picture.jpg", exif=exif)
    expected = cv2.imread(str(tmp_path / "picture.jpg"))[..., ::-1]
    got = read_image(tmp_path / "picture.jpg")
    assert got.shape == ((300, 200, 3) if orientation > 4 else (200, 300, 3))
    assert abs(got.astype(int) - expected).max() <= 3  # two JPEG decoders


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_picture_becomes_three_equal_channels_of_8_bits(tmp_path, dtype):
    grey = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (20, 30)).astype(dtype)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), cv2.imread(str(tmp_path / "grey.png")))


def test_palette_picture_keeps_its_colours(tmp_path):
    picture = Image.fromarray(PICTURE).quantize(8)
    picture.save(tmp_path / "palette.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_picture_is_refused_when_it_is_not_readable(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(MediaError, match=r"bad.png: not a readable picture .*. Save it again as JPEG or PNG"):
        read_media(tmp_path / "bad.png")


def test_picture_is_refused_when_it_is_cut_off(tmp_path):
    Image.fromarray(PICTURE).resize((300, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    with pytest.raises(MediaError, match=r"cut.jpg: not a readable picture"):
        read_media(tmp_path / "cut.jpg")


def write_folder(path, *names, size=(20, 16)):
    path.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        Image.new("RGB", size, (index, 0, 0)).save(path / name)
    return path


def test_folder_gives_all_pictures_in_the_order_of_their_names(tmp_path):
    folder = write_folder(tmp_path / "frames", "b.png", "a.PNG", "c.png", "00012.png")
    (folder / "notes.txt").write_text("no picture")
    media = read_media(folder, sample_fps=0.1)
    assert [int(frame[0, 0, 0]) for frame in media.frames] == [3, 1, 0, 2]
    assert (media.names, media.modality, media.fps) == (["00012", "a", "b", "c"], "video", 1)


def test_folder_takes_as_many_frames_as_a_clip_may_have_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(_media, "MAX_FRAMES", 5)
    names = [f"{index:05d}.png" for index in range(5)]
    assert len(read_media(write_folder(tmp_path / "frames", *names)).frames) == 5
    write_folder(tmp_path / "frames", "one_more.png")
    with pytest.raises(MediaError, match=r"frames: 6 frames, expected at most 5. Take a part of them"):
        read_media(tmp_path / "frames")


def test_folder_is_refused_when_frames_differ_in_size(tmp_path):
    write_folder(tmp_path / "frames", "a.png", "b.png")
    write_folder(tmp_path / "frames", "c.png", size=(16, 20))
    with pytest.raises(MediaError, match=r"c.png: 16x20 px, but a.png differs. Resize the frames to one size"):
        read_media(tmp_path / "frames")


def test_folder_is_refused_when_it_holds_no_pictures(tmp_path):
    with pytest.raises(MediaError, match=r"no .jpg, .jpeg, .png files in the folder. Name a folder of frames"):
        read_media(tmp_path)


def test_folder_is_refused_when_one_frame_is_not_readable(tmp_path):
    write_folder(tmp_path / "frames", "a.png")
    (tmp_path / "frames" / "b.png").write_bytes(b"")
    with pytest.raises(MediaError, match=r"b.png: not a readable picture"):
        read_media(tmp_path / "frames")


@pytest.mark.skipif(not HORSE_JUMP.exists(), reason=f"no {HORSE_JUMP}")
def test_horse_jump_is_sampled_as_the_original_does(tmp_path):
    with av.open(str(HORSE_JUMP)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == 50
    clip = tmp_path / "no_suffix"  # everything that is not named as a picture is a video
    shutil.copyfile(HORSE_JUMP, clip)
    media = read_media(clip)
    np.testing.assert_array_equal(media.frames, np.stack(every)[[0, 10, 20, 30, 40]])
    assert media.fps == 1


# Frame by frame --------------------------------------------------------------------------------------------------------


def frames_of(source):
    """Every frame of a source, how many it said there are, and its rate."""
    with open_frames(str(source), timeout_s=5) as opened:
        return list(opened.frames), opened.total, opened.fps


def test_every_frame_of_a_video_comes_one_at_a_time(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 100, 12.5)
    frames, total, fps = frames_of(path)
    assert [number(frame) for frame in frames] == list(range(100))
    assert (total, fps) == (100, 12.5)
    with open_frames(str(path), timeout_s=5) as opened:
        assert number(next(opened.frames)) == 0  # and the rest is never decoded


def test_number_of_frames_is_none_where_the_file_does_not_say(tmp_path):
    frames, total, fps = frames_of(write_video(tmp_path / "clip.mkv", 30, 10))
    assert (len(frames), total, fps) == (30, None, 10)


def test_frames_of_a_video_come_out_upright(tmp_path):
    frames, *_ = frames_of(write_video(tmp_path / "clip.mp4", 5, 1, draw=marked, rotation=90))
    assert {(*frame.shape[:2], *corner(frame)) for frame in frames} == {(80, 48, True, False)}


def test_frames_of_a_folder_are_not_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(_media, "MAX_FRAMES", 5)
    folder = write_folder(tmp_path / "frames", *(f"{index:05d}.png" for index in range(6)))
    frames, total, fps = frames_of(folder)
    assert [int(frame[0, 0, 0]) for frame in frames] == list(range(6))
    assert (total, fps) == (6, _media.ASSUMED_FPS)


def test_picture_is_a_source_of_one_frame(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    (frame,), total, _ = frames_of(tmp_path / "picture.png")
    np.testing.assert_array_equal(frame, PICTURE)
    assert total == 1


def test_damaged_frames_end_a_source_with_an_error_that_names_it(tmp_path):
    folder = write_folder(tmp_path / "frames", "a.png", "b.png")
    (folder / "b.png").write_bytes(b"no picture")
    with open_frames(str(folder), timeout_s=5) as opened:
        assert next(opened.frames).shape == (16, 20, 3)
        with pytest.raises(MediaError, match=r"b.png: not a readable picture"):
            next(opened.frames)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.mp4", None, "gone.mp4: no such file"),
        ("gone.png", None, "gone.png: no such file"),
        ("bad.mp4", b"no video", "bad.mp4: not a readable video"),
        ("bad.png", b"no picture", "bad.png: not a readable picture"),
    ],
)
def test_source_that_is_not_readable_is_named(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=message):
        frames_of(tmp_path / name)


MASK = np.zeros((20, 30), bool)
MASK[3:9, 5:20] = True


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint16) * 300),
        Image.fromarray(MASK[..., None] * np.uint8([0, 0, 9])),
        Image.fromarray(np.concatenate([MASK[..., None] * np.uint8([0, 0, 9]), np.full((20, 30, 1), 255, np.uint8)], 2)),
        Image.merge("LA", (Image.fromarray(MASK.astype(np.uint8)), Image.new("L", (30, 20), 255))),
    ],
    ids=["one", "white", "bits", "16 bits", "colour", "opaque colour", "opaque grey"],
)
def test_mask_is_where_a_picture_is_not_zero(tmp_path, picture):
    picture.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK)


def test_mask_of_a_palette_picture_is_where_its_index_is_not_zero(tmp_path):
    picture = Image.fromarray(MASK.astype(np.uint8) * 2)
    picture.putpalette([200, 200, 200, 9, 9, 9, 0, 0, 0])  # as DAVIS does, but index 0 is not black
    picture.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), MASK)
