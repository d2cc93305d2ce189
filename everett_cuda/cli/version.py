"""`everett version`: what is installed, for bug reports."""

import importlib.util
import platform
from importlib import metadata
from typing import Annotated

import typer

from .. import __version__
from .output import print_json


def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")] = False,
) -> None:
    """Print the versions of the package, its stream law, torch and Python, and which kernels are in use."""
    from .. import _C
    from ..reference import LAW_VERSION

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    found = {
        "everett_cuda": __version__,
        "stream_law": LAW_VERSION,
        "torch": torch,
        "python": platform.python_version(),
        "instruction_set": _C.instruction_set(),
        "instruction_sets": list(_C.instruction_sets()),
        "cuda_module": importlib.util.find_spec("everett_cuda._cuda") is not None,
        "sha256": _C.sha256_library() or None,
    }
    if as_json:
        print_json(found)
        return
    typer.echo(f"everett_cuda {found['everett_cuda']}, stream law {found['stream_law']}, Python {found['python']}")
    typer.echo(f"torch        {torch or 'not installed'}")
    typer.echo(f"CPU kernels  {found['instruction_set']} (of {', '.join(found['instruction_sets'])})")
    typer.echo(f"CUDA module  {'built' if found['cuda_module'] else 'not built (no nvcc when the package was built)'}")
    typer.echo(f"SHA-256      {found['sha256'] or 'hashlib (slow)'}")
