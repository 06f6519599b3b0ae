"""Commands of `ddpm` that are not DVC stages, such as `ddpm generate`, `ddpm import-diffusers` and `ddpm gc`.

Commands that DVC runs are in ddpm.stages.
"""
