"""Tables and pictures from the committed rows of `benchmarks/results/`, and from nothing else."""
