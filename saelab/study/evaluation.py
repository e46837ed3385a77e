"""Settings of the evaluation of a launch's cells."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from saelab.config import Frozen
from saelab.data.probing.sae_probes import SaeProbesConfig
from saelab.data.probing.saebench import Definition, SourceConfig
from saelab.evals import check_extra


class TableConfig(Frozen):
    """A local table of labelled texts for probing.

    Args:
        name: as it is shown.
        path: a folder with train and test files, .parquet or .jsonl.
        text_column, label_column: columns with the texts and with their labels.
    """

    name: str
    path: str
    text_column: str = "text"
    label_column: str = "label"


#: The probing texts that come with the package.
OF_EMBEDDED = "pieces of Python's standard library (package, syntax, comment or docstring)"


class ProbingConfig(Frozen):
    """Sparse probing inside runs.

    Args:
        definition: 2, or 1 for SAEBench 0.6.0's way of drawing and probing, faults included, for
            comparison with published numbers.
        entries: 'embedded' (cut from the standard library), 'saebench' (its eight data sets) or
            'none'; `tables` are added.
        sources: for 'saebench', name of an entry -> where its texts lie, if not on the hub.
        train_size, test_size: texts per class; SAEBench's are 2000 and 500.
        context: tokens per text, BOS included; SAEBench's is 128.
        k_values: numbers of latents that probes may use.
    """

    definition: Definition = 2
    entries: Literal["embedded", "saebench", "none"] = "embedded"
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    tables: tuple[TableConfig, ...] = ()
    train_size: PositiveInt = 500
    test_size: PositiveInt = 250
    context: PositiveInt = 64
    k_values: tuple[PositiveInt, ...] = (1, 2, 5, 10, 20, 50)

    def describe(self, model: str) -> str:
        """Names the texts that probes are trained on, in one line; '' where there are none.

        Args:
            model: path of the language model, which may not read such texts well.
        """
        names = {"embedded": OF_EMBEDDED, "saebench": "SAEBench's data sets", "none": ""}
        tables = [f"the table {table.name}" for table in self.tables]
        texts = [name for name in (names[self.entries], *tables) if name]
        if not texts:
            return ""
        line = f"probes (k latents, or all) are trained on {' and '.join(texts)}"
        if self.entries == "embedded" and model != "embedded":
            line += ", whatever the model was trained on; evaluation.probing names other texts"
        return line


class EvalConfig(Frozen):
    """Evaluation of the cells of a launch.

    Args:
        tokens: held-out tokens for reconstruction.
        calibration_tokens: further held-out tokens, which no metric reads, for the calibration of
            L0 in training (`saelab.study.calibration`); None: as many as `tokens`, 0: none.
        loss_contexts: contexts for loss recovered.
        snapshots: decoders saved over the training of each cell at the plan's L0, evenly spaced in
            log tokens (0: none).
        extra: names of evaluations that a launch runs only when asked; cells at the plan's L0 get
            them, and the controls.
        probing: sparse probing.
        sae_probes: the same on the data sets of sae-probes, where `extra` names it.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"sae_probes"})
    tokens: PositiveInt = 65_024
    calibration_tokens: int | None = Field(default=None, ge=0)
    loss_contexts: PositiveInt = 128
    snapshots: int = Field(default=10, ge=0, le=1000)
    extra: tuple[str, ...] = ()
    probing: ProbingConfig = ProbingConfig()
    sae_probes: SaeProbesConfig = SaeProbesConfig()

    @property
    def asks_sae_probes(self) -> bool:
        """Says whether a launch needs the data sets of sae-probes."""
        return any(name.startswith("sae_probes") for name in self.extra)

    def model_post_init(self, _: Any) -> None:
        check_extra(self.extra)
