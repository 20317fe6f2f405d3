"""Loading: how a model is chosen, what is rejected, and that no code from a model's files runs."""

import inspect
import json
import os
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

import decinb
from decinb import InputError, ModelError
from decinb.checkpoints.components import as_model_error
from decinb.checkpoints.dummies import DUMMIES, SIZE, dummy
from decinb.checkpoints.integrity import check_file
from decinb.loading import _find, fits, load_pipeline
from decinb.models import IMAGE_TO_IMAGE, MODELS, TASKS, TEXT_TO_IMAGE, Model
from decinb.utils.device import choose_dtype
from decinb.utils.memory import total_memory
from decinb.utils.quiet import quiet
from tests.helpers.fake_hub import FORMAT, as_pickle, digest, forbid, publish, small_model, weights, write_json


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> Path:
    return small_model(tiny, tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def published(small, tmp_path_factory) -> Path:
    return publish(small, tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def broken(published, tmp_path) -> Path:
    """A copy of a published folder, to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def load(folder: Path, **options) -> decinb.DeciDiffusionImg2ImgPipeline:
    return load_pipeline(folder, device="cpu", **options)


# --- what is loaded, and what is printed ------------------------------------------------------------------------------


def test_tiny_loads_without_warnings_as_float32_on_the_cpu(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load_pipeline("tiny", device="cpu")
    out, err = capfd.readouterr()
    assert out == "decinb: tiny on cpu, float32 (as requested)\n"
    assert err == ""
    for component in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not component.training
        assert {(tensor.device.type, tensor.dtype) for tensor in component.parameters()} == {("cpu", torch.float32)}
    assert pipe.safety_checker is None
    assert pipe.image_size == MODELS["tiny"].image_size


def test_default_model(capsys, monkeypatch):
    monkeypatch.delenv("DECINB_MODEL", raising=False)
    assert load_pipeline(device="cpu").config._name_or_path == "tiny"
    line = capsys.readouterr().out
    assert line.startswith("decinb: tiny on cpu, float32 (") and line.count("\n") == 1 and "GPU" in line

    found = _find(None, IMAGE_TO_IMAGE, torch.device("cuda"), torch.float16, False)  # offline, see conftest
    assert (found.name, found.locations) == ("tiny", [("", MODELS["tiny"].source)])
    assert "HF_HUB_OFFLINE" in found.reason and "\n" not in found.reason


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.float16), ("cuda:1", torch.float16), ("mps", torch.float32)]
)
def test_default_dtype(device, dtype):
    assert choose_dtype(None, torch.device(device)) == dtype


def test_dtype_names(small):
    for name in ("bfloat16", "BF16", torch.bfloat16):
        assert choose_dtype(name, torch.device("cpu")) == torch.bfloat16
    pipe = load(small, dtype="bf16")
    assert {component.dtype for component in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_float16_on_the_cpu_becomes_float32_with_a_warning(small):
    with pytest.warns(UserWarning, match="float16.*CPU.*float32") as caught:
        pipe = load(small, dtype="fp16")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)
    assert pipe.dtype == torch.float32
    for name in ("float16", torch.float16):
        with pytest.warns(UserWarning, match="float16.*CPU.*float32"):
            assert choose_dtype(name, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "dtype must be .*bfloat16.* got 'float12'"),
        ({"dtype": torch.int8}, "dtype must be .*got torch.int8"),
        ({"device": "abacus"}, "device must be .*cpu.* got 'abacus'"),
        ({"device": "cuda:99"}, "device must be .*got 'cuda:99'"),
        ({"device": 10**400}, "device must be .*got 10{39}…0{40}$"),
        ({"model": "tinny"}, "'tinny' is not known; did you mean 'tiny'"),
        ({"model": "DeciDiffusion"}, "did you mean 'decidiffusion-v1-0'.*'tiny'"),
        ({"model": "xyzzy"}, "'xyzzy' is not known; give one of 'tiny', .*'decidiffusion-v1-0'.*folder.*hub"),
        ({"model": "acme/-name"}, "'acme/-name' is not known"),
        ({"model": ""}, "'' is not known"),
        ({"model": "./nowhere"}, "folder not found: './nowhere'"),
        ({"model": "/no/where"}, "folder not found: '/no/where'"),
        ({"model": "a/b/c"}, "folder not found: 'a/b/c'"),
        ({"model": "~/nowhere-at-all"}, "folder not found"),
        ({"model": Path("nowhere")}, "folder not found: 'nowhere'"),
        ({"model": 3}, "model: .*got 3"),
    ],
)
def test_bad_arguments_raise_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(**{"model": "tiny", **options})
    assert "\n" not in str(caught.value)


def test_a_new_model_is_one_entry(small, monkeypatch):
    monkeypatch.setitem(MODELS, "mine", Model(small, "my model", 128, "day", "a red house"))
    assert load_pipeline("mine", device="cpu").config._name_or_path == "mine"
    with pytest.raises(InputError, match="did you mean 'mine'"):
        load_pipeline("min")


# --- a DeciDiffusion folder -------------------------------------------------------------------------------------------


def test_published_layout(small, published, monkeypatch, capfd):
    forbid(monkeypatch, UNet2DConditionModel)
    transformers_logging.set_verbosity_info()
    before = transformers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load(published)
    assert transformers_logging.get_verbosity() == transformers_logging.INFO
    assert (transformers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()) == before
    transformers_logging.set_verbosity_warning()

    assert capfd.readouterr().err == ""
    assert digest(pipe) == digest(load(small))
    text = "A painting of a red house, at night!"
    assert pipe.tokenizer(text).input_ids == load(small).tokenizer(text).input_ids
    pipe("a red house", Image.new("RGB", (64, 64), "teal"), strength=0.5, num_inference_steps=4)


def test_the_scheduler_is_the_one_that_its_configuration_names(broken):
    path = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "_class_name": "EulerDiscreteScheduler"})
    assert type(load(broken).scheduler) is EulerDiscreteScheduler
    write_json(path, {**config, "_class_name": "UNet2DConditionModel"})
    with pytest.warns(UserWarning, match="'UNet2DConditionModel'; DDIMScheduler is used"):
        pipe = load(broken)
    assert pipe.scheduler.config.beta_schedule == config["beta_schedule"]


@pytest.mark.parametrize("folder", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_folder(broken, folder, happened):
    shutil.rmtree(broken / folder)
    with pytest.raises(ModelError, match=f"has no {folder}/.*incomplete; download it again") as caught:
        load(broken)
    happened("F6", caught.value)


@pytest.mark.parametrize(
    "file", ["flexible_unet/config.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"]
)
def test_missing_file(broken, file):
    (broken / file).unlink()
    with pytest.raises(ModelError, match=f"has no {file}"):
        load(broken)


def test_missing_flexible_unet(broken, small, tmp_path):
    shutil.rmtree(broken / "flexible_unet")
    with pytest.raises(ModelError, match=r"unet: .*asks for 'DecoyUNet'.*decinb runs no code from a model's"):
        load(broken)
    (broken / "model_index.json").unlink()
    with pytest.raises(ModelError, match=r"has no flexible_unet and no model_index.json"):
        load(broken)
    shutil.copytree(small / "unet", broken / "unet")
    assert load(broken).unet.config.sample_size == 16
    shutil.copy(small / "model_index.json", broken)
    write_json(broken / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 64})
    with pytest.raises(ModelError, match=r"has no flexible_unet.*not a DeciDiffusion model"):
        load(broken)


def last_layer(tensors: dict[str, torch.Tensor]) -> str:
    return max(name for name in tensors if "conv" in name or "mlp" in name)


@pytest.mark.parametrize(
    ("component", "fault"),  # diffusers loads the U-Net and the VAE, transformers the text encoder
    [
        ("flexible_unet", "missing"),
        ("vae", "unexpected"),
        ("flexible_unet", "mismatched"),
        ("text_encoder", "missing"),
        ("text_encoder", "unexpected"),
        ("text_encoder", "mismatched"),
    ],
)
def test_tensors_that_do_not_fit_are_named(broken, component, fault, happened):
    path = weights(broken, component)
    tensors = load_file(path)
    name = last_layer(tensors)
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors[name := "surplus.weight"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(2, 3)
    save_file(tensors, path, FORMAT)
    with pytest.raises(ModelError, match=f"{component}.*{fault}.*{name.removeprefix('text_model.')}") as caught:
        load(broken)
    assert "\n" not in str(caught.value)
    happened("F6", caught.value)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n"


@pytest.mark.parametrize(
    ("component", "damage", "problem"),
    [
        ("flexible_unet", lambda content: b"", "is empty"),
        ("vae", lambda content: content[:7], "is damaged or truncated"),
        ("text_encoder", lambda content: content[:-100], r"is truncated: [\d,]+ of [\d,]+ bytes"),
        ("flexible_unet", lambda content: POINTER, "is a git-lfs pointer.*git lfs pull"),
        ("vae", lambda content: b"<!DOCTYPE html><html>Please sign in</html>", "is a web page"),
        ("text_encoder", lambda content: b"\x07" * 5000, "is damaged"),
        ("vae", lambda content: b"\x10" + bytes(7) + b"{'not': 'JSON'}" + bytes(99), "is damaged"),
    ],
    ids=["empty", "7 bytes", "truncated", "pointer", "page", "noise", "header"],
)
def test_damaged_weights(broken, component, damage, problem, happened):
    path = weights(broken, component)
    path.write_bytes(damage(path.read_bytes()))
    name = component.removeprefix("flexible_")
    with pytest.raises(ModelError, match=f"^{name}: .*{path.name} {problem}.*; copy it from its source") as caught:
        load(broken)
    assert "\n" not in str(caught.value)
    happened("F6", caught.value)


@pytest.mark.parametrize(("component", "value"), [("flexible_unet", "nan"), ("vae", "-inf"), ("text_encoder", "inf")])
def test_weights_that_are_not_finite(broken, component, value, happened):
    path = weights(broken, component)
    tensors = load_file(path)
    name = last_layer(tensors)
    tensors[name].view(-1)[-1] = float(value)
    save_file(tensors, path, FORMAT)
    expected = f"{component.removeprefix('flexible_')}: {name.removeprefix('text_model.')}.* NaN or infinity"
    with pytest.raises(ModelError, match=expected) as caught:
        load(broken)
    happened("F6", caught.value)


@pytest.mark.parametrize(
    "file", ["flexible_unet/config.json", "vae/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
)
def test_damaged_json(broken, file):
    path = broken / file
    path.write_text(path.read_text()[:-20])
    component = {"flexible_unet": "unet"}.get(path.parent.name, path.parent.name)
    with pytest.raises(ModelError, match=component) as caught:
        load(broken)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_vocabulary(broken):
    path = broken / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    write_json(path, {**vocabulary, "dragon</w>": len(vocabulary)})
    with pytest.raises(ModelError, match=r"tokenizer.*do not belong together"):
        load(broken)


def test_an_adapter_instead_of_a_model_is_rejected(broken):
    write_json(broken / "text_encoder" / "adapter_config.json", {"base_model_name_or_path": "/elsewhere"})
    with pytest.raises(ModelError, match=r"text_encoder: .*holds an adapter, not a model.*load_lora_weights"):
        load(broken)


# --- pickles ----------------------------------------------------------------------------------------------------------


class Malice:
    """Creates a file when a pickle of it is opened carelessly."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_pickled_weights_are_read_only_on_request_and_as_plain_tensors(broken, small, happened):
    files = [as_pickle(broken, component) for component in ("flexible_unet", "vae", "text_encoder")]
    with pytest.raises(ModelError, match=f"flexible_unet: .*{files[0].name}.*allow_pickle=True") as caught:
        load(broken)
    happened("F6", caught.value)
    with pytest.warns(UserWarning, match="plain tensors only") as caught:
        pipe = load(broken, allow_pickle=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(file.name in str(caught[0].message) for file in files)
    assert digest(pipe) == digest(load(small))


@pytest.mark.filterwarnings("ignore:.*plain tensors only")
@pytest.mark.parametrize("component", ["flexible_unet", "vae", "text_encoder"])
def test_pickled_code_never_runs(broken, component, tmp_path):
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Malice(mark)))
    assert mark.exists(), "the pickle is harmless, so it shows nothing"
    mark.unlink()

    file = as_pickle(broken, component)
    torch.save({"conv_in.weight": Malice(mark)}, file)
    with pytest.raises(ModelError, match=f"{component}: .*allow_pickle=True"):
        load(broken)
    with pytest.raises(ModelError, match=f"{component.removeprefix('flexible_')}: .*plain tensors") as caught:
        load(broken, allow_pickle=True)
    assert not mark.exists()
    assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None


# --- folders of models that diffusers supports ------------------------------------------------------------------------

CLASSES = {
    "sd-v1-5": ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"),
    "sd-2-depth": ("StableDiffusionDepth2ImgPipeline", None),
    "sdxl-base": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", None),
    "kandinsky-2-2": ("KandinskyV22Img2ImgCombinedPipeline", "KandinskyV22CombinedPipeline"),
}


@pytest.fixture(scope="module")
def dummies() -> dict[str, DiffusionPipeline]:
    """A dummy pipeline of each published model. Tests must not change them."""
    return {name: dummy(name) for name in DUMMIES}


@pytest.fixture(scope="module")
def folders(dummies, tmp_path_factory) -> dict[str, Path]:
    """Their folders, as diffusers saves them."""
    root = tmp_path_factory.mktemp("dummies")
    with quiet():
        for name, pipe in dummies.items():
            pipe.save_pretrained(root / name)
    return {name: root / name for name in dummies}


@pytest.fixture
def copy(folders, tmp_path):
    """Copies the folder of a dummy, to be damaged."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


@pytest.fixture
def sd(copy) -> Path:
    return copy("sd-v1-5")


def draw(pipe, seed: int = 0, **options) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    if "Kandinsky" in type(pipe).__name__:
        options |= {"height": SIZE, "width": SIZE, "prior_num_inference_steps": 2}
    if "image" in inspect.signature(pipe.__call__).parameters:
        options = {"image": Image.new("RGB", (SIZE, SIZE), "teal"), "strength": 1.0} | options
    generator = torch.Generator().manual_seed(seed)
    options = {"prompt": "a red house", "num_inference_steps": 2, "generator": generator, "output_type": "np"} | options
    return pipe(**options).images


def rejected(error: type[Exception], message: str, folder: object, **options) -> str:
    """Return the one-line message with which loading rejects a model."""
    with pytest.raises(error, match=message) as caught:
        load_pipeline(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # diffusers, of itself, at a call
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_diffusers_loads_without_warnings_and_runs(folders, dummies, name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load(folders[name])
    assert capfd.readouterr() == (f"decinb: {folders[name]} on cpu, float32 (as requested)\n", "")
    original = dummies[name]
    assert type(pipe) is getattr(diffusers, CLASSES[name][0]) and digest(pipe) == digest(original)
    settings = {key: value for key, value in original.config.items() if key[0] != "_" and not isinstance(value, tuple)}
    assert settings == {key: pipe.config[key] for key in settings}
    assert not any(part.training for part in pipe.components.values() if isinstance(part, nn.Module))
    assert np.isfinite(draw(pipe)).all()
    assert decinb.image_size(pipe) == SIZE


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_text_to_image(folders, name, capfd):
    wanted = CLASSES[name][1]
    image_to_image = load(folders[name])
    if wanted is None:
        message = f"task: .*{name}, a {CLASSES[name][0]}, cannot do 'text-to-image'"
        rejected(InputError, message, folders[name], task=TEXT_TO_IMAGE)
        loaded_class = type(image_to_image).__name__
        with pytest.raises(InputError, match=f"task: {loaded_class} cannot do 'text-to-image'"):
            load_pipeline(image_to_image, task=TEXT_TO_IMAGE)
        return
    pipe = load(folders[name], task=TEXT_TO_IMAGE)
    assert type(pipe) is getattr(diffusers, wanted)
    assert np.isfinite(draw(pipe, height=SIZE, width=SIZE)).all()

    capfd.readouterr()
    shared = load_pipeline(image_to_image, task=TEXT_TO_IMAGE)
    back = load_pipeline(shared)
    assert type(shared) is type(pipe) and type(back) is type(image_to_image)
    for one in (shared, back):
        assert all(one.components[part] is image_to_image.components[part] for part in one.components)
        assert one.config._name_or_path == str(folders[name])
    assert load_pipeline(image_to_image) is image_to_image
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(draw(back), draw(image_to_image))


def test_an_entry_with_a_bad_source(monkeypatch):
    monkeypatch.setitem(MODELS, "mine", Model("/a/folder", "", 64))
    rejected(InputError, "the source of 'mine', '/a/folder', is not a hub id .*a folder as a pathlib.Path", "mine")
    monkeypatch.setitem(MODELS, "mine", Model(Path("/a/folder"), "", 64))
    rejected(ModelError, "/a/folder has no flexible_unet and no model_index.json", "mine")


def test_a_task_or_an_argument_that_is_not_possible(tiny):
    message = "task must be one of image-to-image, text-to-image, got 'inpainting'"
    rejected(InputError, message, "tiny", task="inpainting")
    message = "task: sd-2-depth cannot do 'text-to-image', only 'image-to-image'"
    rejected(InputError, message, "sd-2-depth", task=TEXT_TO_IMAGE)
    rejected(InputError, r"this pipeline is already loaded.*pipe.to\(", tiny)
    for setting in ({"dtype": "bf16"}, {"compile": True}):
        with pytest.raises(InputError, match="this pipeline is already loaded"):
            load_pipeline(tiny, **setting)


def test_the_variant_is_preferred_and_the_plain_weights_are_used_without_one(sd, dummies, monkeypatch):
    pipe = dummy("sd-v1-5", seed=1)
    pipe.unet.save_pretrained(sd / "unet", variant="other")
    pipe.vae.save_pretrained(sd / "vae", variant="other", max_shard_size="50KB")
    monkeypatch.setitem(MODELS, "sd-v1-5", replace(MODELS["sd-v1-5"], source=sd, variant="other", memory=0.01))
    loaded, plain = load_pipeline("sd-v1-5", device="cpu"), dummies["sd-v1-5"]
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    assert digest(load(sd)) == digest(plain)
    assert torch.equal(
        loaded.text_encoder.get_input_embeddings().weight, plain.text_encoder.get_input_embeddings().weight
    )


# --- what can be wrong with a folder ----------------------------------------------------------------------------------


def change(path: Path, **changes: object) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize("component", ["unet", "scheduler"])
def test_a_component_of_the_index_without_files(sd, component):
    shutil.rmtree(sd / component)
    rejected(ModelError, f"{sd.name} has no {component}/.*incomplete; download it again", sd)


def test_a_required_component_that_the_index_does_not_list(sd):
    change(sd / "model_index.json", vae=[None, None])
    rejected(ModelError, "has no vae, which StableDiffusionImg2ImgPipeline needs", sd)


def test_shards_and_a_missing_shard(sd, dummies):
    with quiet():
        dummies["sd-v1-5"].unet.save_pretrained(sd / "unet", max_shard_size="1MB")
    (sd / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    assert digest(load(sd)) == digest(dummies["sd-v1-5"])
    shard = max((sd / "unet").glob("*.safetensors"))
    shard.unlink()
    rejected(ModelError, f"has no unet/{shard.name}: the model is incomplete", sd)
    write_json(sd / "unet" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../../x"}})
    rejected(ModelError, r"has no unet/\.\./\.\./x", sd)


def test_no_code_from_a_models_files_runs(sd, dummies, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    for folder in (sd, sd / "unet", sd / "text_encoder"):
        (folder / "decoy.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Decoy: pass\n")
    monkeypatch.chdir(sd)  # a module of the working folder could be found
    index = sd / "model_index.json"
    before = index.read_text()
    for entry, message in (
        (["decoy", "Decoy"], "unet: .*asks for 'Decoy' of 'decoy', not a part of diffusers: decinb runs no code"),
        (["os", "system"], "unet: .*asks for 'system' of 'os', not a part of diffusers"),
        (
            ["diffusers", "NoSuchUNet"],
            f"unet: .*asks for 'NoSuchUNet', which diffusers {diffusers.__version__} does",
        ),
        (["transformers", "AutoModel"], "unet: .*asks for 'AutoModel' of 'transformers', which is neither a network"),
        (["diffusers", "DiffusionPipeline"], "unet: .*asks for 'DiffusionPipeline' of 'diffusers', which is neither"),
        (["pipeline_utils", "DiffusionPipeline"], "unet: .*'DiffusionPipeline' of 'pipeline_utils', which is neither"),
        (
            ["StableDiffusionPipeline", "X"],
            "unet: .*'X' of 'StableDiffusionPipeline', not a part of diffusers",
        ),
        (["__class__", "X"], "unet: .*'X' of '__class__', not a part of diffusers"),
    ):
        change(index, unet=entry)
        rejected(ModelError, message, sd)
    index.write_text(before)
    for named in ("NoSuchPipeline", ["decoy", "Decoy"], None, "UNet2DConditionModel"):
        change(index, _class_name=named)
        rejected(ModelError, "asks for the pipeline .*which diffusers .*does not have", sd)
    index.write_text(before)
    change(sd / "text_encoder" / "config.json", auto_map={"AutoModel": "decoy.Decoy", "AutoConfig": "decoy.Decoy"})
    change(sd / "unet" / "config.json", _class_name="Decoy", _target_="decoy.Decoy")
    assert digest(load(sd)) == digest(dummies["sd-v1-5"])
    change(sd / "text_encoder" / "config.json", attn_implementation="acme/kernel")
    rejected(ModelError, "text_encoder: .*asks for code from the hub, 'acme/kernel'", sd)
    assert not mark.exists()


def test_a_folder_without_an_index(sd):
    (sd / "model_index.json").unlink()
    rejected(ModelError, "has no flexible_unet and no model_index.json: .*give the folder", sd)
    (sd / "model_index.json").write_text("[1, 2")
    rejected(ModelError, "model_index.json is not valid JSON", sd)
    for content in ("[]", "[[1, 2]]", '"a"'):
        (sd / "model_index.json").write_text(content)
        rejected(ModelError, "model_index.json is not a JSON object but", sd)


@pytest.mark.parametrize("task", TASKS)
def test_a_unet_for_another_task(sd, task):
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sd / "unet"), in_channels=9)
    unet.save_pretrained(sd / "unet")
    change(sd / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    message = "its U-Net takes 9 channels, but StableDiffusion.*Pipeline gives it 4: .*another task"
    rejected(ModelError, message, sd, task=task)


def test_a_tokenizer_of_another_length(copy):
    folder = copy("sdxl-base")
    change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=77)
    rejected(ModelError, "tokenizer_2: .* do not belong together; take both from one model", folder)


def test_older_names_of_image_processors(copy, dummies):
    folder = copy("sd-2-depth")
    change(folder / "model_index.json", feature_extractor=["transformers", "DPTFeatureExtractor"])
    assert type(load(folder).feature_extractor) is type(dummies["sd-2-depth"].feature_extractor)


def test_a_model_of_diffusers_in_pickles(sd, dummies):
    for component in ("unet", "vae", "text_encoder"):
        as_pickle(sd, component)
    rejected(ModelError, "text_encoder: .*has no safetensors but text_encoder/.*bin, a pickle.*look for a copy", sd)
    with pytest.warns(UserWarning, match="plain tensors only"):
        assert digest(load(sd, allow_pickle=True)) == digest(dummies["sd-v1-5"])


# --- folders made to do harm; tests/guarantees/test_hostile.py has more ----------------------------------------------


def edit(folder: Path, name: str, **changes: object) -> str:
    """Change a JSON file of a component; return the component."""
    change(folder / name, **changes)
    return name.partition("/")[0]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "text_encoder/config.json",
            {"vocab_size": 10**7},
            "describes a network with far more values than its weights",
        ),
        ("text_encoder/config.json", {"num_hidden_layers": 9_000}, "describes a network with far more (mod|tens)"),
        ("unet/config.json", {"layers_per_block": 20_000}, "describes a network with far more (mod|tens)"),
        ("vae/config.json", {"latent_channels": 10**6}, "describes a network with far more values"),
        ("vae/config.json", {"block_out_channels": [32] * 20}, r"20 levels \(block_out_channels\), and at most 8"),
        ("unet/config.json", {"sample_size": 10**6}, "sample_size is 1000000, and at most 8192"),
        ("unet/config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ("text_encoder/config.json", {"_attn_implementation": {"": "acme/kernel"}}, "code from the hub, .*acme/kernel"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**8},
            "num_train_timesteps must be at most 100,000",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "scheduler_config.json: .*str"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "model_max_length|cannot be loaded"),
    ],
)
def test_configurations_that_cost_too_much_or_ask_for_more(sd, file, changes, message):
    component = edit(sd, file, **changes)
    rejected(ModelError, f"{component}: .*{message}", sd)


def test_a_depth_estimator_does_not_look_up_another_model(copy):
    folder = copy("sd-2-depth")
    edit(folder, "depth_estimator/config.json", backbone="x/y", backbone_config=None)
    rejected(ModelError, "depth_estimator: .*asks for another model, backbone 'x/y'", folder)


def test_an_image_processor_does_not_make_images_giants(copy):
    folder = copy("sd-2-depth")
    edit(folder, "feature_extractor/preprocessor_config.json", size={"height": 10**5, "width": 10**5})
    rejected(ModelError, "feature_extractor: (height|width) in .* is 100000, and at most 8192 is allowed", folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_are_not_weights(sd, dtype):
    file = weights(sd, "vae")
    tensors = load_file(file)
    name = last_layer(tensors)
    save_file({**tensors, name: tensors[name].to(dtype)}, file, FORMAT)
    rejected(ModelError, f"vae: .*has {name} as .*, not as floating-point numbers", sd)


def test_integers_in_a_pickle_are_not_weights(sd):
    file = as_pickle(sd, "vae")
    tensors = torch.load(file)
    tensors[last_layer(tensors)] = tensors[last_layer(tensors)].to(torch.int8)
    torch.save(tensors, file)
    with pytest.warns(UserWarning, match="plain tensors only"):
        rejected(ModelError, "has .* as int8, not as floating-point numbers", sd, allow_pickle=True)


@pytest.mark.parametrize("length", [0x3C20, 0x3C0A, 0x13C20])
def test_a_header_is_not_taken_for_a_web_page(tmp_path, length):
    file = tmp_path / "model.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    check_file("unet", file, "")


def test_a_header_that_is_too_long_or_has_no_offsets(sd):
    file = weights(sd, "vae")
    with file.open("wb") as opened:
        opened.write((2 * 10**9).to_bytes(8, "little") + b"{")
        opened.truncate(2 * 10**9 + 8)
    rejected(ModelError, "vae: .*announces a header of 2,000,000,000 bytes", sd)
    for entry in (
        '{"dtype": "F32", "shape": [1], "data_offsets": [0, null]}',
        "null",
        '{"data_offsets": null}',
        "[" * 10**4,
    ):
        header = ('{"a": ' + entry + "}").encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        rejected(ModelError, "vae: .* is damaged or truncated", sd)


def test_files_that_are_not_ordinary(sd):
    os.mkfifo(sd / "tokenizer" / "chat_template.jinja")
    rejected(ModelError, "tokenizer: .*chat_template.jinja is not an ordinary file; remove it", sd)
    (sd / "tokenizer" / "chat_template.jinja").unlink()
    with (sd / "tokenizer" / "tokenizer.json").open("ab") as opened:
        opened.truncate(10**10)
    rejected(ModelError, "tokenizer: .*tokenizer.json has 10,000,000,000 bytes", sd)
    with (sd / "model_index.json").open("ab") as opened:
        opened.truncate(10**10)
    rejected(ModelError, "model_index.json is not valid JSON: it has 10,000,000,000 bytes", sd)
    (sd / "model_index.json").write_text("[" * 10**5)
    rejected(ModelError, "model_index.json is not valid JSON: .*nested too deeply", sd)


def test_a_panic_of_the_tokenizers_library_is_an_error_of_ours():
    panic = type("PanicException", (BaseException,), {})  # a class of its own, which cannot be imported
    for raised, said in ((panic("called `Option::unwrap()` on a `None` value"), "Option::unwrap"), (panic(), "Panic")):
        with (
            pytest.raises(ModelError, match=f"tokenizer: {said}|tokenizer: called .*{said}"),
            as_model_error("tokenizer"),
        ):
            raise raised
    with pytest.raises(KeyboardInterrupt), as_model_error("tokenizer"):
        raise KeyboardInterrupt


def test_a_path_is_a_folder_even_if_it_is_called_like_a_known_model(sd, dummies, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "sdxl-base"):
        shutil.copytree(sd, name)
        for path in (Path(name), Path(f"./{name}"), f"./{name}"):
            pipe = load_pipeline(path, device="cpu")
            assert digest(pipe) == digest(dummies["sd-v1-5"]) and decinb.image_size(pipe) == SIZE
            assert pipe.config._name_or_path == f"./{name}"
    rejected(InputError, "folder not found: 'tiny-depth'", Path("tiny-depth"))
    assert type(load_pipeline("tiny", device="cpu").unet) is decinb.UNetNAS


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "a\0b"])
def test_names_that_no_folder_can_have(name):
    for model in (name, Path(name)):
        with pytest.raises(InputError, match="model must") as caught:
            load_pipeline(model)
        assert "\n" not in str(caught.value)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_known_model_that_is_too_large(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "giant", Model("acme/giant", "a giant", 64, memory=1e6))
    rejected(ModelError, r"giant is too large for this machine: as float32 it needs about 2,?300,?000.0 GB", "giant")
    assert not fits(MODELS["giant"], "cpu") and fits(MODELS["tiny"], "cpu")
    there = total_memory() / 1e9
    half = Model("acme/giant", "fits as bfloat16 only", 64, memory=0.7 * there)
    assert fits(half, "cpu", "bfloat16") and not fits(half, "cpu")
    monkeypatch.setitem(MODELS, "giant", half)
    rejected(ModelError, "too large.*; dtype='bfloat16' needs half of that", "giant")


def test_a_folder_that_is_too_large_is_rejected_before_it_is_read(sd):
    file = weights(sd, "unet")
    numbers = total_memory() // 3  # as float32 4/3 of all there is, as bfloat16 2/3
    header = json.dumps({"giant": {"dtype": "F16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}}).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + 2 * numbers)  # a sparse file, which takes no space on the disk
    rejected(ModelError, "too large for this machine: as float32 it needs about .*dtype='bfloat16' needs half", sd)
