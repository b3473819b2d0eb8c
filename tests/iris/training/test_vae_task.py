"""The VAE's losses and its stage: bands, LPIPS, the two players' gradients, and runs that resume with all of them."""

import contextlib
import json
import multiprocessing
import os
import socket

import pytest
import torch
import torchvision
from torch.overrides import TorchFunctionMode

from iris.errors import SettingError
from iris.io.pixels import to_images
from iris.io.tensors import load_tensors
from iris.latents import build_latent
from iris.latents.discriminator import (
    AdversarialOptions,
    AdversarialVAE,
    PatchDiscriminator,
    frozen_logits,
    gradient_ratio,
    hinge_discriminator,
    hinge_generator,
    last_weight,
)
from iris.latents.haar import dwt
from iris.latents.losses import BANDS, ReconstructionOptions, band_loss, band_psnr, psnr, score, vae_loss
from iris.latents.perceptual import NETS, PerceptualOptions, backbone_file, load_lpips
from iris.randomness import addressed, initialise
from iris.training.checkpoint import CHECKPOINT
from iris.training.loop import METRICS, LoopSettings, Share, fit
from iris.training.optimiser import OptimiserSettings
from iris.training.vae_task import VAETask

STEPS = 6
PLAYERS = {"weight": 0.3, "width": 8, "layers": 2}
FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}


