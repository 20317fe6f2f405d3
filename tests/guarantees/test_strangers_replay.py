"""What an outsider tried with ``replay``, chains and adapters: each attempt here once succeeded."""

import copy
from importlib import import_module

import diffusers
import pytest
import torch
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image

import decinb
from decinb import InputError, Link, replay, run_chain, run_sweep, steps
from decinb.benchmark.counting import count_unet_calls
from decinb.execution.fingerprint import fingerprint
from decinb.execution.provenance import active_adapters, record_key
from decinb.images import read_saved, save_image
from tests.helpers.sweeps import levels

PROMPT = "a red house at night"
CELLS = [{"strength": 1.0, "num_inference_steps": 2, "guidance_scale": 3.0}]
IMAGE = Image.new("RGB", (64, 64), (90, 120, 200))


@pytest.fixture
def pipe(tiny):
    """A pipeline that a test may break."""
    return copy.deepcopy(tiny)


@pytest.fixture
def with_adapters(pipe):
    """A pipeline with two adapters, both active; the second one's scale is its strength times two."""
    add_adapter(pipe, "style", 4)
    add_adapter(pipe, "ink", 8)
    return pipe


def add_adapter(pipe, name, alpha):
    torch.manual_seed(alpha)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(config, name)
    pipe.unet.eval()


def sweep(pipe, folder=None):
    return run_sweep(pipe, IMAGE, PROMPT, CELLS, folder=folder, progress=False)


# --- adapters ---


def layers_of(pipe):
    return [layer for layer in pipe.unet.modules() if hasattr(layer, "scaling")]


def adapter_state(pipe):
    layers = layers_of(pipe)
    weights = [weight.requires_grad for layer in layers for weight in layer.parameters()]
    return [(dict(one.scaling), one._active_adapter, one.disable_adapters) for one in layers], weights


def at_zero(pipe):
    pipe.set_adapters(["style"], [0.0])


def disabled(pipe):
    pipe.set_adapters(["style"], [0.5])
    pipe.disable_lora()


def one_at_zero(pipe):
    pipe.set_adapters(["style", "ink"], [0.0, 1.0])


def many_digits(pipe):
    pipe.set_adapters(["style", "ink"], [1 / 3, 1.0])


def layer_by_layer(pipe):
    pipe.set_adapters(["style", "ink"], [0.7, 1.0])
    layers_of(pipe)[0].set_scale("style", 0.123456789)


def disabled_in_part(pipe):
    pipe.set_adapters(["ink"], [1.0])
    layers_of(pipe)[0].enable_adapters(False)


@pytest.mark.parametrize("before", [at_zero, disabled, one_at_zero, many_digits, layer_by_layer, disabled_in_part])
@pytest.mark.parametrize("end", ["made", "refused", "failed"])
def test_replay_leaves_the_adapters_as_they_were(with_adapters, tmp_path, monkeypatch, before, end):
    pipe = with_adapters
    pipe.set_adapters(["style"], [1.0])
    made = sweep(pipe, tmp_path)
    before(pipe)
    found = adapter_state(pipe)
    if end == "made":
        assert levels(replay(made.images.sources[0], pipe), made.images[0]) <= 1
    elif end == "refused":
        with torch.no_grad():
            pipe.unet.conv_out.bias += 1
        with pytest.raises(InputError, match="other weights"):
            replay(made.images.sources[0], pipe)
    else:
        monkeypatch.setattr(type(pipe.vae), "decode", None)
        with pytest.raises(InputError):
            replay(made.images.sources[0], pipe)
    assert adapter_state(pipe) == found


def test_a_call_with_a_scale_of_its_own_changes_no_key(with_adapters, tmp_path):
    pipe = with_adapters
    pipe.set_adapters(["style"], [0.8])
    sweep(pipe, tmp_path)
    running = steps(pipe, IMAGE, PROMPT, [{**CELLS[0], "guidance_scale": 5.0}])
    next(running)
    before = fingerprint(pipe).components
    pipe(PROMPT, IMAGE, **CELLS[0], cross_attention_kwargs={"scale": 0.7})
    assert layers_of(pipe)[0].scaling["style"] not in (0.8, 0.7), "rounded twice"
    assert fingerprint(pipe).components == before and active_adapters(pipe) == [["style", 0.8]]
    assert len(list(running)) > 0 and len(running.sweep) == 1
    with count_unet_calls(pipe) as count:
        sweep(pipe, tmp_path)
    assert count.calls == 0


