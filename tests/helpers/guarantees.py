"""The bad inputs, faults and hostile files whose outcome decinb guarantees, and the table of what the tests observed.

A test of one of these cases records its outcome with the fixture ``happened``. A run that observed all cases and passed
writes ``guarantees.md``. Where several tests record one case, the table lists all their outcomes.
"""

import re
from pathlib import Path

TABLE = Path(__file__).parents[1] / "guarantees" / "guarantees.md"

# What is given, and what is guaranteed.
GUARANTEES: dict[str, tuple[str, str]] = {
    "E1": ("strength 0", "InputError with the allowed range"),
    "E2": ("strength 0.01 of 8 steps", "InputError: 0 steps would run, with the smallest strength that leaves one"),
    "E3": ("strength -0.1", "InputError with the allowed range"),
    "E4": ("strength 1.2", "InputError with the allowed range"),
    "E5": ("strength NaN", "InputError naming strength"),
    "E6": ("strength '0.5' or None", "InputError naming strength"),
    "E7": ("strength True", "InputError naming strength"),
    "E8": ("strength 0.58 of 50 steps", "28 steps run, as in diffusers; plan and record say so"),
    "E9": ("strengths 0.50, 0.56, 0.62 of 8 steps", "a warning, one computation, three labelled images"),
    "E10": ("0 steps", "InputError with the allowed range"),
    "E11": ("-1 steps", "InputError with the allowed range"),
    "E12": ("2.5 steps", "InputError with the allowed range"),
    "E13": ("1001 steps", "InputError with the allowed range"),
    "E14": ("1000 steps at strength 1", "InputError, not an IndexError"),
    "E15": ("600 steps with leading spacing", "a warning that the schedule starts below full noise"),
    "E16": ("guidance_scale NaN or infinite", "InputError naming guidance_scale"),
    "E17": ("guidance_scale -7.5", "InputError with the allowed range"),
    "E18": ("guidance_scale 1e38, 1e4", "InputError; a warning"),
    "E19": ("a negative prompt where guidance_scale is at most 1", "a warning that it is unused"),
    "E20": ("guidence_scale=3", "an error that suggests guidance_scale"),
    "E21": ("seed 1.5, 2**64", "InputError with the allowed range"),
    "E22": ("seed np.int64(7)", "accepted, the same as 7"),
    "E23": ("prompt None, [], ['a', None]", "InputError with the index"),
    "E24": (
        "a prompt, or a negative prompt, of 300 words",
        "a warning that quotes the truncated text, which the record also holds",
    ),
    "E25": ("a lone surrogate; a million characters", "InputError"),
    "E26": ("one negative prompt too few", "InputError, also without guidance"),
    "E27": ("image None, a missing path, a folder, a text file", "InputError naming the path"),
    "E28": ("RGBA with transparency", "composited on white, same size"),
    "E29": ("CMYK, grey with alpha, palette with transparency", "RGB of the same size, never mistaken for latents"),
    "E30": ("grey, 1 bit, 16 bit, float", "RGB; mid-grey stays mid-grey"),
    "E31": ("EXIF orientations 2 to 8", "upright"),
    "E32": ("a truncated JPEG or PNG; a web page named .png", "InputError: damaged; not an image"),
    "E33": ("1 x 1, 7 x 64; 64 x 2000", "InputError with the smallest size; a warning"),
    "E34": ("513 x 511", "cropped to 512 x 504, both sizes in the record"),
    "E35": ("20000 x 20000 and 12000 x 12000 in a few kB", "InputError from the header, less than 50 MB of memory"),
    "E36": ("arrays: uint8; floats to 255, NaN, CHW", "an image; InputError"),
    "E37": ("a list of different sizes; RGB and RGBA mixed", "InputError with index and sizes; converted"),
    "E38": (
        "a URL: 404, web page, redirect to a private address, file:, data:, endless redirects",
        "InputError: URL, status, host",
    ),
    "E39": ("a URL that never ends, sends too slowly, or never answers", "stopped at 20 MB or 20 s"),
    "E40": ("no cells; equal cells; very many; a huge grid", "InputError; merged; a warning; several pages"),
    "F1": ("kill -9 in the middle of a sweep", "no finished image is lost; the resumed sweep gives the same images"),
    "F2": ("an interrupt in the middle of a step", "finished images are kept; the next run is not affected"),
    "F3": ("out of memory", "smaller batches; at one row a clear error; the model stays usable"),
    "F4": (
        "NaN in the U-Net, in the VAE, by guidance",
        "an error that names the cell, stage and step; no black image is saved",
    ),
    "F5": ("a full disk, a read-only folder", "images are kept in memory or in another folder, with one clear warning"),
    "F6": (
        "a model that is truncated, corrupt, of wrong shapes, incomplete, NaN or pickled",
        "ModelError naming the component",
    ),
    "F7": (
        "a hub that refuses, fails, limits, gates, redirects or does not answer",
        "ModelError with the true cause within a minute",
    ),
    "F8": ("a download cut at 90%; one of the right size with wrong bytes", "resumed; downloaded again"),
    "F9": ("a callback or a plot that raises; no ipywidgets", "the sweep completes and saves its images"),
    "F10": ("two threads, or two processes, on one pipeline or folder", "one waits or is refused; no image is wrong"),
    "H1": (
        "a model's folder with huge layer counts, vocabularies, headers, timesteps",
        "ModelError within 5 s and 200 MB more than its weights",
    ),
    "H2": ("a model's folder that names code, kernels or other models", "nothing is run and nothing is fetched"),
    "H3": ("integers, booleans or quantised numbers in place of weights", "ModelError naming the tensor"),
    "H4": (
        "a record of another model, of huge timesteps, of 500 links",
        "InputError within 5 s and 200 MB; the model is asked for by name, not downloaded",
    ),
    "H5": ("a pipe, a device, a sparse giant, a bomb in place of a PNG", "InputError without reading or waiting"),
    "K1": ("a pipeline with any attribute or tensor changed", "another key, or the same image"),
    "K2": ("a hook, a forward or a class of the user's own", "made anew every time, with one line that names it"),
    "K3": ("an edited PNG with valid checksums", "made again or refused, never finished"),
    "K4": ("every scheduler of diffusers", "saved, resumed, loaded, replayed; or refused by name before any work"),
    "K5": ("a compiled, offloaded, sliced or channels-last network", "the same model: nothing is computed again"),
    "K6": ("a bfloat16 sweep, an adapter's scale", "replayed in bfloat16, and with that scale"),
    "K7": ("an interrupt", "what is done is saved, one line says how to go on, and the cell ends"),
    "K8": ("two inputs of one name, leftovers of a launcher, a renamed folder", "told apart, told"),
}


