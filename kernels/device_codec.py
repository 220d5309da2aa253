"""One face for all shipped device kernels: a spec's encode, reencode and decode_add, whoever has written them.

topk, gtopk and powersgd are CUDA C++ (`cuda.launch`, `cuda.launch_powersgd`), the others Triton's (`triton.launch`,
`triton.launch_records`) as they were built ahead of time, which needs no Triton; calls for which nothing was built
(other settings, a decay) go to Triton's own compiler, which has nothing for gtopk and powersgd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hybridcomm.kernels.payload import Codec

if TYPE_CHECKING:
    from hybridcomm.kernels.cubins.launcher import Run
    from hybridcomm.kernels.triton.family import Family

__all__ = ["DeviceCodec", "device_codec", "jit_codec"]


@dataclass(frozen=True, kw_only=True)
class DeviceCodec:
    """``encode(grad, e_in, e_out, payload, digest, ...)``, ``decode_add(payloads, out, weight, digest, ...)`` and, None
    for gtopk, ``reencode(payloads, numel, e_in, e_out, payload, digest, ...)``: as in `triton.launch`."""

    spec: Any
    encode: Callable[..., None]
    decode_add: Callable[..., None]
    reencode: Callable[..., None] | None


def device_codec(spec: Any, run: Run, *, jit: bool = True) -> DeviceCodec:
    """The device kernels of ``spec``, launched by ``run``. ``jit``: Triton may compile what was not built.

    Raises:
        NotImplementedError: the codec has no device kernels.
    """
    from hybridcomm.kernels.cuda import gtopk, launch, launch_powersgd, powersgd, topk

    if spec in (topk.SPEC, gtopk.SPEC):
        anew = partial(launch.reencode, run, spec) if spec == topk.SPEC else None
        return DeviceCodec(
            spec=spec,
            encode=partial(launch.encode, run, spec),
            decode_add=partial(launch.decode_add, run, spec),
            reencode=anew,
        )
    if spec in powersgd.SPECS:
        return DeviceCodec(
            spec=spec,
            encode=partial(launch_powersgd.encode, run, spec),
            decode_add=partial(launch_powersgd.decode_add, run, spec),
            reencode=partial(launch_powersgd.reencode, run, spec),
        )
    from hybridcomm.kernels.cubins.launcher import family_of
    from hybridcomm.kernels.triton import declared

    module = declared(spec)
    return _of_family(spec, family_of(module.FAMILY, module.KERNELS, run, otherwise=jit))


def jit_codec(spec: Any) -> DeviceCodec:
    """The kernels of ``spec`` that Triton compiles when they are first run, for any architecture.

    Raises:
        NotImplementedError: the codec has none in Triton.
    """
    from hybridcomm.kernels.triton import declared

    return _of_family(spec, declared(spec).FAMILY)


def _of_family(spec: Any, family: Family) -> DeviceCodec:
    from hybridcomm.kernels.triton import launch, launch_records

    host: Any = launch_records if spec.codec in (Codec.TOPK, Codec.GTOP1, Codec.RANDK) else launch
    return DeviceCodec(
        spec=spec,
        encode=partial(host.encode, family, spec),
        decode_add=partial(host.decode_add, family, spec),
        reencode=partial(host.reencode, family, spec),
    )
