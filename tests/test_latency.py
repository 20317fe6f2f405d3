"""Counts, times and their record: what notebook 06 and ``python -m decinb.latency`` stand on."""

import json
import os
import socket
import time

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel

from decinb import latency, latency_plots
from decinb.errors import InputError
from decinb.unet_nas import V1_CONFIGURATIONS, UNetNAS

FLOPS_TOLERANCE = 0.005  # the known counts are given to three digits
GROWTH = 3.5  # of four times the positions: what works on the prompt and the timestep stays as it is
WAIT = 0.01  # seconds a pretended device works
QUEUED = 40  # calls left over from the warm-up: longer together than a busy machine delays one of them

SMALL = {
    **V1_CONFIGURATIONS,
    "down_blocks_in_channels": [32, 32, 32],
    "down_blocks_out_channels": [32, 32, 64],
    "prev_output_channels": [64, 64, 32],
    "cross_attention_dim": 16,
    "temb_dim": 32,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small networks wait longer for a second thread than it saves, on a busy machine a hundred times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_nas() -> UNetNAS:
    return UNetNAS(SMALL, sample_size=8)


def small_sd() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 64, 64), cross_attention_dim=16, attention_head_dim=2
    )


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tflop"), [("U-Net-NAS", 814746884, 0.614), ("SD v1.5", 859520964, 0.803)]
)
def test_the_two_unets_have_their_known_cost(name, parameters, tflop):
    cost = latency.count(latency.NETWORKS[name])
    assert cost.parameters == parameters
    assert cost.flops / 1e12 == pytest.approx(tflop, rel=FLOPS_TOLERANCE)
    assert sum(block.flops for block in cost.blocks) == cost.flops
    assert sum(block.parameters for block in cost.blocks) == cost.parameters
    assert cost.blocks[-1].name == "rest"


def test_blocks_come_in_the_order_of_the_way_and_say_what_stands_in_them():
    nas, sd = (latency.count(latency.NETWORKS[name]).blocks[:-1] for name in ("U-Net-NAS", "SD v1.5"))
    assert [(b.name, b.side, b.transformers) for b in nas] == [
        ("down_blocks.0", 64, 0),
        ("down_blocks.1", 32, 1),
        ("down_blocks.2", 16, 3),
        ("mid_block", 8, 2),
        ("up_blocks.0", 16, 6),
        ("up_blocks.1", 32, 3),
        ("up_blocks.2", 64, 0),
    ]
    assert [b.side for b in sd] == [64, 32, 16, 8, 8, 8, 16, 32, 64]
    assert [b.resnets for b in sd] == [2, 2, 2, 2, 2, 3, 3, 3, 3]
    for block in (*nas, *sd):
        assert block.resnet_flops > 0
        assert (block.transformer_flops > 0) == (block.transformers > 0)
        assert block.resnet_flops + block.transformer_flops <= block.flops


def test_a_built_model_counts_as_its_factory_and_is_left_as_it_was():
    model = small_nas()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert latency.count(model, size=8) == latency.count(small_nas, size=8)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert model(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 7, 16)).sample.device.type == "cpu"


def test_flops_follow_the_size_of_the_latent():
    assert latency.count(small_nas, size=16).flops > GROWTH * latency.count(small_nas, size=8).flops


def test_the_other_networks_can_be_counted():
    vae = latency.count(latency.sd15_vae, inputs=(torch.empty(1, 3, 64, 64, device="meta"),))
    text = latency.count(latency.sd15_text_encoder, inputs=(torch.zeros(1, 77, dtype=torch.long, device="meta"),))
    assert (vae.parameters, text.parameters) == (83653863, 123060480)
    assert [block.name for block in vae.blocks] == ["encoder", "decoder", "rest"]
    assert text.flops > 0


# --- counting calls ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionImg2ImgPipeline(
        small_vae(), None, None, small_nas(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, **arguments):
    text = torch.zeros(1, 7, 16)
    image = torch.full((1, 3, 64, 64), 0.5)
    pipe(image=image, prompt_embeds=text, negative_prompt_embeds=text, output_type="latent", **arguments)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(7.5, 10), (1.0, 5)])
def test_real_calls_and_rows_are_counted(pipe, guidance_scale, rows):
    with latency.count_unet_calls(pipe) as counted:
        run(pipe, strength=0.5, num_inference_steps=10, guidance_scale=guidance_scale)
    assert (counted.calls, counted.rows) == (5, rows)


def test_calls_are_counted_where_the_formula_is_one_short(pipe):
    ddim = pipe.scheduler
    pipe.scheduler = PNDMScheduler(steps_offset=1, skip_prk_steps=True)
    try:
        with latency.count_unet_calls(pipe) as counted:
            run(pipe, strength=0.5, num_inference_steps=10, guidance_scale=1.0)
    finally:
        pipe.scheduler = ddim
    assert counted.calls == 6


def test_counting_ends_with_the_block_even_after_an_error(pipe):
    with pytest.raises(RuntimeError, match="stop"), latency.count_unet_calls(pipe) as counted:
        raise RuntimeError("stop")
    run(pipe, strength=0.5, num_inference_steps=2)
    assert counted.calls == 0


# --- measuring --------------------------------------------------------------------------------------------------------


def test_functions_take_turns_and_the_device_is_waited_for_at_both_ends():
    seen = []
    timings = latency.measure(
        {"A": lambda: seen.append("A"), "B": lambda: seen.append("B")},
        repeats=4,
        warmup=1,
        synchronize=lambda: seen.append("|"),
    )
    assert "".join(seen) == "AB" + "".join(f"|{name}|" for name in "ABBAABBA")
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"A": 4, "B": 4}


