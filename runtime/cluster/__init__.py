"""A cluster of Ray: work that goes past one process or one machine.

connection: `connected`, a cluster on this machine or one that runs already; `shared_folder`, which each node must see.
calls: `run_calls`, functions called where there is room, again elsewhere when a worker was lost.
"""
