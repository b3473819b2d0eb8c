"""Distillation: targets against exact flows, what students are told, what is trained, toys that must get better."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import CAPTIONS, CHANNELS, parameters_of, small_model
from torch import nn

from iris.diffusion.distillation import (
    consistency_target,
    guided,
    move,
    pseudo_huber,
    rising_grid,
    shortcut_target,
    solve,
)
from iris.diffusion.flow import integrate, time_grid
from iris.diffusion.guidance import Guidance
from iris.diffusion.sampling import GuidedVelocity
from iris.errors import SettingError
from iris.io.tensors import load_tensors
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.condition import TextCondition
from iris.nn.depth import Depth
from iris.nn.generator import Evaluation, Generator, GeneratorConfig
from iris.nn.layers import Linear, ScalarEmbedding, ZeroLinear
from iris.nn.student import fold, make_student, student_times
from iris.pipeline import IrisPipeline
from iris.randomness import addressed, initialise
from iris.text import TextEncoder
from iris.training.distill_settings import METHODS, DistillSettings
from iris.training.distill_task import Distillation, DistillTask
from iris.training.loop import CHECKPOINT, LoopSettings, Share, fit
from iris.training.optimiser import OptimiserSettings
from iris.training.tasks import FlowTask

every_method = pytest.mark.parametrize("method", METHODS)

BATCH = 6


# Gaussian data N(MEAN, DEVIATION^2): the exact velocity is E[eps - z_0 | z_t], and the flow keeps a point's quantile.
MEAN, DEVIATION = 0.7, 0.4


def deviation(t):
    return ((1 - t) ** 2 * DEVIATION**2 + t**2) ** 0.5


def shaped(t):
    return t.view(-1, 1, 1, 1)


def exact_velocity(z, t):
    t = shaped(t)
    slope = (t - (1 - t) * DEVIATION**2) / deviation(t) ** 2
    return slope * (z - (1 - t) * MEAN) - MEAN


def exact_flow(z, t, to):
    t, to = shaped(t), shaped(to)
    return (1 - to) * MEAN + deviation(to) / deviation(t) * (z - (1 - t) * MEAN)


def exact_mean_velocity(z, t, to):
    """Of the way from t to ``to``."""
    return (z - exact_flow(z, t, to)) / shaped(t - to)


def on_the_way(t, seed=0):
    """Float64 latents as they are at times t [B]."""
    normal = torch.randn(len(t), 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1 - shaped(t)) * MEAN + deviation(shaped(t)) * normal


def largest(error):
    return error.abs().max().item()


def distance_of_targets(grid, solver, segments=1, first=1):
    """Largest distance of consistency targets from the exact end, with an exact student and a teacher's solver.

    ``first``: the first interval of the grid that counts.
    """
    times = rising_grid(grid).double()
    above = torch.arange(first, grid + 1)
    t, to = times[above], times[above - 1]
    end = times[(above - 1) // (grid // segments) * (grid // segments)]
    z = on_the_way(t)

    def student(z, t):
        ahead = torch.where(t > end, t, end + 1)  # at its end a student's velocity does not matter
        return exact_mean_velocity(z, ahead, end)

    target = consistency_target(student, solve(exact_velocity, z, t, to, solver), to, end)
    return largest(target - exact_flow(z, t, end))


class TestTargets:
    def test_the_exact_velocity_is_that_of_the_exact_flow(self):
        t = torch.linspace(0.1, 1, 7, dtype=torch.float64)
        z = on_the_way(t)
        central = (exact_flow(z, t, t + 1e-5) - exact_flow(z, t, t - 1e-5)) / 2e-5
        assert largest(central - exact_velocity(z, t)) < 1e-8

    @pytest.mark.parametrize("segments", [1, 4])
    def test_consistency_targets_are_the_exact_end(self, segments):
        assert distance_of_targets(4096, "heun", segments) < 1e-6

    @pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
    def test_their_error_is_that_of_one_step_of_the_solver(self, solver, order):
        """But for the interval next to the data, which is Euler's in both."""
        coarse, fine = (distance_of_targets(grid, solver, first=grid // 16) for grid in (256, 512))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)

    def test_from_the_exact_point_targets_are_exact(self):
        t = torch.linspace(0.2, 1, 9, dtype=torch.float64)
        to, end = t - 0.1, t * 0
        z = on_the_way(t)
        target = consistency_target(lambda z, t: exact_mean_velocity(z, t, end), exact_flow(z, t, to), to, end)
        assert largest(target - exact_flow(z, t, end)) < 1e-12
        wrong = consistency_target(lambda z, t: exact_velocity(z, t), exact_flow(z, t, to), to, end)
        assert largest(wrong - exact_flow(z, t, end)) > 0.01

    def test_shortcut_targets_are_the_exact_mean_velocity(self):
        level = torch.tensor([0, 0, 1, 1, 2, 3, 5, 5])
        size = 2.0 ** -level.double()
        t = torch.tensor([1, 1, 0.5, 1, 0.75, 0.125, 1 / 32, 31 / 32], dtype=torch.float64)
        z = on_the_way(t)

        def student(z, t, level):
            return exact_mean_velocity(z, t, t - 2.0**-level)

        target = shortcut_target(student, z, t, level)
        assert largest(target - exact_mean_velocity(z, t, t - size)) < 1e-12
        assert largest(target - exact_mean_velocity(z, t, t - size / 2)) > 0.01

    def test_a_stay_of_no_time_changes_nothing(self):
        z, t = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3)
        assert torch.equal(move(z, 1e6 * torch.ones_like(z), t, t), z)  # f(z, 0) = z
        assert torch.equal(consistency_target(lambda z, t: z.exp(), z, t, t), z)

    @pytest.mark.parametrize("solver", ["euler", "heun"])
    def test_rows_are_solved_as_the_samplers_solve_a_batch(self, solver):
        starts, ends = torch.tensor([1.0, 0.6, 0.5]).double(), torch.tensor([0.4, 0.2, 0.0]).double()
        z = on_the_way(starts)
        rows = solve(exact_velocity, z, starts, ends, solver, steps=3)
        for i in range(3):
            times = torch.lerp(starts[i], ends[i], torch.arange(4).double() / 3)
            alone = integrate(lambda z, t: exact_velocity(z, t.expand(1)), z[i : i + 1], times, solver)
            torch.testing.assert_close(rows[i : i + 1], alone, atol=1e-12, rtol=0)

    def test_pseudo_huber_is_squared_for_small_and_absolute_for_large_differences(self):
        difference, delta = torch.tensor([0.3, -2.0, 0.0, 5.0], dtype=torch.float64), 0.5
        expected = sum((d * d + delta**2) ** 0.5 - delta for d in difference.tolist()) / 4
        assert pseudo_huber(difference + 1, torch.ones(4), delta).item() == pytest.approx(expected, rel=1e-12)
        small = pseudo_huber(torch.full((2,), 1e-3).double(), torch.zeros(2).double(), 1.0)
        assert small.item() == pytest.approx(0.5e-6, rel=1e-3)
        large = pseudo_huber(torch.full((2,), 7.0), torch.zeros(2), 1e-3)
        assert large.item() == pytest.approx(7.0 - 1e-3, rel=1e-6)
        half = pseudo_huber(torch.full((2,), 1e-3).bfloat16(), torch.zeros(2).bfloat16(), 1e-3)
        assert half.item() == pytest.approx((2**0.5 - 1) * 1e-3, rel=1e-2)


def condition(model, captions=CAPTIONS):
    return model.text(model.text.tokenise(captions))


def distillation(method="consistency", depth=Depth(), mixer="grfm", **settings):
    settings = {"grid": 8, "guidance": 2.0} | settings
    model = small_model(awake=True, mixer=mixer, depth=depth)
    return Distillation(model, DistillSettings(method, **settings), 0)


def distil_task(method="consistency", batch=BATCH, steps=None, **settings):
    """Four latents and captions, on a generator of some thousand parameters."""
    module = distillation(method, **settings)
    latents = torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    tokenise = module.student.text.tokenise
    return DistillTask(module, latents, tokenise(CAPTIONS), tokenise([""])[0], batch, 0, steps)


def given(count=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHANNELS, 4, 4, generator=draws), torch.rand(count, generator=draws)


def stir(module, std=0.1):
    """Move all parameters, so that nothing is at zero any more."""
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=draws)
    return module


