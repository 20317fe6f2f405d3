"""Every scheduler and every way to run a network: sweep, save, resume, load, plot and replay, or a refusal by name."""

import itertools
import random
import warnings

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from peft import LoraConfig

import decinb
from decinb import InputError, run_sweep
from decinb.benchmark.counting import count_unet_calls
from decinb.execution.provenance import active_adapters
from decinb.figures.layout import lay_out
from tests.helpers.fuzz import EXAMPLES, FEW
from tests.helpers.modes import MODES
from tests.helpers.small import small_pipe
from tests.helpers.sweeps import same

IMAGE = decinb.load_image("day", 64)
PROMPT = "a red house"
CELLS = [
    {"num_inference_steps": 4, "strength": 0.7, "guidance_scale": 1.0},
    {"num_inference_steps": 3, "strength": 1.0, "guidance_scale": 3.0, "seed": 1},
]
SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != "LRScheduler")
CANNOT = {  # made for other pipelines: tokens, flows, several inputs at a step
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "CogVideoXDPMScheduler",
    "DDIMInverseScheduler",
    "DDPMWuerstchenScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PiflowScheduler",
    "RFD4ProteinaScheduler",
    "RePaintScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
    "VQDiffusionScheduler",
}

PAIRS = list(itertools.product([name for name in SCHEDULERS if name not in CANNOT], MODES))
SOME_PAIRS = PAIRS if EXAMPLES > FEW else random.Random(0).sample(PAIRS, 6)
"""Of schedulers and modes: a few in ``make test``, all of them in ``make fuzz``."""


@pytest.fixture
def pipe(tiny):
    pipe = small_pipe(tiny)
    pipe.unet.conv_out.weight.data.mul_(0.1)  # or some schedulers would multiply the roundings of a random network
    return pipe


def scheduler_of(name, pipe, **changes):
    """A scheduler with the noise levels of ``tiny``, or with its own defaults where it knows no such levels."""
    cls = getattr(diffusers, name)
    left_out = ("rescale_betas_zero_snr", "timestep_spacing")
    config = {key: value for key, value in pipe.scheduler.config.items() if key not in left_out}
    config["skip_prk_steps"] = True  # without it, PNDM needs more steps than these
    try:
        return cls.from_config(config, **changes)
    except ImportError as error:
        pytest.skip(str(error).strip()[:80])
    except (TypeError, ValueError):
        pytest.skip(f"{name} cannot be made without arguments that only its own pipeline knows")


def whole_way(pipe, folder, cells=CELLS, max_rows=None):
    """Sweep, resume, load and replay; return the sweep."""
    sweep = run_sweep(pipe, IMAGE, PROMPT, cells, folder=folder, progress=False, max_rows=max_rows)
    assert len(sweep) == len(cells)
    with count_unet_calls(pipe) as count:
        again = run_sweep(pipe, IMAGE, PROMPT, cells, folder=folder, progress=False)
    assert count.calls == 0 and again.records == sweep.records
    loaded = decinb.load_sweep(folder)
    assert loaded.records == sweep.records
    for path, made in zip(sweep.images.sources, sweep.images, strict=True):
        assert same(decinb.replay(path, pipe), made)
    return sweep


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_the_whole_way_or_is_refused_by_name(pipe, tmp_path, name, happened):
    pipe.scheduler = scheduler_of(name, pipe)
    if name in CANNOT:
        for folder in (None, tmp_path / "made"):
            with count_unet_calls(pipe) as count, pytest.raises(InputError, match=f"{name} cannot run .*: .") as caught:
                run_sweep(pipe, IMAGE, PROMPT, CELLS, folder=folder, progress=False)
            assert count.calls == 0 and not (tmp_path / "made").exists() and "\n" not in str(caught.value)
        happened("K4", "those made for other pipelines: InputError that names the scheduler")
        return
    if "Inverse" in name:  # it multiplies roundings by a hundred at each step: only the same calls give the same image
        whole_way(pipe, tmp_path / "made", max_rows=2)
        return
    sweep = whole_way(pipe, tmp_path / "made")
    for cell, made in zip(CELLS, sweep.images, strict=True):
        arguments = {"guidance_scale": 7.5, "seed": 0, **cell}
        generator = torch.Generator().manual_seed(arguments.pop("seed"))
        alone = super(type(pipe), pipe).__call__(PROMPT, IMAGE, generator=generator, **arguments).images[0]
        assert same(made, alone)
    happened("K4", "all others: equal to the pipeline's own call, saved and made again from the file")


@pytest.mark.parametrize("betas", [np.linspace(1e-4, 0.02, 1000), torch.linspace(1e-4, 0.02, 1000).tolist()])
def test_noise_levels_of_ones_own_are_saved(pipe, tmp_path, betas):
    pipe.scheduler = scheduler_of("DDIMScheduler", pipe, trained_betas=betas)
    whole_way(pipe, tmp_path)


