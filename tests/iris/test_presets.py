"""The sizes of IRIS: parameters, what ``generate`` takes and refuses, the memory ledger."""

import pytest
import torch
from small_models import CAPTIONS, wake

import iris
from eval.models.ledger import DOCUMENT, MIB, memory_ledger, total
from iris.errors import SettingError
from iris.nn.depth import Depth
from iris.pipeline import IrisPipeline
from iris.presets import PRESETS
from iris.text import Vocabulary, WordEncoder

DOCUMENTED = {"tiny": 19e6, "small": 47e6, "base": 135e6}
EXACT = {"tiny": 19_123_492, "small": 46_521_904, "base": 133_140_440}
CLIP_PARAMETERS = 123_060_480


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name, **changes):
    """A preset without weights."""
    with torch.device("meta"):
        return PRESETS[name](**changes)


def small_preset(**changes):
    """Tiny's code at a size for tests: 16 pixels, text 12 wide."""
    shape = {
        "dim": 16,
        "heads": 2,
        "core": 1,
        "prelude": 1,
        "coda": 1,
        "iterations": 2,
        "text_width": 12,
        "channels": 12,
        "size": 16,
        "latent": "haar",
        "latent_options": {"levels": 1},
    }
    return wake(iris.create_iris_tiny(**shape | changes))


def tokens(batch=2, length=5, width=12, seed=0):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name):
    model = on_meta(name)
    assert count(model.generator) == EXACT[name]
    assert abs(count(model.generator) / DOCUMENTED[name] - 1) < 0.03
    assert f"{EXACT[name]:,}" in PRESETS[name].__doc__
    assert model.generator.config.mixer == "grfm" and model.generator.config.text_width == 768
    assert model.latent.grid(256, 256) == (16, 16) and model.latent.channels == 16
    assert count(model.latent.decoder) <= 1_500_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_makes_an_image_of_256_pixels(dtype):
    model = wake(iris.create_iris_tiny(), std=0.02).to(dtype)
    images = model.generate(tokens(1, 77, 768), num_steps=1, num_iterations=2)
    assert images.shape == (1, 3, 256, 256) and images.dtype == dtype
    assert images.isfinite().all() and images.abs().max() <= 1 and images.float().std() > 0.01


@pytest.mark.parametrize("mixer", ["attention", "fourier", "recurrence", "spatial", "conv7", "grfm[fourier,spatial]"])
def test_overrides(mixer):
    model = on_meta("tiny", mixer=mixer, iterations=7, depth=Depth(carry=True))  # five heads suit every mixer
    config = model.generator.config
    assert (config.mixer, config.iterations, config.depth.carry, config.dim) == (mixer, 7, True, 320)


