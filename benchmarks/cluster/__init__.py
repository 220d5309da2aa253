"""A virtual cluster on one machine: nodes are namespaces, links are shaped, bytes are counted by the kernel.

    with Cluster(nodes=2, per_node=2, rate="1gbit") as cluster:
        result = cluster.run([sys.executable, "job.py"])
        print(result.tx_bytes)

or ``python -m benchmarks.cluster --nodes 2 --per-node 2 --rate 1gbit -- COMMAND...``. Needs root, iproute2:
``skip_reason()`` says what is missing.
"""

from benchmarks.cluster.cluster import Cluster, RateCheck
from benchmarks.cluster.errors import ClusterError, RankFailure, RateError
from benchmarks.cluster.namespace import skip_reason
from benchmarks.cluster.ranks import Result
from benchmarks.cluster.shape import Shape, parse_rate

__all__ = [
    "Cluster",
    "ClusterError",
    "RankFailure",
    "RateCheck",
    "RateError",
    "Result",
    "Shape",
    "parse_rate",
    "skip_reason",
]
