"""Imports run one way, every name has one owner, tools answer at once, documents say what the scripts know."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

from medicalgpt.arguments import COMMON_DEFAULTS
from medicalgpt.flags import RENAMED_FLAGS, FlagParser

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
MODULES = sorted((ROOT / "medicalgpt").glob("*.py"))
NAMES = {path.stem for path in SCRIPTS} | {"medicalgpt"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LAUNCHED = {
    path.name: match[1]
    for path in ROOT.glob("run_*.sh")
    if (match := re.search(r"torchrun --nproc_per_node 2 (\w+\.py)", path.read_text(encoding="utf-8")))
}
LIGHT_MODULES = (
    *("call_rows", "content", "data_files", "dialects", "encodings", "errors", "file_faults", "holdout"),
    *(
        "html_text",
        "json_array",
        "json_values",
        "kinds",
        "launch",
        "records",
        "rendering",
        "row_fields",
        "row_fixer",
        "row_log",
        "row_writer",
        "tables",
    ),
    *("text_repair", "tool_flags", "tool_formats", "turns", "write_back"),
)
# what may wait in a function: workbooks and parquet files
LAZY = {"medicalgpt.tables": {"openpyxl", "pyarrow", "pyarrow.parquet"}}
LIGHT = ["template", *(f"medicalgpt.{name}" for name in LIGHT_MODULES)]


def module_name(path: Path) -> str:
    """medicalgpt/records.py → medicalgpt.records"""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Return the modules that a file imports, as `a.b`; those inside functions only with `lazy`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not lazy:
        inner = (ast.FunctionDef, ast.AsyncFunctionDef)
        tree.body = [node for node in tree.body if not isinstance(node, inner)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            own = {f"{node.module}.{alias.name}" for alias in node.names} & set(map(module_name, MODULES))
            found |= own or {node.module}
    return found


# ---- imports -----------------------------------------------------------------------------------------------


def test_modules_of_the_package_import_each_other_in_no_circle():
    """Take away modules that import none of the rest until nothing is left; a circle would stay."""
    rest = {module_name(path): imports(path) for path in MODULES if path.stem != "__init__"}
    while rest:
        leaves = [name for name, wanted in rest.items() if not wanted & set(rest)]
        assert leaves, f"circle among {sorted(rest)}"
        for name in leaves:
            del rest[name]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_no_other_script_but_template(path):
    own = {name for name in imports(path) if name.partition(".")[0] in NAMES - {"medicalgpt"}}
    assert own <= {"template"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_package_imports_no_script_but_template(path):
    own = {name for name in imports(path) if name.partition(".")[0] in NAMES - {"medicalgpt"}}
    assert own <= {"template"}


@pytest.mark.parametrize("name", LIGHT)
def test_what_tools_need_is_made_of_the_standard_library(name):
    """What LAZY names may wait in its function."""
    path = ROOT / f"{name.replace('.', '/')}.py"
    foreign = {
        wanted for wanted in imports(path) if wanted.partition(".")[0] not in sys.stdlib_module_names
    } - set(LIGHT)
    assert foreign <= LAZY.get(name, set())
    assert not LAZY.get(name, set()) & imports(path, lazy=False)


def test_the_template_imports_nothing_of_the_project():
    assert not {name for name in imports(ROOT / "template.py") if name.partition(".")[0] in NAMES}


@pytest.mark.parametrize("name", LIGHT)
def test_what_tools_need_loads_no_library(name):
    code = f"import sys, {name}; print(sorted({{'torch', 'transformers', 'numpy', 'datasets', 'openpyxl', 'pyarrow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- names -------------------------------------------------------------------------------------------------


def test_no_function_or_class_is_defined_in_two_files():
    """`main` is every script's own; choose_dtype is a stage's and a chat's, and the two decide differently."""
    owners = defaultdict(list)
    for path in SCRIPTS + MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                owners[node.name].append(module_name(path))
    twice = {name: places for name, places in owners.items() if len(places) > 1}
    assert set(twice) - {"main"} <= {"choose_dtype"}, twice


