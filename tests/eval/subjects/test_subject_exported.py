"""An exported model is measured like any other: the same images from the same noise, in each runtime."""

import shutil
import subprocess
import sys

import pytest
import torch
from evaluations import SHIPPED
from exported_models import CAPTIONS, small_generator, small_pipeline

from eval.__main__ import main
from eval.compare import loader_of
from eval.export.model import export_model
from eval.results import read_results
from eval.speed.workers import Worker
from eval.subjects import Sample, open_subject
from iris.errors import SettingError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.pipeline import IrisPipeline
from iris.text import ClassLabels

pytestmark = pytest.mark.xdist_group("subject_exported")  # one worker: what the module's fixtures make is shared

LARGEST = {"onnx": 1, "executorch": 2}  # difference of a pixel, in 1/255; XNNPACK computes another form of GELU
SAMPLES = [
    {},
    {"sampler": "stochastic", "steps": 3, "guidance": 1.0},
    {"sampler": "heun", "steps": 2, "guidance": 4.0, "guidance_end": 0.9, "guidance_rescale": 0.5, "shift": 2.0},
]


def opened(place, dtype="float32", device="cpu", **sample):
    return open_subject(str(place), None, Sample(**{"batch": 4} | sample), dtype, device)


@pytest.fixture(scope="module")
def pytorch(tmp_path_factory):
    """A saved pipeline."""
    folder = tmp_path_factory.mktemp("small") / "pytorch"
    small_pipeline(mixer="identity").save(folder)
    return folder


@pytest.fixture(scope="module")
def onnx(pytorch):
    """The folder that it is exported to, two images at a time."""
    pytest.importorskip("onnxruntime")
    export_model(pytorch, pytorch.with_name("onnx"), "onnx", "fp32", batch=2)
    return pytorch.with_name("onnx")


@pytest.fixture(scope="module")
def executorch(pytorch):
    """The same for ExecuTorch."""
    if not shutil.which("c++"):
        pytest.skip("ExecuTorch's C++ runtime needs a compiler")
    pytest.importorskip("executorch")
    export_model(pytorch, pytorch.with_name("executorch"), "executorch", "fp32", batch=2)
    return pytorch.with_name("executorch")


@pytest.fixture
def exported_to(request, runtime):
    """The folder of a runtime."""
    return request.getfixturevalue(runtime)


@pytest.mark.long
@pytest.mark.parametrize("runtime", LARGEST)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_arms_of_a_runtime_are_paired(pytorch, exported_to, runtime, sample):
    """Image i is PyTorch's, from wherever it is counted."""
    plain, exported = opened(pytorch, **sample), opened(exported_to, **sample)
    expected, found = plain.generate(CAPTIONS[:3], 5, 7).int(), exported.generate(CAPTIONS[:3], 5, 7).int()
    assert found.shape == expected.shape == (3, 16, 16, 3) and (found - expected).abs().max() <= LARGEST[runtime]
    assert torch.equal(exported.generate(CAPTIONS[1:3], 5, 8).int(), found[1:])
    assert (exported.generate(CAPTIONS[:3], 6, 7).int() - found).abs().max() > 20, "the seed must matter"
    assert exported.sampling == plain.sampling | {"iterations": 2} and exported.fingerprint != plain.fingerprint
    assert (exported.kind, exported.size, exported.facts()["nfe"]) == ("exported", plain.size, plain.facts()["nfe"])


@pytest.mark.long
def test_iterations_are_free_where_the_host_runs_the_loop(pytorch, onnx, executorch):
    expected = opened(pytorch, iterations=5).generate(CAPTIONS[:2], 0, 0).int()
    found = opened(executorch, iterations=5).generate(CAPTIONS[:2], 0, 0).int()
    assert (found - expected).abs().max() <= LARGEST["executorch"]
    assert opened(executorch).fingerprint != opened(onnx).fingerprint
    with pytest.raises(SettingError, match=r"sample.iterations=5: .* exported with 2, which its onnx file fixes"):
        opened(onnx, iterations=5)


