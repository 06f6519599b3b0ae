"""Determines the code, parameters and commit of a run, and lets DVC record only these.

The computation of a stage does not belong here.
"""

from ddpm.provenance import code as code  # imported first: hashes the files before other modules are imported
