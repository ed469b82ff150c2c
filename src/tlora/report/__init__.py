"""Charts, tables and pages of plans, adapters, comparisons and evaluations."""
