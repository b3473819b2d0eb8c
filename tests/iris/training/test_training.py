"""The loop: interrupted runs end as uninterrupted ones, bad losses stop it, and tiny tasks are learned."""

import json
import math
import os
import signal
import traceback

import pytest
import torch
from small_models import CAPTIONS, CHANNELS, TEXT_WIDTH, parameters_of, small_config, small_model, wake

from iris.errors import SettingError
from iris.io.pixels import to_images
from iris.io.tensors import load_tensors, save_tensors
from iris.latents.wavelet_vae import WaveletVAE
from iris.model import TextToLatent
from iris.nn.generator import Generator
from iris.randomness import initialise
from iris.text import Vocabulary, WordEncoder
from iris.training.loop import CHECKPOINT, METRICS, LoopSettings, NonFiniteLoss, fit
from iris.training.optimiser import OPTIMISERS, Optimisers, OptimiserSettings, learning_rate_at
from iris.training.tasks import FlowTask, batch_indices, validation_loss
from iris.training.vae_task import VAETask

STEPS = 7

every_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS)


def flow_task(**changes):
    """Four latents and captions, on a generator of some thousand parameters."""
    model = small_model()
    latents = torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    encode = model.text.vocabulary.encode
    settings = {"batch": 3, "seed": 0, "caption_dropout": 0.1, "loss_weight": "none"}
    return FlowTask(model, latents, encode(CAPTIONS), encode([""])[0], **(settings | changes))


def test_a_text_encoder_of_another_width_is_refused():
    encoder = WordEncoder(Vocabulary.from_captions(CAPTIONS, 6), TEXT_WIDTH + 4)
    with pytest.raises(
        SettingError, match=f"model.text_width={TEXT_WIDTH} must be the text encoder's width, {TEXT_WIDTH + 4}"
    ):
        TextToLatent(encoder, Generator(small_config()))


