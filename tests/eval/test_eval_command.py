"""``python -m eval``: what it measures on each kind of subject, what it leaves behind, and how bad input is told."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import SHIPPED, captioned
from judge_files import TINY, clip_folder, clip_network, inception_archive
from PIL import Image
from safetensors.torch import save_file
from small_diffusers import SIZE, save_diffusers

from eval.__main__ import main
from eval.compare import loader_of
from eval.evaluate import folder_of
from eval.judges import load_judge
from eval.judges.images import to_float
from eval.metrics.fid import frechet_jackknife
from eval.results import FILES, Results, read_results
from eval.settings import TREE
from eval.stages.data import DrawnWorld, attributes_of, open_data
from eval.stages.features import extract_features
from eval.subjects import Sample, open_subject
from eval.subjects.iris_model import IrisModel
from iris.data import WORLDS
from iris.latents import build_latent
from iris.model import TextToLatent
from iris.nn.generator import Generator, GeneratorConfig
from iris.pipeline import IrisPipeline
from iris.text import ClassLabels, Vocabulary, WordEncoder

pytestmark = pytest.mark.xdist_group("eval_command")  # one worker: what the module's fixtures make is shared

N, REAL, FEWER = 32, 128, 16  # of measure=smoke: images, real ones, of other captions
QUICK = ("measure=smoke", "track=none")
MODEL = f"model={SHIPPED}"
SHAPE = {
    "dim": 16,
    "heads": 2,
    "prelude": 1,
    "core": 1,
    "coda": 1,
    "iterations": 1,
    "ffn_ratio": 2.0,
    "mixer": "identity",
}


def numbers_of(folder):
    return {name: number.value for name, number in read_results(folder).numbers.items()}


def rows_of(folder):
    with open(Path(folder) / "per_image.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    """A folder of its own, no tracking server, no hub, and one thread, so that sums are made in one order."""
    import datasets

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(Path("hf").absolute()))
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ran(surroundings):
    """The shipped model measured: the folder of its results."""
    assert main([MODEL, *QUICK, "out=ran"]) == 0
    return Path("ran").resolve()


@pytest.fixture(scope="module")
def made(ran):
    """The images and captions that ``ran`` measured, made again by the pipeline itself."""
    captions, subject = (
        WORLDS["shapes"].draw("validation", N, 0).captions,
        open_subject(str(SHIPPED), None, Sample(), "float32", "cpu"),
    )
    return IrisPipeline.from_pretrained(SHIPPED).generate(captions, subject.settings, seed=0), captions


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


# -- a saved model ----------------------------------------------------------------------------------------------------


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
    assert results.model["nfe"] == 8 and results.model["parameters"]["generator"] > 0
    assert list(results.seconds) == ["quality", "alignment", "skills", "duplicates"]
    assert results.command == f"python -m eval {MODEL} measure=smoke track=none out=ran"
    assert results.settings["measure.samples"] == N and results.hardware["torch"] == torch.__version__


def test_the_folder_has_all_files_and_a_row_an_image(ran):
    assert all((ran / name).is_file() for name in FILES)
    rows = rows_of(ran)
    assert [sum(row["set"] == name for row in rows) for name in ("main", "heldout", "trained")] == [N, FEWER, FEWER]
    skills = [f"right_{name}" for name in ("colour", "shape", "size", "position", "background", "count", "all")]
    copies = ["nearest_cosine", "training_index", "nearest_l2", "flagged"]
    assert list(rows[0]) == ["set", "index", "caption", "cosine", "heldout", *skills, *copies]
    assert [row["index"] for row in rows] == [str(i) for count in (N, FEWER, FEWER) for i in range(count)]
    cosines = [float(row["cosine"]) for row in rows if row["set"] == "main"]
    assert np.mean(cosines) == pytest.approx(read_results(ran).details["alignment"]["mean_cosine"])
    assert all(row["heldout"] == "1" for row in rows if row["set"] == "heldout")
    page, text = (ran / "index.html").read_text(), (ran / "report.md").read_text()
    assert page.count("<figure>") == N and "duplicates.html" in page and "rank deficient" in page
    for word in ("CLIP score", "held-out", "seed 0", MODEL):
        assert word in page and word in text


def test_a_second_call_makes_no_image_and_asks_no_judge(ran, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(IrisModel, "generate", refuse)
    monkeypatch.setattr("eval.stages.judging.load_judge", refuse)
    assert main([MODEL, *QUICK, "out=again"]) == 0
    first, again = read_results(ran), read_results("again")
    assert again.numbers == first.numbers and again.details == first.details and again.per_image == first.per_image
    assert again.model == first.model
    assert "is finished, taken as it is" in capsys.readouterr().out
    for name in ("duplicates.html", "per_image.csv"):
        assert (Path("again") / name).read_bytes() == (ran / name).read_bytes()


def test_other_sampling_makes_other_images_in_another_folder(ran):
    words = [MODEL, *QUICK, "sample.steps=1", "sample.guidance=1", "measure.what=quality"]
    before = set(Path("eval_results").glob("*"))
    assert main(words) == 0
    (place,) = set(Path("eval_results").glob("*")) - before
    assert place.name.startswith("shapes-shapes-")
    found = read_results(place)
    assert found.model["nfe"] == 1 and found.numbers["fid/shapes"].value > numbers_of(ran)["fid/shapes"]


def test_results_of_other_settings_never_share_a_folder():
    results = Results("x", {"fingerprint": "1", "sampling": {}}, {}, {})

    def folder(*words):
        return folder_of(TREE.build(["model=x", *words]), results)

    usual = folder()
    for word in (
        "measure.samples=5",
        "seed=1",
        "measure.latency.batches=8",
        "measure.caps.megabytes=900",
        "device=auto",
    ):
        assert folder(word) != usual
    for word in ("threads=1", "sample.batch=3", "runs_dir=y", "name=y", "model=y", "track=none"):
        assert folder(word) == usual
    assert folder("out=here") == Path("here")


# -- stored images ----------------------------------------------------------------------------------------------------


def test_a_models_images_in_a_folder_give_its_numbers(ran, pictures):
    assert main([f"model={pictures}", *QUICK, "out=stored"]) == 0
    found, model = numbers_of("stored"), numbers_of(ran)
    same = [name for name in found if not name.startswith(("heldout", "accuracy_gap", "duplicate"))]
    assert len(same) > 10
    assert {name: found[name] for name in same} == pytest.approx({name: model[name] for name in same}, rel=1e-5)
    results = read_results("stored")
    assert results.model["stored_images"] == N and results.details["duplicates"]["set"] == "main"
    assert "images_seed" not in results.numbers["fid/shapes"].made_with


def test_an_array_file_gives_the_same_numbers_as_the_folder(ran, made):
    images, captions = made
    np.savez("array.npz", images=images.numpy(), captions=np.asarray(captions))
    np.save("floats.npy", to_float(images).numpy())
    assert main(["model=array.npz", *QUICK, "out=array"]) == 0
    assert main(["model=floats.npy", *QUICK, "measure.what=quality", "out=floats"]) == 0
    array, model = numbers_of("array"), numbers_of(ran)
    assert array["clip_score/shapes"] == pytest.approx(model["clip_score/shapes"], rel=1e-5)
    for name, value in numbers_of("floats").items():
        assert value == pytest.approx(array[name], rel=1e-9) == pytest.approx(model[name], rel=1e-5)


def test_captions_that_were_changed_are_scored_anew(made):
    images, captions = made
    for name, texts in (("right", captions), ("wrong", [*captions[1:], captions[0]])):
        np.savez("relabelled.npz", images=images.numpy(), captions=np.asarray(texts))
        assert main(["model=relabelled.npz", *QUICK, "measure.what=alignment,skills", f"out={name}"]) == 0
    right, wrong = numbers_of("right"), numbers_of("wrong")
    assert all(wrong[name] < right[name] for name in ("clip_score/shapes", "accuracy_colour/shapes"))


def test_what_is_not_possible_is_left_out_with_the_reason(pictures, tmp_path, capsys):
    for i in range(10):
        Image.open(pictures / f"{i:03d}.png").save(tmp_path / f"{i}.jpg")
    assert main([f"model={tmp_path}", *QUICK, "measure.samples=null", "out=bare"]) == 0
    results, said = read_results("bare"), capsys.readouterr().out
    found = {name.partition("/")[0] for name in results.numbers}
    assert found == {"fid", "kid", "precision", "recall", "density", "coverage"}
    assert set(results.not_measured) == {"alignment", "skills", "duplicates"}
    assert "have no captions" in results.not_measured["alignment"] and "no alignment: " in said
    assert "stored with loss" in results.notes[0] and "note: 10 of 10 images are stored with loss" in said


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
        f"data.path={captioned(tmp_path / 'real', 2, 40)}",
        "data.size=40",
        "judge=clip",
        f"judge.weights={judge}",
        "judge.prefix=A photo depicts ",
    ]
    assert main([*words, "out=dogs"]) == 0
    results = read_results("dogs")
    assert set(results.numbers) == {"clip_score/clip"}
    assert set(results.not_measured) == {"quality", "skills", "duplicates"}
    assert "56x40 pixels" in results.not_measured["quality"]
    number = results.numbers["clip_score/clip"]
    loaded = load_judge("clip", weights=str(judge), prefix="A photo depicts ")
    wanted = loaded.similarity(to_float(torch.from_numpy(images)), captions)
    assert number.value == pytest.approx(100 * float(wanted.clamp_min(0).mean()), abs=1e-4)
    assert [float(row["cosine"]) for row in rows_of("dogs")] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert number.made_with["prefix"] == "A photo depicts " and number.made_with["judge_sha256"] == loaded.sha256


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::eval.metrics.fid.RankDeficientWarning"
)
@pytest.mark.long
def test_judge_inception_measures_images_that_are_there(made, tmp_path, monkeypatch):
    """From the archive's file to the report, by weights of the published form with other values, without a network."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    images, captions = (part[:12] for part in made)
    np.savez("twelve.npz", images=images.numpy(), captions=np.asarray(captions))
    weights = inception_archive(tmp_path / "inception-2015-12-05.pt")
    words = ["measure.samples=null", "measure.what=quality", "measure.reference=16", f"judge.weights={weights}"]
    assert main(["model=twelve.npz", *QUICK, "judge=inception", *words, "out=inception"]) == 0
    results, judge = read_results("inception"), load_judge("inception", weights=str(weights))
    real = extract_features(judge, WORLDS["shapes"].draw("validation", 16, 0).images)
    wanted, error = frechet_jackknife(extract_features(judge, images).values, real.values, 6)
    fid = results.numbers["fid/inception"]
    assert (fid.value, fid.standard_error) == pytest.approx((wanted, error), rel=1e-5)
    assert (fid.n, fid.reference_n, fid.made_with["judge_sha256"]) == (12, 16, judge.sha256)
    assert results.details["quality"]["title"] == "FD-Inception (unverified weights)"
    assert {name.partition("/")[2] for name in results.numbers} == {"inception"}
    assert "FD-Inception (unverified weights)" in Path("inception/report.md").read_text()


