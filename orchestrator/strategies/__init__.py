"""Everything that spans several devices, behind one interface.

The interface (`base`) is implemented on DTensor and FSDP2 (`dtensor`) and on torch_xla SPMD (`xla`). Model,
optimizer, data and checkpoints never ask which one runs.
"""
