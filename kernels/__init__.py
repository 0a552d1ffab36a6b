"""Triton kernels of the operations, installed as ``spd_fast.kernels``; one file per operation.

Imported at the first call that a GPU computes, never with spd_fast. docs/kernels.md has the
formulas, bytes, flops and the reasons for the tiles.
"""
