"""Passes in training: Huginn's distribution, truncated gradients, distilled early exits, carried states."""

import math

import numpy
import pytest
import torch
from scipy import stats
from small_models import CAPTIONS, CHANNELS, parameters_of, small_model, small_text

from iris.diffusion.flow import TimeSampling, interpolate, velocity_loss
from iris.errors import SettingError
from iris.nn.depth import Depth
from iris.nn.generator import Evaluation, Generator
from iris.randomness import addressed
from iris.training.depth import Passes, depth_loss, evaluate, log_normal_poisson, passes_of, truth_share
from iris.training.loop import LoopSettings, fit
from iris.training.optimiser import OptimiserSettings
from iris.training.tasks import FlowTask, batch_indices

BATCH, SEED = 3, 7


def make_task(depth=None, iterations=4, **changes):
    """Four latents and captions; all parts of the model count from the start."""
    model = small_model(awake=True, iterations=iterations, depth=depth or Depth())
    latents = torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    encode = model.text.vocabulary.encode
    settings = {"batch": BATCH, "seed": SEED, "caption_dropout": 0.3, "loss_weight": "none"}
    return FlowTask(model, latents, encode(CAPTIONS), encode([""])[0], **(settings | changes))


def drawn(task, step):
    """What training step ``step`` draws: clean latents, noise, their mixture, times and the encoded captions."""
    chosen = batch_indices(4, BATCH, SEED, step)
    clean = task.latents[chosen]
    dropped = torch.rand(BATCH, generator=addressed(SEED, "dropout", step)) < 0.3
    captions = torch.where(dropped[:, None], task.null, task.captions[chosen])
    t = task.times.draw(BATCH, addressed(SEED, "time", step))
    noise = torch.randn(clean.shape, generator=addressed(SEED, "noise", step))
    return clean, noise, interpolate(clean, noise, t), t, captions


def gradients(module, loss):
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each evaluation of a generator, with what it gave."""
    made, evaluated = [], Generator.evaluate

    def record(self, z, t, text, iterations=None, **how):
        given = evaluated(self, z, t, text, iterations, **how)
        made.append({"iterations": iterations, "grad": torch.is_grad_enabled(), "given": given} | how)
        return given

    monkeypatch.setattr(Generator, "evaluate", record)
    return made


# As before


@pytest.mark.parametrize("weight", ["none", "odds", "min_snr"])
def test_the_default_loss_is_one_plain_evaluations(weight):
    """Bit for bit, gradients too: finished trials depend on it."""
    task = make_task(loss_weight=weight, times=TimeSampling(mean=0.3))
    for step in (0, 5):
        clean, noise, z, t, captions = drawn(task, step)
        plain = velocity_loss(task.module(z, t, captions), clean, noise, t, weight)
        loss, extra = task.loss(step)
        assert torch.equal(loss, plain) and extra == {}
        assert_same_gradients(gradients(task.module, loss), gradients(task.module, plain), rtol=0, atol=0)


# Drawn passes


# Mean, median, 5% and 95% quantiles, P(r <= 2), P(r > 2 mean): architecture.md, section 4.2.
MOMENTS = {
    4: (5.0, 4, 1, 10, 0.185, 0.111),
    8: (9.0, 8, 3, 19, 0.037, 0.081),
    16: (17.0, 15, 6, 35, 0.003, 0.066),
    32: (33.0, 29, 12, 67, 0.0, 0.058),
}


@pytest.mark.parametrize("mean", list(MOMENTS))
def test_drawn_passes_have_huginns_moments(mean):
    r = log_normal_poisson(mean, 200_000, torch.Generator().manual_seed(0)).double()
    average, median, low, high, few, many = MOMENTS[mean]
    assert r.mean().item() == pytest.approx(average, rel=0.01)
    assert torch.quantile(r, torch.tensor([0.05, 0.5, 0.95]).double()).tolist() == [low, median, high]
    assert (r <= 2).double().mean().item() == pytest.approx(few, abs=0.003)
    assert (r > 2 * mean).double().mean().item() == pytest.approx(many, abs=0.003)


def test_drawn_passes_have_the_mixtures_distribution():
    """The Poisson's probabilities averaged over the log-normal rate by quadrature."""
    mean, count = 8, 100_000
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(80)
    rates = mean * numpy.exp(0.5 * nodes - 0.125)
    values = numpy.arange(1, 31)
    expected = (weights / weights.sum() * stats.poisson.pmf(values[:, None] - 1, rates)).sum(1)
    r = log_normal_poisson(mean, count, torch.Generator().manual_seed(1)).numpy()
    seen = numpy.append([(r == value).sum() for value in values], (r > 30).sum())
    assert stats.chisquare(seen, count * numpy.append(expected, 1 - expected.sum())).pvalue > 0.001


