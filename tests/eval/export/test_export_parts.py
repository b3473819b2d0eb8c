"""What is exported: the parts compute what the pipeline does, and torch.export meets no complex number in them."""

import math

import pytest
import torch
from exported_models import DIM, small_mixer, small_pipeline

from eval.export.loop import LoopedGenerator, looped
from eval.export.parts import agreement, decoding_only, export_friendly, parts_of
from iris.diffusion.flow import integrate, time_grid
from iris.errors import SettingError
from iris.latents import build_latent
from iris.nn.depth import Depth
from iris.nn.mixers import MIXERS
from iris.nn.scan import linear_scan, sequential_scan
from iris.presets import create_iris_tiny


def nodes(program):
    return [
        node
        for part in program.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]


def test_the_parts_make_the_pipelines_image():
    pipeline = small_pipeline()
    parts = parts_of(pipeline, batch=2)
    captions = ["a red circle", "two stars"]
    noise = torch.randn(2, *parts["decoder"].inputs[0].shape[1:], generator=torch.Generator().manual_seed(1))
    expected = pipeline(captions, 3, guidance_scale=1, latents=noise, output_type="pt").images
    with torch.no_grad():
        text = parts["text"].module(pipeline.model.text.tokenise(captions))
        z = integrate(lambda z, t: parts["generator"].module(z, t.expand(2), *text), noise, time_grid(3))
        images = parts["decoder"].module(z)
    torch.testing.assert_close((images + 1) / 2, expected)


def test_shapes_and_names():
    parts = parts_of(small_pipeline(), batch=3, size=(8, 16), iterations=1)
    assert list(parts) == ["text", "generator", "decoder"]
    assert [tuple(x.shape) for x in parts["generator"].inputs] == [(3, 48, 2, 4), (3,), (3, 6, 12), (3, 6), (3, 12)]
    for part in parts.values():
        outputs = part.outputs()
        assert len(part.inputs) == len(part.input_names) and len(outputs) == len(part.output_names)
        assert all(len(y) == 3 and y.isfinite().all() for y in outputs)
    assert parts["decoder"].outputs()[0].shape == (3, 3, 8, 16)


def test_a_preset_has_no_text_encoder():
    parts = parts_of(create_iris_tiny(core=1, dim=32, heads=4), text_length=5, size=32)
    assert list(parts) == ["generator", "decoder"]
    assert parts["generator"].inputs[2].shape == (1, 5, 768)


def test_example_masks_hide_tokens():
    """Else agreement would say nothing of the mask."""
    mask = parts_of(small_pipeline(), batch=3)["generator"].inputs[3]
    assert 0 < mask.sum() < mask.numel()


def test_half_precision_between_float32_inputs_and_outputs():
    for part in parts_of(small_pipeline(), iterations=2).values():
        half = part.to(torch.float16)
        assert all(p.dtype == torch.float16 for p in half.module.parameters())
        for y, expected in zip(half.outputs(), part.outputs(), strict=True):
            assert y.dtype == expected.dtype
            assert (y.float() - expected.float()).norm() <= 5e-3 * expected.float().norm()
        assert all(p.dtype == torch.float32 for p in part.module.parameters()), "the part itself must not change"
        if sum(p.numel() for p in part.module.parameters()):
            assert half.size() < 0.6 * part.size()


def test_a_decoder_leaves_the_encoder_behind():
    latent = build_latent("wavelet_vae", width=8, channels=4)
    z = torch.randn(1, 4, 4, 4)
    decoder = decoding_only(latent, z)
    assert not any(name.startswith("encoder") for name, _ in decoder.named_parameters())
    assert {id(p) for p in decoder.parameters()} <= {id(p) for p in latent.parameters()}, "weights must be shared"
    torch.testing.assert_close(decoder.decode(z), latent.decode(z), rtol=0, atol=0)
    assert hasattr(latent, "encoder") and latent.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("name", MIXERS)
