"""PTX executed on the CPU, in numpy, all threads of many CTAs at once, every access checked.

    memory = Memory()
    grad = memory.place(np.ones(4096, np.float32), name="grad")       # an address; initialised
    out = memory.reserve(4096 * 4, name="out")                        # an address; reading it first is an error
    counters = Kernel(ptx).launch(memory, [grad, out, 4096], grid=4, block=128, shared=8192)
    memory.read(out, np.float32), counters.instructions, counters.loaded.nbytes

``conformance`` runs the shipped PTX of a ``DeviceKernel`` by its arguments' names;
``mutate`` plants bugs in one and says which were noticed.

Raises ``PtxError`` (``reason``, PTX line, CTA, thread) for what the text says and this does not know, and for: access
out of bounds, misaligned, or of what nobody wrote (registers included); races in shared memory between barriers and in
global memory between threads or CTAs; barriers and warp instructions under divergence; deadlocks; endless loops;
undefined results. What it takes for granted:
- Memory is ordered by barriers alone. CTAs are never ordered, so a flag passed between two of one launch is a race.
- Atomics do not race with each other; they do with plain loads and stores.
- One instruction may store one value twice to a place, from threads of one CTA: compilers do so.
- An exited thread does not arrive at a barrier.
"""

from tests.ptx.errors import PtxError, Reason
from tests.ptx.launch import Counters, Kernel
from tests.ptx.memory import Memory

__all__ = ["Counters", "Kernel", "Memory", "PtxError", "Reason"]
