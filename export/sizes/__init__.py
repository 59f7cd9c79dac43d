"""The sizes of a captured graph: which dims vary, their names, their ranges, and a check at other sizes.

dims: name_dims, the names of dynamic dims.
measured_dims: measured_dims, which dims of a model's inputs vary, and which only together.
ranges: size_limits, the sizes for which a captured graph is valid.
second_sizes: check_second_sizes, which runs the captured graph and the model at other sizes than the captured ones.
captured_program: GraphRun, a captured program that runs in PyTorch at any sizes; table_ends, the ends of its tables.
"""
