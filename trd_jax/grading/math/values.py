"""Reads LaTeX into trees and finds what they are worth, within bounds.

LaTeX is read by latex2sympy (which math-verify builds on) without letting
sympy simplify anything. A tree is evaluated here: exactly, in rational
arithmetic, as far as that goes, else to as many digits as telling two values
apart takes, and with unknowns at random points. Sizes are bounded before each
operation, so that a tower of powers raises `TooLarge` instead of running for
ever.

Only the worker process imports this module: sympy takes most of a second.
"""

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy.core.function import AppliedUndef

from trd_jax.grading.math import opaque

_MAX_BITS = 200_000  # of an exact numerator or denominator
_MAX_FACTORIAL = 20_000
_MAX_TERMS = 5_000  # of a finite sum or product
DIGITS = 50  # both relative and absolute agreement that "equal" takes
ENOUGH_POINTS = 3  # the first ones, where all unknowns are positive
_SIGNS = 3  # of which combinations tell seven unknowns apart
POINTS = ENOUGH_POINTS + 1 + _SIGNS
_MAX_DIGITS = 20_000  # that two tiny values are evaluated to
_INTEGERS = range(4, 17)  # where floors and ceilings are compared as well
_ARGUMENT_DIGITS = 25  # to which the arguments of an unknown function agree
_STEPS = 64  # as much farther out is where floors and ceilings differ

DECIMAL = re.compile(r"\d*\.\d+|\d+\.")
_AMBIGUOUS = re.compile(r"(?<![_^])\d\s+\d")  # 10, 1·0 or 1, 0?
_PRIMES = re.compile(r"(?<![\\A-Za-z_])([A-Za-z])('+)")
# An index at a number, and a number right after !, say nothing that we know.
_UNREADABLE = re.compile(
  r"\d\s*(?:\^\s*\{[^{}]*\}\s*)?_|(?<![\\A-Za-z])e\^\{[^{}]*\}_|!\s*\d|\\text\s*\{[^{}]*[A-Za-z]{2}|:.*:"
)
# The grammar takes the cross product of two vectors for that of two numbers.
_VECTOR = r"\\(?:vec|overrightarrow)(?![a-z])"
_CROSS = re.compile(
  rf"{_VECTOR}\s*(?:\{{[^{{}}]*\}}|\w)\s*\\times\s*{_VECTOR}"
  # So are sets in capitals, A \times B.
  r"|(?<![A-Za-z\\])[A-Z]\s*\\times\s*[A-Z](?![A-Za-z])"
)
# What the grammar reads as it is meant. Of others it makes letters, or nothing.
# fmt: off
_READABLE = frozenset(
  [
    "frac", "sqrt", "binom", "cdot", "times", "div", "pm", "mp", "pi",
    "infty", "sum", "prod", "int", "iint", "lim", "to", "rightarrow", "begin",
    "end", "text", "mathbb", "emptyset", "cup", "cap", "setminus", "in",
    "circ", "ldots", "sin", "cos", "tan", "cot", "sec", "csc", "arcsin",
    "arccos", "arctan", "arccot", "arcsec", "arccsc", "sinh", "cosh", "tanh",
    "coth", "arsinh", "arcosh", "artanh", "arcsinh", "arccosh", "arctanh",
    "ln", "log", "exp", "lfloor", "rfloor", "lceil", "rceil", "gcd", "lcm",
    "max", "min", "vec", "partial", "ell", "hbar", "prime", "alpha", "beta",
    "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta",
    "vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma",
    "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
    "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi",
    "Omega", "mathcal",
  ]
)
# fmt: on
_NAME = re.compile(r"\\([A-Za-z]+)")
# Complex numbers by their letters, where a formula is about such.
_COMPLEX = re.compile(r"[zw](?:_.*)?\Z")
_INVERSE = re.compile(r"(?<![\\A-Za-z_])([fg])\s*\^\s*\{\s*-\s*1\s*\}(?=\s*\()")
_TRANSPOSED = re.compile(r"\^\s*(?:\{\s*(?:T|\\top)\s*\}|T|\\top)(?![A-Za-z_])")
_INDEXED = re.compile(r"(?<![\\A-Za-z])([A-DF-HJ-Za-df-hj-z])(\d+)(?!\s*[\d^])")
_MIXED = re.compile(r"(?<![\d^_.{])(\d+)\s*(\\frac\{\d+\}\{\d+\})")