def test_a_time_holds_the_work_that_the_device_does_after_the_call_returned():
    pending = []

    def wait() -> None:
        while pending:
            time.sleep(pending.pop())

    timings = latency.measure({"work": lambda: pending.append(WAIT)}, repeats=1, warmup=QUEUED, synchronize=wait)
    assert WAIT <= timings["work"].median < QUEUED * WAIT  # its own work, and not that of the warm-up before it


def test_a_timing_says_median_and_spread():
    timing = latency.Timing((3.0, 1.0, 2.0, 8.0))
    assert (timing.median, timing.fastest, timing.slowest) == (2.5, 1.0, 8.0)


def test_ratios_are_taken_turn_by_turn():
    slow, fast = latency.Timing((2.0, 30.0, 4.0)), latency.Timing((1.0, 10.0, 1.0))
    assert latency.ratio(slow, fast) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}])
def test_measure_refuses_what_it_cannot_do(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        latency.measure({"A": list}, **bad)
    with pytest.raises(InputError, match="empty"):
        latency.measure({})


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}, {"steps": (30, 0)}])
def test_compare_refuses_before_it_builds_anything(bad):
    built = []
    with pytest.raises(InputError, match=next(iter(bad))):
        latency.compare("cpu", networks={"U-Net-NAS": lambda: built.append(1)}, **bad)
    assert not built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_gives_ordinary_numbers(dtype):
    unet = latency.random_model(small_nas, "cpu", dtype)
    made = latency.unet_call(unet, rows=2, size=8, tokens=7)()
    assert made.shape == (2, 4, 8, 8) and made.dtype == dtype
    assert torch.isfinite(made).all()
    assert 0.01 < made.float().std() < 10
    assert not torch.allclose(made[0], made[1])


# --- the comparison, and its record -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    return latency.compare(
        "cpu",
        "float32",
        8,
        repeats=2,
        networks={"U-Net-NAS": small_nas, "SD v1.5": small_sd},
        steps=(2,),
        vae=small_vae,
    )


def test_compare_measures_both_unets_at_the_same_work(record):
    assert list(record.timings) == ["1 row", "2 rows", "image, 2 steps"]
    for timings in record.timings.values():
        assert list(timings) == ["U-Net-NAS", "SD v1.5"]
        assert all(len(timing.seconds) == 2 and timing.fastest > 0 for timing in timings.values())
    assert f"{record.timings['image, 2 steps']['SD v1.5'].median:.3f}" in latency.table(record)


def test_an_image_call_runs_every_step_guided_and_makes_a_picture():
    unet, vae = latency.random_model(small_nas), latency.random_model(small_vae)
    call = latency.image_call(unet, vae, steps=3, size=8, tokens=7)
    rows = []
    unet.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
    (image,) = call()
    assert rows == [2, 2, 2]
    assert image.size == (64, 64)


def test_a_record_survives_the_disk(record, tmp_path):
    path = latency.save(record, tmp_path / "results")
    assert path.parent.parent == tmp_path / "results"
    assert latency.load(path) == record


def test_a_record_tells_where_it_was_taken_but_not_whose_machine_it_was(record, tmp_path):
    where = record.environment
    assert where["torch"] == torch.__version__ and where["dtype"] == "float32" and where["threads"] >= 1
    assert where["device"] and where["date"].endswith("+00:00")
    told = json.dumps(where)
    assert socket.gethostname() not in told and os.getcwd() not in told


def test_load_refuses_other_files(tmp_path):
    (tmp_path / "other.json").write_text('{"timings": 3}')
    for name in ("other.json", "nothing.json"):
        with pytest.raises(InputError, match=name):
            latency.load(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "word"),
    [({"device": "abacus"}, "device"), ({"device": "cpu", "dtype": "float16"}, "dtype"), ({"size": 12}, "size")],
)
def test_choose_refuses_what_this_machine_cannot_do(given, word):
    with pytest.raises(InputError, match=f"^{word} must be"):
        latency.choose(**given)


def test_choose_fills_in_what_is_left_open():
    assert latency.choose("cpu", torch.float32) == (torch.device("cpu"), torch.float32, 32)
    assert latency.choose("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16, 64)
    assert latency.choose("cpu", "float32", 16)[2] == 16


def test_the_published_table_gives_its_three_factors():
    sd, nas = latency.PUBLISHED["SD v1.5", "PyTorch", 50], latency.PUBLISHED["U-Net-NAS", "PyTorch", 50]
    assert round(sd / nas, 2) == 1.40
    assert round(sd / latency.PUBLISHED["U-Net-NAS", "Infery", 30], 1) == 3.0


def test_every_picture_can_be_drawn_of_real_results(record, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure))
    latency_plots.plot_blocks({name: latency.count(network) for name, network in latency.NETWORKS.items()})
    latency_plots.plot_timings(record.timings)
    latency_plots.plot_chain({"before": 3.0, "between": 2.0, "after": 1.0})
    latency_plots.plot_ratios({"one": (1.4,), "three": (1.2, 1.3, 1.5)})
    latency_plots.plot_calls([0.5, 1.0], {10: [5, 10]})
    assert [len(figure.axes) for figure in drawn] == [2, 3, 1, 1, 1]
    shown = [text.get_text() for ax in drawn[0].axes for text in ax.texts]
    assert "2R 6T" in shown and len(shown) == 7 + 9
    assert [text.get_text() for text in drawn[2].axes[0].texts][-2:] == ["÷ 1.50", "÷ 2.00"]
    monkeypatch.undo()
    plt.close("all")
