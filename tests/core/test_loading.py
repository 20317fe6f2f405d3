"""Loading, and the choice of a model: strict, quiet, and running nobody's code."""

import inspect
import json
import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

import decinb
from decinb import InputError, ModelError
from decinb.checkpoints.dummies import DUMMIES, SIZE, dummy
from decinb.loading import _find, fits, load_pipeline
from decinb.models import MODELS, Model
from decinb.models import TEXT_TO_IMAGE as TEXT
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
    """A published folder to break."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def load(folder: Path, **options) -> decinb.DeciDiffusionImg2ImgPipeline:
    return load_pipeline(folder, device="cpu", **options)


# What is loaded, and how it is told


def test_tiny_comes_up_quietly_as_float32_on_the_cpu(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load_pipeline("tiny", device="cpu")
    out, err = capfd.readouterr()
    assert out == "decinb: tiny on cpu, float32 (as asked)\n"
    assert err == ""
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training
        assert {(tensor.device.type, tensor.dtype) for tensor in part.parameters()} == {("cpu", torch.float32)}
    assert pipe.safety_checker is None
    assert pipe.image_size == MODELS["tiny"].image_size


def test_without_a_name(capsys, monkeypatch):
    monkeypatch.delenv("DECINB_MODEL", raising=False)
    assert load_pipeline(device="cpu").config._name_or_path == "tiny"
    line = capsys.readouterr().out
    assert line.startswith("decinb: tiny on cpu, float32 (") and line.count("\n") == 1 and "GPU" in line

    name, places, why = _find(None, torch.device("cuda"))  # the tests run offline, see conftest
    assert (name, places) == ("tiny", [("", MODELS["tiny"].source)])
    assert "HF_HUB_OFFLINE" in why and "\n" not in why


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.float16), ("cuda:1", torch.float16), ("mps", torch.float32)]
)
def test_dtype_left_to_the_device(device, dtype):
    assert choose_dtype(None, torch.device(device)) == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", torch.bfloat16])
def test_dtype_by_any_name(small, dtype):
    pipe = load(small, dtype=dtype)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["fp16", "float16", torch.float16])
def test_float16_on_the_cpu_becomes_float32_and_says_so(small, dtype):
    with pytest.warns(UserWarning, match="float16.*CPU.*float32") as caught:
        pipe = load(small, dtype=dtype)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)
    assert pipe.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float12"}, "dtype must be .*bfloat16.* got 'float12'"),
        ({"dtype": torch.int8}, "dtype must be .*got torch.int8"),
        ({"device": "abacus"}, "device must be .*cpu.* got 'abacus'"),
        ({"device": "cuda:99"}, "device must be .*got 'cuda:99'"),
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
def test_what_cannot_be_used_is_refused_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_pipeline(**{"model": "tiny", **options})
    assert "\n" not in str(caught.value)


def test_a_new_model_is_one_entry(small, monkeypatch):
    monkeypatch.setitem(MODELS, "mine", Model(small, "a model of mine", 128, "day", "a red house"))
    assert load_pipeline("mine", device="cpu").config._name_or_path == "mine"
    with pytest.raises(InputError, match="did you mean 'mine'"):
        load_pipeline("min")


# Loading a folder


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


def test_shards(small, tmp_path):
    pipe = load(small)
    pipe.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert digest(load(tmp_path)) == digest(pipe)
    max((tmp_path / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="unet"):
        load(tmp_path)


def test_the_scheduler_is_the_one_named(broken):
    path = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "_class_name": "EulerDiscreteScheduler"})
    assert type(load(broken).scheduler) is EulerDiscreteScheduler
    write_json(path, {**config, "_class_name": "UNet2DConditionModel"})
    with pytest.warns(UserWarning, match="'UNet2DConditionModel'; DDIMScheduler"):
        pipe = load(broken)
    assert pipe.scheduler.config.beta_schedule == config["beta_schedule"]


@pytest.mark.parametrize("folder", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_folder(broken, folder, happened):
    shutil.rmtree(broken / folder)
    with pytest.raises(ModelError, match=f"has no {folder}/") as caught:
        load(broken)
    if folder == "tokenizer":
        happened("F6", caught.value)


@pytest.mark.parametrize(
    "file", ["flexible_unet/config.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"]
)
def test_missing_file(broken, file):
    (broken / file).unlink()
    with pytest.raises(ModelError, match=f"has no {file}"):
        load(broken)


def test_no_flexible_unet(broken, small, tmp_path):
    shutil.rmtree(broken / "flexible_unet")
    with pytest.raises(ModelError, match=r"unet: .*asks for 'DecoyUNet'.*no code of a model's own is run"):
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


@pytest.mark.parametrize("component", ["flexible_unet", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_tensors_that_do_not_fit_are_named(broken, component, fault, happened):
    path = weights(broken, component)
    tensors = load_file(path)
    name = max(name for name in tensors if "conv" in name or "mlp" in name)
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
    if component == "flexible_unet":
        happened("F6", caught.value)


@pytest.mark.parametrize("component", ["flexible_unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 7, -100])
def test_weights_cut_short(broken, component, keep, happened):
    path = weights(broken, component)
    path.write_bytes(path.read_bytes()[:keep])
    found = {0: "is empty", 7: "is damaged or cut short", -100: r"is cut short: [\d,]+ bytes of [\d,]+"}[keep]
    with pytest.raises(ModelError, match=f"{component}.*{path.name} {found}.*; bring it anew") as caught:
        load(broken)
    if component == "vae":
        happened("F6", caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n", "is a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>Please sign in</html>", "is a web page"),
        (b"\x07" * 5000, "is damaged"),
        (b"\x10" + bytes(7) + b"{'no': 'json at all'}" + bytes(99), "is damaged"),
    ],
    ids=["pointer", "page", "noise", "header"],
)
@pytest.mark.parametrize("component", ["flexible_unet", "text_encoder"])
def test_what_is_no_weights_at_all(broken, component, content, found, happened):
    path = weights(broken, component)
    path.write_bytes(content)
    with pytest.raises(ModelError, match=f"{component.removeprefix('flexible_')}: .*{path.name} {found}") as caught:
        load(broken)
    assert "\n" not in str(caught.value)
    if component == "text_encoder":
        happened("F6", caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("component", ["flexible_unet", "vae", "text_encoder"])
def test_weights_that_are_no_numbers(broken, component, value, happened):
    path = weights(broken, component)
    tensors = load_file(path)
    name = max(name for name in tensors if "conv" in name or "mlp" in name)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, FORMAT)
    part = component.removeprefix("flexible_")
    with pytest.raises(ModelError, match=f"{part}: {name.removeprefix('text_model.')}.* NaN or infinity") as caught:
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


def test_tokenizer_of_another_model(broken):
    path = broken / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    write_json(path, {**vocabulary, "dragon</w>": len(vocabulary)})
    with pytest.raises(ModelError, match=r"tokenizer.*do not belong together"):
        load(broken)


# Pickles


class Malice:
    """What a pickle can do to whoever opens it carelessly."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_pickled_weights_are_read_only_if_the_user_says_so_and_as_plain_tensors(broken, small, happened):
    files = [as_pickle(broken, component) for component in ("flexible_unet", "vae", "text_encoder")]
    with pytest.raises(ModelError, match=f"flexible_unet: .*{files[0].name}.*allow_pickle=True") as refused:
        load(broken)
    happened("F6", refused.value)
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
    assert mark.exists(), "the bait does not work"
    mark.unlink()

    file = as_pickle(broken, component)
    torch.save({"conv_in.weight": Malice(mark)}, file)
    with pytest.raises(ModelError, match=f"{component}: .*allow_pickle=True"):
        load(broken)
    with pytest.raises(ModelError, match=f"{component.removeprefix('flexible_')}: .*plain tensors") as caught:
        load(broken, allow_pickle=True)
    assert not mark.exists()
    assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None


