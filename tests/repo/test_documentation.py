"""The examples of README.md and docs/ run as they stand.

A document is one story: its `python` and `bash` blocks run in order in one empty folder, the python blocks in one
namespace, offline. `./example-vlm` there, and what the commands know as the embedded example, is the example checkpoint
with one of its decoder blocks, or with two where a block is named. The commands' process has imported everything
before, and takes 64 built-in samples where a block asks for more (tests/speed/server.py). A comment directly above a
block says so where it is not run:
`<!-- not executed: REASON -->`, or `<!-- ci: NAME -->` where .ci/run runs it.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from optimum_sab.cli.arguments.parser import build_parser

ROOT = Path(__file__).parents[2]
MADE = "optimum-sab example ./example-vlm"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

EXECUTED = ("python", "bash")
SHOWN = ("text", "json", "yaml", "toml", "html", "markdown", "mermaid", "diff", "bibtex")
ENDS = ("&&", "||", "|", ">", ">>", ";", "&")
COMMANDS = (("optimum-sab",), ("optimum-cli", "sab"), ("python", "-m", "optimum_sab"), ("ls",), ("cat",), ("du",))
CI_BLOCKS = {"demo", "test"}
TIME_LIMIT = 900

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^\s`]*).*$")
COMMENT = re.compile(r"^<!--\s*(?P<kind>[^:]*?)\s*(?::\s*(?P<text>.*?))?\s*-->$")

# Runs the blocks of one document. Line numbers in a traceback are those of the document.
DRIVER = r"""
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for block in json.loads(sys.stdin.read()):
    print(f"\n-- {block['path']}:{block['line']} ({block['language']})", flush=True)
    if block["language"] == "bash":
        status = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]], stdin=subprocess.DEVNULL).returncode
        if status:
            sys.exit(f"the block ended with status {status}")
    else:
        exec(compile("\n" * block["line"] + block["code"], block["path"], "exec"), namespace)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        path: the document.
        line: line of the opening fence, from 1.
        language: the word after the fence.
        code: what is between the fences, without the indentation of the fence.
        kind: of the comment directly above, `not executed` or `ci`; empty without one.
        text: what that comment says after the colon.
    """

    path: str
    line: int
    language: str
    code: str
    kind: str = ""
    text: str = ""

    @property
    def executed(self) -> bool:
        return self.language in EXECUTED and not self.kind


def blocks(path: str, document: str) -> list[Block]:
    """The fenced blocks of a document in order."""
    found = []
    lines = document.splitlines()
    above = ""
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        if opening is None:
            if lines[number].strip():
                above = lines[number].strip()
            number += 1
            continue
        end = number + 1
        while end < len(lines) and not lines[end].strip().startswith(opening["fence"]):
            end += 1
        if end == len(lines):
            raise ValueError(f"{path}:{number + 1}: the block is never closed")
        comment = COMMENT.match(above)
        found.append(
            Block(
                path=path,
                line=number + 1,
                language=opening["language"],
                code=textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n",
                kind=(comment["kind"] or "") if comment else "",
                text=(comment["text"] or "") if comment else "",
            )
        )
        above = ""
        number = end + 1
    return found


def commands(code: str) -> list[list[str]]:
    """The words of each command of a shell block, one command per line; a backslash continues a line."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def own_calls(code: str) -> list[list[str]]:
    """What a shell block gives our commands, wherever in a line they stand, each up to where a shell ends it.

    In a loop it is that of the first round.
    """
    for name, first in re.findall(r"^ *for (\w+) in (\S+?);? ", code, re.MULTILINE):
        code = re.sub(rf"\${name}\b", first, code)
    found = []
    for words in commands(code):
        for at, word in enumerate(words):
            begin = at + 1 if word == "optimum-sab" else at + 2 if words[at : at + 2] == ["-m", "optimum_sab"] else None
            if begin is None:
                continue
            ends = [number for number in range(begin, len(words)) if words[number] in ENDS]
            found.append([each.rstrip(";") for each in words[begin : min(ends, default=len(words))]])
    return found


