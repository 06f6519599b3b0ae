"""The maths of the diffusion process, on torch and numpy: schedules, noise, samplers, likelihood.

How a network is trained stands in ddpm.training; networks themselves stand in ddpm.networks.
"""
