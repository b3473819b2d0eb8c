"""The folder of an exported model: what it says, what becomes of a killed export, what is refused."""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict

import pytest
from exported_models import CAPTIONS, awake, small_pipeline

import eval.export.onnx as writer
from eval.export import PARTS, PIPELINE, RUNTIMES, Runtime
from eval.export.host.pipeline import ExportedPipeline
from eval.export.model import export_model
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.nn.depth import Depth


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small pipeline, exported for two images at a time, and the folder."""
    folder = tmp_path_factory.mktemp("exported")
    pipeline = small_pipeline(mixer="identity")
    export_model(pipeline, folder, "onnx", "fp32", batch=2)
    return pipeline, folder


@pytest.fixture
def copy(whole, tmp_path):
    """The pipeline and a copy of the folder."""
    return whole[0], shutil.copytree(whole[1], tmp_path / "copy")


@pytest.fixture
def written(monkeypatch):
    """Names of the parts that are written from here on."""
    names, write = [], writer.write_part

    def noted(part, precision, folder):
        names.append(part.name)
        return write(part, precision, folder)

    monkeypatch.setattr(writer, "write_part", noted)
    return names


def again(pipeline, folder, dtype="fp32", **changes):
    return export_model(pipeline, folder, "onnx", dtype, **{"batch": 2} | changes)


def test_pipeline_json_says_what_the_folder_is(whole):
    about, folder = read_json(whole[1] / PIPELINE), whole[1]
    expected = {"runtime": "onnx", "dtype": "fp32", "batch": 2, "latent": [48, 4, 4], "size": [16, 16], "iterations": 2}
    assert expected.items() <= about.items() and about["sampling"] == {}
    assert about["text"]["words"] == whole[0].model.text.to_dict()["words"]
    assert set(about["versions"]) == {"torch", "onnx", "onnxruntime"} and len(about["source"]["fingerprint"]) == 12
    assert tuple(about["parts"]) == PARTS
    for name, entry in about["parts"].items():
        method = entry["methods"]["forward"]
        assert entry["file"] in entry["files"] and all(shape["shape"][0] == 2 for shape in method["outputs"].values())
        assert entry["agreement"]["rms"] < 1e-4
        for file, facts in entry["files"].items():
            data = (folder / file).read_bytes()
            assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, name
    named = {PIPELINE, *(file for entry in about["parts"].values() for file in entry["files"])}
    assert {file.name for file in folder.iterdir()} == named, "nothing may be left behind"
    generator = whole[0].model.generator
    assert about["parts"]["generator"]["parameters"] == sum(p.numel() for p in generator.parameters())


def test_the_same_again_writes_nothing(copy, written):
    before = read_json(copy[1] / PIPELINE)
    assert again(*copy) == before == read_json(copy[1] / PIPELINE)
    assert written == []


def test_a_damaged_part_is_written_again(copy, written):
    pipeline, folder = copy
    (folder / "decoder.onnx").unlink()
    again(pipeline, folder)
    assert written == ["decoder"] and ExportedPipeline(folder).about["parts"].keys() == set(PARTS)


@pytest.mark.long
def test_a_killed_export_is_not_whole_and_goes_on(tmp_path, monkeypatch):
    pipeline, write = small_pipeline(mixer="identity", iterations=1), writer.write_part

    def killed(part, precision, folder):
        entry = write(part, precision, folder)
        if part.name == "generator":
            raise KeyboardInterrupt
        return entry

    monkeypatch.setattr(writer, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        again(pipeline, tmp_path)
    with pytest.raises(SettingError, match=r"was not finished \(generator, decoder\)"):
        ExportedPipeline(tmp_path)
    names = []
    monkeypatch.setattr(writer, "write_part", lambda part, *rest: names.append(part.name) or write(part, *rest))
    again(pipeline, tmp_path)
    assert names == ["generator", "decoder"] and ExportedPipeline(tmp_path)(CAPTIONS[:1]).shape == (1, 16, 16, 3)
    assert not (tmp_path / ".partial").exists()


@pytest.mark.long
def test_what_depends_on_a_change_is_written_anew(copy, written):
    pipeline, folder = copy
    first = again(pipeline, folder, iterations=1)["source"]
    assert written == ["generator"]
    changed = small_pipeline(mixer="identity")
    awake(changed.model.text, seed=1)
    assert again(changed, folder, iterations=1)["source"] != first
    assert written == ["generator", "text"]
    again(changed, folder, "fp16", iterations=1)
    assert written[2:] == ["text", "generator", "decoder"]


def test_files_of_another_runtime_go(copy):
    pipeline, folder = copy
    about = read_json(folder / PIPELINE)
    about["parts"]["decoder"] |= {"files": {"decoder.pte": {"bytes": 1}}, "key": "another"}
    (folder / "decoder.pte").write_bytes(b"x")
    write_json(folder / PIPELINE, about)
    again(pipeline, folder)
    assert not (folder / "decoder.pte").exists() and (folder / "decoder.onnx").exists()


def test_a_saved_models_sampling_is_the_default(whole, tmp_path):
    pipeline, folder = whole
    pipeline.save(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "config.json")
    chosen = asdict(SamplingSettings(2, guidance=1.5))
    write_json(tmp_path / "saved" / "config.json", config | {"sampling": chosen})
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = again(tmp_path / "saved", copy)
    assert about["sampling"] == {name: value for name, value in chosen.items() if value is not None}
    assert about["source"] == read_json(folder / PIPELINE)["source"], "the weights are the same"
    sampling = ExportedPipeline(copy).sampling(guidance=2.0)
    assert (sampling.steps, sampling.guidance, sampling.iterations) == (2, 2.0, 2)
    write_json(tmp_path / "saved" / "config.json", config | {"sampling": chosen | {"iterations": 1}})
    assert again(tmp_path / "saved", copy)["iterations"] == 1 and ExportedPipeline(copy).sampling().iterations == 1
    assert again(tmp_path / "saved", copy, iterations=2)["iterations"] == 2


def test_damaged_folders_are_named(copy):
    _, folder = copy
    (folder / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(SettingError, match="decoder.onnx missing, or of another size; export it again"):
        ExportedPipeline(folder)
    about = read_json(folder / PIPELINE)
    about["parts"]["decoder"]["files"]["decoder.onnx"]["bytes"] = len(b"not a graph")
    write_json(folder / PIPELINE, about)
    with pytest.raises(SettingError, match="decoder.onnx cannot be loaded"):
        ExportedPipeline(folder).load("decoder")
    (folder / PIPELINE).write_text(json.dumps([]))
    with pytest.raises(SettingError, match="pipeline.json is not what export_model writes"):
        ExportedPipeline(folder)


@pytest.mark.parametrize(
    ("runtime", "dtype", "message"),
    [
        ("tflite", "fp32", "runtime.name='tflite' is unknown; allowed: pytorch, onnx, executorch"),
        ("onnx", "int4", "runtime.precision='int4' is unknown .did you mean int8.*; allowed: fp32, bf16, fp16, int8"),
        ("onnx", "bf16", "runtime.precision=bf16 needs runtime.name=pytorch; runtime.name=onnx has fp32, fp16, int8"),
        ("pytorch", "int8", "runtime.precision=int8 needs runtime.name=onnx or executorch; runtime.name=pytorch has"),
        ("pytorch", "fp16", "runtime.name=pytorch runs models as they are saved; exported are onnx, executorch"),
    ],
)
def test_what_does_not_exist_is_said_before_anything_is_written(tmp_path, runtime, dtype, message):
    with pytest.raises(SettingError, match=message):
        export_model(tmp_path / "no model", tmp_path / "new", runtime, dtype, batch=1)
    assert not (tmp_path / "new").exists()


def test_a_runtime_that_is_not_installed_is_said(tmp_path, monkeypatch):
    for runtime, package in (("onnx", "onnx"), ("executorch", "executorch")):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"eval.export.{runtime}", raising=False)
        with pytest.raises(SettingError, match=f"runtime.name={runtime} needs {package}.*uv sync --extra"):
            export_model(tmp_path / "no model", tmp_path / "new", runtime, "fp32", batch=1)


def test_runtimes_are_checked_by_themselves():
    assert all(Runtime(name, one) for name, precisions in RUNTIMES.items() for one in precisions)


def test_what_cannot_be_exported_leaves_no_folder(tmp_path):
    with pytest.raises(SettingError, match="depth.carry=true"):
        again(small_pipeline(mixer="identity", depth=Depth(carry=True)), tmp_path / "new")
    with pytest.raises(ValueError, match="batch"):
        again(small_pipeline(mixer="identity"), tmp_path / "new", batch=0)
    assert not (tmp_path / "new").exists()