def vae_task():
    """Eight images of 8 x 8 pixels, on a small wavelet VAE."""
    pixels = torch.randint(0, 256, (8, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return VAETask(initialise(WaveletVAE(channels=4, width=8), 0), pixels, 3, 0, kl_weight=1e-3, detail_weight=0.5)


def loop(steps=STEPS, optimiser="muon", checkpoint_seconds=0.0, **changes):
    """Settings that log and, with ``checkpoint_seconds`` 0, save at every step."""
    rate = changes.pop("learning_rate", 3e-3)
    return LoopSettings(
        steps, OptimiserSettings(optimiser, rate), log_every=1, checkpoint_seconds=checkpoint_seconds, **changes
    )


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def interrupt_at(step):
    def observe(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return observe


def assert_same_run(folder, model, other_folder, other):
    """Bit for bit: the weights, and what was logged apart from times."""
    assert model.keys() == other.keys() and all(torch.equal(model[name], other[name]) for name in model)
    logged, other_logged = rows(folder), rows(other_folder)
    assert [row["step"] for row in logged] == [row["step"] for row in other_logged] == list(range(1, STEPS + 1))
    for name in ("loss", "lr", "grad_norm"):
        assert [row[name] for row in logged] == [row[name] for row in other_logged]


@every_optimiser
@pytest.mark.parametrize("make", [flow_task, vae_task])
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9], ids=["saved", "never saved"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(make, optimiser, checkpoint_seconds, tmp_path):
    whole = parameters_of(fit(make(), loop(optimiser=optimiser), tmp_path / "whole"))
    settings = loop(optimiser=optimiser, checkpoint_seconds=checkpoint_seconds)
    for step in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            fit(make(), settings, tmp_path / "cut", interrupt_at(step))
        assert rows(tmp_path / "cut")[-1]["step"] == step
        assert (tmp_path / "cut" / CHECKPOINT).exists() == (checkpoint_seconds == 0)
    resumed = parameters_of(fit(make(), settings, tmp_path / "cut"))
    assert_same_run(tmp_path / "cut", resumed, tmp_path / "whole", whole)


def test_a_resumed_run_does_not_repeat_finished_steps(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(flow_task(), loop(), tmp_path, interrupt_at(5))
    seen = []
    fit(flow_task(), loop(), tmp_path, lambda row: seen.append(row["step"]))
    assert seen == [5, 6, 7]  # the row of step 5 was written, its checkpoint was not
    fit(flow_task(), loop(), tmp_path, lambda row: seen.append(row["step"]))
    assert seen == [5, 6, 7]


def test_a_finished_run_called_again_returns_its_weights(tmp_path):
    first = parameters_of(fit(flow_task(), loop(), tmp_path))
    again = parameters_of(fit(flow_task(), loop(), tmp_path))
    assert all(torch.equal(first[name], again[name]) for name in first)


def kill_at(step):
    def observe(row):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return observe


def test_a_killed_process_is_resumed(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            fit(flow_task(), loop(), tmp_path / "cut", kill_at(4))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4]
    with open(tmp_path / "cut" / METRICS, "a") as metrics:
        metrics.write('{"step": 5, "lo')  # as if killed while it wrote
    resumed = parameters_of(fit(flow_task(), loop(), tmp_path / "cut"))
    whole = parameters_of(fit(flow_task(), loop(), tmp_path / "whole"))
    assert_same_run(tmp_path / "cut", resumed, tmp_path / "whole", whole)


def test_training_neither_uses_nor_moves_the_global_generator(tmp_path):
    ends = []
    for seed in (5, 6):
        task = flow_task()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        ends.append(parameters_of(fit(task, loop(), tmp_path / str(seed))))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_rows_hold_what_the_watcher_shows(tmp_path):
    observed = []
    fit(vae_task(), LoopSettings(7, log_every=3), tmp_path, lambda row: observed.append(dict(row)))
    assert [row["step"] for row in observed] == [3, 6, 7]  # and the last step, whatever log_every
    assert observed == rows(tmp_path)
    for row in observed:
        assert {"steps", "time", "loss", "lr", "grad_norm", "images_per_s", "mse", "kl"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values()) and row["images_per_s"] > 0


def test_what_the_meter_reads_is_in_every_row(tmp_path):
    """A trial adds its processor and memory figures there."""
    fit(flow_task(), loop(2), tmp_path, meter=lambda: {"system/rss_mb": 5.0})
    assert [row["system/rss_mb"] for row in rows(tmp_path)] == [5.0, 5.0]


class Breaking:
    """A task that is sound until ``step`` and then breaks."""

    batch = 1

    def __init__(self, step, how):
        self.module = torch.nn.Linear(2, 1)
        torch.nn.init.ones_(self.module.weight)
        torch.nn.init.zeros_(self.module.bias)
        self.step, self.how = step, how

    def loss(self, step):
        loss = self.module(torch.ones(1, 2)).square().mean()
        if step == self.step:
            # The square root at zero: a finite loss with an infinite gradient.
            loss = torch.sqrt(loss * 0) if self.how == "gradient" else loss * float(self.how)
        return loss, {}


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(how, tmp_path):
    task = Breaking(3, how)
    with pytest.raises(NonFiniteLoss, match=r"step 4: .*train.learning_rate=0.003") as error:
        fit(task, loop(optimiser="adamw"), tmp_path)
    assert ("nan" in str(error.value)) or ("inf" in str(error.value))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    tensors, about = load_tensors(tmp_path / CHECKPOINT)
    assert about == {"step": 3, "skipped": 0, "best": None, "best_step": None}
    assert all(value.isfinite().all() for value in tensors.values())
    assert torch.equal(tensors["model.weight"], task.module.weight)


@every_optimiser
def test_a_tiny_task_is_learned(optimiser, tmp_path):
    task = flow_task(batch=4, caption_dropout=0.0)
    before = validation_loss(task)
    fit(task, loop(60, optimiser, 1e9, learning_rate=1e-2, ema=0.9), tmp_path)
    assert before > 1.5 and validation_loss(task) < 0.8 * before
    losses = [row["loss"] for row in rows(tmp_path)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_vae_learns(tmp_path):
    fit(vae_task(), loop(60, "adamw", 1e9, learning_rate=1e-2), tmp_path)
    mse = [row["mse"] for row in rows(tmp_path)]
    assert sum(mse[-5:]) < 0.8 * sum(mse[:5])


def test_the_module_ends_with_the_averaged_weights(tmp_path):
    module = fit(flow_task(), loop(), tmp_path)
    tensors, _ = load_tensors(tmp_path / CHECKPOINT)
    assert not module.training
    for name, value in module.named_parameters():
        assert torch.equal(value, tensors[f"average.{name}"])
    assert any(not torch.equal(value, tensors[f"model.{name}"]) for name, value in module.named_parameters())


def test_the_average_is_exponential_with_a_warm_up(tmp_path):
    task, seen = Breaking(-1, "none"), []
    start = task.module.weight.detach().clone()
    settings = loop(optimiser="adamw", ema=0.2)
    module = fit(task, settings, tmp_path, lambda row: seen.append(task.module.weight.detach().clone()))
    expected = start
    for step, weight in enumerate(seen):
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(module.weight, expected)


def test_a_small_clip_limits_the_gradient_not_its_logged_norm(tmp_path):
    norms = []
    for clip in (1e9, 1e-3):
        task = Breaking(-1, "none")
        fit(task, LoopSettings(1, OptimiserSettings("adamw", clip=clip), log_every=1), tmp_path / str(clip))
        norms.append(rows(tmp_path / str(clip))[0]["grad_norm"])
    assert norms[0] == norms[1] > 1


@pytest.mark.parametrize("keep", [0, 4, 9, 0.5, -1], ids=["empty", "4 bytes", "9 bytes", "half", "all but one byte"])
def test_a_truncated_checkpoint_is_refused(keep, tmp_path):
    fit(flow_task(), loop(2, keep=1), tmp_path)
    path = tmp_path / CHECKPOINT
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=CHECKPOINT):
        load_tensors(path)
    with pytest.warns(RuntimeWarning, match=CHECKPOINT), pytest.raises(ValueError, match="no readable checkpoint"):
        fit(flow_task(), loop(), tmp_path)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign"):
        load_tensors(tmp_path / "foreign.safetensors")


def test_checkpoints_round_trip_and_leave_nothing_behind(tmp_path):
    tensors = {"a": torch.randn(2, 3).T, "b": torch.tensor(3), "shared": torch.ones(4)[:2]}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "note": "é"})
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": 4, "note": "é"})
    loaded, about = load_tensors(tmp_path / "x.safetensors")
    assert about == {"step": 4, "note": "é"}
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_learning_rate_rises_stays_and_falls():
    settings = OptimiserSettings(learning_rate=2.0, warmup=0.1, decay=0.4)
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10:60] == [2.0] * 50
    assert rates[60:] == pytest.approx([2.0 * (40 - k) / 40 for k in range(40)])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_learning_rate_of_short_runs_is_positive(steps):
    rates = [learning_rate_at(step, steps, OptimiserSettings()) for step in range(steps)]
    assert all(0 < rate <= OptimiserSettings().learning_rate for rate in rates)


def test_muon_takes_the_matrices_of_linear_layers_only():
    model = small_model()
    muon, adamw = Optimisers(model, OptimiserSettings("muon")).parts
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert names == {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    rest = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert taken.isdisjoint(rest) and taken | rest == {id(p) for p in model.parameters()}
    assert len(Optimisers(model, OptimiserSettings("adamw")).parts) == 1


@every_optimiser
def test_weight_decay_spares_vectors(optimiser):
    model = small_model()
    for part in Optimisers(model, OptimiserSettings(optimiser, weight_decay=0.3)).parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0)


def test_batches_are_epochs_of_permutations():
    count, batch = 10, 4
    drawn = torch.cat([batch_indices(count, batch, 0, step) for step in range(5)]).view(2, count)
    assert all(epoch.sort().values.tolist() == list(range(count)) for epoch in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(batch_indices(count, batch, 0, 0), batch_indices(count, batch, 1, 0))
    assert batch_indices(3, 7, 0, 2).bincount(minlength=3).tolist() in ([2, 2, 3], [2, 3, 2], [3, 2, 2])


def test_pixels_become_images():
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    torch.testing.assert_close(to_images(pixels).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_dropped_captions_do_not_matter():
    plain, other = flow_task(caption_dropout=1.0), flow_task(caption_dropout=1.0)
    other.captions = other.captions.flip(0)
    for task in (plain, other):
        wake(task.module)
    assert torch.equal(plain.loss(0)[0], other.loss(0)[0])
    plain.caption_dropout = other.caption_dropout = 0.0
    assert not torch.equal(plain.loss(0)[0], other.loss(0)[0])


def test_loss_is_addressed_by_the_step():
    task = flow_task()
    values = [task.loss(step)[0].item() for step in (0, 1, 2)]
    assert [flow_task().loss(step)[0].item() for step in (2, 1, 0)] == values[::-1]
    assert len(set(values)) == 3
    assert flow_task(seed=1).loss(0)[0].item() != values[0]


def test_validation_ignores_dropout_and_weights():
    plain = validation_loss(flow_task())
    assert validation_loss(flow_task(caption_dropout=1.0, loss_weight="odds")) == plain
    assert validation_loss(flow_task(batch=4)) != plain
