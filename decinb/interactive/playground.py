"""The playground: controls, a canvas to draw on, and an image that appears step by step, in a notebook.

The page asks for each step. When it has shown an image, it sends one message, and the kernel takes the next step and
sends its image. Where previews are slow compared with steps, the kernel takes several steps for one message, for at
most a quarter of a second. The first preview is small, so that it is there at once; the others are decoded where that
is fast. There is no thread and no timer. A click on Stop therefore takes effect at the next preview, however the kernel
handles messages: one after another in its main thread, in subshells (JupyterLab with ipykernel 7), or on Colab. No
preview is computed that is not shown.

Only widgets that ipywidgets 7.7 and 8 both have are used. The HTML widget runs no ``<script>``, so ``playground.js`` is
the ``onload`` of an image.
"""

import base64
import binascii
import html
import json
import threading
from collections.abc import Callable
from functools import wraps
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from decinb.designs import Cell
from decinb.errors import InputError
from decinb.execution.runner import State
from decinb.figures.viewer import data_url
from decinb.images import SAMPLES, load_image
from decinb.interactive.session import LIMITS, Busy, Session, Settings
from decinb.sweep import Sweep
from decinb.utils.labels import SHORT, label

CONTROLS = {
    "strength": ("FloatSlider", *LIMITS["strength"], 0.05),
    "guidance_scale": ("FloatSlider", *LIMITS["guidance_scale"], 0.5),
    "num_inference_steps": ("IntSlider", *LIMITS["num_inference_steps"], 1),
    "seed": ("BoundedIntText", *LIMITS["seed"], 1),
}
LONGEST = 0.25  # seconds of steps between two previews, unless one step takes longer
TILE = 96  # pixels of the side of a preview while a sweep runs
BLANK = "blank canvas"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def playground(pipe: DiffusionPipeline, folder: str | Path | None = None, **cell: Any) -> "Playground":
    """Return controls to try a pipeline by hand, for the output of a notebook cell.

    Choose, upload or draw an image, set the arguments of the call, and watch the predicted clean image at every step.
    "Sweep this" makes an image for each of several values of one control: a number, the prompts, the sample image or
    the scheduler. Afterwards, changing that control shows the image that is already made. "Copy as code" copies the
    cell that makes the image again.

    Example: ``decinb.playground(pipe, prompt="a house at night", strength=0.6)``

    Args:
        pipe: from ``load_pipeline``, or any diffusers pipeline. Its scheduler is left as it is.
        folder: where every image is saved with its record, and found again; None saves nothing.
        cell: the initial values of controls: ``image`` (the name of a sample), ``prompt``, ``negative_prompt``,
            ``strength`` (0.05 to 1), ``guidance_scale`` (1 to 20), ``num_inference_steps`` (1 to 100) and ``seed``.

    Raises:
        InputError: ``pipe`` is not a pipeline, or a control cannot have its initial value.
    """
    return Playground(pipe, folder, cell)


