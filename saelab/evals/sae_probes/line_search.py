"""Line search of Moré and Thuente (1994), with the constants of L-BFGS-B: one number at a time.

It ends at a step with

    value <= value at 0 + DECREASE * step * slope at 0     and     |slope| <= FLATTER * |slope at 0|

or where the interval around such a step has become too small. Every trial follows from the two best
points so far by cubic and secant interpolation, so that the trials are those of any other
implementation.

Source: Moré and Thuente, ACM TOMS 20(3), 1994; `dcsrch` and `dcstep` of MINPACK-2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Constants of L-BFGS-B 3.0.
DECREASE, FLATTER, NARROW, MOST_STEP = 1e-3, 0.9, 0.1, 1e10
#: Constants of the method: growth of a step (least, most), and shrinkage without a bisection.
LEAST_GROWTH, MOST_GROWTH, SHRINKAGE = 1.1, 4.0, 0.66


@dataclass(frozen=True)
class Point:
    """Value and slope along the line at a step."""

    step: float
    value: float
    slope: float

    def tilted(self, slope: float) -> Point:
        """Returns the point of the function minus slope * step."""
        return Point(self.step, self.value - self.step * slope, self.slope - slope)


class LineSearch:
    """One search.

    Args:
        value, slope: at step 0; the slope is negative.
        step: the first trial.
    """

    def __init__(self, value: float, slope: float, step: float) -> None:
        self.start = Point(0.0, value, slope)
        self.best = self.other = self.start
        self.bracketed, self.first_stage = False, True
        self.width, self.width_before = MOST_STEP, 2 * MOST_STEP
        self.least, self.most = 0.0, step + MOST_GROWTH * step
        #: The trial whose value and slope are asked for.
        self.step = step

    def advance(self, value: float, slope: float) -> bool:
        """Takes the function at `step`; returns True when that step is the result."""
        at, tilt = Point(self.step, value, slope), DECREASE * self.start.slope
        enough = self.start.value + at.step * tilt
        if value <= enough and slope >= 0:
            self.first_stage = False
        if self._is_last(at, enough, tilt):
            return True
        if self.first_stage and enough < value <= self.best.value:
            step = self._update(at, tilt)
        else:
            step = self._update(at, 0.0)
        self.step = self._safeguarded(step, at)
        return False

    def _is_last(self, at: Point, enough: float, tilt: float) -> bool:
        if self.bracketed and (not self.least < at.step < self.most or self._is_narrow()):
            return True
        if at.step == MOST_STEP and at.value <= enough and at.slope <= tilt:
            return True
        return at.value <= enough and abs(at.slope) <= -FLATTER * self.start.slope

    def _is_narrow(self) -> bool:
        return self.most - self.least <= NARROW * self.most

    def _update(self, at: Point, tilt: float) -> float:
        """Replaces the two best points; returns the next trial.

        Args:
            tilt: slope of the line that is taken off the function before they are compared.
        """
        new, best, other = (point.tilted(tilt) for point in (at, self.best, self.other))
        step, brackets = _next_trial((best, other, new), self.bracketed, (self.least, self.most))
        if new.value > best.value:
            self.other = at
        else:
            if new.slope * best.slope < 0:
                self.other = self.best
            self.best = at
        self.bracketed = self.bracketed or brackets
        return step

    def _safeguarded(self, step: float, at: Point) -> float:
        """Sets the bounds of the next trial; returns it within bounds."""
        best, other = self.best.step, self.other.step
        if self.bracketed:
            if abs(other - best) >= SHRINKAGE * self.width_before:
                step = best + (other - best) / 2
            self.width_before, self.width = self.width, abs(other - best)
            self.least, self.most = min(best, other), max(best, other)
        else:
            self.least = step + LEAST_GROWTH * (step - best)
            self.most = step + MOST_GROWTH * (step - best)
        step = min(max(step, 0.0), MOST_STEP)
        if self.bracketed and (not self.least < step < self.most or self._is_narrow()):
            return best
        return step


def _next_trial(
    points: tuple[Point, Point, Point], bracketed: bool, bounds: tuple[float, float]
) -> tuple[float, bool]:
    """Returns the next trial, and True where the minimum is now between two points.

    Args:
        points: the best one, the other end, and the new one.
        bracketed: the minimum was between two points before.
        bounds: of the next trial, where it was not.
    """
    best, other, new = points
    if new.value > best.value:
        return _after_a_rise(best, new), True
    if new.slope * best.slope < 0:
        cubic, secant = _cubic(best, new), _secant(best, new)
        further = abs(cubic - new.step) > abs(secant - new.step)
        return (cubic if further else secant), True
    ahead = new.step > best.step
    if abs(new.slope) < abs(best.slope):
        return _while_flattening(points, bracketed, bounds), False
    if bracketed:
        return _cubic(other, new), False
    return (bounds[1] if ahead else bounds[0]), False


def _after_a_rise(best: Point, new: Point) -> float:
    span = new.step - best.step
    theta = 3 * (best.value - new.value) / span + best.slope + new.slope
    gamma = _root(theta, best.slope, new.slope)
    gamma = -gamma if span < 0 else gamma
    share = ((gamma - best.slope) + theta) / (((gamma - best.slope) + gamma) + new.slope)
    cubic = best.step + share * span
    fall = best.slope / ((best.value - new.value) / span + best.slope)
    quadratic = best.step + fall / 2 * span
    if abs(cubic - best.step) <= abs(quadratic - best.step):
        return cubic
    return cubic + (quadratic - cubic) / 2


def _while_flattening(
    points: tuple[Point, Point, Point], bracketed: bool, bounds: tuple[float, float]
) -> float:
    best, other, new = points
    ahead = new.step > best.step
    theta = 3 * (best.value - new.value) / (new.step - best.step) + best.slope + new.slope
    gamma = _root(theta, best.slope, new.slope)
    gamma = -gamma if ahead else gamma
    share = ((gamma - new.slope) + theta) / ((gamma + (best.slope - new.slope)) + gamma)
    if share < 0 and gamma != 0:
        cubic = new.step + share * (best.step - new.step)
    else:
        cubic = bounds[1] if ahead else bounds[0]
    secant = _secant(best, new)
    nearer = abs(cubic - new.step) < abs(secant - new.step)
    if not bracketed:
        further = abs(cubic - new.step) > abs(secant - new.step)
        return min(max(cubic if further else secant, bounds[0]), bounds[1])
    step, limit = cubic if nearer else secant, new.step + SHRINKAGE * (other.step - new.step)
    return min(limit, step) if ahead else max(limit, step)


def _cubic(end: Point, new: Point) -> float:
    """Returns the minimum of the cubic through both points."""
    theta = 3 * (end.value - new.value) / (new.step - end.step) + end.slope + new.slope
    gamma = _root(theta, end.slope, new.slope)
    gamma = -gamma if new.step > end.step else gamma
    share = ((gamma - new.slope) + theta) / (((gamma - new.slope) + gamma) + end.slope)
    return new.step + share * (end.step - new.step)


def _secant(end: Point, new: Point) -> float:
    return new.step + new.slope / (new.slope - end.slope) * (end.step - new.step)


def _root(theta: float, first: float, second: float) -> float:
    """Returns sqrt(theta^2 - first * second) without overflow, 0 where that is negative."""
    scale = max(abs(theta), abs(first), abs(second))
    square = (theta / scale) ** 2 - (first / scale) * (second / scale)
    return scale * math.sqrt(max(0.0, square))
