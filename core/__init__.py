"""What at least two of the ten method packages share, and nothing else."""
