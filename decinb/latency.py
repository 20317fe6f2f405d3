"""What a U-Net costs: parameters and FLOPs counted, seconds measured, for DeciDiffusion and Stable Diffusion v1.5.

Counting runs on torch's meta device, which does no arithmetic: it takes half a second and no memory. Measuring takes
full-size U-Nets with random weights: a matrix product takes as long for random numbers as for trained ones, so no
checkpoint is downloaded. One FLOP is one addition or one multiplication; torch counts those of matrix products,
convolutions and attention, which are nearly all.
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from decinb.errors import InputError
from decinb.quiet import quiet

with quiet():  # importing these tells of optional libraries that are not needed here
    import diffusers
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from decinb.unet_nas import UNetNAS

# --- the networks -----------------------------------------------------------------------------------------------------


def sd15_unet() -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion v1.5."""
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    )


def sd15_vae() -> AutoencoderKL:
    """The VAE of Stable Diffusion v1.5, which DeciDiffusion shares."""
    return AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def sd15_text_encoder() -> CLIPTextModel:
    """The text encoder of Stable Diffusion v1.5, which DeciDiffusion shares: that of CLIP ViT-L/14."""
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"U-Net-NAS": UNetNAS, "SD v1.5": sd15_unet}
"""The two U-Nets that are compared: a name, and what builds it."""

PUBLISHED: dict[tuple[str, str, int], float] = {
    ("U-Net-NAS", "PyTorch", 50): 2.11,
    ("SD v1.5", "PyTorch", 50): 2.95,
    ("U-Net-NAS", "Infery", 50): 1.55,
    ("SD v1.5", "Infery", 50): 2.08,
    ("U-Net-NAS", "PyTorch", 35): 1.52,
    ("U-Net-NAS", "Infery", 35): 1.07,
    ("U-Net-NAS", "PyTorch", 30): 1.29,
    ("U-Net-NAS", "Infery", 30): 0.98,
}
"""Seconds an image by (U-Net, runtime, steps), as Deci published them for DeciDiffusion 1.0: text to image of 512 x 512
pixels, float16, one image at a time, on an NVIDIA A10. Infery is Deci's own compiled runtime."""

PUBLISHED_SOURCE = "https://huggingface.co/Deci/DeciDiffusion-v1-0"


