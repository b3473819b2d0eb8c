"""Depth as a choice: sharing, injection, initial state, norms, conditioning, early exits, truncated gradients, carried state."""

import pytest
import torch
from small_models import CHANNELS, DIM, small_config, small_generator, small_text

from iris.errors import SettingError
from iris.nn.depth import Depth
from iris.nn.gates import record_gates
from iris.nn.generator import GeneratorConfig
from iris.nn.layers import rms_normalise

T = torch.tensor([0.2, 0.7])

CHOICES = [
    Depth(share=False),
    Depth(injection="add"),
    Depth(injection="none"),
    Depth(initial="noise"),
    Depth(initial="zero"),
    Depth(norm="sandwich"),
    Depth(conditioning="single"),
    Depth(conditioning="time"),
    Depth(training="drawn", backprop=2),
    Depth(training="exits"),
    Depth(carry=True),
    Depth(conditioning="single", norm="sandwich", share=False),
]
every_choice = pytest.mark.parametrize("depth", CHOICES, ids=repr)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(batch=2, h=4, w=4, seed=0):
    return draw(batch, CHANNELS, h, w, seed=seed)


def gradients(model, velocity):
    model.zero_grad()
    velocity.square().sum().backward()
    return {name: p.grad.clone() if p.grad is not None else None for name, p in model.named_parameters()}


@every_choice
def test_every_choice_gives_a_velocity_and_a_gradient_to_every_parameter(depth):
    model = small_generator(depth=depth, iterations=3, core=2)
    carried = draw(2, 5, 4, DIM, seed=3) if depth.carry else None
    given = model.evaluate(latents(2, 5, 4), T, small_text(2), carried=carried, backprop=depth.backprop)
    assert given.velocity.shape == (2, CHANNELS, 5, 4) and given.state.shape == (2, 5, 4, DIM)
    for name, gradient in gradients(model, given.velocity).items():
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, name


@every_choice
def test_every_choice_starts_at_zero_velocity(depth):
    assert torch.equal(
        small_generator(awake=False, depth=depth)(latents(), T, small_text(2)), torch.zeros(2, CHANNELS, 4, 4)
    )


@every_choice
def test_batch_elements_are_independent(depth):
    model, z, text = small_generator(depth=depth), latents(2), small_text(2)
    together = model(z, T, text)
    one = model(z[1:], T[1:], type(text)(*(part[1:] for part in text)))
    torch.testing.assert_close(one, together[1:], rtol=1e-4, atol=1e-5)


@every_choice
def test_configuration_survives_plain_values(depth):
    config = small_config(depth=depth)
    assert GeneratorConfig.from_dict(config.to_dict()) == config


def test_configurations_from_before_there_was_a_choice_still_load():
    config = small_config()
    old = {name: value for name, value in config.to_dict().items() if name not in ("mixers", "depth")}
    assert GeneratorConfig.from_dict(old) == config


@pytest.mark.parametrize("conditioning", ["layer", "single", "time"])
def test_core_layers_are_the_identity_at_the_start(conditioning):
    model = small_generator(awake=False, depth=Depth(conditioning=conditioning, injection="none"), core=2)
    given = draw(2, 4, 4, DIM)
    assert torch.equal(model.loop(given, given, draw(2, DIM), small_text(2), 3)[0], given)


def test_one_pass_without_injection_is_a_plain_stack():
    model = small_generator(depth=Depth(injection="none"), core=3, iterations=1)
    given, condition, text = draw(2, 4, 4, DIM), draw(2, DIM), small_text(2)
    state = given
    for layer in model.core:
        keys = layer.cross.prepare(model.text_norm(text.tokens))
        state = layer(state, condition + model.iteration(torch.tensor([1.0])), keys, text.mask)
    assert torch.equal(model.loop(given, given, condition, text, 1)[0], state)


def test_unshared_layers_with_equal_weights_are_the_loop():
    shared, unshared = (small_generator(depth=Depth(share=share), core=2, iterations=3) for share in (True, False))
    assert len(unshared.core) == 6 and len(shared.core) == 2
    weights = shared.state_dict()
    for i in range(2, 6):
        weights |= {
            name.replace(f"core.{i % 2}.", f"core.{i}."): value
            for name, value in shared.state_dict().items()
            if name.startswith(f"core.{i % 2}.")
        }
    unshared.load_state_dict(weights)
    z, text = latents(), small_text(2)
    torch.testing.assert_close(unshared(z, T, text), shared(z, T, text))
    assert (
        small_generator(depth=Depth(share=False), core=2, iterations=3)(z, T, text) - shared(z, T, text)
    ).abs().max() > 1e-3


