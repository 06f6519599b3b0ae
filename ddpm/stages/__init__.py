"""What a pipeline stage does: files in, files out. A stage knows nothing of who watches it."""
