"""Checks of an activation as a function: its two paths, its rows, its exported form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from saelab.checks.boundaries import near_a_boundary
from saelab.checks.examples import Case
from saelab.checks.mistakes import PartMistake, differing, distance, require, snapshot
from saelab.checks.trials import D_IN, D_SAE, ROWS, STEPS, rows, sparse_sae
from saelab.errors import SettingError
from saelab.formats.base import Plain
from saelab.parts.base import Activation, Dims, Pass, Refusal
from saelab.sae import SAE
from saelab.seeding import torch_stream

#: Relative error that two ways of computing the same may have, and that of a folded SAE.
TOLERANCE, FOLDED = 1e-5, 1e-4
#: Step of a central difference in float64, and relative error of the derivative from it.
STEP, DERIVATIVE = 1e-6, 1e-4


def _gradients(sae: SAE, x: Tensor) -> tuple[Pass, dict[str, Tensor]]:
    sae.zero_grad()
    p = sae(x, 5, STEPS)
    weight = torch.linspace(-1, 1, p.recon.numel(), dtype=torch.float32).view(p.recon.shape)
    ((p.recon * weight).sum() + (p.recon - p.target).square().sum()).backward()
    parameters = sae.named_parameters()
    return p, {name: w.grad.clone() for name, w in parameters if w.grad is not None}


@contextmanager
def _dense(sae: SAE) -> Iterator[None]:
    """Takes the dense path inside the block."""
    sae.activation.support = lambda z, *starts: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del sae.activation.support


def check_paths(case: Case, seed: int) -> None:
    """The sparse path gives the code, the reconstruction and the gradients of the dense one; where
    an activation has one path that `uses_weights`, its gradients are those of differences."""
    remedy = "let support() choose every pair where dense() is not 0, and at() compute its values"
    if case.settings(D_SAE).build(D_IN).activation.uses_weights:
        _check_derivative(case, seed)
        return
    for training in (True, False):
        sae, x = sparse_sae(case, seed).train(training), rows(seed)
        x = x[~near_a_boundary(sae, x).any(1)]
        require(len(x) > ROWS // 2, "most rows are on a boundary", "switch latents less often")
        sparse, found = _gradients(sae, x)
        if sparse.code.support is None:
            what = "the sparse path was not taken: support() returned None"
            raise PartMistake(what, "return the pairs that may be active (saelab.kernels.Support)")
        sparse.code.support.check()
        with _dense(sae):
            dense, expected = _gradients(sae, x)
        same = torch.equal(sparse.code.dense() != 0, dense.code.values != 0)
        require(same, "the two paths choose different latents", remedy)
        apart = distance(sparse.code.dense(), dense.code.values)
        apart = max(apart, distance(sparse.recon, dense.recon))
        require(apart <= TOLERANCE, f"the two paths differ by {apart:.1e}", remedy)
        require(found.keys() == expected.keys(), "the two paths train other parameters", remedy)
        for name, gradient in expected.items() if training else ():  # none in evaluation
            apart = distance(found[name], gradient)
            what = f"the gradient of {name} differs by {apart:.1e} between the two paths"
            require(apart <= TOLERANCE, what, remedy)


def _loss_of(sae: SAE, x: Tensor) -> Tensor:
    p = sae(x, 5, STEPS)
    weight = torch.linspace(-1, 1, p.recon.numel(), dtype=p.recon.dtype).view(p.recon.shape)
    return (p.recon * weight).sum() + p.code.values.square().sum()


def _check_derivative(case: Case, seed: int) -> None:
    """Holds the gradient against central differences, in float64, along random directions."""
    sae, x = sparse_sae(case, seed).double().train(), rows(seed).double()
    x = x[~near_a_boundary(sae, x, 1e-4).any(1)]
    require(len(x) > 0, "every row is on a boundary", "switch latents less often")
    sae.zero_grad()
    _loss_of(sae, x).backward()
    trained = {n: w for n, w in sae.named_parameters() if w.requires_grad}
    remedy = "let encode() pass gradients to u and all weights that it reads"
    for name, w in trained.items():
        require(w.grad is not None, f"{name} gets no gradient", remedy)
        stream = torch_stream(seed, f"derivative {name}")
        direction = torch.randn(w.shape, generator=stream, dtype=w.dtype)
        losses = []
        for by in (STEP, -STEP):
            with torch.no_grad():
                before = w.clone()
                w.add_(direction, alpha=by)
                losses.append(float(_loss_of(sae, x)))
                w.copy_(before)
        expected = (losses[0] - losses[1]) / (2 * STEP)
        computed = float((w.grad * direction).sum()) if w.grad is not None else 0.0
        apart = abs(computed - expected) / max(abs(expected), 1e-3 * abs(losses[0]))
        what = f"the gradient of {name} differs by {apart:.1e} from differences of the loss"
        require(apart <= DERIVATIVE, what, remedy)


def check_rows(case: Case, seed: int) -> None:
    """A row's code depends on no other row, unless that is declared; where every row has the same
    number of active latents, that is declared too."""
    for training in (True, False):
        sae, x = sparse_sae(case, seed).train(training), rows(seed)
        if not (training and sae.activation.couples_batch):
            whole, few = sae(x).code.dense().detach(), sae(x[3:8]).code.dense().detach()
            near = near_a_boundary(sae, x)[3:8]
            apart = distance(few * ~near, whole[3:8] * ~near)
            remedy = "use stored statistics in evaluation, and declare couples_batch for training"
            require(apart <= TOLERANCE, "the code of a row depends on other rows", remedy)
        code = sae(x).code
        counts = (code.dense() != 0).sum(1)
        if sae.activation.exact_k:
            sizes = None if code.support is None else code.support.offsets.diff().unique()
            right = sizes is not None and sizes.numel() == 1 and bool(counts.max() <= sizes[0])
            require(right, "rows have other numbers of pairs", "leave exact_k False")
        else:
            remedy = "declare exact_k = True"
            require(counts.unique().numel() > 1, "every row has as many active latents", remedy)


def check_encode(case: Case, seed: int) -> None:
    """`encode` refuses in training, and gives the code of a pass in evaluation."""
    sae, x = sparse_sae(case, seed), rows(seed)
    try:
        sae.train().encode(x)
    except RuntimeError as error:
        require("eval()" in str(error), "encode() fails in training", "leave it to the SAE")
    sae.eval()
    keep = ~near_a_boundary(sae, x).any(1)
    apart = distance(sae.encode(x)[keep], sae(x).code.dense()[keep])
    require(apart <= TOLERANCE, f"encode() differs from a pass by {apart:.1e}", "compare dense()")


def check_thresholds(case: Case, seed: int) -> None:
    """Raised thresholds leave fewer latents active, and lowered ones more; nothing moves where no
    threshold decides how many are."""
    sae, x = sparse_sae(case, seed).eval(), rows(seed)
    before, l0 = snapshot(sae), [int((sae.encode(x) != 0).sum())]
    with torch.no_grad():
        moved = [sae.raise_thresholds(by) for by in (0.2, -0.4)]
        l0 += [int((sae.encode(x) != 0).sum())]
        sae.raise_thresholds(0.4)
        l0 += [int((sae.encode(x) != 0).sum())]
    remedy = "move thresholds by `by`, and return whether there are any"
    require(len({*moved}) == 1, "raise_thresholds() is not of one mind", remedy)
    if not moved[0]:
        changed = differing(before, snapshot(sae))
        require(not changed, f"raise_thresholds() returns False and moves {changed}", remedy)
        return
    what = f"pairs that fire with thresholds moved by -.2, 0, .2: {l0[1]}, {l0[0]}, {l0[2]}"
    require(l0[1] >= l0[0] > l0[2], what, remedy)


def check_export(case: Case, seed: int) -> None:
    """The exported form gives the same values, also far from the data, and comes back as an SAE
    with the same code; or the export is refused with a reason."""
    sae, x = sparse_sae(case, seed).eval(), rows(seed)
    activation = sae.activation
    what = f"{type(activation).__name__} does not say what it computes"
    remedy = "write export() and return a Form, or a Refusal with the reason"
    require(type(activation).export is not Activation.export, what, remedy)
    form = activation.export()
    if isinstance(form, Refusal):
        try:
            Plain.of(sae)
        except SettingError as error:
            require(
                form.reason in str(error), "the reason is not reported", "report this as a fault"
            )
        return
    remedy = "return the form of its values, or a Refusal"
    keep = ~near_a_boundary(sae, x).any(1)
    require(bool(keep.any()), "every row is on a boundary", "switch latents less often")
    if activation.uses_weights:
        _check_exported_rows(sae, x[keep])
        return
    z = (sae.encoder_input(x) @ sae.W_enc.T + sae.b_enc).detach()
    for name, scale in (("", 1.0), ("large ", 100.0), ("negative ", -1.0)):
        with torch.no_grad():
            code, twin = activation.dense(scale * z[keep]), form.code(scale * z[keep])
        switched = (code != 0) != (twin != 0)
        require(
            bool(switched.float().mean() < 1e-3), f"the form fires otherwise on {name}z", remedy
        )
        apart = distance(twin * ~switched, code * ~switched)
        require(apart <= TOLERANCE, f"the form's values on {name}z differ by {apart:.1e}", remedy)
    again = Plain.of(sae).build()
    apart = distance(again.encode(x)[keep], sae.encode(x)[keep])
    require(apart <= FOLDED, f"the exported SAE's code differs by {apart:.1e}", remedy)
    decoded = again.decode(again.encode(x)), sae.decode(sae.encode(x))
    apart = distance(decoded[0][keep], decoded[1][keep])
    require(apart <= FOLDED, f"the exported SAE decodes otherwise by {apart:.1e}", remedy)


def _check_exported_rows(sae: SAE, x: Tensor) -> None:
    """Compares the exported SAE on rows: its reconstruction, and its code, which may be in raw
    units, that is `scale` times as large."""
    again, remedy = Plain.of(sae).build(), "return the form of its values, or a Refusal"
    f, found = sae.encode(x), again.encode(x)
    apart = min(distance(found, f), distance(found, f * sae.scale))
    require(apart <= FOLDED, f"the exported SAE's code differs by {apart:.1e}", remedy)
    apart = distance(again.decode(found), sae.decode(f))
    require(apart <= FOLDED, f"the exported SAE decodes otherwise by {apart:.1e}", remedy)


def check_without_context(case: Case, seed: int) -> None:
    """The twin that does not follow the context takes the part's tensors."""
    part = case.settings(D_SAE).build(D_IN).activation
    config = part.without_context()
    if config is None:
        what, remedy = "codes follow the context, and no twin does not", "write without_context()"
        require(not part.needs_contexts, what, remedy)
        return
    twin = config.build(Dims(D_IN, D_SAE, steps=STEPS))
    require(not twin.needs_contexts, "the twin follows the context too", "fix its settings")
    twin.load_state_dict(part.state_dict())
