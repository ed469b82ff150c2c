"""Pure tensor functions: statistics -> subspace, ranks, scales. Imports torch and nothing else."""
