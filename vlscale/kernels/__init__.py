"""Fused all-pairs losses and retrieval kernels: no N x N matrix is ever stored.

The sources live in the top-level folder `kernels/`, which has no `__init__.py` of its own (a top-level package of that
name would be taken for another library). From a checkout they are found there; in a wheel they are `vlscale._kernels`.
Nothing is imported before it is asked for: `import vlscale.kernels` costs neither torch nor triton.
"""

from importlib import import_module
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_CHECKOUT = _HERE.parents[1]
_FROM_CHECKOUT = (_CHECKOUT / "kernels").is_dir() and (_CHECKOUT / "setup.py").is_file()
__path__ = [str(_CHECKOUT / "kernels" if _FROM_CHECKOUT else _HERE.parent / "_kernels")]

_HOME = {
    "contrastive_loss": "contrastive",
    "sigmoid_loss": "sigmoid",
    "relation_kl_loss": "relation_kl",
    "relation_match_loss": "relation_match",
    "retrieval_ranks": "retrieval",
    "topk_neighbors": "retrieval",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'vlscale.kernels' has no attribute {name!r}; it offers {', '.join(__all__)}")
    function = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
