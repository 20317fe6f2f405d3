"""What becomes of images between the pipeline and the folder."""

import pytest

import decinb
from decinb.execution.results import Results
from decinb.sampling.jobs import Result


def test_an_image_that_failed_is_not_computed_again(tiny):
    """Processes that share a sweep go on until nothing is missing, which must not include what cannot be made."""
    cells = [{"num_inference_steps": 2, "strength": 1.0, "seed": seed} for seed in range(2)]
    results = Results(decinb.plan(tiny, "day", "a house", cells, timed=False), None)
    first, second = results.missing
    with pytest.warns(UserWarning, match="cell .*seed 0: the U-Net returned NaN; the other cells continue"):
        assert not results.add(first, Result(0, None, "the U-Net returned NaN", 1.0))
    assert results.missing == [second] and len(results) == 0
