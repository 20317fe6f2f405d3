"""A chain: each link makes a picture of what the one before it made, from words or from a picture on.

One generator, ``torch.Generator().manual_seed(seed)`` on the CPU, goes through all links, as if it were given to
diffusers' own calls one after the other. Its draws, link by link:

1. from words: the noise. From a picture: the VAE's sample, then the noise. From latents: the noise alone;
2. whatever the scheduler draws at each step, as DDPM and the ancestral ones do.

Between two links whose VAEs are the same, which is looked at and not assumed, latents are handed on as they are. To
decode and encode them again would lose a little, and draw once more. Pictures for show are decoded on the side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from torch import Tensor, nn

from decinb.errors import InputError, ModelError
from decinb.execution.provenance import (
    Record,
    image_hash,
    key,
    origin,
    picture_name,
)
from decinb.images import Source, load_image, read_record, save_image
from decinb.models import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from decinb.pipeline import is_decidiffusion
from decinb.sampling.adapters import call_arguments, defaults, kind_of, lost_words, takes
from decinb.utils import validation
from decinb.utils.environment import versions
from decinb.utils.locks import pipeline_lock
from decinb.utils.quiet import quiet

CHAIN = "chain"
"""What the record of a chain's picture has, and no other: its links, each with what made it."""

LATENT, PICTURE = "latent", "picture"

NUMBERS = {
    "strength": validation.strength,
    "guidance_scale": validation.guidance_scale,
    "num_inference_steps": validation.num_inference_steps,
    "guidance_rescale": lambda value, where: validation.fraction(value, f"{where}guidance_rescale"),
}
ARGUMENTS = ("prompt", "negative_prompt", *NUMBERS, "takes")
"""What a link may name besides its pipeline."""

FROM_LATENTS = (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline)
"""The pipelines that go on from latents. Those with depth must see a picture, and others encode all they are given."""

UNSEEN = ("sample_size", "force_upcast")  # of a VAE's config: no latent looks different for them


@dataclass(frozen=True)
class Link:
    """One call in a chain: a pipeline and its arguments, by diffusers' names. What is None is the pipeline's default.

    Args:
        pipe: from ``load_pipeline``, or any text-to-image or image-to-image pipeline of diffusers.
        prompt: what the picture should become.
        negative_prompt: what it should not.
        strength: how far to go from what came before, above 0 and at most 1; not of text to image.
        guidance_scale: 0 or more; 1 or less switches guidance off.
        num_inference_steps: 1 to 999.
        guidance_rescale: 0 to 1, where the pipeline takes it.
        takes: ``"latent"`` or ``"picture"``, what the link before is to hand on. None is the latent where both have
            the same VAE, else the picture.

    Values are looked at by ``run_chain``.
    """

    pipe: DiffusionPipeline
    prompt: str
    negative_prompt: str | None = None
    strength: float | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    guidance_rescale: float | None = None
    takes: str | None = None