class Observed:
    """The outcomes of the cases in one run of the tests, in this process or gathered from several."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, str, str]] = []  # case, outcome, file of the test

    def record(self, case: str, outcome: str, test: str) -> None:
        """Record the outcome of a case.

        Args:
            case: a key of ``GUARANTEES``.
            outcome: the message of an error or warning, or what was found.
            test: the id of the test, which begins with its file.
        """
        assert case in GUARANTEES, f"{case} is not one of the guarantees"
        outcome = " ".join(str(outcome).split()).replace("|", "\\|")
        outcome = re.sub(r"(127\.0\.0\.1|localhost):\d+", r"\1", outcome)  # the port differs in every run
        outcome = re.sub(r"(?<![\w:/.])(/[\w.-]+)+/(popen-gw\w*…[\w.-]*/)?", "", outcome)  # and so does the folder
        self.outcomes.append((case, outcome, test.partition("::")[0]))

    def write(self, file: Path = TABLE) -> None:
        """Write the table if every case was observed."""
        if {case for case, *_ in self.outcomes} == GUARANTEES.keys():
            file.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """Return the table in Markdown. It does not depend on the order in which the files of tests ran."""
        rows = []
        for case, (given, guaranteed) in GUARANTEES.items():
            found = sorted((outcome for outcome in self.outcomes if outcome[0] == case), key=lambda outcome: outcome[2])
            observed = "<br>".join(dict.fromkeys(text for _, text, _ in found))
            rows.append(f"| {case} | {given} | {guaranteed} | {observed} |")
        head = "# What is guaranteed, and what the tests observed\n\nWritten by `make test` when every test passes.\n\n"
        return head + "| | given | guaranteed | observed |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
