"""Measure how fast a model is loaded: ``python tools/measure_loading.py`` (Linux only).

A full-size model with random weights is written in the layout of the published checkpoint. Fresh processes then load it
and read every weight once, in turns: with ``load_pipeline``, and in the guide's way, reproduced here with today's
diffusers. There, the constructor of the published code builds an ordinary U-Net and a U-Net-NAS with random weights,
and the guide then loads the U-Net-NAS. In both cases the files are in the system's cache. Also measured: the time that
``import decinb`` adds to ``import diffusers``.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from decinb.benchmark import counting, latency
from decinb.benchmark.latency import Measurement, Timing
from decinb.benchmark.processes import in_turns, run_fresh
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.unet_nas import UNetNAS
from decinb.utils.environment import environment

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "flexible_unet": UNetNAS,
    "vae": counting.sd15_vae,
    "text_encoder": counting.sd15_text_encoder,
    "ordinary_unet": counting.sd15_unet,  # only its configuration is written
}

LOAD = """
import json, sys, time
import decinb
from decinb.loading import load_pipeline
from decinb.unet_nas import UNetNAS
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def ours(folder):
    return load_pipeline(folder, "cpu", "float32").components.values()

def guides(folder):
    discarded = [  # what the constructor builds stays in memory until the U-Net is replaced
        UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="ordinary_unet")),
        UNetNAS.from_config(UNetNAS.load_config(folder, subfolder="flexible_unet")),
    ]
    return [
        AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        UNetNAS.from_pretrained(folder, subfolder="flexible_unet"),
    ]

before, start = memory("VmRSS"), time.perf_counter()
for component in globals()[sys.argv[1]](sys.argv[2]):
    for weight in component.parameters() if hasattr(component, "parameters") else ():
        weight.sum()  # a file that is only mapped into memory has not been read yet
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before}))
"""

IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"

WAYS = {"load_pipeline": "ours", "the guide's way": "guides"}
IMPORTS = {"diffusers": "diffusers", "diffusers and decinb": "diffusers, decinb"}


def write_model(folder: Path) -> int:
    """Write a model with random weights in the layout of the published checkpoint; return its bytes of weights."""
    bundled = MODELS["tiny"].source
    networks = {name: counting.random_model(build) for name, build in NETWORKS.items() if name != "ordinary_unet"}
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    with torch.device("meta"):
        NETWORKS["ordinary_unet"]().save_config(folder / "ordinary_unet")
    for file in (*bundled.glob("scheduler/*"), *bundled.glob("tokenizer/*")):
        copy = folder / file.relative_to(bundled)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]  # filled up to the size of the text encoder's
    size = networks["text_encoder"].config.vocab_size
    vocabulary.update({f"word{i}</w>": i for i in range(len(vocabulary), size)})
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    index = {"_class_name": DeciDiffusionImg2ImgPipeline.__name__}
    (folder / "model_index.json").write_text(json.dumps(index))
    return sum(weight.numel() * weight.element_size() for net in networks.values() for weight in net.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure as the command line asks, print the results, and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python tools/measure_loading.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="how often each way is timed (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds before that (default %(default)s)")
    parser.add_argument("--folder", default="results", help="where to write the JSON (default %(default)s)")
    given = parser.parse_args(arguments)

    where = environment("cpu", torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder))
        loads = in_turns(list(WAYS), lambda way: run_fresh(LOAD, WAYS[way], folder), given.rounds, given.warmup)
    imports = in_turns(list(IMPORTS), lambda name: run_fresh(IMPORT.format(IMPORTS[name])), given.rounds, given.warmup)

    load_timings = {
        way: Timing(tuple(one["seconds"] for one in found), max(one["bytes"] for one in found))
        for way, found in loads.items()
    }
    import_timings = {name: Timing(tuple(found)) for name, found in imports.items()}
    settings = {"weights_bytes": size, "rounds": given.rounds}
    measurement = Measurement({"load": load_timings, "import": import_timings}, settings, where)

    for way, timing in load_timings.items():
        print(f"{way:16} {timing.median:6.2f} s, peak memory {timing.peak_bytes / size:.2f} x the weights")
    least, middle, most = latency.ratio(load_timings["the guide's way"], load_timings["load_pipeline"])
    print(f"load_pipeline is {middle:.1f} times faster ({least:.1f} to {most:.1f}); weights {size / 1e9:.1f} GB")
    alone, both = import_timings.values()
    print(f"import diffusers {alone.median:.2f} s; import decinb adds {both.median / alone.median - 1:.1%}")
    print("written to", latency.save(measurement, given.folder, "loading"))


if __name__ == "__main__":
    main()
