"""Reads images from their sources, one module per source, and decodes image files.

`data.source` selects a source. ddpm.files writes and reads the prepared dataset.
"""
