"""The maths of the diffusion process, on torch and numpy: schedules, noise, samplers, likelihood.

Training is in ddpm.training, and networks are in ddpm.networks.
"""
