"""Print what a bug report needs: ``python -m decinb``. The report has no secrets, paths or user names.

``python -m decinb notebooks FOLDER`` copies the notebooks, their solutions and their pictures to a folder.
"""

import argparse
import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import torch

from decinb.errors import InputError, reason
from decinb.loading import is_here
from decinb.models import MODELS, Model
from decinb.utils.device import choose_device, choose_dtype
from decinb.utils.environment import versions
from decinb.utils.files import write_atomically
from decinb.utils.memory import total_memory

PACKAGES = ("decinb", "torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "safetensors", "Pillow")
VARIABLES = re.compile("(HF|DIFFUSERS|TRANSFORMERS|DECINB|PYTORCH|CUDA|G?OMP|MKL)_")
SECRET = re.compile("TOKEN|KEY|SECRET|PASS|AUTH", re.IGNORECASE)
HARMLESS = re.compile(r"[\d.,:]{1,6}|true|false|yes|no|on|off", re.IGNORECASE)  # other values may be paths or names


def report() -> str:
    """Return a few lines about this installation and machine that can be posted in public. Makes no request."""
    return "\n".join(f"{name}: {value}" for name, value in _facts())


def copy_notebooks(folder: str | Path) -> list[Path]:
    """Copy the notebooks of the installed package, or of this checkout, to a folder, and return their new paths.

    Their solutions go to ``solutions``, and the pictures that they show to ``maps`` in the folder.

    Raises:
        InputError: one of the files is there already, or this installation has none.
    """
    found = _notebook_files()
    if not found:
        raise InputError("this installation of decinb has no notebooks: install its wheel")
    folder = Path(folder)
    inside = {Path(name).parent for name in found} - {Path()}
    links = [str(one) for one in inside if (folder / one).is_symlink()]
    if there := [name for name in found if os.path.lexists(folder / name)] + links:
        raise InputError(f"folder: {folder} already has {', '.join(there)}; give another folder")
    for name, file in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8").replace("](../docs/maps/", "](maps/")
        write_atomically(folder / name, text.encode())
    return [folder / name for name in found if "/" not in name]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m decinb", description="Print what a bug report needs.")
    commands = parser.add_subparsers(dest="command", metavar="[notebooks FOLDER]")
    copying = commands.add_parser("notebooks", help="copy the notebooks and their solutions to a folder")
    copying.add_argument("folder", nargs="?", default=".")
    arguments = parser.parse_args()
    if arguments.command is None:
        print(report())
        return
    try:
        copied = copy_notebooks(arguments.folder)
    except InputError as error:
        parser.exit(1, f"{error}\n")
    except OSError as error:
        parser.exit(1, f"{arguments.folder} cannot be written: {reason(error)}\n")
    print(f"{len(copied)} notebooks and their solutions copied to {arguments.folder}")


def _notebook_files() -> dict[str, Path]:
    """Return the notebooks and what belongs to them: for each path in a copy, the file."""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        notebooks = checkout / "notebooks"
        found = sorted([*notebooks.glob("*.ipynb"), *notebooks.glob("solutions/*.ipynb")])
        maps = {f"maps/{file.name}": file for file in sorted(checkout.glob("docs/maps/*.svg"))}
        return {file.relative_to(notebooks).as_posix(): file for file in found} | maps
    installed = (
        (str(file).partition("share/decinb/notebooks/")[2], file) for file in distribution("decinb").files or ()
    )
    return {name: Path(str(file.locate())) for name, file in sorted(installed) if name}


def _facts() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield from versions(PACKAGES).items()
    device = choose_device()
    yield "device", _describe_device(device)
    yield "memory", _describe_memory()
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    yield "dtype", f"{str(choose_dtype(None, device)).removeprefix('torch.')} by default"
    for name, model in MODELS.items():
        yield f"model {name}", _describe_model(model)
    for name in sorted(filter(VARIABLES.match, os.environ)):
        yield name, _describe_variable(name, os.environ[name])


def _describe_device(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda})"


def _describe_memory() -> str:
    total = total_memory()
    return "unknown" if total is None else f"{total / 2**30:.0f} GiB"


def _describe_model(model: Model) -> str:
    if model.is_bundled:
        return "bundled"
    if isinstance(model.source, Path):
        return "in a folder"
    return "cached" if is_here(model) else "not cached"


def _describe_variable(name: str, value: str) -> str:
    """Return the value of an environment variable where it is harmless, else only whether it is set."""
    if (HARMLESS.fullmatch(value) or value in MODELS) and not SECRET.search(name):
        return value
    return "set" if value else "empty"


if __name__ == "__main__":
    main()
