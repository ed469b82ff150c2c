import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from support import tiny_bart_classifier
from tlora import AdapterPlan, TLoraConfig
from tlora.adapter.plan import ModulePlan
from tlora.errors import ConfigError, DataError, TLoraError
from tlora.tasks.dataconfig import DataConfig
from tlora.tasks.jsonl import Jsonl
from tlora.training import initialize, train
from tlora.training.arguments import training_arguments
from tlora.training.runconfig import RunConfig
from tlora.training.setup import settle

SHORT = {"max_steps": 1, "save_strategy": "no"}


def test_a_run_leaves_what_the_folder_promises(config, other_sums):
    folder = train.run(config(eval_file=other_sums))
    assert folder.finished
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "adapter",
        "checkpoints",
        "log.jsonl",
        "metrics.json",
        "plan.safetensors",
        "provenance.json",
        "run.json",
    ]
    assert {path.stat().st_mode & 0o777 for path in folder.adapter.iterdir()} == {0o644}
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert json.loads(folder.metrics.read_text())["loss"] > 0
    plan = AdapterPlan.load(folder.plan)
    assert folder.measured()["trainable_parameters"] == plan.trainable_parameters
    assert folder.measured()["seconds"].keys() == {"initialise", "train", "evaluate"}
    assert folder.config()["adapter"]["lora_alpha"] == 8  # defaults are written out
    assert plan.config.task_type == "CAUSAL_LM"


def test_the_adapter_loads_in_plain_peft_and_was_trained(config, llama_folder):
    folder = train.run(config())
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits
    model = peft.PeftModel.from_pretrained(base, folder.adapter)
    assert not torch.equal(model(ids).logits, before)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.adapter)
    assert tokenizer.decode(tokenizer("so 4")["input_ids"]) == "so 4"


def test_the_loss_falls(config, saved, tiny_llama):
    # Wider weights than usual: what the frozen head can say bounds how far the loss can fall.
    model = saved(tiny_llama(initializer_range=0.5))
    trainer = {"max_steps": 25, "save_strategy": "no", "learning_rate": 0.1}
    folder = train.run(config(model=model, trainer=trainer))
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_calibration_sees_the_tokens_and_labels_that_training_sees(config):
    setup = settle(config(seed=3))
    shuffled = setup.train.shuffle(seed=3)
    batches = list(setup.calibration_batches())
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    for index, batch in enumerate(batches):
        expected = setup.collator([shuffled[2 * index], shuffled[2 * index + 1]])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
        assert (batch["labels"][:, 0] == -100).all()  # the prompt is masked


def test_the_trainer_gets_the_same_rows_and_collator(config, tmp_path):
    from tlora.methods.base import Prepared
    from tlora.training.runfolder import RunFolder

    setup = settle(config())
    prepared = Prepared(model=setup.load_model("cpu"))
    arguments = training_arguments(setup, tmp_path / "checkpoints")
    trainer = train.make_trainer(setup, prepared, arguments, RunFolder(tmp_path))
    assert trainer.data_collator is setup.collator
    assert trainer.train_dataset[:] == setup.train[:]
    assert not arguments.bf16
    assert not arguments.gradient_checkpointing
    assert arguments.report_to == []


def test_init_saves_an_adapter_that_changes_nothing_yet(config, llama_folder):
    folder = initialize.run(config())
    assert not folder.checkpoints.exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits
    model = peft.PeftModel.from_pretrained(base, folder.adapter)
    assert torch.equal(model(ids).logits, before)
    plan = AdapterPlan.load(folder.plan)
    state = model.state_dict()
    for name, module in plan.modules.items():
        saved = state[f"base_model.model.{name}.lora_A.default.weight"]
        assert torch.equal(saved, module.lora_A)


def test_init_and_train_plan_the_same_and_warn_of_low_energy_once_each(config, monkeypatch, caplog):
    monkeypatch.setattr(initialize, "LOW_ENERGY", 1.01)
    first = AdapterPlan.load(initialize.run(config("one")).plan)
    second = AdapterPlan.load(train.run(config("two", trainer=SHORT)).plan)
    assert caplog.text.count("is below 1.01") == 2
    for name, module in first.modules.items():
        assert torch.equal(module.lora_A, second.modules[name].lora_A)