# -- diffusers --------------------------------------------------------------------------------------------------------


def test_a_diffusers_pipeline_is_measured(tmp_path):
    words = ["measure.what=quality,alignment", "measure.samples=10", "sample.steps=2", "sample.batch=5"]
    assert main([f"model={save_diffusers(tmp_path / 'tiny-sd')}", *QUICK, *words, "out=diffusers"]) == 0
    results = read_results("diffusers")
    assert results.model["kind"] == "diffusers" and results.model["size"] == [SIZE, SIZE] and results.model["nfe"] == 4
    assert set(results.model["parameters"]) == {"unet", "vae", "text_encoder"}
    assert results.numbers["fid/shapes"].n == 10 and results.numbers["fid/shapes"].made_with["sampling"]["steps"] == 2


# -- speed and memory -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_latency_memory_and_caps_of_a_model():
    assert main([MODEL, *QUICK, "measure.what=latency,memory,caps", "sample.steps=1", "out=speed"]) == 0
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
    assert latency.made_with["sampling"]["steps"] == 1 and latency.made_with["device"] == "cpu"
    size = sum(file.stat().st_size for file in SHIPPED.glob("*.safetensors")) / 1e6
    assert results.numbers["weights_mb"].value == pytest.approx(size, rel=0.02)
    whole = next(one for one in results.details["caps"]["runs"] if one["scope"] == "process")
    assert (whole["cap_mb"], whole["held"]) == (4000, True) and results.judge == {} and results.per_image == []
    verdicts = {one["name"]: one["verdict"] for one in results.details["targets"]}
    assert verdicts["memory"] == "pass" and verdicts["latency"] == "needs the device"
    assert "Hard caps" in Path("speed/index.html").read_text()


