"""A disk that fills up while a run writes: a sentence, and the last good state."""

import builtins
import errno
from pathlib import Path

import pytest
import safetensors.torch
import yaml

from tlora import cli
from tlora.training.runfolder import RunFolder

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """Return a way to refuse every file with a word in its path while a command runs."""

    def fill(word, *command):
        opened, saved = builtins.open, safetensors.torch.save_file

        def refusing_open(file, mode="r", *args, **named):
            if word in str(file) and set(mode) & set("wax+"):
                raise FULL
            return opened(file, mode, *args, **named)

        def refusing_save(tensors, file, *args, **named):
            if word in str(file):
                raise safetensors.SafetensorError(f"Error while serializing: I/O error: {FULL}")
            return saved(tensors, file, *args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", refusing_open)
            patch.setattr("io.open", refusing_open)
            patch.setattr(safetensors.torch, "save_file", refusing_save)
            return cli.main([*command])

    return fill


@pytest.mark.parametrize("place", ["plan.safetensors", "checkpoint-4", ".adapter."])
def test_the_same_command_ends_as_if_the_disk_had_never_been_full(
    config, whole, full, capsys, place
):
    run = config()
    file = Path(run.output_dir).with_name("run.yaml")
    file.write_text(yaml.safe_dump(run.to_dict()))
    command = ["train", str(file), "--preset", "paper-rule"]
    assert full(place, *command) == 1
    err = capsys.readouterr().err
    assert "tlora: no space left on the disk" in err
    assert "Traceback" not in err
    folder = RunFolder(run.output_dir)
    assert not folder.finished
    assert cli.main(command) == 0
    assert (folder.adapter / "adapter_model.safetensors").read_bytes() == whole("tlora")
