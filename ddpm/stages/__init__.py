"""What a pipeline stage does: files in, files out. A stage knows nothing of who watches it."""

from ddpm.stages import code as code  # first: it notes the files that the modules after it are imported from
