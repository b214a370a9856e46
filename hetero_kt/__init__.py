"""Knowledge transfer between models that share nothing: architecture, task, modality.

What this module exports is public; CONTRIBUTING.md says how a public name is deprecated. Names are imported at their
first use, so that `import hetero_kt` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "hetero_kt.config": (
        "AdapterConfig",
        "CRD",
        "DKD",
        "Data",
        "Distill",
        "FBT",
        "FCFD",
        "FitNet",
        "KD",
        "MergeNet",
        "Mix",
        "Model",
        "NKD",
        "OFA",
        "Optim",
        "RKD",
        "Recipe",
        "Schedule",
        "Teacher",
        "Text",
        "TfKD",
        "Transfer",
        "Transform",
        "USKD",
        "XVLM",
    ),
    "hetero_kt.methods.mergenet": ("Exchange",),
    "hetero_kt.methods.sites": ("Site",),
    "hetero_kt.nn.reencode": ("factorise", "list_weights", "plain_state_dict"),
    "hetero_kt.start": ("main",),
}
"""Each public name's module."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from hetero_kt.config import (
        CRD,
        DKD,
        FBT,
        FCFD,
        KD,
        NKD,
        OFA,
        RKD,
        USKD,
        XVLM,
        AdapterConfig,
        Data,
        Distill,
        FitNet,
        MergeNet,
        Mix,
        Model,
        Optim,
        Recipe,
        Schedule,
        Teacher,
        Text,
        TfKD,
        Transfer,
        Transform,
    )
    from hetero_kt.methods.mergenet import Exchange
    from hetero_kt.methods.sites import Site
    from hetero_kt.nn.reencode import factorise, list_weights, plain_state_dict
    from hetero_kt.start import main

    __version__: str

__all__ = [
    "CRD",
    "DKD",
    "FBT",
    "FCFD",
    "KD",
    "NKD",
    "OFA",
    "RKD",
    "USKD",
    "XVLM",
    "AdapterConfig",
    "Data",
    "Distill",
    "Exchange",
    "FitNet",
    "MergeNet",
    "Mix",
    "Model",
    "Optim",
    "Recipe",
    "Schedule",
    "Site",
    "Teacher",
    "Text",
    "TfKD",
    "Transfer",
    "Transform",
    "__version__",
    "factorise",
    "list_weights",
    "main",
    "plain_state_dict",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hetero-kt")
    except PackageNotFoundError:  # the sources alone, on the path
        return "0+unknown"