def random_model(
    factory: Callable[[], nn.Module], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a network with random weights in seconds, in the memory it needs and no more.

    Weights are normal with a variance of one over the inputs of a layer, norms are 1 and biases 0, so that numbers keep
    their size on the way through, as in a trained network: nothing overflows, and nothing sinks to slow denormals.
    """
    with torch.device("meta"):
        model = factory()
    nn.Module.to(model, dtype)  # diffusers' own `to` warns here of layers to keep in float32, though there are none
    model.to_empty(device=device).eval().requires_grad_(False)
    # Numbers cost more to draw than to copy: a pool of them is drawn once and laid out again and again.
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            weight.fill_(float(name.endswith("weight")))
        else:
            scaled = pool * weight[0].numel() ** -0.5
            for piece in weight.view(-1).split(len(scaled)):
                piece.copy_(scaled[: len(piece)])
    return model


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One block of a network: what stands in it and what it costs in one row of a forward call.

    ``side`` is the height and width at which the block works, in pixels of the latent; 0 for ``rest``.
    """

    name: str
    side: int
    resnets: int
    transformers: int
    parameters: int
    flops: int
    resnet_flops: int
    transformer_flops: int


@dataclass(frozen=True)
class Cost:
    """What a network costs in one row of a forward call: in all, and block by block as they run, the ``rest`` last."""

    parameters: int
    flops: int
    blocks: tuple[Block, ...]


def count(
    model: nn.Module | Callable[[], nn.Module], size: int = 64, tokens: int = 77, inputs: tuple | None = None
) -> Cost:
    """Count parameters, and the FLOPs of one row of a forward call, without doing the arithmetic.

    Args:
        model: a network, which is left as it is, or what builds one, which then needs no memory.
        size: height and width of a U-Net's latent.
        tokens: length of its text embedding.
        inputs: of a network that is no U-Net: tensors on the meta device, with a batch of one.
    """
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model()
    inputs = _unet_inputs(model, 1, size, tokens, "meta") if inputs is None else inputs
    shadow = {name: t.to("meta") for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    sides: dict[str, int] = {}
    hooks = [_note_side(block, name, sides) for name, block in _blocks(model).items()]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, shadow, inputs)
    finally:
        for hook in hooks:
            hook.remove()

    spent = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    blocks = [_block(model, name, side, spent) for name, side in sides.items()]  # in the order in which they ran
    parameters, flops = _parameters(model), counter.get_total_flops()
    others = parameters - sum(b.parameters for b in blocks), flops - sum(b.flops for b in blocks)
    return Cost(parameters, flops, (*blocks, Block("rest", 0, 0, 0, *others, 0, 0)))


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The parts one level down, lists opened, in which ResNets or Transformers stand."""
    parts = {}
    for name, child in model.named_children():
        opened = {f"{name}.{i}": c for i, c in enumerate(child)} if isinstance(child, nn.ModuleList) else {name: child}
        parts.update({n: c for n, c in opened.items() if _parts(c, ResnetBlock2D) or _parts(c, Transformer2DModel)})
    return parts


def _parts(module: nn.Module, kind: type) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, kind)]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _note_side(block: nn.Module, name: str, sides: dict[str, int]) -> Any:
    # A ResNet keeps the size of what it is given, a block need not: its last layer may be a sampler.
    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        sides[name] = output.shape[-1]

    return block.get_submodule(_parts(block, ResnetBlock2D)[0]).register_forward_hook(note)


def _block(model: nn.Module, name: str, side: int, spent: dict[str, int]) -> Block:
    module, root = model.get_submodule(name), f"{type(model).__name__}.{name}"
    resnets, transformers = _parts(module, ResnetBlock2D), _parts(module, Transformer2DModel)
    return Block(
        name,
        side,
        len(resnets),
        len(transformers),
        _parameters(module),
        spent[root],
        sum(spent[f"{root}.{part}"] for part in resnets),
        sum(spent[f"{root}.{part}"] for part in transformers),
    )


def _unet_inputs(unet: nn.Module, rows: int, size: int, tokens: int, device: torch.device | str) -> tuple[Tensor, ...]:
    kind = {"device": device, "dtype": next(unet.parameters()).dtype}
    latent = torch.randn(rows, unet.config["in_channels"], size, size, **kind)
    return latent, torch.full((rows,), 500, device=device), torch.randn(rows, tokens, _text_width(unet), **kind)


def _text_width(unet: nn.Module) -> int:
    return unet.config.get("configurations", unet.config)["cross_attention_dim"]


@dataclass
class UNetCalls:
    """How often a U-Net was called, and how many rows it was given in all: two a call with guidance, else one."""

    calls: int = 0
    rows: int = 0


@contextmanager
def count_unet_calls(pipe: Any) -> Iterator[UNetCalls]:
    """Count the calls of a pipeline's U-Net while the ``with`` block runs: what was done, not what was asked for."""
    counted = UNetCalls()

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        counted.calls += 1
        counted.rows += output[0].shape[0]

    hook = pipe.unet.register_forward_hook(note)
    try:
        yield counted
    finally:
        hook.remove()


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Times of the same work in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        return max(self.seconds)


def measure(
    functions: Mapping[str, Callable[[], object]],
    repeats: int = 6,
    warmup: int = 1,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time functions against each other, in turns: A B B A A B B A, so that a slow spell of the machine hits all alike.

    Args:
        functions: what to time, by name.
        repeats: times each function is timed, 1 or more. Even is fairer: then each goes first equally often.
        warmup: untimed calls of each function beforehand, 0 or more.
        synchronize: waits until the device has done what it was given; by default for the GPU, if torch has one.

    Returns:
        The times of every function; time i of one stands next to time i of the others.

    Raises:
        InputError: there is nothing to time, or a number is out of range.
    """
    if not functions:
        raise InputError("functions is empty: there is nothing to measure")
    _check_turns(repeats, warmup)
    synchronize = synchronize or _synchronize
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name in functions if turn % 2 == 0 else reversed(functions):
            synchronize()  # a GPU is only told what to do: without this, the clock would stop before the work does
            start = time.perf_counter()
            functions[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def _check_turns(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """How many times longer one took than the other, turn by turn: the least, the median and the most."""
    ratios = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return min(ratios), statistics.median(ratios), max(ratios)


def unet_call(unet: nn.Module, rows: int = 1, size: int = 64, tokens: int = 77) -> Callable[[], Tensor]:
    """One U-Net call on random inputs, ready to be timed: ``rows`` latents of ``size`` x ``size``."""
    inputs = _unet_inputs(unet, rows, size, tokens, next(unet.parameters()).device)

    @torch.inference_mode()
    def call() -> Tensor:
        return unet(*inputs)[0]

    return call


def image_call(unet: nn.Module, vae: AutoencoderKL, steps: int, size: int = 64, tokens: int = 77) -> Callable[[], Any]:
    """One whole image-to-image call, ready to be timed: encode, ``steps`` guided DDIM steps, decode, one PIL image.

    The prompt's embedding is given, at random: the text encoder is left out, some 4 % of one U-Net row.
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionImg2ImgPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    kind = {"device": next(unet.parameters()).device, "dtype": next(unet.parameters()).dtype}
    text = torch.randn(2, 1, tokens, _text_width(unet), **kind)
    image = torch.rand(1, 3, 8 * size, 8 * size)

    def call() -> Any:
        return pipe(
            image=image,
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            strength=1.0,
            num_inference_steps=steps,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(0),
        ).images

    return call


# --- the comparison, and its record -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """Times with all that is needed to read them: ``timings[work][network]``, settings, and where they were taken."""

    timings: dict[str, dict[str, Timing]]
    settings: dict[str, Any]
    environment: dict[str, Any]


def choose(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None, size: int | None = None
) -> tuple[torch.device, torch.dtype, int]:
    """Fill in what is None with what suits this machine: device, dtype, and side of the latent.

    CUDA if there is any, in float16; else Apple's MPS, in float32. On a CPU bfloat16 where it has units for it, else
    float32 and a latent of 32 x 32 (an image of 256 x 256 pixels), so that a comparison stays within minutes.

    Raises:
        InputError: there is no such device here, or the dtype or size cannot be used on it.
    """
    here = [kind for kind, is_here in _devices().items() if is_here]
    device = here[0] if device is None else str(device)
    if device.partition(":")[0] not in here:
        raise InputError(f"device must be {' or '.join(here)} on this machine, got {device!r}")
    device = torch.device(device)
    if dtype is None:
        dtype = "float16" if device.type == "cuda" else "float32"
        if device.type == "cpu" and _fast_bfloat16():
            dtype = "bfloat16"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16") or (dtype == "float16" and device.type == "cpu"):
        raise InputError(f"dtype must be float32, bfloat16 or, not on a CPU, float16, got {dtype!r} for {device.type}")
    if size is None:
        size = 32 if device.type == "cpu" and dtype == "float32" else 64
    if not isinstance(size, int) or size < 8 or size % 8:
        raise InputError(f"size must be a multiple of 8, at least 8, got {size!r}")
    return device, getattr(torch, dtype), size


def _devices() -> dict[str, bool]:
    """The kinds of device, the best first, and whether there is one here."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def _fast_bfloat16() -> bool:
    # torch tells this of x86 under private names only; where it does not, float32 is always right.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


def compare(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    size: int | None = None,
    repeats: int = 6,
    warmup: int = 1,
    steps: tuple[int, ...] | None = None,
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
    vae: Callable[[], AutoencoderKL] = sd15_vae,
) -> Record:
    """Measure U-Nets of full size with random weights: calls of one and of two rows, and on a GPU whole images.

    Args:
        device, dtype, size: where, in what numbers, and the side of the latent; see ``choose``.
        repeats, warmup: see ``measure``.
        steps: whole image-to-image calls of these numbers of steps are measured too; by default 30 and 50 on a GPU,
            and none on a CPU, where one takes minutes.
        networks, vae: what is compared, by name, and the VAE of whole images: what builds them.

    Raises:
        InputError: an argument cannot be used on this machine.
    """
    device, dtype, size = choose(device, dtype, size)
    steps = ((30, 50) if device.type == "cuda" else ()) if steps is None else steps
    _check_turns(repeats, warmup)
    if any(number < 1 for number in steps):
        raise InputError(f"steps must be numbers of at least 1, got {steps}")
    where = environment(device, dtype)
    unets = {name: random_model(factory, device, dtype) for name, factory in networks.items()}
    timings = {}
    for rows in (1, 2):
        calls = {name: unet_call(unet, rows, size) for name, unet in unets.items()}
        timings["1 row" if rows == 1 else f"{rows} rows"] = measure(calls, repeats, warmup)
    coder = random_model(vae, device, dtype) if steps else None
    for number in steps:
        calls = {name: image_call(unet, coder, number, size) for name, unet in unets.items()}
        timings[f"image, {number} steps"] = measure(calls, repeats, warmup)
    return Record(timings, {"size": size, "tokens": 77, "repeats": repeats, "warmup": warmup}, where)


def environment(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a time depends on: device, driver, versions, number format, threads, load, date. No host names, no paths."""
    device = torch.device(device)
    return {
        "device": _device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{platform.machine()} MPS"
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _load() -> float | None:
    """How many processes wanted a core over the last minute: near 0 before a measurement, if the machine is quiet."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # Windows does not tell


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save(record: Record, folder: str | Path = "results", name: str = "latency") -> Path:
    """Write a record as JSON under ``folder``, in a folder of its machine, and return the file's path."""
    where = record.environment
    device = re.sub(r"\((r|tm)\)", "", where["device"].lower())
    # A GPU is the same machine however many threads feed it, a CPU is not.
    machine = device if where["driver"] else f"{device} {where['threads']} threads"
    machine = re.sub(r"[^a-z0-9]+", "-", machine).strip("-")
    moment = re.sub(r"\D", "", where["date"][:19])
    path = Path(folder) / machine / f"{name}-{moment}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(record), indent=2) + "\n")
    return path


def load(path: str | Path) -> Record:
    """Read a record that ``save`` wrote.

    Raises:
        InputError: there is no such file, or it is no such record.
    """
    try:
        found = json.loads(Path(path).read_text())
        timings = {
            work: {name: Timing(tuple(timing["seconds"])) for name, timing in by_name.items()}
            for work, by_name in found["timings"].items()
        }
        return Record(timings, found["settings"], found["environment"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"path: {str(path)!r} is not a latency record: {error}") from error


def table(record: Record) -> str:
    """Say a record in plain text: where it was taken, then a line for every time."""
    where = record.environment
    told = {"latent": record.settings["size"], "threads": where["threads"], "load": where["load"]}
    lines = [
        ", ".join([where["device"], where["dtype"], *(f"{name} {value}" for name, value in told.items())]),
        f"{'work':16}{'U-Net':12}{'median s':>10}{'fastest':>10}{'slowest':>10}",
    ]
    for work, timings in record.timings.items():
        for name, t in timings.items():
            lines.append(f"{work:16}{name:12}{t.median:10.3f}{t.fastest:10.3f}{t.slowest:10.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m decinb.latency", description=compare.__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu, cuda or mps; by default the best there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; by default what suits the device")
    parser.add_argument("--size", type=int, help="height and width of the latent; by default 64, or 32 on a slow CPU")
    parser.add_argument("--repeats", type=int, default=6, help="how often each call is timed")
    parser.add_argument("--folder", default="results", help="where to write the JSON")
    given = parser.parse_args()
    record = compare(given.device, given.dtype, given.size, given.repeats)
    print(table(record))
    print("written to", save(record, given.folder))


if __name__ == "__main__":
    main()