class Playground:
    """What ``playground`` returns. It shows itself as the last value of a cell.

    Attributes:
        image: the input, as it is on the canvas; None for text to image.
        result: the last image or sweep, as a ``Sweep``.
        kept: the images kept, as a ``Sweep``.
        is_running: whether an image or a sweep has been started and is not finished.
    """

    def __init__(self, pipe: DiffusionPipeline, folder: str | Path | None, cell: Cell):
        self._session = Session(pipe, folder)
        self._lock = threading.RLock()  # messages may be handled in another thread than cells
        self._cell = self._session.check(cell)
        self._source: str | Image.Image | None = self._cell["image"]
        self._asked = False  # whether the page has been given an image after which it asks for the next step
        self._previews: dict[int, Image.Image] = {}
        self._asks = 0  # how often there was nothing new to show
        self._turn = 0
        self._preview_seconds = 0.0  # what the last preview took
        self._shown = 0  # which image of the result is in view
        self._widgets: dict[str, Any] | None = None

    @property
    def image(self) -> Image.Image | None:
        return load_image(self._source, self._session.size) if isinstance(self._source, str) else self._source

    @property
    def result(self) -> Sweep | None:
        return self._session.result

    @property
    def kept(self) -> Sweep:
        return self._session.kept

    @property
    def is_running(self) -> bool:
        return self._session.is_running

    # --- what the user does ---

    def generate(self) -> None:
        """Start an image with the current settings."""
        self._start(None)

    def sweep(self) -> None:
        """Start a sweep of the chosen control."""
        self._start(self._view["axis"].value)

    def _start(self, axis: str | None) -> None:
        self._previews, self._turn, self._preview_seconds = {}, 0, 0.0
        self._session.start(self._settings(), axis)
        self._set_running(True)
        self._say("; ".join(["running", *self._session.notes]))
        self._advance()

    def stop(self) -> None:
        """Stop the run; what is finished stays."""
        if self._session.is_running:
            self._session.stop()
            self._asked = False
            self._set_running(False)
            self._show_result()
            count = len(self._session.result)
            self._say(f"stopped; {count} image{'s' * (count != 1)} finished")

    def keep(self) -> None:
        """Add the image in view to those kept, which the viewer below shows."""
        self._session.keep(self._shown)
        self._show_in("kept", self._session.kept)
        self._say(f"kept {len(self._session.kept)}")

    # --- stepping ---

    def step(self) -> None:
        """Take the next step of the run and show it. The page asks for this once it has shown the last image.

        It does nothing if no step is due.
        """
        if self._asked:
            self._asked = False
            self._advance()

    def _advance(self) -> None:
        """Take the next step and show it; the page then asks for the one after it.

        Where previews are slow, several steps are taken until they have taken twice as long as a preview. So previews
        cost about a third of the time at most.
        """
        if not self._session.is_running:
            return
        started, latest = perf_counter(), {}
        try:
            while self._session.is_running:
                latest |= {state.cell: state for state in self._session.advance()}
                if perf_counter() - started >= min(2 * self._preview_seconds, LONGEST):
                    break
        except Busy as busy:
            self._say(str(busy))
            self._ask_again()
            return
        except Exception:
            self._set_running(False)
            raise
        if self._session.is_running:
            self._show_progress(list(latest.values()), (perf_counter() - started) / 2)
        else:
            self._set_running(False)
            self._show_result()

    def _show_progress(self, states: list[State], budget: float) -> None:
        """Show predictions; of a sweep, in turn, as many as can be decoded in half of the time that the steps took."""
        if not states:
            self._ask_again()
            return
        started, shown = perf_counter(), 0
        while not shown or (shown < len(states) and (perf_counter() - started) * (shown + 1) / shown <= budget):
            state = states[self._turn % len(states)]
            self._turn, shown = self._turn + 1, shown + 1
            if (image := state.predicted) is not None:
                self._previews[state.cell] = image
        state = max(states, key=lambda one: one.steps - one.step)
        left = "" if state.seconds_left is None else f", {state.seconds_left:.1f} s left"
        text = f"step {state.step} of {state.steps}{left}"
        if self._session.swept == "scheduler":
            text = f"{list(self._session.schedulers)[state.cell]}: {text}"
        if self._previews:
            self._show_image(self._montage(), text, asks=True)
        else:
            self._ask_again(text)
        self._view["progress"].max, self._view["progress"].value = state.steps, state.step
        self._preview_seconds = (perf_counter() - started) / shown

    def _montage(self) -> Image.Image:
        """Return the preview of an image, or those of a sweep side by side."""
        if self._session.swept is None:
            return next(iter(self._previews.values()))
        count = len(self._session.values(self._session.swept, self._session.settings.cell))
        columns = min(4, count)
        page = Image.new("RGB", (columns * TILE, -(-count // columns) * TILE), (128, 128, 128))
        for cell, image in self._previews.items():
            page.paste(image.resize((TILE, TILE)), (cell % columns * TILE, cell // columns * TILE))
        return page

    # --- showing ---

    def _show_result(self) -> None:
        result = self._session.result
        if not len(result):
            self._view["output"].value = _frame(None, "no image yet", False)
            return
        if self._session.swept:
            self._show_in("explored", result)
        index = self._session.find(self._settings())
        self._show_made(0 if index is None else index)

    def _show_made(self, index: int) -> None:
        self._shown = index
        made, record = self._session.result, self._session.result.records[index]
        swept = self._session.swept
        self._show_image(made.images[index], label(record, [swept] if swept and swept not in SHORT else []), asks=False)
        self._view["code"].value = _code(self._session.code(index if len(made) > 1 else None))
        self._say("; ".join([f"{record['steps_run']} steps, {record['seconds']:.2f} s", *self._session.notes]))

    def _show_image(self, image: Image.Image, text: str, asks: bool) -> None:
        self._view["output"].value = _frame(image, text, asks)
        self._asked = asks

    def _ask_again(self, text: str = "starting") -> None:
        self._asked, self._asks = True, self._asks + 1
        self._view["output"].value = _frame(None, text, True, self._asks)

    def _show_in(self, name: str, sweep: Sweep) -> None:
        # Once this image is loaded, the page runs the viewer's script.
        run = f'<img hidden class="decinb-run" src="{PIXEL}" alt="">'
        self._view[name].value = f"<div>{sweep.explore()._repr_html_()}{run}</div>"

    def _say(self, text: str, error: bool = False) -> None:
        role, name = ("alert", "decinb-error") if error else ("status", "decinb-status")
        self._view["status"].value = f'<div role="{role}" class="{name}">{html.escape(text)}</div>'

    def _set_running(self, running: bool) -> None:
        view = self._view
        view["stop"].disabled = not running
        for name in ("generate", "sweep", "keep"):
            view[name].disabled = running
        view["progress"].layout.visibility = "visible" if running else "hidden"

    # --- the controls ---

    def _settings(self) -> Settings:
        view = self._view
        cell = {name: view[name].value for name in ("prompt", "negative_prompt", *SHORT) if name in view}
        if "negative_prompt" in cell:
            cell["negative_prompt"] = cell["negative_prompt"].strip() or None
        return Settings(self._source, cell, view["scheduler"].value)

    def _on_setting(self) -> None:
        """Show the image of the last sweep that has these settings."""
        if (index := self._session.find(self._settings())) is not None:
            self._show_made(index)

    def _on_image(self) -> None:
        name = self._view["image"].value
        self._source = Image.new("RGB", (self._session.size,) * 2, "white") if name == BLANK else name
        self._show_input()
        self._on_setting()

    def _on_sent(self) -> None:
        """Take what the page sends: a drawing, or a file that was made smaller there."""
        text = self._view["sent"].value
        if not text:
            return
        sent = json.loads(text)
        if "problem" in sent:
            raise InputError(sent["problem"])
        try:
            data = base64.b64decode(sent["data"].partition("base64,")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError("the page sent no image") from error
        self._source = load_image(data, self._session.size)
        if sent["kind"] == "file":
            self._show_input()
            self._say("your image is the input")

    def _show_input(self) -> None:
        name = self._source if isinstance(self._source, str) else "your image"
        source = data_url(self.image)
        self._view["source"].value = f'<img class="decinb-source" hidden src="{source}" alt="{html.escape(name)}">'

    def _guarded(self, action: Callable[[], None]) -> Callable[..., None]:
        """Run an action for a message: one at a time, and with errors shown instead of raised."""

        @wraps(action)
        def run(*_: Any) -> None:
            with self._lock:
                try:
                    action()
                except Busy as busy:
                    self._say(str(busy), error=True)
                except Exception as error:  # shown here, or it would disappear in the kernel's log
                    named = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
                    self._say(f"{named}{error}", error=True)

        return run

    @property
    def _view(self) -> dict[str, Any]:
        if self._widgets is None:
            self._widgets = self._make_widgets()
        return self._widgets

    def _make_widgets(self) -> dict[str, Any]:
        import ipywidgets as widgets  # needed only here

        session, cell = self._session, self._cell
        style, wide = {"description_width": "110px"}, widgets.Layout(width="auto")

        def control(kind: type, name: str, **options: Any) -> Any:
            return kind(description=name, style=style, layout=wide, **options)

        view: dict[str, Any] = {"prompt": control(widgets.Textarea, "prompt", value=cell["prompt"], rows=3)}
        if "negative_prompt" in cell:
            value = cell["negative_prompt"] or ""
            view["negative_prompt"] = control(widgets.Textarea, "negative prompt", value=value, rows=1)
        if session.takes_image:
            view["image"] = control(widgets.Dropdown, "image", options=[*SAMPLES, BLANK], value=cell["image"])
        for name, (kind, *limits, step) in CONTROLS.items():
            if name in cell:
                ends = dict(zip(("min", "max"), limits, strict=True))
                view[name] = control(getattr(widgets, kind), SHORT[name], value=cell[name], step=step, **ends)
        names = list(session.schedulers)
        view["scheduler"] = control(
            widgets.Dropdown, "scheduler", options=[(name.removesuffix("Scheduler"), name) for name in names]
        )
        settings = list(view.values())

        def button(text: str, tooltip: str, action: Callable[[], None], **options: Any) -> Any:
            made = widgets.Button(description=text, tooltip=tooltip, layout=widgets.Layout(width="auto"), **options)
            made.on_click(self._guarded(action))
            return made

        view["generate"] = button("Generate", "make an image", self.generate, button_style="primary")
        view["stop"] = button("Stop", "stop at the next preview", self.stop, disabled=True)
        view["keep"] = button("Keep", "add the image to those below", self.keep)
        view["axis"] = widgets.Dropdown(
            description="what to sweep",
            style=style,
            options=[(SHORT.get(name, name.replace("_", " ")), name) for name in session.sweepable()],
            layout=widgets.Layout(width="220px"),
        )
        view["sweep"] = button("Sweep this", "try several values of one control, together", self.sweep)
        view["progress"] = widgets.IntProgress(
            value=0, min=0, max=1, layout=widgets.Layout(width="auto", visibility="hidden")
        )
        view["status"] = widgets.HTML('<div role="status"></div>')
        view["output"] = widgets.HTML(_frame(None, "no image yet", False))
        view["code"] = widgets.HTML("")
        view["source"] = widgets.HTML("")
        view["explored"], view["kept"] = widgets.HTML(""), widgets.HTML("")
        hidden = widgets.Layout(display="none")
        view["ask"] = widgets.Button(description="next step", layout=hidden)
        view["ask"].on_click(self._guarded(self.step))
        view["sent"] = widgets.Textarea(layout=hidden)
        view["sent"].observe(self._guarded(self._on_sent), "value")
        for name in ("ask", "sent"):
            view[name].add_class(f"decinb-{name}")
        for one in settings:
            changed = self._on_image if one is view.get("image") else self._on_setting
            one.observe(self._guarded(changed), "value")

        source = files("decinb.interactive")
        style_sheet = source.joinpath("playground.css").read_text(encoding="utf-8")
        script = source.joinpath("playground.js").read_text(encoding="utf-8")
        boot = widgets.HTML(
            f'<style>{style_sheet}</style><img hidden src="{PIXEL}" alt="" onload="{html.escape(script)}">'
        )
        canvas = source.joinpath("canvas.html").read_text(encoding="utf-8").replace("__SIZE__", str(session.size))
        inputs = [widgets.HTML(canvas), view["source"]] if session.takes_image else []
        buttons = widgets.Box([view["generate"], view["stop"], view["keep"]])
        sweeping = widgets.Box([view["axis"], view["sweep"]])
        controls = widgets.VBox([*settings, buttons, sweeping, view["progress"], view["status"]])
        panes = widgets.Box([*([widgets.VBox(inputs)] if inputs else []), widgets.VBox([view["output"], view["code"]])])
        stage = widgets.Box([controls, panes])
        for box, name in ((controls, "controls"), (panes, "panes"), (stage, "stage")):
            box.add_class(f"decinb-{name}")
        for row in (buttons, sweeping):
            row.add_class("decinb-row")
        view["root"] = widgets.VBox([boot, stage, view["ask"], view["sent"], view["explored"], view["kept"]])
        view["root"].add_class("decinb-playground")
        self._widgets = view
        if session.takes_image:
            self._show_input()
        session.prepare()
        return view

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Return the widgets, and what remains of them on a page without a kernel."""
        has_widgets = find_spec("ipywidgets") is not None
        text = f"the playground; {'run this cell' if has_widgets else 'install ipywidgets'} to use it"
        bundle = {"text/plain": text, "text/html": _fallback(self.image, self._cell, text)}
        if has_widgets:
            model = self._view["root"].model_id
            bundle[WIDGET_VIEW] = {"version_major": 2, "version_minor": 0, "model_id": model}
        return bundle


def _frame(image: Image.Image | None, text: str, asks: bool, number: int = 0) -> str:
    """Return an image with a caption; once it is shown, the page asks for the next step if ``asks``.

    Without an image, the page loads an invisible one, again for each new ``number``.
    """
    mark = ' data-ask="1"' if asks else ""
    caption = html.escape(text)
    if image is None:
        shown = f'<div class="decinb-empty"></div><img hidden src="{PIXEL}#{number}" alt=""{mark}>'
    else:
        shown = f'<img class="decinb-shown" decoding="sync" src="{data_url(image)}" alt="{caption}"{mark}>'
    return f'<div class="decinb-head">output</div><div class="decinb-frame">{shown}</div><div>{caption}</div>'


def _code(code: str) -> str:
    return (
        '<button type="button" class="decinb-copy">Copy as code</button>'
        '<span class="decinb-copied" role="status"></span>'
        f"<details><summary>code</summary><pre>{html.escape(code)}</pre></details>"
    )


def _fallback(image: Image.Image | None, cell: Cell, text: str) -> str:
    """Return the input and the settings as a table that needs neither scripts nor styles."""
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in cell.items()
        if value is not None
    )
    shown = f'<img src="{data_url(image)}" alt="the input image" width="192">' if image else ""
    return f"<p>{html.escape(text)}</p>{shown}<table>{rows}</table>"
