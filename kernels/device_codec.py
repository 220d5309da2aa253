"""One face for all shipped device kernels: a spec's encode, reencode and decode_add, whoever has written them.

topk, gtopk and powersgd are CUDA C++ (`cuda.launch`, `cuda.launch_powersgd`), the others Triton's (`triton.codes`,
`triton.gtop1`) as they were built ahead of time; calls for which nothing was built (other settings, a decay) go to
Triton's own compiler, which has nothing for gtopk and powersgd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hybridcomm.kernels.payload import Codec

if TYPE_CHECKING:
    from hybridcomm.kernels.cubins.launcher import Run

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
    from hybridcomm.kernels import triton
    from hybridcomm.kernels.cubins.launcher import family_of
    from hybridcomm.kernels.triton import launch as codes_host
    from hybridcomm.kernels.triton import records as records_host

    module = triton.encoder(spec)
    family = family_of(module.FAMILY, module.KERNELS, run, otherwise=jit)
    host = records_host if spec.codec in (Codec.TOPK, Codec.GTOP1, Codec.RANDK) else codes_host
    return DeviceCodec(
        spec=spec,
        encode=partial(host.encode, family, spec),
        decode_add=partial(host.decode_add, family, spec),
        reencode=partial(host.reencode, family, spec),
    )


def jit_codec(spec: Any) -> DeviceCodec:
    """The kernels of ``spec`` that Triton compiles when they are first run, for any architecture.

    Raises:
        NotImplementedError: the codec has none in Triton.
    """
    from hybridcomm.kernels import triton

    module = triton.encoder(spec)
    return DeviceCodec(
        spec=spec,
        encode=partial(module.encode, spec),
        decode_add=partial(module.decode_add, spec),
        reencode=partial(module.reencode, spec),
    )
