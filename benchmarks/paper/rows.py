"""The rows of the paper's tables (arXiv 2604.18124), and the settings of each.

Figures are the paper's, in percent but for MT-Bench's grades of 1 to 10. The preset of a group has
its settings; docs/reproduce.md says what the paper leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass

GLUE = {
    "cola": ("matthews_correlation",),
    "mrpc": ("f1", "accuracy"),
    "qnli": ("accuracy",),
    "qqp": ("f1", "accuracy"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
}
"""Tasks and their metrics. A guess: the paper does not say which, so these are the benchmark's, but
for WNLI; several metrics of a task count by their mean."""

NOT_RUN = ("13B", "Llama-3-8B", "70B")
"""The paper's other models. Their settings are not known to us, so no preset has them."""


@dataclass(frozen=True)
class Group:
    """Rows that are trained and scored alike."""

    preset: str
    columns: dict[str, str]
    """The columns of the paper's table, and the evaluation that each is the mean of."""
    runs_code: bool = False
    """Whether scoring runs programs that the model writes."""
    asked: tuple[str, ...] = ()
    """Further flags of `tlora eval`."""
    percent: bool = True


GROUPS = {
    "math": Group("paper-math", {"GSM8K": "gsm8k-paper", "MATH": "math-paper"}),
    "code": Group("paper-code", {"HumanEval": "humaneval-paper", "MBPP": "mbpp-paper"}, True),
    "chat": Group(
        "paper-chat", {"MT-Bench": "mtbench"}, asked=("--chat_prompt", "instruction"), percent=False
    ),
    "commonsense": Group("paper-commonsense", {"average": "commonsense-paper"}),
    "glue": Group("paper-glue", {"average": ",".join(GLUE)}, asked=("--data.kind", "seq2seq")),
}


@dataclass(frozen=True)
class Row:
    """One row of one table."""

    group: str
    flags: tuple[str, ...]
    """What `tlora train` gets beside the preset."""
    paper: tuple[float, ...]
    """The paper's figures, by the columns of the group."""


# Method: GSM8K, MATH, HumanEval, MBPP, MT-Bench.
_TEN = {
    "full": (52.31, 8.08, 23.20, 38.60, 4.75),
    "lora": (44.80, 6.18, 20.70, 35.70, 4.76),
    "adalora": (43.20, 5.74, 20.70, 36.00, 4.50),
    "loraplus": (48.67, 6.92, 22.60, 35.40, 4.69),
    "dora": (45.10, 5.96, 20.70, 36.00, 4.70),
    "olora": (52.38, 8.22, 22.00, 38.90, 4.99),
    "pissa": (53.44, 7.40, 22.60, 38.60, 5.00),
    "lora-ga": (58.15, 8.66, 23.20, 38.60, 4.97),
    "corda": (54.43, 8.70, 21.30, 39.40, 5.09),
    "tlora": (56.34, 9.08, 23.50, 40.20, 5.17),
}
_COMMONSENSE = {"lora": 83.57, "dora": 83.61, "tlora": 84.21}
_GLUE = {"lora": 83.44, "pissa": 85.24, "tlora": 85.96}
_OWN = {"adalora": ("--adapter.init_r", "128", "--adapter.target_r", "64")}
"""Options of a method that no preset can have."""

_RANDOM = ("--adapter.basis", "random")
_NO_RANKS = ("--adapter.allocate_rank", "false")
_NO_SCALES = ("--adapter.allocate_scale", "false")
# What is left of the method: flags; GSM8K, MATH, HumanEval, MBPP.
_ABLATION: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "lora": (("--method", "lora"), (44.80, 6.18, 20.70, 35.70)),
    "ra": ((*_RANDOM, *_NO_SCALES), (45.33, 5.96, 22.60, 34.40)),
    "sa": ((*_RANDOM, *_NO_RANKS), (45.86, 6.30, 23.20, 35.40)),
    "ra-sa": (_RANDOM, (47.68, 6.50, 22.60, 36.50)),
    "init": ((*_NO_RANKS, *_NO_SCALES), (51.78, 7.74, 22.00, 39.40)),
    "init-ra": (_NO_SCALES, (54.05, 7.68, 22.60, 38.60)),
    "init-sa": (_NO_RANKS, (55.11, 8.36, 22.00, 39.40)),
    "all": ((), (56.34, 9.08, 23.50, 40.20)),
    "a-unfrozen": (("--adapter.freeze_a", "false"), (57.01, 8.78, 23.20, 40.70)),
}


def rows() -> dict[str, Row]:
    """Return every row that can be run, by its name."""
    found = {}
    for group, figures in (("math", slice(2)), ("code", slice(2, 4)), ("chat", slice(4, 5))):
        for method, paper in _TEN.items():
            flags = ("--method", method, *_OWN.get(method, ()))
            found[f"{group}/{method}"] = Row(group, flags, paper[figures])
        if group != "chat":
            for name, (flags, paper) in _ABLATION.items():
                found[f"ablation-{group}/{name}"] = Row(group, flags, paper[figures])
    for group, table in (("commonsense", _COMMONSENSE), ("glue", _GLUE)):
        for method, figure in table.items():
            found[f"{group}/{method}"] = Row(group, ("--method", method), (figure,))
    return found
