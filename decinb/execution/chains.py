"""Chains: each link makes an image from the image or the latents of the link before it.

One generator, ``torch.Generator().manual_seed(seed)`` on the CPU, is used by all links, as if it were passed to
diffusers' own calls one after the other. Its draws, link by link:

1. from text: the noise; from an image: the VAE's sample, then the noise; from latents: the noise alone;
2. whatever the scheduler draws at each step, as DDPM and the ancestral schedulers do.

Between two links with equal VAEs, which is checked, latents are passed on as they are. Decoding and encoding them would
lose detail and draw one more sample. The images of such links are decoded only to be shown and saved.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from decinb.errors import InputError, ModelError, Stopped, SweepError, reason
from decinb.execution.provenance import (
    LINK_ARGUMENTS,
    ImageRecord,
    chain_records,
    image_hash,
    image_name,
    pipeline_record,
)
from decinb.execution.store import Store
from decinb.images import OUTPUT_HASH, Source, load_image
from decinb.models import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from decinb.pipeline import (
    DeciDiffusionDepth2ImgPipeline,
    DeciDiffusionImg2ImgPipeline,
    DeciDiffusionPipeline,
    is_decidiffusion,
)
from decinb.sampling.adapters import BATCHED, adapter_of
from decinb.sampling.base import Adapter, Output
from decinb.utils import validation
from decinb.utils.locks import pipeline_lock
from decinb.utils.quiet import quiet

MAX_LINKS = 100

LATENT, PICTURE = "latent", "picture"
"""What one link takes from the link before it."""

NUMBERS = {
    "strength": validation.strength,
    "guidance_scale": validation.guidance_scale,
    "num_inference_steps": validation.num_inference_steps,
    "guidance_rescale": lambda value, where: validation.fraction(value, f"{where}guidance_rescale"),
}

DECIDIFFUSION = (DeciDiffusionPipeline, DeciDiffusionImg2ImgPipeline, DeciDiffusionDepth2ImgPipeline)
ALIKE = tuple(cls.__name__ for cls in (*BATCHED, *DECIDIFFUSION))
"""The pipeline classes that make the same image of the same components, task and arguments."""

NOT_IN_LATENTS = ("sample_size", "force_upcast")  # options of a VAE's config that do not change its latents


@dataclass(frozen=True)
class Link:
    """One call in a chain: a pipeline and its arguments, named as in diffusers. None is the pipeline's default.

    ``run_chain`` checks the values.

    Args:
        pipe: from ``load_pipeline``, or any text-to-image or image-to-image pipeline of diffusers.
        prompt: what the image should show.
        negative_prompt: what it should not show.
        strength: how much of the input to replace, above 0 and at most 1; not for text to image.
        guidance_scale: 0 to 10,000; 1 or less turns guidance off.
        num_inference_steps: 1 to 999.
        guidance_rescale: 0 to 1, if the pipeline takes it.
        takes: ``"latent"`` or ``"picture"``, what the link before passes on. None is the latent if both links have
            equal VAEs, else the picture.
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
    """The finished links of a chain.

    Attributes:
        image: the input of the first link, or None.
        images: of the links, in order.
        records: of the images, each with all links up to it.
        folder: where the images are saved, or None.
    """

    image: Image.Image | None = None
    images: list[Image.Image] = field(default_factory=list)
    records: list[ImageRecord] = field(default_factory=list)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.images)

    def plot(self, *args: Any, **kwargs: Any) -> None:
        """Show the input and the images in a row: see ``decinb.plotting.plot_chain``."""
        from decinb.plotting import plot_chain

        plot_chain(self, *args, **kwargs)


