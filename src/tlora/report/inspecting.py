"""`tlora inspect`: show the contents of a folder on the screen and as a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tlora import extras
from tlora.adapter.savedconfig import CONFIG
from tlora.compare.comparefolder import CompareFolder
from tlora.errors import ArtifactError, ConfigError
from tlora.evaluate.evalfolder import EvalFolder
from tlora.files import no_adapter, refuse_missing

if TYPE_CHECKING:
    from tlora.report.adapters import Inspection

Tell = Callable[[str], None]


def run(
    tell: Tell, *, path: str, by: str = "module", against: str | None, output: str | None
) -> None:
    """Show the comparison, evaluation, plan or adapter in a folder.

    Args:
        tell: prints a line.
        path: the folder, or a plan.safetensors.
        by: what each table line covers: a module, layer or projection.
        against: a method of a comparison, or the folder of another adapter.
        output: HTML file of an adapter's page.

    Raises:
        TLoraError: there is nothing to show, or a file is damaged.
    """
    if CompareFolder(path).exists:
        extras.require("compare", where="inspect")
        show_comparison(CompareFolder(path), tell, against)
        return
    folder = Path(path)
    file = folder / "plan.safetensors" if folder.is_dir() else folder
    adapter = next((p for p in (folder, folder / "adapter") if (p / CONFIG).is_file()), None)
    if adapter and (adapter == folder or against or output or not file.is_file()):
        _show_adapter(adapter, tell, by, against, output)
        return
    if against is not None:
        raise ConfigError(
            f"{path} contains no comparison and no adapter; remove --against.", "against"
        )
    if EvalFolder(path).exists:
        extras.require("compare", where="inspect")
        show_evaluation(EvalFolder(path), tell)
        return
    if folder.is_dir() and not file.is_file():
        raise ArtifactError(
            f"{path}: there is no plan.safetensors and no adapter; give the folder of a run,"
            " adapter, comparison or evaluation."
        )
    if not file.exists():
        raise ConfigError(no_adapter(path), "path")
    refuse_missing(file)
    _show_plan(file, tell, by)
    if adapter:
        tell(f"run `tlora inspect {adapter}` to see the trained adapter.")


def show_comparison(folder: CompareFolder, tell: Tell, against: str | None = None) -> None:
    """Write a comparison's page and tables and print them, or the differences to one method."""
    from tlora.report import comparison, plaintext

    results = comparison.read(folder)
    if against is not None:
        tell(plaintext.against(results, against))
        return
    page, text, table = plaintext.write(results, folder.path)
    tell(f"\n{plaintext.markdown(results)}\npage: {page}\ntables: {text}, {table}")


def show_evaluation(folder: EvalFolder, tell: Tell) -> None:
    """Write an evaluation's page and table, and print it."""
    from tlora.report import evaluation

    report = evaluation.write(folder.path)
    tell(f"\n{report.text}\npage: {report.page}\ntable: {report.markdown}")


def _show_plan(file: Path, tell: Tell, by: str) -> None:
    from tlora.adapter.plan import AdapterPlan
    from tlora.report.heatmap import save
    from tlora.report.tables import show

    plan = AdapterPlan.load(file)
    show(plan, by=by)
    page = save(plan, file.with_name("plan.html"))
    tell(f"\n{plan.summary()}\npage: {page}")


def _show_adapter(
    folder: Path, tell: Tell, by: str, against: str | None, output: str | None
) -> None:
    from rich.console import Console

    from tlora.adapter.saved import read_lora
    from tlora.exporters.export import adapter_folder
    from tlora.report import adapters
    from tlora.report.parameters import norms_table
    from tlora.training.runfolder import RunFolder

    lora = read_lora(folder)
    run = RunFolder(folder.absolute().parent)
    of_a_run = run.exists and run.adapter == folder.absolute()
    found: Inspection[adapters.Update] | Inspection[adapters.Change] = (
        adapters.inspect(lora, run.checkpoints if of_a_run else None)
        if against is None
        else adapters.against(lora, read_lora(adapter_folder(against)))
    )
    Console().print(adapters.table(found, by))
    if found.training:
        Console().print(norms_table(found.training))
    place = folder.absolute()
    page = Path(output or place.with_name(f"{place.name}.inspect.html"))
    page, numbers = adapters.write(found, page)
    tell(f"\n{found.summary}\npage: {page}\nnumbers: {numbers}")
