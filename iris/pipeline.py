"""Text in, images out: text encoder, generator and latent, called, saved and loaded as diffusers' pipelines are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from huggingface_hub.repocard import ModelCard
from PIL import Image
from torch import Tensor

from iris.diffusion.editing import Picture, read_images, read_mask
from iris.diffusion.sampling import (
    GuidedVelocity,
    Noise,
    SamplingSettings,
    addressed_noise,
    drawn_noise,
    invert,
    sample,
    working_dtype,
)
from iris.errors import SettingError, require_choice
from iris.io.hub import fetch_pipeline, is_hub_name
from iris.io.pixels import to_pixels
from iris.latents import Latent
from iris.model import CARD, IrisModel, Parts, TextToLatent, read_folder, write_folder
from iris.text import TextEncoder, encode_prompts

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRENGTH = 0.6  # of image-to-image, as in diffusers' pipeline of SD3
EDITING = SamplingSettings(8, "midpoint", guidance=3.0)  # of a model that says nothing: Euler's way back is not its way

# Called with the pipeline, the step, its time and {"latents": …}; may return the latents to go on with in such a dict.
StepCallback = Callable[["IrisPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class IrisOutput(NamedTuple):
    """What a pipeline returns: PIL images [N], an array [N, H, W, 3] or tensor [N, 3, H, W] in [0, 1], or latents."""

    images: list[Image.Image] | np.ndarray | Tensor


class IrisPipeline(
    ModelHubMixin,
    library_name="iris",
    license="apache-2.0",
    pipeline_tag="text-to-image",
    tags=["iris"],
    model_card_template=CARD,
):
    """A trained model ready to make images.

    Args:
        model: text encoder and generator.
        latent: decodes what the generator makes.
        latent_name, latent_options: what ``build_latent`` made it with.
        size: side in pixels of the images it was trained on, the default of ``height`` and ``width``.
        sampling, distilled_guidance: as of ``Parts``.
    """

    def __init__(
        self,
        model: TextToLatent,
        latent: Latent,
        latent_name: str,
        latent_options: dict[str, Any],
        size: int,
        sampling: SamplingSettings | None = None,
        distilled_guidance: float | None = None,
    ) -> None:
        self.model, self.latent, self.size = model.eval(), latent.eval(), size
        self.latent_name, self.latent_options = latent_name, latent_options
        self.sampling, self.distilled_guidance = sampling, distilled_guidance
        self._copies_text = False

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        return Parts(
            self.model,
            self.latent,
            self.latent_name,
            self.latent_options,
            self.size,
            self.sampling,
            self.distilled_guidance,
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.generator.input.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The generator's precision."""
        return self.model.generator.input.weight.dtype

    def to(self, *args: Any, **kwargs: Any) -> IrisPipeline:
        """Move to a device or dtype in place, as ``torch.nn.Module.to``. Latents stay in float32 at least."""
        self.model.to(*args, **kwargs)
        self.latent.to(*args, **kwargs)
        return self

    def sampling_settings(self, **given: Any) -> SamplingSettings:
        """How images are made: as ``given``, else as the model says, see ``SamplingSettings.resolved``.

        Raises:
            SettingError: a value that cannot be used; guidance of a student.
        """
        settings = SamplingSettings.resolved(self.sampling, **given)
        settings.check_student(self.distilled_guidance)
        return settings

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        num_iterations: int | None = None,
        guidance_scale: float | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        sampler: str | None = None,
        shift: float | None = None,
        guidance_start: float | None = None,
        guidance_end: float | None = None,
        guidance_rescale: float | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> IrisOutput:
        """Images of ``prompt``; or ``image`` changed towards it, if one is given.

        Of how they are sampled, None means: as the model says, else 4 Euler steps with guidance 3.

        Args:
            prompt: one caption or several.
            num_inference_steps, sampler, shift: of ``iris.diffusion.flow``. All steps are taken, whatever the strength.
            num_iterations: passes through the core.
            guidance_scale, guidance_start, guidance_end, guidance_rescale: of ``iris.diffusion.guidance.Guidance``.
            negative_prompt: what guidance leads away from instead of the empty caption.
            num_images_per_prompt: images of each prompt, one after another.
            image: picture to start from (``iris.diffusion.editing.read_images`` says in which forms): image-to-image.
            mask_image: with ``image``, white where to repaint: inpainting.
            strength: how far ``image`` is noised: 0 returns it as the latent reconstructs it, 1 ignores what is
                repainted. None: 0.6, and 1 with a mask.
            height, width: in pixels, multiples of the latent's factor (None: as trained).
            latents: unit noise [N, C, height / factor, width / factor] to start from.
            generator: draws the noise. None: image i starts from noise addressed by (``seed``, i), so that the same
                call gives the same images.
            output_type: pil, np or pt (in [0, 1]), or latent (standardised).
            callback_on_step_end: called after each step, see ``StepCallback``.

        Raises:
            SettingError: an argument that cannot be used, named.
        """
        require_choice("output_type", output_type, OUTPUT_TYPES)
        settings = self.sampling_settings(
            steps=num_inference_steps,
            sampler=sampler,
            guidance=guidance_scale,
            shift=shift,
            iterations=num_iterations,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            guidance_rescale=guidance_rescale,
        )
        prompts = _texts("prompt", prompt, None, num_images_per_prompt)
        against = _texts(
            "negative_prompt", negative_prompt or "", len(prompts) // num_images_per_prompt, num_images_per_prompt
        )
        height, width = self._sides(height, width)
        picture = self._picture(image, mask_image, strength, len(prompts), num_images_per_prompt, height, width)

        def after(step: int, t: Tensor, z: Tensor) -> Tensor:
            return (callback_on_step_end(self, step, t, {"latents": z}) or {}).get("latents", z)

        z = self._sample(
            prompts,
            against,
            (height, width),
            settings,
            addressed_noise(seed) if generator is None else drawn_noise(generator),
            noise=latents,
            picture=picture,
            after=None if callback_on_step_end is None else after,
        )
        return IrisOutput(self._output(z, output_type, picture))

    @torch.no_grad()
    def edit(
        self,
        image: Any,
        source_prompt: str,
        target_prompt: str,
        num_inference_steps: int | None = None,
        num_iterations: int | None = None,
        guidance_scale: float | None = None,
        *,
        sampler: str | None = None,
        shift: float | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> IrisOutput:
        """``image`` as ``target_prompt`` would have had it, from the noise that ``source_prompt`` makes it of.

        The flow is followed backwards under ``source_prompt`` without guidance, and forwards again under
        ``target_prompt``. With one and the same prompt and guidance_scale=1 it gives the image back, up to the
        sampler's error and the latent's. Of how the flow is followed, None means: as the model says, else 8 midpoint
        steps with guidance 3. ``options``: others of ``__call__``.

        Raises:
            SettingError: as ``__call__``; a sampler that draws noise, such as that of a consistency student.
        """
        height, width = self._sides(height, width)
        settings = SamplingSettings.resolved(
            self.sampling or EDITING,
            steps=num_inference_steps,
            sampler=sampler,
            guidance=guidance_scale,
            shift=shift,
            iterations=num_iterations,
        )
        clean = self._encode(read_images(image, height, width))
        text, _ = encode_prompts(self.model.text, [source_prompt] * len(clean), None, self.dtype, self.device)
        latents = invert(GuidedVelocity(self.model.generator, text, iterations=settings.iterations), clean, settings)
        return self(
            [target_prompt] * len(latents),
            settings.steps,
            settings.iterations,
            settings.guidance,
            sampler=settings.sampler,
            shift=settings.shift,
            height=height,
            width=width,
            latents=latents,
            **options,
        )

    @torch.inference_mode()
    def generate(
        self,
        captions: Sequence[str],
        settings: SamplingSettings | None = None,
        seed: int = 0,
        first: int = 0,
        batch: int = 256,
    ) -> Tensor:
        """Images uint8 [len(captions), size, size, 3] of ``captions``, sampled as ``settings`` say (None: the model).

        Image i starts from noise addressed by (seed, first + i), whatever the batch size.

        Raises:
            SettingError: as ``__call__``.
        """
        settings = self.sampling_settings() if settings is None else settings
        settings.check_student(self.distilled_guidance)
        parts = []
        for start in range(0, len(captions), batch):
            chosen = captions[start : start + batch]
            source = addressed_noise(seed, first + start)
            z = self._sample(chosen, [""] * len(chosen), (self.size, self.size), settings, source)
            parts.append(to_pixels(self._decode(z)))
        return torch.cat(parts)

    def _sample(
        self,
        prompts: Sequence[str],
        against: Sequence[str],
        sides: tuple[int, int],
        settings: SamplingSettings,
        source: Noise,
        **options: Any,
    ) -> Tensor:
        """Standardised latents [N, C, h, w] of ``prompts``; ``options``: of ``iris.diffusion.sampling.sample``."""
        led_from = against if settings.guided else None
        text, null = encode_prompts(self.model.text, prompts, led_from, self.dtype, self.device)
        grid = self.latent.grid(*sides)
        return sample(self.model.generator, text, null, grid, settings, source, **options)

    def _sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        sides = self.size if height is None else height, self.size if width is None else width
        factor = self.latent.factor
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % factor:
                raise SettingError(f"{name}={side} must be a positive multiple of {factor}, the latent's factor")
        return sides

    def _picture(
        self, image: Any, mask: Any, strength: float | None, count: int, each: int, height: int, width: int
    ) -> Picture | None:
        if image is None:
            if mask is not None or strength is not None:
                raise SettingError(f"{'strength' if mask is None else 'mask_image'} needs an image")
            return None
        if strength is None:
            strength = STRENGTH if mask is None else 1.0
        images = _one_for_each("image", read_images(image, height, width), count, each).to(self.device)
        if mask is not None:
            mask = _one_for_each("mask_image", read_mask(mask, height, width), count, each).to(self.device)
        return Picture(images, self._encode(images), strength, mask)

    def _encode(self, images: Tensor) -> Tensor:
        return self.latent.encode(images.to(self.latent.mean)).to(working_dtype(self.dtype))

    def _decode(self, z: Tensor) -> Tensor:
        return self.latent.decode(z.to(self.latent.mean.dtype)).float()

    def _output(self, z: Tensor, kind: str, picture: Picture | None) -> list[Image.Image] | np.ndarray | Tensor:
        if kind == "latent":
            return z
        images = self._decode(z)
        if picture is not None:
            images = picture.finish(images)
        if kind == "pil":
            return [Image.fromarray(pixels) for pixels in to_pixels(images).cpu().numpy()]
        images = (images + 1) / 2
        return images if kind == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    def save(self, folder: Path) -> None:
        """Write config.json and weights to ``folder``; pretrained parts are named, not copied."""
        write_folder(folder, self.parts)

    def save_pretrained(
        self, save_directory: str | Path, *, include_text_encoder: bool = False, **hub: Any
    ) -> str | None:
        """``save`` and a model card, README.md.

        Args:
            save_directory: the folder.
            include_text_encoder: copy a pretrained one as well, so that the folder needs nothing else.
            hub: see ``huggingface_hub.ModelHubMixin.save_pretrained``.
        """
        with self._copying_text(include_text_encoder):
            return super().save_pretrained(save_directory, **hub)

    def push_to_hub(self, repo_id: str, *, include_text_encoder: bool = False, **hub: Any) -> str:
        """Upload what ``save_pretrained`` writes; returns the commit's address.

        A text encoder that came from a folder of this machine is included, since nobody else could find it.

        Args:
            repo_id: owner/name.
            include_text_encoder: see ``save_pretrained``.
            hub: see ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Raises:
            SettingError: the latent came from such a folder.
        """
        local = self.parts.folders
        if "latent.source" in local:
            raise SettingError(
                f"latent.source={local['latent.source']} is a folder of this machine; push its "
                "autoencoder and give its hub name"
            )
        hub["model_card_kwargs"] = {"name": repo_id} | (hub.get("model_card_kwargs") or {})
        with self._copying_text(include_text_encoder or "model.text_source" in local):
            return super().push_to_hub(repo_id, **hub)

    @contextmanager
    def _copying_text(self, wanted: bool) -> Iterator[None]:
        """The mixin's methods end in ``_save_pretrained``, which takes the folder alone."""
        before = self._copies_text
        self._copies_text = before or wanted
        try:
            yield
        finally:
            self._copies_text = before

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self.parts, self._copies_text)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card, from ``iris.model.CARD``."""
        return super().generate_model_card(*args, **self.parts.facts() | kwargs)

    @classmethod
    def from_model(cls, model: IrisModel, text_encoder: TextEncoder) -> IrisPipeline:
        """A pipeline of the model's own weights, behind a text encoder.

        Raises:
            SettingError: the encoder's width is not the generator's.
        """
        text_to_latent = TextToLatent(text_encoder, model.generator)
        return cls(text_to_latent, model.latent, model.latent_name, model.latent_options, model.size)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> IrisPipeline:
        """A pipeline from a folder that ``save_pretrained`` or a trial wrote, or from a name on the Hugging Face hub.

        The mixin's own method would read config.json before it is known to be one, and fail without naming it.

        Raises:
            SettingError: neither a folder nor a name that can be had; a file is missing or not readable.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir() and is_hub_name(pretrained_model_name_or_path):
            folder = fetch_pipeline(
                pretrained_model_name_or_path,
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        pipeline = cls(*read_folder(folder))
        return pipeline if torch_dtype is None else pipeline.to(dtype=torch_dtype)


def _texts(name: str, given: str | Sequence[str], count: int | None, each: int) -> list[str]:
    """``given`` as a list, ``each`` times one after another; one text serves all ``count`` prompts."""
    if each < 1:
        raise SettingError(f"num_images_per_prompt={each} must be at least 1")
    texts = [given] * (count or 1) if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise SettingError(f"{name} must be a text or a list of texts, got {given!r}")
    if count is not None and len(texts) != count:
        raise SettingError(f"{name}: {len(texts)} texts for {count} prompts")
    return [text for text in texts for _ in range(each)]


def _one_for_each(name: str, pictures: Tensor, count: int, each: int) -> Tensor:
    """One picture for all ``count`` images, or one for each prompt, which has ``each`` images."""
    if len(pictures) == 1:
        return pictures.expand(count, -1, -1, -1)
    if len(pictures) * each != count:
        raise SettingError(f"{name}: {len(pictures)} pictures for {count // each} prompts")
    return pictures.repeat_interleave(each, 0)