def test_drawn_passes_are_addressed_by_seed_and_step_and_bounded():
    config = make_task(Depth(training="drawn")).module.generator.config
    passes = [passes_of(config, SEED, step).iterations for step in range(3000)]
    assert passes[::-1] == [passes_of(config, SEED, step).iterations for step in reversed(range(3000))]
    assert passes != [passes_of(config, SEED + 1, step).iterations for step in range(3000)]
    assert min(passes) == 1 and max(passes) == 4 * 4
    assert numpy.mean(passes) == pytest.approx(4.985, abs=0.15)  # as by quadrature, cut off at 16


def test_a_training_step_runs_the_drawn_passes(calls):
    task = make_task(Depth(training="drawn", backprop=2))
    losses = [task.loss(step)[0].item() for step in range(4)]
    expected = [passes_of(task.module.generator.config, SEED, step).iterations for step in range(4)]
    assert [call["iterations"] for call in calls] == expected
    assert len({call["iterations"] for call in calls}) > 1 and {call["backprop"] for call in calls} == {2}
    assert [task.loss(step)[0].item() for step in (3, 2, 1, 0)] == losses[::-1]


@pytest.mark.parametrize("backprop", [1, 2, 3, 4, 9])
def test_a_truncated_gradient_is_that_of_a_state_detached(backprop):
    """``backprop`` passes from the end: there the state is cut by hand, in a run with all gradients."""
    task = make_task(iterations=4)
    model, text = task.module.generator, small_text(BATCH)
    _, noise, z, t, _ = drawn(task, 0)
    loss = lambda evaluation: (evaluation.velocity - noise).square().mean()  # noqa: E731
    truncated = gradients(model, loss(model.evaluate(z, t, text, backprop=backprop)))

    passes = []

    def cut(module, given):
        passes.append(given)
        return (given[0].detach(), given[1]) if len(passes) - 1 == 4 - backprop > 0 else None

    whole = gradients(model, loss(model.evaluate(z, t, text)))
    handle = model.injection.register_forward_pre_hook(cut)
    by_hand = gradients(model, loss(model.evaluate(z, t, text)))
    handle.remove()
    assert len(passes) == 4
    assert_same_gradients(truncated, by_hand, rtol=1e-5, atol=1e-7)
    same = all(torch.allclose(truncated[name], whole[name], rtol=1e-4, atol=1e-7) for name in whole)
    assert same == (backprop >= 4)


# Early exits


def test_exits_are_addressed_and_all_equally_likely():
    config = make_task(Depth(training="exits"), steps=10).module.generator.config
    exits = [passes_of(config, SEED, step) for step in range(3000)]
    assert exits[::-1] == [passes_of(config, SEED, step) for step in reversed(range(3000))]
    assert all(passes.iterations is None and len(passes.exits) == 1 for passes in exits)
    counts = numpy.bincount([passes.exits[0] for passes in exits])
    assert len(counts) == 4 and counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > 0.01


def test_the_share_of_the_truth_falls_from_one_to_zero():
    assert [truth_share(step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert truth_share(0, 1) == 1 and truth_share(9, 5) == 0


@pytest.mark.parametrize("step", [0, 3, 9])
@pytest.mark.parametrize("weight", ["none", "odds"])
def test_the_loss_with_exits_is_elts(step, weight):
    """Values and gradients against a loss made by hand from two evaluations, whose teacher is a constant."""
    task = make_task(Depth(training="exits"), steps=10, loss_weight=weight)
    clean, noise, z, t, captions = drawn(task, step)
    loss, parts = task.loss(step)
    ours = gradients(task.module, loss)

    (exit_at,) = passes_of(task.module.generator.config, SEED, step).exits
    with torch.no_grad():
        teacher = task.module(z, t, captions)
    full = task.module(z, t, captions)
    early = task.module(z, t, captions, exit_at)  # with exits, progress counts in trained passes: a prefix of the full
    share = 1 - step / 9
    scale = 1 if weight == "none" else t / (1 - t)
    error = lambda a, b: (scale * (a - b).square().flatten(1).mean(1)).mean()  # noqa: E731
    truth = noise - clean
    by_hand = error(full, truth) + share * error(early, truth) + (1 - share) * error(early, teacher)
    torch.testing.assert_close(loss, by_hand)
    assert_same_gradients(ours, gradients(task.module, by_hand), rtol=1e-4, atol=1e-5)
    expected = {
        "loss_full": error(full, truth),
        "loss_early": error(early, truth),
        "loss_distilled": error(early, teacher),
    }
    assert parts.keys() == expected.keys() and not any(part.requires_grad for part in parts.values())
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name].detach())