def test_small_differences_of_a_scale_still_count(with_adapters):
    hashes = []
    for scale in (0.8, 0.8000001, 1e-9, 2e-9):
        with_adapters.set_adapters(["style"], [scale])
        hashes.append(fingerprint(with_adapters).components["unet"])
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("scale", [1 / 3, 2 / 7, 0.123456789])
@pytest.mark.parametrize("name", ["style", "ink"])
def test_a_scale_of_many_digits_is_set_again(with_adapters, tmp_path, name, scale):
    pipe = with_adapters
    pipe.set_adapters([name], [scale])
    made = sweep(pipe, tmp_path)
    pipe.set_adapters([name], [1.0])
    assert levels(replay(made.images.sources[0], pipe), made.images[0]) <= 1


def test_a_scale_that_an_earlier_version_recorded_in_six_digits(with_adapters, tmp_path):
    pipe = with_adapters
    pipe.set_adapters(["style"], [0.123456789])
    made = sweep(pipe, tmp_path)
    saved = read_saved(made.images.sources[0])
    save_image(saved.image, tmp_path / "old.png", {**saved.record, "adapters": [["style", 0.123457]]}, IMAGE)
    assert levels(replay(tmp_path / "old.png", pipe), made.images[0]) <= 1


# --- chains ---


