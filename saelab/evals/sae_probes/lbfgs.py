"""Many logistic regressions at once, each by the steps of scikit-learn's solver `lbfgs`.

    f(w, b) = mean over the n fitted rows of log(1 + exp(-s_i (w x_i + b)))  +  |w|^2 / (2 C n)

from w = 0, b = 0, by L-BFGS-B 3.0 without bounds: the last 10 pairs of changes of point and
gradient, the line search of Moré and Thuente, a first step of length 1. It ends where no entry of
the gradient exceeds 1e-4, where f falls by less than 64 roundings, or after 1,000 iterations.

scikit-learn stops far from the minimum on columns of unlike sizes or at large C, so that a probe's
numbers depend on the path. All sums here have the same terms in another order: the path is the same
but for rounding. Every pass evaluates all problems that have not ended, those of one data set by
one matrix product, and ended problems are taken out.

Source: scikit-learn 1.9 (LogisticRegression), SciPy 1.17 (L-BFGS-B); Byrd, Lu, Nocedal and Zhu,
SIAM J. Sci. Comput. 16(5), 1995.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import softplus

from saelab.evals.sae_probes.line_search import DECREASE, FLATTER, MOST_STEP, LineSearch

#: scikit-learn's settings: largest entry of the gradient, fall of f in roundings, iterations, and
#: evaluations of one line search.
GRADIENT, FALL, MOST_ITERATIONS, MOST_TRIALS = 1e-4, 64.0, 1000, 50
#: Pairs of changes that are stored.
MEMORY = 10
#: exp(x) for x above this is finite, and log(1 + exp(x)) is x to the last bit.
LINEAR = 40.0
#: Problems are gathered anew when fewer than this share of the places is in use. Our choice.
LEAST_SHARE = 0.8
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Regressions:
    """P problems on the rows of D data sets.

    Args:
        columns: float64 [D, k, n].
        signs: float64 [D, n], 1 for a positive row and -1 for a negative one.
        of: int64 [P], the data set of a problem, in rising order.
        weights: float64 [P, n], 1 / (number of fitted rows) at each of them, 0 elsewhere.
        widths: int64 [P], how many of the first columns are used.
        penalties: float64 [P], 1 / (C n).
    """

    columns: Tensor
    signs: Tensor
    of: Tensor
    weights: Tensor
    widths: Tensor
    penalties: Tensor


@dataclass(frozen=True, eq=False)
class Solutions:
    """Coefficients float64 [P, k], intercepts float64 [P] and iterations int64 [P].

    `stopped`, bool [P], is True where the limit of iterations ended the fit.
    """

    coefficients: Tensor
    intercepts: Tensor
    iterations: Tensor
    stopped: Tensor


@dataclass(eq=False)
class _State:
    """Solvers of A problems; vectors end in the intercept.

    Args:
        problem: int64 [A]; alive: bool [A], False for places that only fill up a data set.
        weights, penalties, used: of the problems; `used` is 1 for each column in use, [A, k + 1].
        start, gradient, value, slope: where the line search began.
        direction, step, trials: of the line search; trials are evaluations so far.
        pairs: [A, 2 MEMORY, k + 1], changes of the point, then of the gradient.
        crossed, squared: products of changes of point and gradient, and of gradients,
            [A, MEMORY, MEMORY].
        count: updates of `pairs`; scale: of the inverse Hessian that they correct.
        iterations: line searches that have ended.
    """

    problem: Tensor
    alive: Tensor
    weights: Tensor
    penalties: Tensor
    used: Tensor
    start: Tensor
    gradient: Tensor
    value: Tensor
    slope: Tensor
    direction: Tensor
    step: Tensor
    trials: Tensor
    pairs: Tensor
    crossed: Tensor
    squared: Tensor
    count: Tensor
    scale: Tensor
    iterations: Tensor

    def taken(self, index: Tensor) -> _State:
        return _State(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def fit_regressions(problems: Regressions) -> Solutions:
    """Fits all problems."""
    count, width = len(problems.of), problems.columns.shape[1]
    device = problems.columns.device
    solutions = Solutions(
        torch.zeros(count, width, dtype=torch.float64, device=device),
        torch.zeros(count, dtype=torch.float64, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
    )
    if count:
        _Fit(problems, solutions).run()
    return solutions


class _Fit:
    """One run over all problems; solutions are written as problems end."""

    def __init__(self, problems: Regressions, solutions: Solutions) -> None:
        self.problems, self.solutions = problems, solutions
        self.searches: dict[int, LineSearch] = {}
        self.state = _first_state(problems)
        self._gather()
        value, gradient = self._evaluate(self.state.start)
        self._begin(value, gradient)

    def run(self) -> None:
        state = self.state
        while bool(state.alive.any()):
            if state.alive.sum() < LEAST_SHARE * len(state.alive):
                self._gather()
                state = self.state
            point = state.start + state.step[:, None] * state.direction
            value, gradient = self._evaluate(point)
            slope = _dots(gradient, state.direction)
            ended = self._search(value, slope)
            if bool(ended.any()):
                self._move(ended, point, (value, gradient, slope))

    # ------------------------------------------------------------ places

    def _gather(self) -> None:
        """Takes out ended problems; every data set has as many places, [sets, places] flattened."""
        state, of = self.state, self.problems.of
        alive = state.alive.nonzero()[:, 0]
        sets, sizes = of[state.problem[alive]].unique_consecutive(return_counts=True)
        most = int(sizes.max())
        places = torch.arange(most, device=of.device)
        first = sizes.cumsum(0) - sizes
        index = first[:, None] + torch.minimum(places, sizes[:, None] - 1)
        self.state = state.taken(alive[index.flatten()])
        self.state.alive = (places < sizes[:, None]).flatten()
        whole = len(sets) == len(self.problems.columns)
        self.columns = self.problems.columns if whole else self.problems.columns[sets]
        self.signs = self.problems.signs[sets][:, None]
        self.places = {int(p): i for i, p in enumerate(self.state.problem) if self.state.alive[i]}

    def _evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f [A] and its gradient [A, k + 1]."""
        state, sets = self.state, len(self.columns)
        of_sets = point.view(sets, -1, point.shape[1])
        margins = of_sets[..., :-1] @ self.columns
        margins.add_(of_sets[..., -1:]).mul_(-self.signs)
        weights = state.weights.view(margins.shape)
        losses = torch.linalg.vecdot(softplus(margins, threshold=LINEAR), weights).flatten()
        rest = margins.sigmoid_().mul_(weights).mul_(-self.signs)
        gradient = torch.cat([rest @ self.columns.mT, rest.sum(-1, keepdim=True)], -1)
        gradient = gradient.view(point.shape).mul_(state.used)
        coefficients = point[:, :-1]
        gradient[:, :-1].addcmul_(coefficients, state.penalties[:, None])
        squares = torch.linalg.vecdot(coefficients, coefficients)
        return torch.addcmul(losses, squares, state.penalties, value=0.5), gradient

    # ------------------------------------------------------------ one pass

    def _begin(self, value: Tensor, gradient: Tensor) -> None:
        """Starts from the first point."""
        state = self.state
        state.value, state.gradient, state.direction = value, gradient, -gradient
        state.slope = -_dots(gradient, gradient)
        state.step = (1 / (-state.slope).sqrt()).clamp_max(MOST_STEP)
        self._finish(state.alive & (gradient.abs().amax(1) <= GRADIENT), state.start)

    def _search(self, value: Tensor, slope: Tensor) -> Tensor:
        """Continues the line searches; returns which ended, bool [A]."""
        state = self.state
        enough = value <= state.value + DECREASE * state.step * state.slope
        ended = enough & (slope.abs() <= -FLATTER * state.slope)
        for i in (state.alive & ~ended).nonzero()[:, 0].tolist():
            problem = int(state.problem[i])
            search = self.searches.get(problem)
            if search is None:
                begin = float(state.value[i]), float(state.slope[i])
                search = self.searches[problem] = LineSearch(*begin, float(state.step[i]))
            ended[i] = search.advance(float(value[i]), float(slope[i]))
            state.step[i] = search.step
            state.trials[i] += 1
        for problem in [p for p in self.searches if ended[self.places[p]]]:
            del self.searches[problem]
        self._give_up(state.alive & ~ended & (state.trials >= MOST_TRIALS))
        return ended & state.alive

    def _give_up(self, failed: Tensor) -> None:
        """Goes back to where a search began, without the pairs; a second time, ends there."""
        if not bool(failed.any()):
            return
        state = self.state
        for problem in state.problem[failed].tolist():
            self.searches.pop(problem, None)
        self._finish(failed & (state.count == 0), state.start)
        self._forget(failed & state.alive, state.gradient)

    def _move(self, ended: Tensor, point: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> None:
        """Goes to the ends of the searches, and finishes or starts the next ones."""
        state, (value, gradient, slope) = self.state, at
        state.iterations += ended
        size = torch.maximum(torch.maximum(state.value.abs(), value.abs()), torch.ones_like(value))
        last = (gradient.abs().amax(1) <= GRADIENT) | (state.value - value <= FALL * EPS * size)
        self._finish(ended & (last | (state.iterations >= MOST_ITERATIONS)), point)
        going = ended & state.alive
        if not bool(going.any()):
            return
        self._remember(going, gradient, slope)
        direction = self._directions(gradient)
        go = going[:, None]
        state.direction = torch.where(go, direction, state.direction)
        state.start = torch.where(go, point, state.start)
        state.gradient = torch.where(go, gradient, state.gradient)
        state.value = torch.where(going, value, state.value)
        state.slope = torch.where(going, _dots(gradient, direction), state.slope)
        state.step.masked_fill_(going, 1.0)
        state.trials.masked_fill_(going, 0)
        self._forget(going & (state.slope >= 0), state.gradient)

    def _finish(self, which: Tensor, point: Tensor) -> None:
        index, state = which.nonzero()[:, 0], self.state
        problem = state.problem[index]
        self.solutions.coefficients[problem] = point[index, :-1]
        self.solutions.intercepts[problem] = point[index, -1]
        self.solutions.iterations[problem] = state.iterations[index]
        self.solutions.stopped[problem] = state.iterations[index] >= MOST_ITERATIONS
        state.alive &= ~which

    def _forget(self, which: Tensor, gradient: Tensor) -> None:
        """Continues along the gradient, without pairs."""
        if not bool(which.any()):
            return
        state, wide = self.state, which[:, None]
        for name in ("pairs", "crossed", "squared"):
            getattr(state, name).masked_fill_(wide[:, :, None], 0.0)
        state.count.masked_fill_(which, 0)
        state.scale.masked_fill_(which, 1.0)
        state.direction = torch.where(wide, -gradient, state.direction)
        state.slope = torch.where(which, -_dots(gradient, gradient), state.slope)
        state.step.masked_fill_(which, 1.0)
        state.trials.masked_fill_(which, 0)

    def _remember(self, going: Tensor, gradient: Tensor, slope: Tensor) -> None:
        """Stores the changes of point and gradient, where f curves upwards."""
        state = self.state
        change = gradient - state.gradient
        curvature = (slope - state.slope) * state.step
        kept = going & (curvature > EPS * (-state.slope * state.step))
        index = kept.nonzero()[:, 0]
        slot = state.count[index] % MEMORY
        state.pairs[index, slot] = state.step[index, None] * state.direction[index]
        state.pairs[index, MEMORY + slot] = change[index]
        products = (state.pairs @ change[:, :, None])[index, :, 0]
        state.crossed[index, :, slot] = products[:, :MEMORY]
        state.squared[index, :, slot] = products[:, MEMORY:]
        state.squared[index, slot] = products[:, MEMORY:]
        state.count[index] += 1
        state.scale[index] = curvature[index] / products[torch.arange(len(index)), MEMORY + slot]

    def _directions(self, gradient: Tensor) -> Tensor:
        """Returns minus the corrected inverse Hessian times the gradient, by its compact form."""
        state = self.state
        slots = torch.arange(MEMORY, device=gradient.device)
        oldest = state.count.clamp_min(MEMORY)[:, None]
        order = (oldest + slots) % MEMORY
        products = (state.pairs @ gradient[:, :, None])[..., 0]
        of_points = products[:, :MEMORY].gather(1, order)[:, :, None]
        of_gradients = products[:, MEMORY:].gather(1, order)[:, :, None]
        upper = _permuted(state.crossed, order).triu()
        diagonal = upper.diagonal(dim1=1, dim2=2)
        sizes = diagonal.clone()[:, :, None]
        diagonal.add_((sizes[:, :, 0] == 0).to(sizes))
        scale = state.scale[:, None, None]
        inner = torch.linalg.solve_triangular(upper, of_points, upper=True)
        right = sizes * inner + scale * (_permuted(state.squared, order) @ inner - of_gradients)
        outer = torch.linalg.solve_triangular(upper.mT, right, upper=False)
        factors = torch.zeros_like(products)
        factors[:, :MEMORY].scatter_(1, order, outer[:, :, 0])
        factors[:, MEMORY:].scatter_(1, order, (-scale * inner)[:, :, 0])
        correction = (factors[:, None] @ state.pairs)[:, 0]
        return -torch.addcmul(correction, scale[:, :, 0], gradient)


def _first_state(problems: Regressions) -> _State:
    count, width = len(problems.of), problems.columns.shape[1] + 1
    device = problems.columns.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(count, *shape, dtype=torch.float64, device=device)

    columns = torch.arange(width, device=device)
    used = (columns < problems.widths[:, None]) | (columns == width - 1)
    return _State(
        problem=torch.arange(count, device=device),
        alive=torch.ones(count, dtype=torch.bool, device=device),
        weights=problems.weights,
        penalties=problems.penalties,
        used=used.double(),
        start=zeros(width),
        gradient=zeros(width),
        value=zeros(),
        slope=zeros(),
        direction=zeros(width),
        step=zeros(),
        trials=torch.zeros(count, dtype=torch.int64, device=device),
        pairs=zeros(2 * MEMORY, width),
        crossed=zeros(MEMORY, MEMORY),
        squared=zeros(MEMORY, MEMORY),
        count=torch.zeros(count, dtype=torch.int64, device=device),
        scale=torch.ones(count, dtype=torch.float64, device=device),
        iterations=torch.zeros(count, dtype=torch.int64, device=device),
    )


def _permuted(matrices: Tensor, order: Tensor) -> Tensor:
    """Returns the rows and columns of each matrix [A, m, m] in an order, [A, m]."""
    rows = order[:, :, None].expand_as(matrices)
    return matrices.gather(1, rows).gather(2, rows.mT)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