def test_the_teacher_gets_no_gradient_of_the_distillation():
    full, early, target = torch.randn(3, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    full.requires_grad_(), early.requires_grad_()
    error = lambda a, b: (a - b).square().sum()  # noqa: E731
    loss, _ = depth_loss(Evaluation(full, (early,), full), target, error, step=9, steps=10)
    loss.backward()
    torch.testing.assert_close(full.grad, 2 * (full - target).detach())
    torch.testing.assert_close(early.grad, 2 * (early - full).detach())


@pytest.mark.parametrize(
    ("depth", "changes", "named"),
    [
        (Depth(training="exits"), {}, "depth.training=exits needs train.steps"),
        (Depth(), {"loss_weight": "snr"}, "train.loss_weight='snr'.*min_snr"),
        (Depth(), {"min_snr_gamma": -1.0}, "train.min_snr_gamma=-1.0"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_construction(depth, changes, named):
    with pytest.raises(SettingError, match=named):
        make_task(depth, **changes)


def test_exits_need_two_passes():
    with pytest.raises(SettingError, match="model.iterations"):
        make_task(Depth(training="exits"), iterations=1, steps=10)


# Carried states


def test_half_of_the_steps_continue_the_state_of_an_evaluation_without_gradient(calls):
    task = make_task(Depth(carry=True, training="drawn"))
    carried = []
    for step in range(60):
        calls.clear()
        task.loss(step)
        carried.append(len(calls) == 2)
        assert calls[-1]["grad"] and calls[-1]["iterations"] == calls[0]["iterations"]
        if carried[-1]:
            first, second = calls
            assert not first["grad"] and first["carried"] is None and not first["given"].state.requires_grad
            assert second["carried"] is first["given"].state
        else:
            assert calls[0]["carried"] is None
    assert carried == [torch.rand((), generator=addressed(SEED, "carry", step)).item() < 0.5 for step in range(60)]
    assert 20 < sum(carried) < 40


def test_a_carried_step_is_two_evaluations_by_hand():
    task = make_task(Depth(carry=True, initial="noise"))
    step = next(s for s in range(20) if torch.rand((), generator=addressed(SEED, "carry", s)) < 0.5)
    clean, noise, z, t, captions = drawn(task, step)
    text, model = task.module.text(captions), task.module.generator
    draws = lambda: addressed(SEED, "state", step)  # noqa: E731
    before = model.evaluate(z, t, text, draws=draws())
    second = model.evaluate(z, t, text, carried=before.state.detach(), draws=draws())
    assert (second.velocity - before.velocity).abs().max() > 1e-3
    loss = task.loss(step)[0]
    assert torch.equal(loss, velocity_loss(second.velocity, clean, noise, t))
    by_hand = velocity_loss(second.velocity, clean, noise, t)
    assert_same_gradients(gradients(task.module, loss), gradients(task.module, by_hand), rtol=1e-5, atol=1e-7)


def test_initial_noise_is_drawn_anew_each_step():
    model, text = make_task(Depth(initial="noise")).module.generator, small_text(BATCH)
    z, t = torch.ones(BATCH, CHANNELS, 4, 4), torch.full((BATCH,), 0.5)
    states = [evaluate(model, z, t, text, SEED, step).velocity for step in (0, 1, 0)]
    assert torch.equal(states[0], states[2]) and not torch.allclose(states[0], states[1])


@pytest.mark.parametrize(
    "depth",
    [
        Depth(training="drawn", backprop=2),
        Depth(training="exits"),
        Depth(carry=True),
        Depth(carry=True, training="exits", initial="noise"),
    ],
    ids=["drawn", "exits", "carry", "carry, exits, noise"],
)
@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(depth, optimiser, tmp_path):
    settings = LoopSettings(6, OptimiserSettings(optimiser, 3e-3), log_every=1, checkpoint_seconds=0.0)
    whole = parameters_of(fit(make_task(depth, steps=6), settings, tmp_path / "whole"))

    def interrupt(row):
        assert all(math.isfinite(value) for value in row.values())
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_task(depth, steps=6), settings, tmp_path / "cut", interrupt)
    resumed = parameters_of(fit(make_task(depth, steps=6), settings, tmp_path / "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_fixed_passes_ask_for_nothing():
    assert passes_of(make_task().module.generator.config, SEED, 0) == Passes(None, ())
