"""The generator: identity at the start, any grid, any number of passes, and what it refuses."""

import json

import pytest
import torch
from small_models import CHANNELS, DIM, TEXT_WIDTH, small_config, small_generator, small_text

from iris.errors import SettingError
from iris.nn.blocks import ConvBlock
from iris.nn.gates import record_gates
from iris.nn.generator import GeneratorConfig
from iris.nn.layers import LocalAttention, ScalarEmbedding
from iris.nn.mixers import MIXERS
from iris.randomness import initialise

T = torch.tensor([0.2, 0.7])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(batch=2, h=4, w=4, seed=0):
    return draw(batch, CHANNELS, h, w, seed=seed)


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_output_is_zero_at_the_start(mixer):
    asleep, awake = (small_generator(awake=awake, mixer=mixer) for awake in (False, True))
    assert torch.equal(asleep(latents(), T, small_text(2)), torch.zeros(2, CHANNELS, 4, 4))
    assert awake(latents(), T, small_text(2)).std() > 0.01


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_the_loop_with_zero_gates_leaves_its_input(iterations):
    given, condition, text = draw(2, 3, 5, DIM), draw(2, DIM), small_text(2)
    asleep, awake = (small_generator(awake=awake, core=2) for awake in (False, True))
    torch.testing.assert_close(asleep.loop(given, given, condition, text, iterations)[0], given, rtol=0, atol=1e-6)
    assert (awake.loop(given, given, condition, text, iterations)[0] - given).abs().max() > 0.1


def test_the_loop_is_its_passes_written_out():
    model, given, condition, text = small_generator(core=2), draw(2, 3, 5, DIM), draw(2, DIM), small_text(2)
    state = given
    for k in (1, 2, 3):
        state = model.injection(state, given)
        seen = condition + model.iteration(torch.tensor([k / 3]))
        for layer in model.core:
            state = layer(state, seen, layer.cross.prepare(model.text_norm(text.tokens)), text.mask)
    torch.testing.assert_close(model.loop(given, given, condition, text, 3)[0], state, rtol=1e-4, atol=1e-4)


def test_iterations_default_to_the_configured_and_matter():
    model = small_generator(iterations=3)
    z, text = latents(), small_text(2)
    assert torch.equal(model(z, T, text), model(z, T, text, 3))
    assert (model(z, T, text) - model(z, T, text, 1)).abs().max() > 1e-3
    assert model(z, T, text, 9).isfinite().all()


@pytest.mark.parametrize("iterations", [0, -1])
def test_too_few_iterations_are_refused(iterations):
    with pytest.raises(SettingError, match=f"iterations={iterations} must be at least 1"):
        small_generator()(latents(), T, small_text(2), iterations)


@pytest.mark.parametrize("shape", [(2, CHANNELS + 1, 4, 4), (2, 4, 4), (CHANNELS, 4, 4)])
def test_wrong_latents_are_refused(shape):
    with pytest.raises(SettingError, match=rf"\[B, {CHANNELS}, h, w\]"):
        small_generator()(torch.zeros(shape), T, small_text(2))


def test_wrong_text_width_is_refused():
    with pytest.raises(SettingError, match=f"{TEXT_WIDTH} wide, got {TEXT_WIDTH + 4}"):
        small_generator()(latents(), T, small_text(2, width=TEXT_WIDTH + 4))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mixer": "mamba"}, "model.mixer='mamba'"),
        ({"ffn_ratio": 0.0}, "model.ffn_ratio=0.0"),
        ({"ffn_ratio": -1.0}, "model.ffn_ratio"),
    ],
)
def test_parts_that_cannot_be_are_refused_at_construction(changes, named):
    with pytest.raises(SettingError, match=named):
        small_config(**changes)


