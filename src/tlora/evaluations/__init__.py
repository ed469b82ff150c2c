"""Our evaluations, one lm-evaluation-harness YAML file each.

`tlora list evaluations` lists them: a file's name is the evaluation's, its first line the summary.
Files that begin with an underscore are shared includes. `lm_eval --include_path` with this folder
runs the evaluations without `tlora eval`; see docs/evaluation.md.
"""
