"""What an error looks like below a progress bar."""

from __future__ import annotations

import sys

from tqdm import tqdm

from tlora.cli import main


def test_an_error_has_a_line_of_its_own_below_a_progress_bar(capsys):
    with tqdm(total=3, file=sys.stderr) as bar:
        bar.update()
        bar.refresh()
        assert main(["trian"]) == 2
    before, _, after = capsys.readouterr().err.partition("tlora: command line: there is no verb")
    assert before.endswith("\r")
    assert before.replace("\r", "\n").splitlines()[-1].strip() == ""
    assert after.partition("\n")[0].endswith("Did you mean 'train'?")
