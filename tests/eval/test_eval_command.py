"""``python -m eval``: what it measures on each kind of subject, what it leaves behind, and how bad input is told."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judge_files import TINY, clip_folder, clip_network, inception_archive, openai_archive
from PIL import Image
from safetensors.torch import save_file
from small_diffusers import SIZE, save_diffusers

from eval.__main__ import main
from eval.compare import loader_of
from eval.judges import JUDGES, load_judge
from eval.stages.features import extract_features
from eval.metrics.fid import frechet_jackknife
from eval.judges.images import to_float
from eval.results import FILES, read_results
from eval.settings import COMPOSER, WHAT, settings_of
from eval.stages import run as running
from eval.stages.data import DrawnWorld, attributes_of, open_data
from eval.stages.samples import make_samples
from eval.subjects import SampleSettings, iris_model, open_subject
from eval.subjects.iris_model import IrisModel
from iris.data import WORLDS
from iris.data.settings import KINDS, READY
from iris.diffusion.sampling import SamplingSettings
from iris.errors import SettingError
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline
from iris.randomness import initialise
from iris.text import ClassLabels, CLIPText, Vocabulary, WordEncoder

SHIPPED = Path(__file__).parents[2] / "iris" / "weights" / "shapes"
N, REAL, FEWER = 32, 128, 16  # of measure=smoke: images, real ones, of other captions
QUICK = ("measure=smoke", "track=none")


def sample_settings(**given):
    return SampleSettings(**dict.fromkeys(SampleSettings.__dataclass_fields__) | {"batch": 4} | given)


def opened(place, kind=None, **sample):
    return open_subject(str(place), kind, sample_settings(**sample), "float32", "cpu")


def numbers_of(folder):
    return {name: number.value for name, number in read_results(folder).numbers.items()}


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    """A folder of its own, no tracking server, no hub, and one thread, so that sums are made in one order."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ran(surroundings):
    """The shipped model measured, tracked in a store of its own: the folder of its results."""
    assert main([f"model={SHIPPED}", "measure=smoke", "track=sqlite:///store.db", "out=ran"]) == 0
    return Path("ran").resolve()


@pytest.fixture(scope="module")
def made(ran):
    """The images and captions that ``ran`` measured, made again by the pipeline itself."""
    captions = WORLDS["shapes"].draw("validation", N, 0).captions
    images = IrisPipeline.from_pretrained(SHIPPED).generate(captions, opened(SHIPPED).settings, seed=0)
    return images, captions


@pytest.fixture(scope="module")
def pictures(made, tmp_path_factory):
    """The same images as a folder of PNG files with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for i, (image, caption) in enumerate(zip(*made, strict=True)):
        Image.fromarray(image.numpy()).save(folder / f"{i:03d}.png")
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


# -- how a saved model is sampled ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The shipped model's weights as those of a consistency student."""
    folder = tmp_path_factory.mktemp("student")
    IrisPipeline(*IrisPipeline.from_pretrained(SHIPPED).parts[:5], SamplingSettings(2, "stochastic"), 2.5).save(folder)
    return folder


def test_a_student_makes_the_images_of_its_own_sampling(student):
    subject = opened(student)
    assert (subject.sampling["steps"], subject.sampling["sampler"], subject.sampling["guidance"]) == (
        2,
        "stochastic",
        1,
    )
    captions = ["a red circle", "a blue square"]
    assert torch.equal(subject.generate(captions, 0, 0), IrisPipeline.from_pretrained(student).generate(captions))
    assert subject.loader("a red circle").argument["sampler"] == "stochastic"
    assert opened(student, steps=1).settings == SamplingSettings(1, "stochastic")


def test_guidance_of_a_student_is_refused(student):
    with pytest.raises(SettingError, match="sample.guidance=3.*guidance 2.5 distilled into its weights"):
        opened(student, guidance=3.0)


def test_a_model_that_says_nothing_takes_four_guided_steps():
    assert opened(SHIPPED).settings == SamplingSettings(4, guidance=3.0)


