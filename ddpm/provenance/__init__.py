"""Determines the code, the parameters and the commit of a run, and stops DVC from recording any others.

Code that computes a stage's outputs does not belong here.
"""

from ddpm.provenance import code as code  # imported first: hashes the files before other modules are imported
