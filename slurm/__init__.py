"""Batch files for Slurm, for any launcher; README.md explains them."""
