"""Data sets of the package sae-probes: read from its files, and nothing of it is imported.

    data/probing_datasets_MASTER.csv.zst   all data sets, with the kind of task
    data/cleaned_data/N_tag.csv.zst        one data set: columns `prompt` and `target`
    data/OOD data/N_tag_OOD.csv.zst        the same task on other texts

Used are the tasks with two classes ('Binary Classification'), 113 in version 0.4.2. Labels are
numbered in the sorted order of their values, numerically where all values are numbers.

Source: https://github.com/sae-probes/sae-probes, Kantamneni et al. 2025 (arXiv 2502.16681).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from saelab.config import Frozen, digest
from saelab.errors import SettingError, SourceError, nearest
from saelab.runtime.counting import count

#: The distribution, and the command that brings its data without the packages that its code needs.
PACKAGE, VERSION = "sae-probes", "0.4.2"
REMEDY = (
    f"pip install --no-deps {PACKAGE}=={VERSION} brings them, or name the folder that holds "
    "probing_datasets_MASTER.csv.zst as evaluation.sae_probes.path"
)
MASTER, SETS, SHIFTED_SETS = "probing_datasets_MASTER.csv.zst", "cleaned_data", "OOD data"
#: Ending of the name of a data set whose texts are of another kind than those trained on.
SHIFTED = "_OOD"
#: Data sets with fewer characters per text on average are short. Our choice: 47 of the 113 are.
SHORT = 100
#: Longest decompressed file in bytes. Our choice: 8 times the largest of version 0.4.2.
MOST_BYTES = 2**28

Setting = Literal["normal", "scarcity", "imbalance", "label_noise", "ood"]
Baseline = Literal["logistic", "pca", "knn", "mlp"]


class SaeProbesConfig(Frozen):
    """Probing on the data sets of sae-probes, where `evaluation.extra` names it.

    Args:
        definition: 2, or 1 for the package's own way of fitting, for comparison with its numbers.
        path: folder of the data; None for that of the installed package.
        datasets: 'short' (texts of fewer than 100 characters on average), 'all', or names.
        settings: 'normal'; 'scarcity' (2 to 1,024 training rows); 'imbalance' (shares of positives
            from 0.05 to 0.95); 'label_noise' (up to half of the training labels wrong); 'ood' (test
            texts of another kind).
        k_values: numbers of latents that probes may use.
        regularisation: of definition 1: 'l2' or 'l1'.
        l1_solver: of definition 1: 'saga', which often stops before the minimum and gives the
            package's numbers, or 'newton', which finds the minimum in a small part of the time.
        normalisation: of definition 1, before latents are ordered by their mean difference: 'mean'
            (divided by the mean non-zero size) or 'none'.
        baselines: probes on the model's channels, for `sae_probes_channels`.
        draws: of training and test rows in definition 2; definition 1 has the package's one.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"l1_solver"})

    definition: Literal[1, 2] = 2
    path: str | None = None
    datasets: Literal["short", "all"] | tuple[str, ...] = "short"
    settings: tuple[Setting, ...] = Field(default=("normal",), min_length=1)
    k_values: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8, 16, 32, 64, 128), min_length=1)
    regularisation: Literal["l2", "l1"] = "l2"
    l1_solver: Literal["saga", "newton"] = "saga"
    normalisation: Literal["mean", "none"] = "mean"
    baselines: tuple[Baseline, ...] = ("logistic",)
    draws: PositiveInt = 3


