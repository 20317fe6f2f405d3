"""The registry of known models, and each of them loaded by its name from a hub."""

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

import decinb
from decinb import models, pipeline
from decinb.checkpoints import hub as decinb_hub
from decinb.checkpoints.dummies import DUMMIES, SIZE, dummy
from decinb.models import IMAGE_TO_IMAGE, MODELS, TASKS, TEXT_TO_IMAGE
from decinb.utils.quiet import quiet
from tests.helpers.fake_hub import FakeHub, as_pickle, commit, digest, publish, small_model, write_json
from tests.helpers.processes import Child

DECOYS = (
    "README.md",
    "v1-5-pruned.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "vae/diffusion_pytorch_model.bin",
    "vae_decoder/model.onnx",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.onnx",
    "text_encoder/flax_model.msgpack",
)
PRIOR = MODELS["kandinsky-2-2"].extra_sources[0][1]


# The registry


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_is_complete(name):
    model = MODELS[name]
    assert model.about and model.licence != "unknown" and model.memory > 0
    assert model.image_size % 8 == 0 and model.example_image in decinb.SAMPLES and model.example_prompt
    places = [model.source, *model.mirrors, *(at for _, at in model.extra_sources)]
    if model.is_bundled:
        assert all(Path(at).is_dir() for at in places)
    else:
        assert all(decinb_hub.is_model_id(at) for at in places) and len(set(places)) == len(places)
        assert all(re.search(r"decinb/models.py, line \d+$", models.line_of(at)) for at in (places[0], *places[-1:]))
    assert set(model.pipelines) <= set(TASKS) and IMAGE_TO_IMAGE in model.pipelines
    for task, named in model.pipelines.items():
        cls = getattr(pipeline, named, None) or getattr(diffusers, named)
        assert issubclass(cls, DiffusionPipeline)
        takes = inspect.signature(cls.__call__).parameters
        stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))
        takes = {**inspect.signature(stock.__call__).parameters, **takes}
        assert {"prompt", "num_inference_steps", "guidance_scale"} <= set(takes)
        assert ("image" in takes) == ("strength" in takes) == (task == IMAGE_TO_IMAGE)
        assert ("negative_prompt" in takes) == model.negative_prompt
        assert ("depth_map" in takes) == model.depth


def test_every_dummy_has_the_class_that_its_entry_names():
    for name in DUMMIES:
        assert type(dummy(name)).__name__ == MODELS[name].pipelines[IMAGE_TO_IMAGE]


# From a hub


