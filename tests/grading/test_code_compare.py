"""Outputs are compared as the formats define it, whatever they hold."""

import time

import pytest

from trd_jax.grading.code.code_tests import Digits
from trd_jax.grading.code.compare import same_output, same_value


@pytest.mark.parametrize("tolerant", [True, False])
@pytest.mark.parametrize(
  ("expected", "written", "same"),
  [
    ("1 2\n3\n", b"1 2\n3", True),
    ("1 2\n3\n", b"  1   2 \r\n\n3\n\n", True),
    ("1 2\n3\n", b"1\n2\n3\n", False),
    ("1 2\n3\n", b"1 2 3\n", False),
    ("1\n2\n", b"2\n1\n", False),
    ("1 2\n", b"1 2 3\n", False),
    ("1\n", b"", False),
    ("", b"", True),
    ("", b"\n \n", True),
    ("", b"0", False),
    ("YES\n", b"yes\n", False),
    ("2\n", b"2.0\n", True),
    ("2.50\n", b"2.5\n", True),
    ("1e3\n", b"1000\n", True),
    ("7\n", b"007\n", True),
    ("-0\n", b"0\n", True),
    ("1000000007\n", b"1000000008\n", False),
    ("1000000000000000000001\n", b"1000000000000000000000\n", False),
    ("nan\n", b"nan\n", True),
    ("1\n", b"nan\n", False),
    ("1\n", b"inf\n", False),
    ("1\n", b"\xff\xfe", False),
    ("x\n", b"\xff", False),
    ("1\n", "١\n".encode(), False),
    ("1_0\n", b"10\n", False),
    ("0x10\n", b"16\n", False),
  ],
)
def test_programs(expected, written, same, tolerant):
  assert same_output(expected, written, tolerant) is same


@pytest.mark.parametrize(
  ("expected", "written", "same"),
  [
    ("0.333333333", b"0.333334", True),
    ("0.333333333", b"0.33334", False),
    ("0.0", b"0.000000001", True),
    ("0.0", b"0.00001", False),
    ("3", b"2.9999999999999996", True),
    ("3", b"2.99999", False),
    ("100000000", b"100000001", False),
    ("100000000.0", b"100000001", True),
    ("a 0.1", b"a 0.1000000001", True),
    ("a 0.1", b"b 0.1000000001", False),
  ],
)
def test_decimals_may_be_off_where_the_format_says_so(expected, written, same):
  assert same_output(expected, written, tolerant=True) is same
  assert same_output(expected, written, tolerant=False) is False


@pytest.mark.parametrize(
  ("expected", "written", "same"),
  [
    (([3], 3), b"3", True),
    (([3], 3), b"[3]", True),
    (([3],), b"3", False),
    ((3,), b"3.0", True),
    (([None], None), b"null", True),
    ((0,), b"null", False),
    ((True,), b"true", True),
    ((True,), b'"true"', False),
    (("1",), b"1", False),
    (([1, [2, "x"]],), b'[1, [2, "x"]]', True),
    (([1, [2, "x"]],), b'[1, [2, "y"]]', False),
    (({"1": 2},), b'{"1": 2}', True),
    ((0.1,), b"0.1", True),
    ((0.1,), b"0.10000000001", False),
    ((Digits("9" * 5000),), b"9" * 5000, True),
    ((Digits("9" * 5000),), b"9" * 4999 + b"8", False),
    ((Digits("9" * 5000),), b'"' + b"9" * 5000 + b'"', False),
    ((1,), b"NaN", False),
    ((1,), b"", False),
    ((1,), b"1 1", False),
    ((1,), b"\xff", False),
    ((1,), b"[" * 50_000, False),
  ],
)
def test_values(expected, written, same):
  assert same_value(expected, written) is same


def test_what_is_far_too_long_is_not_even_read():
  start = time.process_time()
  assert not same_value((1,), b"[" + b"1," * (8 << 20) + b"1]")
  assert not same_output("1\n", b"1 " * (8 << 20), tolerant=True)
  assert not same_output("1\n", b"9" * 60_000, tolerant=True)
  assert not same_output("1\n", b"1e999 " * 10_000, tolerant=True)
  assert time.process_time() - start < 5  # a bound on work, not a timing


def test_a_functions_floats_may_be_off_by_rounding():
  assert same_value((0.3,), b"0.30000000000000004", tolerant=True)
  assert not same_value((0.3,), b"0.30000000000000004")
  assert same_value(([{"a": 0.3}],), b'[{"a": 0.30000000000000004}]', True)
  for wrong in (b"0.3001", b'"0.3"', b"[0.3]", b"null", b"true"):
    assert not same_value((0.3,), wrong, tolerant=True)
  assert not same_value((2,), b"2.0000000001", tolerant=True)
  assert not same_value((0.3,), b"1" + b"0" * 400, tolerant=True)
