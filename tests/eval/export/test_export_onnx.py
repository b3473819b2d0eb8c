"""Exported = eager: ONNX Runtime computes what PyTorch does, for every mixer and latent, on 16x16 and 32x32 tokens."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported_models import DIM, awake, small_mixer, small_pipeline

from eval.export.loop import looped
from eval.export.model import check_part, export_model
from eval.export.onnx import linear_layers, precise_weights, quantise, save, to_graph, walk
from eval.export.parts import DecoderPart, ExportPart, decoding_only, parts_of
from iris.latents import LATENTS, build_latent
from iris.nn.mixers import MIXERS

SIDES = (16, 32)
FP32 = 5e-5  # relative, root mean square and maximum; what is asked for is 1e-3
pytestmark = pytest.mark.long
LIMITS = {"fp32": FP32, "fp16": 5e-3, "int8": 5e-2}
LATENT_OPTIONS = {
    "pixel": [{}],
    "haar": [{}],
    "wavelet_vae": [{"width": 8, "channels": 4}, {"width": 8, "channels": 4, "decoder": "phone"}],
    "conv_vae": [{"width": 8, "channels": 4}, {"width": 8, "channels": 4, "front": "unshuffle"}],
    "pretrained": [{"source": "AutoencoderTiny"}, {"source": "AutoencoderKL"}],
}
AUTOENCODERS = {
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
        "latent_channels": 4,
    },
    "AutoencoderKL": {"block_out_channels": (8,), "latent_channels": 4, "norm_num_groups": 4},
}


def agreement(part, path):
    """How far ONNX Runtime is from PyTorch."""
    return check_part(path, {"methods": {"forward": part.signature()}}, part, "onnx")


def exported(part, folder, **options):
    """The part written as it is in float32, and how far ONNX Runtime is from PyTorch."""
    return agreement(part, save(to_graph(part, **options), Path(folder) / "part.onnx"))


def close(found, limit=FP32):
    return 0 < found["rms"] <= limit and found["max"] <= limit


def saved_autoencoder(kind, folder):
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(diffusers, kind)(**AUTOENCODERS[kind]).save_pretrained(folder)
    return str(folder)


def latent_part(name, options, side, folder):
    options = dict(options)
    if "source" in options:
        options["source"] = saved_autoencoder(options["source"], folder / options["source"])
    latent = awake(build_latent(name, **options))
    latent.mean.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    z = torch.randn(1, latent.channels, side, side, generator=torch.Generator().manual_seed(1))
    return ExportPart("decoder", DecoderPart(decoding_only(latent, z)).eval(), (z,), ("latents",), ("images",))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_agrees(name, side, tmp_path):
    x = torch.randn(1, side, side, DIM, generator=torch.Generator().manual_seed(1))
    part = ExportPart("mixer", small_mixer(name), (x,), ("x",), ("y",))
    assert part.outputs()[0].std() > 0.05
    found = exported(part, tmp_path)
    assert found == {"rms": 0, "max": 0} if name == "identity" else close(found)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in LATENTS for options in LATENT_OPTIONS[name]])
def test_every_decoder_agrees(name, options, side, tmp_path):
    part = latent_part(name, options, side, tmp_path)
    assert part.outputs()[0].std() > 0.05
    found = exported(part, tmp_path)
    assert max(found.values()) <= FP32  # rearranged numbers may be the very same


@pytest.mark.parametrize("name", MIXERS)
def test_a_generator_of_every_mixer_agrees(name, tmp_path):
    part = parts_of(small_pipeline(mixer=name, latent="pixel", latent_options={"patch": 2}), size=32, iterations=1)
    assert close(exported(part["generator"], tmp_path))


def test_a_looped_core_agrees_on_a_grid_of_blocks(tmp_path):
    """On 32x32 tokens, where the coda's attention is computed in blocks."""
    part = parts_of(small_pipeline(latent="pixel", latent_options={"patch": 2}), size=64, iterations=3)["generator"]
    path = save(to_graph(looped(part)), tmp_path / "loop.onnx")
    assert close(agreement(part, path))
    assert sum(node.op_type == "Scan" for node in onnx.load(path).graph.node) == 1


def test_the_text_encoder_agrees_and_passes_the_mask_on(tmp_path):
    part = parts_of(small_pipeline(), batch=2)["text"]
    assert close(exported(part, tmp_path))


def test_a_loop_does_not_grow_with_the_iterations(tmp_path):
    nodes = {}
    for iterations in (2, 6):
        part = parts_of(small_pipeline(mixer="identity"), iterations=iterations)["generator"]
        path = save(to_graph(looped(part)), tmp_path / f"{iterations}.onnx")
        nodes[iterations] = sum(1 for _ in walk(onnx.load(path).graph))
        assert close(agreement(part, path))
    assert nodes[6] - nodes[2] == 2 * 4  # a pass adds its constant signal and stacks it


