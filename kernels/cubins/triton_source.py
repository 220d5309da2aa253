"""From a Triton function to PTX, without a GPU."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hybridcomm.kernels.cubins import ptx
from hybridcomm.kernels.cubins.errors import BuildError
from hybridcomm.kernels.device import DeviceKernel

__all__ = ["HIDDEN", "compile_ptx", "function", "version"]

# For sm_100 LLVM packs two fp32 operations into one, and ptxas of CUDA 12.9 then fuses mul.rn.f32x2 with add.rn.f32x2,
# whatever it is told. What is generated for sm_90 has no packed operations and assembles for sm_100 as it is.
_GENERATED_FOR = {100: 90}
HIDDEN = ("global_scratch", "profile_scratch")
"""Pointers that Triton appends to the parameters of every kernel."""


def version() -> str:
    import triton

    return str(triton.__version__)


def function(kernel: DeviceKernel) -> Any:
    """The jit function that a kernel names.

    Raises:
        BuildError: no such function.
    """
    module = importlib.import_module(
        "hybridcomm.kernels." + kernel.source.removesuffix(".py").replace("/", ".")
    )
    found = getattr(module, kernel.function, None)
    if not hasattr(found, "arg_names"):
        raise BuildError(f"{kernel.name}: {kernel.source} has no Triton function {kernel.function}")
    return found


@contextmanager
def _settings() -> Iterator[None]:
    """No line numbers, which hold paths; nothing from or for the user's cache; one ptxas for all architectures."""
    from triton import knobs

    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
    ):
        knobs.cache.dir = folder
        knobs.compilation.always_compile = True
        knobs.compilation.disable_line_info = True
        knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
        yield


@functools.lru_cache(maxsize=1)  # one text serves two architectures
def _generate(fn: Any, kernel: DeviceKernel, target: int) -> tuple[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, types = list(fn.arg_names), {argument.name: argument.type for argument in kernel.arguments}
    aligned = [a.name for a in kernel.arguments if a.aligned and a.type[0] in "*iu"]
    source = ASTSource(
        fn=fn,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=dict(kernel.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    isa = int(ptx.ISA[target].replace(".", ""))
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": False, "ptx_version": isa}
    with _settings():
        made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    metadata = made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(f"{kernel.name}: needs scratch memory, which no launcher gives it")
    return ptx.stripped(made.asm["ptx"]), int(metadata.shared)


def compile_ptx(fn: Any, kernel: DeviceKernel, arch: int) -> tuple[str, int]:
    """The PTX of ``fn`` as ``kernel`` sets it, and the bytes of dynamic shared memory per block.

    Raises:
        BuildError: arguments that are not the function's, scratch memory, or Triton's interpreter being on.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BuildError("TRITON_INTERPRET=1 is set: then Triton compiles nothing")
    names, constants = list(fn.arg_names), dict(kernel.constants)
    if [name for name in names if name not in constants] != [argument.name for argument in kernel.arguments]:
        raise BuildError(f"{kernel.name}: the arguments of {kernel.function} are {', '.join(names)}")
    text, shared = _generate(fn, kernel, _GENERATED_FOR.get(arch, arch))
    return ptx.lower(text, arch), shared