def complaint(block: Block) -> str | None:
    """What is wrong with the block before anything is run, or None."""
    where = f"{block.path}:{block.line}"
    if block.language not in (*EXECUTED, *SHOWN):
        return f"{where}: {block.language!r} is not a language of a block; use one of {(*EXECUTED, *SHOWN)}"
    if block.kind not in ("", "not executed", "ci"):
        return f"{where}: the comment {block.kind!r} above the block means nothing here; move it or correct it"
    if block.kind == "not executed" and len(block.text.split()) < 2:
        return f"{where}: say why the block is not executed: <!-- not executed: REASON -->"
    if block.kind == "ci" and block.text not in CI_BLOCKS:
        return f"{where}: .ci/run runs no block called {block.text!r}"
    if block.language == "bash" and block.executed:
        for words in commands(block.code):
            if not any(words[: len(allowed)] == list(allowed) for allowed in COMMANDS):
                return f"{where}: {shlex.join(words)!r} is not a command that is run here"
    return None


@pytest.fixture
def run(warm):
    """`run_blocks` with commands that need not import anything."""
    return lambda found, folder, example="": run_blocks(found, folder, warm, example)


def run_blocks(found: list[Block], folder: Path, programs: Path, example: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the executed blocks in the folder with those programs, output and errors together.

    What they take for the embedded example is ``example``, or what the programs take for it.
    """
    own = {"EXAMPLE_VLM": example} if example else {}
    environment = (
        os.environ
        | own
        | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(folder / ".cache"),
            "PYTHONUNBUFFERED": "1",
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
    )
    return subprocess.run(
        [programs / "python", "-c", DRIVER],
        input=json.dumps([asdict(block) for block in found if block.executed]),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
    )


def document_blocks(path: Path) -> list[Block]:
    return blocks(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def document_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_document_says_of_every_block_what_becomes_of_it(path):
    found = [complaint(block) for block in document_blocks(path)]
    assert [each for each in found if each] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=document_id)
def test_document_runs_as_it_stands(path, small_example, smallest_example, run, tmp_path):
    found = document_blocks(path)
    if not any(block.executed for block in found):
        pytest.skip("the document has no block to run")
    leaves_one_dense = any(re.search(r"layers\.\d", block.code) for block in found)
    example = small_example if leaves_one_dense else smallest_example
    if not any(MADE in block.code for block in found):
        shutil.copytree(example, tmp_path / "example-vlm")
    finished = run(found, tmp_path, str(example))
    assert finished.returncode == 0, finished.stdout


def not_executed(language: str) -> list[Block]:
    found = [block for path in DOCUMENTS for block in document_blocks(path)]
    return [block for block in found if block.language == language and block.kind == "not executed"]


@pytest.mark.parametrize("block", not_executed("bash"), ids=lambda block: f"{block.path}:{block.line}")
def test_what_is_not_executed_is_shell_and_calls_commands_that_there_are(block):
    checked = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    for arguments in own_calls(block.code):
        if arguments[0] != "run":  # whose arguments are another program's
            build_parser("optimum-sab", arguments).parse_args(arguments)
    for module in re.findall(r"-m (optimum_sab[.\w]*)", block.code):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("block", not_executed("python"), ids=lambda block: f"{block.path}:{block.line}")
def test_what_is_not_executed_is_python(block):
    compile(block.code, block.path, "exec")


def test_calls_are_found_wherever_they_stand():
    code = textwrap.dedent(
        """\
        OMP_NUM_THREADS=2 optimum-sab env --json | head
        for each in 4 5; do
          optimum-sab inspect $each \\
            --json;
        done
        torchrun --nproc-per-node 2 -m optimum_sab plan x && optimum-sab report y > z
        ls
        """
    )
    assert own_calls(code) == [["env", "--json"], ["inspect", "4", "--json"], ["plan", "x"], ["report", "y"]]


def test_readme_holds_each_block_that_ci_runs_once():
    named = [block.text for block in document_blocks(ROOT / "README.md") if block.kind == "ci"]
    assert sorted(named) == sorted(CI_BLOCKS)


def test_ci_runs_each_block_that_is_left_to_it():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [name for name in CI_BLOCKS if not re.search(rf"^run_readme_block {name}$", script, re.MULTILINE)] == []


def test_blocks_are_found_with_their_language_line_and_comment():
    document = textwrap.dedent(
        """\
        # Title

        ```python
        a = 1
        ```

        <!-- not executed: needs a GPU -->

        ```bash
        optimum-sab quantize
        ```

        - an item
          ~~~text
          inside a list
            ```
          ~~~
        ```python
        b = 2
        ```
        """
    )
    assert blocks("x.md", document) == [
        Block("x.md", 3, "python", "a = 1\n"),
        Block("x.md", 9, "bash", "optimum-sab quantize\n", "not executed", "needs a GPU"),
        Block("x.md", 14, "text", "inside a list\n  ```\n"),
        Block("x.md", 18, "python", "b = 2\n"),
    ]


