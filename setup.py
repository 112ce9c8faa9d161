"""Builds the operator library, with a CUDA build of torch the one for CUDA, and gcnet_ext._C, which asks the first.

Every decision is printed; what is missing is told in one sentence that names the fix.
What is compiled, and with which flags, is in gcnet_ext/_build.py. `pip install --no-build-isolation .` builds against the
torch that is installed; an isolated build would fetch one of its own.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent


def load_build():
    spec = importlib.util.spec_from_file_location("_build", ROOT / "gcnet_ext" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(text: str) -> None:
    print(f"gcnet_ext: {text}", flush=True)


def stop(text: str) -> None:
    """One sentence instead of a traceback."""
    sys.stdout.flush()
    print(f"gcnet_ext cannot be built: {text}", file=sys.stderr, flush=True)
    sys.exit(1)


def require_room(megabytes: int) -> None:
    """Everything is written below the checkout, and the compiler's intermediate files to the temporary folder."""
    folder: object = "the temporary folder"
    try:
        for folder in (ROOT, tempfile.gettempdir()):
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(megabytes << 20))
    except OSError as error:
        stop(f"{folder} does not take {megabytes} MB ({error}); make room there, or move the checkout, or set TMPDIR.")


def require_torch(build) -> None:
    if importlib.util.find_spec("torch") is None:
        stop(
            f"torch is not installed in {sys.executable}; install torch >= 2.11 first, "
            "then run pip with --no-build-isolation so that the build sees it."
        )
    import torch

    if not build.torch_is_recent_enough(torch.__version__):
        stop(f"torch {torch.__version__} is too old; the kernels need its stable ABI as of 2.11: pip install 'torch>=2.11'.")
    say(f"torch {torch.__version__}, LibTorch stable ABI, target 2.11: the result runs on every torch >= 2.11")


def require_pybind11() -> str:
    if importlib.util.find_spec("pybind11") is None:
        stop("pybind11 is not installed; pip install pybind11, then run pip with --no-build-isolation.")
    import pybind11

    say(f"pybind11 {pybind11.__version__}")
    return pybind11.get_include()


def require_compiler() -> None:
    if not os.environ.get("CXX", "").strip():
        os.environ.pop("CXX", None)  # set to nothing: torch would run it
    compiler = os.environ.get("CXX", "c++").split()[0]
    path = shutil.which(compiler)
    if path is None:
        stop(f"no C++ compiler: {compiler} is not on the PATH; install g++ >= 11 or clang >= 14, or set CXX.")
    say(f"C++ compiler {path}")


def require_ninja() -> None:
    from torch.utils.cpp_extension import is_ninja_available

    if not is_ninja_available():
        stop("ninja is not installed; pip install ninja.")
    say("ninja compiles in parallel; MAX_JOBS limits how many files at once")


def extensions(build, cuda) -> list[Extension]:
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = build.cxx_flags(cuda)
    pybind11 = require_pybind11()
    say(f"{build.LIBRARY}: {len(build.sources())} sources, flags {' '.join(flags)}")
    libraries = [
        Extension(
            f"gcnet_ext.{build.LIBRARY}",
            sources=build.sources(),
            depends=build.headers(),
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["c10", "torch_cpu"],
            extra_compile_args={"cxx": flags},
            extra_link_args=list(build.LINK_FLAGS),
            language="c++",
        )
    ]
    if cuda.build:
        # BuildExtension reads the architectures from here.
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures
        count, cuda_flags = len(build.cuda_sources()), build.cuda_flags(cuda)
        say(f"{build.CUDA_LIBRARY}: {count} sources for {cuda.architectures}, flags {' '.join(cuda_flags)}")
        libraries.append(
            Extension(
                f"gcnet_ext.{build.CUDA_LIBRARY}",
                sources=build.cuda_sources(),
                depends=build.headers(),
                include_dirs=include_paths("cuda"),
                library_dirs=library_paths("cuda"),
                # cudart comes with torch_cuda: the one that torch has loaded
                libraries=["c10", "torch_cpu", "torch_cuda"],
                extra_compile_args={"cxx": [*flags, "-DUSE_CUDA"], "nvcc": cuda_flags},
                language="c++",
            )
        )
    say(f"{build.MODULE}: {len(build.python_sources())} sources, linked with {build.LIBRARY}.so")
    module = Extension(
        f"gcnet_ext.{build.MODULE}",
        sources=build.python_sources(),
        depends=build.headers(),
        include_dirs=[pybind11],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-Wl,-rpath,$ORIGIN"],  # no shell is asked: the folder that the module is in
        language="c++",
    )
    return [*libraries, module]


def builder(build) -> type:
    """The build_ext of torch, for operator libraries that know nothing of Python and a module that is linked with one."""
    from torch.utils.cpp_extension import BuildExtension

    def is_library(name: str) -> bool:  # distutils asks with and without the package
        return name.rpartition(".")[2] in (build.LIBRARY, build.CUDA_LIBRARY)

    class Builder(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.parallel = None  # one extension after another: the module needs the library; ninja uses the cores

        def get_ext_filename(self, ext_name: str) -> str:
            if is_library(ext_name):  # without the ABI of a Python; no_python_abi_suffix of torch is for all extensions
                return os.path.join(*ext_name.split(".")) + ".so"
            return super().get_ext_filename(ext_name)

        def get_export_symbols(self, ext: Extension) -> list[str]:
            # On some platforms a PyInit_ would be exported, which the libraries do not have.
            return ext.export_symbols if is_library(ext.name) else super().get_export_symbols(ext)

        def build_extension(self, ext: Extension) -> None:
            if ext.name == f"gcnet_ext.{build.MODULE}":
                # The file that was just built, wherever that is: by -l the linker could find another one.
                ext.extra_objects = [self.get_ext_fullpath(f"gcnet_ext.{build.LIBRARY}")]
            super().build_extension(ext)

    return Builder


def main() -> None:
    build = load_build()
    # Metadata alone (an sdist, `pip download`) needs neither torch nor a compiler.
    compiles = any(
        command in sys.argv for command in ("bdist_wheel", "build_ext", "build", "install", "develop", "editable_wheel")
    )
    if not compiles:
        require_room(1)
        setup()
        return
    require_room(64)
    build.find_tools()
    require_torch(build)
    require_compiler()
    require_ninja()
    if build.debug():
        say("GCNET_EXT_DEBUG=1: without optimisation, with debug information")
    try:
        build.require_plain_path(str(ROOT))
        cuda = build.decide_cuda()
    except build.BuildStop as reason:
        stop(str(reason))
    say(cuda.sentence())
    try:
        setup(
            ext_modules=extensions(build, cuda),
            cmdclass={"build_ext": builder(build)},
            # A folder per torch: what one build left behind must not end up in the wheel of another.
            options={"build": {"build_base": f"build/torch-{version('torch')}{'-cuda' if cuda.build else ''}"}},
        )
    except (RuntimeError, subprocess.CalledProcessError) as error:  # of torch, where the compiler fails or does not answer
        require_room(64)
        stop(
            f"{str(error).rstrip('.')}; what the compiler said is above. It must know C++20: install g++ >= 11 or clang >= 14, "
            "or set CXX."
        )


main()
