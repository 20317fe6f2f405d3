"""Loading, and the choice of a model: strict, quiet, and running nobody's code."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import decinb
from decinb import InputError, ModelError
from decinb.loading import _dtype, _find, load_pipeline
from decinb.models import MODELS, Model
from tests.fake_hub import FORMAT, as_pickle, digest, forbid, publish, small_model, weights, write_json


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
    assert _dtype(None, torch.device(device)) == dtype


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
        ({"dtype": "float12"}, "dtype: 'float12'.*bfloat16"),
        ({"dtype": torch.int8}, "dtype: torch.int8"),
        ({"device": "abacus"}, "device: 'abacus'.*cpu"),
        ({"device": "cuda:99"}, "device: 'cuda:99'.*none"),
        ({"model": "tinny"}, "'tinny' is not known; did you mean 'tiny'"),
        ({"model": "DeciDiffusion"}, "did you mean 'decidiffusion-v1-0'.*'tiny'"),
        ({"model": "xyzzy"}, "'xyzzy' is not known; give one of 'tiny', 'decidiffusion-v1-0'.*folder.*hub"),
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
