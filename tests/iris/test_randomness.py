"""Addressed randomness: what a draw is does not depend on what else was drawn."""

import hashlib

import pytest
import torch
from small_models import parameters_of, small_config, small_generator, small_model

from iris.nn.generator import Generator
from iris.nn.mixers import MIXERS, build_mixer
from iris.randomness import addressed, image_noise, initialise, seed_of


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_seeds_are_the_hash_of_their_address():
    digest = hashlib.sha256(b"0\x1fnoise\x1f120").digest()
    assert seed_of(0, "noise", 120) == int.from_bytes(digest[:8], "little") // 2


def test_addresses_do_not_run_together():
    addresses = [(0, "a", 12), (0, "a1", 2), (0, "a", 1, 2), (0, "a12"), ("0a", 12), (1, "a", 12), (0, "b", 12)]
    assert len({seed_of(*address) for address in addresses}) == len(addresses)


def test_generators_of_one_address_draw_the_same():
    torch.rand(3)
    first = torch.rand(4, generator=addressed(0, "x"))
    torch.manual_seed(9)
    assert torch.equal(torch.rand(4, generator=addressed(0, "x")), first)
    assert not torch.equal(torch.rand(4, generator=addressed(1, "x")), first)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_image_noise_does_not_depend_on_batching(batch):
    whole = image_noise(5, 10, 7, (2, 3, 4))
    parts = [image_noise(5, 10 + i, min(batch, 7 - i), (2, 3, 4)) for i in range(0, 7, batch)]
    assert whole.shape == (7, 2, 3, 4) and torch.equal(torch.cat(parts), whole)


def test_image_noise_is_unit_gaussian_and_differs_between_images_and_seeds():
    noise = image_noise(0, 0, 200, (64,))
    assert noise.mean().abs() < 0.03 and noise.std().item() == pytest.approx(1, abs=0.03)
    assert len({row[0].item() for row in noise}) == 200
    assert not torch.equal(image_noise(1, 0, 200, (64,)), noise)


@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "grfm"])
def test_generators_share_all_but_their_mixers(mixer):
    one, other = (parameters_of(small_generator(awake=False, core=2, mixer=name)) for name in ("grfm", mixer))
    rest = [{name: p for name, p in of.items() if ".mixer." not in name} for of in (one, other)]
    assert same(*rest) and len(rest[0]) > 20
    assert one.keys() != other.keys()


def test_pathways_start_the_same_in_every_subset():
    whole = parameters_of(initialise(build_mixer("grfm", 16, heads=2), 0))
    for pathway in ("fourier", "recurrence", "spatial"):
        alone = parameters_of(initialise(build_mixer(f"grfm[{pathway}]", 16, heads=2), 0))
        assert all(torch.equal(whole[name], value) for name, value in alone.items())


@pytest.mark.parametrize("part", ["prelude", "core", "coda"])
def test_a_further_block_leaves_the_others_alone(part):
    one, more = (parameters_of(small_generator(awake=False, **{part: count})) for count in (1, 2))
    assert set(one) < set(more)
    assert same(one, {name: more[name] for name in one})


def test_blocks_do_not_start_equal():
    model = small_generator(awake=False, core=2)
    assert not torch.equal(model.core[0].feed_forward.up.weight, model.core[1].feed_forward.up.weight)
    assert not torch.equal(model.core[0].feed_forward.up.weight, small_generator(seed=1).core[0].feed_forward.up.weight)


def test_initialisation_draws_every_parameter():
    """Weights from memory that was not drawn are overwritten, and the result repeats."""
    spoiled = Generator(small_config())
    with torch.no_grad():
        for parameter in spoiled.parameters():
            parameter.fill_(float("nan"))
    initialise(spoiled, 0)
    assert all(p.isfinite().all() for p in spoiled.parameters())
    assert same(parameters_of(spoiled), parameters_of(small_generator(awake=False)))
    assert same(parameters_of(small_model()), parameters_of(small_model()))


def test_initialisation_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = Generator(small_config())
    torch.set_rng_state(before)
    first = parameters_of(initialise(model, 0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert same(parameters_of(initialise(model, 0)), first)


def test_a_module_that_cannot_initialise_is_refused():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.empty(2))

    with pytest.raises(TypeError, match="Own at '0'.*reset_parameters"):
        initialise(torch.nn.Sequential(Own()), 0)