# Models that diffusers knows, from a folder

CLASSES = {
    "sd-v1-5": ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"),
    "sd-2-depth": ("StableDiffusionDepth2ImgPipeline", None),
    "sdxl-base": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", None),
    "kandinsky-2-2": ("KandinskyV22Img2ImgCombinedPipeline", "KandinskyV22CombinedPipeline"),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """A folder of each, as diffusers saves it."""
    root = tmp_path_factory.mktemp("stand-ins")
    with quiet():
        for name in DUMMIES:
            dummy(name).save_pretrained(root / name)
    return {name: root / name for name in DUMMIES}


@pytest.fixture
def copy(stand_ins, tmp_path):
    """Copies a stand-in's folder, to be broken."""
    return lambda name: Path(shutil.copytree(stand_ins[name], tmp_path / name))


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


def refused(error: type[Exception], message: str, folder: object, **options) -> str:
    """What loading says of a model that it does not take: one line."""
    with pytest.raises(error, match=message) as caught:
        load_pipeline(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:In CPU autocast")  # diffusers, of itself, at a call
@pytest.mark.parametrize("name", CLASSES)
def test_a_stock_model_comes_up_quietly_with_its_weights_and_runs(stand_ins, name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = load(stand_ins[name])
    assert capfd.readouterr() == (f"decinb: {stand_ins[name]} on cpu, float32 (as asked)\n", "")
    original = dummy(name)
    assert type(pipe) is getattr(diffusers, CLASSES[name][0]) and digest(pipe) == digest(original)
    settings = {key: value for key, value in original.config.items() if key[0] != "_" and not isinstance(value, tuple)}
    assert settings == {key: pipe.config[key] for key in settings}
    assert not any(part.training for part in pipe.components.values() if isinstance(part, nn.Module))
    assert np.isfinite(draw(pipe)).all()
    assert decinb.image_size(pipe) == SIZE


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CLASSES)
def test_text_to_image_where_a_model_can(stand_ins, name, capfd):
    wanted = CLASSES[name][1]
    image_to_image = load(stand_ins[name])
    if wanted is None:
        refused(
            InputError, f"task: .*{name}, a {CLASSES[name][0]}, cannot do 'text-to-image'", stand_ins[name], task=TEXT
        )
        refused_pipe = type(image_to_image).__name__
        with pytest.raises(InputError, match=f"task: {refused_pipe} cannot do 'text-to-image'"):
            load_pipeline(image_to_image, task=TEXT)
        return
    pipe = load(stand_ins[name], task=TEXT)
    assert type(pipe) is getattr(diffusers, wanted)
    assert np.isfinite(draw(pipe, height=SIZE, width=SIZE)).all()

    capfd.readouterr()
    shared = load_pipeline(image_to_image, task=TEXT)
    back = load_pipeline(shared)
    assert type(shared) is type(pipe) and type(back) is type(image_to_image)
    for one in (shared, back):
        assert all(one.components[part] is image_to_image.components[part] for part in one.components)
        assert one.config._name_or_path == str(stand_ins[name])
    assert load_pipeline(image_to_image) is image_to_image
    assert capfd.readouterr() == ("", "")
    np.testing.assert_array_equal(draw(back), draw(image_to_image))


def test_an_entry_with_a_source_that_is_none(monkeypatch):
    monkeypatch.setitem(MODELS, "mine", Model("/a/folder", "", 64))
    refused(InputError, "the source of 'mine', '/a/folder', is no hub id .*a folder as a pathlib.Path", "mine")
    monkeypatch.setitem(MODELS, "mine", Model(Path("/a/folder"), "", 64))
    refused(ModelError, "/a/folder has no flexible_unet and no model_index.json", "mine")


def test_a_task_or_a_setting_that_cannot_be(tiny):
    refused(
        InputError, "task must be one of image-to-image, text-to-image, got 'inpainting'", "tiny", task="inpainting"
    )
    refused(InputError, "task: sd-2-depth cannot do 'text-to-image', only 'image-to-image'", "sd-2-depth", task=TEXT)
    refused(InputError, r"this pipeline is loaded.*pipe.to\(", tiny)
    for setting in ({"dtype": "bf16"}, {"compile": True}):
        with pytest.raises(InputError, match="this pipeline is loaded"):
            load_pipeline(tiny, **setting)


def test_the_wanted_variant_wins_and_the_plain_one_does_where_there_is_none(sd, monkeypatch):
    pipe = dummy("sd-v1-5", seed=1)
    pipe.unet.save_pretrained(sd / "unet", variant="other")
    pipe.vae.save_pretrained(sd / "vae", variant="other", max_shard_size="50KB")
    monkeypatch.setitem(MODELS, "sd-v1-5", replace(MODELS["sd-v1-5"], source=sd, variant="other", memory=0.01))
    loaded, plain = load_pipeline("sd-v1-5", device="cpu"), dummy("sd-v1-5")
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    assert digest(load(sd)) == digest(plain)
    assert torch.equal(
        loaded.text_encoder.get_input_embeddings().weight, plain.text_encoder.get_input_embeddings().weight
    )


# What is wrong with a folder


def change(path: Path, **changes: object) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_listed_and_not_there(sd, part):
    shutil.rmtree(sd / part)
    refused(ModelError, f"{sd.name} has no {part}/.*incomplete; fetch it anew", sd)


def test_a_part_that_is_needed_and_not_listed(sd):
    change(sd / "model_index.json", vae=[None, None])
    refused(ModelError, "has no vae, which StableDiffusionImg2ImgPipeline needs", sd)


def test_weights_of_a_stock_model_cut_short(sd):
    file = weights(sd, "vae")
    file.write_bytes(file.read_bytes()[:-1000])
    refused(ModelError, r"vae: .*is cut short: [\d,]+ bytes of [\d,]+; bring it anew", sd)


def test_a_shard_that_is_missing(sd, stand_ins):
    with quiet():
        dummy("sd-v1-5").unet.save_pretrained(sd / "unet", max_shard_size="1MB")
    for file in (sd / "unet").glob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    assert digest(load(sd)) == digest(dummy("sd-v1-5"))
    shard = max((sd / "unet").glob("*.safetensors"))
    shard.unlink()
    refused(ModelError, f"has no unet/{shard.name}: the model is incomplete", sd)
    write_json(sd / "unet" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "../../x"}})
    refused(ModelError, r"has no unet/\.\./\.\./x", sd)


