"""Sweeps: input validation, folders, replay, plans, and what is kept when something goes wrong."""

import csv
import json
import re
import shutil
import threading

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from PIL import Image

import decinb
from decinb import InputError, Stopped, grid, run_sweep
from decinb.benchmark.counting import count_unet_calls
from decinb.execution.provenance import record_key
from decinb.execution.store import Store
from decinb.figures import preview
from decinb.images import read_input, read_record, save_image
from decinb.sweep import SweepError
from decinb.utils.labels import label, plain
from tests.helpers.sweeps import Stop, as_ours, same

QUICK = {"num_inference_steps": 2, "strength": 1.0}
PROMPT = "a red house on snow at night"


@pytest.fixture(scope="module")
def image():
    return decinb.load_image("day")


def test_a_cell_equals_the_stock_call_alone(tiny, image):
    cells = [
        {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 7},
        {**QUICK, "negative_prompt": "trees"},
        {**QUICK, "prompt": "a sketch of mountains", "image": "night"},
    ]
    sweep = run_sweep(tiny, image, PROMPT, cells, seed=5, progress=False)
    for cell, made in zip(cells, sweep.images, strict=True):
        arguments = {"guidance_scale": 7.5, "prompt": PROMPT, "seed": 5, "image": image, **cell}
        generator = torch.Generator().manual_seed(arguments.pop("seed"))
        arguments["image"] = decinb.load_image(arguments["image"])
        alone = tiny(generator=generator, **arguments).images[0]
        assert same(made, alone)
    assert [record["steps_run"] for record in sweep.records] == [2, 2, 2]


def test_defaults_are_those_of_the_guide(tiny, image):
    sweep = run_sweep(tiny, image, PROMPT, [{"strength": 0.1}], progress=False)
    assert sweep.records[0]["num_inference_steps"] == 30 and sweep.records[0]["steps_run"] == 3


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"strength": 0}, "^cell 1: strength must be above 0 and at most 1, got 0"),
        ({"prompt": None}, "^cell 1: prompt must be a string, got None"),
        ({"guidence_scale": 3}, "^cell 1: unknown argument 'guidence_scale'; did you mean 'guidance_scale'"),
        (0.75, "cell 1: a cell must be a dict"),
    ],
)
def test_an_error_names_the_bad_cell_before_any_work(tiny, image, cell, message, tmp_path):
    with count_unet_calls(tiny) as count, pytest.raises(InputError, match=message) as caught:
        run_sweep(tiny, image, PROMPT, [QUICK, cell], folder=tmp_path / "made", progress=False)
    assert "\n" not in str(caught.value)
    assert count.calls == 0 and not (tmp_path / "made").exists()


def test_the_smallest_strength_it_names_runs(tiny, image):
    for steps in (3, 7, 30):
        with pytest.raises(InputError) as caught:
            run_sweep(tiny, image, PROMPT, [{"strength": 0.01, "num_inference_steps": steps}], progress=False)
        smallest = float(str(caught.value).split()[-1])
        sweep = run_sweep(tiny, image, PROMPT, [{"strength": smallest, "num_inference_steps": steps}], progress=False)
        assert sweep.records[0]["steps_run"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None}, "image must be a sample's name"),
        ({"prompt": []}, "prompt must be a string"),
    ],
)
def test_a_bad_sweep_is_refused(tiny, image, given, message):
    with pytest.raises(InputError, match=message):
        run_sweep(tiny, **{"image": image, "prompt": PROMPT, "cells": [QUICK], **given})


def test_sums_of_floats_are_rounded(tiny, image):
    strength = 0.0
    for _ in range(20):
        strength += 0.05
    assert strength > 1
    sweep = run_sweep(tiny, image, PROMPT, [{"strength": strength, "num_inference_steps": 2}], progress=False)
    assert sweep.records[0]["strength"] == 1.0


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_every_image_is_on_disk_with_its_record_and_its_input(tiny, image, tmp_path):
    cells = [{**QUICK, "seed": seed} for seed in (1, 2)]
    sweep = run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False)
    files = [re.sub("[0-9a-f]{12}.png", "KEY.png", name) for name in names(tmp_path)]
    assert files == [
        ".lock",  # empty: held while a process works here
        "strength-1_guidance-7.5_steps-2_seed-1_KEY.png",
        "strength-1_guidance-7.5_steps-2_seed-2_KEY.png",
        "sweep.json",
    ]
    for file, made, record in zip(sorted(tmp_path.glob("*.png")), sweep.images, sweep.records, strict=True):
        assert decinb.mean_abs_difference(Image.open(file), made) == 0.0
        assert read_record(file) == record == json.loads(json.dumps(record))
        assert read_input(file).tobytes() == image.tobytes()
        assert str(tmp_path) not in json.dumps(record)


