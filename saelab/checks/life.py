"""Checks of a part's life in a run: passes, losses, updates, state, resets."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from saelab.checks.boundaries import near_a_boundary
from saelab.checks.examples import Case, cases
from saelab.checks.mistakes import differing, distance, require, snapshot
from saelab.checks.trials import D_IN, D_SAE, ROWS, STEPS, batch, fresh_cell, rows, trained_cell
from saelab.errors import SettingError
from saelab.parts.base import Dims, Observer, Part, PartConfig, Pass, Reset
from saelab.sae import SAE
from saelab.training.loop import Cell
from saelab.training.state import State

#: Latents that are reset on trial.
RESET = (1, 3, 7)


def one_pass(cell: Cell, seed: int) -> Pass:
    """Runs the next pass of a cell, with gradients."""
    return cell.sae(rows(seed), cell.steps_done, STEPS)


# ---- passes and losses -----------------------------------------------------------------------


def check_pass(case: Case, seed: int) -> None:
    """A pass is finite, and the same when it is repeated."""
    cell = fresh_cell(case.settings(D_SAE), seed)
    before = snapshot(cell.sae)
    p, again = one_pass(cell, seed), one_pass(cell, seed)
    require(p.recon.shape == p.x.shape, "the reconstruction has another shape", "keep [N, d_in]")
    finite = bool(p.recon.isfinite().all()) and bool(p.code.values.isfinite().all())
    require(finite, "a code or reconstruction is not finite", "guard divisions and logarithms")
    require(
        torch.equal(p.code.dense(), again.code.dense()) and torch.equal(p.recon, again.recon),
        "two passes over the same rows differ",
        "draw no random numbers in a pass, and keep no state there",
    )
    if p.code.support is not None:
        p.code.support.check()
    changed = differing(before, snapshot(cell.sae))
    require(not changed, f"a pass changes {', '.join(changed)}", "change state in update alone")


def check_preactivations(case: Case, seed: int) -> None:
    """All pre-activations are read by parts that declare it, and by no other."""
    cell = trained_cell(case.settings(D_SAE), seed)
    p = one_pass(cell, seed)
    if any(part.uses_preactivations for part in cell.sae.parts()):
        right = p.z.shape == (ROWS, D_SAE) and not p.z.requires_grad
        require(right, "z has a gradient or another shape", "read it as it is")
    else:
        require(p.stored_z is None, "pre-activations are stored unasked", "report this as a fault")


def check_loss(case: Case, seed: int) -> None:
    """A loss is a finite scalar with a gradient, repeats, and changes no state."""
    cell = trained_cell(case.settings(D_SAE), seed)
    before, p = snapshot(cell.sae), one_pass(cell, seed)
    for name, term in cell.sae.loss_terms().items():
        first, second = term.loss(p), term.loss(p)
        shape = list(first.shape)
        require(first.shape == (), f"loss '{name}' has the shape {shape}", "return a scalar")
        require(bool(first.isfinite()), f"loss '{name}' is not finite", "guard its divisions")
        require(
            torch.equal(first, second),
            f"loss '{name}' differs when it is computed again",
            "draw random numbers from a named stream by p.step, and change no state in loss()",
        )
    changed = differing(before, snapshot(cell.sae))
    require(not changed, f"a loss changes {', '.join(changed)}", "change state in update alone")


def check_gradients(case: Case, seed: int) -> None:
    """Gradients of the losses are finite, and equal along the sparse and the dense path, beside
    every activation that the part fits; some latents of its code are 0 although they are chosen."""
    if case.seam not in ("loss", "activation"):
        return
    beside = cases(D_SAE, "activation", first=True) if case.seam == "loss" else [case]
    for other in beside:
        changes = {"activation": other.part} if other is not case else {}
        try:
            sae = fresh_cell(case.settings(D_SAE, **changes), seed).sae
        except SettingError:
            continue  # the two do not fit together
        _check_gradients(sae, seed, other.kind)


def _check_gradients(sae: SAE, seed: int, beside: str) -> None:
    with torch.no_grad():
        sae.b_enc.sub_(1.0)
        sae.b_enc[24:] = -100.0  # fewer positive latents than an example's k
    x = rows(seed)
    x = x[~near_a_boundary(sae, x).any(1)]
    results = []
    for dense in (False, True):
        if dense:
            sae.activation.support = lambda z, *starts: None  # type: ignore[method-assign]
        sae.zero_grad()
        p = sae(x, 3, STEPS)
        total = torch.stack([term.loss(p) for term in sae.loss_terms().values()]).sum()
        total.backward()
        gradients = {name: w.grad for name, w in sae.named_parameters() if w.grad is not None}
        for name, gradient in gradients.items():
            where = f"beside {beside}, on the {'dense' if dense else 'sparse'} path"
            require(
                bool(gradient.isfinite().all()),
                f"the gradient of {name} is not finite {where}",
                "a code holds exact zeros: a power or logarithm of them needs a guard",
            )
        results.append({name: gradient.clone() for name, gradient in gradients.items()})
    sparse, dense_ = results
    for name in sparse.keys() & dense_.keys():
        apart = distance(sparse[name], dense_[name])
        require(
            apart < 1e-3,
            f"the gradient of {name} beside {beside} differs by {apart:.1e} between the sparse and "
            "the dense path",
            "compute both from p.code",
        )


# ---- state -----------------------------------------------------------------------------------


def _update(part: Part, p: Pass) -> None:
    with torch.no_grad():
        part.update(p)
        if isinstance(part, Observer):
            part.observe(p)


def check_update(case: Case, seed: int) -> None:
    """Only `update` changes state, only the part's buffers, and the same pass in the same way."""
    results = []
    for _ in range(2):
        cell = trained_cell(case.settings(D_SAE), seed)
        sae, part = cell.sae, case.part_of(cell.sae)
        before, generator = snapshot(sae), torch.get_rng_state()
        p = one_pass(cell, seed)
        part.scalars()
        sae.settings(cell.steps_done)
        changed = differing(before, snapshot(sae))
        require(not changed, f"{', '.join(changed)} change outside of update", "leave them alone")
        _update(part, p)
        buffers = {id(buffer) for buffer in part.buffers()}
        after = sae.state_dict(keep_vars=True)
        others = {name for name, tensor in after.items() if id(tensor) not in buffers}
        changed = [name for name in differing(before, snapshot(sae)) if name in others]
        what = f"update changes {', '.join(changed)}"
        require(not changed, what, "change only the part's own buffers there")
        quiet = torch.equal(torch.get_rng_state(), generator)
        remedy = "draw from saelab.seeding.torch_stream with the part's seed"
        require(quiet, "update draws from the global random state", remedy)
        results.append(snapshot(part))
    changed = differing(*results)
    require(not changed, f"the same update gives other {', '.join(changed)}", "draw nothing there")


