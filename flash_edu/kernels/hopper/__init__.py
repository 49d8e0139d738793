"""Kernels for Hopper (sm_90a) in Gluon, Triton's lower level: who copies, who multiplies and who waits is written out.

No backend offers them yet: they are compiled in the tests, and have not been run on a GPU.
"""
