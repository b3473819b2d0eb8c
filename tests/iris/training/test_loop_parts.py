"""A step in parts is the step: accumulation, precision, compilation and recomputed passes change how, not what."""

import itertools
import json
import math

import pytest
import torch
from small_models import CAPTIONS, CHANNELS, parameters_of, small_model
from torch.overrides import TorchFunctionMode

import iris.training.run as run_module
import iris.training.vae_task as vae_module
from eval.speed.probes import ActivationTracker
from iris.errors import SettingError
from iris.io.pixels import to_images
from iris.latents.wavelet_vae import WaveletVAE
from iris.nn.depth import Depth
from iris.randomness import initialise
from iris.training.devices import compiled_blocks, make_accelerator
from iris.training.loop import METRICS, WHOLE, LoopSettings, Share, fit
from iris.training.optimiser import OPTIMISERS, OptimiserSettings
from iris.training.tasks import FlowTask, batch_indices
from iris.training.vae_task import VAETask

BATCH = 6


def flow_task(depth=None, batch=BATCH, side=4, **model):
    """Eight latents and captions; every part of the model counts from the start."""
    module = small_model(awake=True, depth=depth or Depth(), **model)
    latents = torch.randn(8, CHANNELS, side, side, generator=torch.Generator().manual_seed(0))
    encode = module.text.vocabulary.encode
    return FlowTask(
        module,
        latents,
        encode(CAPTIONS * 2),
        encode([""])[0],
        batch=batch,
        seed=0,
        caption_dropout=0.4,
        loss_weight="none",
        steps=4,
    )


def vae_task():
    pixels = torch.randint(0, 256, (8, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    vae = initialise(WaveletVAE(channels=4, width=8), 0)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return VAETask(vae, pixels, BATCH, 0, kl_weight=1e-2, detail_weight=0.5)


TASKS = {
    "flow": flow_task,
    "vae": vae_task,
    "noise": lambda: flow_task(Depth(initial="noise", training="drawn")),
    "carry": lambda: flow_task(Depth(carry=True)),
    "exits": lambda: flow_task(Depth(training="exits"), iterations=3),
}


def settings(steps=4, optimiser="adamw", **changes):
    return LoopSettings(steps, OptimiserSettings(optimiser, 3e-3), log_every=1, checkpoint_seconds=1e9, **changes)


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def distance(one, other):
    """Largest difference over all tensors, relative to the largest value of all."""
    assert one.keys() == other.keys()
    largest = max(value.abs().max() for value in other.values())
    return max(((one[name] - other[name]).abs().max() / largest).item() for name in one)


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("of", [2, 3])
def test_the_mean_over_parts_is_the_whole(name, of):
    """Loss, extras and gradients; a part that drew for itself, or took another's rows, would be far away."""
    task = TASKS[name]()
    for step in (0, 1, 3):
        whole, extra = task.loss(step)
        whole.backward()
        expected = gradients(task.module)
        parts = [task.loss(step, Share(index, of)) for index in range(of)]
        torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).mean(), whole, rtol=2e-6, atol=0)
        for kind in extra:
            mean = torch.stack([values[kind] for _, values in parts]).mean()
            torch.testing.assert_close(mean, extra[kind], rtol=1e-5, atol=1e-7)
        (sum(loss for loss, _ in parts) / of).backward()
        assert distance(gradients(task.module), expected) < 3e-6
        assert parts[0][0].item() != parts[1][0].item()


