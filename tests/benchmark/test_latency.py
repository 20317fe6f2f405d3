"""Measured times and how they are stored: for notebook 06 and ``python -m decinb.benchmark.latency``."""

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import decinb
from decinb.benchmark import counting, latency, plots
from decinb.errors import InputError
from decinb.utils.device import choose_workload
from tests.helpers.small import small_nas, small_sd, small_vae

WAIT = 0.01  # seconds that a simulated device works
QUEUED = 40  # calls of the warm-up; together longer than a busy machine delays one of them


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Run on one thread: for small networks a second one costs more than it saves, much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_functions_take_turns_and_each_time_starts_and_ends_with_an_idle_device():
    seen = []
    timings = latency.measure(
        {"A": lambda: seen.append("A"), "B": lambda: seen.append("B")},
        repeats=4,
        warmup=1,
        synchronize=lambda: seen.append("|"),
    )
    assert "".join(seen) == "AB" + "".join(f"|{name}|" for name in "ABBAABBA")
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"A": 4, "B": 4}


def test_a_time_includes_the_work_of_the_device_after_the_call_returned():
    pending = []

    def wait() -> None:
        while pending:
            time.sleep(pending.pop())

    timings = latency.measure({"work": lambda: pending.append(WAIT)}, repeats=1, warmup=QUEUED, synchronize=wait)
    assert WAIT <= timings["work"].median < QUEUED * WAIT  # its own work, without that of the warm-up


def test_a_timing_has_median_and_spread():
    timing = latency.Timing((3.0, 1.0, 2.0, 8.0))
    assert (timing.median, timing.fastest, timing.slowest) == (2.5, 1.0, 8.0)
    assert timing.per(2).seconds == (1.5, 0.5, 1.0, 4.0)


def test_ratios_are_taken_turn_by_turn():
    slow, fast = latency.Timing((2.0, 30.0, 4.0)), latency.Timing((1.0, 10.0, 1.0))
    assert latency.ratio(slow, fast) == (2.0, 3.0, 4.0)


def test_prepare_is_called_before_every_call_and_not_timed():
    calls = []
    timings = latency.measure(
        {"A": lambda: calls.append("a"), "B": lambda: calls.append("b")},
        repeats=2,
        prepare=lambda name: (calls.append(name), time.sleep(WAIT)),
    )
    assert "".join(calls) == "AaBb" + "AaBb" + "BbAa"
    assert timings["A"].fastest < WAIT


def test_the_networks_of_a_call_are_timed_separately(tiny):
    image = decinb.load_image("day")
    with latency.time_parts(tiny) as parts:
        tiny("a red house", image, 0.5, 4)
    assert list(parts) == ["text", "encode", "denoise", "decode"] and min(parts.values()) > 0
    before = dict(parts)
    tiny("a red house", image, 0.5, 2)
    assert parts == before, "the hooks are still there"


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}])
def test_measure_rejects_bad_arguments(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        latency.measure({"A": list}, **bad)
    with pytest.raises(InputError, match="empty"):
        latency.measure({})


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}, {"steps": (30, 0)}, {"rows": (0,)}])
def test_compare_rejects_bad_arguments_before_it_builds_anything(bad):
    built = []
    with pytest.raises(InputError, match=next(iter(bad))):
        latency.compare("cpu", networks={"U-Net-NAS": lambda: built.append(1)}, **bad)
    assert not built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_keeps_the_scale_of_its_inputs(dtype):
    unet = counting.random_model(small_nas, "cpu", dtype)
    output = latency.unet_call(unet, rows=2, size=8, tokens=7)()
    assert output.shape == (2, 4, 8, 8) and output.dtype == dtype
    assert torch.isfinite(output).all()
    assert 0.01 < output.float().std() < 10
    assert not torch.allclose(output[0], output[1])


# --- the comparison, and its storage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measurement():
    return latency.compare(
        "cpu",
        "float32",
        8,
        repeats=2,
        networks={"U-Net-NAS": small_nas, "SD v1.5": small_sd},
        steps=(2,),
        vae=small_vae,
    )


def test_compare_measures_both_unets_at_the_same_work(measurement):
    assert list(measurement.timings) == ["1 row", "2 rows", "image, 2 steps"]
    for timings in measurement.timings.values():
        assert list(timings) == ["U-Net-NAS", "SD v1.5"]
        assert all(len(timing.seconds) == 2 and timing.fastest > 0 for timing in timings.values())
    assert f"{measurement.timings['image, 2 steps']['SD v1.5'].median:.3f}" in latency.table(measurement)


def test_networks_that_were_built_are_measured_as_they_are():
    built = latency.build_networks("cpu", "float32", {"U-Net-NAS": small_nas})
    weight = built["U-Net-NAS"].conv_in.weight.clone()
    found = latency.compare("cpu", "float32", 8, repeats=2, rows=(1,), networks=built)
    assert list(found.timings["1 row"]) == ["U-Net-NAS"]
    assert torch.equal(built["U-Net-NAS"].conv_in.weight, weight)


def test_an_image_call_runs_every_step_with_guidance():
    unet, vae = counting.random_model(small_nas), counting.random_model(small_vae)
    call = latency.image_call(unet, vae, steps=3, size=8, tokens=7)
    rows = []
    unet.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
    (image,) = call()
    assert rows == [2, 2, 2]
    assert image.size == (64, 64)


def test_a_measurement_is_saved_and_loaded(measurement, tmp_path):
    path = latency.save(measurement, tmp_path / "results")
    assert path.parent.parent == tmp_path / "results"
    assert latency.load(path) == measurement