def test_no_mixer_exports_complex_numbers(name):
    mixer, x = small_mixer(name), torch.randn(1, 8, 8, DIM, generator=torch.Generator().manual_seed(1))
    with export_friendly():
        program = torch.export.export(mixer, (x,))
    made = [node.meta["val"] for node in nodes(program) if isinstance(node.meta.get("val"), torch.Tensor)]
    assert made and not any(value.is_complex() for value in made)
    torch.testing.assert_close(program.module()(x), mixer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["doubling", "chunked"])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 100])
def test_scans_are_the_recurrence(form, length):
    class Scan(torch.nn.Module):
        def forward(self, a, b):
            return linear_scan(a, b)

    draws = torch.Generator().manual_seed(length)
    a, b = torch.rand(2, length, 3, generator=draws), torch.randn(2, length, 3, generator=draws)
    with export_friendly(form):
        program = torch.export.export(Scan(), (a, b))
    torch.testing.assert_close(program.module()(a, b), sequential_scan(a, b))


def test_doubling_takes_logarithmically_many_operations():
    def count(form, length):
        class Scan(torch.nn.Module):
            def forward(self, a, b):
                return linear_scan(a, b)

        given = torch.rand(1, length, 2), torch.rand(1, length, 2)
        with export_friendly(form):
            return len(nodes(torch.export.export(Scan(), given)))

    step = count("doubling", 128) - count("doubling", 64)  # operations of one more doubling
    assert 0 < count("doubling", 1024) - count("doubling", 64) <= step * math.log2(1024 / 64)
    assert count("doubling", 1024) < count("chunked", 1024) / 3


def test_outside_the_context_the_default_form_is_back():
    from iris.nn import scan

    with pytest.raises(RuntimeError), export_friendly():
        assert scan._form == "doubling"
        raise RuntimeError
    assert scan._form == "chunked"


@pytest.mark.long
def test_a_looped_generator_shares_weights_and_result():
    part = parts_of(small_pipeline(iterations=3))["generator"]
    loop = looped(part)
    assert isinstance(loop.module.generator, LoopedGenerator)
    assert not isinstance(part.module.generator, LoopedGenerator), "the part itself must not change"
    with export_friendly(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        program = torch.export.export(loop.module, loop.inputs)
    assert sum(node.target is torch.ops.higher_order.scan for node in nodes(program)) == 1
    torch.testing.assert_close(program.module()(*part.inputs), part.outputs()[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"iterations": 1}, {"iterations": 2, "depth": Depth(share=False)}])
def test_passes_that_are_no_loop_stay(changes):
    part = parts_of(small_pipeline(mixer="identity", **changes))["generator"]
    assert looped(part) is part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch and text_length must be at least 1, got 0"),
        ({"size": 6}, "must be a multiple of the latent's factor 4"),
        ({"size": 0}, "size=0x0"),
    ],
)
def test_bad_arguments_name_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        parts_of(small_pipeline(mixer="identity"), **arguments)


def test_what_cannot_be_exported_is_said():
    with pytest.raises(SettingError, match="depth.carry=true"):
        parts_of(small_pipeline(mixer="identity", depth=Depth(carry=True)))
    with pytest.raises(SettingError, match="iterations=0"):
        parts_of(small_pipeline(mixer="identity"), iterations=0)
    with pytest.raises(SettingError, match="float16"):
        parts_of(small_pipeline(mixer="identity").to(torch.float16))
    with pytest.raises(SettingError, match="allowed: chunked, doubling"), export_friendly("loop"):
        pass


def test_agreement_is_the_worst_of_several_outputs():
    ones = torch.ones(2, 2)
    found = agreement([ones, torch.tensor([1.0, 5.0])], [ones, torch.tensor([3.0, 5.0])])
    assert found == {"rms": pytest.approx(2 / 34**0.5), "max": pytest.approx(0.4)}
    for broken in ([ones / 0], [ones]), ([ones], [ones * math.nan]):
        with pytest.raises(ValueError, match="output images must be finite"):
            agreement(*broken, "output images")


def test_the_models_of_these_tests_answer_with_something():
    """Zeros, which an untrained generator gives, would agree with zeros."""
    for part in parts_of(small_pipeline()).values():
        assert all(y.std() > 0.05 for y in part.outputs() if y.is_floating_point())
