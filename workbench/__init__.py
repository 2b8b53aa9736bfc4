"""Interpretability workbench: probes on any hooked model, results that keep what made them.

    import workbench as wb
    model = wb.load("gpt2")
    result = wb.run("attention-sinks", model, ["..."])

Names are imported when first used, so ``import workbench`` is fast.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.errors import WorkbenchError
    from workbench.interventions.act import ACT
    from workbench.interventions.add_vector import AddVector
    from workbench.interventions.zero_heads import ZeroHeads
    from workbench.interventions.zerotuning import ZeroTuning
    from workbench.models.base import ModelAdapter, ModelSpec, Site
    from workbench.models.load import load, wrap
    from workbench.result import Result
    from workbench.run import run
    from workbench.store.results import Store

__version__ = "0.1.0"

_HOMES = {
    "ACT": "workbench.interventions.act",
    "AddVector": "workbench.interventions.add_vector",
    "ModelAdapter": "workbench.models.base",
    "ModelSpec": "workbench.models.base",
    "Result": "workbench.result",
    "Site": "workbench.models.base",
    "Store": "workbench.store.results",
    "WorkbenchError": "workbench.errors",
    "ZeroHeads": "workbench.interventions.zero_heads",
    "ZeroTuning": "workbench.interventions.zerotuning",
    "load": "workbench.models.load",
    "run": "workbench.run",
    "wrap": "workbench.models.load",
}

__all__ = [
    "ACT",
    "AddVector",
    "ModelAdapter",
    "ModelSpec",
    "Result",
    "Site",
    "Store",
    "WorkbenchError",
    "ZeroHeads",
    "ZeroTuning",
    "__version__",
    "load",
    "run",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module workbench.run would put it in the place of the function wb.run.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
