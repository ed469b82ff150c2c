"""`peft:TYPE` on the command line, in files, in comparisons and through whole runs."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml

import tlora.demo
from tlora.compare.compareconfig import CompareConfig
from tlora.errors import ConfigError
from tlora.registry import METHODS
from tlora.training import initialize, train
from tlora.training.runconfig import RunConfig, TokensConfig

BASE = str(Path(tlora.demo.__file__).parent / "base")


@pytest.fixture
def config(tmp_path):
    """Make a short run of a method on the base that the package ships."""
    rows = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{n} + {n} =", "response": f" {n + n}"} for n in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-2}
    trainer |= {"disable_tqdm": True, "use_cpu": True}

    def make(kind, **given):
        return RunConfig(
            model=BASE,
            train_file=str(rows),
            output_dir=str(tmp_path / "run"),
            method=f"peft:{kind}",
            trainer=trainer,
            **given,
        )

    return make


def outputs(model):
    ids = torch.arange(5, 15).reshape(1, -1)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(BASE)


def test_the_list_has_one_row_for_all_types(tlora):
    code, out, _ = tlora("list", "methods")
    assert code == 0
    assert len([line for line in out.splitlines() if line.startswith("peft:")]) == 1
    assert not any(":" in name for name in METHODS.names())


def test_the_help_shows_pefts_fields_with_pefts_help(tlora):
    code, out, _ = tlora("train", "--method", "peft:vera", "--help", "all")
    assert code == 0
    assert "--adapter.d_initial" in out
    assert "Initial init value for d vector. (default: 0.1)" in " ".join(out.split())


def test_options_come_from_flags_over_files(tlora, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("method: peft:vera\nadapter: {r: 4, d_initial: 0.2}\n")
    code, out, err = tlora("train", file, "--adapter.d_initial", "0.3", "--print_config")
    assert code == 0, err
    resolved = yaml.safe_load(out)["adapter"]
    assert (resolved["r"], resolved["d_initial"], resolved["projection_prng_key"]) == (4, 0.3, 0)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "peft:veera"], "PEFT has no type 'veera'. Did you mean 'vera'?"),
        (["--method", "peft:"], "PEFT has no type ''. It has "),
        (["--method", "pef:vera"], "there is no method 'pef:vera'"),
        (["--method", "peft:vera", "--adapter.d_init", "1"], "Did you mean 'd_initial'?"),
        (["--method", "peft:vera", "--adapter.r", "many"], "`r` is 'many'; give a whole number"),
        (["--method", "peft:poly"], "`peft:poly` is refused: each of its batches"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tlora, flags, said):
    code, _, err = tlora("train", *flags, "--print_config")
    assert code != 0
    assert said in err


def test_a_comparison_gives_each_method_the_common_options_that_it_has():
    compared = CompareConfig(
        model=BASE,
        train_file="rows.jsonl",
        methods=["lora", {"name": "peft:vera", "adapter": {"d_initial": 0.2}}, "peft:ia3"],
        adapter={"r": 4},
        learning_rates=[1e-3],
    )
    lora, vera, ia3 = compared.entries()
    assert lora.adapter == {"r": 4}
    assert vera.adapter == {"r": 4, "d_initial": 0.2}
    assert ia3.adapter == {}
    with pytest.raises(ConfigError, match="there is no option `d_initials`"):
        CompareConfig(
            model=BASE,
            train_file="rows.jsonl",
            methods=[{"name": "peft:vera", "adapter": {"d_initials": 0.2}}],
            learning_rates=[1e-3],
        )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vera", {"r": 4}),
        ("prefix_tuning", {"num_virtual_tokens": 4}),
        ("adaption_prompt", {"adapter_len": 4, "adapter_layers": 1}),
    ],
)
def test_a_run_leaves_an_adapter_that_peft_reads(config, kind, options):
    folder = train.run(config(kind, adapter=options))
    again = peft.PeftModel.from_pretrained(base(), folder.adapter)
    assert again.peft_config["default"].peft_type.value.lower() == kind
    assert not torch.equal(outputs(again), outputs(base()))
    card = (folder.adapter / "README.md").read_text()
    assert ("merge_and_unload" in card) == (kind == "vera")
    assert "is a whole model" not in card


def test_init_leaves_an_adapter_that_changes_nothing(config):
    folder = initialize.run(config("oft", adapter={"oft_block_size": 8}))
    again = peft.PeftModel.from_pretrained(base(), folder.adapter)
    torch.testing.assert_close(outputs(again), outputs(base()), rtol=1e-5, atol=1e-5)


def test_a_dry_run_takes_the_options_that_it_knows(config):
    from tlora.training import dryrun

    found = dryrun.run(config("oft", adapter={"bias": "oft_only", "target_modules": ["q_proj"]}))
    assert {target.name.rpartition(".")[2] for target in found.targets} == {"q_proj"}


def test_tokens_are_not_added_for_a_method_that_does_not_train_them(config):
    run = config("vera", adapter={"r": 4}, tokens=TokensConfig(add=["<a>"]))
    with pytest.raises(ConfigError, match=r"`tokens\.add` needs a method that trains rows"):
        initialize.run(run)


def test_a_type_that_skips_every_module_is_refused(prepared_by, tiny_gpt2):
    with pytest.raises(ConfigError, match="OSFConfig adapts no module of GPT2LMHeadModel"):
        prepared_by("peft:osf", tiny_gpt2())


def test_a_type_that_does_not_know_the_architecture_is_refused(prepared_by, tiny_bert_classifier):
    with pytest.raises(ConfigError, match="Please set `target_modules` explicitly"):
        prepared_by("peft:shadow", tiny_bert_classifier(), task_type="SEQ_CLS")