@pytest.fixture
def parts(tiny):
    """The components of a small latent consistency model, which Stable Diffusion's class can run too."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        norm_num_groups=8,
        time_cond_proj_dim=16,
    ).eval()
    return {**tiny.components, "unet": unet, "scheduler": LCMScheduler.from_config(tiny.scheduler.config)}


def made_as(cls, parts):
    pipe = cls(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def chain_of(pipe, folder):
    takes_image = "Img2Img" in type(pipe).__name__
    strength = {"strength": 0.8} if takes_image else {}
    links = [Link(pipe, PROMPT, guidance_scale=7.5, num_inference_steps=3, **strength)]
    return run_chain(links, IMAGE if takes_image else None, folder=folder)


def only_file(folder):
    (path,) = folder.glob("*.png")
    return path


def test_chains_tell_apart_the_classes_that_share_all_components(parts, tmp_path):
    pipes = [made_as(cls, parts) for cls in (LatentConsistencyModelImg2ImgPipeline, StableDiffusionImg2ImgPipeline)]
    chains = [chain_of(pipe, tmp_path / type(pipe).__name__) for pipe in pipes]
    assert levels(chains[0].images[0], chains[1].images[0]) > 1
    assert chains[0].records[0]["key"] != chains[1].records[0]["key"]
    for pipe, other, chain in zip(pipes, reversed(pipes), chains, strict=True):
        path = only_file(chain.folder)
        assert levels(replay(path, pipe), chain.images[0]) <= 1
        with pytest.raises(InputError) as caught:
            replay(path, other)
        said = f"was made by a '{type(pipe).__name__}', but pipe is a {type(other).__name__}, whose call may differ"
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_chains_from_text_tell_apart_the_classes_that_share_all_components(tiny, tmp_path):
    stock, panorama = (
        made_as(cls, tiny.components) for cls in (StableDiffusionPipeline, StableDiffusionPanoramaPipeline)
    )
    chain = chain_of(stock, tmp_path)
    with pytest.raises(InputError, match="but pipe is a StableDiffusionPanoramaPipeline"):
        replay(only_file(tmp_path), panorama)
    assert levels(replay(only_file(tmp_path), decinb.load_pipeline(tiny, task="text-to-image")), chain.images[0]) <= 1


def test_the_usual_classes_keep_the_keys_of_their_chains(tiny, tmp_path):
    stock = made_as(StableDiffusionImg2ImgPipeline, tiny.components)
    ours, theirs = (chain_of(pipe, None).records[0] for pipe in (tiny, stock))
    assert ours["key"] == theirs["key"] and "decides" not in ours["chain"][0]


def test_a_chain_of_an_earlier_version_that_has_no_class_in_its_key(parts, tmp_path):
    pipe = made_as(LatentConsistencyModelImg2ImgPipeline, parts)
    chain = chain_of(pipe, tmp_path / "new")
    saved = read_saved(only_file(tmp_path / "new"))
    (link,) = saved.record["chain"]
    record = {**saved.record, "chain": [{name: value for name, value in link.items() if name != "decides"}]}
    save_image(saved.image, tmp_path / "old.png", {**record, "key": record_key(record)}, IMAGE)
    assert record_key(record) != saved.record["key"]
    assert levels(replay(tmp_path / "old.png", pipe), chain.images[0]) <= 1
    with pytest.raises(InputError, match="whose call may differ"):
        replay(tmp_path / "old.png", made_as(StableDiffusionImg2ImgPipeline, parts))


def test_a_sweep_of_a_class_that_is_not_packed_is_not_replayed_by_another(parts, tmp_path):
    made = sweep(made_as(LatentConsistencyModelImg2ImgPipeline, parts), tmp_path)
    with pytest.raises(InputError, match="was made by a 'LatentConsistencyModelImg2ImgPipeline', but pipe is a Stable"):
        replay(made.images.sources[0], made_as(StableDiffusionImg2ImgPipeline, parts))


# --- schedulers and dtypes ---


@pytest.fixture
def halving(tmp_path, monkeypatch):
    """A scheduler of another installed package, called like the one of diffusers."""
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "another_scheduler.py").write_text(
        "import diffusers\n"
        "class DDIMScheduler(diffusers.DDIMScheduler):\n"
        "    def step(self, model_output, *args, **kwargs):\n"
        "        return super().step(model_output * 0.5, *args, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(package)
    yield import_module("another_scheduler").DDIMScheduler
    monkeypatch.delitem(import_module("sys").modules, "another_scheduler")


def test_a_scheduler_of_another_package_is_not_the_one_of_diffusers(pipe, tmp_path, halving):
    theirs = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    others = halving.from_config(pipe.scheduler.config)
    folder = tmp_path / "images"
    pipe.scheduler = theirs
    first = sweep(pipe, folder)
    pipe.scheduler = others
    second, alone = sweep(pipe, folder), sweep(pipe)
    names = [made.records[0]["scheduler"] for made in (first, second)]
    assert names == ["DDIMScheduler", "another_scheduler.DDIMScheduler"] and not second.records[0]["unknown"]
    assert levels(second.images[0], alone.images[0]) == 0 and levels(first.images[0], second.images[0]) > 1
    # Whatever scheduler the pipeline has, that of diffusers can be made; that of another package is never looked for.
    paths = [made.images.sources[0] for made in (first, second)]
    assert levels(replay(paths[0], pipe), first.images[0]) <= 1
    assert levels(replay(paths[1], pipe), second.images[0]) <= 1
    pipe.scheduler = theirs
    with pytest.raises(
        InputError, match="'another_scheduler.DDIMScheduler', .*: give a pipeline whose scheduler is of"
    ):
        replay(paths[1], pipe)


def test_a_scheduler_of_ones_own_that_an_earlier_version_recorded_without_its_module(pipe, tmp_path):
    class DDIMScheduler(diffusers.DDIMScheduler):
        def step(self, model_output, *args, **kwargs):
            return super().step(model_output * 0.5, *args, **kwargs)

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    made = sweep(pipe, tmp_path)
    saved = read_saved(only_file(tmp_path))
    record = {**saved.record, "scheduler": "DDIMScheduler"}
    save_image(saved.image, tmp_path / "old.png", {**record, "key": record_key(record)}, IMAGE)
    with pytest.warns(UserWarning, match="may come out differently"):
        assert levels(replay(tmp_path / "old.png", pipe), made.images[0]) <= 1


def test_an_image_made_inside_autocast_without_a_pipeline(pipe, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        made = sweep(pipe, tmp_path)
        path = made.images.sources[0]
        assert levels(replay(path), made.images[0]) <= 1
        assert levels(replay(path, pipe), made.images[0]) <= 1
    for given in (None, pipe):
        with pytest.raises(InputError, match="but pipe is in float32: call replay inside the same torch.autocast"):
            replay(path, given)


def test_an_image_made_outside_autocast(pipe, tmp_path):
    path = sweep(pipe, tmp_path).images.sources[0]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match="autocast to bfloat16: call replay outside torch.autocast"),
    ):
        replay(path, pipe)
