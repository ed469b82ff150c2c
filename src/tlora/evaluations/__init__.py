"""Our evaluations, one YAML file each, as lm-evaluation-harness reads them.

`tlora list evaluations` lists them: a file's name is the evaluation's, its first line the summary.
Files that begin with an underscore are what several include. `lm_eval --include_path` this folder
runs them without `tlora eval`; see docs/evaluation.md.
"""