def test_unclosed_block_is_refused():
    with pytest.raises(ValueError, match=r"x\.md:2"):
        blocks("x.md", "text\n```python\na = 1\n")


@pytest.mark.parametrize(
    "document",
    [
        "```\nno language\n```",
        "```py\na = 1\n```",
        "```sh\nls\n```",
        "```console\n$ ls\n```",
        "<!-- not executed -->\n```python\na\n```",
        "<!-- not executed: -->\n```python\na\n```",
        "<!-- not executed: why -->\n```python\na\n```",
        "<!-- skip: too slow here -->\n```python\na\n```",
        "<!-- ci: deploy -->\n```bash\nls\n```",
        "```bash\npip install optimum-sab\n```",
        "```bash\noptimum-sab demo\nrm -rf work\n```",
        "```bash\noptimum-cli export onnx\n```",
    ],
)
def test_block_that_would_be_ignored_is_refused(document):
    assert complaint(blocks("x.md", document)[0]) is not None


@pytest.mark.parametrize(
    "document",
    [
        "```text\noutput\n```",
        "<!-- not executed: needs a GPU -->\n```bash\npip install x\n```",
        "<!-- ci: test -->\n```bash\npython3 -m venv .venv\n```",
        "```bash\n# a comment\noptimum-sab quantize example-vlm \\\n  --output packed  # and more\n```",
        "```bash\noptimum-cli sab inspect packed\npython -m optimum_sab demo\n```",
    ],
)
def test_block_that_is_accounted_for_is_accepted(document):
    assert complaint(blocks("x.md", document)[0]) is None


def test_run_keeps_one_namespace_and_one_folder(run, tmp_path):
    document = (
        "```python\na = 20\nopen('made', 'w').write('kept')\n```\n```bash\ncat made\n```\n```python\nprint(a + 3)\n```"
    )
    finished = run(blocks("x.md", document), tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "kept" in finished.stdout
    assert "23" in finished.stdout


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("text\n\n```python\na = 1\nraise SystemError('here')\n```", 'File "x.md", line 5'),
        ("```bash\ncat missing\n```", "ended with status 1"),
        ("```python\nassert False\n```\n```python\nprint('not reached')\n```", "AssertionError"),
    ],
)
def test_run_stops_at_the_block_that_fails(document, message, run, tmp_path):
    finished = run(blocks("x.md", document), tmp_path)
    assert finished.returncode != 0
    assert message in finished.stdout
    assert "not reached" not in finished.stdout


def test_run_leaves_out_what_is_not_executed(run, tmp_path):
    document = "<!-- not executed: it fails on purpose -->\n```python\n1 / 0\n```\n```python\nprint('after')\n```"
    finished = run(blocks("x.md", document), tmp_path)
    assert finished.returncode == 0
    assert "after" in finished.stdout
