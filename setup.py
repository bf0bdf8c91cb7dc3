"""Package layout. Everything else about the project stands in pyproject.toml.

Three top-level folders travel inside the package under other names: `kernels/` holds the sources of `vlscale.kernels`
(vlscale/kernels/__init__.py finds them, in a checkout and in a wheel), `configs/` and `launch/train.py` are what
`vlscale demo` starts.
"""

from setuptools import find_namespace_packages, find_packages, setup

below_kernels = [name for name in find_namespace_packages("kernels") if "__pycache__" not in name]

setup(
    packages=[
        *find_packages(include=["vlscale", "vlscale.*"]),
        "vlscale._kernels",
        *(f"vlscale._kernels.{name}" for name in below_kernels),
        "vlscale._configs",
        "vlscale._launch",
    ],
    package_dir={"vlscale._kernels": "kernels", "vlscale._configs": "configs", "vlscale._launch": "launch"},
    package_data={
        "vlscale._kernels": ["csrc/*"],
        "vlscale._configs": ["*.yaml"],
        "vlscale.report": ["templates/*"],
    },
)