def test_an_unrolled_core_keeps_its_weights_once(tmp_path):
    part = parts_of(small_pipeline(mixer="conv3"), iterations=2)["generator"]
    path = save(to_graph(part), tmp_path / "unrolled.onnx")
    assert close(agreement(part, path))
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    assert sum(array.nbytes for array in arrays) < 1.3 * part.size()


def test_a_scan_is_small_in_a_graph(tmp_path):
    x = torch.randn(1, 16, 16, DIM, generator=torch.Generator().manual_seed(1))
    part = ExportPart("mixer", small_mixer("recurrence"), (x,), ("x",), ("y",))
    counts = {}
    for scan in ("doubling", "chunked"):
        path = save(to_graph(part, scan), tmp_path / f"{scan}.onnx")
        assert close(agreement(part, path))
        counts[scan] = sum(1 for _ in walk(onnx.load(path).graph))
    assert counts["doubling"] < 150 < counts["chunked"] < 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One pipeline in all precisions, each in a folder, its parts, and pipeline.json by precision."""
    root = tmp_path_factory.mktemp("exported")
    pipeline = small_pipeline(latent="wavelet_vae", latent_options={"width": 8, "channels": 4})
    about = {dtype: export_model(pipeline, root / dtype, "onnx", dtype, batch=1) for dtype in LIMITS}
    return root, parts_of(pipeline), about


@pytest.mark.xdist_group("exported_onnx")
def test_each_dtype_agrees_as_well_as_it_can(folder):
    rms = {}
    for dtype, about in folder[2].items():
        for part, entry in about["parts"].items():
            rms[part, dtype] = entry["agreement"]["rms"]
            assert rms[part, dtype] <= LIMITS[dtype] and entry["agreement"]["max"] <= 2 * LIMITS[dtype], entry
            assert entry["opset"]["ai.onnx"] == 20 and entry["nodes"] > 0
    for part in ("text", "generator"):
        assert rms[part, "fp32"] < rms[part, "fp16"] < rms[part, "int8"], (
            "a dtype that changes nothing was not exported"
        )


@pytest.mark.xdist_group("exported_onnx")
def test_smaller_numbers_make_smaller_files(folder):
    weights = {dtype: (folder[0] / dtype / "generator.onnx.data").stat().st_size for dtype in LIMITS}
    assert weights["fp16"] < 0.65 * weights["fp32"] and weights["int8"] < weights["fp32"]


@pytest.mark.xdist_group("exported_onnx")
def test_only_linear_layers_are_quantised(folder):
    folder, parts, about = folder
    part, products = parts["generator"], about["int8"]["parts"]["generator"]["products"]
    linear = [module for module in part.module.modules() if isinstance(module, torch.nn.Linear)]
    model = onnx.load(folder / "fp32" / "generator.onnx")
    # The injection is a linear layer too; the two that say which pass it is are computed at export.
    assert len(linear_layers(model)) == len(linear) + 1 - 2
    # injection, input and output keep their precision
    assert len(precise_weights(part)) == 3
    assert products["MatMulInteger"] == len(linear_layers(model, precise_weights(part))) == len(linear) + 1 - 2 - 3
    kept = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(folder / "int8" / "generator.onnx").graph.initializer
    }
    gate = part.module.generator.core[0].mixer.pathways["recurrence"].lru.recurrence_gate.weight
    assert any(np.array_equal(value, gate.detach().numpy()) for value in kept.values()), "gates must stay float32"
    dft = [value for value in kept.values() if value.shape == (8, 8) and value.dtype == np.float32]
    assert dft, "the Fourier transform's matrices must stay float32"
    assert any(value.dtype == np.uint8 and value.ndim == 2 for value in kept.values())


@pytest.mark.xdist_group("exported_onnx")
def test_precise_weights_pay(folder, tmp_path):
    """Input, injection and output in 8 bits as well make the result worse."""
    folder, parts, about = folder
    careful = about["int8"]["parts"]["generator"]["agreement"]["rms"]
    whole = agreement(parts["generator"], quantise(folder / "fp32" / "generator.onnx", tmp_path / "whole.onnx"))
    assert careful < whole["rms"]


def test_agreement_sees_a_difference(tmp_path):
    """The check can fail: a file of other weights does not agree."""
    x = torch.randn(1, 4, 4, DIM, generator=torch.Generator().manual_seed(1))
    path = save(to_graph(ExportPart("mixer", small_mixer("conv3"), (x,), ("x",), ("y",))), tmp_path / "part.onnx")
    other = ExportPart("mixer", awake(small_mixer("conv3"), seed=1), (x,), ("x",), ("y",))
    assert agreement(other, path)["rms"] > 0.1