def test_only_missing_images_are_computed(tiny, image, tmp_path):
    cells = [{**QUICK, "seed": seed} for seed in (1, 2)]
    first = run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False)
    with count_unet_calls(tiny) as count:
        again = run_sweep(tiny, image, PROMPT, cells[::-1], folder=tmp_path, progress=False)
    assert count.calls == 0 and again.records == first.records[::-1]
    with count_unet_calls(tiny) as count:
        more = run_sweep(tiny, image, PROMPT, [*cells, {**QUICK, "seed": 3}], folder=tmp_path, progress=False)
    assert count.calls == 2 and len(more) == 3 and len(list(tmp_path.glob("*.png"))) == 3
    assert decinb.load_sweep(tmp_path).cells == more.cells


def test_a_damaged_file_is_replaced(tiny, image, tmp_path):
    sweep = run_sweep(tiny, image, PROMPT, [QUICK], folder=tmp_path, progress=False)
    file = next(tmp_path.glob("*.png"))
    before = sweep.images[0]
    file.write_bytes(file.read_bytes()[:-200])
    with count_unet_calls(tiny) as count:
        again = run_sweep(tiny, image, PROMPT, [QUICK], folder=tmp_path, progress=False)
    assert count.calls == 2 and same(again.images[0], before)


def test_another_prompt_image_model_or_scheduler_is_another_key(tiny, image, tmp_path):
    for prompt, source in ((PROMPT, image), (PROMPT, "night"), ("mountains", image), (PROMPT, image)):
        run_sweep(tiny, source, prompt, [QUICK], folder=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.png"))) == 3
    key = run_sweep(tiny, image, PROMPT, [QUICK], progress=False).records[0]["key"]
    scheduler = tiny.scheduler
    try:
        tiny.scheduler = scheduler.from_config(scheduler.config, timestep_spacing="leading")
        assert run_sweep(tiny, image, PROMPT, [QUICK], progress=False).records[0]["key"] != key
    finally:
        tiny.scheduler = scheduler
    weight = tiny.vae.decoder.conv_out.bias
    with torch.no_grad():
        weight += 1e-3
        changed = run_sweep(tiny, image, PROMPT, [QUICK], progress=False).records[0]["key"]
        weight -= 1e-3
    assert changed != key


@pytest.mark.filterwarnings("ignore:.* cells repeat another")
def test_cells_with_the_same_image_run_once(tiny, image, tmp_path):
    cells = [
        {"strength": 0.5, "num_inference_steps": 4},
        {"strength": 0.6, "num_inference_steps": 4},  # int(4 * 0.6) is 2 as well
        *({"strength": 0.5, "num_inference_steps": 4, "guidance_scale": scale} for scale in (0, 0.5, 1)),
    ]
    with count_unet_calls(tiny) as count:
        sweep = run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False)
    assert count.calls == 2 and len(sweep) == 5 == len(list(tmp_path.glob("*.png")))
    assert len({record["key"] for record in sweep.records}) == 2
    assert [read_record(tmp_path / name)["strength"] for name in names(tmp_path) if "0.6" in name] == [0.6]


def test_replay_needs_only_the_png(tiny, image, tmp_path):
    cells = [{**QUICK, "seed": 3, "negative_prompt": "trees", "image": "sketch"}]
    sweep = run_sweep(tiny, image, PROMPT, cells, folder=tmp_path / "made", progress=False, guidance_rescale=0.5)
    file = shutil.move(next((tmp_path / "made").glob("*.png")), tmp_path / "alone.png")
    made = Image.open(file).convert("RGB")
    shutil.rmtree(tmp_path / "made")
    scheduler = tiny.scheduler
    assert same(decinb.replay(file, tiny), made)
    assert same(decinb.replay(file), made)
    assert tiny.scheduler is scheduler and sweep.records[0]["guidance_rescale"] == 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "0"}, "other weights"),
        ({"scheduler": "os.system"}, "names the scheduler 'os.system', which DeciDiffusionImg2ImgPipeline cannot use"),
        ({"strength": 7}, "strength must be above 0"),
        ({"strength": 0.5}, "its arguments do not match its key"),
        ({"seed": "x"}, "seed must be an integer"),
    ],
)
def test_replay_refuses_a_png_that_was_tampered_with(tiny, image, tmp_path, changed, message):
    sweep = run_sweep(tiny, image, PROMPT, [QUICK], progress=False)
    forged = {**sweep.records[0], **changed}
    save_image(sweep.images[0], tmp_path / "made.png", forged, image)
    with pytest.raises(InputError, match="does not match" if "strength" not in changed else message):
        decinb.replay(tmp_path / "made.png", tiny)
    save_image(sweep.images[0], tmp_path / "made.png", {**forged, "key": record_key(forged)}, image)
    with pytest.raises(InputError, match=message):
        decinb.replay(tmp_path / "made.png", tiny)


