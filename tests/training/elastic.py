"""Two nodes on this machine, each with room for one worker; `lose` and `add` on stdin take one and give it back."""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "dashboard_port": int(sys.argv[1])})
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "lose":
        cluster.remove_node(second, allow_graceful=False)
    elif line.strip() == "add":
        second = cluster.add_node(num_cpus=1)
    print(line.strip(), flush=True)
cluster.shutdown()