def check_saved_state(case: Case, seed: int) -> None:
    """All that changes a pass, a loss or an update is in the parameters and buffers."""
    remedy = "keep running state in buffers: self.register_buffer(name, tensor)"
    config, x = case.settings(D_SAE), rows(seed)
    cell = trained_cell(config, seed)
    fresh = config.build(D_IN, STEPS, seed)
    fresh.load_state_dict(snapshot(cell.sae))
    passes = [sae(x, cell.steps_done, STEPS) for sae in (cell.sae, fresh)]
    require(torch.equal(passes[0].recon, passes[1].recon), "a restored part computes other", remedy)
    require(passes[0].settings == passes[1].settings, "a restored controller differs", remedy)
    losses = [torch.stack([t.loss(p) for t in p.sae.loss_terms().values()]) for p in passes]
    require(torch.equal(*losses), "a restored loss differs", remedy)
    with torch.no_grad():
        for p in passes:
            case.part_of(p.sae).update(p)
    changed = differing(snapshot(cell.sae), snapshot(fresh))
    require(not changed, f"{', '.join(changed)} of a restored part go another way", remedy)
    require(cell.sae.scalars() == fresh.scalars(), "the scalars of a restored part differ", remedy)
    codes = [sae.eval().encode(x) for sae in (cell.sae, fresh)]
    require(torch.equal(*codes), "a restored part encodes otherwise", remedy)


def _copied(state: State) -> State:
    """A state as it comes back from a file."""
    tensors = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    return State(tensors, json.loads(json.dumps(state.plain, allow_nan=False)))