def test_replay_downloads_no_model(tiny, image, tmp_path):
    sweep = run_sweep(tiny, image, PROMPT, [QUICK], progress=False)
    save_image(sweep.images[0], tmp_path / "made.png", {**sweep.records[0], "model": "someone/else"}, image)
    with pytest.raises(InputError, match="made by 'someone/else'.*give the pipeline"):
        decinb.replay(tmp_path / "made.png")


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no sweep: there is no sweep\.json"):
        decinb.load_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(InputError, match=r"sweep\.json in .* is damaged"):
        decinb.load_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"cells": [{"file": "../../etc/passwd", "cell": {}}]}')
    with pytest.raises(InputError, match="no image of it is finished yet"):
        decinb.load_sweep(tmp_path)


def test_an_image_that_cannot_be_saved_is_not_lost(tiny, image, tmp_path):
    folder = tmp_path / "made"

    def vanish(*_):
        shutil.rmtree(folder)
        folder.write_text("a file where the folder was")

    hook = tiny.vae.decoder.register_forward_pre_hook(as_ours(vanish))
    try:
        with pytest.warns(UserWarning, match="cannot be written to .*stays in memory") as caught:
            sweep = run_sweep(tiny, image, PROMPT, [QUICK], folder=folder, progress=False)
    finally:
        hook.remove()
    assert len(caught) == 1
    assert sweep.images[0].size == image.size


@pytest.mark.filterwarnings("ignore:.* cells repeat another")
def test_a_plan_counts_what_a_sweep_takes_before_it_runs(tiny, image, tmp_path):
    cells = grid(strength=[0.5, 0.6, 1.0], guidance_scale=[1, 5], num_inference_steps=[4])
    with count_unet_calls(tiny) as count:
        planned = decinb.plan(tiny, image, PROMPT, cells, folder=tmp_path / "made", timed=False)
    assert count.calls == 0 and not (tmp_path / "made").exists()
    assert (len(planned.cells), planned.computations, planned.finished) == (6, 4, 0)
    assert (planned.calls, planned.rows) == (2 + 2 + 4 + 4, 2 * 1 + 2 * 2 + 4 * 1 + 4 * 2)
    assert "6 cells, 4 distinct" in str(planned)
    run_sweep(tiny, image, PROMPT, cells[:2], folder=tmp_path / "made", progress=False)
    after = decinb.plan(tiny, image, PROMPT, cells, folder=tmp_path / "made")
    assert (after.finished, after.calls) == (2, 8) and after.seconds > 0
    assert "2 finished before" in str(after)