class TestGuidance:
    @pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
    def test_folded_in_it_is_the_samplers(self, interval):
        model, z = small_model(awake=True).double(), given()[0].double()  # batches of other sizes round otherwise
        text, null = condition(model), condition(model, [""] * 4)
        t, scale = torch.tensor([0.2, 0.3, 0.7, 0.9]).double(), torch.tensor([1.0, 2.0, 3.5, 5.0])
        with torch.no_grad():
            velocity = guided(model.generator, text, null, scale, interval)(z, t)
            for i in range(4):
                alone = (TextCondition(*(part[i : i + 1] for part in whole)) for whole in (text, null))
                sampler = GuidedVelocity(model.generator, *alone, Guidance(scale[i].item(), *interval))
                torch.testing.assert_close(velocity[i : i + 1], sampler(z[i : i + 1], t[i]), atol=1e-12, rtol=1e-12)
            plain = model.generator(z, t, text)
        assert largest(velocity[1:3] - plain[1:3]) > 1e-3
        assert (largest(velocity[3] - plain[3]) < 1e-12) == (interval == (0.3, 0.7))

    def test_without_it_one_half_is_evaluated(self):
        task, rows = distil_task(guidance=1.0), []
        task.module.teacher.register_forward_hook(lambda network, inputs, output: rows.append(len(inputs[0])))
        task.loss(0)
        guided_task = distil_task()
        guided_task.module.teacher.register_forward_hook(lambda network, inputs, output: rows.append(len(inputs[0])))
        guided_task.loss(0)
        assert rows == [BATCH, 2 * BATCH]


