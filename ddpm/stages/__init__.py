"""The stages of dvc.yaml, one module each.

A stage only reads and writes files. It never imports ddpm.tracking, which shows its outputs in MLflow. Commands that DVC does
not run are in ddpm.tools.
"""

import ddpm.provenance as _provenance  # noqa: F401 - imported first, since it hashes the files before other modules are imported