@pytest.mark.parametrize(
    ("method", "adapter", "said"),
    [
        (
            "tlora",
            {"r": 200, "allocate_scale": False},
            "scaled by 8/200 = 0.04. To keep the scale at 1, give --alpha 200.",
        ),
        ("lora", {"r": 4}, "scaled by 8/4 = 2. To keep the scale at 1, give --alpha 4."),
        ("lorta", {"r": 16}, "scaled by 16/16 = 1. To keep the scale at 2, give --alpha 32."),
        ("tlora", {"r": 200, "lora_alpha": 8}, ""),
        ("tlora", {"r": 8}, ""),
        ("rslora", {"r": 200}, ""),
        ("gora", {"r": 200}, ""),
        ("xgblora", {"r": 4, "link": "rslora"}, ""),
        ("peft:lora", {"r": 16, "use_rslora": True}, ""),
        ("tlora", {"r": 16, "allocate_scale": True}, ""),
        ("full", {}, ""),
    ],
)
def test_r_without_alpha_is_warned_about(method, adapter, said, caplog):
    initialize.warn_of_scale(RunConfig(model="m", method=method, adapter=adapter))
    assert caplog.text.rstrip().endswith(said) and bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("energies", "fields", "warned"),
    [
        ((0.6, 0.88), {}, True),
        ((0.6, None), {}, True),
        ((0.6, 0.92), {}, False),
        ((None, None), {}, False),
        ((0.2, 0.2), {"freeze_a": False}, False),
        ((0.2, 0.2), {"basis": "random"}, False),
    ],
)
def test_a_frozen_a_that_captures_little_in_the_mean_is_warned_about(
    energies, fields, warned, caplog
):
    config = TLoraConfig(**fields)
    modules = {
        name: ModulePlan(name, 4, 3, 2, 1.0, torch.eye(2, 4), energy, None, "exact")
        for name, energy in zip("ab", energies, strict=True)
    }
    initialize.warn_of_low_energy(config, AdapterPlan(modules, config))
    assert ("double --r and --alpha" in caplog.text) == warned


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": None}, ConfigError, "`model` is missing; give --model"),
        (
            {"model": "no/such-model"},
            ConfigError,
            "there is no folder 'no/such-model', and no model of",
        ),
        ({"task": "gsm9k"}, ConfigError, "no task 'gsm9k'. Did you mean 'gsm8k'"),
        (
            {"trainer": {"learning_rat": 1e-3}},
            ConfigError,
            "no field `learning_rat`. Did you mean 'learning_rate'",
        ),
        (
            {"trainer": {"learning_rate": "fast"}},
            ConfigError,
            "`learning_rate` is 'fast'; give a positive number",
        ),
        ({"trainer": {"max_length": 9}}, ConfigError, "no effect here; give --data.max_length"),
        ({"trainer": {"seed": 9}}, ConfigError, "`seed` has no effect here; give --seed"),
        ({"trainer": {"lr_scheduler_type": "zigzag"}}, ConfigError, "zigzag"),
        (
            {"trainer": {"eval_strategy": "steps", "eval_steps": 2}},
            ConfigError,
            "`eval_strategy` is 'steps', but there are no evaluation rows; give --eval_file",
        ),
        ({"adapter": {"target_modules": ["nowhere"]}}, TLoraError, "nowhere"),
        ({"method": "lora", "adapter": {"target_modules": ["nowhere"]}}, ConfigError, "nowhere"),
        ({"train_file": "none.jsonl"}, DataError, "none.jsonl: there is no such file"),
        ({"train_file": None}, ConfigError, "no training rows; give --train_file"),
        ({"task": "gsm8k"}, DataError, "row 1: column 'question' is missing"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(config, fields, error, message):
    bad = config(**fields)
    with pytest.raises(error) as caught:
        train.run(bad)
    assert message in str(caught.value)
    assert not Path(bad.output_dir).exists()


def test_a_cut_off_model_is_named_before_anything_is_written(config, saved, tiny_llama):
    model = saved(tiny_llama())
    weights = Path(model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"model: .* cannot be loaded: "):
        train.run(config(model=model))
    assert not Path(config().output_dir).exists()


@pytest.fixture
def reviews(tmp_path):
    """Rows to train on and rows to evaluate on."""
    files = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    for file, numbers in zip(files, (range(12), range(12, 24)), strict=True):
        lines = [f"{'good' if n % 2 else 'bad'} {n}\t{n % 2}" for n in numbers]
        file.write_text("sentence\tlabel\n" + "\n".join(lines))
    return dict(zip(("train_file", "eval_file"), map(str, files), strict=True))


def test_classification_trains_a_new_head_and_reports_the_tasks_metric(
    config, saved, tiny_bert_classifier, reviews
):
    model = saved(tiny_bert_classifier())
    folder = train.run(config(model=model, task="sst2", trainer=SHORT, **reviews))
    assert 0 <= json.loads(folder.metrics.read_text())["accuracy"] <= 1
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    heads = {key: value.clone() for key, value in base.named_parameters() if "classifier" in key}
    trained = peft.PeftModel.from_pretrained(base, folder.adapter).state_dict()
    for key, value in heads.items():
        name = key.replace("classifier.", "classifier.modules_to_save.default.")
        assert not torch.equal(trained[f"base_model.model.{name}"], value)


def test_an_encoder_decoder_that_classifies_is_scored_by_its_logits(config, saved, reviews):
    for file in map(Path, reviews.values()):
        # The head reads the state of the token that ends the text, which this tokenizer adds not.
        file.write_text(file.read_text().replace("\t", "</s>\t").replace("ce</s>", "ce"))
    model = saved(tiny_bart_classifier())
    folder = train.run(config(model=model, task="sst2", trainer=SHORT, **reviews))
    found = json.loads(folder.metrics.read_text())["accuracy"]
    setup = settle(config(model=model, task="sst2", **reviews))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    trained = peft.PeftModel.from_pretrained(base, folder.adapter).eval()
    rows = setup.held_out.select_columns(["input_ids", "attention_mask", "labels"])
    batch = setup.collator([*rows])
    with torch.no_grad():
        right = trained(**batch).logits.argmax(dim=-1) == batch["labels"]
    assert found == pytest.approx(right.float().mean().item())


def test_an_evaluation_that_fails_leaves_the_trained_adapter(
    config, other_sums, monkeypatch, whole
):
    def fail(*_):
        raise RuntimeError("the evaluation broke")

    run = config(eval_file=other_sums)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the evaluation broke"):
        patch.setattr(train, "scores", fail)
        train.run(run)
    kept = Path(run.output_dir) / "adapter" / "adapter_model.safetensors"
    assert kept.read_bytes() == whole("tlora")


def test_regression_reports_correlations(config, saved, tiny_bert_classifier, tmp_path):
    rows, others = tmp_path / "rows.csv", tmp_path / "others.csv"
    for file, numbers in ((rows, range(12)), (others, range(12, 24))):
        file.write_text("a,b,score\n" + "\n".join(f"x {n},y {n},{n / 4}" for n in numbers))
    data = DataConfig(
        kind="regression", text_column="a", text_pair_column="b", label_column="score"
    )
    model = saved(tiny_bert_classifier(num_labels=1))
    fields = {"train_file": str(rows), "eval_file": str(others), "data": data, "trainer": SHORT}
    folder = train.run(config(model=model, **fields))
    assert {"loss", "pearson", "spearmanr", "mse"} <= json.loads(folder.metrics.read_text()).keys()


def test_seq2seq_trains(config, saved, tiny_t5, other_sums):
    data = DataConfig(kind="seq2seq")
    run = config(model=saved(tiny_t5()), data=data, eval_file=other_sums, trainer=SHORT)
    folder = train.run(run)
    assert json.loads(folder.metrics.read_text())["loss"] > 0
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["task_type"] == (
        "SEQ_2_SEQ_LM"
    )


@pytest.fixture
def some_of_the_same(config, other_sums, tmp_path):
    """Evaluation rows of which two repeat the prompts of rows 3 and 21 of the training file."""
    trained_on = Path(config().train_file).read_text().splitlines()
    file = tmp_path / "some.jsonl"
    rows = [trained_on[2].upper().replace("PROMPT", "prompt").replace("RESPONSE", "response")]
    file.write_text("\n".join([*rows, trained_on[20], Path(other_sums).read_text()]))
    return str(file)


@pytest.mark.parametrize("stage", [train, initialize])
def test_training_rows_that_repeat_evaluation_rows_are_refused(config, some_of_the_same, stage):
    bad = config(eval_file=some_of_the_same)
    with pytest.raises(
        DataError, match=r"of 24 training rows, 2 repeat a prompt of .* \(rows 3, 21\)"
    ):
        stage.run(bad)
    assert not Path(bad.output_dir).exists()


@pytest.mark.parametrize("stage", [train, initialize])
def test_training_rows_that_repeat_a_named_evaluation_are_refused(config, tmp_path, stage):
    file = tmp_path / "data" / "gsm8k" / "test.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"question": f"{n} + {n}", "answer": f"#### {n + n}"} for n in (30, 2, 20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(guard="gsm8k-paper", guard_dir=str(tmp_path / "data"))
    bad = config(data=data)
    with pytest.raises(DataError, match=r"2 repeat a prompt of gsm8k-paper \(rows 3, 21\)"):
        stage.run(bad)
    assert not Path(bad.output_dir).exists()


def test_they_are_dropped_or_allowed_if_told_so(config, some_of_the_same):
    def rows(overlap):
        setup = settle(config(eval_file=some_of_the_same, data=DataConfig(overlap=overlap)))
        return [tuple(ids) for ids in setup.train["input_ids"]], len(setup.held_out)

    (everything, held_out), (kept, held_out_too) = rows("allow"), rows("drop")
    assert kept == [*everything[:2], *everything[3:20], *everything[21:]]
    assert held_out == held_out_too == 26


def test_every_row_is_made_once(config, sums, other_sums, tmp_path, monkeypatch):
    validation = tmp_path / "validation.jsonl"
    validation.write_text('{"prompt": "new", "response": "1"}\n' * 3)
    made = []
    row = Jsonl.row
    monkeypatch.setattr(Jsonl, "row", lambda *args: made.append(args[2]) or row(*args))
    settle(config(eval_file=other_sums), str(validation))
    files = {sums: 24, other_sums: 24, str(validation): 3}
    assert sorted(made) == sorted(
        f"{file}, row {n + 1}" for file, count in files.items() for n in range(count)
    )
