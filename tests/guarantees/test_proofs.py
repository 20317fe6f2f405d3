"""Two properties on which everything rests: a key proves what made an image, and a file proves that it is that image.

Each run tries the same hundred changes; ``make fuzz`` tries others, and many more.
"""

import io
import json
import struct
import warnings
import zlib
from copy import deepcopy
from types import FunctionType, MethodType

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import decinb
from decinb import InputError, run_sweep
from decinb.execution.provenance import KEY_FIELDS, image_hash, pipeline_record, record_key
from decinb.execution.store import Store
from decinb.images import OUTPUT_HASH, RECORD, SEAL, _sealed, read_saved
from tests.helpers.fuzz import EXAMPLES, fuzz
from tests.helpers.small import small_pipe
from tests.helpers.sweeps import same

IMAGE = decinb.load_image("day", 64)
CELL = {"num_inference_steps": 2, "strength": 0.5, "guidance_scale": 2.0}

# --- a changed pipeline -----------------------------------------------------------------------------------------------


def reachable(value, seen, depth=0):
    """Yield every place in a pipeline that holds a plain value or a tensor: the dict or list around it, and its key.

    What torch itself keeps of a module counts only as far as it is set by users: parameters, buffers and ``training``.
    """
    if id(value) in seen or depth > 40:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        of_torch = set(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}
        places = [(vars(value), name) for name in vars(value) if name not in of_torch]
    elif isinstance(value, dict):
        places = [(value, name) for name in value]
    elif isinstance(value, list):
        places = [(value, i) for i in range(len(value))]
    elif hasattr(value, "__dict__") and not isinstance(value, (type, Tensor, FunctionType, MethodType)):
        places = [(vars(value), name) for name in vars(value)]
    else:
        return
    for holder, name in places:
        one = holder[name]
        if isinstance(one, (bool, int, float, str, Tensor)):
            yield holder, name
        else:
            yield from reachable(one, seen, depth + 1)


