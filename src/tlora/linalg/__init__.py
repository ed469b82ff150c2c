"""Pure tensor functions: statistics -> subspace, ranks, scales. Imports torch only."""