def test_no_code_of_a_models_own_runs(sd, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    for folder in (sd, sd / "unet", sd / "text_encoder"):
        (folder / "decoy.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Decoy: pass\n")
    monkeypatch.chdir(sd)  # a module of the working folder could be found
    index = sd / "model_index.json"
    before = index.read_text()
    for entry, message in (
        (["decoy", "Decoy"], "unet: .*asks for 'Decoy' of 'decoy', which is not a part of diffusers: no code"),
        (["os", "system"], "unet: .*asks for 'system' of 'os', which is not a part of diffusers"),
        (["diffusers", "NoSuchUNet"], f"unet: diffusers {diffusers.__version__} has no 'NoSuchUNet'"),
        (["transformers", "AutoModel"], "unet: .*asks for 'AutoModel' of 'transformers', which is neither a network"),
        (["diffusers", "DiffusionPipeline"], "unet: .*asks for 'DiffusionPipeline' of 'diffusers', which is neither"),
        (["pipeline_utils", "DiffusionPipeline"], "unet: .*'DiffusionPipeline' of 'pipeline_utils', which is neither"),
        (
            ["StableDiffusionPipeline", "X"],
            "unet: .*'X' of 'StableDiffusionPipeline', which is not a part of diffusers",
        ),
        (["__class__", "X"], "unet: .*'X' of '__class__', which is not a part of diffusers"),
    ):
        change(index, unet=entry)
        refused(ModelError, message, sd)
    index.write_text(before)
    for named in ("NoSuchPipeline", ["decoy", "Decoy"], None, "UNet2DConditionModel"):
        change(index, _class_name=named)
        refused(ModelError, "asks for the pipeline .*which diffusers .*does not have", sd)
    index.write_text(before)
    change(sd / "text_encoder" / "config.json", auto_map={"AutoModel": "decoy.Decoy", "AutoConfig": "decoy.Decoy"})
    change(sd / "unet" / "config.json", _class_name="Decoy", _target_="decoy.Decoy")
    assert digest(load(sd)) == digest(dummy("sd-v1-5"))
    change(sd / "text_encoder" / "config.json", attn_implementation="acme/kernel")
    refused(ModelError, "text_encoder: .*asks for code from the hub, 'acme/kernel'", sd)
    assert not mark.exists()


def test_a_folder_without_an_index(sd):
    (sd / "model_index.json").unlink()
    refused(ModelError, "has no flexible_unet and no model_index.json: .*give the folder", sd)
    (sd / "model_index.json").write_text("[1, 2")
    refused(ModelError, "model_index.json is not valid JSON", sd)
    for content in ("[]", "[[1, 2]]", '"a"'):
        (sd / "model_index.json").write_text(content)
        refused(ModelError, "model_index.json is no table but", sd)


@pytest.mark.parametrize("task", ["image-to-image", TEXT])
def test_a_unet_that_was_made_for_another_task(sd, task):
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sd / "unet"), in_channels=9)
    unet.save_pretrained(sd / "unet")
    change(sd / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    refused(
        ModelError, "its U-Net sees 9 channels, and StableDiffusion.*Pipeline gives it 4: .*another task", sd, task=task
    )


def test_a_tokenizer_of_another_stock_model(copy):
    folder = copy("sdxl-base")
    change(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=77)
    refused(ModelError, "tokenizer_2: .* do not belong together; bring both from one model", folder)


def test_older_names_of_what_prepares_a_picture(copy):
    folder = copy("sd-2-depth")
    change(folder / "model_index.json", feature_extractor=["transformers", "DPTFeatureExtractor"])
    assert type(load(folder).feature_extractor) is type(dummy("sd-2-depth").feature_extractor)


def test_a_stock_model_in_pickles(sd, tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        as_pickle(sd, part)
    message = refused(
        ModelError, "text_encoder: .*has no safetensors but text_encoder/.*bin, a pickle.*allow_pickle=True", sd
    )
    assert "look for a copy" in message
    with pytest.warns(UserWarning, match="plain tensors only"):
        assert digest(load(sd, allow_pickle=True)) == digest(dummy("sd-v1-5"))
    mark = tmp_path / "ran"
    torch.save({"conv_in.weight": Malice(mark)}, sd / "unet" / "diffusion_pytorch_model.bin")
    with pytest.warns(UserWarning, match="plain tensors only"):
        refused(ModelError, "unet: .*more than plain tensors", sd, allow_pickle=True)
    assert not mark.exists()


# What does not fit into the memory


def test_a_known_model_that_is_too_large(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "giant", Model("acme/giant", "a giant", 64, memory=1e6))
    refused(ModelError, r"giant is too large for this machine: as float32 it needs about 2,?300,?000.0 GB", "giant")
    assert not fits(MODELS["giant"], "cpu") and fits(MODELS["tiny"], "cpu")
    there = total_memory() / 1e9
    half = Model("acme/giant", "fits as bfloat16 only", 64, memory=0.7 * there)
    assert fits(half, "cpu", "bfloat16") and not fits(half, "cpu")
    monkeypatch.setitem(MODELS, "giant", half)
    refused(ModelError, "too large.*; dtype='bfloat16' takes half of that", "giant")


def test_a_folder_that_is_too_large_is_refused_unread(sd):
    file = weights(sd, "unet")
    numbers = total_memory() // 3  # as float32 4/3 of all there is, as bfloat16 2/3
    header = json.dumps({"giant": {"dtype": "F16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}}).encode()
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + 2 * numbers)  # a hole, which takes no room on the disk
    refused(ModelError, "too large for this machine: as float32 it needs about .*dtype='bfloat16' takes half", sd)


def test_an_adapter_in_place_of_a_model_is_refused(broken):
    write_json(broken / "text_encoder" / "adapter_config.json", {"base_model_name_or_path": "/elsewhere"})
    with pytest.raises(ModelError, match=r"text_encoder: .*holds an adapter, not a model.*load_lora_weights"):
        load(broken)
