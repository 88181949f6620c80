"""Prompts that ask to complete a function, made from the references of other prompts.

    python specialists/code/prompts.py code.jsonl > code-complete.jsonl

Each row of the input whose reference answer is Python gives one prompt: what it imports, the first function's
signature, and the row's instruction, with its asserts as examples, for a docstring. The body is left out.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

_FENCED = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
_ASSERT = re.compile(r"^assert (.+?) == (.+?)\s*$", re.MULTILINE)
# "Write a Python function that returns ..." becomes "Returns ...".
_REQUEST = re.compile(
    r"^(?:can you |please )?(?:write|create|develop|implement|define|build)(?: me)? (?:a|an)? ?"
    r"(?:simple )?(?:recursive )?(?:python )?(?:function|program|method|script)(?: in python)?,?"
    r"(?: named \w+)?(?: that | which | to | for )",
    re.IGNORECASE,
)


def completions(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A prompt for every row of `messages` whose reference holds a Python function."""
    for row in rows:
        asked = next(m["content"] for m in row["messages"] if m["role"] == "user")
        answered = next((m["content"] for m in row["messages"] if m["role"] == "assistant"), "")
        if stub := _stub(asked, answered):
            content = f"Complete the code I provided.\n\n{stub}"
            yield {"id": f"complete-{row['id']}", "messages": [{"role": "user", "content": content}]}


def _stub(asked: str, answered: str) -> str | None:
    fenced = _FENCED.search(answered)
    try:
        parsed = ast.parse(fenced.group(1) if fenced else answered).body
    except SyntaxError:
        return None
    function = next((node for node in parsed if isinstance(node, ast.FunctionDef)), None)
    if function is None:
        return None
    imports = [ast.unparse(node) for node in parsed if isinstance(node, ast.Import | ast.ImportFrom)]
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"def {function.name}({ast.unparse(function.args)}){returns}:"
    lines = [_description(asked)]
    for call, value in _ASSERT.findall(asked)[:2]:
        lines += [f">>> {call}", value]
    docstring = '    """ ' + "\n    ".join(lines) + '\n    """'
    return "\n\n\n".join(part for part in ("\n".join(imports), f"{signature}\n{docstring}\n") if part)


def _description(asked: str) -> str:
    """The first line of the instruction, as a docstring would say it."""
    first = asked.strip().split("\n", 1)[0].strip()
    said = _REQUEST.sub("", first)
    return said[:1].upper() + said[1:]


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as lines:
        for prompt in completions(json.loads(line) for line in lines):
            print(json.dumps(prompt))
