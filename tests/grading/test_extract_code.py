"""The program of a completion is its last block of Python, whole."""

import pytest

from trd_jax.grading.code.extract_code import last_program


@pytest.mark.parametrize(
  ("completion", "program"),
  [
    ("```python\nprint(1)\n```", "print(1)\n"),
    ("```py\nprint(1)\n```\n", "print(1)\n"),
    ("``` Python3 \nprint(1)\n```", "print(1)\n"),
    ("So:\n```\nprint(1)\n```\nDone.", "print(1)\n"),
    ("~~~python\nprint(1)\n~~~", "print(1)\n"),
    ("```python\na\n```\n```python\nb\n```", "b\n"),
    ("```python\na\n```\nIt prints\n```text\n3\n```", "a\n"),
    ("```python\na\n```\n```cpp\nb;\n```", "a\n"),
    ("```python title=x.py\na\n```", "a\n"),
    ("1. First\n   ```python\n   if x:\n     y\n   ```", "if x:\n  y\n"),
    ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
    ("```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
    ("```python\r\na\r\n```\r\n", "a\r\n"),
    # A sample of output, before or after, is no program.
    ("```python\na\n```\nOutput:\n```\n1\n```", "a\n"),
    ("Input:\n```\n1\n```\n```python\na\n```", "a\n"),
    ("```python\n\n```\n```\n1\n```", None),
    ("```\na\n```\n```\nb\n```", "b\n"),
    ("```cpp\na;\n```\n```\nb\n```", "b\n"),
    # As people mark Python.
    ("```python3.11\na\n```\n```\n1\n```", "a\n"),
    ("```PY\na\n```\n```\n1\n```", "a\n"),
    ("```{python}\na\n```\n```\n1\n```", "a\n"),
    ("```{.python .numberLines}\na\n```\n```\n1\n```", "a\n"),
    ("```{ .py }\na\n```\n```\n1\n```", "a\n"),
    ("```{Python, echo=True}\na\n```\n```\n1\n```", "a\n"),
    ("```python:main.py\na\n```\n```\n1\n```", "a\n"),
    ("```Python 3\na\n```\n```\n1\n```", "a\n"),
    ("```pypy3\na\n```\n```\n1\n```", "a\n"),
    # A fence far to the right of the block's own is an example in it.
    (
      '```python\ndef f():\n    """\n    ```python\n    f()\n    ```\n'
      '    """\n```',
      'def f():\n    """\n    ```python\n    f()\n    ```\n    """\n',
    ),
    ("```\na\n   ```\nb", "a\n"),
    # In a string of the program it is text, wherever it stands.
    ("```python\ns = '''\n```\n'''\nb\n```", "s = '''\n```\n'''\nb\n"),
    (
      '```python\n# it\'s\ns = """\n```\n"""\n```',
      '# it\'s\ns = """\n```\n"""\n',
    ),
    ("```python\ns = '''\n```\nSo it is.", "s = '''\n"),
    ("> ```python\n> a\n>\n> b\n> ```", "a\n\nb\n"),
    ("\ufeff```python\na\n```", "a\n"),
    ("```ipython3\na\n```\n```\n1\n```", "a\n"),
    ("[PYTHON]\na\n[/PYTHON]", "a\n"),
    ("[PYTHON]\na\n[/PYTHON]\n```python\nb\n```", "b\n"),
    ("[PYTHON]\na\n", None),
    ("- First:\n\n      ```py\n      a\n      ```", "a\n"),
    # Closed at the end of a line of code, for want of a proper end.
    ("```python\na\nb```", "a\nb"),
    ("```python\na``` \nIt prints 1.", "a"),
    ("```cpp\na;```", None),
    # And what is not Python, or not code.
    ("```python\na\n```\n```pycon\n>>> b\n```", "a\n"),
    ("```python\na\n```\n```python-repl\n>>> b\n```", "a\n"),
    ("```python\na\n```\n```python2\nprint b\n```", "a\n"),
    # Behind words, where the mark itself says that a program begins.
    ("So: ```python\na\n```\nDone.", "a\n"),
    ("So: ```\na\n```", None),
    ("I used a ```python``` block:\n```python\na\n```", "a\n"),
    ("```python\na\n```\nBetter: ```python\nb", None),
    # Markdown may hold it, where nothing beside it does.
    ("````markdown\n# So\n```python\na\n```\n````", "a\n"),
    ("```python\na\n```\n````md\n```python\nb\n```\n````", "a\n"),
    # What is not whole is no answer, and no earlier block replaces it.
    ("```python\nprint(1)\n", None),
    ("```python\na\n```\nBetter:\n```python\nb", None),
    ("```python\na\n```\n</think>\nThe answer is 3.", None),
    ("<think>```python\na\n```</think>", None),
    ("```cpp\nint main() {}\n```", None),
    ("```python\n\n```", None),
    ("print(1)", None),
    ("`print(1)`", None),
    ("", None),
  ],
)
def test_where_the_program_is(completion, program):
  assert last_program(completion) == program


def test_a_text_of_fences_takes_linear_time():
  assert last_program("```\n" * 200_001) is None
  assert last_program("`" * 1_000_000) is None
  assert last_program((" " * 1000 + "\n") * 1000) is None
