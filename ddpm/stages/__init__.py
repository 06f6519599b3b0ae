"""The stages of dvc.yaml, one module each: files in, files out. A stage knows nothing of who watches it.

A verb that DVC does not run belongs to ddpm.tools.
"""

import ddpm.provenance as _provenance  # noqa: F401 - first: it hashes the files before the other modules are imported
