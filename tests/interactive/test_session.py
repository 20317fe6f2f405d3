"""The playground without a page: what it makes is what the package makes, whatever happens between two steps."""

import re
import threading

import pytest
from PIL import Image

import decinb
from decinb import InputError
from decinb.figures.preview import Preview
from decinb.figures.viewer import data_url
from decinb.images import read_record
from decinb.interactive.playground import BLANK
from decinb.interactive.session import Busy, Session, Settings
from decinb.sampling.batched import _PackedRun
from decinb.utils.locks import pipeline_lock
from tests.helpers.sweeps import same

CELL = {
    "prompt": "a red house on snow at night",
    "negative_prompt": None,
    "strength": 1.0,
    "guidance_scale": 4.0,
    "num_inference_steps": 2,
    "seed": 3,
}


def settings(image="day", scheduler="DDIMScheduler", **changed) -> Settings:
    return Settings(image, {**CELL, **changed}, scheduler)


def finish(session: Session) -> list[int]:
    counts = []
    while session.is_running:
        counts.append(len(session.advance()))
    return counts


@pytest.fixture
def session(tiny) -> Session:
    return Session(tiny)


def test_an_image_takes_one_message_per_step_and_is_that_of_a_sweep(tiny, session):
    session.start(settings(num_inference_steps=3))
    assert len(finish(session)) == 3, "the last step also decodes"
    expected = decinb.run_sweep(tiny, "day", "", [{**CELL, "num_inference_steps": 3}], progress=False)
    assert same(session.result.images[0], expected.images[0])
    assert session.result.records[0]["image"] == "day"


def test_every_scheduler_that_is_offered_works_and_the_pipeline_keeps_its_own(tiny, session):
    own, images = tiny.scheduler, {}
    for name in session.schedulers:
        session.start(settings(scheduler=name))
        finish(session)
        assert session.result.records[0]["scheduler"] == name
        images[name] = session.result.images[0].tobytes()
    assert tiny.scheduler is own and len(images) >= 4 and len(set(images.values())) >= 3


def test_a_run_that_is_stopped_or_replaced_leaves_no_trace_in_the_next(session):
    session.start(settings())
    finish(session)
    first = session.result.images[0]
    session.start(settings(prompt="something else", num_inference_steps=5))
    session.advance()
    session.stop()
    assert not session.is_running and len(session.result) == 0
    session.start(settings(num_inference_steps=4))
    session.advance()
    session.start(settings())
    finish(session)
    assert same(session.result.images[0], first)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"strenght": 0.5}, "did you mean 'strength'"),
        ({"guidance_scale": 30}, "guidance_scale must be from 1.0 to 20.0 in the playground, got 30"),
        ({"image": "nowhere"}, "image must be one of day, "),
        ({"prompt": None}, "prompt must be a string"),
    ],
)
def test_controls_that_cannot_stand_there_are_refused(tiny, cell, message):
    with pytest.raises(InputError, match=message):
        decinb.playground(tiny, **cell)


def test_a_pipeline_without_an_image_has_no_canvas(tiny):
    text = decinb.load_pipeline(tiny, task="text-to-image")
    session = Session(text)
    assert "strength" not in session.check({}) and "strength" not in session.sweepable()
    session.start(Settings(None, {"prompt": "a house", "num_inference_steps": 2, "seed": 1}, "DDIMScheduler"))
    finish(session)
    assert len(session.result) == 1 and "image = None" in session.code()


def test_on_a_page_without_a_kernel_the_input_and_the_settings_remain(tiny):
    bundle = decinb.playground(tiny, prompt="<b>")._repr_mimebundle_()
    assert "data:image/webp" in bundle["text/html"] and "&lt;b&gt;" in bundle["text/html"]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"]


def test_bad_settings_are_refused_before_anything_runs(session):
    with pytest.raises(InputError, match="strength"):
        session.start(settings(strength=0.05, num_inference_steps=1))
    assert not session.is_running
    session.start(settings(prompt="a\nhouse"))
    finish(session)
    assert session.result.records[0]["prompt"] == "a house"


def test_while_another_call_has_the_pipeline_a_step_can_be_tried_again(tiny, session):
    session.start(settings())
    held, done = threading.Event(), threading.Event()

    def call() -> None:
        with pipeline_lock(tiny):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=call)
    thread.start()
    held.wait(60)
    with pytest.raises(Busy):
        session.advance()
    assert session.is_running
    done.set()
    thread.join()
    finish(session)
    assert len(session.result) == 1


def test_a_sweep_runs_together_and_answers_for_the_nearest_value(session):
    session.start(settings(num_inference_steps=4), "guidance_scale")
    assert max(finish(session)) > 1
    swept = session.result
    assert [cell["guidance_scale"] for cell in swept.cells] == list(session.values("guidance_scale", CELL))
    assert session.find(settings(num_inference_steps=4, guidance_scale=8.1)) == 4
    assert session.find(settings(num_inference_steps=4, guidance_scale=8.1, seed=4)) is None
    assert session.find(settings("night", num_inference_steps=4)) is None
    alone = Session(session.pipe)
    alone.start(settings(num_inference_steps=4, guidance_scale=7.5))
    finish(alone)
    difference = decinb.mean_abs_difference(alone.result.images[0], swept.images[4])
    assert difference < 1e-3