def other(value):
    """Another value of the same kind."""
    if isinstance(value, Tensor):
        changed = value.detach().clone()
        changed.view(-1)[changed.numel() // 2] += 1
        return nn.Parameter(changed) if isinstance(value, nn.Parameter) else changed
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value * 2 + 1


@pytest.fixture(scope="module")
def pipe(tiny):
    pipe = small_pipe(tiny)
    pipe.tokenizer = deepcopy(tiny.tokenizer)
    pipe.scheduler = deepcopy(tiny.scheduler)
    return pipe


def image_of(pipe):
    """The record of one image, and the image; None twice if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sweep = run_sweep(pipe, IMAGE, "a house", [CELL], progress=False)
            return sweep.records[0], sweep.images[0]
        except Exception:
            return None, None


def put(holder, name, value):
    """Set an item, also of diffusers' frozen dicts."""
    (dict if isinstance(holder, dict) else list).__setitem__(holder, name, value)


@pytest.fixture(scope="module")
def places(pipe):
    return list(reachable(pipe, set()))


@pytest.fixture(scope="module")
def before(pipe):
    return image_of(pipe)


@settings(fuzz, max_examples=max(EXAMPLES // 4, 1))
@given(st.floats(0, 1, exclude_max=True), st.booleans())
def test_a_changed_pipeline_has_another_key_or_makes_the_same_image(pipe, places, before, where, tensors):
    record, image = before
    chosen = [place for place in places if tensors or not isinstance(place[0][place[1]], Tensor)]
    holder, name = chosen[int(where * len(chosen))]
    value = holder[name]
    put(holder, name, other(value))
    try:
        changed = pipeline_record(pipe)
        decisive = [field for field in KEY_FIELDS if field in changed]
        if all(changed[field] == record[field] for field in decisive) and not changed["unknown"]:
            _, made = image_of(pipe)
            assert made is None or same(made, image), f"{name} changed the image unseen"
    finally:
        put(holder, name, value)


def test_the_places_that_are_changed_are_many_and_decide_images(pipe, places, before, happened):
    names = {name for _, name in places}
    assert len(places) > 3000 and {"weight", "eps", "scaling_factor", "use_tiling", "padding_side", "training"} <= names
    assert pipeline_record(pipe)["weights"] == before[0]["weights"], "all changes were undone"
    happened("K1", "thousands of places, some of them in each run: no image changed under the same key")


# --- a changed file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    """The folder of a sweep with two images, its records, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("proofs")
    cells = [CELL, {**CELL, "seed": 1}]
    sweep = run_sweep(pipe, IMAGE, "a house", cells, folder=folder, progress=False)
    return Store(folder), sweep, [path.read_bytes() for path in sweep.images.sources]


def chunks_of(png):
    at, found = 8, []
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def joined(chunks):
    def whole(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(whole(*chunk) for chunk in chunks)


KINDS = st.sampled_from([b"gAMA", b"tRNS", b"tEXt", b"iCCP", b"cHRM", b"inPt", b"seAL", b"acTL", b"pHYs", b"eXIf"])


@st.composite
def edits(draw, one, two):
    """A file that was edited, with valid checksums and, in half of the cases, a new seal."""
    chunks = chunks_of(one)
    kind = draw(st.sampled_from(["pixels", "bytes", "remove", "add", "swap", "record", "cut", "recolour"]))
    at = draw(st.integers(0, len(chunks) - 1))
    name, data = chunks[at]
    if kind == "pixels":
        image = Image.open(io.BytesIO(one)).convert("RGB")
        x, y = draw(st.integers(0, 63)), draw(st.integers(0, 63))
        image.putpixel((x, y), tuple(value ^ draw(st.integers(1, 255)) for value in image.getpixel((x, y))))
        chunks = with_pixels(chunks, image)
    elif kind == "recolour":
        image = Image.open(io.BytesIO(one)).convert("RGB")
        how = draw(st.sampled_from([lambda i: i.quantize(4), lambda i: i.convert("L"), lambda i: i.resize((1, 1))]))
        chunks = with_pixels(chunks, how(image))
    elif kind == "bytes" and data:
        place, value = draw(st.integers(0, len(data) - 1)), draw(st.integers(1, 255))
        chunks[at] = name, data[:place] + bytes([data[place] ^ value]) + data[place + 1 :]
    elif kind == "remove":
        del chunks[at]
    elif kind == "add":
        chunks.insert(draw(st.integers(1, len(chunks))), (draw(KINDS), draw(st.binary(max_size=40))))
    elif kind == "swap":
        names = [name for name, _ in chunks]
        theirs = {other_name: other_data for other_name, other_data in chunks_of(two) if other_name in names}
        swapped = draw(st.sets(st.sampled_from(sorted(theirs)), min_size=1))
        chunks = [(name, theirs[name] if name in swapped else data) for name, data in chunks]
    elif kind == "record":
        record = record_of(chunks)
        field = draw(st.sampled_from(sorted(record)))
        record[field] = draw(st.sampled_from([None, 0, "x", [], {}, 10**30, other(record["seed"])]))
        chunks = with_record(chunks, record)
    png = joined(chunks)
    if kind == "cut":
        png = png[: draw(st.integers(0, len(png) - 1))]
    elif draw(st.booleans()) and chunks[-1][0] == b"IEND":
        png = resealed(png)
    return png


def with_pixels(chunks, image):
    file = io.BytesIO()
    image.save(file, "PNG")
    kept = [chunk for chunk in chunks if chunk[0] not in (b"IHDR", b"IDAT", b"PLTE", b"IEND", SEAL)]
    seal = [chunk for chunk in chunks if chunk[0] == SEAL]
    new = chunks_of(file.getvalue())
    return [new[0], *kept, *new[1:-1], *seal, new[-1]]


def record_of(chunks):
    text = next(data for kind, data in chunks if kind == b"iTXt")
    return json.loads(text.split(b"\0\0\0\0\0")[1])


def with_record(chunks, record):
    text = RECORD.encode() + b"\0\0\0\0\0" + json.dumps(record).encode()
    return [(kind, text if kind == b"iTXt" else data) for kind, data in chunks]


@fuzz
@given(st.data())
def test_an_edited_file_is_never_taken_for_finished(files, data):
    store, sweep, (one, two) = files
    png = data.draw(edits(one, two))
    assume(png not in (one, two))
    path, record, image = store.path(sweep.records[0]), sweep.records[0], Image.open(io.BytesIO(one)).convert("RGB")
    path.write_bytes(png)
    try:
        finished = store.read_finished(path, record)
        if png != resealed(png):
            assert finished is None, "its seal is broken"
            with pytest.raises(InputError):
                read_saved(path)
        elif finished is not None:  # whoever edited it has sealed it again: it must still show what it says
            assert read_saved(path).image.tobytes() == image.tobytes()
            assert {name: finished[name] for name in KEY_FIELDS} == {name: record[name] for name in KEY_FIELDS}
        with pytest.raises(InputError) as caught:  # it was changed, or made by a pipeline that must be given
            decinb.replay(path)
        assert "\n" not in str(caught.value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = decinb.load_sweep(store.folder)
        for one_record, made in zip(loaded.records, loaded.images, strict=True):
            assert one_record["key"] == record_key(one_record)
            assert image_hash(made) == one_record[OUTPUT_HASH]
    finally:
        path.write_bytes(one)


def resealed(png):
    """A file with the right seal; unchanged if it is not a PNG."""
    try:
        return _sealed(joined([chunk for chunk in chunks_of(png) if chunk[0] != SEAL]))
    except struct.error:
        return b""


def test_the_files_to_be_edited_are_whole(files, happened):
    store, sweep, saved = files
    for path, record, data in zip(sweep.images.sources, sweep.records, saved, strict=True):
        assert store.read_finished(path, record) == record and joined(chunks_of(data)) == data
        assert record_of(chunks_of(data)) == record
        assert resealed(data) == data and read_saved(path).sealed
    happened("K3", "pixels, chunks and records edited, swapped, removed, added: none was taken for finished")