def safety_checker() -> dict:
    """Return a small safety checker, which Stable Diffusion v1.5 was published with."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 99},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    return {"safety_checker": StableDiffusionSafetyChecker(config).eval(), "feature_extractor": CLIPImageProcessor()}


def lay_out(name: str, root: Path) -> dict[str, Path]:
    """Save the repositories of a published model with the weights of its dummy; return them by id."""
    source, folder = MODELS[name].source, root / name
    pipe = dummy(name)
    if name == "kandinsky-2-2":
        prior = {part.removeprefix("prior_"): it for part, it in pipe.components.items() if part[:6] == "prior_"}
        KandinskyV22PriorPipeline(**prior).save_pretrained(root / "prior")
        KandinskyV22Pipeline(pipe.unet, pipe.scheduler, pipe.movq).save_pretrained(folder)
        return {source: folder, PRIOR: root / "prior"}
    if name == "sd-v1-5":
        pipe.register_modules(**safety_checker())
        pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(folder)
    if name != "sdxl-refiner":  # which represents the models without the variant
        for part in ("unet", "vae"):
            getattr(pipe, part).save_pretrained(folder / part, variant="fp16")
    index = json.loads((folder / "model_index.json").read_text())
    older = {"CLIPImageProcessor": "CLIPFeatureExtractor", "DPTImageProcessor": "DPTFeatureExtractor"}
    for part, entry in index.items():
        if part == "feature_extractor" and entry[1]:
            index[part] = ["transformers", older[entry[1].removesuffix("Pil")]]
    write_json(folder / "model_index.json", index)
    for decoy in DECOYS:
        (folder / decoy).parent.mkdir(exist_ok=True)
        (folder / decoy).write_bytes(b"raise SystemExit('this must never be read')\n")
    return {source: folder}


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, Path]:
    """Return the repositories of all known models by id."""
    root = tmp_path_factory.mktemp("repos")
    with quiet():
        found = {repo: folder for name in DUMMIES for repo, folder in lay_out(name, root).items()}
    saved = small_model(tiny, root / "saved")
    return found | {MODELS["decidiffusion-v1-0"].source: publish(saved, root / "decidiffusion")}


@pytest.fixture(scope="module")
def room(folders, tmp_path_factory) -> Iterator[tuple[FakeHub, Child, Path]]:
    """Return a hub, a process in which every model is as small as its dummy, and its cache."""
    hub, cache = FakeHub(folders), tmp_path_factory.mktemp("cache")
    child = Child(hub, cache)
    child.ask("MODELS.update({n: __import__('dataclasses').replace(m, memory=0.01) for n, m in MODELS.items()})")
    yield hub, child, cache
    child.close()
    hub.stop()


@pytest.fixture
def hub(room, folders) -> FakeHub:
    """Return the hub in its first state, with an empty cache."""
    hub, _, cache = room
    shutil.rmtree(cache / "hub", ignore_errors=True)
    hub.repos = dict(folders)
    hub.misbehave.clear()
    hub.requests.clear()
    return hub


@pytest.fixture
def child(hub, room) -> Child:
    return room[1]


LOOK = (
    "(lambda pipe: [digest(pipe), type(pipe).__name__, pipe.config._name_or_path, pipe.config.get('{}')])"
    "(decinb.load_pipeline({!r}, device='cpu', task={!r}))"
)


@pytest.mark.slow
def test_every_known_model_loads_by_name_and_fetches_only_what_it_uses(hub, child, folders):
    for name in DUMMIES:
        hub.requests.clear()
        original, source, known = dummy(name), MODELS[name].source, MODELS[name]
        if name == "sd-v1-5":
            original.register_modules(safety_checker=decinb.load_pipeline(folders[source]).safety_checker)
        weights = digest(original)
        setting = "requires_aesthetics_score"
        answer = child.ask(LOOK.format(setting, name, IMAGE_TO_IMAGE))
        expected = [weights, known.pipelines[IMAGE_TO_IMAGE], name, original.config.get(setting)]
        assert answer == {"value": expected, "warnings": []}, name

        got = hub.fetched(source)
        assert not got & set(DECOYS) and not any(file.endswith((".bin", ".ckpt", ".onnx")) for file in got)
        assert "model_index.json" in got
        variant = name in ("sd-v1-5", "sdxl-base", "sd-2-depth")
        assert ("unet/diffusion_pytorch_model.fp16.safetensors" in got) == variant
        assert ("unet/diffusion_pytorch_model.safetensors" in got) != variant
        assert ("prior/diffusion_pytorch_model.safetensors" in hub.fetched(PRIOR)) == (name == "kandinsky-2-2")
        assert ("safety_checker/model.safetensors" in got) == (name == "sd-v1-5")

        hub.requests.clear()
        for task in known.pipelines:
            for called in (name, source):  # a known model is also found by its id
                answer = child.ask(LOOK.format(setting, called, task))
                assert answer["value"][:3] == [weights, known.pipelines[task], name] and not answer["warnings"]
        assert child.ask(f"decinb.loading.is_here(MODELS[{name!r}])")["value"] is True
        assert not hub.requests, "cached files are not requested again"


@pytest.mark.slow
def test_download_fetches_all_of_a_model(hub, child, folders):
    answer = child.ask("str(decinb.download('kandinsky-2-2'))")
    assert answer["value"].endswith(commit(MODELS["kandinsky-2-2"].source))
    assert hub.fetched(PRIOR) and hub.fetched(MODELS["kandinsky-2-2"].source)
    hub.stop()
    assert child.load("kandinsky-2-2") == {"value": digest(dummy("kandinsky-2-2")), "warnings": []}
    hub.start()
    child.ask("str(decinb.download('stabilityai/stable-diffusion-xl-base-1.0'))")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.fetched(MODELS["sdxl-base"].source)


@pytest.mark.slow
def test_interrupted_downloads_resume(hub, child):
    source = MODELS["sdxl-base"].source
    hub.misbehave[f"{source}/vae/diffusion_pytorch_model.fp16.safetensors"] = [503]
    answer = child.load("sdxl-base")
    assert answer["error"] == "ModelError" and "answered 503: try again later" in answer["message"]
    begun = hub.fetched(source)
    hub.requests.clear()
    assert child.ask("decinb.loading.is_here(MODELS['sdxl-base'])")["value"] is False
    assert child.load("sdxl-base")["value"] == digest(dummy("sdxl-base"))
    again = hub.fetched(source) & begun
    assert again <= {"vae/diffusion_pytorch_model.fp16.safetensors"}


@pytest.mark.slow
def test_a_mirror_replaces_a_model_that_is_gone(hub, child, folders):
    source, mirror = MODELS["sd-2-depth"].source, MODELS["sd-2-depth"].mirrors[-1]
    hub.repos[mirror] = hub.repos.pop(source)
    answer = child.load("sd-2-depth")
    assert answer["value"] == digest(dummy("sd-2-depth"))
    assert answer["warnings"] == [f"sd-2-depth: {source} is gone from the hub; its copy {mirror} is used"]
    hub.requests.clear()
    assert child.load("sd-2-depth")["value"] and child.ask("decinb.loading.is_here(MODELS['sd-2-depth'])")["value"]
    assert not hub.requests, "the cached mirror is used"


@pytest.mark.slow
def test_the_line_to_edit_is_named_if_all_mirrors_are_gone(hub, child, folders):
    for name, gone in (("sd-v1-5", MODELS["sd-v1-5"].source), ("kandinsky-2-2", PRIOR)):
        for repo in (gone, *MODELS[name].mirrors):
            hub.repos.pop(repo, None)
        answer = child.load(name)
        assert answer["error"] == "ModelError" and "\n" not in answer["message"]
        assert all(repo in answer["message"] for repo in (gone, *MODELS[name].mirrors))
        line = int(re.search(r"if it has moved, edit decinb/models.py, line (\d+)$", answer["message"])[1])
        assert f'"{gone}"' in Path(models.__file__).read_text().splitlines()[line - 1]


@pytest.mark.slow
def test_a_gated_model_is_not_gone(hub, child):
    source = MODELS["sd-v1-5"].source
    hub.misbehave[source] = "gated"
    answer = child.load("sd-v1-5")
    assert f"is gated: accept its licence at {hub.url}/{source}, then run `hf auth login`" in answer["message"]
    assert not any(mirror in path for mirror in MODELS["sd-v1-5"].mirrors for _, path in hub.requests)


@pytest.mark.slow
def test_models_that_are_too_large_or_of_another_task_are_not_fetched(hub, child, folders):
    child.ask("MODELS.update(giant=Model('acme/giant', '', 64, memory=1e6))")
    assert "giant is too large for this machine" in child.load("giant")["message"]
    assert not hub.requests
    answer = child.load("sd-2-depth", task=TEXT_TO_IMAGE)
    assert answer["error"] == "InputError" and not hub.requests

    hub.repos["acme/depth"] = folders[MODELS["sd-2-depth"].source]  # its index says what it can do
    answer = child.load("acme/depth", task=TEXT_TO_IMAGE)
    assert (
        answer["error"] == "InputError"
        and "acme/depth, a StableDiffusionDepth2ImgPipeline, cannot" in answer["message"]
    )
    hub.repos["acme/decoder"] = folders[MODELS["kandinsky-2-2"].source]
    answer = child.load("acme/decoder")
    assert answer["error"] == "ModelError" and "acme/decoder has no prior_image_encoder, " in answer["message"]
    for repo in ("acme/depth", "acme/decoder"):
        assert all(name.endswith(".json") for name in hub.fetched(repo)), "refused before its weights are fetched"
    answer = child.load("acme/nothing")
    assert (
        answer["error"] == "ModelError"
        and "was not found at" in answer["message"]
        and "check the name" in answer["message"]
    )


@pytest.mark.slow
def test_a_community_model_in_pickles(hub, child, folders, tmp_path):
    folder = Path(shutil.copytree(folders[MODELS["sd-v1-5"].source], tmp_path / "pickled"))
    for part in ("unet", "vae", "text_encoder", "safety_checker"):
        as_pickle(folder, part)
    hub.repos["acme/pickled"] = folder
    answer = child.load("acme/pickled")
    assert answer["error"] == "ModelError" and "allow_pickle=True" in answer["message"]
    assert not any(name.endswith(".bin") for name in hub.fetched("acme/pickled"))
    answer = child.load("acme/pickled", allow_pickle=True)
    assert "plain tensors only" in answer["warnings"][0] and len(answer["warnings"]) == 1
    assert answer["value"] == digest(decinb.load_pipeline(folders[MODELS["sd-v1-5"].source], device="cpu"))


@pytest.mark.slow
def test_the_report_lists_every_model(hub, child):
    child.load("sd-2-depth")
    report = child.ask("__import__('decinb.__main__', fromlist=['report']).report()")["value"]
    for name in MODELS:
        state = "bundled" if MODELS[name].is_bundled else "cached" if name == "sd-2-depth" else "not cached"
        assert re.search(rf"^model {name}: {state}$", report, re.MULTILINE)


@pytest.mark.slow
def test_a_safety_checker_works(folders):
    pipe = decinb.load_pipeline(folders[MODELS["sd-v1-5"].source], device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.safety_checker) is StableDiffusionSafetyChecker and pipe.config.requires_safety_checker
    image = decinb.load_image("day", size=SIZE)
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    made = pipe("a red house", image, num_inference_steps=2, strength=1.0, generator=torch.Generator().manual_seed(0))
    assert made.nsfw_content_detected is not None and made.images[0].size == image.size