def test_a_sweep_of_the_scheduler_makes_the_image_of_each(tiny, session):
    own = tiny.scheduler
    session.start(settings(), "scheduler")
    seen = set()
    while session.is_running:
        seen |= {state.cell for state in session.advance()}
    swept, names = session.result, list(session.schedulers)
    assert seen == set(range(len(names))) and tiny.scheduler is own
    assert [record["scheduler"] for record in swept.records] == names
    for name in names[:3]:
        alone = Session(tiny)
        alone.start(settings(scheduler=name))
        finish(alone)
        assert same(swept.images[session.find(settings(scheduler=name))], alone.result.images[0])
    assert session.find(settings(scheduler=names[1], seed=4)) is None
    page = swept.explore()._repr_html_()
    assert all(f'alt="scheduler {name}"' in page for name in names), "the viewer names what differs"


def test_a_sweep_of_the_image_makes_one_from_each_sample(tiny, session):
    drawing = Image.new("RGB", (128, 128), "orange")
    session.start(settings(drawing, strength=0.5, num_inference_steps=4), "image")
    assert max(finish(session)) > 1, "they share U-Net calls"
    swept = session.result
    assert [record["image"] for record in swept.records] == list(decinb.SAMPLES)
    assert len({image.tobytes() for image in swept.images}) == len(decinb.SAMPLES)
    half = {"strength": 0.5, "num_inference_steps": 4}
    for name in ("night", "valley"):  # one is drawn at the model's size, the other is not
        expected = decinb.run_sweep(tiny, decinb.load_image(name, 128), "", [{**CELL, **half}], progress=False)
        assert decinb.mean_abs_difference(swept.images[session.find(settings(name, **half))], expected.images[0]) < 1e-3
    assert session.find(settings(drawing, **half)) is None, "no image was made from the drawing"
    page = swept.explore()._repr_html_()
    assert 'alt="valley"' in page and "load_image('valley', size=decinb.image_size(pipe))" in page


def test_a_sweep_of_the_scheduler_or_the_image_that_is_stopped_keeps_what_is_finished(session):
    session.start(settings(), "scheduler")
    while session.advance()[-1].cell < 2:
        pass
    session.stop()
    assert [record["scheduler"] for record in session.result.records] == list(session.schedulers)[:2]
    session.start(settings(), "image")
    session.advance()
    session.stop()
    assert len(session.result) == 0 and not session.is_running


@pytest.mark.parametrize("axis", ["scheduler", "image"])
def test_the_code_of_a_sweep_makes_its_images_again(session, axis, monkeypatch):
    monkeypatch.setattr("decinb.interactive.session.SCHEDULERS", ("EulerDiscreteScheduler",))
    session = Session(session.pipe)
    session.start(settings(), axis)
    finish(session)
    swept, names = session.result, {}
    exec(session.code(), names)
    again = names["images"].values() if axis == "scheduler" else names["sweep"].images
    assert all(same(*pair) for pair in zip(again, swept.images, strict=True)), session.code()
    exec(session.code(1), names)
    assert same(names["sweep"].images[0], swept.images[1]), session.code(1)


def test_the_controls_of_a_swept_scheduler_or_image_show_its_images(tiny):
    play = decinb.playground(tiny, prompt=CELL["prompt"], strength=1.0, num_inference_steps=2)
    widgets = play._view

    def sweep(axis: str) -> list[str]:
        widgets["axis"].value = axis
        widgets["sweep"].click()
        while play._session.is_running:
            widgets["ask"].click()
        return [data_url(image) for image in play.result.images]

    shown = sweep("scheduler")
    for name, url in zip(play._session.schedulers, shown, strict=True):
        widgets["scheduler"].value = name
        assert url in widgets["output"].value and f"scheduler {name}" in widgets["output"].value
        assert name in widgets["code"].value or name == type(tiny.scheduler).__name__
    shown = sweep("image")
    for name, url in zip(decinb.SAMPLES, shown, strict=True):
        widgets["image"].value = name
        assert url in widgets["output"].value and f"load_image(&#x27;{name}&#x27;" in widgets["code"].value
    before = widgets["output"].value
    widgets["image"].value = BLANK
    assert widgets["output"].value == before, "nothing was made from it"


def test_texts_are_swept_line_by_line(session):
    assert session.values("negative_prompt", {"negative_prompt": "snow\n\ntrees "}) == [None, "snow", "trees"]
    assert session.values("seed", {"seed": 5})[:2] == [5, 6]
    with pytest.raises(InputError, match="one on each line"):
        session.start(settings(), "prompt")


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_code_makes_the_image_again(session, scheduler):
    session.start(settings(scheduler=scheduler, negative_prompt="trees \"'"), None)
    finish(session)
    code = session.code()
    names: dict = {}
    exec(code, names)
    assert same(names["sweep"].images[0], session.result.images[0]), code
    assert code.splitlines()[-1] == "sweep.images[0]" and "strength" in code


