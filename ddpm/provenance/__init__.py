"""Knows which code, parameters and commit a run has, and that DVC records just these.

The computation of a stage does not belong here.
"""

from ddpm.provenance import code as code  # first: it hashes the files before the other modules are imported
