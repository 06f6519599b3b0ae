"""Reads images from where they come from, one module per source, and decodes image files.

The prepared dataset itself is written and read in ddpm.files.
"""
