"""Reads images from their sources, one module per source, and decodes image files.

ddpm.files writes and reads the prepared dataset.
"""