def run_chain(
    links: Sequence[Link], image: Source | None = None, seed: int = 0, folder: str | Path | None = None
) -> Chain:
    """Run links one after the other, each by its pipeline's own call on the result of the one before it.

    All links are checked before the first one runs. With a folder, each image is saved as soon as it is made, and
    ``replay`` makes it again, with all links before it, from the file alone. An exception carries what is done as its
    ``chain``. If the folder cannot be written to, a warning says so and images stay in memory.

    Args:
        links: at least one ``Link``. Only the first may be text to image.
        image: the input of the first link, anything that ``load_image`` takes; None if that is text to image.
        seed: of the generator that all links share, 0 to 2**63 - 1.
        folder: where every image is saved, as a PNG that also holds its record and the input.

    Raises:
        InputError: a link cannot run, or cannot follow the one before it; the message names it.
        ModelError: a link made NaN or infinity; the message names it.
        SweepError: a link failed in another way, such as a scheduler that its pipeline cannot use.
        Stopped: the chain was interrupted. It is a ``KeyboardInterrupt``; its ``done`` is a chain of what was finished.
    """
    calls = read_links(links, image is not None)
    seed = validation.seed(seed)
    store = None if folder is None else Store(validation.folder(folder))
    first = None if image is None else load_image(image)
    records = _records(calls, seed, first, image_name(image, first))
    chain = Chain(first, folder=None if store is None else store.folder)
    outputs = run_calls(calls, first, seed)
    try:
        for link, record in enumerate(records):
            output, seconds = next(outputs)
            record |= {"seconds": round(seconds, 3), "blacked_out": output.blacked_out}
            record[OUTPUT_HASH] = image_hash(output.image.convert("RGB"))
            chain.images.append(output.image)
            chain.records.append(record)
            if output.blacked_out:
                validation.warn(f"link {link}: the image is black, because the safety checker judged it unsafe")
            if store:
                _save(store, output.image, record, first, link)
    except KeyboardInterrupt as interrupt:
        saved = "" if store is None else f" and saved in {str(store.folder)!r}"
        done = f"{len(chain)} of {len(calls)} links are done{saved}; sys.last_value.done holds them"
        raise Stopped(done, chain) from interrupt
    except (InputError, ModelError) as error:
        error.chain = chain
        raise
    except Exception as error:
        done = f"{len(chain)} of {len(calls)} links are done and are in this error's `chain`"
        failure = SweepError(f"link {link} failed: {reason(error)}; {done}", chain)
        failure.chain = chain
        raise failure from error
    return chain


def _records(calls: Sequence["Call"], seed: int, image: Image.Image | None, name: str | None) -> list[ImageRecord]:
    pipelines = {id(call.adapter.pipe): call.adapter.pipe for call in calls}
    made_by = {identity: pipeline_record(pipe) for identity, pipe in pipelines.items()}  # once: it hashes the weights
    links = [
        {"task": call.adapter.task, "pipeline": call.adapter.name}
        | made_by[id(call.adapter.pipe)]
        | {argument: call.arguments.get(argument) for argument in LINK_ARGUMENTS}
        | {"takes": call.takes}
        | ({} if call.adapter.name in ALIKE else {"decides": {"pipeline": call.adapter.name}})
        for call in calls
    ]
    return chain_records(links, seed, image, name)


def _save(store: Store, image: Image.Image, record: ImageRecord, input_image: Image.Image | None, link: int) -> None:
    try:
        store.keep(image, record, input_image)
    except OSError as error:
        validation.warn(
            f"folder {str(store.folder)!r} cannot be written to ({error.strerror or error}): the image of link {link} "
            "stays in memory, in the returned chain"
        )


