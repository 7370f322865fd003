"""DiMR, fast: the model, its configuration and nothing else."""
