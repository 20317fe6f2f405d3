"""How fast a model is loaded: ``python tools/measure_loading.py``.

A model of full size with random weights is written in the layout of the hub, then loaded again and again in fresh
processes and every weight read once, in turns: by ``load_pipeline``, and as the guide does it, rebuilt on today's
diffusers for this comparison only. The published code builds an ordinary U-Net and a U-Net-NAS with random numbers in
its constructor, and the guide then loads the U-Net-NAS once more. Files are in the system's cache for both. Also: what
``import decinb`` adds to ``import diffusers``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from decinb.benchmark import counting, latency
from decinb.benchmark.latency import Measurement, Timing
from decinb.models import MODELS
from decinb.pipeline import DeciDiffusionImg2ImgPipeline
from decinb.unet_nas import UNetNAS
from decinb.utils.environment import environment

MEASURED = """
import json, sys, time
import decinb
from decinb.benchmark.counting import sd15_unet
from decinb.loading import load_pipeline
from decinb.unet_nas import UNetNAS
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def ours(folder):
    return load_pipeline(folder, "cpu", "float32")

def guides(folder):
    parts = [
        AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
    ]
    thrown_away = sd15_unet(), UNetNAS()  # the constructor's, alive until the guide's own takes their place
    return *parts, UNetNAS.from_pretrained(folder, subfolder="flexible_unet")

before, start = memory("VmRSS"), time.perf_counter()
kept = globals()[sys.argv[1]](sys.argv[2])
for part in kept.components.values() if hasattr(kept, "components") else kept:
    for weight in part.parameters() if hasattr(part, "parameters") else ():
        weight.sum()  # a file that is only mapped into memory is not read yet
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before}))
"""

IMPORTED = "import time; start = time.perf_counter(); import diffusers{}; print(time.perf_counter() - start)"


def write_model(folder: Path) -> int:
    """A model of full size with random weights, as the hub has it; how many bytes of weights it has."""
    tiny = MODELS["tiny"].source
    parts = {
        "flexible_unet": counting.random_model(UNetNAS),
        "vae": counting.random_model(counting.sd15_vae),
        "text_encoder": counting.random_model(counting.sd15_text_encoder),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        (tiny / "scheduler" / "scheduler_config.json").read_text()
    )
    (folder / "tokenizer").mkdir()
    for file in (tiny / "tokenizer").iterdir():
        (folder / "tokenizer" / file.name).write_text(file.read_text())
    words = json.loads((tiny / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]  # filled up to the size that the text encoder has room for
    vocabulary.update({f"word{i}</w>": i for i in range(len(vocabulary), parts["text_encoder"].config.vocab_size)})
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(words))
    index = {"_class_name": DeciDiffusionImg2ImgPipeline.__name__}
    (folder / "model_index.json").write_text(json.dumps(index))
    return sum(weight.numel() * weight.element_size() for part in parts.values() for weight in part.parameters())


def run(code: str, *arguments: str) -> dict | float:
    told = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    return json.loads(told.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tools/measure_loading.py", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="how often each way is timed (default %(default)s)")
    parser.add_argument("--folder", default="results", help="where to write the JSON (default %(default)s)")
    given = parser.parse_args()
    where = environment("cpu", torch.float32)
    ways = {"load_pipeline": "ours", "the guide's way": "guides"}
    seen: dict[str, list] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        size = write_model(Path(folder))
        for turn in range(-1, given.rounds):  # the first fills the system's cache
            for way in ways if turn % 2 == 0 else reversed(ways):
                seen[way].append(run(MEASURED, ways[way], folder))
    imports: dict[str, list] = {"diffusers": [], "diffusers and decinb": []}
    for turn in range(-1, given.rounds):
        for name in imports if turn % 2 == 0 else reversed(imports):
            imports[name].append(run(IMPORTED.format(", decinb" if "decinb" in name else "")))

    loads = {
        way: Timing(tuple(one["seconds"] for one in all_of[1:]), max(one["bytes"] for one in all_of[1:]))
        for way, all_of in seen.items()
    }
    imported = {name: Timing(tuple(all_of[1:])) for name, all_of in imports.items()}
    record = Measurement({"load": loads, "import": imported}, {"weights_bytes": size, "rounds": given.rounds}, where)
    for way, timing in loads.items():
        print(f"{way:16} {timing.median:6.2f} s, peak memory {timing.peak_bytes / size:.2f} x the weights")
    least, middle, most = latency.ratio(loads["the guide's way"], loads["load_pipeline"])
    print(f"load_pipeline takes {middle:.1f} times less time ({least:.1f} to {most:.1f}); weights {size / 1e9:.1f} GB")
    added = statistics.median(imported["diffusers and decinb"].seconds) / statistics.median(
        imported["diffusers"].seconds
    )
    print(f"import diffusers {imported['diffusers'].median:.2f} s; import decinb adds {added - 1:.1%}")
    print("written to", latency.save(record, given.folder, "loading"))


if __name__ == "__main__":
    main()
