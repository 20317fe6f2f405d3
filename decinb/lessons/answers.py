"""Check answers to the exercises of the notebooks, without a network: ``decinb.check("02.1", answer)``."""

import math
from dataclasses import dataclass
from numbers import Real

from decinb.errors import InputError
from decinb.utils.validation import short_repr


@dataclass(frozen=True)
class Number:
    """An answer that is a number.

    Args:
        value: the right answer.
        because: why, in one sentence.
        within: how far off an answer may be.
    """

    value: float
    because: str
    within: float = 0.0


@dataclass(frozen=True)
class Choice:
    """An answer that is one of the letters of the exercise."""

    value: str
    because: str
    letters: str = "ab"


ANSWERS: dict[str, Number | Choice] = {
    "00.1": Number(22, "int(30 * 0.75) is 22, because int() cuts off what follows the point."),
    "00.2": Number(7.5, "guidance moves 7.5 times the difference away from the prediction without the prompt."),
    "01.1": Number(48, "8 x 8 pixels of 3 values become one position of 4 values: 192 / 4."),
    "01.2": Choice("b", "text and input are encoded before the loop, and one latent is decoded after it.", "abc"),
    "02.1": Number(1, "int(10 * strength) is 5 for all four strengths, so all four are the same computation."),
    "02.2": Number(156, "the six strengths run 22, 24, 25, 27, 28 and 30 steps."),
    "03.1": Choice("b", "guidance doubles the rows of a call: 2 x 15 rows take longer than 1 x 22."),
    "03.2": Number(15, "the combination lies guidance_scale times the difference away: 7.5 x 2."),
    "04.1": Choice("b", "both run ten steps, but at strength 0.5 half of the noise was never added."),
    "04.2": Number(0.6, "int(50 * 0.6) is 30.", within=0.019),
    "05.1": Number(125, "five values of each of three arguments make 5 x 5 x 5 cells."),
    "05.2": Number(13, "the base, and four other values of each of three arguments."),
    "06.1": Number(7, "int(25 * 0.3) is 7, and without guidance each call has one row."),
    "06.2": Choice("a", "attention at full resolution, which the search removed, grows with the square of the area."),
    "08.1": Choice("b", "without + scale * (with - without) is the same at every scale if both are equal.", "abc"),
    "08.2": Choice("a", "the second prediction is made in any case; the negative prompt only changes its text."),
    "09.1": Number(60, "text to image runs all 30 steps, each of the other two links int(30 * 0.5)."),
    "09.2": Choice("b", "a latent is what a VAE makes of an image, and only an equal VAE can read it.", "abc"),
    "10.1": Number(13, "the registry says 6.9 GB and 6.1 GB.", within=0.05),
    "10.2": Number(20, "a packed sweep takes as many calls as its longest cell."),
    "11.1": Number(256, "the U-Net sees the map at the resolution of the latent, 16 x 16."),
    "11.2": Choice("b", "at strength 1 the latent holds nothing of the input, but the depth map still does."),
    "12.1": Number(1.67, "a fifth stays as it is and four fifths are halved: 1 / (0.2 + 0.8 / 2).", within=0.01),
    "12.2": Number(300, "60 seconds divided by 0.2 seconds a call."),
    "14.1": Number(4, "int(4 * strength) is 1, 2, 3 or 4; 0 steps are refused."),
    "14.2": Number(10, "20 guided steps have 40 rows; 4 steps with guidance built in have 4."),
}
"""The answers by notebook and exercise. Those that are missing here have a solution, but no single answer."""


def check(exercise: str, answer: object) -> None:
    """Say whether an answer to an exercise is right, or how far off it is.

    Args:
        exercise: the number of the notebook and of the exercise, such as "02.1".
        answer: a number, or the letter of a choice.

    Raises:
        InputError: the exercise has no answer to check, or the answer is of the wrong kind.
    """
    if exercise not in ANSWERS:
        raise InputError(f"exercise must be one of {', '.join(ANSWERS)}, got {short_repr(exercise)}")
    known = ANSWERS[exercise]
    if isinstance(known, Choice):
        letter = answer.strip().lower() if isinstance(answer, str) else answer
        if letter not in tuple(known.letters):
            letters = ", ".join(known.letters)
            raise InputError(f"answer must be one of the letters {letters}, got {short_repr(answer)}")
        right, off = letter == known.value, "it is another one"
    else:
        if isinstance(answer, bool) or not isinstance(answer, Real) or not math.isfinite(answer):
            raise InputError(f"answer must be a number, got {short_repr(answer)}")
        distance = float(answer) - known.value
        right = abs(distance) <= known.within
        off = f"{abs(distance):.4g} too {'large' if distance > 0 else 'small'}"
    print(
        f"{exercise}: right, {known.because}" if right else f"{exercise}: not yet, {off}. Read the hint and try again."
    )