def test_weights_come_from_the_seed():
    first, again, other = (small_preset(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class TestGenerate:
    def test_as_the_document_calls_it(self):
        model = small_preset()
        arguments = {"num_steps": 4, "num_iterations": 4}
        images = model.generate(tokens(), **arguments)
        assert images.shape == (2, 3, 16, 16) and images.abs().max() <= 1
        assert torch.equal(model.generate(tokens(), **arguments), images)
        for changes in (
            {"num_steps": 3},
            {"num_iterations": 3},
            {"seed": 1},
            {"sampler": "heun"},
            {"pooled": tokens()[:, 0]},
        ):
            assert not torch.equal(model.generate(tokens(), **arguments | changes), images), changes
        assert torch.equal(model.generate(tokens(), 4, 4, pooled=tokens().mean(1)), images)

    def test_guidance(self):
        model = small_preset()
        plain, null = model.generate(tokens()), tokens(1, seed=1)
        guided = model.generate(tokens(), guidance_scale=3.0, null_tokens=null)
        assert (guided - plain).abs().max() > 0.01
        alone = model.generate(tokens(), guidance_scale=0.0, null_tokens=null)
        torch.testing.assert_close(alone, model.generate(null.expand(2, -1, -1)), rtol=1e-3, atol=1e-3)
        assert torch.equal(model.generate(tokens(), null_tokens=null), plain)

    def test_sizes_and_generators(self):
        model = small_preset()
        assert model.generate(tokens(1), height=8, width=24).shape == (1, 3, 8, 24)
        drawn = [
            model.generate(tokens(1), generator=torch.Generator().manual_seed(seed), sampler="stochastic")
            for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"text_tokens": tokens(width=16)}, r"text_tokens must be \[2, L, 12\], got \[2, 5, 16\]"),
            ({"text_tokens": tokens()[0]}, "text_tokens must be"),
            ({"pooled": tokens(width=16)[:, 0]}, "pooled of text_tokens"),
            ({"num_iterations": 0}, "iterations=0"),
            ({"num_steps": 0}, "steps=0"),
            ({"height": 15}, "15x16 must be a multiple"),
            ({"sampler": "ddim"}, "ddim"),
            ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs"),
            ({"guidance_scale": 2.0, "null_tokens": tokens(3)}, r"null_tokens must be \[2, L, 12\]"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, arguments, named):
        with pytest.raises(SettingError, match=named):
            small_preset().generate(**{"text_tokens": tokens()} | arguments)

    def test_behind_a_text_encoder(self):
        model = small_preset()
        encoder = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), 12)
        torch.nn.init.normal_(encoder.position.weight)
        pipe = IrisPipeline.from_model(model, encoder)
        text = encoder(encoder.tokenise(CAPTIONS[:1]))
        assert text.mask.sum() == 4
        images = pipe(CAPTIONS[0], 3, guidance_scale=1.0, output_type="pt").images
        assert images.shape == (1, 3, 16, 16) and pipe.size == 16
        with pytest.raises(SettingError, match="model.text_width=12 must be the text encoder's width, 8"):
            IrisPipeline.from_model(model, WordEncoder(Vocabulary(["a"], 3), 8))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"telepathy": 1}, "'telepathy' is unknown; allowed: .*mixer.*latent_options"),
        ({"iterations": 0}, "iterations=0"),
        ({"dim": 321}, "dim=321"),
        ({"mixer": "telepathy"}, "telepathy"),
        ({"depth": {"carry": True}}, "depth=.*iris.nn.depth.Depth"),
        ({"channels": 8}, "channels=8 must be 16"),
        ({"size": 100}, "100x100 must be a multiple"),
        ({"latent": "x"}, "latent.name='x'"),
    ],
)
def test_presets_refuse(changes, named):
    with pytest.raises(SettingError, match=named):
        on_meta("tiny", **changes)


class TestLedger:
    @pytest.mark.parametrize("name", PRESETS)
    def test_parts_and_totals(self, name):
        model = on_meta(name)
        rows = {row.part: row for row in memory_ledger(model, "ViT-L/14", activations=20 * MIB)}
        assert list(rows) == ["text encoder", "generator", "decoder", "encoder", "activations"]
        assert rows["text encoder"].parameters == CLIP_PARAMETERS
        assert rows["text encoder"].mib == pytest.approx(234.7, abs=0.05)
        assert rows["generator"].bytes == 2 * EXACT[name] and rows["activations"].parameters is None
        assert rows["decoder"].parameters + rows["encoder"].parameters == count(model.latent)
        assert rows["decoder"].parameters == count(model.latent.decoder)
        with_text = total(list(rows.values()))
        assert with_text == 2 * (CLIP_PARAMETERS + EXACT[name] + count(model.latent.decoder)) + 20 * MIB
        assert with_text - total(list(rows.values()), resident=False) == 2 * CLIP_PARAMETERS

    def test_precisions(self):
        rows = memory_ledger(on_meta("tiny"), "ViT-L/14", text_dtype=torch.float32)
        assert rows[0].mib == pytest.approx(469.4, abs=0.05) and rows[1].bytes == 2 * EXACT["tiny"]
        assert memory_ledger(on_meta("tiny"), dtype=torch.float32)[0].bytes == 4 * EXACT["tiny"]

    def test_the_documents_totals_leave_one_constant_in_mib(self):
        rest = [DOCUMENT[name] - 2 * DOCUMENTED[name] / MIB for name in PRESETS]
        assert max(rest) - min(rest) < 7 and min(rest) > 502

    def test_a_latent_without_weights(self):
        rows = memory_ledger(small_preset())
        assert [row.bytes for row in rows[1:]] == [0, 0]

    def test_another_text_encoder_is_refused(self):
        with pytest.raises(SettingError, match="text_encoder='T5'.*ViT-L/14"):
            memory_ledger(on_meta("tiny"), "T5")