def test_what_the_files_fix_is_refused(onnx):
    with pytest.raises(SettingError, match="sample.height means nothing for kind=exported; its settings: sample.steps"):
        opened(onnx, height=16)
    with pytest.raises(SettingError, match="dtype=bfloat16: .* was exported in fp32, which its files fix"):
        opened(onnx, dtype="bfloat16")
    with pytest.raises(SettingError, match="device=cuda: .* allowed: cpu"):
        opened(onnx, device="cuda")
    with pytest.raises(SettingError, match="sample.sampler='ddim'"):
        opened(onnx, sampler="ddim")


def test_its_files_determine_the_images(onnx, tmp_path):
    exported = opened(onnx)
    facts = exported.facts()
    assert facts["parameters"]["generator"] == sum(
        p.numel() for p in small_generator(48, mixer="identity").parameters()
    )
    assert all(size > 0 for size in facts["bytes"].values())
    copy = shutil.copytree(onnx, tmp_path / "copy")
    assert opened(copy).fingerprint == exported.fingerprint
    weights = copy / "generator.onnx.data"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert opened(copy).fingerprint != exported.fingerprint


def test_classes_are_its_captions(tmp_path):
    latent = build_latent("haar")
    model = TextToLatent(ClassLabels(CAPTIONS, 12), small_generator(latent.channels, mixer="identity", iterations=1))
    export_model(IrisPipeline(model, latent, "haar", {}, 16), tmp_path, "onnx", "fp32", batch=1)
    exported = opened(tmp_path)
    exported.check([exported.example(), *CAPTIONS])
    with pytest.raises(SettingError, match="'a dog' is not one of the 4 classes"):
        exported.check(["a dog"])


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("executorch", marks=pytest.mark.long)])
def test_speed_is_measured_without_pytorch(exported_to, runtime):
    loader = opened(exported_to, steps=2, sampler="heun").loader("a red circle")
    code = (
        f"import sys; from eval.export.measuring import load_for_measuring as load\ngenerate = load({loader.argument})\n"
        "assert generate().shape == (1, 16, 16, 3) and generate.parts['generator'].count == 6\n"
        "for part in generate.parts.values(): part()\n"
        "assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model in half precision."""
    folder = tmp_path_factory.mktemp("shipped") / "exported"
    export_model(SHIPPED, folder, "onnx", "fp16", batch=16)
    return folder


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning")
def test_its_quality_is_that_of_the_model_itself(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for model in (shipped, SHIPPED):
        assert main([f"model={model}", "measure=smoke", "track=none", f"out={model.name}"]) == 0
        found.append(read_results(model.name))
    exported, plain = found
    assert (exported.model["kind"], exported.model["dtype"]) == ("exported", "float16")
    assert exported.notes == [*plain.notes, exported.notes[-1]] and "exported to onnx in fp16" in exported.notes[-1]
    assert set(exported.numbers) == set(plain.numbers)
    for name, number in plain.numbers.items():
        assert exported.numbers[name].value == pytest.approx(number.value, rel=0.1, abs=0.05), name
    assert any(exported.numbers[name].value != number.value for name, number in plain.numbers.items())


@pytest.mark.long
def test_its_speed_memory_and_caps_are_measured(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["measure=smoke", "measure.what=latency,memory,caps", "track=none", "sample.steps=1", "out=speed"]
    assert main([f"model={shipped}", *words]) == 0
    results = read_results("speed")
    assert {"latency_ms/batch_1", "latency_ms/batch_1/generator", "peak_memory_mb/text", "weights_mb/decoder"} <= set(
        results.numbers
    )
    weights = sum(file.stat().st_size for file in shipped.glob("*.onnx*")) / 1e6
    assert results.numbers["weights_mb"].value == pytest.approx(weights)
    assert any(run["held"] for run in results.details["caps"]["runs"])
    assert {one["name"]: one["verdict"] for one in results.details["targets"]}["latency"] == "needs the device"
    with Worker("again", loader_of(results), 1, 60) as worker:
        assert worker.loaded["weights_mb"] == pytest.approx(weights)