def test_a_plan_counts_the_calls_that_a_scheduler_really_makes(tiny, image):
    scheduler = tiny.scheduler
    config = {**scheduler.config, "rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
    try:
        for kind, arguments in ((PNDMScheduler, {"skip_prk_steps": True}), (HeunDiscreteScheduler, {})):
            tiny.scheduler = kind.from_config(config, **arguments)
            cells = [{"strength": 0.5, "num_inference_steps": 8, "guidance_scale": 1}]
            planned = decinb.plan(tiny, image, PROMPT, cells, timed=False)
            with count_unet_calls(tiny) as count:
                run_sweep(tiny, image, PROMPT, cells, progress=False)
            assert count.calls == planned.calls > 4
    finally:
        tiny.scheduler = scheduler


def test_a_sweep_as_a_table_and_its_selection(tiny, image, tmp_path):
    cells = grid(strength=[0.5, 1.0], seed=[0, 1], num_inference_steps=[2])
    sweep = run_sweep(tiny, image, PROMPT, cells, progress=False)
    table = sweep.to_dataframe()
    assert list(table["strength"]) == [0.5, 0.5, 1.0, 1.0] and (table["steps_run"] == [1, 1, 2, 2]).all()
    assert (table["seconds"] > 0).all()
    with open(sweep.to_csv(tmp_path / "a" / "sweep.csv"), newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["seed"] for row in read] == ["0", "1", "0", "1"]
    part = sweep.select(strength=1.0, seed=[1, 7])
    assert part.cells == cells[3:] and decinb.mean_abs_difference(part.images[0], sweep.images[3]) == 0.0
    with pytest.raises(InputError, match="unknown argument 'strenght'"):
        sweep.select(strenght=1)
    with pytest.raises(InputError, match="^seed must be an ordinary tensor, got one that is on the meta device$"):
        sweep.select(seed=torch.empty(1, device="meta"))
    assert not len(sweep.select(strength=[torch.empty((), device="meta")]))


def test_cells_may_name_their_own_images(tiny, image):
    cells = grid(image=["night", "sketch", image], **{name: [value] for name, value in QUICK.items()})
    sweep = run_sweep(tiny, image, PROMPT, cells, progress=False)
    assert [record["image"] for record in sweep.records][:2] == ["night", "sketch"]
    assert sweep.records[2]["image"].startswith("image ")
    assert len({record["key"] for record in sweep.records}) == 3


def test_stopping_keeps_what_is_done_and_ends_the_cell(tiny, image, happened):
    cells = [{**QUICK, "seed": seed} for seed in range(3)]
    with Stop(tiny, 5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt) as caught:
        run_sweep(tiny, image, PROMPT, cells, progress=False, max_rows=2)
    sweep, said = caught.value.done, str(caught.value)
    assert len(sweep) == 2 and sweep.cells == cells[:2]
    assert "2 of 3 cells are done, and sys.last_value.done holds them" in said
    again = run_sweep(tiny, image, PROMPT, cells, progress=False, max_rows=2)
    assert same(again.images[1], sweep.images[1])
    happened("F2", f"{said.strip()}; the next run made the same images")


def test_stopping_while_an_image_is_saved_loses_nothing(tiny, image, tmp_path, monkeypatch):
    saved = []

    def save(self, made, record, input_image):
        saved.append(record["seed"])
        if len(saved) == 1:
            raise KeyboardInterrupt
        return Store_save(self, made, record, input_image)

    Store_save = Store.save
    monkeypatch.setattr(Store, "save", save)
    cells = [{**QUICK, "guidance_scale": 1, "seed": seed} for seed in range(6)]
    with pytest.raises(Stopped, match=r"6 of 6 cells are done and saved; to go on.*load_sweep\(") as caught:
        run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False)
    sweep = caught.value.done
    assert len(sweep) == 6, "all of them were denoised when the first was saved"
    assert all(made.size == image.size for made in sweep.images)
    assert decinb.load_sweep(tmp_path).records == sweep.records


def test_an_error_names_the_running_cells_and_loses_nothing(tiny, image, tmp_path):
    cells = [{**QUICK, "seed": seed} for seed in range(3)]
    with (
        Stop(tiny, 3, ValueError("broken")),
        pytest.raises(SweepError, match=r"cell 1 .*seed 1.*failed: (ValueError: )?broken; 1 of 3") as caught,
    ):
        run_sweep(tiny, image, PROMPT, cells, folder=tmp_path, progress=False, max_rows=2)
    assert len(caught.value.sweep) == 1 == len(list(tmp_path.glob("*.png")))


def test_a_cell_with_nan_is_named_and_others_are_not_affected(tiny, image):
    cells = [{**QUICK, "guidance_scale": 1, "seed": seed} for seed in (0, 1)]
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            output[0].fill_(float("nan"))

    hook = tiny.unet.register_forward_hook(as_ours(poison))
    try:
        with pytest.warns(UserWarning, match="cell .*seed 0: the U-Net returned NaN or infinity at step 2 of 2"):
            sweep = run_sweep(tiny, image, PROMPT, cells, progress=False, max_rows=1)
    finally:
        hook.remove()
    alone = run_sweep(tiny, image, PROMPT, cells[1:], progress=False)
    assert sweep.cells == cells[1:]
    assert same(sweep.images[0], alone.images[0])


def test_the_settings_of_the_pipelines_progress_bar_are_restored(tiny, image):
    before = dict(tiny._progress_bar_config)
    run_sweep(tiny, image, PROMPT, [QUICK], progress=False)
    assert tiny._progress_bar_config == before


def test_labels_are_short_and_round():
    assert plain(0.8500000000000001) == "0.85"
    assert label({"strength": 0.75, "num_inference_steps": 30}) == "strength 0.75, steps 30"


