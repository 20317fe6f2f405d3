"""What an outsider tried who had not read the other tests: each attempt here once succeeded."""

import copy
import functools
import json
import os
import subprocess
import sys
import threading
import time
from importlib import import_module, reload
from types import MethodType
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from peft import LoraConfig
from PIL import Image
from torch.overrides import TorchFunctionMode

import decinb
from decinb import InputError, Link, load_sweep, replay, run_chain, run_sweep, steps
from decinb.benchmark.counting import count_unet_calls
from decinb.images import read_record, read_saved, save_image
from tests.helpers.modes import IN_GROUPS
from tests.helpers.sweeps import as_ours, levels

silu = torch.nn.functional.silu
PROMPT = "a red house at night"
CELLS = [{"strength": 1.0, "num_inference_steps": 2, "guidance_scale": scale} for scale in (3, 5)]
IMAGE = Image.new("RGB", (64, 64), (90, 120, 200))


@pytest.fixture
def pipe(tiny):
    """A pipeline that a test may break."""
    return copy.deepcopy(tiny)


def sweep(pipe, folder=None, cells=CELLS):
    return run_sweep(pipe, IMAGE, PROMPT, cells, folder=folder, progress=False)


def assert_fresh(pipe, folder):
    """Check that a folder of another pipeline does not decide what this one makes, and keeps what it made."""
    fresh, resumed = sweep(pipe), sweep(pipe, folder)
    for made, expected in zip(resumed.images, fresh.images, strict=True):
        assert levels(made, expected) <= 1