@dataclass
class Chain:
    """What came out: the input, or None; a picture of every link, and the record of how each was made."""

    image: Image.Image | None = None
    images: list[Image.Image] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.images)

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the input and the pictures in a row: see ``decinb.plotting.plot_chain``."""
        from decinb.plotting import plot_chain

        plot_chain(self, *args, **kwargs)


def run_chain(
    links: Sequence[Link], image: Source | None = None, seed: int = 0, folder: str | Path | None = None
) -> Chain:
    """Run links one after the other, each by its pipeline's own call on what the one before it made.

    All links are checked before the first one runs. With a folder, each picture is written there the moment it is
    made, and ``replay`` makes it again, with all links before it, from the file alone. Stopping the notebook cell
    returns what is done, and an error has it as its ``chain``. Where the folder cannot be written to, a warning says
    so, and the pictures stay in memory.

    Args:
        links: at least one ``Link``. Only the first may be text to image.
        image: the input of the first link, as ``load_image`` takes it; None where that is text to image.
        seed: of the generator that goes through all links, 0 to 2**63 - 1.
        folder: where every picture is written, as a PNG with its record and the input inside.

    Raises:
        InputError: a link cannot run, or cannot follow the one before it; the message names it.
        ModelError: a link made NaN or infinity; the message names it.
    """
    steps = _read(links, image is not None)
    seed = validation.seed(seed)
    folder = None if folder is None else Path(validation.folder(folder))
    picture = None if image is None else load_image(image)
    records = _records(steps, seed, picture, picture_name(image, picture))
    chain = Chain(picture, folder=folder)
    try:
        for made, record in zip(_run(steps, picture, seed), records, strict=True):
            record |= {"seconds": round(made.seconds, 3), "blacked_out": made.blacked_out}
            chain.images.append(made.picture)
            chain.records.append(record)
            if made.blacked_out:
                validation.warn(f"link {len(chain) - 1}: black, since the safety checker took it for unsafe")
            if folder:
                _save(folder, made.picture, record, picture)
    except KeyboardInterrupt:
        print(f"stopped: {len(chain)} of {len(steps)} links are done")
    except Exception as error:
        error.chain = chain
        raise
    return chain


# --- the door ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """A link that is known to be good: what its call takes, and what is handed to it."""

    pipe: DiffusionPipeline
    task: str
    arguments: dict[str, Any]
    takes: str | None
    scheduler: Any  # the pipeline's own, but for a chain that is made again


def _read(links: Any, has_image: bool, schedulers: Sequence[Any] | None = None) -> list[_Step]:
    """Understand all links, or raise an InputError that names the one at fault."""
    if not isinstance(links, Sequence) or isinstance(links, (str, bytes)) or not links:
        raise InputError(f"links must be a list of at least one decinb.Link, got {validation.short_repr(links)}")
    steps: list[_Step] = []
    for i, link in enumerate(links):
        if not isinstance(link, Link):
            raise InputError(f"link {i} must be a decinb.Link(pipe, prompt, ...), got {validation.short_repr(link)}")
        if not isinstance(link.pipe, DiffusionPipeline):
            raise InputError(
                f"link {i}: pipe must be a pipeline, as load_pipeline gives it, got {validation.short_repr(link.pipe)}"
            )
        scheduler = schedulers[i] if schedulers else link.pipe.scheduler
        arguments = _arguments(link, scheduler, f"link {i}: ")
        takes = _handed(link, i, steps[-1].pipe, f"link {i}: ") if steps else _first(link, has_image)
        steps.append(_Step(link.pipe, _task(link.pipe), arguments, takes, scheduler))
    return steps


def _arguments(link: Link, scheduler: Any, where: str) -> dict[str, Any]:
    """The arguments of a link's call as plain values, what is left out filled in."""
    pipe, known = link.pipe, call_arguments(link.pipe)
    if "prompt" not in known:
        raise InputError(f"{where}{_class(pipe)} takes no prompt")
    for needed in ("mask_image", "control_image"):
        if needed in known:
            raise InputError(f"{where}{_class(pipe)} needs {needed}, which a chain does not give")
    for name in ("negative_prompt", *NUMBERS):
        if getattr(link, name) is not None and name not in known:
            raise InputError(f"{where}{name} must be left out: {_class(pipe)}, {_task(pipe)}, takes none")
    found = {"prompt": validation.text(link.prompt, f"{where}prompt")}
    if link.negative_prompt is not None:
        found["negative_prompt"] = validation.text(link.negative_prompt, f"{where}negative_prompt")
    for name in ("prompt", "negative_prompt") if not is_decidiffusion(pipe) else ():  # those warn themselves
        if lost := lost_words(pipe, found.get(name, "")):
            validation.warn(where + validation.lost(name, lost))
    own = defaults(pipe)
    for name, read in NUMBERS.items():
        if name in known:
            found[name] = read(own[name] if getattr(link, name) is None else getattr(link, name), where)
    if "strength" in found:
        validation.steps_run(found["num_inference_steps"], found["strength"], where)
    try:
        validation.late_start(found["num_inference_steps"], scheduler)
    except InputError as error:
        raise InputError(f"{where}{error}") from error
    return found