def test_parts_partition_the_batch():
    batch = torch.arange(12)
    taken = [Share(index, 4).take(batch) for index in range(4)]
    assert sorted(torch.cat(taken).tolist()) == batch.tolist() and {len(part) for part in taken} == {3}
    assert WHOLE.take(batch).data_ptr() == batch.data_ptr()


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", ["flow", "vae"])
def test_accumulation_is_the_whole_batch(name, optimiser, tmp_path, monkeypatch):
    """In double precision, so that nothing but the split could show."""
    monkeypatch.setattr(vae_module, "to_images", lambda pixels: to_images(pixels).double())
    ends, curves = [], []
    for count in (1, 3):
        task = TASKS[name]()
        task.module.double()
        if name == "flow":
            task.latents = task.latents.double()
        torch.set_default_dtype(torch.float64)
        try:
            fit(task, settings(optimiser=optimiser, accumulate=count), tmp_path / str(count))
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(parameters_of(task.module))
        curves.append(
            [
                [value for key, value in row.items() if key not in ("time", "images_per_s")]
                for row in rows(tmp_path / str(count))
            ]
        )
    assert distance(*ends) < 1e-6
    assert torch.tensor(curves[1]).sub(torch.tensor(curves[0])).abs().max() < 1e-6


def test_accumulation_holds_a_part_in_memory(tmp_path):
    peaks = []
    for count in (1, 4):
        task = flow_task(batch=8)
        with ActivationTracker() as tracker:
            fit(task, settings(1, accumulate=count), tmp_path / str(count))
        peaks.append(tracker.peak)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("name", TASKS)
def test_bf16_trains_and_is_finite(name, tmp_path):
    curves = []
    for precision in ("no", "bf16"):
        fit(TASKS[name](), settings(precision=precision), tmp_path / precision)
        curves.append([row["loss"] for row in rows(tmp_path / precision)])
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=0.05)


def test_bf16_leaves_weights_and_averages_in_float32(tmp_path):
    module = fit(flow_task(), settings(2, precision="bf16"), tmp_path)
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    loaded, _ = run_module.Checkpoints(tmp_path, 1).load()
    assert not any(value.dtype == torch.bfloat16 for value in loaded.values())


@pytest.fixture
def scaled(monkeypatch):
    """fp16's scaler without its arithmetic, which CPUs have no kernels for."""

    def made(scale):
        def make(device, precision, accumulate):
            accelerator = make_accelerator(device, "no", accumulate)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            return accelerator

        monkeypatch.setattr(run_module, "make_accelerator", make)

    return made


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_scaled_loss_gives_the_same_weights(optimiser, scaled, tmp_path):
    """A power of two scales exactly; unscaled twice, as by two of Accelerate's optimisers, gradients would be small."""
    plain = parameters_of(fit(flow_task(), settings(optimiser=optimiser), tmp_path / "plain"))
    scaled(2.0**10)
    other = parameters_of(fit(flow_task(), settings(optimiser=optimiser), tmp_path / "scaled"))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_an_overflow_lowers_the_scale_and_is_not_counted(scaled, tmp_path):
    scaled(2.0**127)
    fit(flow_task(), settings(8), tmp_path)
    _, about = run_module.Checkpoints(tmp_path, 1).load()
    assert about["scaler"]["scale"] < 2.0**127 and about["skipped"] == 0
    assert not math.isfinite(rows(tmp_path)[0]["grad_norm"]) and math.isfinite(rows(tmp_path)[-1]["grad_norm"])