@dataclass(frozen=True)
class LabelledPrompts:
    """Texts of one data set.

    Args:
        name: such as '5_hist_fig_ismale'; ends in `SHIFTED` for texts of another kind.
        texts: n prompts.
        labels: n indices into `classes`.
        classes: the two values of `target`, as text.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """16-character content hash."""
        return digest([self.name, self.texts, self.labels, self.classes])


def find_folder(path: str | None = None) -> Path:
    """Returns the folder of the data.

    Args:
        path: names it; None looks for the installed package, which is not imported.

    Raises: SettingError for a folder without the data; SourceError when the package is absent.
    """
    if path is not None:
        folder = Path(path).expanduser()
        if not (folder / MASTER).is_file():
            remedy = f"holds no {MASTER}: name the folder `data` of the package {PACKAGE}"
            raise SettingError("evaluation.sae_probes.path", path, remedy)
        return folder
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    places = [Path(str(file.locate())) for file in files if file.name == MASTER]
    if not (places and places[0].is_file()):
        raise SourceError(f"the data sets of {PACKAGE} are not installed here: {REMEDY}")
    return places[0].parent


def dataset_names(folder: Path) -> list[str]:
    """Returns the names of all data sets with two classes, in the package's order."""
    table = _read_table(folder / MASTER, ("Dataset save name", "Data type"))
    rows = zip(table["Dataset save name"], table["Data type"], strict=True)
    return [Path(name).name.split(".")[0] for name, kind in rows if kind == "Binary Classification"]


def choose_datasets(config: SaeProbesConfig, folder: Path) -> list[LabelledPrompts]:
    """Reads the data sets that the settings name, and their shifted texts for 'ood'.

    Raises: SettingError for an unknown data set; SourceError for a file that can't be read.
    """
    names = dataset_names(folder)
    if isinstance(config.datasets, tuple):
        for name in config.datasets:
            if name not in names:
                remedy = f"is not one of the {count(len(names), 'data set')}{nearest(name, names)}"
                setting = "evaluation.sae_probes.datasets"
                raise SettingError(setting, name, f"{remedy}: name one, 'short' or 'all'")
        names = list(config.datasets)
    prompts = [read_prompts(folder, name) for name in names]
    if config.datasets == "short":
        prompts = [each for each in prompts if is_short(each)]
    if "ood" in config.settings:
        shifted = [each.name + SHIFTED for each in prompts if has_shifted(folder, each.name)]
        prompts += [read_prompts(folder, name) for name in shifted]
    return prompts


def is_short(prompts: LabelledPrompts) -> bool:
    """Returns True if the texts have fewer than `SHORT` characters on average."""
    return sum(map(len, prompts.texts)) < SHORT * len(prompts.texts)


def has_shifted(folder: Path, name: str) -> bool:
    """Returns True if there are texts of another kind for a data set."""
    return (folder / SHIFTED_SETS / f"{name}{SHIFTED}.csv.zst").is_file()


def read_prompts(folder: Path, name: str) -> LabelledPrompts:
    """Reads one data set; a name that ends in `SHIFTED` is one of texts of another kind.

    Raises: SourceError when the file is missing, can't be read or has not two classes.
    """
    place = folder / (SHIFTED_SETS if name.endswith(SHIFTED) else SETS) / f"{name}.csv.zst"
    table = _read_table(place, ("prompt", "target"))
    classes = _sorted_values(set(table["target"]))
    if len(classes) != 2:
        kinds = count(len(classes), "value")
        raise SourceError(f"{place} has {kinds} of `target`, two are needed: leave it out")
    labels = tuple(classes.index(value) for value in table["target"])
    return LabelledPrompts(name, tuple(table["prompt"]), labels, tuple(classes))


def _sorted_values(values: set[str]) -> list[str]:
    """Sorts values as numbers where all are numbers, else as text."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _read_table(path: Path, columns: tuple[str, ...]) -> dict[str, list[str]]:
    """Reads columns of a compressed CSV file as text.

    Raises: SourceError when it is missing, damaged, too large or lacks a column.
    """
    import pyarrow as pa
    from pyarrow import csv

    try:
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
            content = stream.read(MOST_BYTES)
        if len(content) == MOST_BYTES:
            raise SourceError(f"{path} has over {MOST_BYTES:,} bytes of text: leave it out")
        table = csv.read_csv(
            pa.BufferReader(content),
            csv.ReadOptions(use_threads=False, block_size=max(2**20, len(content) + 1)),
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(
                include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
            ),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SourceError(f"{path} can't be read ({reason}): {REMEDY}") from None
    return table.to_pydict()