def test_a_measuring_process_that_fails_leaves_the_other_results(capsys):
    words = ["measure.what=alignment,latency,caps", "measure.timeout=0.001", "sample.steps=1", "out=late"]
    assert main([MODEL, *QUICK, *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: latency failed: ") and "; caps failed: " in said and said.count("\n") == 1
    assert "the other results: late" in said
    results = read_results("late")
    assert set(results.numbers) == {"clip_score/shapes"} and set(results.not_measured) == {"latency", "caps"}
    assert "failed: " in results.not_measured["latency"] and Path("late/index.html").is_file()


# -- data -------------------------------------------------------------------------------------------------------------


def test_attributes_are_read_from_captions():
    for world in WORLDS.values():
        drawn = world.draw("all", 50, 1)
        found = attributes_of(world, drawn.captions)
        assert all(np.array_equal(found[name], drawn.attributes[name]) for name in world.attributes)
        assert attributes_of(world, [*drawn.captions, "a dog"]) is None


def test_a_folder_of_real_images_is_a_reference(pictures):
    settings = TREE.build(["data=folder", f"data.path={pictures}", "data.validation=20"])
    data = open_data(settings.data, "validation", 32)
    assert not isinstance(data, DrawnWorld)
    rows = list(data.rows("validation"))
    assert sum(len(part.captions) for part in rows) == 20 and rows[0].images.shape[1:] == (32, 32, 3)
    words = [
        MODEL,
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


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Folders and files with one thing wrong each."""
    root = tmp_path_factory.mktemp("bad")
    captioned(root / "dogs", 10)
    (root / "grey").mkdir()
    Image.new("L", (32, 32)).save(root / "grey" / "0.png")
    save_file({"a": torch.zeros(2)}, root / "other.safetensors")
    return root


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["model is missing"]),
        (["model=nowhere"], ["model=nowhere", "no such folder or array file"]),
        (
            ["model=text-0123456789ab"],
            ["model='text-0123456789ab' is neither a finished stage in runs/stages nor a folder"],
        ),
        (["model={bad}/grey"], ["0.png has the colour mode L", "RGB"]),
        (["model={bad}/dogs", "measure.samples=11"], ["measure.samples=11", "holds 10 images"]),
        ([MODEL, "judge=inception", "judge.weights={bad}/no.pt"], ["judge.weights", "is no file"]),
        # which only shows when it is loaded
        ([MODEL, "judge=inception", "judge.weights={bad}/other.safetensors"], ["judge", "other.safetensors"]),
        ([MODEL, "judge=clip_vit_b32", "judge.weights={bad}/other.safetensors"], ["judge", "other.safetensors"]),
        ([MODEL, "judge.model=ViT-B-32"], ["judge shapes takes no judge.model"]),
        ([MODEL, "data=shapes2", "measure.split=test"], ["measure.split='test'", "train, validation, heldout, all"]),
        ([MODEL, "data=folder", "data.path={bad}/dogs", "measure.split=heldout"], ["measure.split='heldout'"]),
        ([MODEL, "data=folder"], ["data.path is needed"]),
        ([MODEL, "data.validation=0.1"], ["data.validation of the drawn world shapes must be a count"]),
        (
            [MODEL, "data=folder", "data.path={bad}/dogs", "measure.split=train", "measure.what=quality"],
            ["measure.samples=32: split train of data folder has only 9 captions"],
        ),
        ([MODEL, "sample.sampler=ddim"], ["sample.sampler='ddim'", "euler"]),
        ([MODEL, "measure.what=fid"], ["measure.what='fid'", "quality, alignment"]),
        ([MODEL, "measure.samples=4", "measure.what=quality"], ["quality is not possible", "at least 8 images"]),
        ([MODEL, "device=cuda"], ["device=cuda", "none on this machine"]),
        ([MODEL, "out={bad}/grey"], ["holds other files than results"]),
        ([MODEL, "out={bad}/other.safetensors"], ["other.safetensors is a file; name a folder"]),
        ([MODEL, "stepz=3"], ["stepz is not a setting"]),
        ([MODEL, "--verbose"], ["--verbose is no option"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_computed(words, expected, bad, tmp_path, monkeypatch, capsys):
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    words = [word.replace("{bad}", str(bad)) for word in words]
    # options stand alone
    assert main(words if words and words[-1].startswith("--") else [*QUICK, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    for part in expected:
        assert part in said, said
    assert not list(tmp_path.rglob("*.npy")) and not (tmp_path / "eval_results").exists()


def test_a_measure_that_cannot_be_computed_ends_with_one_line_and_what_came_before(tmp_path, capsys):
    """Training pictures that are damaged, which quality never looks at."""
    place = captioned(tmp_path / "dogs", 24)
    settings = TREE.build(["data=folder", f"data.path={place}", "data.validation=10"])
    held = open_data(settings.data, "validation", 32).captions("validation", 10)
    for i in range(24):
        if f"a dog {i}" not in held:
            (place / f"{i}.png").write_bytes(b"no picture")
    words = ["data=folder", f"data.path={place}", "data.validation=10", "measure.samples=10", "measure.reference=null"]
    assert main([MODEL, *QUICK, *words, "measure.what=quality,duplicates", "sample.steps=1", "out=half"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: data.max_bad allows 1.00% unusable rows") and said.count("\n") == 1
    results = read_results("half")
    assert "fid/shapes" in results.numbers and "data.max_bad allows" in results.not_measured["duplicates"]
    assert list(results.seconds) == ["quality", "duplicates"]


def test_judge_weights_with_another_hash_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    half = tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a download")
    assert main([MODEL, *QUICK, "judge=inception"]) == 2
    said = capsys.readouterr().err
    assert str(half) in said and "sha256" in said


def test_pixels_of_a_broken_decoder_are_not_measured(tmp_path, capsys):
    """Neither NaN, which would be black, nor infinities, which would be clipped."""
    for value in (math.nan, math.inf):
        text = WordEncoder(Vocabulary(["red"], 4), 16, layers=1)
        model = TextToLatent(text, Generator(GeneratorConfig(channels=4, text_width=16, **SHAPE)))
        options = {"levels": 1, "stages": 0, "channels": 4, "width": 8}
        latent = build_latent("wavelet_vae", **options)
        with torch.no_grad():
            for parameter in latent.decoder.parameters():
                parameter.fill_(value)
        place, out, runs = (tmp_path / f"{name}{value}" for name in ("model", "out", "runs"))
        IrisPipeline(model, latent, "wavelet_vae", options, 32).save(place)
        assert main([f"model={place}", *QUICK, "measure.what=quality", f"out={out}", f"runs_dir={runs}"]) == 2
        said = capsys.readouterr().err
        assert f"model={place}: the decoder gave values that are not finite in float32" in said
        assert read_results(out).numbers == {} and not list(runs.glob("stages/images-*/result.json"))


def test_a_caption_that_the_model_cannot_read_stops_it_before_any_image(capsys, tmp_path):
    place = tmp_path / "classes"
    model = TextToLatent(ClassLabels(["cat", "dog"], 8), Generator(GeneratorConfig(channels=12, text_width=8, **SHAPE)))
    IrisPipeline(model, build_latent("haar", levels=1), "haar", {"levels": 1}, 32).save(place)
    assert main([f"model={place}", *QUICK, "out=classes"]) == 2
    assert "not one of the 2 classes" in capsys.readouterr().err and not Path("classes").exists()
    # results without rows, of speed alone, are timed again on a caption that the model can read
    subject = open_subject(str(place), None, Sample(), "float32", "cpu")
    about = {"path": str(place), "kind": "iris", "dtype": "float32", "device": "cpu", "stored_images": None}
    sample = {f"sample.{name}": value for name, value in vars(Sample()).items()}
    results = Results("x", about | {"fingerprint": subject.fingerprint}, {}, {}, settings=sample)
    assert loader_of(results).argument["caption"] == "cat"


def test_help_and_the_composed_settings_are_shown(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "python -m eval.compare A B" in said and "inception" in said
    assert main(["--help", "measure"]) == 0 and "measure.duplicates.quantile=null" in capsys.readouterr().out
    assert main([MODEL, "measure=smoke", "--cfg", "job"]) == 0 and "samples: 32" in capsys.readouterr().out
