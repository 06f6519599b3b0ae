"""The stages of dvc.yaml, one module each. A stage reads and writes files, and does not depend on the program that shows it.

A command that DVC does not run belongs to ddpm.tools.
"""

import ddpm.provenance as _provenance  # noqa: F401 - imported first, since it hashes the files before other modules are imported