def pictures(count=24, size=16, seed=0):
    """uint8 pictures: a plane of colour with a soft disc on it and a stripe."""
    draws = torch.rand(count, 12, 1, 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    plane = 0.4 * (draws[:, :3] + draws[:, 3:6] * x + draws[:, 6:9] * y)
    disc = torch.exp(-4 * ((x - 0.5 * draws[:, 9:10]) ** 2 + (y - 0.5 * draws[:, 10:11]) ** 2))
    stripe = ((x * 4).floor() % 2) * 0.3 * draws[:, 3:4]
    images = (plane + disc * draws[:, [11, 0, 4]] + stripe).clamp(-1, 1)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def small_task(name="wavelet_vae", batch=6, seed=0, kl_weight=1e-4, detail_weight=0.5, size=16, **changes):
    vae = initialise(build_latent(name, channels=4, width=16), 0)
    return VAETask(vae, pictures(size=size), batch, seed, kl_weight, detail_weight, **changes)


def constant(**changes):
    return AdversarialOptions(**PLAYERS | changes)


def adaptive(**changes):
    return constant(balance="adaptive", **changes)


def loop(steps=STEPS, checkpoint_seconds=0.0, learning_rate=3e-3, **changes):
    return LoopSettings(
        steps, OptimiserSettings("adamw", learning_rate), log_every=1, checkpoint_seconds=checkpoint_seconds, **changes
    )


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def state_of(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max() for name in one) / max(x.abs().max() for x in other.values())


def posterior_noise(task, step):
    """What the task draws, by the address that finished trials used."""
    shape = (task.batch, task.vae.channels, *task.vae.grid(*task.pixels.shape[1:3]))
    return torch.randn(shape, generator=addressed(task.seed, "posterior", step))


# Bands


def pyramid(difference, levels):
    """[(band name, coefficients)] by PyWavelets."""
    pywt = pytest.importorskip("pywt")
    average, *details = pywt.wavedec2(difference.numpy(), "haar", level=levels, axes=(-2, -1))
    found = [("cA", average), *(named for bands in details for named in zip(BANDS[1:], bands, strict=True))]
    return [(name, torch.from_numpy(band)) for name, band in found]


def noise_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_bands_weight_counts_its_coefficients_at_every_level(levels, norm):
    difference = noise_of(2, 3, 16, 24) + torch.linspace(0, 3, 24)
    measure = torch.abs if norm == "l1" else torch.square
    weights = (0.7, 1.1, 1.9, 2.3)
    sums = dict.fromkeys(BANDS, 0.0)
    for name, band in pyramid(difference, levels):
        sums[name] += measure(band).sum()
    for number, name in enumerate(BANDS):
        alone = tuple(weights[number] * (k == number) for k in range(4))
        expected = weights[number] * sums[name] / difference.numel()
        torch.testing.assert_close(band_loss(difference, alone, levels, norm), expected)
    together = sum(weight * sums[name] for weight, name in zip(weights, BANDS, strict=True)) / difference.numel()
    torch.testing.assert_close(band_loss(difference, weights, levels, norm), together)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_equal_weights_are_the_pixels_squared_error_but_not_their_absolute_one(levels):
    difference = noise_of(2, 3, 16, 24).cumsum(-1)
    torch.testing.assert_close(band_loss(difference, (1.0,) * 4, levels, "l2"), difference.square().mean())
    assert band_loss(difference, (1.0,) * 4, levels, "l1") < 0.9 * difference.abs().mean()


def test_detail_weight_is_a_special_case():
    difference = noise_of(2, 3, 8, 8)
    details = dwt(difference)[:, 3:].abs().mean()
    torch.testing.assert_close(band_loss(difference, (0.0, 2.0, 2.0, 2.0)), 1.5 * details)


@pytest.mark.parametrize(
    "options",
    [
        {"bands": (0.5, 1.0, 2.0, 3.0), "levels": 2},
        {"bands": (0.0, 1.0, 1.0, 1.0), "norm": "l2"},
        {"l1": 0.0},
        {"l2": 0.0},
    ],
    ids=str,
)
def test_terms_of_the_reconstruction(options):
    vae = small_task().vae
    chosen, x = ReconstructionOptions(**options), to_images(pictures(4))
    noise = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    loss, extras, reconstruction = score(vae, x, noise, 0.0, 0.0, chosen)
    difference = reconstruction - x
    expected = chosen.l1 * difference.abs().mean() + chosen.l2 * difference.square().mean()
    expected = expected + band_loss(difference, chosen.bands, chosen.levels, chosen.norm)
    torch.testing.assert_close(loss, expected)
    assert extras.keys() == {"mse", "kl"} and loss.item() > 0


@pytest.mark.parametrize("name", ["wavelet_vae", "conv_vae"])
def test_by_default_the_loss_is_that_of_finished_trials_bit_by_bit(name):
    """Their formula, written out as it was."""
    task = small_task(name)
    assert task.module is task.vae
    for step in (0, 3):
        images, vae = to_images(task.pixels[task.rows(step)]), task.vae
        mean, log_variance = vae.posterior(images)
        reconstruction = vae.synthesise(mean + (log_variance / 2).exp() * posterior_noise(task, step))
        difference = reconstruction - images
        details = dwt(difference, 1)[:, images.shape[1] :]
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        mse = difference.square().mean()
        expected = difference.abs().mean() + mse + 0.5 * details.abs().mean() + 1e-4 * kl
        expected.backward()
        wanted = gradients(vae)
        for found, extras in (task.loss(step), vae_loss(vae, images, posterior_noise(task, step), 1e-4, 0.5)):
            found.backward()
            got = gradients(vae)
            assert torch.equal(found, expected) and torch.equal(extras["mse"], mse) and torch.equal(extras["kl"], kl)
            assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
            assert list(extras) == ["mse", "kl"]


# LPIPS


def save_backbone(net, path, seed=0):
    """A random backbone as torchvision publishes it, classifier included (as one stored number a tensor)."""
    draws = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = getattr(torchvision.models, NETS[net].model)(weights=None)
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith("features."):
            state[name] = torch.zeros(1).expand(value.shape)
        elif name.endswith("weight"):
            state[name] = torch.randn(value.shape, generator=draws) * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = 0.1 * torch.randn(value.shape, generator=draws)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    return {net: save_backbone(net, folder / FILES[net]) for net in NETS}


@pytest.fixture
def hub(backbones, monkeypatch):
    """torch.hub's folder has both files, and there is no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(backbones["vgg"].parents[1]))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *given, **named: pytest.fail("a download"))


def pair(size):
    x = to_images(pictures(3, size))
    return x, x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_torchmetrics_own(net, backbones, hub, monkeypatch):
    from torchmetrics.functional.image import lpips as theirs

    def features(name, pretrained=False):
        with torch.device("meta"):
            found = getattr(torchvision.models, name)(weights=None).features
        stored = torch.load(backbones[net], weights_only=True)
        stored = {key.removeprefix("features."): value for key, value in stored.items() if "features" in key}
        found.load_state_dict(stored, assign=True)
        return found

    if net == "vgg":  # the whole of it, classifier included, takes torchvision seconds
        monkeypatch.setattr(theirs, "_get_tv_model_features", features)
    x, y = pair(32)
    state = torch.get_rng_state()
    ours = load_lpips(PerceptualOptions(1.0, net))
    assert torch.equal(torch.get_rng_state(), state)
    reference = theirs._NoTrainLpips(net=net)
    y.requires_grad_()
    expected, found = reference(x, y).mean(), ours(y, x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found > 0.01 and ours(x, x) == 0
    slopes = [torch.autograd.grad(value, y)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-7)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    clipped = y.detach().clamp(-1, 1)
    if net == "alex":  # through torchvision's own loading of the file in the hub's folder
        functional = theirs.learned_perceptual_image_patch_similarity(clipped, x, net_type=net)
        torch.testing.assert_close(ours(clipped, x), functional)


def test_the_backbone_may_lie_elsewhere(backbones, hub, tmp_path):
    x, y = pair(32)
    cached = load_lpips(PerceptualOptions(1.0, "alex"))(y, x)
    other = load_lpips(PerceptualOptions(1.0, "alex", str(save_backbone("alex", tmp_path / "other.pth", seed=1))))
    assert other(y, x) != cached
    from safetensors.torch import save_file

    stored = torch.load(backbones["alex"], weights_only=True)
    save_file({name: value for name, value in stored.items() if "features" in name}, tmp_path / "mine.safetensors")
    assert load_lpips(PerceptualOptions(1.0, "alex", str(tmp_path / "mine.safetensors")))(y, x) == cached


@pytest.mark.parametrize("net", NETS)
def test_a_missing_backbone_is_named_with_where_to_put_it(net, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SettingError) as error:
        small_task(size=32, perceptual=PerceptualOptions(0.5, net))
    for part in (
        "perceptual.weight=0.5",
        f"perceptual.net={net}",
        "perceptual.source",
        FILES[net],
        str(tmp_path / "checkpoints"),
    ):
        assert part in str(error.value)
    with pytest.raises(SettingError, match=r"perceptual.source='/nowhere.pth' is no file"):
        backbone_file(PerceptualOptions(0.5, net, "/nowhere.pth"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["text", "empty", "alex"])
def test_a_file_that_is_no_such_backbone_is_refused(content, backbones, tmp_path):
    path = tmp_path / "vgg.pth"
    path.write_bytes({"text": b"not a model", "empty": b"", "alex": backbones["alex"].read_bytes()}[content])
    with pytest.raises(SettingError, match=r"perceptual.source: .*vgg.pth does not hold torchvision's vgg16"):
        load_lpips(PerceptualOptions(1.0, "vgg", str(path)))


def test_a_file_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(SettingError):
        load_lpips(PerceptualOptions(1.0, "vgg", str(tmp_path / "evil.pth")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_image_of_a_backbone(net, backbones):
    options, least = PerceptualOptions(1.0, net, str(backbones[net])), NETS[net].smallest
    assert load_lpips(options)(torch.zeros(1, 3, least, least), torch.ones(1, 3, least, least)).isfinite()
    with pytest.raises(RuntimeError):
        load_lpips(options)(torch.zeros(1, 3, least - 1, least), torch.ones(1, 3, least - 1, least))


# The two players


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge_generator(fake).item() == pytest.approx(1 / 3)
    assert hinge_discriminator(torch.tensor([1.0]), torch.tensor([-1.0])).item() == 0


@pytest.mark.parametrize(("size", "layers"), [(16, 2), (32, 3), (24, 3), (64, 3)])
def test_a_logit_belongs_to_a_patch(size, layers):
    discriminator = initialise(PatchDiscriminator(8, layers), 0)
    logits = discriminator(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 1, size // 2**layers - 2, size // 2**layers - 2)


def test_a_logit_does_not_depend_on_the_rest_of_the_batch():
    discriminator, x = initialise(PatchDiscriminator(8, 2), 0), to_images(pictures(6))
    torch.testing.assert_close(discriminator(x)[2:3], discriminator(x[2:3]), rtol=1e-5, atol=1e-6)
    assert discriminator(x).std() > 0.05


def test_three_layers_see_seventy_pixels():
    """The PatchGAN of the paper; without the norm, which mixes a group's positions."""
    discriminator = initialise(PatchDiscriminator(8, 3), 0)
    plain = torch.nn.Sequential(*(part for part in discriminator.layers if not isinstance(part, torch.nn.GroupNorm)))
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    plain(x)[0, 0, 6, 6].backward()
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_each_player_gets_its_own_gradient_and_no_other():
    task = small_task(adversarial=constant())
    vae, discriminator = task.module.vae, task.module.discriminator
    images, noise = to_images(task.pixels[task.rows(0)]), posterior_noise(task, 0)
    total, extras = task.loss(0)
    total.backward()
    together = gradients(task.module)

    loss, _, reconstruction = score(vae, images, noise, 1e-4, 0.5)
    fooled = hinge_generator(frozen_logits(discriminator, reconstruction))
    (loss + 0.3 * fooled).backward()
    assert not any(p.grad is not None for p in discriminator.parameters())
    own = gradients(vae)
    hinge_discriminator(discriminator(images), discriminator(reconstruction.detach())).backward()
    assert not any(p.grad is not None for p in vae.parameters())
    theirs = gradients(discriminator)

    named = {f"vae.{k}": v for k, v in own.items()} | {f"discriminator.{k}": v for k, v in theirs.items()}
    assert distance(together, named) < 1e-6
    assert all(v.abs().max() > 0 for k, v in theirs.items() if k.endswith("weight"))
    score(vae, images, noise, 1e-4, 0.5).loss.backward()
    assert distance(own, gradients(vae)) > 1e-3
    torch.testing.assert_close(total, loss + 0.3 * fooled)
    torch.testing.assert_close(extras["generator"], fooled.detach())
    assert extras["adversarial_weight"] == pytest.approx(0.3) and 0 < extras["discriminator"] < 3


def test_an_ascending_discriminator_lowers_its_loss_and_a_vae_its_own():
    """The signs: a small step along each player's gradient."""
    task = small_task(
        kl_weight=0.0, detail_weight=0.0, reconstruction=ReconstructionOptions(0.0, 0.0), adversarial=constant()
    )
    before = task.loss(0)
    before[0].backward()
    for moved, lowered in ((task.module.vae, "generator"), (task.module.discriminator, "discriminator")):
        with torch.no_grad():
            for p in moved.parameters():
                p.sub_(1e-3 * p.grad)
        after = task.loss(0)[1]
        assert after[lowered] < before[1][lowered]
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(1e-3 * p.grad)


@pytest.mark.parametrize("name", ["wavelet_vae", "conv_vae"])
def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer(name):
    task = small_task(name, adversarial=adaptive())
    vae = task.vae
    images = to_images(task.pixels[task.rows(0)])
    last = (vae.decoder[-1] if name == "wavelet_vae" else vae.back[-2]).weight
    assert last_weight(vae) is last
    found = []
    for which in range(2):
        loss, _, reconstruction = score(vae, images, posterior_noise(task, 0), 1e-4, 0.5)
        (loss if which == 0 else -task.module.discriminator(reconstruction).mean()).backward()
        found.append(last.grad.double().square().sum().sqrt().item())
        task.module.zero_grad()
    ratio = 0.3 * found[0] / (found[1] + 1e-4)
    total, extras = task.loss(0)
    assert extras["adversarial_weight"].item() == pytest.approx(ratio, rel=1e-4)
    assert not extras["adversarial_weight"].requires_grad
    torch.testing.assert_close(total, loss + ratio * extras["generator"], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in task.module.parameters())


def test_the_adaptive_weight_is_bounded():
    weight = torch.ones(2, requires_grad=True)
    assert gradient_ratio((3e9 * weight).sum(), (0 * weight).sum(), weight) == 1e4
    assert gradient_ratio((6 * weight).sum(), (3 * weight).sum(), weight).item() == pytest.approx(2, rel=1e-4)


def test_before_its_start_the_term_is_not_there():
    task, plain = small_task(adversarial=constant(start=2)), small_task()
    for step in (0, 1, 2):
        loss, extras = task.loss(step)
        assert (extras.keys() == {"mse", "kl"}) == (step < 2) == torch.equal(loss, plain.loss(step)[0])


def test_the_discriminators_rate_is_its_own():
    """An Adam step moves its weights ``rate`` times as far, and it starts as the same function."""
    x = to_images(pictures(4))
    moved, outputs = [], []
    for rate in (1.0, 0.25):
        discriminator = initialise(PatchDiscriminator(8, 2, rate), 0)
        convolution = discriminator.layers[0]
        start = rate * convolution.weight.detach().clone()
        optimiser = torch.optim.AdamW(discriminator.parameters(), lr=1e-3, weight_decay=0)
        outputs.append(discriminator(x).detach())
        hinge_generator(discriminator(x)).backward()
        optimiser.step()
        moved.append(rate * convolution.weight.detach() - start)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=0.02, atol=1e-6)