def test_the_environment_describes_the_machine_without_names_or_paths(measurement, tmp_path):
    where = measurement.environment
    assert where["torch"] == torch.__version__ and where["dtype"] == "float32" and where["threads"] >= 1
    assert where["device"] and where["date"].endswith("+00:00")
    text = json.dumps(where)
    assert socket.gethostname() not in text and os.getcwd() not in text


def test_load_rejects_other_files(tmp_path):
    (tmp_path / "other.json").write_text('{"timings": 3}')
    for name in ("other.json", "nothing.json"):
        with pytest.raises(InputError, match=name):
            latency.load(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "word"),
    [({"device": "abacus"}, "device"), ({"device": "cpu", "dtype": "float16"}, "dtype"), ({"size": 12}, "size")],
)
def test_choose_rejects_what_is_not_available_here(given, word):
    with pytest.raises(InputError, match=f"^{word} must be"):
        choose_workload(**given)


def test_choose_fills_in_what_is_none():
    assert choose_workload("cpu", torch.float32) == (torch.device("cpu"), torch.float32, 32)
    assert choose_workload("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16, 64)
    assert choose_workload("cpu", "float32", 16)[2] == 16


def test_the_published_table_gives_its_ratios():
    sd, nas = latency.PUBLISHED["SD v1.5", "PyTorch", 50], latency.PUBLISHED["U-Net-NAS", "PyTorch", 50]
    assert round(sd / nas, 2) == 1.40
    assert round(sd / latency.PUBLISHED["U-Net-NAS", "Infery", 30], 1) == 3.0


def test_the_newest_measurement_of_each_machine_is_found(measurement, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "RESULTS", tmp_path)
    assert latency.stored() == {}
    latency.save(
        replace(measurement, environment={**measurement.environment, "date": "2020-01-01T00:00:00+00:00"}), tmp_path
    )
    latency.save(measurement, tmp_path)
    latency.save(measurement, tmp_path, "options")
    assert list(latency.stored().values()) == [measurement]


def two_works():
    """Whole calls of 1 and 3 steps, in two rounds, of which the second was twice as slow."""
    timing = latency.Timing
    return {
        "image, 1 step": {"U-Net-NAS": timing((2.0, 4.0)), "SD v1.5": timing((3.0, 6.0))},
        "image, 3 steps": {"U-Net-NAS": timing((4.0, 8.0)), "SD v1.5": timing((7.0, 14.0))},
    }


def test_longer_calls_are_estimated_round_by_round():
    estimated = latency.extrapolate(two_works(), 11)
    assert estimated["U-Net-NAS"].seconds == pytest.approx((12, 24))
    assert estimated["SD v1.5"].seconds == pytest.approx((23, 46))
    assert latency.ratio(estimated["SD v1.5"], estimated["U-Net-NAS"]) == pytest.approx((23 / 12,) * 3)


def test_estimates_are_dashed_and_named(monkeypatch):
    drawn = []
    plots.plt.switch_backend("agg")
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    plots.plot_whole_calls(two_works())
    styles = {line.get_label(): line.get_linestyle() for line in drawn[0].axes[0].lines}
    assert styles["U-Net-NAS, measured"] == "-" and styles["SD v1.5, estimated"] == "--"
    plots.plot_ratios({"steps": (1.1, 1.2, 1.3), "architecture": (1.4,)}, "factor", estimated=["steps"])
    assert [label.get_text() for label in drawn[1].axes[0].get_yticklabels()] == ["steps, estimated", "architecture"]
    monkeypatch.undo()
    plots.plt.close("all")


@pytest.mark.parametrize(("load", "said"), [(0.0, "is quiet"), (1e6, "is busy"), (None, "unknown")])
def test_the_load_before_a_measurement_is_said(load, said):
    assert said in latency.describe_load({"load": load})


def test_every_plot_of_real_results(measurement, monkeypatch):
    plt, drawn = plots.plt, []
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "close", lambda figure: drawn.append(figure))
    plots.plot_blocks({name: counting.count(network) for name, network in counting.NETWORKS.items()})
    plots.plot_timings(measurement.timings)
    plots.plot_chain({"before": 3.0, "between": 2.0, "after": 1.0})
    plots.plot_ratios({"one": (1.4,), "three": (1.2, 1.3, 1.5)})
    plots.plot_calls([0.5, 1.0], {10: [5, 10]})
    plots.plot_rows(measurement.timings)
    plots.plot_whole_calls(two_works())
    plots.plot_parts({"encode": 0.5, "denoise": 2.0})
    assert [len(figure.axes) for figure in drawn] == [2, 3, 1, 1, 1, 1, 1, 1]
    assert [tick.get_text() for tick in drawn[5].axes[0].get_xticklabels()] == ["1", "2"]
    shown = [text.get_text() for ax in drawn[0].axes for text in ax.texts]
    assert "2R 6T" in shown and len(shown) == 7 + 9
    assert [text.get_text() for text in drawn[2].axes[0].texts][-2:] == ["÷ 1.50", "÷ 2.00"]
    monkeypatch.undo()
    plt.close("all")


def test_the_measurements_in_the_repository_can_be_loaded():
    for kind in ("latency", "benchmark", "options", "loading"):
        assert latency.stored(kind), kind


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(counting.NETWORKS, "U-Net-NAS", small_nas)
    monkeypatch.setitem(counting.NETWORKS, "SD v1.5", small_sd)
    latency.main(["--device", "cpu", "--size", "8", "--repeats", "1", "--folder", str(tmp_path)])
    *_, last = capsys.readouterr().out.splitlines()
    assert list(latency.load(Path(last.removeprefix("written to "))).timings) == ["1 row", "2 rows"]