def test_the_scale_is_resumed(scaled, tmp_path):
    scaled(2.0**120)
    whole = parameters_of(fit(flow_task(), settings(8), tmp_path / "whole"))
    short = LoopSettings(8, OptimiserSettings("adamw", 3e-3), log_every=1, checkpoint_seconds=0)

    def stop(row):
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(flow_task(), short, tmp_path / "cut", stop)
    resumed = parameters_of(fit(flow_task(), short, tmp_path / "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# Recomputed passes


@pytest.mark.parametrize(
    "depth",
    [
        Depth(),
        Depth(initial="noise"),
        Depth(backprop=2),
        Depth(training="exits"),
        Depth(carry=True),
        Depth(share=False),
    ],
    ids=str,
)
def test_recomputed_passes_give_the_same_gradients(depth):
    found = []
    for recompute in (False, True):
        task = flow_task(depth, iterations=3)
        task.module.generator.checkpoint_passes = recompute
        losses = [task.loss(step)[0] for step in range(3)]
        sum(losses).backward()
        found.append(gradients(task.module) | {"loss": torch.stack(losses).detach()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputed_passes_change_no_run(tmp_path):
    ends = [
        parameters_of(fit(flow_task(), settings(gradient_checkpointing=chosen), tmp_path / str(chosen)))
        for chosen in (False, True)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def peak_of_a_step(passes, recompute):
    """Bytes of the tensors alive at most in forward and backward, gradients included."""
    task = flow_task(batch=8, side=8, iterations=passes, dim=32, heads=2)
    task.module.generator.checkpoint_passes = recompute
    with ActivationTracker() as tracker:
        task.loss(0)[0].backward()
    return tracker.peak


def test_sixteen_recomputed_passes_take_little_more_memory_than_two():
    plain = {passes: peak_of_a_step(passes, False) for passes in (2, 16)}
    recomputed = {passes: peak_of_a_step(passes, True) for passes in (2, 16)}
    assert plain[16] > 4 * plain[2]
    assert recomputed[16] <= 1.5 * recomputed[2] <= 1.5 * plain[2]


def test_sampling_recomputes_nothing():
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Counting.calls += 1
            return function(*args, **(kwargs or {}))

    counts = []
    flow_task().loss(0)  # the first call of all also fills caches
    for recompute in (False, True):
        task = flow_task()
        task.module.generator.checkpoint_passes = recompute
        Counting.calls = 0
        with torch.no_grad(), Counting():
            task.loss(0)
        counts.append(Counting.calls)
    assert counts[0] == counts[1] > 0


# Compilation


def test_blocks_are_compiled_for_the_run_only(monkeypatch, tmp_path):
    """With a backend that runs the traced graph as it is: compiling kernels takes longer than this whole file."""
    compiled = []

    def compile_plainly(block):
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_plainly)
    plain = parameters_of(fit(flow_task(mixer="attention"), settings(2), tmp_path / "plain"))
    task = flow_task(mixer="attention")
    other = parameters_of(fit(task, settings(2, compile=True), tmp_path / "compiled"))
    assert compiled == compiled_blocks(task.module)
    assert {type(block).__name__ for block in compiled} == {"TextLayer", "ConvBlock", "CoreLayer", "CodaBlock"}
    assert all(block._compiled_call_impl is None for block in compiled)
    assert distance(other, plain) < 1e-4


def test_a_vaes_halves_are_blocks():
    vae = vae_task().module
    assert compiled_blocks(vae) == [vae.encoder, vae.decoder]


# Settings


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "fp8"}, "compute.precision='fp8'.*no, bf16, fp16"),
        ({"accumulate": 0}, "compute.accumulate=0"),
        ({"keep": 0}, "compute.keep=0"),
        ({"skip_nonfinite": -1}, "compute.skip_nonfinite=-1"),
        ({"accumulate": 4}, "train.batch=6.*multiple of 4.*compute.accumulate=4"),
        ({"precision": "fp16"}, "compute.precision=fp16 needs a GPU.*no, bf16"),
        ({"device": "xpu"}, "compute.device=xpu"),
        ({"validate_every": 2}, "compute.validate_every=2"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(changes, named, tmp_path):
    with pytest.raises(SettingError, match=named):
        fit(flow_task(), settings(**changes), tmp_path)


def test_only_a_loop_can_be_recomputed(tmp_path):
    with pytest.raises(SettingError, match="compute.gradient_checkpointing"):
        fit(vae_task(), settings(gradient_checkpointing=True), tmp_path)


def test_precision_may_change_from_run_to_run_in_one_process(tmp_path):
    for number, precision in enumerate(("no", "bf16", "no")):
        fit(flow_task(), settings(1, precision=precision), tmp_path / str(number))


def test_epochs_kept_are_those_drawn():
    drawn = [batch_indices(10, 4, seed, step) for seed, step in itertools.product((0, 1), (0, 5, 2, 0))]
    assert torch.equal(drawn[0], drawn[3]) and not torch.equal(drawn[0], drawn[4])