def test_unshared_layers_run_as_often_as_there_are():
    with pytest.raises(SettingError, match="iterations=4 must be model.iterations=2 with depth.share=false"):
        small_generator(depth=Depth(share=False))(latents(), T, small_text(2), 4)


def test_injections_by_their_formulas():
    state, given = draw(2, 4, 4, DIM), draw(2, 4, 4, DIM, seed=1)
    inject = {kind: small_generator(depth=Depth(injection=kind)).injection for kind in ("concat", "add", "none")}
    torch.testing.assert_close(inject["add"](state, given), (state + given) / 2)
    torch.testing.assert_close(inject["concat"](state, given), (state + given) / 2)  # where it starts
    assert torch.equal(inject["none"](state, given), state)
    with torch.no_grad():
        inject["concat"].weight.copy_(draw(DIM, 2 * DIM))
    expected = torch.einsum("de,bhwe->bhwd", inject["concat"].weight, torch.cat([state, given], -1))
    torch.testing.assert_close(inject["concat"](state, given), expected, rtol=1e-4, atol=1e-5)


def test_initial_states():
    z, text = latents(), small_text(2)
    given = draw(2, 4, 4, DIM)
    start = {kind: small_generator(depth=Depth(initial=kind))._initial for kind in ("input", "noise", "zero")}
    assert torch.equal(start["input"](given, None), given)
    assert torch.equal(start["zero"](given, None), torch.zeros_like(given))
    fixed = start["noise"](given, None)
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(fixed, start["noise"](given, None))
    drawn = start["noise"](given.new_zeros(50, 8, 8, DIM), torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx((2 / 5) ** 0.5, rel=0.01) and not torch.equal(drawn[0], drawn[1])
    model = small_generator(depth=Depth(initial="noise"))
    other = model.evaluate(z, T, text, draws=torch.Generator().manual_seed(1)).velocity
    assert (other - model(z, T, text)).abs().max() > 1e-3


def test_sandwich_norm_bounds_the_state_by_itself():
    model = small_generator(depth=Depth(norm="sandwich"))
    state = model.evaluate(latents(), T, small_text(2)).state
    torch.testing.assert_close(state.square().mean(-1), torch.ones(2, 4, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "depth", [Depth(), Depth(norm="sandwich"), Depth(injection="add"), Depth(initial="noise")], ids=repr
)
@pytest.mark.parametrize("mixer", ["grfm", "attention"])
def test_the_state_stays_bounded_over_64_passes(depth, mixer):
    model, z, text = small_generator(mixer=mixer, depth=depth), latents(), small_text(2)
    with torch.no_grad():
        norms = [model.evaluate(z, T, text, r).state.square().mean().sqrt().item() for r in (1, 4, 16, 64)]
    assert max(norms) < 3 * norms[0] and min(norms) > norms[0] / 3


def test_without_injection_a_pre_norm_state_grows():
    """The bound above is the injection's doing."""
    model, z, text = small_generator(depth=Depth(injection="none")), latents(), small_text(2)
    with torch.no_grad():
        norms = [model.evaluate(z, T, text, r).state.square().mean().sqrt().item() for r in (1, 64)]
    assert norms[1] > 5 * norms[0]


def test_conditionings_differ_in_what_they_see_and_cost():
    models = {kind: small_generator(depth=Depth(conditioning=kind), core=3) for kind in ("layer", "single", "time")}
    count = {kind: sum(p.numel() for p in model.parameters()) for kind, model in models.items()}
    assert count["single"] < count["time"] < count["layer"]
    assert models["time"].iteration is None
    signals = {kind: model._pass_signals(draw(2, DIM), 3) for kind, model in models.items()}
    assert torch.equal(signals["time"][0], signals["time"][2])
    assert not torch.equal(signals["layer"][0], signals["layer"][2])
    assert not torch.equal(signals["single"][0], signals["single"][2])


def test_adaln_single_adds_its_table_to_one_projection():
    model = small_generator(depth=Depth(conditioning="single"))
    table, projected = model.coda[0].modulation, draw(2, 9 * DIM)
    with torch.no_grad():
        table.table.copy_(draw(6, DIM, seed=4))
    for i, part in enumerate(table(projected)):
        torch.testing.assert_close(part, projected[:, i * DIM : (i + 1) * DIM] + table.table[i])


def test_early_exits_are_what_shorter_loops_give():
    model, z, text = small_generator(iterations=4, depth=Depth(training="exits")), latents(), small_text(2)
    given = model.evaluate(z, T, text, exits=(1, 3))
    for k, early in zip((1, 3), given.early, strict=True):
        torch.testing.assert_close(early, model(z, T, text, k), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.velocity, model(z, T, text, 4))
    plain = small_generator(iterations=4)  # whose modulation sees the fraction of its own loop
    assert (plain.evaluate(z, T, text, exits=(1,)).early[0] - plain(z, T, text, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("exits", [(0,), (3,)])
def test_exits_outside_the_loop_are_refused(exits):
    with pytest.raises(SettingError, match="exits"):
        small_generator().evaluate(latents(), T, small_text(2), exits=exits)


@pytest.mark.parametrize("last", [1, 2])
def test_truncated_gradients_are_those_of_a_detached_state(last):
    model, z, text = small_generator(core=2, iterations=3), latents(), small_text(2)
    got = model.evaluate(z, T, text, backprop=last)
    torch.testing.assert_close(got.velocity, model(z, T, text))
    truncated = gradients(model, got.velocity)

    calls = []

    def detach(module, arguments):
        calls.append(0)
        return (arguments[0].detach(), arguments[1]) if len(calls) == 3 - last + 1 else None

    handle = model.injection.register_forward_pre_hook(detach)
    by_hand = gradients(model, model(z, T, text))
    handle.remove()
    whole = gradients(model, model(z, T, text))
    assert len(calls) == 3
    for name in whole:
        torch.testing.assert_close(truncated[name], by_hand[name], rtol=1e-5, atol=1e-6)
    assert any((truncated[name] - whole[name]).abs().max() > 1e-3 for name in whole)


def test_more_passes_of_gradient_than_passes_is_all_of_them():
    model, z, text = small_generator(iterations=3), latents(), small_text(2)
    whole, capped = (gradients(model, model.evaluate(z, T, text, backprop=k).velocity) for k in (None, 9))
    assert all(torch.equal(whole[name], capped[name]) for name in whole)


def test_a_carried_state_enters_by_its_formula():
    model, z, text = small_generator(depth=Depth(carry=True)), latents(), small_text(2)
    carried = model.evaluate(z, T, text).state
    start = {}

    def keep_first(module, arguments):
        start.setdefault("state", arguments[0])

    model.injection.register_forward_pre_hook(keep_first)
    after = model.evaluate(z, T, text, carried=carried).velocity
    given = start.pop("state") - model.carried(rms_normalise(carried))
    model(z, T, text)
    torch.testing.assert_close(start["state"], given, rtol=1e-5, atol=1e-5)
    assert (after - model(z, T, text)).abs().max() > 1e-3
    asleep = small_generator(awake=False, depth=Depth(carry=True))
    assert torch.equal(asleep.carried(rms_normalise(carried)), torch.zeros_like(carried))


def test_a_carried_state_without_its_setting_is_refused():
    with pytest.raises(SettingError, match="depth.carry=true"):
        small_generator().evaluate(latents(), T, small_text(2), carried=draw(2, 4, 4, DIM))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"injection": "gate"}, "depth.injection='gate' is unknown; allowed: concat, add, none"),
        ({"initial": "ones"}, "depth.initial"),
        ({"norm": "post"}, "depth.norm"),
        ({"conditioning": "film"}, "depth.conditioning"),
        ({"training": "random"}, "depth.training"),
        ({"backprop": 0}, "depth.backprop=0 must be at least 1"),
        ({"injection": "none", "initial": "zero"}, "depth.injection=none loses the input"),
        ({"injection": "none", "backprop": 2}, "depth.backprop needs an injection"),
        ({"backprop": 2, "training": "exits"}, "depth.backprop=2 must be null with depth.training=exits"),
        ({"backprop": 1, "share": False}, "depth.backprop=1 must be null with depth.share=false"),
        ({"share": False, "training": "drawn"}, "depth.training=drawn needs depth.share=true"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_are_refused(settings, message):
    with pytest.raises(SettingError) as error:
        Depth(**settings)
    assert message in str(error.value)


def test_early_exits_need_a_loop():
    with pytest.raises(SettingError, match="model.iterations >= 2"):
        small_config(iterations=1, depth=Depth(training="exits"))


def test_gates_of_unshared_layers_are_told_by_pass():
    model = small_generator(core=2, iterations=3, depth=Depth(share=False))
    with torch.no_grad():
        for i, layer in enumerate(model.core):
            layer.mixer.gate.weight.zero_()
            layer.mixer.gate.bias.fill_(float(i))
    with record_gates(model, 3) as layers:
        model(latents(), T, small_text(2))
    for index, layer in enumerate(layers):
        told = torch.tensor([row["fourier"] for row in layer["iterations"]])
        torch.testing.assert_close(told, torch.sigmoid(torch.tensor([0.0, 2.0, 4.0]) + index))
