"""The plain form that every SAE made elsewhere is read into, and that ours are written from.

    z = W_enc (x - b_dec) + b_enc         or W_enc x + b_enc, where the input is not centred
    f = max(z, 0) 1[z > threshold]        or max(z, 0) at the k largest z of a row
    x_hat = f W_dec + b_dec               x, x_hat in raw activation space

A format is a map between its directory and this form; `Plain.build` makes an `SAE` of it, which all
evaluations take. ReLU has no threshold. A gated SAE (Rajamanoharan et al. 2024a) has this form too,
because its gate and its magnitude share one encoder: with r > 0 and y = W x

    f = max(r y + b_mag, 0) 1[y + b_gate > 0]     is     z = r y + b_mag, threshold b_mag - r b_gate
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from saelab.errors import MismatchError, SaelabError, SettingError, SourceError
from saelab.parts import DEFAULT_LOSSES, activation_of
from saelab.parts.base import Form
from saelab.sae import SAE, SAEConfig
from saelab.storage.atomic import parse_json
from saelab.storage.safetensors_file import read_weights

#: Smallest decoder norm that is divided by; SAELens uses the same.
SMALLEST_NORM = 1e-8
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Plain:
    """An SAE in the form of the module's equation.

    Args:
        W_enc, W_dec: float [d_sae, d_in]; row i belongs to latent i.
        b_enc: [d_sae].
        b_dec: [d_in].
        centre: whether b_dec is subtracted before the encoder.
        threshold: [d_sae]; None is ReLU, or TopK where there is a k.
        k: active latents per row.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    centre: bool = True
    threshold: Tensor | None = None
    k: int | None = None

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def form(self) -> Form:
        """The activation."""
        return Form(threshold=self.threshold, k=self.k)

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE) -> Plain:
        """An SAE of ours, with everything folded that is not of this form.

        Raises: SettingError when a part of the SAE has no such form.
        """
        form = sae.activation.export()
        if form is None:
            part = type(sae.activation).__name__
            raise SettingError("activation", part, "has no export(): other tools can't compute it")
        folded, threshold = sae.folded(), form.threshold
        w_enc, b_enc, w_dec, b_dec = (folded[name] for name in MATRICES)
        if form.affine is not None:
            gain, shift = form.affine
            w_enc, b_enc = w_enc * gain[:, None], b_enc * gain + shift
            threshold = None if threshold is None else threshold * gain + shift
        if threshold is not None:
            threshold = threshold.clamp_min(0).expand(sae.d_sae)
        return cls(w_enc, b_enc, w_dec, b_dec, threshold=threshold, k=form.k)

    @torch.no_grad()
    def build(self) -> SAE:
        """The SAE, float32, in evaluation mode."""
        config = SAEConfig(
            d_sae=self.d_sae,
            centre=self.centre,
            activation=activation_of(self.form),
            losses=DEFAULT_LOSSES[:1],
            controllers=(),
        )
        sae = config.build(self.d_in)
        for name in MATRICES:
            getattr(sae, name).copy_(getattr(self, name))
        sae.activation.load_form(self.form)
        return sae.eval()

    def checked(self, where: Path) -> Plain:
        """Itself.

        Raises: SourceError when shapes do not belong together or a weight is not finite.
        """
        if self.W_enc.dim() != 2:
            raise SourceError(f"{where}: the encoder is no matrix: name an SAE's directory")
        shapes = {"W_enc": (self.d_sae, self.d_in), "W_dec": (self.d_sae, self.d_in)}
        shapes |= {"b_enc": (self.d_sae,), "b_dec": (self.d_in,), "threshold": (self.d_sae,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                found = list(tensor.shape)
                raise SourceError(f"{where}: {name} has the shape {found}, not {list(shape)}")
            if not bool(tensor.isfinite().all()):
                raise SourceError(f"{where}: {name} holds a value that is not finite")
        return self

    # ---- folding what other tools keep apart ---------------------------------------------------

    def with_unit_decoder(self) -> Plain:
        """The same reconstruction with decoder rows of norm 1; the code grows by the old norms.

        A threshold stays as it is: it is taken to be one of the new code.
        """
        norms = torch.linalg.vector_norm(self.W_dec, dim=1).clamp_min(SMALLEST_NORM)
        return replace(
            self,
            W_enc=self.W_enc * norms[:, None],
            b_enc=self.b_enc * norms,
            W_dec=self.W_dec / norms[:, None],
        )

    def of_scaled(self, factor: float) -> Plain:
        """Of an SAE that works on factor * x."""
        return replace(
            self, W_enc=self.W_enc * factor, W_dec=self.W_dec / factor, b_dec=self.b_dec / factor
        )

    def of_whitened(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Plain:
        """Of an SAE that works on (x - mean) matrix; mean [d_in], matrices [d_in, d_in]."""
        w_enc = self.W_enc @ matrix.T
        return replace(
            self,
            W_enc=w_enc,
            b_enc=self.b_enc if self.centre else self.b_enc - w_enc @ mean,
            W_dec=self.W_dec @ inverse,
            b_dec=self.b_dec @ inverse + mean,
        )

    def gated(self, r: Tensor, b_gate: Tensor, b_mag: Tensor) -> Plain:
        """With a gate on the same encoder, see the module's equation; r, b_gate, b_mag [d_sae]."""
        return replace(
            self, W_enc=self.W_enc * r[:, None], b_enc=b_mag, threshold=b_mag - r * b_gate
        )


@dataclass(frozen=True)
class Origin:
    """Where an SAE was trained, as far as it says so; '' where it does not.

    Args:
        model: name or folder.
        hook_name: where its activations were read.
        unlike: what sets it apart from anything that a model gives here, each as the end of a
            sentence about the SAE.
    """

    model: str = ""
    hook_name: str = ""
    unlike: tuple[str, ...] = ()

    def differences(self, model: str, hook_name: str) -> list[str]:
        """What is otherwise in the data that it is evaluated on; '' there is not compared.

        Models are compared by the last part of their names, in lower case.
        """
        found = []
        if self.hook_name and hook_name and self.hook_name != hook_name:
            found.append(f"was trained at {self.hook_name}, but hook_name = {hook_name}")
        if self.model and model and _last(self.model) != _last(model):
            found.append(f"was trained on the model {self.model}, but model.path = {model}")
        return [*found, *(self.unlike if model else ())]

    def check(self, model: str, hook_name: str) -> None:
        """Raises: MismatchError that names both sides of every difference."""
        found = self.differences(model, hook_name)
        if found:
            remedy = "evaluate it where it was trained, or say --allow-mismatch"
            raise MismatchError(f"the SAE {', and '.join(found)}: {remedy}")


def _last(name: str) -> str:
    return PurePosixPath(name.rstrip("/")).name.lower()


@dataclass(frozen=True)
class Loaded:
    """An SAE from a directory.

    Args:
        sae: in evaluation mode.
        origin: where it was trained.
        about: everything that is known of it, as plain data.
    """

    sae: SAE
    origin: Origin
    about: Mapping[str, Any]


# ---- reading files that others wrote -----------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """Raises: SourceError when the file is missing or holds no names and values."""
    try:
        data = parse_json(path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: name the directory of a saved SAE") from None
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror}): name another") from None
    except ValueError as error:
        raise SourceError(f"{path} is no valid JSON ({error}): save the SAE again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds no names and values: save the SAE again")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises: SourceError when the file is missing or is no safetensors file."""
    if not path.is_file():
        raise SourceError(f"{path} does not exist: name the directory of a saved SAE")
    remedy = "pickles and damaged files are not read, so save the SAE again"
    return read_weights(path, SourceError, remedy)


@contextmanager
def understood(folder: Path) -> Iterator[None]:
    """At the border with strangers: whatever their files make a reader stumble on is one sentence.

    Memory that runs out is told as that.
    """
    try:
        yield
    except (SaelabError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        remedy = "save the SAE again"
        raise SourceError(f"{folder} holds what no SAE has ({reason}): {remedy}") from error


@contextmanager
def fitting(where: Path) -> Iterator[None]:
    """Turns torch's complaints about shapes into one sentence."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        remedy = "save the SAE again"
        raise SourceError(f"{where}: shapes do not belong together ({reason}): {remedy}") from None


def take(tensors: Mapping[str, Tensor], names: Sequence[str], where: Path) -> dict[str, Tensor]:
    """The named tensors, which must be all there are.

    Raises: SourceError for a tensor that is missing or not known: it could change the function.
    """
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"holds {unknown[0]!r}, which is not known"
        raise SourceError(f"{where} {what}: an SAE of this kind has {', '.join(names)}")
    return {name: tensors[name] for name in names}
