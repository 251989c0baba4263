import pytest
from click.testing import CliRunner

from benchmarks import components, peers, records
from ensemble.config import FULL, TINY

LENGTH = TINY.video_tokens + 20
TRACKING = {"track_frame_ms_p50": "ms", "track_frame_ms_p99": "ms", "frames_per_s": "1/s"}
LLM = {"prefill_ms": "ms", "decode_ms_per_token": "ms", "tokens_per_s": "1/s"}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Little of everything, and figures away from those of this repository."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(components, "PROMPT_TOKENS", LENGTH)
    for name, value in {"NEW_TOKENS": 4, "PASSES": 2, "WARM_UP": 2, "TRACK_FRAMES": 3}.items():
        monkeypatch.setattr(peers, name, value)
    return tmp_path


def measure(repository, *arguments):
    return CliRunner().invoke(peers.main, [str(repository), *arguments])


def measured():
    """(workload, metric) to (unit, number of samples, value)."""
    lines = records.latest(records.suite_path("peers", records.machine()["gpu"]))
    assert all(line["env"]["preset"] == "tiny" and line["env"]["precision"] == "float32" for line in lines.values())
    return {key: (line["unit"], line["n"], line["value"]) for key, line in lines.items()}


def keep_own(suite, workload, **env):
    """Figures of ours as they would be found, all of them 2."""
    kinds = {"frame_features": "onnx", "language_decoder": "torch"}
    env = {**records.machine(), "engine_kinds": kinds, "preset": "tiny", "precision": "float32", **env}
    for metric, unit in (TRACKING if suite == "serving" else LLM).items():
        records.append([records.record(suite, workload, metric, 2, unit, [2], env)])
    return env


def assert_ratios(figures, workload, metrics):
    for metric, unit in metrics.items():
        _, count, value = figures[workload, metric]
        faster = value / 2 if unit == "ms" else 2 / value
        assert figures[workload, f"{metric}.ratio"] == ("ratio", count, pytest.approx(faster, rel=1e-4)), metric


def test_uncached_pipeline_is_measured_token_by_token(repository):
    workload = f"batch_1_prompt_{LENGTH}"
    keep_own("llm", f"tiny_torch_float32_{workload}")
    run = measure(repository, "--only", "uncached")
    assert run.exit_code == 0, run.output
    figures = measured()
    assert set(figures) == {(f"uncached_{workload}", metric) for metric in ("decode_ms_per_token", "decode_ms_per_token.ratio")}
    assert figures[f"uncached_{workload}", "decode_ms_per_token"][:2] == ("ms", 5)
    assert_ratios(figures, f"uncached_{workload}", {"decode_ms_per_token": "ms"})


def test_official_predictor_is_measured_frame_by_frame(repository):
    pytest.importorskip("sam2", reason="the official sam2 is not installed")
    keep_own("serving", "track_3obj_480x854")
    run = measure(repository, "--only", "sam2")
    assert run.exit_code == 0, run.output
    figures = measured()
    for workload in ("sam2_eager_1obj_480x854", "sam2_eager_3obj_480x854"):
        for metric, unit in TRACKING.items():
            assert figures[workload, metric][:2] == (unit, 3)
            assert figures[workload, metric][2] > 0
    assert_ratios(figures, "sam2_eager_3obj_480x854", TRACKING)
    assert ("sam2_eager_1obj_480x854", "frames_per_s.ratio") not in figures
    assert "sam2_eager_1obj_480x854 frames_per_s: no ratio, for " in run.output


def test_official_predictor_has_the_sizes_of_its_own_configuration():
    pytest.importorskip("sam2", reason="the official sam2 is not installed")
    from hydra import compose
    from omegaconf import OmegaConf

    name = "configs/sam2/sam2_hiera_l.yaml"
    own, got = (OmegaConf.to_container(compose(name, overrides).model) for overrides in ([], peers.hydra_sizes(FULL.sam2)))
    own["memory_encoder"]["in_dim"] = own["memory_encoder"]["mask_downsampler"]["embed_dim"] = 256  # their defaults
    assert got == own


def test_transformers_is_measured_with_both_caches(repository):
    pytest.importorskip("transformers", reason="transformers is not installed")
    workload = f"batch_8_prompt_{LENGTH}"
    keep_own("llm", f"tiny_torch_float32_{workload}")
    run = measure(repository, "--only", "transformers")
    assert run.exit_code == 0, run.output
    figures = measured()
    for peer in (f"dynamic_batch_1_prompt_{LENGTH}", f"static_batch_1_prompt_{LENGTH}", f"static_{workload}"):
        for metric, unit in LLM.items():
            assert figures[f"transformers_{peer}", metric][:2] == (unit, 2 if metric == "prefill_ms" else 6)
            assert figures[f"transformers_{peer}", metric][2] > 0
    assert_ratios(figures, f"transformers_static_{workload}", LLM)


@pytest.mark.parametrize(
    ("other", "compared"),
    [({}, True), ({"preset": "nano"}, False), ({"precision": "float16"}, False), ({"engine_kinds": {"frame_features": "torch"}}, False)],
)
def test_ratio_is_to_a_figure_of_the_same_preset_precision_and_engine(repository, other, compared):
    ours = peers.Ours(TINY, components.engine_folders(repository, TINY))
    made = ours.made("frame_encoder")
    own = keep_own("serving", "track", **other)
    lines = [records.record("peers", "peer", "frames_per_s", 0.5, "1/s", [0.5], ours.env(made))]
    _, *ratios = peers.compared(lines, "serving", "track", made, "frame_features")
    assert [(line["metric"], line["value"]) for line in ratios] == [("frames_per_s.ratio", 4)] * compared
    for line in ratios:
        assert line["env"]["ours"] == {"suite": "serving", "workload": "track", "git": own["git"], "date": own["date"]}


def test_missing_package_is_said_and_costs_the_others_nothing(repository, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: None)
    run = measure(repository)
    assert run.exit_code == 0, run.output
    assert "sam2 objects=3: skipped, for sam2 is not installed." in run.output
    assert {workload for workload, _ in measured()} == {f"uncached_batch_1_prompt_{LENGTH}"}


def test_failing_peer_is_named_and_costs_the_others_nothing(repository, monkeypatch):
    def broken(ours, **options):
        raise RuntimeError("no luck")

    monkeypatch.setattr(peers, "tracked", broken)
    monkeypatch.setattr(peers, "RUNS", (("sam2", {"objects": 1}), ("uncached", {})))
    monkeypatch.setattr(peers, "installed", lambda package: "1.0")
    run = measure(repository)
    assert run.exit_code == 1
    assert "failed: sam2 objects=1." in run.output
    assert {workload for workload, _ in measured()} == {f"uncached_batch_1_prompt_{LENGTH}"}