# ---- documents ---------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Return the commands of a document's ```bash blocks: comments stripped, continued lines joined."""
    blocks = re.findall(r"^ *```(?:bash|sh|shell)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    stripped = (" ".join(shlex.split(line, comments=True)) for line in lines)
    return [line for line in stripped if line]


def script_calls(text: str) -> list[tuple[str, list[str]]]:
    """Return (script, its flags) of every `python X.py --flag …` or launcher in a document's commands."""
    calls = []
    for line in commands(text):
        words = line.split()
        for place, word in enumerate(words):
            before = words[place - 1] if place else ""
            if word.endswith(".py") and before.startswith("python"):
                script = word
            elif word in LAUNCHED and before == "bash":
                script = LAUNCHED[word]
            else:
                continue
            calls.append((script, [w.partition("=")[0] for w in words[place + 1 :] if w.startswith("--")]))
    return calls


class CollectedError(Exception):
    """Ends a script's main once its argument dataclasses are known."""


@cache
def known_flags(script: str) -> frozenset[str]:
    """Return every flag that a script understands, from its own parser or, failing that, its --help."""
    module = importlib.import_module(script.removesuffix(".py"))
    is_stage = any(name.endswith("Trainer") for name in vars(module))
    owners = [importlib.import_module("medicalgpt.arguments")] if is_stage else []
    owners += [module] if hasattr(module, "parse_arguments") else []
    if not owners:
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return frozenset(re.findall(r"--[\w-]+", done.stdout))
    types = {}

    def collect(argv, wanted, *_):
        types.update(dict.fromkeys(wanted))
        raise CollectedError

    with pytest.MonkeyPatch.context() as patch:
        for owner in owners:
            patch.setattr(owner, "parse_arguments", collect)
        for argv in ([], ["--score_file", "f"]):  # a script with two uses has two parsers
            with pytest.raises(CollectedError):
                module.main(argv)
    parsers = [FlagParser([t]) for t in types]
    return frozenset(
        {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
        | set(RENAMED_FLAGS)
        | {"--debug"}
    )


def test_known_flags_are_those_of_the_scripts_own_parser():
    assert {
        "--lora_rank",
        "--block_size",
        "--warmup_ratio",
        "--debug",
        *map("--{}".format, COMMON_DEFAULTS),
    } <= (known_flags("pretraining.py"))
    assert "--beta" not in known_flags("pretraining.py")
    assert "--learning_rate" not in known_flags("merge_peft_adapter.py")


def test_commands_are_read_from_bash_blocks_without_comments():
    text = """Do this:
```bash
# first
python a.py --one 1 \\
    --two=2  # why
  CUDA_VISIBLE_DEVICES=0 python b.py --three "a --four"
```
```bash
bash run_pt.sh --six 6
```
```python
python c.py --five
```
"""
    assert commands(text) == [
        "python a.py --one 1 --two=2",
        "CUDA_VISIBLE_DEVICES=0 python b.py --three a --four",
        "bash run_pt.sh --six 6",
    ]
    calls = script_calls(text)
    assert (calls[0], calls[-1]) == (("a.py", ["--one", "--two"]), ("pretraining.py", ["--six"]))


def test_every_document_has_its_chinese_twin_and_no_twin_is_alone():
    """*.md ↔ *_zh.md; a licence or the like is no .md file here."""
    names = {str(path.relative_to(ROOT).with_suffix("")) for path in DOCUMENTS}
    alone = {name for name in names if not name.endswith("_zh") and f"{name}_zh" not in names}
    orphans = {name for name in names if name.endswith("_zh") and name.removesuffix("_zh") not in names}
    assert not alone | orphans


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if not path.stem.endswith("_zh")], ids=lambda path: path.name
)
def test_both_languages_give_the_same_commands(path):
    twin = path.with_stem(f"{path.stem}_zh")
    if not twin.exists():
        pytest.skip(f"{twin.name} does not exist")
    assert commands(path.read_text(encoding="utf-8")) == commands(twin.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_uses_only_scripts_that_exist_and_flags_that_they_know(path):
    for script, flags in script_calls(path.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script
        assert set(flags) <= known_flags(Path(script).name), script


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_command_lines_in_a_scripts_docstring_use_flags_that_it_knows(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    joined = re.sub(r"\\+\n\s*", " ", docstring)
    for line in re.findall(rf"^ +python {path.name} .*$", joined, re.MULTILINE):
        flags = set(re.findall(r"--\w+", line))
        assert flags
        assert flags <= known_flags(path.name)
