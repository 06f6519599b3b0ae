"""The networks that can be trained, one module each, and kernels that make them fast on a CPU.

A network is a function of (x_t, t). Losses and schedules do not belong here.
"""