def check_resume(case: Case, seed: int) -> None:
    """A run that is cut anywhere, resets and snapshots included, goes on bit by bit."""
    resets = next(one for one in cases(D_SAE, "observer") if one.example.resets)
    observer = case if case.example.resets else resets
    observers: list[PartConfig] = [observer.part]
    if case.seam == "observer" and case.kind != observer.kind:
        observers.append(case.part)
    config = case.settings(D_SAE, observers=observers)
    whole, cut = (fresh_cell(config, seed, snapshots=4) for _ in range(2))
    for one in (whole, cut):
        with torch.no_grad():
            one.sae.b_enc[::7] = -100  # these are dead
    remedy = "keep all state in buffers, and draw by p.step from named streams"
    for i in range(STEPS):
        if i in (1, STEPS // 2, STEPS - 3):
            state = _copied(cut.state())
            cut = fresh_cell(config, seed, snapshots=4)
            cut.restore(state)
        x = rows(seed + i + 1)
        same = whole.step(batch(x)) == cut.step(batch(x))
        require(same, f"a run that was cut differs at step {i}", remedy)
    states = whole.state(), cut.state()
    changed = differing(states[0].tensors, states[1].tensors)
    same = states[0].plain == states[1].plain and whole.scalar_reach() == cut.scalar_reach()
    require(not changed and same, f"a run that was cut ends with other {changed}", remedy)
    count = whole.log.last(str(observer.example.resets))
    what = f"no latent is reset in {STEPS} steps by '{observer.kind}'"
    require(bool(count > 0), what, "give an example that resets some, or no `resets` in it")


def check_parameters(case: Case, seed: int) -> None:
    """Every parameter of the part is in the optimiser, and moves with the first step."""
    cell = fresh_cell(case.settings(D_SAE), seed)
    trained = {id(p) for group in cell.optimiser.groups for p in group.parameters}
    part = case.part_of(cell.sae)
    named = dict(part.named_parameters())
    for name, parameter in named.items():
        right = (id(parameter) in trained) == parameter.requires_grad
        require(right, f"the parameter {name} is in no optimiser group", "return it in groups()")
    cell.step(batch(rows(seed)))
    moments = cell.optimiser.moments()
    for name, parameter in named.items():
        moved = not parameter.requires_grad or float(moments[parameter]["step"]) == 1
        require(moved, f"the parameter {name} gets no gradient", "use it, or freeze it")
        require(parameter.grad is None, f"the gradient of {name} outlives the step", "leave it")


# ---- latents that start afresh -----------------------------------------------------------------


def _tensors(part: Part) -> dict[str, Tensor]:
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


def check_per_latent(case: Case, seed: int) -> None:
    """Tensors with one row for each latent are named in `per_latent`."""
    sizes: list[dict[str, int]] = []
    for width in (D_SAE, D_SAE + 32):
        part = type(case.part).examples(width)[case.index].part.build(_dims(width))
        sizes.append({n: len(t) - width for n, t in _tensors(part).items() if t.dim()})
    follows = {name for name in sizes[0].keys() & sizes[1].keys() if sizes[0][name] == 0}
    follows = {name for name in follows if sizes[1][name] == 0}
    part = case.part.build(_dims(D_SAE))
    undeclared = follows - set(part.per_latent)
    names = ", ".join(sorted(undeclared))
    remedy = "name it in per_latent, and clear it in forget"
    require(not undeclared, f"{names} has a row for each latent and is not declared", remedy)
    wrong = [name for name in part.per_latent if name in _tensors(part) and name not in follows]
    require(not wrong, f"per_latent names {wrong}, without a row for each latent", "leave it out")


def _dims(width: int) -> Dims:
    return Dims(D_IN, width, steps=STEPS)


def _soil(tensor: Tensor, latents: Tensor) -> None:
    """Changes the rows of a tensor, as a run might have."""
    rows_ = tensor.data[latents]
    tensor.data[latents] = ~rows_ if rows_.dtype == torch.bool else rows_ + 7


def check_forget(case: Case, seed: int) -> None:
    """After a reset the part holds of a latent what a fresh one has, except what it declares in
    `survives_reset`; moments of the optimiser are cleared, those of other latents are not."""
    cell, fresh = trained_cell(case.settings(D_SAE), seed), fresh_cell(case.settings(D_SAE), seed)
    sae, part = cell.sae, case.part_of(cell.sae)
    latents = torch.tensor(RESET, dtype=torch.int64)
    tensors = {n: t for n, t in _tensors(part).items() if n in part.per_latent}
    for name in tensors.keys() - set(part.survives_reset):
        _soil(tensors[name], latents)
    directions = normalize(rows(seed, len(RESET)), dim=1)
    moments = cell.optimiser.moments()
    for state in moments.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].fill_(1.0)
    sae.reset_latents(Reset(latents, directions, 0.5))
    cell.optimiser.clear(sae, latents)
    new = _tensors(case.part_of(fresh.sae))
    for name in sorted(tensors.keys() - set(part.survives_reset)):
        same = torch.equal(tensors[name][latents], new[name][latents])
        remedy = "clear it in forget, or name it in survives_reset with the reason"
        require(same, f"{name} of a latent that starts afresh is not that of a new one", remedy)
    others = torch.ones(D_SAE, dtype=torch.bool)
    others[latents] = False
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor in moments:
            state = moments[tensor]
            cleared = not bool(
                state["exp_avg"][latents].any() or state["exp_avg_sq"][latents].any()
            )
            kept = bool((state["exp_avg"][others] == 1).all())
            remedy = "name the parameter in per_latent"
            require(cleared and kept, f"the moments of {name} outlive a reset", remedy)