# Parts and precision


@pytest.mark.parametrize("of", [2, 3])
def test_the_mean_over_parts_is_the_whole(of, backbones):
    bands = ReconstructionOptions(bands=(0.5, 1.0, 1.0, 2.0), levels=2)
    task = small_task(
        reconstruction=bands,
        adversarial=constant(),
        perceptual=PerceptualOptions(0.5, "vgg", str(backbones["vgg"])),
        validation=pictures(5, seed=1),
        band_psnr_every=2,
    )
    for step in (0, 3):
        whole, extra = task.loss(step)
        whole.backward()
        expected = gradients(task.module)
        parts = [task.loss(step, Share(index, of)) for index in range(of)]
        torch.testing.assert_close(torch.stack([loss for loss, _ in parts]).mean(), whole, rtol=1e-5, atol=0)
        assert all(values.keys() == extra.keys() for _, values in parts)
        for kind in extra:
            mean = torch.stack([values[kind] for _, values in parts]).mean()
            torch.testing.assert_close(mean, extra[kind], rtol=1e-4, atol=1e-5)
        (sum(loss for loss, _ in parts) / of).backward()
        assert distance(gradients(task.module), expected) < 1e-5
        assert parts[0][0].item() != parts[1][0].item()


def test_an_adaptive_weight_cannot_be_accumulated(tmp_path):
    with pytest.raises(SettingError, match="compute.accumulate=2 must be 1 with adversarial.balance=adaptive"):
        fit(small_task(adversarial=adaptive(start=50)), loop(accumulate=2), tmp_path)


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train_as(rank, port, folder):
    """One process of two; a fresh one, since autograd refuses to work in a fork of a process that has used it."""
    torch.set_num_threads(1)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    fit(small_task(adversarial=adaptive()), loop(checkpoint_seconds=1e9), folder)


