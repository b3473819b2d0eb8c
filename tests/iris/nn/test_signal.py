"""The signal is kept: through the recurrence and the fused mixer it neither fades nor explodes, whatever the input.

Variance is over images, around their mean, averaged over channels.
"""

import pytest
import torch
import torch.nn.functional as F

from iris.nn.mixers.grfm import GRFM, FusionOptions
from iris.nn.mixers.recurrence import RGLRU, RecurrenceOptions, RecurrencePathway, merge_directions, split_directions
from iris.randomness import initialise

WIDTH, LENGTH, SIDE = 64, 1024, 32


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def white(batch, side=SIDE):
    return draw(batch, side, side, WIDTH)


def constant(batch, side=SIDE):
    return draw(batch, 1, 1, WIDTH).expand(-1, side, side, -1)


def smooth(batch, side=SIDE):
    """Bicubic maps of 4 x 4 random values, scaled to unit power: neighbours correlate at more than 0.9."""
    grid = F.interpolate(draw(batch, WIDTH, 4, 4), (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return grid / grid.square().mean().sqrt()


def rms(x, dim=None):
    return x.square().mean(dim).sqrt()


def variance(x):
    """Of [B, N, C]: over images, averaged over channels, [N]."""
    return x.var(0).mean(-1)


def neutral(unit):
    """Both gates at one half whatever the input, as the analysis of the recurrence assumes."""
    with torch.no_grad():
        unit.input_gate.weight.zero_()
        unit.recurrence_gate.weight.zero_()
    return unit


@torch.no_grad()
@pytest.mark.parametrize("decay", ["paper", "code"])
@pytest.mark.parametrize("gates", ["neutral", "drawn"])
def test_white_input_keeps_its_variance_along_1024_tokens(decay, gates):
    """Within 10 % of the gated input's, from the first token to the last."""
    unit, x = initialise(RGLRU(WIDTH, 4, decay), 0), draw(64, LENGTH, WIDTH)
    unit = neutral(unit) if gates == "neutral" else unit
    ratio = variance(unit(x)) / variance(torch.sigmoid(unit.input_gate(x)) * x).mean()
    assert ratio[0].item() == pytest.approx(1, abs=0.1)
    for window in ratio.split(32):
        assert window.mean().item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_the_reset_is_what_keeps_it():
    """A first token scaled like the others has the variance 1 - a^2 of its decay: a hundredth to a tenth."""
    unit, x = neutral(initialise(RGLRU(WIDTH, 4), 0)), draw(64, 64, WIDTH)
    late = unit(F.pad(x, (0, 0, 1, 0)))[:, 1:]  # a zero token takes the reset
    assert variance(late)[0] < 0.2 * variance(unit(x))[0]


@torch.no_grad()
def test_gates_that_see_the_input_give_white_input_a_mean_that_adds_up():
    """A gate that depends on x_t correlates with it, E[i x] != 0, and the recurrence amplifies a mean as it does any
    constant. Variance does not see it, power does: hence the norm after the recurrence."""
    unit, x = initialise(RGLRU(WIDTH, 4), 0), draw(64, LENGTH, WIDTH)
    gated = torch.sigmoid(unit.input_gate(x)) * x
    assert rms(unit(x)[:, -256:]) > 1.4 * rms(gated)
    assert rms(neutral(unit)(x)[:, -256:]) < 1.1 * rms(gated)


@torch.no_grad()
def test_constant_input_is_amplified_by_the_recurrence_alone():
    """By sqrt((1 + a)/(1 - a)): 45 at a = 0.999."""
    unit, x = neutral(initialise(RGLRU(WIDTH, 4), 0)), torch.ones(1, 2 * LENGTH, WIDTH)
    states = unit(x)[0].double()
    a = torch.sigmoid(-unit.decay.double()) ** 4
    rest = a ** (2 * LENGTH - 1)
    expected = 0.5 * (torch.sqrt((1 + a) / (1 - a)) * (1 - rest) + rest)
    torch.testing.assert_close(states[-1], expected, rtol=1e-3, atol=0)
    gain = states[-1] / states[0]
    assert gain.min() > 4 and gain.max() > 20


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "amplified"),
    [
        (RecurrenceOptions(), 4),
        (RecurrenceOptions(scan="raster2"), 4),
        (RecurrenceOptions(reset="row"), 2),
        (RecurrenceOptions(decay="code"), 2),
    ],
)
def test_the_normalised_branch_takes_constant_as_white_input(options, amplified):
    """Within 2x at every token, out of the pathway and out of GRFM's norm, where the states differ more than that."""
    mixer = initialise(GRFM(WIDTH, recurrence=options), 0)
    pathway, norm = mixer.pathways["recurrence"], mixer.norms["recurrence"]
    states, outputs, normalised = {}, {}, {}
    for name, x in (("white", white(8)), ("constant", constant(8))):
        lines = (SIDE, SIDE) if options.reset == "row" else None
        states[name] = pathway.lru(split_directions(pathway.input(x), pathway.directions), lines)
        outputs[name] = pathway(x)
        normalised[name] = norm(outputs[name])
    assert rms(states["constant"]) > amplified * rms(states["white"])
    for branch in (outputs, normalised):
        ratio = rms(branch["constant"], (0, 3)) / rms(branch["white"])
        assert ratio.min() > 0.5 and ratio.max() < 2


@torch.no_grad()
def test_states_are_even_over_the_grid():
    """With four directions no side or corner of the grid is stronger: white input, variance of each quadrant."""
    pathway = initialise(RecurrencePathway(WIDTH), 0)
    states = merge_directions(pathway.lru(split_directions(pathway.input(white(64, 16)))), 16, 16)
    power = states.var(0).mean(-1)
    quadrants = torch.stack([power[:8, :8], power[:8, 8:], power[8:, :8], power[8:, 8:]]).mean((1, 2))
    assert quadrants.max() < 1.1 * quadrants.min()


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_grfm_gives_white_smooth_and_constant_input_the_same_scale(seed):
    """Output standard deviations within 1.25x of one another; with raw pathways they differ by more than 1.5x."""

    def spread(fusion):
        mixer = initialise(GRFM(WIDTH, fusion=fusion), seed)
        deviations = [mixer(x).std().item() for x in (white(8, 16), smooth(8, 16), constant(8, 16))]
        return max(deviations) / min(deviations), deviations

    ratio, deviations = spread(FusionOptions())
    assert ratio < 1.25 and all(0.8 < value < 1.8 for value in deviations)
    assert spread(FusionOptions(normalise=False))[0] > 1.5


@torch.no_grad()
@pytest.mark.parametrize(
    ("gate", "expected"), [("learned", 1.59), ("channel", 1.5), ("half", 1.5), ("sum", 3), ("concat", 1.5)]
)
def test_variance_of_the_fused_pathways(gate, expected):
    """Independent unit branches: g^2 + (1 - g)^2 + 1, which a drawn gate raises by its own variance; 3 for the sum."""
    mixer, x = initialise(GRFM(WIDTH, fusion=FusionOptions(gate)), 0), white(8, 16)
    fused = []
    mixer.out.register_forward_hook(lambda module, args, output: fused.append(args[0]))
    mixer(x)
    assert rms(fused[0]).item() ** 2 == pytest.approx(expected, rel=0.06)