# -- a saved model --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::eval.metrics.fid.RankDeficientWarning")
def test_the_numbers_are_those_of_the_parts(ran, made):
    images, captions = made
    found, judge, world = read_results(ran).numbers, load_judge("shapes"), WORLDS["shapes"]
    real = extract_features(judge, world.draw("validation", REAL, 0).images)
    fid, error = frechet_jackknife(extract_features(judge, images).values, real.values, N // 2)
    assert found["fid/shapes"].value == pytest.approx(fid, rel=1e-6)
    assert found["fid/shapes"].standard_error == pytest.approx(error, rel=1e-5)
    cosines = 100 * judge.similarity(to_float(images), captions).clamp_min(0)
    prompts = [cosines[[other == caption for other in captions]].mean() for caption in dict.fromkeys(captions)]
    assert found["clip_score/shapes"].value == pytest.approx(float(torch.stack(prompts).mean()), abs=1e-4)
    read = judge.attributes("shapes", to_float(images))
    wanted = world.draw("validation", N, 0).attributes
    for name in ("colour", "shape", "background"):
        share = float((read[name] == torch.as_tensor(wanted[name])).double().mean())
        assert found[f"accuracy_{name}/shapes"].value == pytest.approx(share)


def test_every_number_says_how_it_was_made(ran):
    results = read_results(ran)
    assert {
        "fid",
        "kid",
        "recall",
        "clip_score",
        "accuracy_all",
        "heldout_accuracy_all",
        "accuracy_gap_all",
        "duplicate_share",
    } <= {name.partition("/")[0] for name in results.numbers}
    for name, number in results.numbers.items():
        facts = number.made_with
        assert math.isfinite(number.value) and number.low <= number.value <= number.high, name
        assert number.n > 0 and number.confidence == 0.95 and number.uncertainty, name
        assert (facts["judge"], facts["judge_sha256"]) == ("shapes", load_judge("shapes").sha256), name
        assert facts["images_seed"] == 0 and facts["dtype"] == "float32" and facts["threads"] == 1, name
        assert facts["sampling"]["steps"] == 4 and facts["hardware"]["processor"], name
    fid = results.numbers["fid/shapes"]
    assert (fid.n, fid.reference_n, fid.made_with["split"]) == (N, REAL, "validation")
    assert fid.made_with["data_fingerprint"] == results.data["fingerprint"]
    assert any("rank deficient" in flag for flag in fid.flags)
    assert results.model["nfe"] == opened(SHIPPED).settings.evaluations and results.model["parameters"]["generator"] > 0


def test_the_folder_has_all_files_and_a_row_an_image(ran):
    assert all((ran / name).is_file() for name in FILES)
    with open(ran / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [sum(row["set"] == name for row in rows) for name in ("main", "heldout", "trained")] == [N, FEWER, FEWER]
    cosines = [float(row["cosine"]) for row in rows if row["set"] == "main"]
    assert 100 * np.mean(cosines) == pytest.approx(read_results(ran).details["alignment"]["mean_cosine"] * 100)
    assert all(row["heldout"] == "1" for row in rows if row["set"] == "heldout")
    page, text = (ran / "index.html").read_text(), (ran / "report.md").read_text()
    assert page.count("<figure>") == N and "duplicates.html" in page and "rank deficient" in page
    for word in ("CLIP score", "held-out", "seed 0", f"model={SHIPPED}"):
        assert word in page and word in text


def test_mlflow_has_the_numbers_the_settings_and_the_files(ran):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{Path('store.db').resolve()}")
    experiment = client.get_experiment_by_name("evaluation")
    (run,) = client.search_runs([experiment.experiment_id])
    fid = read_results(ran).numbers["fid/shapes"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["fid/shapes"] == pytest.approx(fid.value)
    assert run.data.metrics["fid_se/shapes"] == pytest.approx(fid.standard_error)
    assert run.data.params["measure.samples"] == str(N) and run.data.tags["judge"] == "shapes"
    assert run.data.tags["model_fingerprint"] == opened(SHIPPED).fingerprint
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == set(FILES)


def test_a_second_call_makes_no_image(ran, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("images were made again")

    monkeypatch.setattr(IrisModel, "generate", refuse)
    assert main([f"model={SHIPPED}", *QUICK, "out=again"]) == 0
    assert numbers_of("again") == numbers_of(ran)
    assert "made by an earlier command" in capsys.readouterr().out


def test_other_sampling_makes_other_images_in_another_folder(ran):
    words = [f"model={SHIPPED}", *QUICK, "sample.steps=1", "sample.guidance=1", "measure.what=quality"]
    before = set(Path("eval_results").glob("*"))
    assert main(words) == 0
    (place,) = set(Path("eval_results").glob("*")) - before
    assert place.name.startswith("shapes-shapes-")
    found = read_results(place)
    assert found.model["nfe"] == 1 and found.numbers["fid/shapes"].value > numbers_of(ran)["fid/shapes"]


def test_images_go_on_where_they_were_stopped(tmp_path):
    captions = WORLDS["shapes"].draw("train", 10, 3).captions
    calls = []

    class Stopping(IrisModel):
        stop = True

        def generate(self, captions, seed, first):
            calls.append(first)
            if self.stop and first == 8:
                raise KeyboardInterrupt
            return super().generate(captions, seed, first)

    subject = Stopping(str(SHIPPED), sample_settings(steps=1), "float32", "cpu")
    with pytest.raises(KeyboardInterrupt):
        make_samples(subject, captions, 10, 0, tmp_path, lambda done, total: None)
    subject.stop = False
    made = make_samples(subject, captions, 10, 0, tmp_path, lambda done, total: None)
    assert calls == [0, 4, 8, 8] and not made.cached
    whole = opened(SHIPPED, steps=1, batch=10).generate(captions, 0, 0)
    assert int((torch.as_tensor(made.images).int() - whole.int()).abs().max()) <= 1  # batch sizes round differently
    again = make_samples(subject, captions, 10, 0, tmp_path, lambda done, total: None)
    assert again.cached and again.sha256 == made.sha256 and np.array_equal(again.images, made.images)


# -- stored images --------------------------------------------------------------------------------------------------


def test_a_models_images_in_a_folder_give_its_numbers(ran, pictures):
    assert main([f"model={pictures}", *QUICK, "out=stored"]) == 0
    found, model = numbers_of("stored"), numbers_of(ran)
    same = [name for name in found if not name.startswith(("heldout", "accuracy_gap", "duplicate"))]
    assert len(same) > 10
    assert {name: found[name] for name in same} == pytest.approx({name: model[name] for name in same}, rel=1e-5)
    results = read_results("stored")
    assert results.model["stored_images"] == N and results.details["duplicates"]["set"] == "main"
    assert "images_seed" not in results.numbers["fid/shapes"].made_with


def test_an_array_file_gives_the_same_numbers_as_the_folder(made, pictures):
    images, captions = made
    np.savez("array.npz", images=images.numpy(), captions=np.asarray(captions))
    floats = (to_float(images)).numpy()
    np.save("floats.npy", floats)
    assert main(["model=array.npz", *QUICK, "out=array"]) == 0
    assert main(["model=floats.npy", *QUICK, "measure.what=quality", "out=floats"]) == 0
    array = numbers_of("array")
    assert "clip_score/shapes" in array
    for name, value in numbers_of("floats").items():
        assert value == pytest.approx(array[name], rel=1e-9)


def test_captions_go_to_images_in_natural_order(tmp_path):
    for i in (1, 2, 10):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "captions.txt").write_text("one\ntwo\nten\n")
    subject = opened(tmp_path)
    assert subject.captions == ["one", "two", "ten"] and subject.size == (16, 16)
    assert subject.generate([None] * 3, 0, 0)[:, 0, 0, 0].tolist() == [1, 2, 10]
    (tmp_path / "captions.txt").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\n10.png,"ten, at last"\n1.png,one\n2.png,two\n')
    assert opened(tmp_path).captions == ["one", "two", "ten, at last"]


def test_what_is_not_possible_is_left_out_with_the_reason(pictures, tmp_path, capsys):
    for i in range(10):
        Image.open(pictures / f"{i:03d}.png").save(tmp_path / f"{i}.jpg")
    assert main([f"model={tmp_path}", *QUICK, "measure.samples=null", "out=bare"]) == 0
    results = read_results("bare")
    assert {name.partition("/")[0] for name in results.numbers} == {
        "fid",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
    }
    assert set(results.not_measured) == {"alignment", "skills", "duplicates"}
    assert "have no captions" in results.not_measured["alignment"]
    assert "stored with loss" in results.notes[0] and "no alignment: " in capsys.readouterr().out


def test_any_clip_scores_free_captions(tmp_path):
    judge = clip_folder(clip_network(TINY), TINY, tmp_path / "clip")
    images = np.random.default_rng(0).integers(0, 256, (12, 40, 56, 3), np.uint8)
    captions = [f"a photo of dog number {i}" for i in range(12)]
    np.savez("dogs.npz", images=images, captions=np.asarray(captions))
    words = [
        "model=dogs.npz",
        *QUICK,
        "measure.samples=null",
        "data=folder",
        f"data.path={tmp_path}",
        "data.size=40",
        "judge=clip",
        f"judge.weights={judge}",
        "judge.prefix='A photo depicts '",
    ]
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a dog\n1.png,two dogs\n")
    assert main([*words, "out=dogs"]) == 0
    results = read_results("dogs")
    assert set(results.numbers) == {"clip_score/clip"}
    assert set(results.not_measured) == {"quality", "skills", "duplicates"}
    assert "56x40 pixels" in results.not_measured["quality"]
    number = results.numbers["clip_score/clip"]
    loaded = load_judge("clip", weights=str(judge), prefix="A photo depicts ")
    wanted = 100 * loaded.similarity(to_float(torch.from_numpy(images)), captions).clamp_min(0)
    assert number.value == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert number.made_with["prefix"] == "A photo depicts " and number.made_with["judge_sha256"] == loaded.sha256


@pytest.fixture
def offline(monkeypatch):
    """No socket connects and no name is looked up."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::eval.metrics.fid.RankDeficientWarning"
)
def test_judge_inception_measures_images_that_are_there(made, tmp_path, offline):
    """From the archive's file to the report, by weights of the published form with other values."""
    images, captions = (part[:12] for part in made)
    np.savez("twelve.npz", images=images.numpy(), captions=np.asarray(captions))
    weights = inception_archive(tmp_path / "inception-2015-12-05.pt")
    words = [
        "model=twelve.npz",
        *QUICK,
        "measure.samples=null",
        "measure.what=quality",
        "measure.reference=16",
        "judge=inception",
        f"judge.weights={weights}",
        "out=inception",
    ]
    assert main(words) == 0
    results, judge = read_results("inception"), load_judge("inception", weights=str(weights))
    real = extract_features(judge, WORLDS["shapes"].draw("validation", 16, 0).images)
    wanted, error = frechet_jackknife(extract_features(judge, images).values, real.values, 6)
    fid = results.numbers["fid/inception"]
    assert (fid.value, fid.standard_error) == pytest.approx((wanted, error), rel=1e-5)
    assert (fid.n, fid.reference_n, fid.made_with["judge_sha256"]) == (12, 16, judge.sha256)
    assert results.details["quality"]["title"] == "FD-Inception (unverified weights)"
    assert {name.partition("/")[2] for name in results.numbers} == {"inception"}
    assert "FD-Inception (unverified weights)" in Path("inception/report.md").read_text()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_judge_clip_vit_b32_scores_images_that_are_there(made, tmp_path, offline):
    """From an archive of ViT-B/32's real shape and format, of 151 million random weights, to the report."""
    import open_clip

    images, captions = (part[:8] for part in made)
    np.savez("eight.npz", images=images.numpy(), captions=np.asarray(captions))
    network = clip_network(open_clip.get_model_config("ViT-B-32-quickgelu"))
    weights = openai_archive(network, tmp_path / "ViT-B-32.pt")
    try:
        assert (
            main(
                [
                    "model=eight.npz",
                    *QUICK,
                    "measure.samples=null",
                    "measure.what=alignment",
                    "judge=clip_vit_b32",
                    f"judge.weights={weights}",
                    "out=clip",
                ]
            )
            == 0
        )
        judge = load_judge("clip_vit_b32", weights=str(weights))
    finally:
        weights.unlink()
    number = read_results("clip").numbers["clip_score/clip_vit_b32"]
    cosines = 100 * judge.similarity(to_float(images), captions).clamp_min(0)
    prompts = [cosines[[other == caption for other in captions]].mean() for caption in dict.fromkeys(captions)]
    assert number.value == pytest.approx(float(torch.stack(prompts).mean()), abs=1e-3)
    assert (number.n, number.made_with["judge_sha256"]) == (8, judge.sha256)
    with open("clip/per_image.csv", newline="") as file:
        assert [100 * max(0.0, float(row["cosine"])) for row in csv.DictReader(file)] == pytest.approx(
            cosines.tolist(), abs=1e-3
        )


# -- what images are made anew for ----------------------------------------------------------------------------------


SHAPE = {
    "channels": 12,
    "text_width": 16,
    "dim": 16,
    "heads": 2,
    "prelude": 1,
    "core": 1,
    "coda": 1,
    "iterations": 1,
    "ffn_ratio": 2.0,
    "mixer": "identity",
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A model whose CLIP and autoencoder lie in folders of their own, named by its config.json."""
    from diffusers import AutoencoderKL

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "iris"))
    from small_clip import save_clip

    def save(seed):
        save_clip(tmp_path / "clip", seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            AutoencoderKL(
                block_out_channels=(8, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ).save_pretrained(tmp_path / "vae")

    save(0)
    text, latent = CLIPText(str(tmp_path / "clip")), build_latent("pretrained", source=str(tmp_path / "vae"))
    model = initialise(TextToLatent(text, Generator(GeneratorConfig(**SHAPE | {"channels": 4}))), 0)
    IrisPipeline(model, latent, "pretrained", {"source": str(tmp_path / "vae")}, 16).save(tmp_path / "model")
    return save


def test_parts_that_lie_elsewhere_count_by_what_they_are(parts, tmp_path):
    from small_clip import save_clip

    def images(name):
        folder, subject = tmp_path / "samples", opened(tmp_path / name, steps=1)
        made = make_samples(subject, ["red", "ice"], 2, 0, folder, lambda done, total: None)
        return subject.fingerprint, made

    first, made = images("model")
    assert images("model")[1].cached
    for part in ("clip", "vae"):  # where they lie does not count
        shutil.copytree(tmp_path / part, tmp_path / f"moved {part}")
    config = (tmp_path / "model" / "config.json").read_text()
    save_clip(tmp_path / "clip", seed=1)
    other, text = images("model")
    assert other != first and not text.cached
    parts(1)
    third, vae = images("model")
    assert third not in (first, other) and not vae.cached and vae.sha256 != made.sha256
    for name in ("clip", "vae"):
        shutil.rmtree(tmp_path / name)
        shutil.copytree(tmp_path / f"moved {name}", tmp_path / name)
    assert images("model")[1].cached and (tmp_path / "model" / "config.json").read_text() == config


def test_another_sampler_in_the_code_makes_images_anew(tmp_path, monkeypatch):
    def made():
        return make_samples(opened(SHIPPED, steps=1), ["a red circle"], 1, 0, tmp_path, lambda done, total: None)

    fingerprint = opened(SHIPPED).fingerprint
    assert not made().cached and made().cached
    monkeypatch.setattr(iris_model, "_package_digest", lambda: "other sources")
    assert not made().cached and opened(SHIPPED).fingerprint == fingerprint  # the model's files are the same


def test_pixels_of_a_broken_decoder_are_not_measured(tmp_path, capsys):
    """Neither NaN, which would be black, nor infinities, which would be clipped."""
    for value in (math.nan, math.inf):
        text = WordEncoder(Vocabulary(["red"], 4), 16, layers=1)
        model = initialise(TextToLatent(text, Generator(GeneratorConfig(**SHAPE | {"channels": 4}))), 0)
        options = {"levels": 1, "stages": 0, "channels": 4, "width": 8}
        latent = initialise(build_latent("wavelet_vae", **options), 0)
        with torch.no_grad():
            for parameter in latent.decoder.parameters():
                parameter.fill_(value)
        IrisPipeline(model, latent, "wavelet_vae", options, 32).save(tmp_path / str(value))
        words = [f"model={tmp_path / str(value)}", *QUICK, "measure.what=quality", f"out={tmp_path / 'out'}"]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"model={tmp_path / str(value)}: the decoder gave values that are not finite in float32" in said
        assert read_results(tmp_path / "out").numbers == {} and not list(
            Path().rglob("runs/eval/samples/nan-*/about.json")
        )


# -- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    return save_diffusers(tmp_path_factory.mktemp("diffusers") / "tiny-sd")


def test_a_diffusers_pipeline_is_measured(diffusers):
    words = [
        f"model={diffusers}",
        *QUICK,
        "measure.what=quality,alignment",
        "measure.samples=10",
        "sample.steps=2",
        "sample.batch=5",
        "out=diffusers",
    ]
    assert main(words) == 0
    results = read_results("diffusers")
    assert results.model["kind"] == "diffusers" and results.model["size"] == [SIZE, SIZE] and results.model["nfe"] == 4
    assert results.model["sampling"] == {
        "pipeline": "StableDiffusionPipeline",
        "scheduler": "DDIMScheduler",
        "steps": 2,
        "guidance": 7.5,
        "height": SIZE,
        "width": SIZE,
    }
    assert set(results.model["parameters"]) == {"unet", "vae", "text_encoder"}
    assert results.numbers["fid/shapes"].n == 10 and results.numbers["fid/shapes"].made_with["sampling"]["steps"] == 2


def test_its_images_depend_on_seed_and_number_alone(diffusers):
    captions = [f"a red circle {i}" for i in range(6)]
    whole = opened(diffusers, steps=1).generate(captions, 0, 0)
    part = opened(diffusers, steps=1, batch=2).generate(captions[3:], 0, 3)
    assert int((whole[3:].int() - part.int()).abs().max()) <= 1  # batch sizes round differently
    other = opened(diffusers, steps=1).generate(captions, 1, 0)
    assert float((whole.float() - other.float()).abs().mean()) > 1


def test_its_networks_are_its_parts(diffusers):
    from eval.subjects.diffusers_measuring import load_for_measuring

    loader = opened(diffusers, steps=3).loader("a red circle", parts=True)
    generate = load_for_measuring(loader.given(batch=2).argument)
    assert {name: part.count for name, part in generate.parts.items()} == {"text_encoder": 2, "unet": 3, "vae": 1}
    assert generate.weights_bytes == sum(part.weights_bytes for part in generate.parts.values())
    assert generate.parts["vae"]()[0].shape == (2, 3, SIZE, SIZE) and generate().shape == (2, SIZE, SIZE, 3)


# -- speed and memory -----------------------------------------------------------------------------------------------


def test_latency_memory_and_caps_of_a_model():
    assert main([f"model={SHIPPED}", *QUICK, "measure.what=latency,memory,caps", "sample.steps=1", "out=speed"]) == 0
    results = read_results("speed")
    assert {
        "latency_ms/batch_1",
        "latency_ms/batch_1/generator",
        "peak_memory_mb",
        "weights_mb/decoder",
        "activations_mb",
    } <= set(results.numbers)
    latency = results.numbers["latency_ms/batch_1"]
    assert latency.low <= latency.value <= latency.high and latency.n == 2 and latency.made_with["threads"] == 1
    size = sum(file.stat().st_size for file in SHIPPED.glob("*.safetensors")) / 1e6
    assert results.numbers["weights_mb"].value == pytest.approx(size, rel=0.02)
    whole = next(one for one in results.details["caps"]["runs"] if one["scope"] == "process")
    assert (whole["cap_mb"], whole["held"]) == (4000, True) and results.judge == {}
    verdicts = {one["name"]: one["verdict"] for one in results.details["targets"]}
    assert verdicts["memory"] == "pass" and verdicts["latency"] == "needs the device"
    assert "Hard caps" in Path("speed/index.html").read_text()


# -- settings and data ----------------------------------------------------------------------------------------------


def test_every_option_of_every_group_composes():
    assert set(COMPOSER.options("data")) == {*KINDS, *READY} and set(COMPOSER.options("judge")) == set(JUDGES)
    for group in COMPOSER.groups:
        for option in COMPOSER.options(group):
            assert settings_of([f"{group}={option}", "model=x"]).model == "x"
    assert settings_of(["model=x", "measure=full"]).measure.what == list(WHAT)
    assert settings_of(["model=x", "measure.what=skills,caps"]).measure.what == ["skills", "caps"]


def test_attributes_are_read_from_captions():
    for world in WORLDS.values():
        drawn = world.draw("all", 50, 1)
        found = attributes_of(world, drawn.captions)
        assert all(np.array_equal(found[name], drawn.attributes[name]) for name in world.attributes)
        assert attributes_of(world, [*drawn.captions, "a dog"]) is None


def test_a_folder_of_real_images_is_a_reference(made, pictures):
    settings = settings_of([f"model={SHIPPED}", "data=folder", f"data.path={pictures}", "data.validation=20"])
    data = open_data(settings.data, 32)
    assert not isinstance(data, DrawnWorld)
    rows = list(data.rows("validation"))
    assert sum(len(part.captions) for part in rows) == 20 and rows[0].images.shape[1:] == (32, 32, 3)
    words = [
        f"model={SHIPPED}",
        *QUICK,
        "data=folder",
        f"data.path={pictures}",
        "data.validation=20",
        "measure.what=quality,duplicates",
        "measure.samples=12",
        "measure.reference=null",
        "measure.duplicates.training=null",
        "out=folder",
    ]
    assert main(words) == 0
    results = read_results("folder")
    assert results.numbers["fid/shapes"].reference_n == 20
    assert (results.details["duplicates"]["training_n"], results.details["duplicates"]["heldout_n"]) == (N - 20, 20)
    assert main(words) == 0  # the number of rows and the features are found again
    assert numbers_of("folder") == {name: number.value for name, number in results.numbers.items()}


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Folders and files with one thing wrong each."""
    root = tmp_path_factory.mktemp("bad")

    def folder(name, sizes=((32, 32),) * 10, mode="RGB", **files):
        place = root / name
        place.mkdir()
        for i, size in enumerate(sizes):
            Image.new(mode, size).save(place / f"{i}.png")
        for file, text in files.items():
            (place / file.replace("_", ".")).write_text(text)

    rows = [json.dumps({"file_name": f"{i}.png", "text": "a"}) for i in range(10)]
    (root / "empty").mkdir()
    folder("none", (), metadata_csv="file_name,text\n")
    folder("captioned", metadata_jsonl="\n".join(rows) + "\n")
    folder("one", ((32, 32),))
    folder("sizes", ((32, 32),) * 9 + ((32, 40),))
    folder("grey", mode="L")
    folder("few", captions_txt="a\n" * 9)
    folder("lacking", metadata_jsonl="\n".join(rows[:8]))
    folder("missing", metadata_jsonl="\n".join([*rows, '{"file_name": "99.png", "text": "a"}']))
    folder("columns", metadata_csv="name,caption\n0.png,a\n")
    folder("wide", ((48, 32),) * 10)
    folder("large", ((64, 64),) * 10)
    folder("broken")
    (root / "broken" / "3.png").write_bytes(b"no picture")
    pixels = np.zeros((10, 3, 32, 32), np.float32)
    np.save(root / "range.npy", pixels + 2)
    pixels[4, 0, 5, 5] = np.nan
    np.save(root / "nan.npy", pixels)
    np.savez(root / "pickled.npz", images=np.asarray([None], object))
    save_file({"a": torch.zeros(2)}, root / "other.safetensors")
    (root / "pipeline").mkdir()
    (root / "pipeline" / "config.json").write_text("{}")
    (root / "sd").mkdir()
    (root / "sd" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return root


MODEL = f"model={SHIPPED}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["model is missing"]),
        (["model=nowhere"], ["model=nowhere", "no such folder or array file"]),
        (["model=owner/name"], ["kind=iris or kind=diffusers"]),
        (["model=owner/name", "kind=diffusers"], ["model=owner/name", "neither a folder nor a pipeline"]),
        (["model={bad}/empty"], ["expected a saved model (config.json)"]),
        (["model={bad}/none"], ["no images in the folder"]),
        (
            ["model={bad}/one", "measure.what=quality"],
            ["quality is not possible", "at least 8 images are needed", "has 1"],
        ),
        (["model={bad}/sizes"], ["the images differ in size", "9 of 32x32, 1 of 32x40"]),
        (["model={bad}/grey"], ["0.png has the colour mode L", "RGB"]),
        (["model={bad}/few"], ["captions.txt has 9 lines for 10 images"]),
        (["model={bad}/lacking"], ["captions: metadata.jsonl has none for 2 of 10 images: 8.png, 9.png"]),
        (["model={bad}/missing"], ["names 1 images that are not there: 99.png"]),
        (["model={bad}/columns"], ["row 1: file_name and text are needed", "name, caption"]),
        (["model={bad}/broken"], ["3.png", "not a picture"]),
        (["model={bad}/wide", "measure.what=quality"], ["48x32 pixels and the real ones 32x32", "data.size"]),
        (["model={bad}/large", "data.size=32", "measure.what=quality"], ["64x64 pixels and the real ones 32x32"]),
        (["model={bad}/nan.npy"], ["1 of 10 hold pixels that are not finite", "number 4"]),
        (["model={bad}/range.npy"], ["must lie in [-1, 1]"]),
        (["model={bad}/pickled.npz"], ["cannot be read as an array"]),
        (["model={bad}/pipeline"], ["model.safetensors is missing"]),
        (["model={bad}/sd"], ["not a pipeline that diffusers can load"]),
        (["model={bad}/grey", "kind=iris"], ["config.json is missing"]),
        ([MODEL, "kind=onnx"], ["kind='onnx'", "iris, exported, diffusers, images"]),
        ([MODEL, "judge=oracle"], ["judge='oracle'", "clip_vit_b32"]),
        ([MODEL, "judge=inception", "judge.weights={bad}/no.pt"], ["judge.weights", "is no file"]),
        ([MODEL, "judge=inception", "judge.weights={bad}/other.safetensors"], ["judge", "other.safetensors"]),
        ([MODEL, "judge=clip_vit_b32", "judge.weights={bad}/other.safetensors"], ["judge", "other.safetensors"]),
        ([MODEL, "judge.model=ViT-B-32"], ["judge shapes takes no judge.model"]),
        ([MODEL, "data=shapes2", "data.split=test"], ["data.split='test'", "train, validation, heldout, all"]),
        ([MODEL, "data=folder"], ["data.path is needed"]),
        ([MODEL, "sample.height=64"], ["sample.height means nothing for kind=iris", "sample.steps"]),
        ([MODEL, "sample.sampler=ddim"], ["sample.sampler='ddim'", "euler"]),
        ([MODEL, "measure.what=fid"], ["measure.what='fid'", "quality, alignment"]),
        ([MODEL, "measure.what=[]"], ["measure.what is empty"]),
        ([MODEL, "measure.quality.metrics=is"], ["measure.quality.metrics='is'", "fid_infinity"]),
        (
            [MODEL, "measure.samples=4", "measure.what=quality"],
            ["quality is not possible", "at least 8 images", "has 4"],
        ),
        (
            [MODEL, "measure.reference=4", "measure.what=quality"],
            ["quality is not possible: reference: at least 8 images", "got 4", "measure.reference=4"],
        ),
        (
            [MODEL, "measure.quality.neighbours=40", "measure.samples=32", "measure.what=quality"],
            ["quality is not possible", "too few for neighbours=40"],
        ),
        (
            [MODEL, "measure.quality.density_neighbours=64", "measure.reference=64", "measure.what=quality"],
            ["density_neighbours=64 needs at least 65 samples, got 64"],
        ),
        (
            [
                "model={bad}/captioned",
                "data=folder",
                "data.path={bad}/captioned",
                "data.validation=4",
                "measure.what=quality",
            ],
            ["at least 8 images are needed for all metrics, got 4", "split validation of data folder"],
        ),
        (
            [
                MODEL,
                "data=folder",
                "data.path={bad}/captioned",
                "data.validation=1",
                "data.split=train",
                "measure.samples=4",
                "measure.what=duplicates",
            ],
            ["at least 2 unseen real images are needed", "gives 1"],
        ),
        (
            [MODEL, "measure.duplicates.quantile=0.01", "measure.duplicates.heldout=64", "measure.what=duplicates"],
            ["at least 100 unseen real images are needed, measure.duplicates.heldout=64", "gives 64"],
        ),
        ([MODEL, "measure.latency.batches=[0]"], ["measure.latency.batches=[0]", "above 0"]),
        ([MODEL, "measure.caps.method=cgroup"], ["measure.caps.group=None", "measure.caps.method=cgroup"]),
        ([MODEL, "device=cuda"], ["device=cuda", "none on this machine"]),
        ([MODEL, "track=ftp://host"], ["track=ftp://host", "scheme 'ftp' is unknown"]),
        ([MODEL, "out={bad}/grey"], ["holds other files than results"]),
        ([MODEL, "stepz=3"], ["stepz is not a setting"]),
        ([MODEL, "--verbose"], ["--verbose is no option"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_computed(words, expected, bad, tmp_path, monkeypatch, capsys):
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [word.replace("{bad}", str(bad)) for word in words]
    given = [] if any(word.startswith(("measure", "--")) for word in words) else ["measure=smoke"]
    assert main([*words, *given, *([] if any(w.startswith("track") for w in words) else ["track=none"])]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    for part in expected:
        assert part in said, said
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "eval_results").exists()


def test_a_measure_that_cannot_be_computed_ends_with_one_line_and_what_came_before(monkeypatch, capsys):
    def refuse(run):
        raise ValueError("features: they cannot be computed")

    monkeypatch.setitem(running.MEASURES, "alignment", refuse)
    words = [MODEL, *QUICK, "measure.what=quality,alignment,skills", "sample.steps=1", "out=half"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said == "error: alignment: features: they cannot be computed\n"
    results = read_results("half")
    assert "fid/shapes" in results.numbers and results.not_measured["alignment"] == "features: they cannot be computed"


def test_judge_weights_with_another_hash_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    half = tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a download")
    assert main([MODEL, *QUICK, "judge=inception"]) == 2
    said = capsys.readouterr().err
    assert str(half) in said and "sha256" in said


def test_more_than_is_stored_and_runs_of_stored_images_are_refused(pictures, capsys):
    assert main([f"model={pictures}", *QUICK, f"measure.samples={N + 1}"]) == 2
    assert f"measure.samples={N + 1}" in capsys.readouterr().err
    assert main([f"model={pictures}", *QUICK, "measure.what=latency"]) == 2
    assert "latency is not possible: kind=images is no model that runs" in capsys.readouterr().err
    assert main([f"model={pictures}", "track=none", "judge=shapes", "data=shapes2", "measure.what=skills"]) == 2
    assert "no captions of the drawn world shapes2" in capsys.readouterr().err


def test_a_caption_that_the_model_cannot_read_stops_it_before_any_image(capsys, tmp_path):
    shape = {
        "channels": 12,
        "text_width": 8,
        "dim": 16,
        "heads": 2,
        "prelude": 1,
        "core": 1,
        "coda": 1,
        "iterations": 1,
        "ffn_ratio": 2.0,
        "mixer": "identity",
    }
    model = initialise(TextToLatent(ClassLabels(["cat", "dog"], 8), Generator(GeneratorConfig(**shape))), 0)
    IrisPipeline(model, build_latent("haar", levels=1), "haar", {"levels": 1}, 32).save(tmp_path / "classes")
    assert main([f"model={tmp_path / 'classes'}", *QUICK, "out=classes"]) == 2
    assert "not one of the 2 classes" in capsys.readouterr().err and not Path("classes").exists()
    classes = opened(tmp_path / "classes")
    classes.check(["dog", "cat"])
    # results without rows, of speed alone, are timed again on a caption that the model can read
    about = {
        "path": str(tmp_path / "classes"),
        "kind": "iris",
        "dtype": "float32",
        "device": "cpu",
        "stored_images": None,
        "fingerprint": classes.fingerprint,
    }
    sample = {f"sample.{name}": value for name, value in vars(sample_settings()).items()}
    loader = loader_of(SimpleNamespace(model=about, settings=sample, per_image=[]))
    assert loader.argument["caption"] == "cat" and opened(SHIPPED).example() == "a picture"
