"""Package layout. Everything else about the project stands in pyproject.toml.

Four top-level folders travel inside the package under other names: `kernels/` holds the sources of `vlscale.kernels`
(vlscale/kernels/__init__.py finds them, in a checkout and in a wheel), `configs/` and `launch/train.py` are what
`vlscale demo` starts, `benchmarks/` what `vlscale bench` runs. With VLSCALE_BUILD_CUDA="80 90a 100" in the environment
the CUDA library of kernels/csrc is built for those compute capabilities and packed as well, which makes the wheel one
of this platform; nothing else is compiled.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, find_namespace_packages, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

given = importlib.util.spec_from_file_location("kernels_build", Path(__file__).with_name("kernels") / "build.py")
cuda = importlib.util.module_from_spec(given)
given.loader.exec_module(cuda)
archs = cuda.parse_archs(os.environ[cuda.AHEAD]) if os.environ.get(cuda.AHEAD) else []


class BuildWithCuda(build_py):
    def run(self) -> None:
        super().run()
        if archs and not self.editable_mode:
            cuda.compile_library(Path(self.build_lib, "vlscale", "_kernels", "csrc", cuda.ahead_name(archs)), archs)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(archs)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library knows its platform, but no Python."""
        return ("py3", "none", super().get_tag()[2]) if archs else super().get_tag()


below_kernels = [name for name in find_namespace_packages("kernels") if "__pycache__" not in name]

setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithCuda, "bdist_wheel": PlatformWheel},
    packages=[
        *find_packages(include=["vlscale", "vlscale.*"]),
        "vlscale._kernels",
        *(f"vlscale._kernels.{name}" for name in below_kernels),
        "vlscale._configs",
        "vlscale._launch",
        "vlscale._benchmarks",
    ],
    package_dir={f"vlscale._{name}": name for name in ("kernels", "configs", "launch", "benchmarks")},
    package_data={
        "vlscale._kernels": ["csrc/*"],
        "vlscale._configs": ["*.yaml"],
        "vlscale._benchmarks": ["*.yaml", "*.sh", "method/*"],
        "vlscale.report": ["templates/*"],
    },
)
