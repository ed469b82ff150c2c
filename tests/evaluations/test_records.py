"""Records of tasks that lm-evaluation-harness brings itself."""

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from scripted import Scripted, evaluated

from tlora.evaluate import records
from tlora.evaluations import catalog

ROWS = [
    {"q": "2+2=", "options": ["four", "3"], "gold": 0},
    {"q": "3+3=", "options": ["5", "six"], "gold": 1},
]


def standard(rows=ROWS, **config):
    config = {
        "task": "small",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "num_fewshot": 0,
        **config,
    }
    return ConfigurableTask(config=config)


def run(task, reply=None):
    found = evaluated({"small": task}, Scripted(reply))
    return records.records(task, found["samples"]["small"]), records.metrics(
        found["results"]["small"]
    )


def test_of_a_multiple_choice_the_reply_is_the_likeliest_option():
    task = standard(
        output_type="multiple_choice",
        doc_to_choice="options",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "f1"}],
    )
    items, results = run(task)
    assert items == [
        {
            "item": str(number),
            "prompt": row["q"],
            "reply": row["options"][1 - row["gold"]],
            "answer": row["options"][1 - row["gold"]],
            "target": row["options"][row["gold"]],
            # The right option is longer, and so the likelier one by letter.
            "scores": {"acc": 0.0, "acc_norm": 1.0},
        }
        for number, row in enumerate(ROWS)
    ]
    assert results == {"acc": 0.0, "acc_norm": 1.0, "f1": 0.0}
    assert next(iter(results)) == "acc"


def test_options_within_the_prompt_are_told_apart():
    """As in WinoGrande: the option completes the context, and one text follows each."""
    rows = [{"start": "Ann met Bo because", "who": ["Ann", "Bo"], "end": "smiled.", "gold": 1}]
    task = standard(
        rows,
        output_type="multiple_choice",
        doc_to_text=lambda doc: doc["gold"],
        doc_to_choice=lambda doc: [f"{doc['start']} {who}" for who in doc["who"]],
        doc_to_target=lambda doc: doc["end"],
        metric_list=[{"metric": "acc"}],
    )
    (item,), results = run(task)
    assert item["prompt"] == "Ann met Bo because "
    assert item["reply"] == item["answer"] == item["target"] == "Ann met Bo because Bo"
    assert item["scores"] == results == {"acc": 1.0}


def test_several_readings_of_a_reply_are_one_item_with_the_first_ones_answer():
    task = standard(
        output_type="generate_until",
        doc_to_target=lambda doc: doc["options"][doc["gold"]],
        generation_kwargs={"until": ["\n"]},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {
                "name": "strict",
                "filter": [
                    {"function": "regex", "regex_pattern": r"^is (\w+)$"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "loose",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(\w+)$"},
                    {"function": "take_first"},
                ],
            },
        ],
    )
    items, results = run(task, lambda doc: f"It is {doc['options'][doc['gold']]}")
    assert items[1] == {
        "item": "1",
        "prompt": "3+3=",
        "reply": "It is six",
        "answer": "[invalid]",
        "target": "six",
        "scores": {"exact_match,strict": 0.0, "exact_match,loose": 1.0},
    }
    assert results == {"exact_match,strict": 0.0, "exact_match,loose": 1.0}


def test_where_only_a_likelihood_is_asked_for_nothing_is_read():
    task = standard(
        output_type="loglikelihood",
        doc_to_target=lambda doc: " " + doc["options"][0],
        metric_list=[{"metric": "acc"}],
    )
    items, _ = run(task)
    assert items[0] == {
        "item": "0",
        "prompt": "2+2=",
        "reply": "",
        "answer": None,
        "target": " four",
        "scores": {"acc": 0.0},
    }


def test_the_protocol_of_a_standard_task_is_its_name_version_and_shots():
    task = standard(
        output_type="loglikelihood",
        doc_to_target="q",
        metadata={"version": 3.0},
        metric_list=[{"metric": "acc"}],
    )
    said = catalog.protocol(task)
    assert said.startswith("lm-evaluation-harness 0.")
    assert said.endswith("small (version 3.0), 0-shot, loglikelihood")


def test_requests_for_the_options_alone_are_no_options():
    """The mutual information of an option needs its likelihood without the prompt, too."""
    task = standard(
        output_type="multiple_choice",
        doc_to_choice="options",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    )
    items, _ = run(task)
    assert [item["reply"] for item in items] == ["3", "5"]


def test_standard_errors_are_no_scores():
    results = {"alias": "small", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4}
    assert records.metrics(results) == {"acc": 0.5}