told = pytest.mark.parametrize(
    "settings",
    [
        DistillSettings(),
        DistillSettings(guidance_max=6.0),
        DistillSettings("shortcut"),
        DistillSettings("shortcut", guidance_max=6.0),
    ],
    ids=["nothing", "guidance", "step", "step and guidance"],
)


class TestStudent:
    @told
    def test_it_starts_as_the_teacher(self, settings):
        model, (z, t) = small_model(awake=True), given()
        student = make_student(model.generator, settings.numbers, 0)
        told = settings.told(torch.tensor([0, 1, 2, 6]), torch.tensor([3.0, 4.0, 5.0, 6.0]))
        times = student_times(t, told)
        assert tuple(told) == settings.numbers
        assert times.shape == ((4,) if settings == DistillSettings() else (4, 1 + len(settings.numbers)))
        assert times.min() >= 0 and times.max() <= 1
        text = condition(model)
        assert torch.equal(student(z, times, text), model.generator(z, t, text))

    @told
    def test_folded_it_is_a_plain_generator_that_equals_it(self, settings):
        model, (z, t) = small_model(awake=True), given()
        student, text = stir(make_student(model.generator, settings.numbers, 0)), condition(model)
        scale = 4.5 if settings.guidance_max else None
        times = student_times(t, settings.told(torch.full((4,), 2), torch.full((4,), scale or 3.0)))
        plain = fold(student, settings.told_throughout(4, scale))
        with torch.no_grad():
            torch.testing.assert_close(plain(z, t, text), student(z, times, text), atol=1e-5, rtol=1e-5)
            if settings.numbers:
                other = student_times(t, settings.told(torch.full((4,), 0), torch.full((4,), 6.0)))
                assert largest(plain(z, t, text) - student(z, other, text)) > 1e-3
        assert parameters_of(plain).keys() == parameters_of(model.generator).keys()

    def test_every_new_number_is_learned(self):
        task = distil_task("shortcut", guidance_max=6.0)
        task.loss(0)[0].backward()
        for embed in task.module.student.generator.time.further.values():
            assert embed.outer.weight.grad.abs().max() > 0

    def test_a_time_alone_is_refused(self):
        model, (z, t) = small_model(), given()
        student = make_student(model.generator, ["step"], 0)
        with pytest.raises(SettingError, match="times with step"):
            student(z, t, condition(model))

    def test_what_it_was_not_trained_for_is_refused(self):
        module = distillation("shortcut", guidance_max=4.0)
        with pytest.raises(SettingError, match="student.steps=3"):
            module.few_step(3)
        with pytest.raises(SettingError, match="student.steps=16"):
            module.few_step(16)
        with pytest.raises(SettingError, match="guidance=5"):
            module.few_step(2, 5.0)

    def test_passes_are_its_own_and_it_carries_nothing(self):
        model, (z, t) = small_model(awake=True, depth=Depth(carry=True, training="drawn")), given()
        student = make_student(model.generator, [], 0, iterations=3)
        text = condition(model)
        assert student.config.iterations == 3 and not student.config.depth.carry
        assert not any(name.startswith("carried") for name, _ in student.named_parameters())
        assert torch.equal(student(z, t, text), model.generator(z, t, text, 3))
        assert model.generator.config.iterations == 2 and model.generator.carried is not None

    @pytest.mark.parametrize("name", ["iterations", "teacher_iterations"])
    def test_passes_that_unshared_layers_do_not_have_are_refused(self, name):
        with pytest.raises(SettingError, match=f"student.{name}=3"):
            distillation(depth=Depth(share=False), **{name: 3})

    @every_method
    def test_a_pipeline_takes_samples_and_saves_it(self, method, tmp_path):
        latent = build_latent("haar", levels=1)
        module = Distillation(small_model(awake=True, channels=latent.channels), DistillSettings(method, grid=8), 0)
        stir(module.student.generator)
        settings = module.settings.sampling(2)
        pipe = IrisPipeline(module.few_step(2), latent, "haar", {"levels": 1}, 8, settings, module.settings.guidance)
        calls = []
        pipe.model.generator.register_forward_hook(lambda network, inputs, output: calls.append(len(inputs[0])))
        images = pipe.generate(CAPTIONS, settings)
        assert calls == [4, 4] and settings.evaluations == 2
        pipe.save(tmp_path)
        again = IrisPipeline.from_pretrained(tmp_path).generate(CAPTIONS)
        assert torch.equal(images, again)


