"""The 40 bad inputs and 10 faults whose outcome decinb guarantees, and the table of the outcomes that tests observed.

A test reports the outcome of a case through the fixture ``happened``, and several tests may report the same case. A run
that passes and has observed every case writes ``guarantees.md``.
"""

import re
from pathlib import Path

TABLE = Path(__file__).parents[1] / "guarantees" / "guarantees.md"

GUARANTEES: dict[str, tuple[str, str]] = {
    "E1": ("strength 0", "InputError with the allowed range"),
    "E2": ("strength 0.01 of 8 steps", "InputError: 0 steps would run, with the smallest strength that leaves one"),
    "E3": ("strength -0.1", "InputError with the allowed range"),
    "E4": ("strength 1.2", "InputError with the allowed range"),
    "E5": ("strength NaN", "InputError naming strength"),
    "E6": ("strength '0.5' or None", "InputError naming strength"),
    "E7": ("strength True", "InputError naming strength"),
    "E8": ("strength 0.58 of 50 steps", "28 steps run, as in diffusers; plan and record say so"),
    "E9": ("strengths 0.50, 0.56, 0.62 of 8 steps", "a warning; one computation, three labels"),
    "E10": ("0 steps", "InputError with the allowed range"),
    "E11": ("-1 steps", "InputError with the allowed range"),
    "E12": ("2.5 steps", "InputError with the allowed range"),
    "E13": ("1001 steps", "InputError with the allowed range"),
    "E14": ("1000 steps at strength 1", "InputError, not an IndexError"),
    "E15": ("600 steps with leading spacing", "a warning that the schedule begins below full noise"),
    "E16": ("guidance_scale NaN or infinite", "InputError naming guidance_scale"),
    "E17": ("guidance_scale -7.5", "InputError with the allowed range"),
    "E18": ("guidance_scale 1e38, 1e4", "InputError; a warning"),
    "E19": ("a negative prompt where guidance_scale is at most 1", "a warning that it is unused"),
    "E20": ("guidence_scale=3", "InputError that suggests guidance_scale"),
    "E21": ("seed 1.5, 2**64", "InputError with the allowed range"),
    "E22": ("seed np.int64(7)", "accepted, the same as 7"),
    "E23": ("prompt None, [], ['a', None]", "InputError with the index"),
    "E24": (
        "a prompt, or a negative prompt, of 300 words",
        "a warning with the part that is cut off, also in the record",
    ),
    "E25": ("a lone surrogate; a million characters", "InputError"),
    "E26": ("three prompts and two negative prompts", "InputError, also without guidance"),
    "E27": ("image None, a missing path, a folder, a text file", "InputError naming the path"),
    "E28": ("RGBA with transparency", "white where it is transparent, of the same size"),
    "E29": ("CMYK, grey with alpha, palette with transparency", "RGB of the same size, never mistaken for latents"),
    "E30": ("grey, 1 bit, 16 bit, float", "RGB; half grey stays half grey"),
    "E31": ("EXIF orientations 2 to 8", "upright"),
    "E32": ("a truncated JPEG or PNG; a web page named .png", "InputError: damaged; not an image"),
    "E33": ("1 x 1, 7 x 64; 64 x 2000", "InputError with the smallest size; a warning"),
    "E34": ("513 x 511", "cropped to 512 x 504, both sizes in the record"),
    "E35": ("20000 x 20000 and 12000 x 12000 in a few kB", "InputError from the header, less than 50 MB of memory"),
    "E36": ("arrays: uint8; floats to 255, NaN, CHW", "an image; InputError"),
    "E37": ("a list of different sizes; RGB beside RGBA", "InputError with index and sizes; converted"),
    "E38": (
        "a URL: 404, web page, redirect to a private address, file:, data:, endless redirects",
        "InputError with URL, status and host",
    ),
    "E39": ("a URL that never ends, drips, or never answers", "stopped at 20 MB or 20 s"),
    "E40": ("no cells; equal cells; very many; a huge grid", "InputError; merged; a warning; pages"),
    "F1": ("kill -9 in the middle of a sweep", "no finished image is lost, the result is the same"),
    "F2": ("an interrupt in the middle of a step", "finished images are kept, the next run is unaffected"),
    "F3": ("out of memory", "smaller batches; a clear error if one row does not fit; the model stays usable"),
    "F4": ("NaN in the U-Net, in the VAE, by guidance", "an error with cell, stage and step; no black image is saved"),
    "F5": ("a full disk, a read-only folder", "images stay in memory, one clear warning"),
    "F6": ("a truncated, corrupt, misshapen, incomplete, NaN or pickled model", "ModelError naming the component"),
    "F7": (
        "a hub that refuses, fails, limits, gates, redirects, is silent",
        "ModelError with the cause, within a minute",
    ),
    "F8": ("a download cut at 90%; the right size and wrong bytes", "resumed; fetched again"),
    "F9": ("a callback or a plot that raises; no ipywidgets", "the sweep completes and saves"),
    "F10": ("two threads, or two processes, on one pipeline or folder", "one waits, never a wrong image"),
}


class Seen:
    """The outcomes of each case that a run of the tests observed."""

    def __init__(self) -> None:
        self.by_case: dict[str, list[str]] = {}

    def happened(self, case: str, what: str) -> None:
        """Note the outcome of a case: the message of an error or a warning, or what was found."""
        assert case in GUARANTEES, f"{case} is not among the guarantees"
        line = " ".join(str(what).split()).replace("|", "\\|")
        line = re.sub(r"(127\.0\.0\.1|localhost):\d+", r"\1", line)  # the port differs between runs
        line = re.sub(r"(?<![\w:/.])(/[\w.-]+)+/", "", line)  # and so does the folder
        lines = self.by_case.setdefault(case, [])
        if line not in lines:
            lines.append(line)

    def write(self) -> None:
        if self.by_case.keys() == GUARANTEES.keys():
            TABLE.write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        rows = [
            f"| {case} | {given} | {guaranteed} | {'<br>'.join(self.by_case[case])} |"
            for case, (given, guaranteed) in GUARANTEES.items()
        ]
        head = "# Guarantees, and what the tests observed\n\nWritten by a run in which all tests passed.\n\n"
        return head + "| | given | guaranteed | observed |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