# --- validation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A validated link.

    Args:
        adapter: of its pipeline.
        arguments: of its pipeline's call, besides the image.
        takes: what it takes as its image: ``"latent"``, ``"picture"`` or, for text to image, None.
        scheduler: the pipeline's own, or in a replay the one that the record names.
    """

    adapter: Adapter
    arguments: dict[str, Any]
    takes: str | None
    scheduler: SchedulerMixin


def read_links(links: Any, has_image: bool, schedulers: Sequence[SchedulerMixin] | None = None) -> list[Call]:
    """Validate the links of a chain.

    Args:
        links: as given to ``run_chain``.
        has_image: whether there is an image for the first link.
        schedulers: one for each link; None are the pipelines' own.

    Raises:
        InputError: a link cannot run; the message names it.
    """
    if not isinstance(links, Sequence) or isinstance(links, (str, bytes)) or not links:
        raise InputError(f"links must be a list of at least one decinb.Link, got {validation.short_repr(links)}")
    if len(links) > MAX_LINKS:
        raise InputError(f"links must be at most {MAX_LINKS}, got {len(links)}")
    calls: list[Call] = []
    for i, link in enumerate(links):
        where = f"link {i}: "
        if not isinstance(link, Link):
            raise InputError(f"link {i} must be a decinb.Link(pipe, prompt, ...), got {validation.short_repr(link)}")
        try:
            adapter = adapter_of(link.pipe)
        except InputError as error:
            raise InputError(f"{where}{error}") from error
        scheduler = schedulers[i] if schedulers else link.pipe.scheduler
        arguments = _read_arguments(adapter, link, scheduler, where)
        if calls:
            takes = _what_it_takes(adapter, link, calls[-1].adapter, i)
        else:
            takes = _what_the_first_takes(adapter, link, has_image)
        calls.append(Call(adapter, arguments, takes, scheduler))
    return calls


def _read_arguments(adapter: Adapter, link: Link, scheduler: SchedulerMixin, where: str) -> dict[str, Any]:
    """Return the validated arguments of a link's call, with the pipeline's defaults for those left out."""
    if not adapter.takes("prompt"):
        raise InputError(f"{where}{adapter.name} takes no prompt")
    for needed in ("mask_image", "control_image"):
        if adapter.takes(needed):
            raise InputError(f"{where}{adapter.name} needs {needed}, which a chain does not provide")
    for name in ("negative_prompt", *NUMBERS):
        if getattr(link, name) is not None and not adapter.takes(name):
            raise InputError(f"{where}{name} must be left out: {adapter.name}, {adapter.task}, does not take it")
    arguments = {"prompt": validation.text(link.prompt, f"{where}prompt")}
    if link.negative_prompt is not None:
        arguments["negative_prompt"] = validation.text(link.negative_prompt, f"{where}negative_prompt")
    for name, text in arguments.items() if not is_decidiffusion(adapter.pipe) else ():  # those warn in their own call
        if end := adapter.truncated_text(text):
            validation.warn(where + validation.lost(name, end))
    for name, validate in NUMBERS.items():
        if adapter.takes(name):
            given = getattr(link, name)
            arguments[name] = validate(adapter.defaults[name] if given is None else given, where)
    if "strength" in arguments:
        validation.steps_run(arguments["num_inference_steps"], arguments["strength"], where)
    try:
        validation.late_start(arguments["num_inference_steps"], scheduler)
    except InputError as error:
        raise InputError(f"{where}{error}") from error
    return arguments


def _what_the_first_takes(adapter: Adapter, link: Link, has_image: bool) -> str | None:
    takes_image = adapter.task == IMAGE_TO_IMAGE
    if takes_image and not has_image:
        raise InputError(f"image must be given: link 0, {adapter.name}, is image to image")
    if has_image and not takes_image:
        raise InputError(f"image must be left out: link 0, {adapter.name}, is text to image")
    if link.takes is not None and not (takes_image and validation.equal(link.takes, PICTURE)):
        raise InputError(
            f"link 0: takes must be left out, since no link comes before, got {validation.short_repr(link.takes)}"
        )
    return PICTURE if takes_image else None


def _what_it_takes(adapter: Adapter, link: Link, before: Adapter, i: int) -> str:
    where = f"link {i}: "
    if adapter.task == TEXT_TO_IMAGE:
        raise InputError(
            f"{where}{adapter.name} is text to image and would ignore the link before it: give "
            f"load_pipeline(pipe, task={IMAGE_TO_IMAGE!r})"
        )
    if link.takes is not None:
        validation.choice(link.takes, f"{where}takes", (LATENT, PICTURE))
    if link.takes == PICTURE:
        return PICTURE
    obstacle = latent_obstacle(before, adapter)
    if obstacle and link.takes == LATENT:
        raise InputError(f"{where}takes cannot be 'latent' from link {i - 1}: {obstacle}; 'picture' can be")
    return PICTURE if obstacle else LATENT


def latent_obstacle(before: Adapter, after: Adapter) -> str | None:
    """Return why latents cannot be passed from one pipeline to another as they are; None if they can."""
    if not before.exposes_latents:
        return f"{before.name} does not return them"
    if not after.accepts_latents:
        return f"{after.name} does not accept them"
    one, other = before.pipe.vae, after.pipe.vae
    if one is other:
        return None
    differ = f"the VAEs of {before.name} and {after.name} differ"
    if type(one) is not type(other):
        return f"{differ}: they are {type(one).__name__} and {type(other).__name__}"
    first, second = (
        {name: value for name, value in vae.config.items() if not name.startswith("_") and name not in NOT_IN_LATENTS}
        for vae in (one, other)
    )
    for name in first | second:
        if first.get(name) != second.get(name):
            values = " and ".join(validation.short_repr(config.get(name)) for config in (first, second))
            return f"{differ}: {name} is {values}"
    name = _first_difference(one, other)
    return name and f"{differ} in {name}"


@torch.no_grad()
def _first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """Return the name of a tensor that differs between two networks, compared in the lower precision; else None."""
    first, second = one.state_dict(), other.state_dict()
    if unmatched := sorted(first.keys() ^ second.keys()):
        return unmatched[0]
    for name, tensor in first.items():
        twin = second[name].to(tensor.device)
        dtype = min(tensor.dtype, twin.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(tensor.to(dtype), twin.to(dtype)):
            return name
    return None


# --- running ----------------------------------------------------------------------------------------------------------


def run_calls(calls: Sequence[Call], image: Image.Image | None, seed: int) -> Iterator[tuple[Output, float]]:
    """Run validated links one after the other, all with one generator.

    Yields:
        The output of each link, and the seconds it took.

    Raises:
        ModelError: a link made NaN or infinity; the message names it.
    """
    generator = torch.Generator().manual_seed(seed)
    output = Output(image, None, False)
    for i, call in enumerate(calls):
        given = output.latents if call.takes == LATENT else output.image
        try:
            with pipeline_lock(call.adapter.pipe):
                started = perf_counter()
                output = _run_call(call, given, generator)
                seconds = perf_counter() - started
        except (InputError, ModelError) as error:
            raise type(error)(f"link {i}: {error}") from error
        except Exception as error:
            error.add_note(f"in link {i} of the chain")
            raise
        yield output, seconds


def _run_call(call: Call, given: Image.Image | Tensor | None, generator: torch.Generator) -> Output:
    adapter, arguments = call.adapter, dict(call.arguments)
    if call.takes is not None:
        arguments["image"] = given
        if isinstance(given, Image.Image) and adapter.takes("height") and adapter.takes("width"):
            arguments |= {"height": given.height, "width": given.width}  # the defaults would distort it
    pipe = adapter.pipe
    before, pipe.scheduler = pipe.scheduler, call.scheduler
    try:
        with quiet():  # read_links has already warned of truncated prompts
            output = adapter.call(arguments, generator)
    finally:
        pipe.scheduler = before
        pipe.maybe_free_model_hooks()
    if output.image is None:
        raise ModelError(
            "no image was made: the VAE's decoder or an earlier part gave NaN or infinity; lower guidance_scale, or "
            "load the model with dtype='float32'"
        )
    return output