def _first(link: Link, has_image: bool) -> str | None:
    """What the first link takes: the picture that was given, or nothing."""
    takes_image = _task(link.pipe) == IMAGE_TO_IMAGE
    if takes_image and not has_image:
        raise InputError(f"image must be given: link 0, {_class(link.pipe)}, is image to image")
    if has_image and not takes_image:
        raise InputError(f"image must be left out: link 0, {_class(link.pipe)}, is text to image")
    if link.takes is not None and (link.takes != PICTURE or not takes_image):
        raise InputError(
            f"link 0: takes must be left out, since nothing came before, got {validation.short_repr(link.takes)}"
        )
    return PICTURE if takes_image else None


def _handed(link: Link, i: int, before: DiffusionPipeline, where: str) -> str:
    """What a later link takes of the one before it."""
    if _task(link.pipe) == TEXT_TO_IMAGE:
        raise InputError(
            f"{where}{_class(link.pipe)} is text to image, which would forget what came before: give "
            f"load_pipeline(pipe, task={IMAGE_TO_IMAGE!r})"
        )
    if link.takes is not None:
        validation.choice(link.takes, f"{where}takes", (LATENT, PICTURE))
    if link.takes == PICTURE:
        return PICTURE
    apart = _apart(before, link.pipe)
    if apart and link.takes == LATENT:
        raise InputError(f"{where}takes cannot be 'latent' from link {i - 1}: {apart}; 'picture' can be")
    return PICTURE if apart else LATENT


def _apart(before: DiffusionPipeline, after: DiffusionPipeline) -> str | None:
    """Why latents cannot be handed from one pipeline to another as they are; None where they can."""
    if kind_of(before) is None:
        return f"{_class(before)} gives none"
    if not isinstance(after, FROM_LATENTS):
        return f"{_class(after)} must be given a picture"
    one, other = before.vae, after.vae
    if one is other:
        return None
    pair = f"the VAEs of {_class(before)} and {_class(after)} differ"
    if type(one) is not type(other):
        return f"{pair}, {type(one).__name__} and {type(other).__name__}"
    configs = [
        {n: v for n, v in vae.config.items() if not n.startswith("_") and n not in UNSEEN} for vae in (one, other)
    ]
    for name in configs[0] | configs[1]:
        values = [config.get(name) for config in configs]
        if values[0] != values[1]:
            return f"{pair}: {name} is {validation.short_repr(values[0])} and {validation.short_repr(values[1])}"
    name = _first_difference(one, other)
    return name and f"{pair}: {name} is another"


