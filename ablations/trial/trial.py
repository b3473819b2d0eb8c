"""One trial, start to finish: shared stages, training, sampling, measuring; killed at any point, it continues there."""

from __future__ import annotations

import contextlib
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from ablations.launch.progress import Status
from ablations.trial.model import build_model, sampling_of, times_of
from ablations.trial.stages import RESULT, Stages, judge_features, locked
from eval.judges import Judge
from eval.metrics.attributes import attribute_accuracy
from eval.metrics.clip_score import clip_score
from eval.metrics.fid import frechet_distance, frechet_jackknife
from eval.metrics.kid import kid
from eval.models.loading import load_for_measuring
from eval.speed.flops import count_flops
from eval.speed.process import processor_name
from iris.diffusion.sampling import SamplingSettings
from iris.io.files import read_json, write_json
from iris.io.pixels import to_images
from iris.model import TextToLatent
from iris.nn.gates import record_gates
from iris.pipeline import IrisPipeline
from iris.training.devices import own_device, process_count, process_rank
from iris.training.loop import LoopSettings, NonFiniteLoss, fit
from iris.training.optimiser import OptimiserSettings
from iris.training.tasks import FlowTask, validation_loss

GALLERY = 64  # samples kept for the report
MODEL = "model"  # folder of the saved pipeline
# Of what writes files: the system, quotas, NumPy, safetensors.
FULL = ("No space left", "no space left", "quota exceeded", "requested and", "os error 28")


def run_trial(folder: str, plan: dict[str, Any]) -> None:
    """Run the trial of ``folder`` and leave result.json there, or error.json with the cause.

    Of several processes that share each batch, the first does everything and the others help it train.

    Args:
        plan: {"key", "settings", "facts", "runs_dir", "threads"}.
    """
    if process_rank() > 0:
        _help_to_train(Path(folder), plan)
    else:
        _guarded(Path(folder), plan, _run)


def prepare_stages(folder: str, plan: dict[str, Any]) -> None:
    """Make the stages that a trial's settings need; result.json or error.json go to ``folder``."""

    def make(place: Path, plan: dict[str, Any], status: Status) -> dict[str, Any]:
        Stages(plan["settings"], plan["facts"], Path(plan["runs_dir"])).make()
        return {}

    _guarded(Path(folder), plan, make)


def _guarded(place: Path, plan: dict[str, Any], work: Callable[[Path, dict[str, Any], Status], dict[str, Any]]) -> None:
    """Do ``work`` once, alone in its folder; a failure is written down with its cause and raised again."""
    with locked(place):
        if (place / RESULT).exists():
            return
        status = Status(place)
        try:
            prepare_process(plan["threads"])
            write_json(place / "settings.json", plan["settings"])
            write_json(place / RESULT, work(place, plan, status))
            (place / "error.json").unlink(missing_ok=True)
            status("done", state="done")
        except Exception as error:
            with contextlib.suppress(OSError):  # a full disk takes no error.json either: the launcher says so then
                write_json(
                    place / "error.json",
                    {
                        "cause": cause_of(error),
                        "kind": type(error).__name__,
                        "message": str(error),
                        "traceback": traceback.format_exc(),
                    },
                )
                status("failed", state="failed")
            raise


def _help_to_train(place: Path, plan: dict[str, Any]) -> None:
    """What the other processes of a trial do: wait for the shared work, then take their rows of each batch."""
    prepare_process(plan["threads"])
    stages = Stages(plan["settings"], plan["facts"], Path(plan["runs_dir"]))
    while not all(stages.done(key) for key in stages.keys):
        if (place / "error.json").exists():
            raise RuntimeError(
                "the first process of this trial failed while it made shared work; its error.json has the cause"
            )
        time.sleep(1.0)
    if not (place / RESULT).exists():
        model = build_model(plan["settings"], stages.latent()[0].channels, stages.text())
        fit(_task(model, stages, plan["settings"]), _loop(plan["settings"]), place)


def prepare_process(threads: int) -> None:
    """Fix the threads, so that sums are made in the same order each time."""
    torch.set_num_threads(threads)


def cause_of(error: BaseException) -> str:
    """oom, nan, timeout, disk or error."""
    if isinstance(error, NonFiniteLoss):
        return "nan"
    if "timed-out" in str(error) or "timed out" in str(error):  # submitit raises this inside the job
        return "timeout"
    if any(words in str(error) for words in FULL):
        return "disk"
    memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
    return "oom" if memory else "error"


