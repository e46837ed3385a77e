"""The plain form into which SAEs of other tools are read, and from which ours are written.

    z = W_enc (x - b_dec) + b_enc         or W_enc x + b_enc, if the input is not centred
    f = max(z, 0) 1[z > threshold]        or max(z, 0) at the k largest z of a row, or z at the k
                                          largest |z|
    x_hat = f W_dec + b_dec               x, x_hat in raw activation space

A format maps its directories to this form; `Plain.build` turns it into an `SAE`, which all
evaluations accept. ReLU has no threshold. A gated SAE (Rajamanoharan et al. 2024a) has this form
too, because its gate and its magnitude share one encoder: with r > 0 and y = W x

    f = max(r y + b_mag, 0) 1[y + b_gate > 0]     is     z = r y + b_mag, threshold b_mag - r b_gate

A matching pursuit has no encoder: f is that of (x - b_dec) over the rows of W_dec; W_enc equals
W_dec, and b_enc is 0. Its code is in the units of x, while an SAE that was trained here has that of
rows divided by c (`saelab.sae`): the plain form's code is c times as large, its x_hat the same.

A transcoder reconstructs other activations y than it reads; its b_dec is of y, and nothing is
subtracted from x:

    z = W_enc x + b_enc,   y_hat = f W_dec + b_dec + W_skip x        W_skip of a skip transcoder
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError, SettingError, SourceError
from saelab.origin import Origin
from saelab.parts import DEFAULT_LOSSES, activation_of
from saelab.parts.base import Form, Pursuit, Refusal
from saelab.row_norm import RowNorm
from saelab.runtime.counting import count
from saelab.sae import SAE, SAEConfig
from saelab.storage.atomic import parse_json
from saelab.storage.safetensors_file import read_weights

#: Smallest decoder norm that is divided by; SAELens uses the same.
SMALLEST_NORM = 1e-8
MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Plain:
    """An SAE in the form of this module's equation.

    Args:
        W_enc, W_dec: float [d_sae, d_in] and [d_sae, d_out]; row i belongs to latent i.
        b_enc: [d_sae].
        b_dec: [d_out].
        centre: whether b_dec is subtracted before the encoder.
        threshold: [d_sae]; None for ReLU, and for TopK, which has a k.
        k: active latents per row.
        row_norm: normalisation of each row by its own statistics; then x and x_hat of the equation
            are normalised rows, see `saelab.row_norm` and `SAE.complete`.
        signed: whether these are the k largest |z|, with their signs.
        target: whether other activations than the input are reconstructed; d_out is d_in otherwise.
        W_skip: [d_out, d_in]; None without a skip connection.
        targets: widths of several targets of one code, whose sum is d_out; () for one target.
        pursuit: steps of a matching pursuit; None for an SAE with an encoder.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    centre: bool = True
    threshold: Tensor | None = None
    k: int | None = None
    row_norm: RowNorm = "none"
    signed: bool = False
    target: bool = False
    W_skip: Tensor | None = None
    targets: tuple[int, ...] = ()
    pursuit: Pursuit | None = None

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.W_dec.shape[-1] if self.target else self.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_enc.shape[1]

    @property
    def form(self) -> Form:
        """The activation."""
        return Form(threshold=self.threshold, k=self.k, signed=self.signed, pursuit=self.pursuit)

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE) -> Plain:
        """Converts an SAE; folds everything that does not have this form.

        Raises: SettingError when a part of the SAE can't be folded.
        """
        form = sae.activation.export()
        if isinstance(form, Refusal):
            part = type(sae.activation).__name__
            raise SettingError("activation", part, f"can't be written: it {form.reason}")
        if form.pursuit is not None:
            return cls._of_pursuit(sae, form.pursuit)
        folded, threshold = sae.fold(), form.threshold
        w_enc, b_enc, w_dec, b_dec = (folded[name] for name in MATRICES)
        if form.affine is not None:
            gain, shift = form.affine
            w_enc, b_enc = w_enc * gain[:, None], b_enc * gain + shift
            threshold = None if threshold is None else threshold * gain + shift
        if threshold is not None:
            threshold = threshold.clamp_min(0).expand(sae.d_sae)
        plain = cls(w_enc, b_enc, w_dec, b_dec, threshold=threshold, k=form.k)
        plain = replace(plain, row_norm=sae.row_norm, signed=form.signed)
        if not sae.has_target:
            return plain
        targets = sae.dims.targets if len(sae.dims.targets) > 1 else ()
        skip = folded.get("W_skip")
        return replace(plain, centre=False, target=True, W_skip=skip, targets=targets)

    @classmethod
    def _of_pursuit(cls, sae: SAE, pursuit: Pursuit) -> Plain:
        """Converts a matching pursuit, see this module's equation."""
        threshold = pursuit.residual_threshold * float(sae.scale)
        rows, b_enc = sae.W_dec.clone(), torch.zeros_like(sae.b_enc)
        plain = cls(rows, b_enc, rows, sae.b_dec * sae.scale, row_norm=sae.row_norm)
        return replace(plain, pursuit=replace(pursuit, residual_threshold=threshold))

    @torch.no_grad()
    def build(self) -> SAE:
        """Builds the SAE, float32, in evaluation mode."""
        config = SAEConfig(
            d_sae=self.d_sae,
            centre=self.centre,
            activation=activation_of(self.form),
            losses=DEFAULT_LOSSES[:1],
            controllers=(),
            skip=self.W_skip is not None,
            tied=self.pursuit is not None,
            encoder_bias=self.pursuit is None,
        )
        sae = config.build(self.d_in, d_out=(self.targets or self.d_out) if self.target else None)
        for name in (*MATRICES, *(["W_skip"] if self.W_skip is not None else [])):
            getattr(sae, name).copy_(getattr(self, name))
        sae.activation.load_form(self.form)
        sae.row_norm = self.row_norm
        return sae.eval()

    def validate(self, where: Path) -> Plain:
        """Returns itself after a check of shapes and values; `where` is named in the message.

        Raises: SourceError when the shapes do not fit together, a weight is not a finite floating
            point number, or k is more than there are latents.
        """
        if self.W_enc.dim() != 2:
            raise SourceError(f"{where}: the encoder is not a matrix: name an SAE's directory")
        if not self.target and self.W_skip is not None:
            problem = "it has a skip connection, but reconstructs its input"
            raise SourceError(f"{where}: {problem}: name a transcoder's directory")
        shapes = {"W_enc": (self.d_sae, self.d_in), "W_dec": (self.d_sae, self.d_out)}
        shapes |= {"b_enc": (self.d_sae,), "b_dec": (self.d_out,), "threshold": (self.d_sae,)}
        shapes["W_skip"] = (self.d_out, self.d_in)
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                actual = list(tensor.shape)
                raise SourceError(f"{where}: {name} has the shape {actual}, not {list(shape)}")
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                remedy = "save the weights as floating point numbers"
                raise SourceError(f"{where}: {name} has the dtype {kind}: {remedy}")
            if not bool(tensor.isfinite().all()):
                raise SourceError(f"{where}: {name} holds a value that is not finite")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise SourceError(f"{where}: k = {self.k}, but there are {count(self.d_sae, 'latent')}")
        return self

    # ---- folding what other tools store separately ---------------------------------------------

    def with_unit_decoder(self) -> Plain:
        """Returns the same reconstruction with decoder rows of norm 1; the code grows by their old
        norms.

        A threshold stays as it is: it is taken to apply to the new code.
        """
        norms = torch.linalg.vector_norm(self.W_dec, dim=1).clamp_min(SMALLEST_NORM)
        return replace(
            self,
            W_enc=self.W_enc * norms[:, None],
            b_enc=self.b_enc * norms,
            W_dec=self.W_dec / norms[:, None],
        )

    def without_scaling(self, factor: float) -> Plain:
        """Converts an SAE that works on factor * x to one that works on x."""
        return replace(
            self, W_enc=self.W_enc * factor, W_dec=self.W_dec / factor, b_dec=self.b_dec / factor
        )

    def without_whitening(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Plain:
        """Converts an SAE that works on (x - mean) matrix to one that works on x; mean [d_in],
        matrix and inverse [d_in, d_in]."""
        w_enc = self.W_enc @ matrix.T
        return replace(
            self,
            W_enc=w_enc,
            b_enc=self.b_enc if self.centre else self.b_enc - w_enc @ mean,
            W_dec=self.W_dec @ inverse,
            b_dec=self.b_dec @ inverse + mean,
        )

    def with_gate(self, r: Tensor, b_gate: Tensor, b_mag: Tensor) -> Plain:
        """Adds a gate on the same encoder, see this module's equation; r, b_gate, b_mag [d_sae]."""
        return replace(
            self, W_enc=self.W_enc * r[:, None], b_enc=b_mag, threshold=b_mag - r * b_gate
        )


@dataclass(frozen=True)
class Loaded:
    """An SAE from a directory.

    Args:
        sae: in evaluation mode; it gets the origin.
        origin: where it was trained.
        about: its metadata, as plain data.
        format: the name of its format.
    """

    sae: SAE
    origin: Origin
    about: Mapping[str, Any]
    format: str = ""

    def __post_init__(self) -> None:
        self.sae.origin = self.origin


# ---- reading files that others wrote -----------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON file of names and values.

    Raises: SourceError when the file is missing or holds something else.
    """
    try:
        data = parse_json(path)
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: name the directory of a saved SAE") from None
    except OSError as error:
        raise SourceError(f"{path} can't be read ({error.strerror}): name another") from None
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON ({error}): save the SAE again") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds no names and values: save the SAE again")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises: SourceError when the file is missing or is not a safetensors file.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist: name the directory of a saved SAE")
    remedy = "pickles and damaged files are not read, so save the SAE again"
    return read_weights(path, SourceError, remedy)


@contextmanager
def errors_as_source_error(folder: Path) -> Iterator[None]:
    """Turns any error that files of other tools cause in a reader into one sentence.

    Errors of saelab, and memory that runs out, are raised unchanged.
    """
    try:
        yield
    except (SaelabError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        remedy = "save the SAE again"
        raise SourceError(f"{folder} is not a readable SAE ({reason}): {remedy}") from error


@contextmanager
def shape_errors_as_source_error(where: Path) -> Iterator[None]:
    """Turns torch's errors about shapes into one sentence."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        remedy = "save the SAE again"
        raise SourceError(f"{where}: the shapes do not fit together ({reason}): {remedy}") from None


def take(tensors: Mapping[str, Tensor], names: Sequence[str], where: Path) -> dict[str, Tensor]:
    """Returns the named tensors, which must be all there are.

    Raises: SourceError for a missing tensor, and for an unknown one: it could change the function.
    """
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names]
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown tensor {unknown[0]!r}"
        raise SourceError(f"{where} {problem}: an SAE of this kind has {', '.join(names)}")
    return {name: tensors[name] for name in names}


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts tensors of any floating point dtype to float32; others stay, see
    `Plain.validate`."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


@dataclass(frozen=True)
class LinearNames:
    """Names of the tensors of an encoder and a decoder that are torch.nn.Linear layers.

    Args:
        encoder: its weight, [d_sae, d_in].
        encoder_bias: [d_sae].
        decoder: its weight, [d_in, d_sae].
        decoder_bias: [d_in].
    """

    encoder: str = "encoder.weight"
    encoder_bias: str = "encoder.bias"
    decoder: str = "decoder.weight"
    decoder_bias: str = "decoder.bias"

    @property
    def all(self) -> tuple[str, ...]:
        """The four names."""
        return self.encoder, self.encoder_bias, self.decoder, self.decoder_bias

    def plain(self, tensors: Mapping[str, Tensor], centre: bool = False) -> Plain:
        """Builds the plain form of the two layers, with ReLU."""
        w_enc, b_enc, decoder, b_dec = (tensors[name] for name in self.all)
        return Plain(w_enc, b_enc, decoder.mT, b_dec, centre=centre)