class DDIMScheduler(diffusers.DDIMScheduler):
    """A scheduler of one's own, called like the one of diffusers."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output * 0.5, *args, **kwargs)


class Halving(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 0.5


def own_class(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def own_step(pipe):
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: step(output * 0.5, *args, **kwargs)


def own_table(pipe):
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**2


def own_processor(pipe):
    pipe.unet.set_attn_processor(Halving())


def wrapped_under_a_hook(pipe):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="cpu"))
    original = pipe.unet.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return (original(*args, **kwargs)[0] * 0.5,)

    pipe.unet.forward = forward


@pytest.mark.parametrize("change", [own_class, own_step, own_table, own_processor, wrapped_under_a_hook])
def test_code_of_ones_own_is_never_taken_for_the_stock_code(pipe, tmp_path, change):
    sweep(pipe, tmp_path)
    change(pipe)
    assert_fresh(pipe, tmp_path)


@pytest.mark.parametrize("change", [own_step, own_table, own_processor])
def test_a_sweep_makes_what_a_call_makes_whatever_was_replaced(pipe, change):
    change(pipe)
    for cell, image in zip(CELLS, sweep(pipe).images, strict=True):
        alone = pipe(PROMPT, IMAGE, generator=torch.Generator().manual_seed(0), **cell).images[0]
        assert levels(image, alone) <= 1


def half(function):
    """Return a function that halves what another returns, as the user might write it."""

    def halved(*args, **kwargs):
        return function(*args, **kwargs) * 0.5

    return halved


REPLACED = [
    (torch.nn.Conv2d, "_conv_forward"),
    (torch.nn.SiLU, "forward"),
    (torch, "randn"),
    (diffusers.image_processor.VaeImageProcessor, "preprocess"),
    (DiagonalGaussianDistribution, "sample"),
    (diffusers.DDIMScheduler, "add_noise"),
    (diffusers.StableDiffusionImg2ImgPipeline, "prepare_latents"),
    (img2img, "retrieve_latents"),
]


@pytest.mark.parametrize(("owner", "name"), REPLACED, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_what_is_replaced_in_a_class_or_a_module_is_seen(pipe, tmp_path, monkeypatch, owner, name):
    sweep(pipe, tmp_path)
    monkeypatch.setattr(owner, name, half(getattr(owner, name)))
    assert_fresh(pipe, tmp_path)
    for cell, image in zip(CELLS, sweep(pipe).images, strict=True):
        alone = pipe(PROMPT, IMAGE, generator=torch.Generator().manual_seed(0), **cell).images[0]
        assert levels(image, alone) <= 1


class Halved(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * 0.5 if function is torch.nn.functional.silu else out


def test_a_mode_of_torch_and_the_precision_of_sums_are_seen(pipe, tmp_path):
    made = sweep(pipe, tmp_path)
    with Halved():
        assert_fresh(pipe, tmp_path)
    torch.set_float32_matmul_precision("medium")
    try:
        assert sweep(pipe, tmp_path).records[0]["key"] != made.records[0]["key"]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert sweep(pipe, tmp_path).records[0]["key"] == made.records[0]["key"]


def bound_method(pipe):
    own = MethodType(lambda vae, *args, **kwargs: (AutoencoderKL.decode(vae, *args, **kwargs)[0] * 0.5,), pipe.vae)
    pipe.vae.decode = own


def forward_of_another(pipe):
    other = copy.deepcopy(pipe.unet.conv_out)
    with torch.no_grad():
        other.weight.mul_(0.5)
    pipe.unet.conv_out.forward = torch.nn.Conv2d.forward.__get__(other)


def attribute_of_the_scheduler(pipe):
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.disable_corrector = [0, 1]


def setting_in_place(pipe):
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.register_to_config(solver_order=1)


def mean_of_the_batch(pipe):
    pipe.unet.register_forward_hook(lambda module, given, made: (made[0] - made[0].mean(0, keepdim=True),))


@pytest.mark.parametrize(
    "change",
    [bound_method, forward_of_another, attribute_of_the_scheduler, setting_in_place, mean_of_the_batch],
)
def test_a_sweep_of_a_changed_pipeline_is_that_of_its_calls(pipe, tmp_path, change):
    cells = [{**cell, "num_inference_steps": 4} for cell in CELLS]
    sweep(pipe, tmp_path, cells)
    change(pipe)
    fresh, resumed = sweep(pipe, cells=cells), sweep(pipe, tmp_path, cells)
    for cell, image, again in zip(cells, fresh.images, resumed.images, strict=True):
        alone = pipe(PROMPT, IMAGE, generator=torch.Generator().manual_seed(0), **cell).images[0]
        assert levels(image, alone) <= 1 and levels(again, alone) <= 1


def test_the_scale_of_an_adapter_counts_whatever_its_name(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "use_slicing")
    keys = []
    for scale in (1.0, 0.2):
        pipe.unet.set_adapters(["use_slicing"], [scale])
        keys.append(sweep(pipe).records[0]["key"])
    assert keys[0] != keys[1]


def through_data(pipe):
    pipe.unet.conv_out.weight.data.mul_(0.5)


def an_attribute(pipe):
    pipe.unet.conv_norm_out.eps = 10.0


def the_scale_of_latents(pipe):
    pipe.vae.register_to_config(scaling_factor=0.3)


def the_scheduler_in_place(pipe):
    pipe.scheduler.register_to_config(clip_sample=True)


@pytest.mark.parametrize("change", [through_data, an_attribute, the_scale_of_latents, the_scheduler_in_place])
def test_a_change_in_the_middle_of_a_sweep_leaves_no_wrong_image(pipe, tmp_path, change):
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    next(running)
    next(running)
    change(pipe)
    with pytest.raises((InputError, decinb.SweepError), match="unfinished .*removed because they may be wrong: 2"):
        list(running)
    assert not list(tmp_path.glob("*.png")), "images that may be wrong are not kept"


def test_a_folder_that_was_replaced_by_a_link_is_not_written_through(pipe, tmp_path):
    folder, outside = tmp_path / "sweep", tmp_path / "outside"
    outside.mkdir()
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=folder)
    next(running)
    folder.rename(tmp_path / "away")
    folder.symlink_to(outside)
    with pytest.warns(UserWarning, match="cannot be written to"):
        list(running)
    assert not list(outside.iterdir()) and len(running.sweep) == len(CELLS)


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    file = tmp_path / "scans.jpg"
    IMAGE.save(file, progressive=True)
    data = file.read_bytes()
    start = data.rindex(b"\xff\xda")
    file.write_bytes(data[:start] + data[start:-2] * 200 + data[-2:])
    with pytest.raises(InputError, match="scans, and at most 100 are allowed"):
        decinb.load_image(file)


def test_integers_up_to_255_are_pixels_whatever_their_size():
    pixels = np.asarray(IMAGE)
    for dtype in (np.int16, np.int32, np.int64):
        assert levels(decinb.load_image(pixels.astype(dtype)), IMAGE) == 0
    assert levels(decinb.load_image(pixels.astype(np.uint16) * 257), IMAGE) == 0


def test_what_a_file_says_is_shown_on_one_line():
    error = decinb.ModelError("a tensor called \x1b[31m\nb" + "x" * 10**6)
    assert str(error).isprintable() and len(str(error)) < 5_000


def test_a_report_that_cannot_be_written(tiny):
    made = run_sweep(tiny, IMAGE, PROMPT, CELLS, progress=False)
    for write in (made.to_csv, made.to_html):
        with pytest.raises(InputError, match="file '/proc/nowhere/a' cannot be written"):
            write("/proc/nowhere/a")


def test_a_pipeline_with_a_stage_of_its_own_is_called_one_by_one(pipe):
    class Mine(type(pipe)):
        def prepare_latents(self, *args, **kwargs):
            return super().prepare_latents(*args, **kwargs) * 0.5

    mine = Mine(**pipe.components)
    notes = [str(decinb.plan(one, IMAGE, PROMPT, CELLS)) for one in (mine, pipe)]
    assert "is not packed because of pipeline.class" in notes[0] and "not packed" not in notes[1]


def test_a_processor_in_a_module_that_is_edited(pipe, tmp_path, monkeypatch):
    module = tmp_path / "my_processor.py"
    text = "from diffusers.models.attention_processor import AttnProcessor2_0\nclass Mine(AttnProcessor2_0):\n"
    text += "    def __call__(self, *a, **k):\n        return super().__call__(*a, **k) * {}\n"
    module.write_text(text.format("0.5"))
    monkeypatch.syspath_prepend(tmp_path)
    mine = __import__("my_processor")
    pipe.unet.set_attn_processor(mine.Mine())
    sweep(pipe, tmp_path / "folder")
    module.write_text(text.format("0.25  # edited"))
    pipe.unet.set_attn_processor(reload(mine).Mine())
    assert_fresh(pipe, tmp_path / "folder")
    del sys.modules["my_processor"]


def test_a_method_that_was_replaced_in_a_class_of_diffusers(pipe, tmp_path, monkeypatch):
    sweep(pipe, tmp_path)
    original = AttnProcessor2_0.__call__
    monkeypatch.setattr(AttnProcessor2_0, "__call__", lambda *args, **kwargs: original(*args, **kwargs) * 0.5)
    assert_fresh(pipe, tmp_path)


def test_autocast_is_part_of_the_key(pipe, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        made = sweep(pipe, tmp_path)
    assert read_record(made.images.sources[0])["dtype"] == "float32, autocast to bfloat16"
    assert_fresh(pipe, tmp_path)
    with pytest.raises(InputError, match="was made in 'float32, autocast to bfloat16', but pipe is in float32"):
        replay(made.images.sources[0], pipe)


def test_a_chain_keeps_the_image_that_it_returns(pipe, tmp_path):
    links = [Link(pipe, PROMPT, strength=1.0, num_inference_steps=2)]
    run_chain(links, IMAGE, folder=tmp_path)
    own_table(pipe)
    made = run_chain(links, IMAGE, folder=tmp_path)
    (file,) = tmp_path.glob("link-*.png")
    assert levels(read_saved(file).image, made.images[-1]) == 0


@torch.no_grad()
@pytest.mark.parametrize("when", [0, 1])
def test_a_pipeline_that_changes_under_a_sweep_saves_nothing(pipe, tmp_path, when):
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    for _ in range(2 * when):
        next(running)
    weights = pipe.unet.conv_out.weight
    weights *= 0.5
    with pytest.raises(InputError, match="pipe was changed while its sweep was unfinished"):
        for _ in running:
            pass
    assert not list(tmp_path.glob("*.png"))


def test_a_configuration_or_autocast_between_planning_and_the_first_step_is_refused(pipe):
    running = steps(pipe, IMAGE, PROMPT, CELLS)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=r"unfinished \(dtype\)"):
        list(running)
    running = steps(pipe, IMAGE, PROMPT, CELLS)
    pipe.scheduler.register_to_config(beta_end=0.02)
    with pytest.raises(InputError, match=r"unfinished \(scheduler_config\)"):
        list(running)


def test_a_scheduler_may_be_replaced_between_steps(pipe, tmp_path):
    expected = sweep(pipe)
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    next(running), next(running)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for _ in running:
        pass
    assert all(levels(*pair) <= 1 for pair in zip(running.sweep.images, expected.images, strict=True))


def test_a_file_that_was_replaced_after_loading_is_refused(tiny, tmp_path):
    loaded = load_sweep(sweep(tiny, tmp_path).folder)
    loaded.images.sources[0].unlink()
    Image.new("RGB", (64, 64)).save(loaded.images.sources[1])
    for index in range(2):
        with pytest.raises(InputError, match="is not a PNG that decinb saved"):
            loaded.images[index]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_a_lock_that_is_a_link_is_not_followed(tiny, tmp_path, exists):
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".lock").symlink_to(victim)
    assert len(sweep(tiny, folder)) == 2
    assert victim.read_text() == "precious" if exists else not victim.exists()


def with_record(folder, number, **changes):
    """Seal a changed record into a file of a folder, as a stranger can."""
    path = sorted(folder.glob("*.png"))[number]
    saved = read_saved(path)
    save_image(saved.image, path, {**saved.record, **changes}, saved.input_image)


def test_a_record_puts_no_code_into_the_viewer(tiny, tmp_path):
    from decinb.execution.provenance import record_key

    sweep(tiny, tmp_path)
    path = sorted(tmp_path.glob("*.png"))[0]
    record = {**read_saved(path).record, "scheduler": "DDIMScheduler; __import__('os').system('true') #"}
    with_record(tmp_path, 0, **{**record, "key": record_key(record)})
    assert "pipe.scheduler = diffusers.DDIMScheduler;" not in load_sweep(tmp_path).explore().html


@pytest.mark.parametrize(
    "field",
    [{"unknown": 5}, {"image_hash": [1]}, {"versions": [1]}, {"scheduler": ["a"]}, {"seconds": "x"}],
    ids=str,
)
def test_a_record_of_odd_types_is_left_out(tiny, tmp_path, field):
    sweep(tiny, tmp_path)
    with_record(tmp_path, 0, **field)
    with pytest.warns(UserWarning, match="left out"):
        assert len(load_sweep(tmp_path)) == 1
    assert len(sweep(tiny, tmp_path)) == 2


def test_a_table_runs_no_formula_and_follows_no_link(tiny, tmp_path, monkeypatch):
    done = sweep(tiny)
    done.records[0]["=HYPERLINK()"] = "\n=1+1"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "table.csv").symlink_to(victim)
    text = done.to_csv(tmp_path / "table.csv").read_text()
    assert victim.read_text() == "precious" and "'=HYPERLINK()" in text and "'\n=1+1" in text
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert done.to_csv("~/home.csv") == tmp_path / "home.csv" and not (tmp_path / "~").exists()


def test_a_manifest_lists_a_file_once_and_stays_small(tiny, tmp_path):
    sweep(tiny, tmp_path)
    manifest = tmp_path / "sweep.json"
    entries = json.loads(manifest.read_text())["cells"]
    manifest.write_text(json.dumps({"cells": entries * 10_000}))
    started = time.perf_counter()
    assert len(load_sweep(tmp_path)) == 2
    assert time.perf_counter() - started < 5
    manifest.write_text(json.dumps({"cells": [], "more": [[]] * 3_000_000}))
    with pytest.raises(InputError, match=r"sweep.json in .* is damaged"):
        load_sweep(tmp_path)
    manifest.write_text(json.dumps({"cells": [{"file": 5, "cell": {}}, {"file": "a" * 300, "cell": {}}]}))
    with pytest.raises(InputError, match="a file is called 5"):
        load_sweep(tmp_path)


@pytest.mark.parametrize("name", ["text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_a_huge_configuration_is_refused_at_once(tiny, tmp_path, name):
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps({**config, "more": [[]] * 1_000_000}))
    started = time.perf_counter()
    with pytest.raises(decinb.ModelError, match=r"at most (500|2,000),000 are allowed"):
        decinb.load_pipeline(tmp_path, device="cpu")
    assert time.perf_counter() - started < 5


def test_clip_skip_works(tiny):
    arguments = {"num_inference_steps": 2, "strength": 1.0, "output_type": "np"}
    images = [
        tiny(PROMPT, IMAGE, clip_skip=skip, generator=torch.Generator().manual_seed(0), **arguments).images
        for skip in (None, 0, 1)
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-4 < np.abs(images[0] - images[2]).max()
    assert not decinb.plan(tiny, IMAGE, PROMPT, CELLS).records[0]["unknown"], "what only observes stays comparable"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function, got 5"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs must be a list of"),
        ({"callback_on_step_end_tensor_inputs": ["nope"]}, "callback_on_step_end_tensor_inputs must be a list of"),
        ({"prompt_embeds": torch.zeros(1, 4, 96)}, "prompt and prompt_embeds are two ways to give one text"),
    ],
)
def test_arguments_are_refused_before_the_first_unet_call(tiny, arguments, message):
    with pytest.raises(InputError, match=message):
        tiny(PROMPT, IMAGE, **arguments)


@pytest.mark.parametrize(
    "other",
    [
        lambda x, inplace=False: silu(x) * 0.9,
        functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.3),
        torch.nn.functional.relu,
    ],
)
def test_a_function_of_torch_that_was_replaced(pipe, tmp_path, monkeypatch, other):
    sweep(pipe, tmp_path)
    monkeypatch.setattr(torch.nn.functional, "silu", other)
    assert_fresh(pipe, tmp_path)


def test_a_traced_decoder_is_computed_again(pipe, tmp_path, capsys):
    decoder = torch.jit.trace(pipe.vae.decoder, torch.zeros(1, pipe.vae.config.latent_channels, 8, 8))
    pipe.vae.decoder = decoder
    first = sweep(pipe, tmp_path)
    second = sweep(pipe, tmp_path)
    assert "cannot be compared, so every image is computed again" in capsys.readouterr().out
    assert all(levels(one, other) <= 1 for one, other in zip(first.images, second.images, strict=True))


IN_USE = r"is in use by a run that is not finished: finish it, or stop it with close\(\)"


def test_a_sweep_in_the_folder_of_an_unfinished_one_does_not_wait_for_itself(pipe, tmp_path):
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    next(running)
    with pytest.raises(InputError, match=IN_USE):
        sweep(pipe, tmp_path)
    found = []

    def elsewhere():
        with pytest.raises(InputError, match=IN_USE) as caught:  # it holds the pipeline, which the first one needs
            sweep(pipe, tmp_path)
        found.append(caught)

    thread = threading.Thread(target=elsewhere, daemon=True)
    thread.start()
    thread.join(60)
    assert found
    running.close()
    assert len(sweep(pipe, tmp_path)) == 2


def test_a_leftover_world_size_does_not_wait_for_other_processes(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2 in the environment, but RANK is not set"):
        sweep(pipe, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_large_file_costs_little_memory(tmp_path):
    side = 4096
    save_image(Image.effect_noise((side, side), 80).convert("RGB"), tmp_path / "large.png", {"output_hash": "0"})
    code = (
        "import re, sys; from pathlib import Path; from decinb.images import read_saved\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "read_saved(sys.argv[1])\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 50 < int(run.stdout.split()[-1]) / 1024 < 200, "MiB"
    larger = Image.new("RGB", (side, side + 8))
    with pytest.raises(OSError, match="4096 x 4104 pixels is too large to be saved"):
        save_image(larger, tmp_path / "larger.png", {"output_hash": "0"})
    larger.save(tmp_path / "larger.png")
    with pytest.raises(InputError, match="it has too many pixels"):
        read_saved(tmp_path / "larger.png")


def test_values_are_selected_whatever_holds_them(tiny):
    import pandas

    made = run_sweep(tiny, IMAGE, PROMPT, CELLS, progress=False)
    scales = [3.0, 4.0]
    parts = [torch.tensor(3.0), np.array(4.0)], list(torch.linspace(3, 4, 2)), range(3, 100, 3)
    for given in (scales, np.array(scales), pandas.Series(scales), iter(scales), torch.tensor(scales), *parts):
        assert len(made.select(guidance_scale=given)) == 1
    assert len(made.select(seed=[torch.tensor(0)])) == len(made.select(seed=range(10))) == 2
    assert not len(made.select(guidance_scale=10**400)) and not len(made.select(prompt=[np.array([])]))
    assert len(made.select(guidance_scale=np.float32(5))) == len(made.select(guidance_scale=np.array(5.0))) == 1
    assert len(made.select(prompt=np.array(["a", PROMPT]))) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made, tmp: made.explore(scores=5), "scores must be a dict such as"),
        (lambda made, tmp: made.explore(scores={"a": 5}), r"scores\['a'\] must be a list of values, got 5"),
        (lambda made, tmp: made.explore(scores={"a": [1]}), "must have one value per image, 2, got 1"),
        (lambda made, tmp: made.explore(scores={"a": np.arange(3)}), "must have one value per image, 2, got 3"),
        (lambda made, tmp: made.plot(where={5: 1}), "unknown argument 5"),
        (lambda made, tmp: made.to_csv(None), "file must be a path, got None"),
        (lambda made, tmp: made.to_csv(""), "file must be a path, got ''"),
        (lambda made, tmp: made.to_csv("/"), "file must name a file, got the folder '/'"),
        (lambda made, tmp: made.to_html(tmp), "file must name a file, got the folder"),
        (lambda made, tmp: made.to_csv(tmp / "/".join(["a" * 200] * 30)), "file must be a path of at most 4,000 bytes"),
        (lambda made, tmp: decinb.plot_grid([5], ["a"]), r"images\[0\] must be a PIL image, got 5"),
        (lambda made, tmp: decinb.show_gallery([5], ["a"]), r"images\[0\] must be a PIL image, got 5"),
        (lambda made, tmp: decinb.random_design(3, a=range(10**12), b=range(10**12)), "draws from at most"),
        (lambda made, tmp: decinb.grid(a=range(10**20)), "a must have fewer than 2\\*\\*63 values, got range"),
        (lambda made, tmp: made.select(seed=range(10**12)), "seed has more than 100,000 values"),
        (lambda made, tmp: decinb.load_pipeline("tiny", compile="x"), "compile must be True or False, got 'x'"),
    ],
)
def test_odd_arguments_get_one_clear_line(tiny, tmp_path, call, message):
    made = run_sweep(tiny, IMAGE, PROMPT, CELLS, progress=False)
    with pytest.raises(InputError, match=message) as caught:
        call(made, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_playground_needs_a_folder_that_can_be_one(tiny):
    with pytest.raises(InputError, match="folder must be a path, got 5"):
        decinb.playground(tiny, folder=5)


def test_one_at_a_time_takes_arrays():
    cells = decinb.one_at_a_time({"strength": np.array([0.5])}, strength=[np.array([0.5]), np.array([0.7])])
    assert len(cells) == 2
    mask = np.zeros((4, 4, 3))
    assert len(decinb.one_at_a_time({"strength": mask}, strength=[mask, mask[..., :1]])) == 2
    assert len(decinb.random_design(3, a=range(10**12))) == 3


def test_a_cell_of_a_pipeline_with_a_hook_that_fails_leaves_the_others(pipe):
    calls = []

    def poison(module, given, made):
        calls.append(1)
        return (made[0] * float("nan") if len(calls) == 1 else made[0],)

    pipe.unet.register_forward_hook(poison)
    with pytest.warns(UserWarning, match="cell .*guidance 3.* returned NaN or infinity; the other cells continue"):
        assert len(sweep(pipe)) == 1


def test_what_a_hook_changed_is_told_by_replay(pipe, tmp_path):
    hook = pipe.unet.conv_out.register_forward_hook(lambda module, given, made: made * 0.5)
    made = sweep(pipe, tmp_path)
    (file,) = tmp_path.glob(f"*_{made.records[0]['key']}.png")
    with pytest.warns(UserWarning, match="may come out differently"):
        assert levels(replay(file, pipe), made.images[0]) <= 1
    hook.remove()
    with pytest.raises(InputError, match="pipe has other weights or settings"):
        replay(file, pipe)


@pytest.mark.parametrize("owner", [(torch, "load"), (torch.Tensor, "__repr__")], ids=["torch.load", "repr"])
def test_what_computes_nothing_may_be_replaced(pipe, tmp_path, monkeypatch, owner):
    monkeypatch.setattr(*owner, lambda *args, **kwargs: "")
    assert "not packed" not in str(decinb.plan(pipe, IMAGE, PROMPT, CELLS, timed=False))


def test_a_part_of_a_function_in_its_place_is_seen(pipe, monkeypatch):
    monkeypatch.setattr(img2img, "retrieve_latents", functools.partial(img2img.retrieve_latents, sample_mode="argmax"))
    for cell, image in zip(CELLS, sweep(pipe).images, strict=True):
        alone = pipe(PROMPT, IMAGE, generator=torch.Generator().manual_seed(0), **cell).images[0]
        assert levels(image, alone) <= 1


def test_a_photo_with_a_film_behind_it_is_read(tmp_path):
    file = tmp_path / "motion.jpg"
    IMAGE.save(file)
    file.write_bytes(file.read_bytes() + b"\xff\xda" * 1000)
    assert decinb.load_image(file).size == IMAGE.size


def test_a_change_before_an_error_leaves_no_wrong_image(pipe, tmp_path):
    cells = [{**CELLS[0], "seed": seed} for seed in range(4)]
    running = steps(pipe, IMAGE, PROMPT, cells, folder=tmp_path, max_rows=2)
    for state in running:
        if state.image is not None:
            break
    kept = len(list(tmp_path.glob("*.png")))
    pipe.unet.conv_out.weight.data.mul_(0.5)

    def fail(module, given):
        if fail.left == 0:
            raise RuntimeError("out of memory")
        fail.left -= 1

    fail.left = 2
    pipe.unet.register_forward_pre_hook(as_ours(fail))
    with pytest.raises((InputError, decinb.SweepError)):
        list(running)
    assert kept and not list(tmp_path.glob("*.png")), "it is not known when the weight changed"


def test_unknown_code_costs_no_finished_image(pipe, tmp_path):
    pipe.unet.register_forward_hook(lambda *_: None)
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    for state in running:
        if state.image is not None:
            break
    pipe.scheduler.register_to_config(clip_sample=True)
    with pytest.raises(decinb.SweepError, match="they may be wrong: 1; 1 of 2 cells are done"):
        list(running)
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_attention_of_ones_own_that_is_registered(pipe, tmp_path, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    sweep(pipe, tmp_path)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *a, **k: (sdpa(*a, **k)[0] * 0.5, None))
    assert_fresh(pipe, tmp_path)


@pytest.mark.parametrize("change", [own_class, own_step, own_table, None])
def test_replay_refuses_a_pipeline_with_code_of_the_user(pipe, tmp_path, monkeypatch, change):
    made = sweep(pipe, tmp_path)
    if change:
        change(pipe)
    else:
        monkeypatch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: silu(x) * 0.9)
    with pytest.raises(InputError, match="pipe has code that .* was not made with, and that cannot be compared: "):
        replay(made.images.sources[0], pipe)


def test_code_that_is_replaced_in_the_middle_of_a_sweep_leaves_no_wrong_image(pipe, tmp_path, monkeypatch):
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    next(running), next(running)
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: silu(x) * 0.9)
    with pytest.raises((InputError, decinb.SweepError), match=r"unfinished \(code\).* may be wrong: 2"):
        list(running)
    assert not list(tmp_path.glob("*.png"))


def test_weights_that_change_between_two_images_of_a_pipeline_that_is_not_packed(pipe, tmp_path):
    pipe.unet.register_forward_hook(lambda *_: None)
    running = steps(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path)
    while next(running).image is None:
        pass
    through_data(pipe)
    with pytest.raises(decinb.SweepError, match=r"unfinished \(weights\).* may be wrong: 1"):
        list(running)
    assert len(list(tmp_path.glob("*.png"))) == 1


def batch_norm(pipe):
    norm = torch.nn.BatchNorm2d(pipe.unet.conv_norm_out.num_channels, track_running_stats=False)
    pipe.unet.conv_norm_out = norm.eval()


def attention_across_images(pipe):
    module = "text_to_video_synthesis.pipeline_text_to_video_zero"
    try:
        zero = import_module(f"diffusers.pipelines.{module}")
    except ImportError:  # newer versions
        zero = import_module(f"diffusers.pipelines.deprecated.{module}")
    pipe.unet.set_attn_processor(zero.CrossFrameAttnProcessor2_0(batch_size=2))


def decoder_with_noise(pipe):
    torch.manual_seed(0)
    pipe.vae = diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(32, 64),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1,
        decoder_block_out_channels=(32, 64),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        decoder_layers_per_block=1,
    ).eval()
    pipe.register_modules(vae=pipe.vae)


@pytest.mark.parametrize("change", [batch_norm, attention_across_images])
def test_installed_code_that_mixes_the_rows_of_a_batch_is_not_packed(pipe, change):
    change(pipe)
    for cell, image in zip(CELLS, sweep(pipe).images, strict=True):
        alone = pipe(PROMPT, IMAGE, generator=torch.Generator().manual_seed(0), **cell).images[0]
        assert levels(image, alone) <= 1


def test_a_class_of_another_package_makes_its_images_by_its_own_call(pipe, tmp_path, monkeypatch):
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "another_package.py").write_text(
        "from diffusers import StableDiffusionImg2ImgPipeline\n"
        "class Another(StableDiffusionImg2ImgPipeline):\n"
        "    def __call__(self, prompt=None, image=None, strength=0.8, **kwargs):\n"
        "        return super().__call__(prompt=prompt, image=image, strength=strength / 2, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(package)
    another = import_module("another_package").Another(**pipe.components, requires_safety_checker=False)
    assert "not a class of diffusers or decinb, so its call may differ" in str(
        decinb.plan(another, IMAGE, PROMPT, CELLS)
    )
    del sys.modules["another_package"]


def test_a_decoder_that_draws_noise_is_given_the_generator(pipe):
    decoder_with_noise(pipe)
    image = Image.new("RGB", (32, 32), "teal")
    made = [run_sweep(pipe, image, PROMPT, CELLS, progress=False).images for _ in range(2)]
    for cell, *images in zip(CELLS, *made, strict=True):
        alone = pipe(PROMPT, image, generator=torch.Generator().manual_seed(0), **cell).images[0]
        assert all(levels(one, alone) <= 1 for one in images)


def decorated():
    decode = AutoencoderKL.decode

    @torch.no_grad()
    def halved(*args, **kwargs):
        return (decode(*args, **kwargs)[0] * 0.5,)

    return AutoencoderKL, "decode", halved


def mocked():
    embeddings = diffusers.models.embeddings
    halved = half(embeddings.get_timestep_embedding)
    return embeddings, "get_timestep_embedding", mock.MagicMock(side_effect=halved)


def evaluated():
    forward = eval("lambda self, x: silu(x) * 0.5", {"silu": silu})
    return torch.nn.SiLU, "forward", forward


@pytest.mark.parametrize("replacement", [decorated, mocked, evaluated])
def test_a_replacement_is_seen_however_it_was_made(pipe, tmp_path, monkeypatch, replacement):
    sweep(pipe, tmp_path)
    monkeypatch.setattr(*replacement())
    assert_fresh(pipe, tmp_path)


def test_what_torch_compile_leaves_in_modules_is_no_replacement(pipe):
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="eager")
    sweep(pipe)
    assert "not packed" not in str(decinb.plan(pipe, IMAGE, PROMPT, CELLS))


def test_a_setter_of_a_scheduler_and_other_schedulers_count(pipe):
    from decinb.execution.fingerprint import fingerprint
    from decinb.sampling.jobs import scheduler_changes

    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert not scheduler_changes(flow)
    flow.set_timesteps(4)
    assert not scheduler_changes(flow), "what a run sets is no change"
    flow.set_shift(8.0)
    assert scheduler_changes(flow) == ["scheduler._shift"]
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    hashes = []
    for end in (0.02, 0.5):
        other = diffusers.DDPMScheduler(beta_end=end)
        hashes.append(
            fingerprint(diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=other)).components
        )
    assert hashes[0] != hashes[1]


def test_a_private_method_that_was_replaced_on_the_pipeline_is_seen(pipe):
    pipe._guidance = lambda: 1
    assert "pipeline._guidance" in decinb.plan(pipe, IMAGE, PROMPT, CELLS).records[0]["unknown"][0]


def test_what_a_hook_of_accelerate_calls_is_seen(pipe, tmp_path):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="cpu"))
    assert not sweep(pipe, tmp_path).records[0]["unknown"]
    before = pipe.unet._old_forward
    pipe.unet._old_forward = lambda *args, **kwargs: (before(*args, **kwargs)[0] * 0.5,)
    assert_fresh(pipe, tmp_path)


@pytest.mark.skipif(not IN_GROUPS, reason="diffusers 0.39 offloads in groups only with an accelerator")
def test_weights_that_are_offloaded_to_disk_are_computed_again(pipe, tmp_path):
    expected = sweep(pipe, tmp_path / "images")
    cpu, kind = torch.device("cpu"), "leaf_level"
    apply_group_offloading(pipe.unet, cpu, cpu, offload_type=kind, offload_to_disk_path=str(tmp_path / "weights"))
    for _ in range(2):
        made = sweep(pipe, tmp_path / "images")
        assert made.records[0]["unknown"] == ["unet (weights offloaded to disk)"]
        assert levels(made.images[0], expected.images[0]) <= 1


def test_a_method_of_the_pipeline_that_was_replaced_by_installed_code_is_called(pipe):
    pipe.encode_prompt = functools.partial(pipe.encode_prompt, clip_skip=1)
    pipe.progress_bar = pipe.progress_bar  # computes nothing
    made = sweep(pipe)
    assert made.records[0]["unknown"] == ["pipeline.encode_prompt (another method)"]
    generator = torch.Generator().manual_seed(0)
    assert levels(made.images[0], pipe(PROMPT, IMAGE, generator=generator, **CELLS[0]).images[0]) <= 1


def test_images_with_dropout_are_never_finished(pipe, tmp_path, capsys):
    pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["to_q"], lora_dropout=0.5))
    made = sweep(pipe, tmp_path)
    assert made.records[0]["unknown"] == ["unet (dropout in training mode)"]
    assert "every image is computed again" in capsys.readouterr().out
    pipe.unet.eval()
    assert not sweep(pipe).records[0]["unknown"]


def test_a_sweep_of_unknown_code_does_not_change_an_earlier_one(pipe, tmp_path):
    def with_hook(factor):
        hook = pipe.unet.conv_out.register_forward_hook(lambda module, given, made: made * factor)
        made = sweep(pipe, tmp_path)
        hook.remove()
        return made

    first = with_hook(0.5)
    before = np.asarray(first.images[0])
    second = with_hook(1.5)
    assert levels(second.images[0], before) > 1
    assert levels(first.images[0], before) == 0


def test_cells_that_share_a_file_keep_their_own_records(pipe, tmp_path):
    cells = [{**CELLS[0], "guidance_scale": 1.0, "negative_prompt": text} for text in ("rain", "snow")]
    made = sweep(pipe, tmp_path, cells)
    assert [record["negative_prompt"] for record in made.records] == ["rain", "snow"]
    assert len(made.select(negative_prompt="snow")) == 1
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
def test_an_input_whose_name_is_not_utf8(pipe, tmp_path):
    file = os.fsencode(tmp_path) + b"/caf\xe9.png"
    IMAGE.save(tmp_path / "input.png")
    os.rename(tmp_path / "input.png", file)
    sweep_of = functools.partial(run_sweep, pipe, os.fsdecode(file), PROMPT, CELLS, progress=False)
    made = sweep_of(folder=tmp_path / "made")
    assert made.records[0]["image"] == "caf\ufffd.png"
    with count_unet_calls(pipe) as count:
        sweep_of(folder=tmp_path / "made")
    assert count.calls == 0
    made.to_html(tmp_path / "page.html")