# ---- what it says of itself ----------------------------------------------------------------------


def check_settings(case: Case, seed: int) -> None:
    """Settings come back from JSON, and the part fits into its SAE."""
    again = type(case.part).parse(json.loads(case.part.model_dump_json()))
    require(again == case.part, "settings change on their way through JSON", "use plain fields")
    sae = case.settings(D_SAE).build(D_IN, STEPS, seed)
    case.part_of(sae)
    for name, value in case.part.companions.items():
        beside = case.example.beside.get(name)
        inside = all(one in beside for one in value) if isinstance(value, list) and beside else None
        right = beside == value or bool(inside)
        require(right, f"the example lacks the companion '{name}'", "add it to `beside`")


def check_l0_rule(case: Case, seed: int) -> None:
    """A part that says 'set' follows the level that is asked for, and no other part does."""
    config, part = case.settings(D_SAE), case.part
    rule, low, high = part.l0_rule(config), part.at_l0(3.0, config), part.at_l0(9.0, config)
    require(rule in ("set", "found", None), f"l0_rule is {rule!r}", "use 'set', 'found' or None")
    if rule == "set":
        right = low != high and type(low) is type(high) is type(part)
        require(right, "at_l0 gives the same settings for two levels", "return those of the level")
        named = {low.target_l0, high.target_l0} in ({3, 9}, {None})
        require(named, "target_l0 does not name the level of at_l0", "return the level")
    if rule == "found":
        require(low == high == part, "at_l0 changes an L0 that is 'found'", "return self")
    if not config.decides_l0:  # nor does what stands next to the part
        return
    once = config.at_l0(3.0)
    if "found" not in once.l0_rules(3.0):  # a schedule's end is set once
        same = once.at_l0(9.0) == config.at_l0(9.0)
        require(
            same, "at_l0 depends on the level that was asked for before", "take the level alone"
        )


def check_scalars(case: Case, seed: int) -> None:
    """Every scalar that the part logs is declared, and the other way round."""
    cell = trained_cell(case.settings(D_SAE), seed)
    config, part = case.part, case.part_of(cell.sae)
    logged, declared = set(part.scalars()), set(config.logged)
    what = f"scalars() has {sorted(logged)}, and `logged` {sorted(declared)}"
    require(logged == declared, what, "declare each scalar with its meaning")
    require(declared <= cell.log.columns.keys(), "a scalar is not in the log", "return a float")
    inside = {*part.learned(), *part.stored()} <= declared
    require(inside, "learned() or stored() name a scalar that is not logged", "declare it")
    roles = all(config.logged[name].role == "learned" for name in part.learned())
    require(roles, "a scalar of learned() has another role", "declare it without a role")
    meant = all(scalar.meaning for scalar in config.logged.values())
    require(meant, "a scalar has no meaning", "say in one phrase what it is")


def check_facts(case: Case, seed: int) -> None:
    """Facts for the gate are finite, columns of latents have one number each; reading changes
    nothing."""
    cell = trained_cell(case.settings(D_SAE), seed, STEPS)
    part, before = case.part_of(cell.sae), snapshot(cell.sae)
    facts = part.facts(cell.log.columns, cell.optimiser.travel)
    require(all(map(math.isfinite, facts.values())), "a fact is not finite", "leave it out")
    columns = part.latent_columns()
    right = all(column.shape == (D_SAE,) for column in columns.values())
    require(right, "a column of latents has another length", "return one number for each latent")
    if isinstance(part, Observer):
        lives, resets = part.lives(), part.resampled()
        right = lives is None or lives.survival.shape == lives.at_risk.shape
        require(right and (resets is None or resets >= 0), "lives do not fit", "count whole lives")
    changed = differing(before, snapshot(cell.sae))
    require(not changed, f"reading facts changes {', '.join(changed)}", "change nothing there")