@torch.no_grad()
def _first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The name of a tensor in which two networks differ, told in the coarser numbers; None where they agree."""
    first, second = one.state_dict(), other.state_dict()
    if odd := sorted(first.keys() ^ second.keys()):
        return odd[0]
    for name, tensor in first.items():
        twin = second[name].to(tensor.device)
        coarser = min(tensor.dtype, twin.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(tensor.to(coarser), twin.to(coarser)):
            return name
    return None


def _task(pipe: DiffusionPipeline) -> str:
    return IMAGE_TO_IMAGE if takes(pipe, "image") else TEXT_TO_IMAGE


def _class(pipe: DiffusionPipeline) -> str:
    return type(pipe).__name__


# --- the way ----------------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """What a link made: a picture, and latents where its pipeline gives them."""

    picture: Image.Image
    latents: Tensor | None
    seconds: float
    blacked_out: bool


def _run(steps: Sequence[_Step], picture: Image.Image | None, seed: int) -> Iterator[_Made]:
    generator = torch.Generator().manual_seed(seed)
    made = None
    for i, step in enumerate(steps):
        handed: Any = picture
        if made is not None:
            handed = made.latents if step.takes == LATENT else made.picture
        try:
            with pipeline_lock(step.pipe):
                made = _make(step, handed, generator)
        except (InputError, ModelError) as error:
            raise type(error)(f"link {i}: {error}") from error
        except Exception as error:
            error.add_note(f"in link {i} of the chain")
            raise
        yield made


def _make(step: _Step, handed: Image.Image | Tensor | None, generator: torch.Generator) -> _Made:
    """The pipeline's own call, and the picture of what came out."""
    pipe, kind, given = step.pipe, kind_of(step.pipe), dict(step.arguments)
    if step.task == IMAGE_TO_IMAGE:
        given["image"] = handed
        if isinstance(handed, Image.Image) and {"height", "width"} <= call_arguments(pipe).keys():
            given |= {"height": handed.height, "width": handed.width}  # their defaults would squash it
    started = perf_counter()
    before = pipe.scheduler
    pipe.scheduler = step.scheduler
    try:
        # NumPy's floats, where latents are not to be had: they show NaN, which a picture hides.
        with quiet():  # what is cut off of a prompt was told at the door
            made = pipe(**given, generator=generator, output_type="latent" if kind else "np").images
        latents = made if kind else None
        if latents is not None and not latents.isfinite().all():
            raise ModelError(_lost("the network or its guidance"))
        shown, blacked_out = kind(pipe).pictures(latents)[0] if kind else (_picture(made[0]), False)
    finally:
        pipe.scheduler = before
        pipe.maybe_free_model_hooks()
    if shown is None:
        raise ModelError(_lost("the VAE's decoder, or what came before it"))
    return _Made(shown, latents, perf_counter() - started, blacked_out)


def _picture(pixels: np.ndarray) -> Image.Image | None:
    """Floats from 0 to 1 as a picture; None where they are no numbers."""
    return DiffusionPipeline.numpy_to_pil(pixels)[0] if np.isfinite(pixels).all() else None


def _lost(culprit: str) -> str:
    return (
        f"no picture was made, only NaN or infinity, by {culprit}: lower guidance_scale, or load_pipeline with "
        "dtype='float32'"
    )


# --- records ----------------------------------------------------------------------------------------------------------

NEEDED = ["task", "model", "weights", "scheduler", "scheduler_config", *ARGUMENTS]


def _records(steps: Sequence[_Step], seed: int, picture: Image.Image | None, name: str | None) -> list[Record]:
    """For every link the record of its picture: of the links up to it. The key is of what decides the pixels alone."""
    made_by = {id(step.pipe): origin(step.pipe) for step in steps}
    links = [
        {"task": step.task, "pipeline": _class(step.pipe)}
        | made_by[id(step.pipe)]
        | {name: step.arguments.get(name) for name in ARGUMENTS}
        | {"takes": step.takes}
        for step in steps
    ]
    decides = [{name: link[name] for name in NEEDED if name != "model"} | {"dtype": link["dtype"]} for link in links]
    hashed = None if picture is None else image_hash(picture)
    return [
        {
            CHAIN: links[:i],
            "seed": seed,
            "image": name,
            "image_hash": hashed,
            "image_size": None if picture is None else list(picture.size),
            "versions": versions(),
            "key": key(chain=decides[:i], seed=seed, image=hashed),
        }
        for i in range(1, len(links) + 1)
    ]


def _save(folder: Path, made: Image.Image, record: Record, picture: Image.Image | None) -> None:
    """Write a picture under a name that only the same computation has; where it is already, it stays."""
    link = len(record[CHAIN]) - 1
    path = folder / f"link-{link}_seed-{record['seed']}_{record['key']}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_whole(path):
            save_image(made, path, record, picture)
    except OSError as error:
        validation.warn(
            f"folder {str(folder)!r} cannot be written to ({error.strerror or error}): the picture of link {link} "
            "stays in memory, in the chain that is returned"
        )


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_record(path))
    except InputError:
        return False