def test_kept_images_are_saved_with_their_inputs(tiny, tmp_path):
    session = Session(tiny, tmp_path)
    with pytest.raises(InputError, match="no finished image"):
        session.keep()
    drawing = Image.new("RGB", (128, 128), "orange")
    for seed in (0, 1):
        session.start(settings(drawing, seed=seed))
        finish(session)
        session.keep()
    assert [record["seed"] for record in session.kept.records] == [0, 1]
    assert same(session.kept.image, drawing) and session.kept.explore()
    assert sorted(read_record(file)["seed"] for file in tmp_path.glob("*.png")) == [0, 1]
    assert "play.image" in session.code()


def test_the_first_preview_is_small_so_that_it_is_there_at_once_and_the_next_are_decoded(tiny):
    play = decinb.playground(tiny, **CELL | {"num_inference_steps": 4})
    widgets = play._view
    for _ in range(2):  # also of the second run
        widgets["generate"].click()
        sizes = [play._previews[0].size]
        while play._session.is_running:
            sizes.append(play._previews[0].size)
            widgets["ask"].click()
        decoded = (play._session.size,) * 2
        assert sizes[0] != decoded and sizes[-1] == decoded == play.result.images[0].size


def test_a_playground_opens_while_another_call_has_the_pipeline():
    pipe = decinb.load_pipeline("tiny", device="cpu")
    taken, done = threading.Event(), threading.Event()

    def hold():
        with pipeline_lock(pipe):
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        taken.wait(60)
        play = decinb.playground(pipe, **CELL)
        assert play._view["generate"]
    finally:
        done.set()
        thread.join()
    play._view["generate"].click()
    assert play._previews[0].size == (play._session.size,) * 2, "without preparation, the first preview is decoded"


def test_a_step_is_rehearsed_when_the_playground_is_shown_and_nothing_of_it_stays(session, monkeypatch):
    calls, predict = [], _PackedRun.predict
    monkeypatch.setattr(_PackedRun, "predict", lambda *args: calls.append(1) or predict(*args))
    session.prepare()
    assert len(calls) == 1 and session.result is None and not session.is_running
    monkeypatch.setattr("decinb.interactive.session.LARGE", 1000)
    session.prepare()
    assert len(calls) == 1, "with a large model on a CPU, a step would take too long"


def test_what_fails_when_the_playground_is_shown_is_said_when_a_run_starts(session, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(_PackedRun, "predict", fail)
    session.prepare()
    session.start(settings())
    with pytest.raises(decinb.SweepError, match="broken"):
        finish(session)


@pytest.mark.parametrize("axis", [None, "seed"])
def test_previews_cost_about_a_third_of_the_time_at_most(tiny, monkeypatch, axis):
    spent = {"steps": 0.0, "previews": 0.0}  # on a clock that only these move

    def slow(name, function, seconds):
        def run(*args):
            spent[name] += seconds
            return function(*args)

        return run

    monkeypatch.setattr("decinb.interactive.playground.perf_counter", lambda: sum(spent.values()))
    monkeypatch.setattr(Preview, "__call__", slow("previews", Preview.__call__, 0.1))
    play = decinb.playground(tiny, strength=1.0, num_inference_steps=24)
    monkeypatch.setattr(play._session, "advance", slow("steps", play._session.advance, 0.02))
    for _ in range(2):  # a slow preview of one run must not take those of the next
        before = dict(spent)
        if axis:
            play._view["axis"].value = axis
        play._view["sweep" if axis else "generate"].click()
        while play._session.is_running:
            play._view["ask"].click()
        steps, previews = (spent[name] - before[name] for name in ("steps", "previews"))
        assert 0.1 < previews < 0.8 * steps


def test_only_a_page_that_was_given_an_image_can_ask_for_a_step(tiny):
    play = decinb.playground(tiny, strength=1.0, num_inference_steps=30)
    widgets = play._view

    def step():
        return int(re.search(r"step (\d+) of 30", widgets["output"].value)[1])

    widgets["ask"].click()
    assert play.result is None and "no image yet" in widgets["output"].value
    widgets["generate"].click()
    assert step() == 1 and not widgets["stop"].disabled
    play._asked = False
    widgets["ask"].click()
    assert step() == 1, "a second page asks for the same step"
    play._asked = True
    widgets["ask"].click()
    assert 1 < step() < 30
    widgets["stop"].click()
    widgets["ask"].click()
    assert "stopped; 0 images" in widgets["status"].value and not widgets["generate"].disabled
    widgets["sent"].value = '{"kind": "drawing", "data": "data:image/png;base64,bm8=", "at": 1}'
    assert 'role="alert"' in widgets["status"].value and "stopped" not in widgets["status"].value