class _Reader(_Latex2Sympy):
  """latex2sympy 1.11.0, which math-verify pins, with juxtaposition a product.

  It reads `3(2)` and `8\\binom{5}{2}` as mixed numbers: 5 and 18.
  """

  def __init__(self):
    super().__init__(config=ConversionConfig(lowercase_symbols=False))

  def convert_postfix_list(self, arr, i: int = 0):
    factors = [self.convert_postfix(one) for one in arr[i:]]
    if not all(isinstance(f, sympy.Expr | sympy.MatrixBase) for f in factors):
      if len(factors) == 1:
        return factors[0]
      raise ValueError("a factor that is no expression")
    product = factors.pop()
    while factors:
      left = factors.pop()
      matrices = isinstance(left, sympy.MatrixBase | sympy.MatrixExpr) or (
        isinstance(product, sympy.MatrixBase | sympy.MatrixExpr)
      )
      multiply = self.mat_mul_flat if matrices else self.mul_flat
      product = multiply(left, product)
    return product

  def handle_gcd_lcm(self, f, args):
    """Leaves gcd and lcm of unknowns open: sympy takes them for polynomials.

    So gcd(a, b) would be 1.
    """
    if any(has_unknowns(one) for one in args):
      return sympy.Function(f)(*sorted(args, key=sympy.srepr))
    return super().handle_gcd_lcm(f, args)


class TooLarge(Exception):
  """A value that nothing sensible can be done with."""


class OffDomain(ZeroDivisionError):
  """A point where a formula has no value among the real numbers."""


class Unsupported(Exception):
  """A tree with something in it that we don't evaluate."""


@functools.lru_cache(maxsize=512)
def parse(
  text: str, functions: frozenset[str] = frozenset()
) -> sympy.Basic | None:
  """Reads one value; None where it can't be read.

  Decimals become exact fractions, `i` the imaginary unit and `e` its base.

  Args:
    text: a cleaned formula.
    functions: letters that name functions, as `opaque.functions_of` finds
      them.
  """

  def fraction(match: re.Match[str]) -> str:
    value = Fraction(match[0].rstrip("."))
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"

  if _CROSS.search(text):
    return None
  text, parts = opaque.take_out(text, functions)
  if _UNREADABLE.search(text) or not _READABLE.issuperset(_NAME.findall(text)):
    return None
  text = _TRANSPOSED.sub("^{T_{0}}", text)  # the grammar would drop it
  text = _INDEXED.sub(r"\1_{\2}", text)  # x1 is x_1, as programs write it
  # Mixed numbers before decimals, whose fractions would join the whole number
  # before them.
  text = _MIXED.sub(r"(\1+\2)", text)
  text = DECIMAL.sub(fraction, text)
  text = re.sub(r"\\text\s*\{\s*([A-Za-z](?:\^\{?\d\}?)?)\s*\}", r" \1 ", text)
  if re.fullmatch(r"[^:]+:[^:]+", text):
    text = "\\frac{{{}}}{{{}}}".format(*text.split(":"))
  text = text.replace("\\ldots", " l_{dots} ")
  # The grammar skips primes, and would take a derivative for its function.
  text = _PRIMES.sub(lambda m: f"{m[1]}_{{{len(m[2]) * 'prime'}}}", text)
  # Nor is an inverse the reciprocal.
  text = _INVERSE.sub(r"\1_{inverse}", text)
  if "'" in text or _AMBIGUOUS.search(text):
    return None
  try:
    tree = _Reader().parse(text)
  except Exception:  # the grammar raises bare Exceptions
    return None
  if not isinstance(tree, sympy.Basic | sympy.MatrixBase):
    return None
  calls = {name: _call(part, functions) for name, part in parts.items()}
  if any(call is None for call in calls.values()):
    return None
  if calls and not isinstance(tree, sympy.Basic):
    return None
  tree = _with_open_derivatives(cast(sympy.Basic, tree))
  found = {sympy.Symbol(name): call for name, call in calls.items()}
  return tree.xreplace(found) if found else tree


