# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet and the sequence mixers around it, fast on CPUs, with gradients.

Importing the package loads libgdn into the running PyTorch. Then:

- ``gdn.ops``: the operators under the names, arguments and layouts of flash-linear-attention 0.6;
- ``gdn.layers``: every sequence mixer as ``torch.nn.Module``;
- ``gdn.models``: whole language models as transformers' ``PreTrainedModel`` (needs transformers);
- ``gdn.patch_transformers()``: hybrid models of the installed transformers run on gdn;
- ``gdn.register_fla_backend()``: the same for the installed flash-linear-attention;
- ``gdn.CausalLM``: the C++ engine, for inference without transformers;
- ``python -m gdn``: the program ``gdn`` in a Python process.
"""

import ctypes
import importlib
import os
from typing import TYPE_CHECKING, Any

from gdn._load import find_library, load

library_path = find_library()
_library = load(library_path)

from gdn import ops  # noqa: E402  (the operators exist only now)

if TYPE_CHECKING:
    from gdn import layers, models
    from gdn._fla import register_fla_backend
    from gdn._transformers import patch_transformers, unpatch_transformers
    from gdn.causal_lm import CausalLM

__version__: str = _library.gdn_version().decode()

__all__ = [
    "CausalLM",
    "__version__",
    "layers",
    "library_path",
    "main",
    "models",
    "ops",
    "patch_transformers",
    "register_fla_backend",
    "unpatch_transformers",
]

# What costs time to import, or needs a package that need not be there, is imported when it is first asked for.
_LAZY = {
    "CausalLM": "gdn.causal_lm",
    "patch_transformers": "gdn._transformers",
    "unpatch_transformers": "gdn._transformers",
    "register_fla_backend": "gdn._fla",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in ("layers", "models"):
        value = importlib.import_module(f"gdn.{name}")
    else:
        raise AttributeError(f"module 'gdn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def main(arguments: list[str]) -> int:
    """Runs the program ``gdn`` with these arguments in this process; returns its exit status (0, 1, 2 or 130)."""
    words = [os.fsencode(word) for word in ["gdn", *arguments]]
    argv = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    return int(_library.gdn_main(len(words), argv))