class ExactTeacher(Generator):
    """The Gaussian flow's velocity, in the generator's place."""

    def __init__(self):
        nn.Module.__init__(self)
        self.config = GeneratorConfig(2, 1, 4, 1, 1, 1, 1, 1, 1.0, "identity")
        self.time, self.carried, self.weight = ScalarEmbedding(4), None, nn.Parameter(torch.zeros(()))

    def evaluate(self, z, t, text, iterations=None, **options):
        return Evaluation(self.velocity(z, t) + self.weight, (), z)

    def velocity(self, z, t):
        return exact_velocity(z, t)


class ExactStudent(ExactTeacher):
    """Its mean velocity to the end of the segment, or over the step it is told."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def velocity(self, z, t):
        if self.settings.method == "shortcut":
            t, step = t.unbind(1)
            return exact_mean_velocity(z, t, t - 2.0 ** -(step * self.settings.levels).round())
        segments = self.settings.segments
        end = ((t * segments).ceil() - 1) / segments
        return torch.where(shaped(t > 0), exact_mean_velocity(z, t.clamp(min=1e-9), end.clamp(min=0)), 0.0)


class NoText(TextEncoder):
    """One token that says nothing."""

    width = length = 1

    def tokenise(self, captions):
        return torch.zeros(len(captions), 1, dtype=torch.long)

    def forward(self, numbers):
        ones = torch.ones(len(numbers), 1)
        return TextCondition(ones[..., None], ones.bool(), ones)


def toy_task(teacher, latents, settings, batch, steps=None):
    module = Distillation(TextToLatent(NoText(), teacher), settings, 0)
    numbers = torch.zeros(len(latents), 1, dtype=torch.long)
    return DistillTask(module, latents, numbers, numbers[0], batch, 0, steps)


class TestTask:
    @pytest.mark.parametrize(
        "settings",
        [
            DistillSettings(grid=1024, solver="heun", guidance=1.0),
            DistillSettings(grid=32, solver="heun", solver_steps=32, guidance=1.0),
            DistillSettings(grid=1024, solver="heun", guidance=1.0, segments=4, steps=4),
            DistillSettings("shortcut", grid=1024, solver="heun", guidance=1.0),
        ],
        ids=["consistency", "several solver steps", "segments", "shortcut"],
    )
    def test_an_exact_student_of_an_exact_teacher_has_no_loss(self, settings):
        clean = MEAN + DEVIATION * on_the_way(torch.ones(64).double())
        task = toy_task(ExactTeacher(), clean, settings, 64)
        task.module.student.generator, task.module.target = ExactStudent(settings), ExactStudent(settings)
        loss, extras = task.loss(0)
        assert loss < 1e-6 and loss.dtype == torch.float64
        if settings.method == "consistency":
            assert extras["mse"] < 1e-12
        with torch.no_grad():
            task.module.student.generator.weight += 0.1
        assert task.loss(0)[0] > 1e-3

    @every_method
    def test_gradient_reaches_the_students_generator_and_nothing_else(self, method):
        task = distil_task(method)
        task.loss(0)[0].backward()
        with_gradient = {name for name, p in task.module.named_parameters() if p.grad is not None}
        assert with_gradient == {name for name, p in task.module.named_parameters() if p.requires_grad}
        student = task.module.student.generator
        assert with_gradient == {f"student.generator.{name}" for name, _ in student.named_parameters()}
        assert all(p.grad.isfinite().all() for p in task.module.student.parameters() if p.grad is not None)

    def test_the_consistency_loss_is_its_formula_with_a_constant_target(self):
        task = distil_task(guidance=1.0, delta=0.1)
        stir(task.module.target)
        loss, (z, t, text), other = self.loss_and_evaluated(task)
        assert torch.equal(t * 8, (t * 8).round()) and t.min() > 0
        with torch.no_grad():
            ahead = z - task.module.teacher(z, t, text) / 8
            target = ahead - shaped(t - 1 / 8) * task.module.target(ahead, t - 1 / 8, text)
        expected = (((z - shaped(t) * other(z, t, text) - target) ** 2 + 0.1**2).sqrt() - 0.1).mean()
        self.assert_same_gradient(task, loss, other, expected)

    def test_the_shortcut_loss_is_its_formula_with_constant_targets(self):
        task = distil_task("shortcut", guidance_max=4.0)
        stir(task.module.target)
        loss, (z, told, text), other = self.loss_and_evaluated(task)
        t, level, scale = told[:, 0], (told[:, 1] * 3).round(), 2 + 2 * told[:, 2]
        assert torch.equal(level == 3, torch.arange(BATCH) >= BATCH // 2) and 2 < scale.min() < scale.max() < 4
        assert torch.equal(t * 2**level, (t * 2**level).round()) and t.min() > 0
        null = condition(task.module.student, [""] * BATCH)
        half = 2.0 ** -(level + 1)
        finer = (level + 1) / 3
        with torch.no_grad():
            conditional, unconditional = task.module.teacher(z, t, text), task.module.teacher(z, t, null)
            taught = unconditional + shaped(scale) * (conditional - unconditional)
            first = task.module.target(z, torch.stack([t, finer, told[:, 2]], 1), text)
            second = task.module.target(z - shaped(half) * first, torch.stack([t - half, finer, told[:, 2]], 1), text)
            target = torch.where(shaped(level) == 3, taught, (first + second) / 2)
        self.assert_same_gradient(task, loss, other, (other(z, told, text) - target).square().mean())

    @staticmethod
    def loss_and_evaluated(task):
        """The loss of step 0, what the student was evaluated at, and a copy of the student."""
        network, seen = task.module.student.generator, []
        other, evaluate = copy.deepcopy(network), network.evaluate

        def noting(z, t, text, **options):
            seen.append((z, t, text))
            return evaluate(z, t, text, **options)

        network.evaluate = noting
        loss = task.loss(0)[0]
        (evaluated,) = seen
        return loss, evaluated, other

    @staticmethod
    def assert_same_gradient(task, loss, other, expected):
        loss.backward(), expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, two in zip(task.module.student.generator.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, atol=1e-5, rtol=1e-3)

    @every_method
    def test_parts_add_up_to_the_whole_batch(self, method):
        whole, split = (distil_task(method, guidance_max=4.0, delta=0.1) for _ in range(2))
        loss, extras = whole.loss(3)
        loss.backward()
        parts = [split.loss(3, Share(index, 3)) for index in range(3)]
        for part, _ in parts:
            (part / 3).backward()
        assert sum(part.item() for part, _ in parts) / 3 == pytest.approx(loss.item(), rel=1e-5)
        assert len({part.item() for part, _ in parts}) == 3
        for name, value in extras.items():
            assert sum(extra[name].item() for _, extra in parts) / 3 == pytest.approx(value.item(), rel=1e-5)
        for one, two in zip(whole.module.student.parameters(), split.module.student.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4)

    def test_a_part_may_lack_rows_of_one_kind(self):
        task = distil_task("shortcut", batch=2)
        first, second = (task.loss(0, Share(index, 2))[0].item() for index in range(2))
        assert (first + second) / 2 == pytest.approx(task.loss(0)[0].item(), rel=1e-5)

    @every_method
    def test_in_bfloat16_it_learns_nearly_the_same(self, method):
        task, mixed = distil_task(method, delta=0.1), distil_task(method, delta=0.1)
        loss = task.loss(0)[0]
        with torch.autocast("cpu", torch.bfloat16):
            other = mixed.loss(0)[0]
        assert other.dtype == torch.float32 and 0 < abs(other.item() / loss.item() - 1) < 0.1
        loss.backward(), other.backward()
        one, two = (
            torch.cat([p.grad.flatten() for p in each.module.student.generator.parameters()]) for each in (task, mixed)
        )
        assert F.cosine_similarity(one, two, dim=0) > 0.95

    @every_method
    def test_loss_is_addressed_by_the_step(self, method):
        losses = [distil_task(method).loss(step)[0].item() for step in (0, 1, 2)]
        task = distil_task(method)
        assert [task.loss(step)[0].item() for step in (0, 1, 2)] == losses and len(set(losses)) == 3
        assert task.loss(2)[0].item() == losses[2]

    def test_the_target_follows_once_a_step(self):
        task = distil_task(ema=0.75)
        student, target = task.module.student.generator, task.module.target
        assert all(torch.equal(one, two) for one, two in zip(student.parameters(), target.parameters(), strict=True))
        expected = copy.deepcopy(list(target.parameters()))
        for step in range(3):
            for index in range(3):
                task.loss(step, Share(index, 3))
            expected = [0.75 * old + 0.25 * new for old, new in zip(expected, student.parameters(), strict=True)]
            for one, two in zip(target.parameters(), expected, strict=True):
                torch.testing.assert_close(one, two)
            stir(student)
        assert task.module.followed == 2

    @every_method
    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, method, tmp_path):
        settings = LoopSettings(5, OptimiserSettings("muon", 3e-3), log_every=1, checkpoint_seconds=0.0)
        whole = fit(distil_task(method, guidance_max=4.0), settings, tmp_path / "whole").state_dict()

        def interrupt(row):
            if row["step"] == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(distil_task(method, guidance_max=4.0), settings, tmp_path / "cut", interrupt)
        resumed = fit(distil_task(method, guidance_max=4.0), settings, tmp_path / "cut").state_dict()
        assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
        start = distil_task(method, guidance_max=4.0).module.state_dict()
        moved = {name for name in whole if not torch.equal(whole[name], start[name])}
        assert {name.split(".")[0] for name in moved} == {"student", "target", "followed"}
        assert not any(name.startswith("student.text") for name in moved)

    def test_the_target_is_in_the_checkpoint(self, tmp_path):
        task = distil_task()
        fit(task, LoopSettings(2, checkpoint_seconds=0.0), tmp_path)
        tensors, _ = load_tensors(tmp_path / CHECKPOINT)
        saved = [value for name, value in sorted(tensors.items()) if "target.input" in name]
        assert len(saved) == 2 and any(torch.equal(task.module.target.input.weight, value) for value in saved)

    def test_the_grid_changes_over_the_run(self):
        settings = DistillSettings(grid=64, grid_end=4, segments=2, steps=2)
        grids = [settings.grid_at(step, 101) for step in range(101)]
        assert grids[0] == 64 and grids[50] == 16 and grids[100] == 4
        assert all(one >= two and one % 2 == 0 for one, two in itertools.pairwise(grids))
        task = distil_task(grid=8, grid_end=2, steps=3)
        assert [task.loss(step)[1]["grid"].item() for step in range(3)] == [8, 4, 2]

    def test_wrong_tasks_are_refused(self):
        with pytest.raises(SettingError, match="student.grid_end needs distill.steps"):
            distil_task(grid_end=4)
        with pytest.raises(SettingError, match="distill.batch=1"):
            distil_task("shortcut", batch=1)


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"method": "meanflow"}, "student.method='meanflow' is unknown; allowed: consistency, shortcut"),
            ({"solver": "rk4"}, "student.solver"),
            ({"steps": ()}, "student.steps"),
            ({"steps": "1,two"}, "student.steps='1,two'"),
            ({"steps": (0, 1)}, "student.steps"),
            ({"steps": [1, 2.5]}, "student.steps=[1, 2.5]"),
            ({"grid": 0}, "student.grid=0"),
            ({"grid_end": 5000}, "student.grid_end=5000"),
            ({"segments": 0}, "student.segments=0"),
            ({"segments": 3, "steps": 3}, "student.grid=64 must be a multiple of student.segments=3"),
            ({"segments": 4}, "student.steps=1,2,4 must be 4"),
            ({"solver_steps": 0}, "student.solver_steps=0"),
            ({"guidance": -1.0}, "student.guidance=-1"),
            ({"guidance_max": 3.0}, "student.guidance_max=3.0"),
            ({"guidance_start": 0.6, "guidance_end": 0.5}, "student.guidance_start=0.6"),
            ({"shift": 0.0}, "student.shift=0"),
            ({"ema": 1.0}, "student.ema=1"),
            ({"delta": 0.0}, "student.delta=0"),
            ({"delta": math.nan}, "student.delta=nan"),
            ({"bootstrap": 1.0}, "student.bootstrap=1"),
            ({"iterations": 0}, "student.iterations=0"),
            ({"method": "shortcut", "grid": 48}, "student.grid=48 must be a power of two"),
            ({"method": "shortcut", "grid": 1, "steps": 1}, "student.grid=1 must be a power of two"),
            ({"method": "shortcut", "steps": (1, 3)}, "student.steps=1,3"),
            ({"method": "shortcut", "grid": 4, "steps": 8}, "student.steps=8"),
            ({"method": "shortcut", "segments": 2}, "student.segments=2 belongs to student.method=consistency"),
            ({"method": "shortcut", "shift": 3.0}, "student.shift"),
            ({"method": "shortcut", "grid_end": 8}, "student.grid_end"),
        ],
    )
    def test_wrong_ones_are_refused(self, changes, named):
        with pytest.raises(SettingError) as error:
            DistillSettings(**changes)
        assert named in str(error.value)

    @pytest.mark.parametrize("steps", ["1,2,4", [1, 2, 4], (1, 2, 4)])
    def test_steps_are_written_as_one_likes(self, steps):
        assert DistillSettings(steps=steps).steps == (1, 2, 4)
        assert DistillSettings(steps=4).steps == (4,)

    def test_sampling_is_the_methods(self):
        assert DistillSettings(shift=2.0).sampling(4).sampler == "stochastic"
        assert DistillSettings(shift=2.0).sampling(4).shift == 2.0
        assert DistillSettings("shortcut").sampling(4).sampler == "euler"
        segmented = DistillSettings(segments=4, steps=4)
        assert segmented.sampling(4).sampler == "euler"
        with pytest.raises(SettingError, match="student.segments=4"):
            segmented.sampling(2)

    def test_the_grid_has_the_times_that_samplers_evaluate(self):
        grid = rising_grid(64, 3.0)
        assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
        for steps in (1, 2, 4):
            torch.testing.assert_close(grid[:: 64 // steps].flip(0), time_grid(steps, 3.0))


class ToyGenerator(Generator):
    """A network for points in the plane, [B, 2, 1, 1]."""

    def __init__(self, dim=64):
        nn.Module.__init__(self)
        self.config = GeneratorConfig(2, 1, dim, 1, 1, 1, 1, 1, 1.0, "identity")
        self.time, self.carried = ScalarEmbedding(dim), None
        self.input, self.output = Linear(2, dim), ZeroLinear(dim, 2)
        self.first, self.second = Linear(dim, dim), Linear(dim, dim)

    def evaluate(self, z, t, text, iterations=None, **options):
        x = self.input(z.flatten(1)) + self.time(t)
        x = x + self.first(F.silu(x))
        x = x + self.second(F.silu(x))
        return Evaluation(self.output(F.silu(x)).view_as(z), (), x)


def points(count, seed):
    """Four small clouds at the corners of a square."""
    draws = addressed("points", seed)
    corners = torch.randint(0, 2, (count, 2), generator=draws) * 2.0 - 1
    return (corners + 0.15 * torch.randn(count, 2, generator=draws)).view(count, 2, 1, 1)


def energy_distance(x, y):
    x, y = x.flatten(1), y.flatten(1)
    apart = [torch.cdist(a, b).mean().item() for a, b in ((x, y), (x, x), (y, y))]
    return 2 * apart[0] - apart[1] - apart[2]


@torch.no_grad()
def distance_in(model, steps, sampler, count=2000):
    """Energy distance to fresh data of points sampled in so many steps."""
    text = model.text(torch.zeros(count, 1))
    noise = torch.randn(count, 2, 1, 1, generator=addressed("start"))
    made = integrate(
        lambda z, t: model.generator(z, t.expand(count), text),
        noise,
        time_grid(steps),
        sampler,
        lambda step: torch.randn(noise.shape, generator=addressed("step", step)),
    )
    return energy_distance(made, points(count, 1))


def train(task, steps, rate, folder):
    settings = LoopSettings(steps, OptimiserSettings("adamw", rate, 0.0), 0.99, log_every=10**6, checkpoint_seconds=1e9)
    return fit(task, settings, folder)


@pytest.fixture(scope="module")
def toy_teacher(tmp_path_factory):
    model = initialise(TextToLatent(NoText(), ToyGenerator()), 0)
    numbers = torch.zeros(4096, 1, dtype=torch.long)
    task = FlowTask(model, points(4096, 0), numbers, numbers[0], 256, 0, 0.0, "none")
    return train(task, 900, 3e-3, tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        DistillSettings(grid=8, solver_steps=4, guidance=1.0),
        DistillSettings("shortcut", grid=32, guidance=1.0),
        DistillSettings(grid=16, segments=4, steps=4, guidance=1.0),
    ],
    ids=["consistency", "shortcut", "segments"],
)
def test_a_student_beats_its_teacher_in_few_steps(settings, toy_teacher, tmp_path):
    teacher = copy.deepcopy(toy_teacher)
    before = {steps: distance_in(teacher, steps, "euler") for steps in settings.steps}
    task = toy_task(teacher.generator, points(4096, 0), settings, 256)
    train(task, 400, 2e-3, tmp_path)
    for steps in settings.steps:
        after = distance_in(task.module.few_step(steps), steps, settings.sampling(steps).sampler)
        assert after < {1: 0.1, 2: 0.1, 4: 0.5}[steps] * before[steps], (steps, before, after)