_OF_COMPLEX = {"conjugate": sympy.conjugate, "re": sympy.re, "im": sympy.im}


def _call(part: opaque.Part, functions: frozenset[str]) -> sympy.Basic | None:
  """Returns the tree of what `opaque` has taken out; None: unreadable."""
  arguments = [parse(text, functions) for text in part.arguments]
  if not all(isinstance(one, sympy.Expr) for one in arguments):
    return None
  if not arguments:
    return sympy.Symbol(part.function)
  known = _OF_COMPLEX.get(part.function)
  if known is None:
    return sympy.Function(part.function)(*arguments, evaluate=False)
  return known(arguments[0], evaluate=False) if len(arguments) == 1 else None


def _with_open_derivatives(tree: sympy.Basic) -> sympy.Basic:
  """Replaces each dy/dx by an unknown of its own.

  Sympy doesn't know that y depends on x, and would make it 0.
  """
  # Or a matrix, which nothing here evaluates.
  if not isinstance(tree, sympy.Basic):
    return tree
  opened = {
    part: sympy.Symbol(sympy.srepr(part))
    for part in tree.atoms(sympy.Derivative)
    if isinstance(part.expr, sympy.Symbol) and part.expr not in part.variables
  }
  return tree.xreplace(opened)


def _bits(value: Fraction) -> int:
  return value.numerator.bit_length() + value.denominator.bit_length()


def _integer(value: Fraction | None) -> int | None:
  if value is None or value.denominator != 1:
    return None
  return value.numerator


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
  power = _integer(exponent)
  if power is None:
    return None
  if base in (0, 1, -1):
    if base == 0 and power < 0:
      raise ZeroDivisionError
    return base ** (power % 2 if base == -1 else min(abs(power), 1))
  # The size of the power, from below, before a single product is made.
  if abs(power) * max(1, _bits(base) - 2) > _MAX_BITS:
    raise TooLarge
  return base**power


def exact(tree: sympy.Basic) -> Fraction | None:
  """Returns a tree's rational value, None where it isn't visibly rational.

  Raises:
    TooLarge: it has more than 200,000 bits.
    ZeroDivisionError: it divides by zero.
  """
  if isinstance(tree, sympy.Rational):
    return Fraction(int(tree.p), int(tree.q))
  kinds = (sympy.Add, sympy.Mul, sympy.Pow, sympy.factorial, sympy.binomial)
  if not isinstance(tree, kinds):
    return None
  values = []
  for argument in tree.args:
    value = exact(argument)
    if value is None:
      return None
    values.append(value)
  if isinstance(tree, sympy.Pow):
    return _exact_power(values[0], values[1])
  if isinstance(tree, sympy.factorial):
    n = _integer(values[0])
    if n is None or n < 0:
      return None
    if n > _MAX_FACTORIAL:
      raise TooLarge
    return Fraction(math.factorial(n))
  if isinstance(tree, sympy.binomial):
    n, k = _integer(values[0]), _integer(values[1])
    if n is None or k is None or n < 0 or k < 0:
      return None
    if n > _MAX_FACTORIAL:
      raise TooLarge
    return Fraction(int(sympy.binomial(n, k)))
  total = Fraction(1 if isinstance(tree, sympy.Mul) else 0)
  for value in values:
    total = total * value if isinstance(tree, sympy.Mul) else total + value
    if _bits(total) > _MAX_BITS:
      raise TooLarge
  return total


