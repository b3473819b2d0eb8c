"""Work that trials share, done once: decoded data, the trained latent, encoded data, the judge's view of real images.

Each stage has a folder named by the hash of what determines its result and a ``result.json`` written last; a stage that
has one is reused by every trial and grid. Two processes that want the same stage meet at its lock, and the lock dies with
the process that holds it.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablations.launch.progress import Status
from ablations.question.grid import RESULTS_VERSION, used_latent
from ablations.trial.model import build_latent_of, build_text, latent_shape
from eval.judges import Judge, load_judge
from iris import data as sources
from iris.errors import SettingError
from iris.io.files import read_json, write_json
from iris.io.hashing import digest
from iris.io.pixels import to_images
from iris.io.tensors import load_tensors, save_tensors
from iris.latents import Latent
from iris.latents.losses import psnr
from iris.randomness import initialise
from iris.text import EmbeddedText, TextEncoder, embed_captions
from iris.training.loop import LoopSettings, fit
from iris.training.optimiser import OptimiserSettings
from iris.training.vae_task import VAETask

RESULT = "result.json"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; waits for a living holder, never for a dead one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Stages:
    """The stages of one trial's settings, under ``runs_dir``/stages."""

    def __init__(self, settings: dict[str, Any], facts: dict[str, str], runs: Path) -> None:
        """``facts``: {"data": fingerprint, "judge": sha256}, and "text", "latent" of pretrained parts."""
        # What was made before versions counted here is still good.
        data, version = settings["data"], ([RESULTS_VERSION] if RESULTS_VERSION > 1 else [])
        self.settings, self.root = settings, runs / "stages"
        self.data_key = "data-" + digest([facts["data"], data["size"], data["max_bad"], *version])
        latent = used_latent(settings["latent"]) | ({"source": facts["latent"]} if "latent" in facts else {})
        self.latent_key = "latent-" + digest([self.data_key, latent])
        self.text_key = "text-" + digest([self.data_key, facts["text"]]) if "text" in facts else None
        # One weights file can be read by several networks of a judge: its model is part of what it is.
        model = [settings["judge"]["model"]] if settings["judge"].get("model") else []
        self.reference_key = "reference-" + digest([self.data_key, facts["judge"], *model])
        self.judge_sha256 = facts["judge"]

    def folder(self, key: str) -> Path:
        """Where a stage lives."""
        return self.root / key

    @property
    def keys(self) -> dict[str, str]:
        """Key -> name for people, in the order in which they are made."""
        latent = self.settings["latent"]["name"]
        text = {self.text_key: f"text {self.settings['model']['text']}"} if self.text_key else {}
        return {
            self.data_key: f"data {self.settings['data']['name']}",
            self.latent_key: f"latent {latent}",
            **text,
            self.reference_key: f"reference, judge {self.settings['judge']['name']}",
        }

    def done(self, key: str) -> bool:
        """Whether a stage is finished."""
        return (self.folder(key) / RESULT).exists()

    def make(self) -> None:
        """Make every stage that is not finished."""
        self._once(self.data_key, self._make_data)
        self._once(self.latent_key, self._make_latent)
        if self.text_key:
            self._once(self.text_key, self._make_text)
        self._once(self.reference_key, self._make_reference)

    def pixels(self, split: str) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of a split."""
        return np.load(self.folder(self.data_key) / f"{split}.npy", mmap_mode="r")

    def described(self, split: str) -> dict[str, Any]:
        """{"captions": [N], "attributes": {name: [N]}} of a split."""
        return json.loads((self.folder(self.data_key) / f"{split}.json").read_text())

    @property
    def splits(self) -> list[str]:
        """Splits that the data has."""
        return read_json(self.folder(self.data_key) / RESULT)["splits"]

    def latents(self, split: str) -> Tensor:
        """Standardised latents [N, C, h, w] of train or validation."""
        return torch.from_numpy(np.load(self.folder(self.latent_key) / f"{split}.npy"))

    def latent(self) -> tuple[Latent, dict[str, Any]]:
        """The trained latent and the options it was built with."""
        latent, options = build_latent_of(self.settings), latent_shape(self.settings)
        latent.load_state_dict(load_tensors(self.folder(self.latent_key) / "latent.safetensors")[0])
        return latent.eval(), options

    def text(self) -> TextEncoder:
        """The trial's text encoder: made from the training captions, or the embeddings of a frozen one."""
        if self.text_key:
            return EmbeddedText(self.folder(self.text_key) / read_json(self.folder(self.text_key) / RESULT)["embedded"])
        return build_text(self.settings, self.described("train")["captions"])

    def judge(self, device: str | torch.device = "cpu") -> Judge:
        """The judge that the plan described, on ``device``.

        Raises:
            SettingError: its weights were exchanged since.
        """
        judge = load_judge(**self.settings["judge"], device=device)
        if judge.sha256 != self.judge_sha256:
            raise SettingError(
                f"judge {judge.name}: the weights now have sha256 {judge.sha256}, the plan was made with "
                f"{self.judge_sha256}; put those back or start the grid again"
            )
        return judge

    def reference(self, split: str) -> Tensor:
        """Judge features [N, D] of a split's real images."""
        return torch.from_numpy(np.load(self.folder(self.reference_key) / f"{split}.npy"))

    def _once(self, key: str, make: Callable[[Path, Status], dict[str, Any]]) -> None:
        folder = self.folder(key)
        if self.done(key):
            return
        with locked(folder):
            if self.done(key):
                return
            status, started = Status(folder), time.monotonic()
            status("starting")
            result = make(folder, status)
            write_json(folder / RESULT, result | {"seconds": time.monotonic() - started})
            status("done", state="done")

    def _make_data(self, folder: Path, status: Status) -> dict[str, Any]:
        status("loading")
        wanted = {k: v for k, v in self.settings["data"].items() if k not in ("name", "max_bad")}
        loaded = sources.load(self.settings["data"]["name"], **wanted)
        facts: dict[str, Any] = {"splits": [], "bad": {}}
        for split, rows in loaded.items():
            if len(rows) == 0:
                continue
            status(f"decoding {split}")
            decoded = sources.pixels(rows, self.settings["data"]["size"], self.settings["data"]["max_bad"])
            np.save(folder / f"{split}.npy", decoded.images)
            attributes = {name: values.tolist() for name, values in decoded.attributes.items()}
            write_json(folder / f"{split}.json", {"captions": decoded.captions, "attributes": attributes})
            facts["splits"].append(split)
            facts[split] = len(decoded.images)
            facts["bad"][split] = decoded.bad
        return facts

    def _make_latent(self, folder: Path, status: Status) -> dict[str, Any]:
        chosen = self.settings["latent"]
        latent = initialise(build_latent_of(self.settings), chosen["seed"])
        train = torch.from_numpy(np.array(self.pixels("train")))
        if latent.trained:
            task = VAETask(latent, train, chosen["batch"], chosen["seed"], chosen["kl_weight"], chosen["detail_weight"])
            loop = LoopSettings(
                chosen["steps"],
                OptimiserSettings("adamw", chosen["learning_rate"]),
                device=self.settings["train"]["device"],
            )
            fit(
                task,
                loop,
                folder,
                lambda row: status.training("train", row | {"psnr": psnr(row["mse"])}, chosen["batch"]),
            )
        latent.eval()
        status("encoding")
        latent.standardise(to_images(train[:10_000]))
        save_tensors(folder / "latent.safetensors", latent.state_dict(), {})
        np.save(folder / "train.npy", _encode(latent, train))
        validation = torch.from_numpy(np.array(self.pixels("validation")))
        encoded = _encode(latent, validation)
        np.save(folder / "validation.npy", encoded)
        return {
            "psnr": _psnr(latent, validation[:1024], torch.from_numpy(encoded[:1024])),
            "parameters": sum(p.numel() for p in latent.parameters()),
        }

    def _make_text(self, folder: Path, status: Status) -> dict[str, Any]:
        captions = [caption for split in self.splits for caption in self.described(split)["captions"]]
        status("embedding captions")
        made = embed_captions(build_text(self.settings, captions), captions, folder)
        return {"embedded": made.relative_to(folder).as_posix(), "captions": len(set(captions))}

    def _make_reference(self, folder: Path, status: Status) -> dict[str, Any]:
        judge = self.judge()
        for split in [name for name in self.splits if name != "train"]:
            status(f"judging {split}")
            np.save(folder / f"{split}.npy", judge_features(judge, self.pixels(split)).numpy())
        return {"judge": judge.name, "sha256": judge.sha256}


def judge_features(judge: Judge, pixels: np.ndarray | Tensor, batch: int = 512) -> Tensor:
    """Judge features [N, D] of images uint8 [N, H, W, 3]."""
    parts = [np.array(pixels[i : i + batch]) for i in range(0, len(pixels), batch)]
    return torch.cat([judge.image_features(to_images(torch.from_numpy(part))).cpu() for part in parts])


@torch.no_grad()
def _encode(latent: Latent, pixels: Tensor, batch: int = 512) -> np.ndarray:
    return torch.cat([latent.encode(to_images(part)) for part in pixels.split(batch)]).numpy()


@torch.no_grad()
def _psnr(latent: Latent, pixels: Tensor, encoded: Tensor) -> float:
    error = (latent.decode(encoded) - to_images(pixels)).square().mean().item()
    return psnr(error)
