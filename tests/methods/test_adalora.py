import pytest
import torch
import transformers

from tlora.errors import ConfigError


@pytest.fixture
def trainer(prepared_by, tiny_llama, batches, tmp_path):
    """Make a trainer of AdaLoRA on six rows."""
    rows = [{k: v[i] for k, v in batches[0].items()} for i in range(3)]

    def make(steps=8, epochs=None, **options):
        options = {"init_r": 4, "target_r": 2} | options
        prepared = prepared_by("adalora", tiny_llama(initializer_range=0.2), **options)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            max_steps=-1 if epochs else steps,
            num_train_epochs=epochs or 1,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return prepared, transformers.Trainer(
            model=prepared.model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=prepared.callbacks,
        )

    return make


def kept(model):
    """Return how many entries of each E are not zero."""
    return [int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n]


def test_the_ranks_fall_to_the_budget(trainer):
    prepared, run = trainer(steps=8, tinit=1, tfinal=3)
    counts = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            counts.append(sum(kept(prepared.model)))

    run.add_callback(Count)
    run.train()
    # 14 modules: from 56 ranks to 28 by the cube of what is left of steps 2 to 5.
    assert counts == [56, 39, 31, 28, 28, 28, 28, 28]
    assert len(set(kept(prepared.model))) > 1
    assert prepared.model.peft_config["default"].total_step == 8


def test_pruned_ranks_are_left_out_of_what_is_saved(trainer, tmp_path):
    import peft
    from safetensors.torch import load_file

    prepared, run = trainer()
    run.train()
    prepared.save(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = [len(value) for key, value in tensors.items() if key.endswith("lora_E")]
    assert sorted(ranks) == sorted(kept(prepared.model))
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.orth_reg_weight == 0.5
    # The model goes on with all of them.
    assert prepared.model.peft_config["default"].rank_pattern is None
    assert {len(p) for n, p in prepared.model.named_parameters() if "lora_E" in n} == {4}


def test_what_is_evaluated_is_the_loss_of_the_task(trainer, batches):
    prepared, run = trainer(steps=3)
    run.train()
    scored = run.evaluate()["eval_loss"]
    with torch.no_grad():
        logits = prepared.model.eval()(**{k: v for k, v in batches[0].items() if k != "labels"})
    loss = torch.nn.functional.cross_entropy(
        logits.logits[:, :-1].flatten(0, 1), batches[0]["labels"][:, 1:].flatten()
    )
    assert scored == pytest.approx(loss.item(), rel=1e-4)


def test_the_orthogonality_counts_while_training(trainer):
    with_it, run = trainer(steps=3)
    run.train()
    without, plain = trainer(steps=3, orth_reg_weight=0.0)
    plain.train()
    pairs = zip(with_it.model.parameters(), without.model.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_a_schedule_longer_than_the_run_is_refused_before_the_run(trainer):
    with pytest.raises(ConfigError, match=r"the run has 8 steps, and `tinit` \(5\) and `tfinal`"):
        trainer(steps=8, tinit=5, tfinal=3)
    _, run = trainer(epochs=2, tinit=5)
    with pytest.raises(ConfigError, match="the run has 2 steps"):
        run.train()


def test_the_end_rank_is_below_the_first(prepared_by, tiny_llama):
    with pytest.raises(ConfigError, match="`target_r` is 4; give less than `init_r`"):
        prepared_by("adalora", tiny_llama(), init_r=4, target_r=4)