_FUNCTIONS = {
  sympy.exp: mpmath.exp,
  sympy.sin: mpmath.sin,
  sympy.cos: mpmath.cos,
  sympy.tan: mpmath.tan,
  sympy.cot: mpmath.cot,
  sympy.sec: mpmath.sec,
  sympy.csc: mpmath.csc,
  sympy.asin: mpmath.asin,
  sympy.acos: mpmath.acos,
  sympy.atan: mpmath.atan,
  sympy.sinh: mpmath.sinh,
  sympy.cosh: mpmath.cosh,
  sympy.tanh: mpmath.tanh,
  sympy.Abs: abs,
  sympy.re: mpmath.re,
  sympy.im: mpmath.im,
  sympy.conjugate: mpmath.conj,
  sympy.factorial: mpmath.factorial,
  sympy.gamma: mpmath.gamma,
  sympy.binomial: mpmath.binomial,
  sympy.floor: mpmath.floor,
  sympy.ceiling: mpmath.ceil,
  sympy.log: mpmath.log,
  sympy.Max: max,
  sympy.Min: min,
}
_CONSTANTS = {
  sympy.pi: lambda: +mpmath.pi,
  sympy.E: lambda: +mpmath.e,
  sympy.I: lambda: mpmath.mpc(0, 1),
  sympy.GoldenRatio: lambda: +mpmath.phi,
}


def _log10(magnitude) -> float:
  """Estimates log10 of a non-negative number, from its exponent, to 0.4."""
  if not magnitude:
    return -math.inf
  return float(mpmath.mag(magnitude)) * math.log10(2)


def _unknowns(tree: sympy.Basic) -> set[str]:
  """Names what a tree's value depends on; `i` is a number here."""
  names = {symbol.name for symbol in tree.atoms(sympy.Symbol)} - {"i"}
  return names | {sympy.srepr(call) for call in tree.atoms(AppliedUndef)}


def has_unknowns(tree: sympy.Basic) -> bool:
  """Returns whether a tree's value depends on anything."""
  return bool(tree.atoms(AppliedUndef)) or any(
    str(symbol) != "i" for symbol in tree.free_symbols
  )


def _is_for_all(tree: sympy.Basic) -> bool:
  """Returns whether a formula holds complex numbers or magnitudes."""
  return tree.has(
    sympy.I, sympy.Abs, sympy.conjugate, sympy.re, sympy.im, sympy.Symbol("i")
  )


