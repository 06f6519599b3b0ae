"""Determines the code, parameters and commit of a run, and prevents DVC from recording code or parameters that did not run.

Code that computes a stage's outputs does not belong here.
"""

from ddpm.provenance import code as code  # imported first: hashes the files before other modules are imported
