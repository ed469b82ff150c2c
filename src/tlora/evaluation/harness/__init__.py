"""The paper's evaluations as tasks of lm-evaluation-harness; one file a data set."""