class Evaluator:
  """Evaluates trees at one point with mpmath's current precision.

  The first points are positive: roots and logarithms exist there. The next is
  negative throughout, and at those after it any two of the unknowns differ in
  sign somewhere.

  Args:
    trees: what will be evaluated.
    seed: chooses the point.

  Attributes:
    largest: log10 of the largest magnitude met on the way, at least 0.
  """

  def __init__(self, trees: Sequence[sympy.Basic], seed: int):
    self._seed = seed
    self._real = not any(map(_is_for_all, trees))
    names = sorted({name for tree in trees for name in _unknowns(tree)})
    # Of x, y and z the last is a coordinate.
    self._complex = {
      name
      for name in names
      if not self._real and _COMPLEX.match(name) and not {"x", "y"} & {*names}
    }
    steps = any(tree.has(sympy.floor, sympy.ceiling) for tree in trees)
    self._scale = _STEPS if steps else 1
    self._numbers = {name: number for number, name in enumerate(names, 1)}
    self.largest = 0.0

  def _unknown(self, name: str):
    """Returns the value of an unknown at this point."""
    # A hash of the name: gold and answer get one value for it, in whatever
    # order they are met, and a verdict is the same in every run (Python's own
    # hash of a text is not).
    digest = hashlib.sha256(f"{name}:{self._seed}".encode()).digest()
    size = mpmath.mpf(int.from_bytes(digest[:8], "big")) / 2**64
    past = self._seed - ENOUGH_POINTS
    number = self._numbers.get(name, 0)  # 0: f(1), of a sum over f(k)
    negative = past == 0 or (past > 0 and number >> (past - 1) % _SIGNS & 1)
    sign = mpmath.mpf(-1 if negative else 1)
    if name in self._complex:
      angle = mpmath.mpf(int.from_bytes(digest[8:12], "big")) / 2**32
      sign = mpmath.expjpi(2 * angle)
    return sign * self._scale * (mpmath.mpf(1) / 4 + 2 * size)

  def _applied(self, tree: sympy.Basic):
    """Returns the value of a function of which only the name is known.

    The same name and the same values of its arguments give the same.
    """
    values = [str(mpmath.nstr(self(a), _ARGUMENT_DIGITS)) for a in tree.args]
    return self._unknown(f"{tree.func.__name__}({','.join(values)})")

  def _note(self, value):
    magnitude = abs(value)
    if mpmath.isnan(magnitude) or mpmath.isinf(magnitude):
      raise ZeroDivisionError
    if self._real and self._seed >= ENOUGH_POINTS and mpmath.im(value) != 0:
      raise OffDomain
    if magnitude > 1:
      size = _log10(magnitude)
      if size > _MAX_BITS:
        raise TooLarge
      self.largest = max(self.largest, size)
    return value

  def __call__(self, tree: sympy.Basic) -> Any:
    """Evaluates a tree: an mpf, or an mpc where it is not real."""
    return self._note(self._value(tree))

  def _power(self, base, exponent):
    if base == 0:
      if mpmath.re(exponent) < 0:
        raise ZeroDivisionError
      return mpmath.mpf(1 if exponent == 0 else 0)
    size = max(1.0, abs(_log10(abs(base))))
    if abs(exponent) * size > _MAX_BITS:
      raise TooLarge
    return mpmath.power(base, exponent)

  def _value(self, tree: sympy.Basic):
    if tree in _CONSTANTS:
      return _CONSTANTS[tree]()
    if isinstance(tree, sympy.Symbol):
      return mpmath.mpc(0, 1) if tree.name == "i" else self._unknown(tree.name)
    if isinstance(tree, sympy.Rational):
      if _bits(Fraction(int(tree.p), int(tree.q))) > _MAX_BITS:
        raise TooLarge
      return mpmath.mpf(int(tree.p)) / int(tree.q)
    if isinstance(tree, AppliedUndef):
      return self._applied(tree)
    if isinstance(tree, sympy.UnevaluatedExpr):
      return self(tree.args[0])
    if isinstance(tree, sympy.Sum | sympy.Product):
      return self._series(tree)
    values = [self(argument) for argument in tree.args]
    if isinstance(tree, sympy.Add):
      return mpmath.fsum(values)
    if isinstance(tree, sympy.Mul):
      return mpmath.fprod(values)
    if isinstance(tree, sympy.Pow):
      # Odd roots of negative numbers are real here, as at school; mpmath gives
      # the principal, complex one.
      if self._real and mpmath.im(values[0]) == 0 and mpmath.re(values[0]) < 0:
        order = exact(tree.args[1])
        if order is not None and order.denominator % 2:
          root = self._power(-values[0], values[1])
          return -root if order.numerator % 2 else root
      return self._power(values[0], values[1])
    function = _FUNCTIONS.get(tree.func)
    if function is None:
      raise Unsupported
    if isinstance(tree, sympy.factorial | sympy.binomial | sympy.gamma):
      if abs(values[0]) > _MAX_FACTORIAL:
        raise TooLarge
    elif isinstance(tree, sympy.exp) and abs(values[0]) > _MAX_BITS:
      raise TooLarge
    return function(*values)

  def _series(self, tree: sympy.Sum | sympy.Product):
    if len(tree.limits) != 1:
      raise Unsupported
    index, low, high = tree.limits[0]
    first, last = _integer(exact(low)), _integer(exact(high))
    if first is None or last is None:
      raise Unsupported
    if last - first > _MAX_TERMS:
      raise TooLarge
    terms = [
      self(tree.function.xreplace({index: sympy.Integer(k)}))
      for k in range(first, last + 1)
    ]
    total = mpmath.fsum if isinstance(tree, sympy.Sum) else mpmath.fprod
    return total(terms)