def test_max_rows_still_goes_by_its_old_name(tiny, image):
    with pytest.warns(DeprecationWarning, match="pack is now called max_rows") as caught:
        run_sweep(tiny, image, PROMPT, [QUICK], progress=False, pack=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning), pytest.raises(InputError, match="give only max_rows"):
        run_sweep(tiny, image, PROMPT, [QUICK], progress=False, max_rows=4, pack=2)


def test_an_empty_sweep_is_a_table_with_a_header(tmp_path):
    file = decinb.Sweep(None, PROMPT).to_csv(tmp_path / "empty.csv")
    assert file.read_text().strip() == "image,prompt,negative_prompt,strength,guidance_scale,num_inference_steps,seed"


def test_steps_make_the_images_of_a_sweep_and_show_how_far_each_cell_is(tiny, image):
    cells = [{**QUICK, "num_inference_steps": 3}, {**QUICK, "guidance_scale": 1.0}]
    running = decinb.steps(tiny, image, PROMPT, cells)
    states = list(running)
    for cell, last in ((0, 3), (1, 2)):
        made = [state.step for state in states if state.cell == cell]
        assert sorted(set(made)) == list(range(last + 1)) and made == sorted(made)
        assert made.count(last) >= 2, "denoised, then decoded"
    for state in states:
        started = state.step > 0
        assert state.steps == (3, 2)[state.cell]
        assert (state.seconds_left is not None) == (state.predicted is not None) == started
    predicted = [state for state in states if state.image is None and state.step]
    assert all(state.predicted.size in ((16, 16), image.size) for state in predicted)
    finished = {state.cell: state.image for state in states if state.image is not None}
    sweep = run_sweep(tiny, image, PROMPT, cells, progress=False)
    for i in range(2):
        assert same(finished[i], sweep.images[i]) and same(running.sweep.images[i], sweep.images[i])
    assert [record["key"] for record in running.sweep.records] == [record["key"] for record in sweep.records]


def test_the_last_prediction_is_the_image(tiny, image, monkeypatch):
    monkeypatch.setattr(preview, "SLOW", 60)  # decode on a busy machine too
    *_, last, finished = decinb.steps(tiny, image, PROMPT, [{**QUICK, "guidance_scale": 1.0}])
    assert last.image is None and last.step == last.steps
    difference = decinb.mean_abs_difference(last.predicted, finished.image)
    assert difference < 0.02, "with the last step, DDIM goes to its prediction"


def test_steps_check_first_keep_what_is_done_and_resume(tiny, image, tmp_path):
    with pytest.raises(InputError, match="cell 1: strength"):
        decinb.steps(tiny, image, PROMPT, [QUICK, {"strength": 2}])
    cells = [{**QUICK, "seed": seed} for seed in range(3)]
    running = decinb.steps(tiny, image, PROMPT, cells, folder=tmp_path, max_rows=2)
    for state in running:
        if state.cell == 1 and state.step == 1:
            running.close()  # the first image is denoised, but not decoded
    assert len(running.sweep) == 1 == len(list(tmp_path.glob("*.png")))
    again = decinb.steps(tiny, image, PROMPT, cells, folder=tmp_path, max_rows=2)
    first = next(again)
    assert (first.cell, first.step, first.steps) == (0, 2, 2) and same(first.image, running.sweep.images[0])
    assert {state.cell for state in again} == {1, 2} and len(again.sweep) == 3


def test_between_steps_the_pipeline_may_be_used_and_given_another_scheduler(tiny, image):
    running = decinb.steps(tiny, image, PROMPT, [QUICK])
    alone = run_sweep(tiny, image, PROMPT, [QUICK], progress=False)
    own, other = tiny.scheduler, PNDMScheduler.from_config(tiny.scheduler.config, skip_prk_steps=True)
    try:
        tiny.scheduler = other
        for _ in running:
            assert tiny.scheduler is other
            run_sweep(tiny, image, "something else", [{**QUICK, "num_inference_steps": 1}], progress=False)
    finally:
        tiny.scheduler = own
    assert same(running.sweep.images[0], alone.images[0])


def test_steps_may_be_taken_by_different_threads(tiny, image, tmp_path):
    running = decinb.steps(tiny, image, PROMPT, [QUICK], folder=tmp_path)
    states = [next(running)]
    thread = threading.Thread(target=lambda: states.extend(running))
    thread.start()
    thread.join()
    assert states[-1].image is not None
    run_sweep(tiny, image, PROMPT, [QUICK], folder=tmp_path, progress=False)  # the folder is free again