def _run(place: Path, plan: dict[str, Any], status: Status) -> dict[str, Any]:
    settings = plan["settings"]
    status("stages")
    stages = Stages(settings, plan["facts"], Path(plan["runs_dir"]))
    if process_count() > 1 and not all(stages.done(key) for key in stages.keys):
        raise RuntimeError(
            "shared work is missing, which one process makes before the trials that share each batch among several"
        )
    stages.make()
    write_json(place / "stages.json", list(stages.keys))
    seconds: dict[str, float] = {}
    device = own_device(settings["train"]["device"])
    captions = stages.described("train")["captions"]
    latent, options = stages.latent()
    model = build_model(settings, latent.channels, stages.text())
    pipeline = IrisPipeline(model, latent, settings["latent"]["name"], options, settings["data"]["size"])
    judge = stages.judge(device)
    for split in stages.splits:  # a caption that the encoder does not know must not stop the trial after training
        model.text.tokenise(stages.described(split)["captions"])

    metrics = _untrained(pipeline.to(device), judge, stages, settings)
    started = time.monotonic()
    metrics |= _train(place, model, stages, settings, status)
    model.eval()
    pipeline.save(place / MODEL)
    seconds["train"] = time.monotonic() - started
    for phase, measure in (
        ("sample", _measure_validation),
        ("held-out pairs", _measure_heldout),
        ("other passes", _measure_iterations),
    ):
        status(phase)
        started = time.monotonic()
        metrics |= measure(place, pipeline, judge, stages, settings, status)
        seconds[phase] = time.monotonic() - started
    status("operations")
    metrics |= _size(place, pipeline, captions[0], settings)
    _gates(place, pipeline, stages, settings)
    return {
        "key": plan["key"],
        "metrics": metrics,
        "seconds": seconds,
        "steps": settings["train"]["steps"],
        "environment": environment(device),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were made on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": processor_name(),
        "host": platform.node(),
        "python": platform.python_version(),
        "device": name,
    }


def _untrained(pipeline: IrisPipeline, judge: Judge, stages: Stages, settings: dict[str, Any]) -> dict[str, float]:
    """FID before training. The output layer starts at zero, so one Euler step is already the exact flow."""
    captions = stages.described("validation")["captions"][: settings["measure"]["samples"]]
    images = pipeline.generate(captions, SamplingSettings(steps=1), settings["seed"])
    return {"fid_untrained": frechet_distance(judge_features(judge, images), stages.reference("validation"))}


def _train(
    place: Path, model: TextToLatent, stages: Stages, settings: dict[str, Any], status: Status
) -> dict[str, float]:
    process = psutil.Process()
    process.cpu_percent()

    def meter() -> dict[str, float]:
        return {"system/cpu_percent": process.cpu_percent(), "system/rss_mb": process.memory_info().rss / 1e6}

    batch = settings["train"]["batch"]
    fit(_task(model, stages, settings), _loop(settings), place, lambda row: status.training("train", row, batch), meter)
    return {"validation_loss": validation_loss(_task(model, stages, settings, "validation"))}


def _task(model: TextToLatent, stages: Stages, settings: dict[str, Any], split: str = "train") -> FlowTask:
    """The flow's task on a split."""
    train, encode = settings["train"], model.text.tokenise
    return FlowTask(
        model,
        stages.latents(split),
        encode(stages.described(split)["captions"]),
        encode([""])[0],
        train["batch"],
        settings["seed"],
        train["caption_dropout"],
        train["loss_weight"],
        times_of(settings),
        train["min_snr_gamma"],
        train["steps"],
    )