def values_at(
  trees: Sequence[sympy.Basic], seed: int
) -> tuple[list[Any], float]:
  """Evaluates trees at one point; also gives log10 of the rounding in them.

  Past the first points unknowns may be negative. A formula of roots and
  logarithms says nothing there: `\\ln(ab)` is `\\ln a + \\ln b` where both
  exist. Not so with a magnitude in it, which is written for both signs.

  Raises:
    OffDomain: that is such a point.
    ZeroDivisionError: one of them has no value at all.
  """
  evaluator = Evaluator(trees, seed)
  found = [evaluator(tree) for tree in trees]
  return found, evaluator.largest + 10 - mpmath.mp.dps


def same_at(gold: sympy.Basic, answer: sympy.Basic, seed: int) -> bool:
  """Compares trees at one point, relatively and absolutely, to 50 digits."""
  digits = 2 * DIGITS + 20
  for _ in range(4):
    with mpmath.workdps(digits):
      (one, other), rounding = values_at((gold, answer), seed)
      top = max(abs(one), abs(other))
      size = _log10(top) if top else -math.inf
      gap = _log10(abs(one - other))
      # A difference that is no rounding is one, however large both are.
      if gap > rounding and gap > min(size, 0) - DIGITS:
        return False
      # Else it says something only where rounding is below what "equal" takes.
      if rounding <= min(size, 0) - DIGITS:
        return gap <= min(size, 0) - DIGITS
    # Tiny values, or large ones that cancel: look again, closer.
    small = max(size, rounding) if size == -math.inf else size
    if -small > _MAX_DIGITS:
      raise TooLarge
    digits += DIGITS + int(max(0, rounding) - min(0, small))
  return True  # both vanish, to hundreds of digits


def _in_order(tree: sympy.Basic) -> tuple:
  """Returns a tree with the terms of its sums and products in one order."""
  parts = [_in_order(argument) for argument in tree.args]
  if isinstance(tree, sympy.Add | sympy.Mul):
    parts.sort(key=repr)
  return (str(tree.func), *parts) if parts else (sympy.srepr(tree),)


def same_values(gold: sympy.Basic, answer: sympy.Basic) -> bool | None:
  """Returns whether two trees have one value, or one at every point.

  None: there were too few points at which both have a value.
  """
  if _in_order(gold) == _in_order(answer):
    return True
  if not has_unknowns(gold) and not has_unknowns(answer):
    one, other = exact(gold), exact(answer)
    if one is not None and other is not None:
      return one == other
    return same_at(gold, answer, 0)
  agreed = 0
  for seed in range(POINTS):
    try:
      if not same_at(gold, answer, seed):
        return False
      agreed += 1
    except ZeroDivisionError:
      continue
  # Fewer points say nothing: at most points one of the two has no value.
  if agreed < ENOUGH_POINTS:
    return None
  return _same_at_integers(gold, answer)


def _same_at_integers(gold: sympy.Basic, answer: sympy.Basic) -> bool:
  """Compares floors and ceilings where they jump, which random points miss.

  There ⌈n/2⌉ is not ⌊n/2⌋ + 1. Formulas without steps are the same already.
  """
  if not any(tree.has(sympy.floor, sympy.ceiling) for tree in (gold, answer)):
    return True
  symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
  for first in _INTEGERS:
    point = {
      symbol: sympy.Integer(first + 3 * number)
      for number, symbol in enumerate(s for s in symbols if str(s) != "i")
    }
    try:
      # Exactly, since a rounded n/3 may be just below its own floor.
      if not same_at(gold.xreplace(point), answer.xreplace(point), 0):
        return False
    except (
      ZeroDivisionError,
      Unsupported,
      TypeError,
      ValueError,
      AttributeError,
    ):
      continue  # one of them has no value here
  return True