@pytest.mark.slow
def test_two_processes_follow_one_with_an_adaptive_weight(tmp_path):
    """Each sees half of the batch; the weight is that of all of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fit(small_task(adversarial=adaptive()), loop(checkpoint_seconds=1e9), tmp_path / "one")
    port, spawn = free_port(), multiprocessing.get_context("spawn")
    pair = [spawn.Process(target=train_as, args=(rank, port, tmp_path / "two")) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    torch.set_num_threads(threads)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for name in ("loss", "mse", "generator", "discriminator", "adversarial_weight"):
        assert [row[name] for row in two] == pytest.approx([row[name] for row in one], rel=1e-4), name


def test_bf16_trains_and_is_finite(tmp_path):
    curves = []
    for precision in ("no", "bf16"):
        fit(small_task(adversarial=constant()), loop(3, precision=precision), tmp_path / precision)
        curves.append([row["loss"] for row in rows(tmp_path / precision)])
    assert curves[0] != curves[1] and curves[1] == pytest.approx(curves[0], rel=0.05)


# Runs


def interrupt_at(step):
    def observe(row):
        if row["step"] == step:
            raise KeyboardInterrupt

    return observe


@pytest.mark.parametrize("adversarial", [constant(start=2, rate=0.5), adaptive(start=3)], ids=["constant", "adaptive"])
def test_resumed_is_uninterrupted_with_both_players(adversarial, tmp_path):
    """Cut before the term starts, and after; the discriminator and its optimiser's state are resumed too."""

    def task():
        return small_task(adversarial=adversarial, validation=pictures(4, seed=1), band_psnr_every=2)

    fit(whole := task(), loop(), tmp_path / "whole")
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            fit(task(), loop(), tmp_path / "cut", interrupt_at(step))
    fit(cut := task(), loop(), tmp_path / "cut")
    one, other = state_of(whole.module), state_of(cut.module)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.startswith("discriminator.") for name in one)
    for name in ("loss", "mse", "grad_norm", "discriminator", "adversarial_weight", "band_psnr/cD"):
        assert [row.get(name) for row in rows(tmp_path / "cut")] == [row.get(name) for row in rows(tmp_path / "whole")]
    first = "discriminator.layers.0.weight"
    assert not torch.equal(one[first], task().module.state_dict()[first])