def _loop(settings: dict[str, Any]) -> LoopSettings:
    train = settings["train"]
    optimiser = OptimiserSettings(
        train["optimiser"],
        train["learning_rate"],
        train["weight_decay"],
        train["warmup"],
        train["decay"],
        train["clip"],
    )
    return LoopSettings(
        train["steps"],
        optimiser,
        train["ema"],
        log_every=max(1, min(10, train["steps"] // 4)),
        checkpoint_seconds=train["checkpoint_seconds"],
        precision=train["precision"],
        accumulate=train["accumulate"],
        compile=train["compile"],
        gradient_checkpointing=train["gradient_checkpointing"],
        device=train["device"],
    )


def _measure_validation(
    place: Path, pipeline: IrisPipeline, judge: Judge, stages: Stages, settings: dict[str, Any], status: Status
) -> dict[str, float]:
    """Quality on captions whose colour-shape pairs were trained on."""
    images, described = _samples(
        pipeline, stages, "validation", settings["measure"]["samples"], sampling_of(settings), status
    )
    status("judge")
    features, reference = judge_features(judge, images), stages.reference("validation")
    real = stages.pixels("validation")[:GALLERY]
    np.savez_compressed(
        place / "samples.npz",
        images=images[:GALLERY].numpy(),
        real=real,
        captions=np.asarray(described["captions"][:GALLERY]),
    )
    blocks = min(20, len(images) // 2, len(reference) // 2)
    fid, fid_se = frechet_jackknife(features, reference, blocks=blocks)
    distance, distance_se = kid(features, reference, blocks=blocks)
    half = len(reference) // 2
    measured = {
        "fid": fid,
        "fid_se": fid_se,
        "kid": distance,
        "kid_se": distance_se,
        "samples": len(images),
        "fid_reference": frechet_distance(reference[:half], reference[half:]),
    }
    if judge.reads_captions_of(settings["data"]["name"]):
        score, score_se = clip_score(_cosines(judge, images, described["captions"]))
        measured |= {"clip_score": score, "clip_score_se": score_se}
    return measured | _accuracies(judge, images, described, settings, "")


def _measure_heldout(
    place: Path, pipeline: IrisPipeline, judge: Judge, stages: Stages, settings: dict[str, Any], status: Status
) -> dict[str, float]:
    """Composition: colour-shape pairs that were never in training."""
    count = settings["measure"]["heldout_samples"]
    if "heldout" not in stages.splits or count == 0 or settings["data"]["name"] not in judge.worlds:
        return {}
    images, described = _samples(pipeline, stages, "heldout", count, sampling_of(settings), status)
    return _accuracies(judge, images, described, settings, "heldout_")


def _measure_iterations(
    place: Path, pipeline: IrisPipeline, judge: Judge, stages: Stages, settings: dict[str, Any], status: Status
) -> dict[str, float]:
    """FID of the same model at other numbers of passes through its core."""
    reference, measured = stages.reference("validation"), {}
    for passes in settings["measure"]["iterations"]:
        sampling = replace(sampling_of(settings), iterations=passes)
        images, _ = _samples(pipeline, stages, "validation", settings["measure"]["samples"], sampling, status)
        measured[f"fid_at_{passes}"] = frechet_distance(judge_features(judge, images), reference)
    return measured


def _samples(
    pipeline: IrisPipeline, stages: Stages, split: str, count: int, sampling: SamplingSettings, status: Status
) -> tuple[Tensor, dict[str, Any]]:
    """Images uint8 [N, H, W, 3] of a split's first captions, and these captions with their attributes.

    All arms and seeds start image i from the same noise.
    """
    described = stages.described(split)
    captions = described["captions"][:count]
    parts, batch = [], 256
    for first in range(0, len(captions), batch):
        parts.append(pipeline.generate(captions[first : first + batch], sampling, seed=0, first=first).cpu())
        status(f"sample {split}", step=min(first + batch, len(captions)), steps=len(captions))
    attributes = {name: values[:count] for name, values in described["attributes"].items()}
    return torch.cat(parts), {"captions": captions, "attributes": attributes}


def _cosines(judge: Judge, images: Tensor, captions: list[str]) -> Tensor:
    return torch.cat(
        [
            judge.similarity(to_images(images[i : i + 512]), captions[i : i + 512]).cpu()
            for i in range(0, len(images), 512)
        ]
    )


def _accuracies(
    judge: Judge, images: Tensor, described: dict[str, Any], settings: dict[str, Any], prefix: str
) -> dict[str, float]:
    world = settings["data"]["name"]
    if world not in judge.worlds:
        return {}
    read = judge.attributes(world, to_images(images))
    wanted = {name: torch.tensor(values) for name, values in described["attributes"].items()}
    return {f"{prefix}accuracy_{name}": value for name, value in attribute_accuracy(read, wanted).items()}


def _size(place: Path, pipeline: IrisPipeline, caption: str, settings: dict[str, Any]) -> dict[str, float]:
    make = load_for_measuring({"folder": str(place / MODEL), "caption": caption, **settings["sample"]})
    parameters = sum(p.numel() for p in pipeline.model.generator.parameters())
    return {"params_m": parameters / 1e6, "gflops": count_flops(make).gflops, "nfe": sampling_of(settings).evaluations}


def _gates(place: Path, pipeline: IrisPipeline, stages: Stages, settings: dict[str, Any]) -> None:
    captions = stages.described("validation")["captions"][:GALLERY]
    with record_gates(pipeline.model.generator, settings["model"]["iterations"]) as layers:
        pipeline.generate(captions, sampling_of(settings), seed=0)
    if layers:
        write_json(place / "gates.json", {"layers": layers})


def finished(folder: Path) -> dict[str, Any] | None:
    """A trial's result, or None while it has none."""
    return read_json(folder / RESULT)
