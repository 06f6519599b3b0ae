"""Knows which code, parameters and commit a run has, and that DVC records just these.

The computation of a stage does not belong here.
"""

from ddpm.provenance import code as code  # first: it notes the files that the modules after it are imported from