def test_the_latent_to_keep_is_without_discriminator_and_backbone(hub, tmp_path):
    task = small_task(adversarial=constant(), perceptual=PerceptualOptions(0.1), size=16)
    trained = fit(task, loop(1), tmp_path)
    assert isinstance(trained, AdversarialVAE) and trained.vae is task.vae
    fresh = build_latent("wavelet_vae", channels=4, width=16)
    assert task.vae.state_dict().keys() == fresh.state_dict().keys()
    fresh.load_state_dict(task.vae.state_dict())
    tensors, _ = load_tensors(tmp_path / CHECKPOINT)
    held = {name.split(".")[1] for name in tensors if name.startswith(("model.", "average."))}
    assert held == {"vae", "discriminator"}


def test_the_discriminators_draws_are_addressed():
    tasks = [small_task(seed=seed, adversarial=constant()) for seed in (0, 0, 1)]
    one, same, other = (state_of(task.module.discriminator) for task in tasks)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])


def test_sub_band_psnr_is_logged_on_the_same_images(tmp_path):
    held_out = pictures(7, seed=1)
    task = small_task(validation=held_out, band_psnr_every=2)
    fit(task, loop(4, validate_every=4), tmp_path)
    logged = rows(tmp_path)
    assert [[f"band_psnr/{name}" in row for name in BANDS] for row in logged] == [[k % 2 == 0] * 4 for k in range(1, 5)]
    task.module.eval()
    images = to_images(held_out)
    with torch.no_grad():
        reconstruction = task.vae.decode(task.vae.encode(images))
    expected = band_psnr(images, reconstruction)
    _, extras = task.loss(1)
    assert {name: extras[f"band_psnr/{name}"].item() for name in BANDS} == pytest.approx(expected, abs=1e-3)
    assert logged[-1]["validation"] == pytest.approx((reconstruction - images).square().mean().item(), rel=1e-4)