def test_time_is_embedded_as_in_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    layer, t = initialise(ScalarEmbedding(DIM), 0), torch.tensor([0.0, 0.123, 0.9, 1.0])
    waves = get_timestep_embedding(1000 * t, 128, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(
        layer(t), layer.outer(torch.nn.functional.silu(layer.inner(waves))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["channels", "text_width", "dim", "heads", "prelude", "core", "coda", "iterations"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(SettingError, match=f"model.{name}=0"):
        small_config(**{name: 0})


def test_dim_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingError, match="model.dim=20.*model.heads=8"):
        small_config(dim=20, heads=2)


def test_configuration_survives_plain_values():
    config = small_config(mixer="attention", mixer_width=32)
    assert GeneratorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (9, 2), (20, 18)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_unseen_grids_work(mixer, grid):
    v = small_generator(mixer=mixer)(latents(2, *grid), T, small_text(2))
    assert v.shape == (2, CHANNELS, *grid) and v.isfinite().all() and v.std() > 0


def test_batch_elements_are_independent():
    model, z, text = small_generator(), latents(3), small_text(3)
    times = torch.tensor([0.1, 0.5, 0.9])
    together = model(z, times, text)
    for i in range(3):
        one = model(z[i : i + 1], times[i : i + 1], type(text)(*(part[i : i + 1] for part in text)))
        torch.testing.assert_close(one, together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_time_and_text_matter_and_masked_tokens_do_not():
    model, z, text = small_generator(), latents(), small_text(2)
    before = model(z, T, text)
    assert (model(z, T + 0.1, text) - before).abs().max() > 1e-3

    masked = text.tokens.clone()
    masked[:, -1] = 100.0
    torch.testing.assert_close(model(z, T, text._replace(tokens=masked)), before)
    counted = text.tokens.clone()
    counted[:, 0] *= -1
    assert (model(z, T, text._replace(tokens=counted)) - before).abs().max() > 1e-3
    assert (model(z, T, text._replace(pooled=-text.pooled)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_every_parameter_gets_a_finite_gradient(mixer):
    model = small_generator(mixer=mixer)
    model(latents(2, 5, 4), T, small_text(2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_weights_are_shared_between_passes():
    count = {r: sum(p.numel() for p in small_generator(iterations=r).parameters()) for r in (1, 8)}
    assert count[1] == count[8]


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (9, 6), (17, 3)], ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_blocked_local_attention_is_the_dense_one(grid, monkeypatch):
    layer, x = initialise(LocalAttention(DIM, heads=2), 0), draw(2, *grid, DIM)
    dense = layer(x)
    monkeypatch.setattr(LocalAttention, "DENSE", 0)
    torch.testing.assert_close(layer(x), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0, 10_000])
def test_local_attention_sees_its_block_and_halo_alone(limit, monkeypatch):
    monkeypatch.setattr(LocalAttention, "DENSE", limit)
    layer, x = initialise(LocalAttention(DIM, heads=2, block=4, halo=2), 0), draw(1, 12, 12, DIM)
    before, other = layer(x), x.clone()
    other[0, 5, 5] += 1
    moved = (layer(other) - before).abs().amax(-1)[0] > 1e-6
    # Token (5, 5) lies in the middle block and in the halo of the blocks that start at 0; those at 8 begin to see at 6.
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[:8, :8] = True
    assert torch.equal(moved, expected)


def test_prelude_convolutions_see_their_neighbours():
    block = initialise(ConvBlock(DIM, 2.0), 0)
    torch.nn.init.ones_(block.modulation.linear.bias)
    x, condition = draw(1, 5, 5, DIM), torch.zeros(1, DIM)
    other = x.clone()
    other[0, 2, 2] += 1
    moved = (block(other, condition) - block(x, condition)).abs().amax(-1)[0] > 1e-6
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(moved, expected)


def test_record_gates_averages_each_pass_over_evaluations():
    model, text = small_generator(core=2), small_text(2)
    single = []
    for t in (0.9, 0.3):
        with record_gates(model, 3) as layers:
            model(latents(), torch.full((2,), t), text, 3)
        single.append(layers)
    with record_gates(model, 3) as layers:
        for t in (0.9, 0.3):
            model(latents(), torch.full((2,), t), text, 3)
    assert [layer["layer"] for layer in layers] == [0, 1]
    for i, layer in enumerate(layers):
        assert [row["iteration"] for row in layer["iterations"]] == [1, 2, 3]
        for k, row in enumerate(layer["iterations"]):
            assert row.keys() == {"iteration", "fourier", "recurrence", "spatial", "std"}
            assert row["fourier"] + row["recurrence"] == pytest.approx(1)
            parts = [one[i]["iterations"][k]["fourier"] for one in single]
            assert row["fourier"] == pytest.approx(sum(parts) / 2)
        assert len({row["fourier"] for row in layer["iterations"]}) == 3


def test_record_gates_stops_recording():
    model = small_generator()
    with pytest.raises(RuntimeError, match="stop"), record_gates(model, 2):
        assert model.core[0].mixer.observe is not None
        raise RuntimeError("stop")
    assert model.core[0].mixer.observe is None


def test_mixers_without_gates_record_nothing():
    model = small_generator(mixer="attention")
    with record_gates(model, 2) as layers:
        model(latents(), T, small_text(2))
    assert layers == []
