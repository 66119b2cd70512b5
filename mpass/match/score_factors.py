"""The numbers that scores are multiplied by on their way to the softmax."""

from __future__ import annotations

from torch import fx

from mpass.graph.arguments import argument, bind
from mpass.graph.nodes import op_name
from mpass.match.common import constant_number

NOT_CONSTANT = "scores are scaled by what is not a constant"


def product_factor(product: fx.Node) -> float | None:
    """The number that a product is scaled by itself: baddbmm's alpha."""
    if op_name(product) != "baddbmm":
        return 1.0
    return constant_number(argument(product, "alpha", 1))


def factor_problem(op: fx.Node, carried: fx.Node) -> str:
    """Why an op does not multiply the scores by a number."""
    divides = op_name(op) not in ("mul", "multiply")
    if divides and bind(op).get("input") is not carried:
        return "something is divided by the scores"
    if divides and constant_number(bind(op).get("other")) == 0:
        return "scores are divided by zero"
    return NOT_CONSTANT


def constant_factor(op: fx.Node, carried: fx.Node) -> float | None:
    """The number that an op multiplies the scores by."""
    given = bind(op)
    if any(given[extra] is not None for extra in given.keys() - {"input", "other"}):
        return None
    divided = given.get("input") is carried
    other = constant_number(given.get("other") if divided else given.get("input"))
    if other is None:
        return None
    if op_name(op) in ("mul", "multiply"):
        return other
    return 1.0 / other if divided and other else None
