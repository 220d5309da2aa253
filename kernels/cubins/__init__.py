"""Device kernels built ahead of time: cubins for sm_80, sm_90 and sm_100, and PTX for what comes later.

``load.find`` is what a launcher calls. ``python -m hybridcomm.kernels.cubins build`` (``make cubins``) builds the
artefacts, ``check`` compares them with the sources, ``gate`` says what the machine code is like. Importing this
package loads neither triton nor torch.
"""

from hybridcomm.kernels.cubins.errors import (
    AlignmentError,
    ArchitectureError,
    ArtefactError,
    BuildError,
    DriverError,
    KernelError,
)
from hybridcomm.kernels.cubins.load import Image, find, find_ptx, names

__all__ = [
    "AlignmentError",
    "ArchitectureError",
    "ArtefactError",
    "BuildError",
    "DriverError",
    "Image",
    "KernelError",
    "find",
    "find_ptx",
    "names",
]
