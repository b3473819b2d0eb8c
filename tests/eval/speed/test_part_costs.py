import numpy as np
import pytest
import torch
from torch import nn

from eval.speed.memory import measure_memory, measure_memory_by_part
from eval.speed.parts import PartsLatency, measure_parts, part_table, repeat_for
from eval.speed.worker import Session, about
from eval.speed.workers import Loader, Worker, WorkerError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder

CONFIG = {
    "channels": 8,
    "text_width": 16,
    "dim": 32,
    "heads": 2,
    "prelude": 1,
    "core": 1,
    "coda": 1,
    "iterations": 2,
    "ffn_ratio": 3.0,
    "mixer": "attention",
}
PARTED = Loader("measured_models:parted", {"mb": 20})


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """A small saved pipeline with a trained kind of text encoder."""
    folder, draws = tmp_path_factory.mktemp("model"), GeneratorConfig(**CONFIG)
    text = WordEncoder(Vocabulary(["red", "circle"], 6), draws.text_width, layers=1)
    model = initialise(TextToLatent(text, Generator(draws)), 0)
    options = {"levels": 1, "stages": 1, "channels": draws.channels, "width": 16, "decoder": "phone"}
    IrisPipeline(model, initialise(build_latent("wavelet_vae", **options), 0), "wavelet_vae", options, 128).save(folder)
    return Loader("eval.models.loading:load_for_measuring", {"folder": str(folder), "steps": 2})


@pytest.mark.long
def test_a_models_parts_are_timed_beside_the_whole(iris):
    results = measure_parts(iris, batches=(1, 3), rounds=2, warmup=0)
    assert list(results) == [1, 3]
    for batch, result in results.items():
        assert isinstance(result, PartsLatency) and result.batch == batch and result.whole.median_ms > 0
        assert {name: (part.count, part.within) for name, part in result.parts.items()} == {
            "text": (1, None),
            "generator": (2, None),
            "iteration": (4, "generator"),
            "mixer": (4, "iteration"),
            "decoder": (1, None),
        }
        for part in result.parts.values():
            assert part.latency.median_ms > 0 and part.latency.processor_ms > 0 and part.latency.n == 2
            assert part.repeat >= 1 and part.graph_ms is None and "graphs are CUDA's" in part.graph_why
        outer = [part for part in result.parts.values() if part.within is None]
        assert result.sum_ms == pytest.approx(sum(p.count * p.latency.median_ms for p in outer))
        assert result.covered == pytest.approx(result.sum_ms / result.whole.median_ms)
    table = part_table(list(results.values()))
    assert len(table) == 2 + 2 * 7 and "iteration (within generator)" in "\n".join(table)


def test_ratios_go_to_the_whole_of_the_same_batch():
    for result in measure_parts(PARTED, batches=(1, 2), rounds=3, warmup=0).values():
        assert result.whole.ratio_to_first == 1.0
        for part in result.parts.values():
            ratios = np.array(part.latency.times_ms) / result.whole.times_ms
            assert part.latency.ratio_to_first == pytest.approx(np.median(ratios))


def test_short_parts_are_timed_in_blocks(tmp_path):
    sleeping = Loader("measured_models:sleeping", {"ms": 5, "name": "a", "log": str(tmp_path / "log")})
    with Worker("sleeps", sleeping, 1, 60.0) as worker:
        assert 1 <= repeat_for(worker, None) <= 4  # of 5 ms at least, in a block of 20
        before = len((tmp_path / "log").read_text().split())
        assert worker.ask("time", repeat=3)["wall_ms"] >= 5
        assert len((tmp_path / "log").read_text().split()) == before + 3


def test_a_part_can_be_asked_for_by_name_only():
    with Worker("model", PARTED, 1, 60.0) as worker:
        with pytest.raises(WorkerError, match="part='encoder' is unknown; the model has fill, rest, half"):
            worker.ask("time", part="encoder")
        assert worker.ask("time", part="fill", repeat=2)["wall_ms"] > 0
    with pytest.raises(ValueError, match="names no parts"):
        measure_parts(Loader("measured_models:sleeping", {"ms": 1, "name": "a", "log": "/dev/null"}))


@pytest.mark.long
def test_memory_of_each_part_is_the_formulas():
    parts = measure_memory_by_part(PARTED)
    assert list(parts) == ["whole", "fill", "rest"]
    assert parts["whole"].activations_ratio is None and parts["whole"].memory.weights_mb == 2.0
    for name, megabytes in (("fill", 20), ("rest", 2)):
        assert parts[name].predicted_mb == megabytes
        assert parts[name].activations_ratio == pytest.approx(1, rel=1e-3)
    fill, rest = (parts[name].memory.peak_memory_mb - parts[name].memory.loaded_mb for name in ("fill", "rest"))
    assert fill - rest == pytest.approx(18, abs=3)  # both read in the same code of PyTorch, several MB
    with pytest.raises(ValueError, match="parts=.*encoder.* must be some of fill, rest, half"):
        measure_memory_by_part(PARTED, parts=["encoder"])


@pytest.mark.long
def test_a_generator_and_a_decoder_take_what_their_architecture_predicts(iris):
    parts = measure_memory_by_part(iris.given(batch=2), parts=["generator", "decoder"])
    for name in ("generator", "decoder"):
        assert parts[name].activations_ratio == pytest.approx(1, rel=0.06), name
    whole, alone = parts["whole"].memory, [parts[name].memory.weights_mb for name in ("generator", "decoder")]
    assert sum(alone) < whole.weights_mb and parts["generator"].weights_ratio > 0


@pytest.mark.long
def test_what_a_loader_imports_counts_as_the_runtimes():
    memory = measure_memory(Loader("measured_models:importing", 80))
    plain = measure_memory(Loader("measured_models:importing", 0))
    assert memory.import_mb - plain.import_mb == pytest.approx(80, abs=15)
    assert memory.loaded_mb - memory.import_mb < 10


def test_what_a_function_says_of_itself():
    def run():
        return None

    assert about(run) == {"weights_mb": None, "predicted_mb": None, "count": 1, "within": None}
    run.weights_bytes, run.activations_bytes, run.count, run.within = 3_000_000, 500_000, 7, "core"
    assert about(run) == {"weights_mb": 3.0, "predicted_mb": 0.5, "count": 7, "within": "core"}


@pytest.mark.parametrize("kwargs", [{"batches": ()}, {"batches": (0,)}, {"rounds": 1}, {"warmup": -1}])
def test_bad_settings(kwargs):
    with pytest.raises(ValueError, match="batches must be sizes"):
        measure_parts(PARTED, **kwargs)


def test_a_loader_without_an_object_takes_no_batch():
    with pytest.raises(ValueError, match="must be an object to take batch"):
        measure_parts(Loader("measured_models:allocating", 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and events need a CUDA device")
def test_a_graph_replays_what_was_captured_and_its_time_is_the_devices():
    model, x = nn.Linear(256, 256).cuda().requires_grad_(False), torch.randn(8, 256, device="cuda")

    def generate():
        return model(x)

    generate.device = "cuda"
    session = Session()
    session.generate, session.device = generate, "cuda"
    assert session.time(repeat=3)["wall_ms"] > 0
    assert session.graph(repeat=3)["graph_ms"] > 0

    def waits():
        return model(x).sum().item()

    waits.device, session.generate = "cuda", waits
    assert "cannot be captured" in session.graph()["why"]