def test_what_a_configuration_cannot_say_is_told(pipe, tmp_path, capsys):
    pipe.scheduler = scheduler_of("SASolverScheduler", pipe, tau_func=lambda t: 0.5)
    run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], folder=tmp_path, progress=False)
    with count_unet_calls(pipe) as count:
        run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], folder=tmp_path, progress=False)
    assert count.calls > 0 and "scheduler.tau_func (function) cannot be compared" in capsys.readouterr().out


@pytest.mark.parametrize("change", MODES, ids=lambda change: change.__name__)
def test_a_mode_goes_the_whole_way_and_is_the_same_model(pipe, tmp_path, change, happened):
    pipe.scheduler = scheduler_of("DPMSolverMultistepScheduler", pipe)
    before = run_sweep(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path / "before", progress=False)
    change(pipe)
    with torch.compiler.set_stance("force_eager"):  # tracing takes long, and is torch's matter
        with count_unet_calls(pipe) as count:
            again = run_sweep(pipe, IMAGE, PROMPT, CELLS, folder=tmp_path / "before", progress=False)
        assert count.calls == 0 and again.records == before.records
        after = whole_way(pipe, tmp_path / "after")
    after.plot()
    plt.close("all")
    assert all(map(same, before.images, after.images))
    happened("K5", "nothing computed again; a new sweep gives the same images")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "change"), SOME_PAIRS, ids=lambda value: getattr(value, "__name__", value))
def test_a_scheduler_goes_the_whole_way_in_a_mode(pipe, tmp_path, name, change):
    pipe.scheduler = scheduler_of(name, pipe)
    before = run_sweep(pipe, IMAGE, PROMPT, CELLS[1:], folder=tmp_path / "before", progress=False)
    change(pipe)
    with torch.compiler.set_stance("force_eager"):
        with count_unet_calls(pipe) as count:
            again = run_sweep(pipe, IMAGE, PROMPT, CELLS[1:], folder=tmp_path / "before", progress=False)
        assert count.calls == 0 and again.records == before.records
        after = whole_way(pipe, tmp_path / "after", CELLS[1:])
        alone = run_sweep(pipe, IMAGE, PROMPT, CELLS[1:], progress=False)
    assert same(after.images[0], alone.images[0])
    if "Inverse" not in name:
        assert same(before.images[0], after.images[0])


def test_bfloat16_is_replayed_in_bfloat16(tmp_path, capsys, happened):
    pipe = decinb.load_pipeline("tiny", device="cpu", dtype="bfloat16")
    cell = {"num_inference_steps": 2, "strength": 1.0, "guidance_scale": 1.0}
    sweep = run_sweep(pipe, IMAGE, PROMPT, [cell], folder=tmp_path, progress=False)
    (path,) = tmp_path.glob("*.png")
    assert same(decinb.replay(path), sweep.images[0])
    assert "tiny on cpu, bfloat16" in capsys.readouterr().out
    with pytest.raises(InputError, match="was made in 'bfloat16', but pipe is in float32") as caught:
        decinb.replay(path, decinb.load_pipeline("tiny", device="cpu"))
    happened("K6", f"replayed in bfloat16; with a pipeline in float32: {caught.value}")


def test_adapters_are_part_of_an_image(pipe, tmp_path):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    sweeps = []
    for scale in (0.1, 2.0):
        pipe.set_adapters(["style"], [scale])
        sweeps.append(run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], folder=tmp_path, progress=False))
    assert not same(sweeps[0].images[0], sweeps[1].images[0])
    assert sweeps[0].records[0]["adapters"] == [["style", 0.1]]
    for sweep in sweeps:
        assert same(decinb.replay(sweep.images.sources[0], pipe), sweep.images[0])
        assert active_adapters(pipe) == [["style", 2.0]], "as before the replay"
    with pytest.raises(InputError, match="pipe lacks the adapter 'style'"):
        decinb.replay(sweep.images.sources[0], small_pipe(pipe))
    loaded = decinb.load_sweep(tmp_path)
    assert len(lay_out(loaded.records).places) == 2, "neither hides the other"


def test_a_hook_is_told_and_never_brings_back_an_image(pipe, tmp_path, capsys, happened):
    plain = run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], folder=tmp_path, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (2, 3):
            hook = pipe.unet.register_forward_hook(lambda *args, factor=factor: (args[2][0] * factor,))
            sweep = run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], folder=tmp_path, progress=False)
            alone = run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], progress=False)
            hook.remove()
            assert same(sweep.images[0], alone.images[0]) and not same(sweep.images[0], plain.images[0])
            assert capsys.readouterr().out.count("cannot be compared, so every image is computed again") == 1
    with count_unet_calls(pipe) as count:
        again = run_sweep(pipe, IMAGE, PROMPT, CELLS[:1], folder=tmp_path, progress=False)
    assert count.calls == 0 and same(again.images[0], plain.images[0])
    happened("K2", "a hook: named in one line, and images made anew; without it, the image of before is found")