TERMS = {
    "plain": {},
    "bands": {"detail_weight": 0.0, "reconstruction": ReconstructionOptions(1.0, 0.0, (1.0, 1.5, 1.5, 2.0), 2)},
    "bands alone": {"detail_weight": 0.0, "reconstruction": ReconstructionOptions(0.0, 0.0, (1.0,) * 4, 2, "l2")},
    "perceptual": {"perceptual": PerceptualOptions(0.5, "vgg")},
    "constant": {"adversarial": constant(weight=0.05, start=15, rate=0.1)},
    "adaptive": {"adversarial": adaptive(weight=0.1, start=15, rate=0.1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_psnr_rises_with_each_term(name, hub, tmp_path):
    task = small_task(validation=pictures(16, seed=1), **TERMS[name])
    before = psnr(task.validate())
    fit(task, loop(45, 1e9, 1e-2, ema=0.9), tmp_path)
    assert psnr(task.validate()) > before + 3, (before, psnr(task.validate()))
    if "adversarial" in TERMS[name]:
        assert rows(tmp_path)[-1]["discriminator"] < 1.2


@pytest.mark.slow
def test_blocks_of_both_players_can_be_compiled(monkeypatch, tmp_path):
    """With a backend that runs the traced graph as it is; the discriminator is traced with and without its weights."""

    def compile_plainly(block):
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_plainly)
    ends = []
    for chosen in (False, True):
        task = small_task(adversarial=constant())
        fit(task, loop(2, compile=chosen), tmp_path / str(chosen))
        ends.append(state_of(task.module))
    assert distance(ends[1], ends[0]) < 1e-5


def test_terms_that_are_off_cost_nothing():
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    small_task().loss(0)  # what is made once in a process
    counts = []
    for task in (small_task(), small_task(adversarial=constant(start=9), validation=pictures(4), band_psnr_every=9)):
        with Counting() as counting:
            task.loss(0)
        counts.append(counting.calls)
    assert counts[0] == counts[1]


# Settings


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ReconstructionOptions(l1=-1.0), "reconstruction.l1=-1.0"),
        (lambda: ReconstructionOptions(bands=(1.0, 2.0)), "reconstruction.bands=.*cA, cH, cV, cD"),
        (lambda: ReconstructionOptions(bands=(1.0, float("nan"), 1.0, 1.0)), r"reconstruction.bands \(cH\)"),
        (lambda: ReconstructionOptions(levels=0), "reconstruction.levels=0"),
        (lambda: ReconstructionOptions(norm="l3"), "reconstruction.norm='l3'.*l1, l2"),
        (lambda: PerceptualOptions("much"), "perceptual.weight='much'"),
        (lambda: PerceptualOptions(1.0, "squeeze"), "perceptual.net='squeeze'.*vgg, alex"),
        (lambda: AdversarialOptions(weight=float("inf")), "adversarial.weight=inf"),
        (lambda: AdversarialOptions(balance="none"), "adversarial.balance='none'.*constant, adaptive"),
        (lambda: AdversarialOptions(start=-1), "adversarial.start=-1"),
        (lambda: AdversarialOptions(rate=0), "adversarial.rate=0"),
        (lambda: AdversarialOptions(width=12), "adversarial.width=12.*8"),
        (lambda: AdversarialOptions(layers=0), "adversarial.layers=0"),
        (lambda: small_task(adversarial=AdversarialOptions(0.1)), "adversarial.layers=3 .*16x16; allowed: at most 2"),
        (lambda: small_task(perceptual=PerceptualOptions(0.1, "alex")), "perceptual.net=alex .*16x16; allowed: vgg"),
        (
            lambda: small_task(reconstruction=ReconstructionOptions(bands=(1.0,) * 4, levels=5)),
            "reconstruction.levels=5 ",
        ),
        (lambda: small_task(band_psnr_every=2), "^band_psnr_every=2 needs validation"),
        (lambda: small_task(band_psnr_every=-2), "^band_psnr_every=-2"),
        (lambda: small_task().validate(), "compute.validate_every"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(make, named):
    with pytest.raises(SettingError, match=named):
        make()


def test_a_message_about_a_step_names_the_terms():
    facts = small_task(adversarial=constant()).describe(3)
    assert facts.settings == {"vae.kl_weight": 1e-4, "vae.detail_weight": 0.5, "adversarial.weight": 0.3}
    assert len(facts.rows) == 6 and facts.size == (16, 16, 3)
